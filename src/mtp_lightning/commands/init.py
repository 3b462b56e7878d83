# SPDX-License-Identifier: Apache-2.0
"""``mtp init``: a configuration for ``mtp fit`` whose sizes fit the base, the data and this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from transformers import AutoModelForCausalLM

from mtp_lightning.commands.run_costs import MEASURED_STEPS, Costs, measured
from mtp_lightning.data.chat import read_template
from mtp_lightning.data.preparing import prepare
from mtp_lightning.data.reading import open_sources
from mtp_lightning.decoding.packed_linear import has_bfloat16_products
from mtp_lightning.errors import UsageError
from mtp_lightning.evaluation.reporting import note
from mtp_lightning.files import atomic_file
from mtp_lightning.modeling.base import load_config, load_tokenizer
from mtp_lightning.modeling.decoder import context_length
from mtp_lightning.paths import check_writable, resolve

SAMPLE_ROWS = 1000
"""Rows whose lengths are looked at."""
VALIDATION_ROWS = 60
"""Rows to hold out, of fewer than ten times as many a tenth."""
EVALUATION_SHARE = 0.2
"""The largest share of a run's time that its validations may take."""
ENOUGH_STEPS = 1000
"""Steps for which a small data set is repeated, up to ``MAX_EPOCHS`` times."""
MIN_HEAD_WIDTH = 256
"""Of a small base's sampler head."""
MIN_EPOCHS, MAX_EPOCHS = 3, 10
FIRST_SIGNS = 100
"""Steps within which acceptance begins to rise; a run of twice as many shows something."""
HEADER = """\
# Written by mtp init for {base_model} and {train} on {machine}.
# Train: mtp fit {output}   Resume: mtp fit {output} --ckpt_path last   All keys: mtp fit --help
"""


class Facts(NamedTuple):
    """What the sizes are chosen by."""

    parameters: int  # of the base
    width: int  # hidden size of the base
    context: int  # positions of the base
    has_template: bool  # True if the base has a chat template
    rows: int  # of the data
    usual_length: int  # tokens that 95 % of the rows do not exceed
    cuda: bool  # True if there is a GPU


class Evaluation(NamedTuple):
    """What a run is validated by."""

    times: int  # validations in the run, the last one at its end
    rows: int  # held-out rows
    prompts: int  # prompts that are decoded
    tokens: int  # of each text
    speed_pairs: int  # texts that are timed against plain decoding

    def seconds(self, costs: Costs) -> float:
        """The longest that one validation takes: drafts that are accepted make it shorter, ends of texts too."""
        plain = min(self.prompts, NUM_DOMAINS) + 2 * self.speed_pairs  # the texts that are compared, and the pairs
        return self.rows * costs.row + self.tokens * (self.prompts * costs.drafted_token + plain * costs.plain_token)


NUM_DOMAINS = 4
"""Domains of the prompts; a text of each is compared with plain decoding."""
EVALUATIONS = (
    Evaluation(5, VALIDATION_ROWS, 12, 96, 4),
    Evaluation(5, 40, 8, 64, 2),
    Evaluation(3, 40, 8, 64, 1),
    Evaluation(3, 24, 4, 48, 0),
    Evaluation(2, 24, 4, 48, 0),
    Evaluation(2, 16, 4, 32, 0),
    Evaluation(1, 16, 4, 32, 0),
    Evaluation(1, 8, 2, 16, 0),
)
"""From the one that tells most to the shortest; a run has the first that its time allows."""


def run_init(options: Any) -> None:
    """``mtp init --base_model M --data.train F``."""
    output, train = Path(options.output), options["data.train"]
    if output.suffix not in (".yaml", ".yml"):
        raise UsageError(f"output must be a .yaml file, got {options.output!r}.")
    if output.exists() and not options.overwrite:
        raise UsageError(f"{options.output!r} exists: choose another --output, or replace it with --overwrite.")
    check_writable(output.absolute().parent, output)
    facts = facts_of(options.base_model, options.revision, train, options["data.chat_template"])
    config = chosen(facts, options.base_model, options.revision, train)
    if options["data.chat_template"] is not None:
        config["data"]["chat_template"] = options["data.chat_template"]
    machine = torch.cuda.get_device_name() if facts.cuda else f"a CPU, {torch.get_num_threads()} threads"
    given = options["data.chat_template"]
    template = f"chat template {given}" if given else "chat template" if facts.has_template else "no chat template"
    note(
        f"base      {options.base_model}: {facts.parameters / 1e6:,.1f} M parameters, context {facts.context:,}, {template}"
    )
    note(f"data      {train}: {facts.rows:,} rows, 95 % of them of {facts.usual_length:,} tokens or fewer")
    note(f"machine   {machine}; measuring steps and decoding, about a minute for a small base ...")
    costs = measured(config)
    hours = options.hours if options.hours is not None else (12.0 if facts.cuda else 1.0)
    evaluation = limit_steps(config, facts, costs, hours)
    text = HEADER.format(base_model=options.base_model, train=train, machine=machine, output=options.output)
    with atomic_file(output) as file:
        file.write((text + yaml.safe_dump(config, sort_keys=False, width=120)).encode())
    note("\n".join(summary(config, facts, costs, evaluation, hours, options.output)))


