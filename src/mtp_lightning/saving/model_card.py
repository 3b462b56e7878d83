# SPDX-License-Identifier: Apache-2.0
"""The ``README.md`` of a saved folder: what it is, how to use it, and the measured acceptance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mtp_lightning.errors import RunError, one_line
from mtp_lightning.evaluation.acceptance import largest_gap
from mtp_lightning.evaluation.acceptance_report import protocol_text
from mtp_lightning.evaluation.reporting import decimals, rounding_note
from mtp_lightning.metrics.functional import REPETITION_THRESHOLD
from mtp_lightning.saving.lineage import public_name

_TEXT = """---
library_name: mtp-lightning
{base_line}{license_line}pipeline_tag: text-generation
tags:
- multi-token-prediction
- speculative-decoding
- peft
---

# Multi-token prediction for {base_model}

{num_masks} {masks}, a {lora} of rank {rank} and {head}, trained with mtp-lightning after
*Your LLM Knows the Future* (Samragh et al. 2025, arXiv 2507.11851). The base model writes the text and this folder makes it
take fewer steps: the same text, up to near ties where the dtype is low, which `--exact` removes. It does not hold the base
model, which is {base_model}{revision}.

```python
from mtp_lightning import MTPModel

model = MTPModel.from_pretrained("this folder")
{ids}
out = model.generate(ids, max_new_tokens=64)
print(model.tokenizer.decode(out.sequences[0]), out.acceptance_length)
```

On the command line: `mtp generate FOLDER --prompt "{prompt}"`.

{plain}

## Tokens per step and speed

{acceptance}

## Lineage

{lineage}
"""

_GATED = (
    "PEFT opens the adapter too, and then gives exactly the base model: the adapter acts at mask tokens alone, PEFT's own\n"
    "code feeds none, and the file is written so that it stays off elsewhere."
)
_STANDARD = (
    "The adapter is a standard LoRA, without a gate: it changes what the base model writes, and PEFT applies it everywhere."
)


_NOISE = (
    "The adapter is a plain LoRA, which PEFT and servers with LoRA support load. They apply it everywhere, which changes\n"
    "what the base model writes; to keep that, it must act at the random tokens alone, as it does here. `noise_tokens` in\n"
    "`mtp_config.json` are those that decoding uses here; any others will do."
)

_IDS = 'ids = model.tokenizer("Once upon a time", return_tensors="pt").input_ids'
_CHAT_IDS = """\
chat = [{"role": "user", "content": "Why is the sky blue?"}]
ids = model.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt").input_ids"""


def card(config: dict[str, Any], is_chat: bool = False) -> str:
    """The model card, Markdown with the hub's header, of a folder with this ``mtp_config.json``.

    ``is_chat``: the base has a chat template, so that the example is a question.
    """
    base, head = config["base_model"], config["sampler_head"]
    on_hub = "://" not in base and not Path(base).is_absolute()
    gated, lineage = config["lora"]["gated"], config["lineage"] or {}
    return _TEXT.format(
        ids=_CHAT_IDS if is_chat else _IDS,
        prompt="Why is the sky blue?" if is_chat else "Once upon a time",
        base_line=f"base_model: {base}\nbase_model_relation: adapter\n" if on_hub else "",
        license_line=f"license: {lineage['license']}\n" if lineage.get("license") else "",
        base_model=f"[{base}](https://huggingface.co/{base})" if on_hub else f"`{public_name(base)}`",
        revision=f" at revision `{config['revision']}`" if config["revision"] else "",
        num_masks=config["num_masks"],
        masks="mask tokens" if config["mask_tokens"] == "learned" else "random tokens in place of mask tokens",
        lora="gated LoRA" if gated else "standard LoRA",
        rank=config["lora"]["rank"],
        head="no sampler head" if head is None else f"the sampler head `{head['class_path'].rpartition('.')[2]}`",
        plain=_STANDARD if not gated else _GATED if config["mask_tokens"] == "learned" else _NOISE,
        acceptance=acceptance_text(config["acceptance"]),
        lineage=lineage_text(lineage, public_name(base)),
    )


def lineage_text(lineage: dict[str, Any], base: str) -> str:
    """Base, training and licence as a Markdown list."""
    lines = [f"- Base: {base}, whose weights are unchanged and not included."]
    steps = f"{lineage['steps']} optimizer steps" if lineage.get("steps") else "training"
    if lineage.get("data"):
        lines.append(f"- Trained for {steps} on {', '.join(f'`{name}`' for name in lineage['data'])}.")
    elif lineage.get("steps"):
        lines.append(f"- Trained for {steps}.")
    if lineage.get("losses"):
        lines.append(f"- Losses: {', '.join(f'{name} ({loss})' for name, loss in lineage['losses'].items())}.")
    licence = lineage.get("license")
    lines.append(f"- Licence: {licence}." if licence else "- Licence: not stated; the base model's terms apply to its use.")
    return "\n".join(lines)


