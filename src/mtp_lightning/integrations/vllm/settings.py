# SPDX-License-Identifier: Apache-2.0
"""The plugin's own options (vLLM's ``additional_config``), and what it refuses at start. No vLLM."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from mtp_lightning.errors import UsageError
from mtp_lightning.integrations.vllm import TRIED_VERSION

KEY = "mtp_lightning"
PROPOSER = "mtp_lightning.integrations.vllm.proposer.Proposer"
BACKENDS = ("CPU_ATTN", "FLASH_ATTN")
CUDA_GRAPHS = ("NONE", "FULL_DECODE_ONLY")


@dataclass
class Settings:
    """The value of ``additional_config={"mtp_lightning": {...}}``.

    Args:
        folder: a folder that ``mtp export`` wrote, or a hub id.
        decoding: quadratic or linear.
        draft_candidates: tokens that the sampler head chooses each draft token from; all: the whole vocabulary.
        load_table: rows ``[requests, kind, masks]``, ascending, with a kind of ``load_table.KINDS``: what passes with up to
            that many requests add; above the last row they are plain. None: measured at start on a CPU, else
            ``default_loads``.
    """

    folder: str = ""
    decoding: str = "quadratic"
    draft_candidates: int | str = 64
    load_table: list[list[Any]] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.folder, str) or not self.folder:
            raise UsageError(f"additional_config.{KEY}.folder must name a folder that mtp export wrote.")
        if self.decoding not in ("quadratic", "linear"):
            raise UsageError(f"decoding must be quadratic or linear, got {self.decoding!r}.")
        count = self.draft_candidates
        if count != "all" and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
            raise UsageError(f"draft_candidates must be all, or a number from 1 on, got {count!r}.")


def read_settings(vllm_config: Any) -> Settings:
    """The plugin's options of a vLLM configuration; UsageError if one is unknown or wrong."""
    options = (vllm_config.additional_config or {}).get(KEY)
    names = [field.name for field in fields(Settings)]
    if not isinstance(options, dict):
        raise UsageError(f'additional_config must hold {{"{KEY}": {{"folder": ...}}}}, got {options!r}.')
    if unknown := sorted(set(options) - set(names)):
        raise UsageError(f"additional_config.{KEY}: unknown option {unknown[0]!r}; the options are {', '.join(names)}.")
    return Settings(**options)


def check_version(version: str) -> None:
    """Refuse a version of vLLM that this was not tried with: the plugin uses parts that change between versions."""
    if not version.startswith(TRIED_VERSION + "."):
        raise UsageError(f"vLLM {version} was not tried with mtp-lightning: install vllm=={TRIED_VERSION}.*.")


def check_engine(vllm_config: Any, num_masks: int) -> None:
    """Refuse, with one sentence, what would give wrong drafts or none. ``num_masks`` are those of the saved folder."""
    parallel, speculative = vllm_config.parallel_config, vllm_config.speculative_config
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "decode_context_parallel_size"):
        if getattr(parallel, name, 1) != 1:
            raise UsageError(f"{name} must be 1: masks are not split over devices.")
    if parallel.enable_expert_parallel:
        raise UsageError("enable_expert_parallel must be off: bases with experts are not supported.")
    if vllm_config.lora_config is not None:
        raise UsageError("enable_lora must be off: the masks' own LoRA acts on the same layers.")
    graphs = vllm_config.compilation_config.cudagraph_mode.name
    if vllm_config.device_config.device_type == "cuda" and graphs not in CUDA_GRAPHS:
        # Others are chosen by the number of the scheduler's tokens, while a pass also has masks.
        raise UsageError(f"cudagraph_mode must be {' or '.join(CUDA_GRAPHS)}, got {graphs} (--compilation-config).")
    cache_dtype = vllm_config.cache_config.cache_dtype
    if cache_dtype not in ("auto", "bfloat16", "float16", "float32"):
        raise UsageError(f"kv_cache_dtype must be auto, got {cache_dtype}: masks read keys and values as they are.")
    if speculative is None or speculative.method != "custom_class" or speculative.model != PROPOSER:
        raise UsageError(f'speculative_config must name the method "custom_class" and the model "{PROPOSER}".')
    if not 1 <= speculative.num_speculative_tokens <= num_masks:
        raise UsageError(
            f"speculative_config.num_speculative_tokens must be from 1 to the model's {num_masks} masks,"
            f" got {speculative.num_speculative_tokens}."
        )


def check_attention(layers: Iterable[Any]) -> None:
    """Refuse attention that masks cannot take part in; ``layers`` are vLLM's attention layers."""
    for layer in layers:
        name = layer.attn_backend.get_name()
        if name not in BACKENDS:
            raise UsageError(f"attention backend {name} is not supported: choose one of {', '.join(BACKENDS)}.")
        if layer.sliding_window is not None:
            raise UsageError(f"the base has a sliding window of {layer.sliding_window} tokens, which is not supported.")
        if layer.has_sink:
            raise UsageError("the base has attention sinks, which are not supported.")
        if getattr(layer.impl, "alibi_slopes", None) is not None or getattr(layer.impl, "logits_soft_cap", None):
            raise UsageError("the base has ALiBi or capped attention logits, which are not supported.")
