# SPDX-License-Identifier: Apache-2.0
"""How to decode: the options, checked."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from mtp_lightning.errors import UsageError

COLDEST = 1e-6
"""Logits are divided by the temperature in float32."""

LARGEST = sys.float_info.max
"""Python's whole numbers go further and can't be divided by."""

Decoding = Literal["quadratic", "linear", "autoregressive"]


@dataclass
class DecodingOptions:
    """How to decode.

    Args:
        decoding: ``quadratic`` (a block after the verified token and after every draft token), ``linear`` (one block after
            the draft) or ``autoregressive`` (no masks).
        num_masks: masks in a block, m_1..m_J with J at most the trained k; ``auto``: each step as many drafts and masks as
            pay on this machine (see ``budget``). The text is the same.
        sampler_head: draft with the sampler head; False: from the base head at the MTP positions.
        max_new_tokens: at most so many tokens are generated.
        max_steps: at most so many steps (forward passes of the base), the prompt's included; None: no limit.
        eos_token_id: token or tokens that end the text; None: the base's own.
        temperature: 0: greedy; else the logits are divided by it and tokens are drawn.
        top_k: draw from the so many likeliest tokens; None: all. No effect on greedy decoding.
        top_p: draw from the likeliest tokens that together have this probability; None: all. No effect on greedy decoding.
        repetition_penalty: transformers' penalty on tokens that the text or its prompt has; 1: none.
        logits_processor: transformers' processors of the base's logits (greedy too). They are called for one row and one
            position at a time, with the row's tokens before that position, the draft's included.
        seed: of sampling: an int; or one a row; None: one is drawn from torch's generator.
        verification: of sampling: ``coupled`` (the text is a function of prompt and seed, the same for every way to decode)
            or ``rejection`` (keeps a few more drafts; only the distribution of the text is the base's).
        draft_vocabulary: how many tokens drafts are chosen from, those that were labels most often in training (the first
            ids, where that was not counted); ``all``; ``auto``: as many as had nearly all labels, where that is known and
            half of the vocabulary at most, else all. The text is the same; under the rejection rule its distribution is.
        prompt_lookup: whether ``auto`` may also verify drafts that the text itself offers (what followed where its last
            tokens stood before). The text is the same. No effect with a fixed number of masks or under the rejection rule.
        compile: whether steps become graphs, one for each shape: CUDA graphs on a GPU, ``torch.compile`` on a CPU, where the
            first of a shape takes many seconds. Steps that logits processors or the rejection rule look at are left as they
            are.
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
    draft_vocabulary: int | Literal["auto", "all"] = "auto"
    prompt_lookup: bool = True
    compile: bool = False

    @property
    def coupled(self) -> bool:
        """Whether the text depends on prompt and seed alone, so that drafts may be looked at before they are verified."""
        return self.temperature == 0 or self.verification == "coupled"

    def __post_init__(self) -> None:
        if self.decoding not in ("quadratic", "linear", "autoregressive"):
            raise UsageError(
                f"decoding must be quadratic, linear or autoregressive, got {self.decoding!r}. Change decoding."
            )
        if self.verification not in ("coupled", "rejection"):
            raise UsageError(f"verification must be coupled or rejection, got {self.verification!r}. Change verification.")
        for name in (
            "num_masks",
            "max_new_tokens",
            "max_steps",
            "top_k",
            "seed",
            "eos_token_id",
            "draft_vocabulary",
            "temperature",
            "top_p",
            "repetition_penalty",
            "compile",
            "prompt_lookup",
            "sampler_head",
        ):
            setattr(self, name, _plain(getattr(self, name)))
        for name in ("seed", "eos_token_id"):
            value: Any = getattr(self, name)
            if not all(_is_int(each) for each in ([] if value is None else value if _is_several(value) else [value])):
                raise UsageError(f"{name} must be an int or several, got {value!r}.")
        for name in ("max_new_tokens", "max_steps", "top_k"):
            value = getattr(self, name)
            if value is not None and not (_is_int(value) and value >= 1):
                raise UsageError(f"{name} must be 1 or more, got {value}.")
        listed = self.draft_vocabulary
        if listed not in ("auto", "all") and not (_is_int(listed) and listed >= 1):  # type: ignore[operator]
            raise UsageError(
                f"draft_vocabulary must be auto, all, or a number from 1 on, got {listed!r}. Change draft_vocabulary."
            )
        for name in ("temperature", "top_p", "repetition_penalty", "compile", "prompt_lookup", "sampler_head"):
            value = getattr(self, name)
            switch = name in ("compile", "prompt_lookup", "sampler_head")
            if isinstance(value, bool) != switch or not (
                isinstance(value, (bool, int, float)) or name == "top_p" and not value
            ):
                raise UsageError(
                    f"{name} must be {'True or False' if switch else 'a number'}, got {value!r}. Change {name}."
                )
        if self.max_new_tokens is None:
            raise UsageError("max_new_tokens must be 1 or more, got None.")
        if not 0 <= self.temperature <= LARGEST:
            raise UsageError(f"temperature must be 0 (greedy) or more, got {self.temperature}. Change temperature.")
        if 0 < self.temperature < COLDEST:
            raise UsageError(
                f"temperature must be 0 (greedy) or at least {COLDEST}, below which logits overflow, got {self.temperature}."
                " Change temperature."
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be above 0 and at most 1, got {self.top_p}. Change top_p.")
        if not 0 < self.repetition_penalty <= LARGEST:
            raise UsageError(f"repetition_penalty must be above 0, got {self.repetition_penalty}. Change it.")

    @classmethod
    def from_kwargs(cls, options: Mapping[str, Any]) -> DecodingOptions:
        """The options that a call names.

        Args:
            options: the call's keywords.

        Returns:
            The options.

        Raises:
            UsageError: a name that there is not, or a wrong value.
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}."
                raise UsageError(f"unknown option {name!r}: {hint}")
        return cls(**options)


def _plain(value: Any) -> Any:
    """Python's own numbers and lists in place of tensors and NumPy's."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_plain(each) for each in value] if _is_several(value) else value


def _is_several(value: Any) -> bool:
    return isinstance(value, (list, tuple, set, frozenset, range))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