def acceptance_text(figures: dict[str, Any] | None) -> str:
    """The measured acceptance, as returned by ``card_figures``, as a Markdown table with the options of decoding."""
    if figures is None:
        return "Not measured. `mtp benchmark FOLDER --prompts FILE` does."
    options = figures["options"]
    # Folders of earlier versions do not hold max_steps and temperature.
    steps = f" and {options['max_steps']} steps" if options.get("max_steps") else ""
    device = f" ({figures['device']})" if figures.get("device") else ""
    sampling = f"temperature {options['temperature']}" if options.get("temperature") else "greedy"
    lines = [
        f"Measured on {figures['overall']['num_prompts']} prompts of `{figures['prompts']}`, at most"
        f" {options['max_new_tokens']} tokens{steps} each, {sampling}. Acceptance length: {protocol_text(options)}, which"
        " shows what was trained. Speed: the default of `mtp generate` (`--num_masks auto`, as many drafts as pay on the"
        f" machine) over plain decoding{device}.{_other_step(figures)}",
        "",
        f"| domain | prompts | acceptance length | under {REPETITION_THRESHOLD:.0%} repeated 8-grams (texts)"
        " | repeated 8-grams | lossless | speed by default |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, group in [*figures["domains"].items(), ("overall", figures["overall"])]:
        equal, checked = group["lossless"]
        lines.append(
            f"| {name} | {group['num_prompts']} | {decimals(group['acceptance_length'])}"
            f" | {decimals(group['non_repeating'])} ({group['num_non_repeating']})"
            f" | {'-' if group['repeated_8grams'] is None else format(group['repeated_8grams'], '.0%')}"
            f" | {f'{equal}/{checked}' if checked else '-'} | {_times(group['speed_up'])} |"
        )
    lines += ["", "Acceptance length: tokens generated over forward passes of the base, the free token included."]
    if rounding := rounding_note(figures.get("gap"), figures.get("dtype")):
        lines += ["", rounding]
    return "\n".join(lines)


def _other_step(figures: dict[str, Any]) -> str:
    """A sentence if the saved weights are of another training step than the measured ones."""
    measured, saved = figures["measured_step"], figures["checkpoint_step"]
    if None in (measured, saved) or measured == saved:
        return ""
    return f" That was after {measured} training steps; these weights are those of step {saved}."


def card_figures(latest: dict[str, Any], checkpoint_step: int | None = None) -> dict[str, Any]:
    """The part that a card shows of ``acceptance.summarise`` with its ``options``, ``prompts`` and ``step``."""
    options = latest["options"]
    kept = {name: options[name] for name in ("decoding", "num_masks", "sampler_head", "max_new_tokens")}
    kept |= {name: options.get(name) for name in ("max_steps", "temperature")}
    # Earlier versions timed the protocol's masks, which is not the fastest way.
    is_default = latest.get("speed_num_masks") == "auto"
    return {
        "prompts": public_name(latest["prompts"]),
        "options": kept,
        "device": latest.get("device"),
        "dtype": latest.get("dtype"),  # earlier versions of acceptance.json do not hold it
        "gap": largest_gap(latest["overall"]),
        "measured_step": latest.get("step"),
        "checkpoint_step": checkpoint_step,
        "overall": _card_row(latest["overall"], is_default),
        "domains": {name: _card_row(figures, is_default) for name, figures in latest["domains"].items()},
    }


def _card_row(figures: dict[str, Any], is_default: bool) -> dict[str, Any]:
    """A domain's figures that the table shows; ``is_default``: its speed-up is that of the default plan."""
    return {
        "num_prompts": figures["num_prompts"],
        "acceptance_length": figures["acceptance_length"],
        "num_non_repeating": figures["non_repeating"]["num_prompts"],
        "non_repeating": figures["non_repeating"]["acceptance_length"],
        "repeated_8grams": figures["repeated_8grams"],
        "lossless": [figures["lossless"]["equal"], figures["lossless"]["checked"]],
        "speed_up": figures["speed_up"]["median"] if is_default and figures["speed_up"] else None,
    }


def read_figures(file: Path, checkpoint_step: int | None) -> dict[str, Any] | None:
    """``card_figures`` of a run's ``acceptance.json``; None if there is no such file."""
    if not file.is_file():
        return None
    try:
        return card_figures(json.loads(file.read_text(encoding="utf-8"))["latest"], checkpoint_step)
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{file} was not written by the acceptance evaluation: {one_line(error, 100)}.") from error


def benchmark_figures(file: Path) -> dict[str, Any]:
    """``card_figures`` of a ``benchmark.json``: acceptance with the most masks, and the speed of ``auto``."""
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        fixed = [figures for figures in report["settings"] if isinstance(figures["num_masks"], int)]
        protocol = max(fixed, key=lambda f: (f["decoding"] == "quadratic", f["sampler_head"], f["num_masks"]))
        chosen = {name: protocol[name] for name in ("decoding", "sampler_head")}
        automatic = [figures for figures in report["settings"] if figures["num_masks"] == "auto"]
        default = next(f for f in automatic if {name: f[name] for name in chosen} == chosen)
        latest = {name: report[name] for name in ("prompts", "device", "dtype")} | {"speed_num_masks": "auto"}
        latest["options"] = {**report["options"], **chosen, "num_masks": protocol["num_masks"]}
        latest["overall"] = {**protocol["overall"], "speed_up": default["overall"]["speed_up"]}
        latest["domains"] = {
            name: {**figures, "speed_up": default["domains"][name]["speed_up"]}
            for name, figures in protocol["domains"].items()
        }
        return card_figures(latest)
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        reason = one_line(error, 100)
        raise RunError(f"{file} is not a benchmark.json with fixed numbers of masks and auto: {reason}.") from error


def _times(ratio: float | None) -> str:
    """A speed-up in words."""
    return "-" if ratio is None else f"{ratio:.2f}x"
