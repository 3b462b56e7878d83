# SPDX-License-Identifier: Apache-2.0
"""Next-token loss while training: gated LoRA against standard LoRA (the paper's figure 6), through the command line.

    python benchmarks/gated_or_standard.py --output runs/gated_or_standard

Runs ``mtp fit`` on the demo twice, with ``model.lora.gated`` true and false, and plots ``val/ntp_loss`` and the total loss.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from mtp_lightning.commands.cli import main as mtp

# The paper's losses: the cross-entropies count NTP positions too, so that a standard LoRA is trained to preserve them.
OVERRIDE = """\
model:
  losses:
    base: {{class_path: mtp_lightning.losses.BaseCrossEntropy, init_args: {{positions: all}}}}
    sampler: {{class_path: mtp_lightning.losses.SamplerCrossEntropy}}
    lcm: {{class_path: mtp_lightning.losses.LatentConsistency}}
data:
  eval_max_rows: 60
trainer:
  max_steps: {steps}
  val_check_interval: {every}
  enable_checkpointing: false
  callbacks: null
  logger:
    class_path: lightning.pytorch.loggers.CSVLogger
    init_args: {{save_dir: {folder}, name: "", version: ""}}
"""


def series(path: Path, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one column of a metrics file, where it has a value."""
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row.get(name)]
    return [int(row["step"]) for row in rows], [float(row[name]) for row in rows]


def main() -> None:
    """Train twice and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--output", type=Path, default=Path("runs/gated_or_standard"))
    parser.add_argument("--steps", type=int, default=120)
    args = parser.parse_args()
    for name in ("gated", "standard"):
        folder = args.output / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "override.yaml").write_text(
            OVERRIDE.format(folder=folder, every=max(1, args.steps // 6), steps=args.steps)
        )
        words = ["fit", "--config", args.config, "--config", str(folder / "override.yaml")]
        words += [f"--model.lora.gated={str(name == 'gated').lower()}"]
        mtp(words)

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name in ("gated", "standard"):
        steps, values = series(args.output / name / "metrics.csv", "val/ntp_loss")
        left.plot(steps, values, marker="o", label=f"{name} LoRA")
        print(f"{name} LoRA: val/ntp_loss " + ", ".join(repr(value) for value in values))
        print(f"{name} LoRA: equal to the last bit at every validation: {len(set(values)) == 1}")
        right.plot(*series(args.output / name / "metrics.csv", "val/loss"), marker="o", label=f"{name} LoRA")
    left.set(title="Next-token loss on held-out text", xlabel="training step", ylabel="val/ntp_loss (nats)")
    right.set(title="Total loss on held-out text", xlabel="training step", ylabel="val/loss")
    left.legend()
    right.legend()
    figure.savefig(args.output / "gated_or_standard.png", dpi=130)
    print(f"plot: {args.output / 'gated_or_standard.png'}")


if __name__ == "__main__":
    main()
