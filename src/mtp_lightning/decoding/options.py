# SPDX-License-Identifier: Apache-2.0
"""The options of decoding."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from mtp_lightning.errors import UsageError

MIN_TEMPERATURE = 1e-6
"""Logits are divided by the temperature in float32, where lower ones overflow."""

LARGEST = sys.float_info.max
"""Python's integers may be larger, and floats can't be divided by those."""

Decoding = Literal["quadratic", "linear", "autoregressive"]


@dataclass
class DecodingOptions:
    """How to decode.

    Args:
        decoding: quadratic (a block of masks after the verified token and after every draft token), linear (one block
            after the draft) or autoregressive (no masks).
        num_masks: masks in a block, at most the number the model was trained with; auto: chosen for each step by what is
            fastest on this machine. The text is the same.
        sampler_head: draft with the sampler head; False: with the base's head.
        max_new_tokens: maximum number of generated tokens.
        max_steps: maximum number of steps (forward passes of the base), the prompt's included; None: no limit.
        eos_token_id: token or tokens that end the text; None: the base's own, and for text the end of a chat's turn.
        temperature: sampling temperature; 0: greedy decoding.
        top_k: sample from the k most likely tokens; None: all. No effect on greedy decoding.
        top_p: sample from the most likely tokens whose probabilities sum to p; None: all. No effect on greedy decoding.
        repetition_penalty: transformers' penalty on tokens that occur in the prompt or text; 1: none.
        logits_processor: transformers' processors of the base's logits (greedy too). They are called for one row and one
            position at a time, with the row's tokens before that position, the draft's included.
        seed: sampling seed: an int, or one for each row; None: drawn from torch's generator.
        verification: when sampling: coupled (the text depends on prompt and seed only, whatever the decoding) or rejection
            (accepts a few more drafts; only the distribution of the text is the base's).
        draft_candidates: number of tokens that the sampler head chooses each draft token from, the best of the base's head
            there; all: the whole vocabulary, which costs more. The text is the same (with rejection: its distribution).
        prompt_lookup: with num_masks auto, also verify drafts copied from the text: what followed an earlier occurrence of
            its last tokens. The text is the same. No effect with rejection.
        compile: run steps as graphs, one for each shape: CUDA graphs, or torch.compile on a CPU, which takes many seconds
            for the first step of a shape. No effect with logits processors or rejection.
        exact: every step feeds the same positions over the same cache slots, plain steps too, so that rounding cannot
            depend on what is drafted: all decodings give the same text, bit for bit, in any dtype. ``num_masks`` fixes
            the positions, (num_masks + 1)^2; auto: 4 masks. Slower than the default where drafts are few.
    """

    decoding: Decoding = "quadratic"
    num_masks: int | Literal["auto"] = "auto"
    sampler_head: bool = True
    max_new_tokens: int = 256
    max_steps: int | None = None
    eos_token_id: int | Sequence[int] | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    logits_processor: Any = None
    seed: int | Sequence[int] | None = None
    verification: Literal["coupled", "rejection"] = "coupled"
    draft_candidates: int | Literal["all"] = 64
    prompt_lookup: bool = True
    compile: bool = False
    exact: bool = False

    @property
    def coupled(self) -> bool:
        """True if the text depends on prompt and seed alone, so that plans may depend on the drafts."""
        return self.temperature == 0 or self.verification == "coupled"

    @property
    def drawing_seed(self) -> int | Sequence[int] | None:
        """``seed``, or 0 for greedy decoding, which reads none: a seed of None is drawn from torch's generator."""
        return 0 if self.temperature == 0 and self.seed is None else self.seed

    def __post_init__(self) -> None:
        for name, (is_valid, valid) in _CHECKS.items():
            value = _to_python(getattr(self, name))
            setattr(self, name, value)
            if not is_valid(value):
                raise UsageError(f"{name} must be {valid}, got {value!r}.")
        if self.exact and self.compile:
            raise UsageError("exact and compile exclude each other: choose one.")

    @classmethod
    def from_kwargs(cls, options: Mapping[str, Any]) -> DecodingOptions:
        """The options given by a call's keywords. UsageError: an unknown name, or a wrong value."""
        known = option_names()
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
                hint = f"did you mean {near[0]!r}?" if near else f"the options are {', '.join(known)}."
                raise UsageError(f"unknown option {name!r}: {hint}")
        return cls(**options)


def option_names() -> list[str]:
    """The names of the options."""
    return [field.name for field in fields(DecodingOptions)]


def _to_python(value: Any) -> Any:
    """Python's own numbers and lists in place of tensors and NumPy's."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_to_python(item) for item in value] if _is_several(value) else value


def _is_several(value: Any) -> bool:
    return isinstance(value, (list, tuple, set, frozenset, range))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_positive(value: Any) -> bool:
    return _is_int(value) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _are_ints(value: Any) -> bool:
    return value is None or all(map(_is_int, value if _is_several(value) else [value]))


_SWITCH = (lambda value: isinstance(value, bool), "True or False")
_INTS = (_are_ints, "an int or several")
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "decoding": (lambda value: value in ("quadratic", "linear", "autoregressive"), "quadratic, linear or autoregressive"),
    "verification": (lambda value: value in ("coupled", "rejection"), "coupled or rejection"),
    "num_masks": (lambda value: value == "auto" or _is_positive(value), "auto, or 1 or more"),
    "sampler_head": _SWITCH,
    "max_new_tokens": (_is_positive, "1 or more"),
    "max_steps": (lambda value: value is None or _is_positive(value), "1 or more"),
    "eos_token_id": _INTS,
    "temperature": (
        lambda value: _is_number(value) and (value == 0 or MIN_TEMPERATURE <= value <= LARGEST),
        f"0 (greedy) or a number from {MIN_TEMPERATURE} on, below which logits overflow",
    ),
    "top_k": (lambda value: value is None or _is_positive(value), "1 or more"),
    "top_p": (lambda value: value is None or _is_number(value) and 0 < value <= 1, "above 0 and at most 1"),
    "repetition_penalty": (lambda value: _is_number(value) and 0 < value <= LARGEST, "a number above 0"),
    "logits_processor": (lambda value: value is None or isinstance(value, list | tuple), "a list of processors"),
    "seed": _INTS,
    "draft_candidates": (lambda value: value == "all" or _is_positive(value), "all, or a number from 1 on"),
    "prompt_lookup": _SWITCH,
    "compile": _SWITCH,
    "exact": _SWITCH,
}
"""For each option the test of its value, and that in words."""
