# SPDX-License-Identifier: Apache-2.0
"""What SGLang's UNO drafter (0.5.23) takes: a plain LoRA for rows of a token and random ones; the line that starts it."""

from __future__ import annotations

import shlex

from mtp_lightning.errors import UsageError
from mtp_lightning.saving.trained_parts import TrainedParts

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear layers that its LoRA can act on, by the end of their names."""


def check_for_sglang(parts: TrainedParts) -> None:
    """Refuse, with UsageError, what the drafter has no place for."""
    if parts.mask_tokens != "noise":
        raise UsageError(
            "format sglang needs a model trained with model.mask_tokens: noise; this one has learned mask embeddings,"
            " which SGLang has no place for."
        )
    if parts.sampler_head is not None:
        raise UsageError("format sglang needs a model without a sampler head (model.sampler_head: false).")
    if not parts.lora.get("gated", True):
        raise UsageError("format sglang needs a gated LoRA (model.lora.gated: true): SGLang switches it off for the text.")
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name in parts.weights if ".lora_" in name}
    if other := sorted(layers - set(LAYERS)):
        raise UsageError(f"format sglang: there is a LoRA on {other[0]}; SGLang takes {', '.join(LAYERS)}.")


def start_line(base: str, revision: str | None, folder: str, num_masks: int) -> str:
    """The command that serves a folder. Its width F is the token and the masks: [token, noise x (F - 1)]."""
    words = ["python", "-m", "sglang.launch_server", "--model-path", base]
    words += [] if revision is None else ["--revision", revision]
    words += ["--speculative-algorithm", "UNO", "--uno-lora-path", folder]
    words += ["--speculative-num-draft-tokens", str(num_masks + 1), "--attention-backend", "fa3"]
    return shlex.join(words)