def facts_of(base_model: str, revision: str | None, train: str, chat_template: str | None) -> Facts:
    """Look at the base's configuration, the tokenizer, and a sample of the rows; no weights are read."""
    full = load_config(base_model, revision)
    text, tokenizer = full.get_text_config(decoder=True), load_tokenizer(base_model, revision)
    with torch.device("meta"):
        parameters, context = AutoModelForCausalLM.from_config(full).num_parameters(), context_length(text)
    count = sum(part.count() for parts in open_sources([train], "data.train").values() for part in parts)
    template = None if chat_template is None else read_template(chat_template, "data.chat_template")
    sample = prepare(train, tokenizer, max_length=context, max_rows=SAMPLE_ROWS, chat_template=template)[0]
    note(f"data.train, a sample: {sample.report}")
    usual = int(np.quantile(sample.rows.lengths, 0.95))
    has_template, cuda = bool(tokenizer.chat_template), torch.cuda.is_available()
    return Facts(parameters, int(text.hidden_size), context, has_template, count, usual, cuda)


def chosen(facts: Facts, base_model: str, revision: str | None, train: str) -> dict[str, Any]:
    """The configuration, but for the number of steps."""
    small = facts.parameters < 1_000_000_000
    bfloat16 = facts.cuda or has_bfloat16_products()
    longest = min(facts.context, 2048 if facts.cuda else 512)
    length = min(longest, 64 * max(1, -(-facts.usual_length // 64)))
    rows = max(1, min(8, (8192 if facts.cuda and small else 1024) // length))
    # On a base of width 64 a head of 64 has a share of reference of 0.71 where one of 256 has 0.82 (docs/reproduction.md).
    head_width = 0.5 if not small else 1.0 if facts.width >= MIN_HEAD_WIDTH else MIN_HEAD_WIDTH
    losses = {name: {"class_path": "AnchorDistillation", "init_args": {"head": name}} for name in ("base", "sampler")}
    return {
        "seed_everything": 0,
        "model": {
            "base_model": base_model,
            **({"revision": revision} if revision else {}),
            "dtype": "bfloat16" if bfloat16 else "float32",
            **({} if small else {"gradient_checkpointing": True}),
            "num_masks": 8 if facts.cuda else 4,
            "lora": {"rank": 32 if small else 64 if facts.parameters < 3_000_000_000 else 128},
            "sampler_head": {
                "class_path": "GRUSamplerHead",
                "init_args": {"hidden_size": head_width, "read_hidden": small, "normalize": True},
            },
            "losses": {**losses, "lcm": {"class_path": "LatentConsistency"}},
            "optimizer": {
                "class_path": "mtp_lightning.training.MuonAdamW",
                "init_args": {"lr": 2e-3 if small else 2e-4, "muon_lr": 1e-2 if small else 1e-3},
            },
            "lr_scheduler": {
                "class_path": "mtp_lightning.schedules.WarmupCosine",
                "init_args": {"warmup_steps": 20, "floor": 0.1},
            },
        },
        "data": {
            "train": train,
            "validation_fraction": float(f"{min(0.1, VALIDATION_ROWS / max(1, facts.rows)):.2g}"),
            "eval_max_rows": VALIDATION_ROWS,
            "max_length": length,
            "batch_size": rows,
            "max_blocks_per_row": max(8, length // 8),
        },
        "trainer": {
            "accelerator": "auto",
            "devices": 1,
            "precision": "bf16-mixed" if bfloat16 else "32-true",
            "max_steps": MEASURED_STEPS + 1,
            "gradient_clip_val": 1.0,
            "check_val_every_n_epoch": None,
            "log_every_n_steps": 10,
            "default_root_dir": f"runs/{Path(os.path.abspath(resolve(base_model))).name.removesuffix('.gguf')}",
            "callbacks+": _callbacks(),
        },
    }


def _callbacks() -> list[dict[str, Any]]:
    """The best checkpoint, the last one, and the evaluation by decoding, but for its length."""
    best = {"monitor": "val/forced_acceptance_length", "mode": "max", "filename": "best", "enable_version_counter": False}
    decoding = {"prompts": "package://demo/chat_prompts.jsonl", "num_lossless": 1}
    return [
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": best},
        {"class_path": "mtp_lightning.callbacks.LastCheckpoint", "init_args": {"every_n_steps": 50}},
        {"class_path": "mtp_lightning.callbacks.AcceptanceEvaluation", "init_args": decoding},
    ]


def steps_of_epoch(config: dict[str, Any], facts: Facts) -> int:
    """Optimizer steps in which every row of the data is trained on once."""
    rows = round(facts.rows * (1 - config["data"]["validation_fraction"]))
    return max(1, -(-rows // config["data"]["batch_size"]))


def epochs_of(config: dict[str, Any], facts: Facts) -> int:
    """Epochs of a run that no limit of time ends."""
    return min(MAX_EPOCHS, max(MIN_EPOCHS, -(-ENOUGH_STEPS // steps_of_epoch(config, facts))))


def most_steps(config: dict[str, Any], facts: Facts) -> int:
    """Optimizer steps of such a run."""
    return epochs_of(config, facts) * steps_of_epoch(config, facts)


def limit_steps(config: dict[str, Any], facts: Facts, costs: Costs, hours: float) -> Evaluation:
    """Set steps, epochs, warm-up and validations: what comes first, enough epochs or the hours."""
    enough, limit = most_steps(config, facts), hours * 3600
    share = EVALUATION_SHARE * min(limit, enough * costs.step / (1 - EVALUATION_SHARE))
    fitting = [each for each in EVALUATIONS if each.times * each.seconds(costs) <= share]
    evaluation = (fitting or EVALUATIONS[-1:])[0]
    steps = min(enough, int((limit - evaluation.times * evaluation.seconds(costs)) / costs.step))
    interval = max(1, steps // evaluation.times)
    # Whole intervals, so that the last step is validated.
    config["trainer"] |= {"max_steps": interval * evaluation.times, "val_check_interval": interval}
    config["trainer"]["max_epochs"] = epochs_of(config, facts)
    config["model"]["lr_scheduler"]["init_args"]["warmup_steps"] = max(1, min(500, steps // 20))
    config["data"]["eval_max_rows"] = evaluation.rows
    config["trainer"]["callbacks+"][-1]["init_args"] |= {
        "num_prompts": evaluation.prompts,
        "max_new_tokens": evaluation.tokens,
        "num_speed_pairs": evaluation.speed_pairs,
    }
    return evaluation


def summary(
    config: dict[str, Any], facts: Facts, costs: Costs, evaluation: Evaluation, hours: float, output: str
) -> list[str]:
    """What was chosen, how long it takes, and what to expect."""
    trainer, data, model = config["trainer"], config["data"], config["model"]
    steps, seconds = trainer["max_steps"], evaluation.seconds(costs)
    masks = data["batch_size"] * data["max_blocks_per_row"] * model["num_masks"]
    held_out = min(evaluation.rows, max(1, round(facts.rows * data["validation_fraction"])))
    total = steps * costs.step + evaluation.times * seconds
    limited = f" (limited by --hours {hours:g})" if steps + evaluation.times <= most_steps(config, facts) else ""
    if total > hours * 3600:
        limited = f" (the least; --hours {hours:g} is less)"
    pairs = f", {evaluation.speed_pairs} of them timed" if evaluation.speed_pairs else ""
    return [
        f"chosen    LoRA rank {model['lora']['rank']}, {data['batch_size']} rows of up to {data['max_length']} tokens and"
        f" {masks:,} masks a step",
        f"validate  {held_out} held-out rows, and {evaluation.prompts} prompts decoded to {evaluation.tokens} tokens{pairs}",
        f"time      {counted(steps, 'step')} ({steps / steps_of_epoch(config, facts):.1f} epochs) of {costs.step:.1f} s and"
        f" {counted(evaluation.times, 'validation')} of {seconds:.0f} s take about {in_words(total)}{limited};\n"
        "          from a few steps on the machine as it is now: busier, it takes longer",
        expectation(config, facts, costs, seconds),
        f"wrote {output}. Next: mtp fit {output}",
    ]


def expectation(config: dict[str, Any], facts: Facts, costs: Costs, seconds: float) -> str:
    """What the run will show, or what it needs to show anything; ``seconds``: of a validation."""
    steps, most = config["trainer"]["max_steps"], most_steps(config, facts)
    if steps >= FIRST_SIGNS:
        return (
            f"expect    the forced acceptance length to leave 1 within {FIRST_SIGNS} steps and to rise from then on."
            " For orientation:\n          SmolLM2-135M had 1.53 of 3.08 after 200 steps of 512 masks"
        )
    short = f"expect    little: acceptance begins to rise within about {FIRST_SIGNS} steps, and this run has {steps}."
    if most < FIRST_SIGNS:
        return f"{short} It needs more rows:\n          {MAX_EPOCHS} epochs of these are {counted(most, 'step')}"
    enough = min(2 * FIRST_SIGNS, most)
    hours = max(enough * costs.step / (1 - EVALUATION_SHARE), enough * costs.step + seconds) / 3600
    return f"{short}\n          --hours {float(f'{1.05 * hours:.2g}'):g} gives about {enough}"


def counted(number: int, name: str) -> str:
    """``1 step``, ``1,000 steps``."""
    return f"{number:,} {name}{'s' * (number != 1)}"


def in_words(seconds: float) -> str:
    """A time that is known roughly: ``45 s``, ``12 minutes``, ``3.5 hours``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
