# SPDX-License-Identifier: Apache-2.0
"""MTPModel: the network with what users call to load, save and generate. Each method is one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from mtp_lightning.decoding.execution.decode_cache import clear_decode_cache
from mtp_lightning.decoding.generation import Generation, generate
from mtp_lightning.decoding.transformers_generate import generate_function
from mtp_lightning.errors import UsageError
from mtp_lightning.modeling.network import MTPNetwork
from mtp_lightning.saving.export import push_model, save_model
from mtp_lightning.saving.load import load_pretrained
from mtp_lightning.text.stream import TextStream, generate_texts, stream_text


class MTPModel(MTPNetwork):
    """An existing causal language model that also predicts tokens further ahead. See ``MTPNetwork`` for its parts."""

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> MTPModel:
        """Load a trained model, in evaluation mode.

        Args:
            name: a folder that ``save_pretrained`` or ``mtp export`` wrote, a ``.ckpt`` file that ``mtp fit`` wrote, or a
                hub id, which may end in ``@`` and a revision.
            **options: ``base_model`` (where the base is now, if it moved), ``revision`` (of the base), ``dtype``,
                ``device`` or ``device_map``, ``attention``, ``quantization``, or ``base``, a base that is loaded already.
                For a folder also ``trust_remote_code``: import a sampler head that is not part of this package.

        Returns:
            The model.

        Raises:
            RunError: the file or folder can't be used, or the base's layers have another shape.
            UsageError: a wrong option.
        """
        return load_pretrained(cls, name, **options)

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Save what is trained, and the base's name, to a folder that ``from_pretrained`` loads.

        Args:
            folder: the folder; a saved one is replaced.
            **options: ``base_model`` and ``revision``, to name the base differently than it was loaded;
                ``acceptance`` and ``lineage``, figures and origin for the model card.

        Raises:
            RunError: the folder holds something else, or can't be written.
            UsageError: the base has no name.
        """
        save_model(self, folder, **options)

    def push_to_hub(self, name: str, **options: Any) -> str:
        """Upload what ``save_pretrained`` writes to a hub repository, which is created if needed.

        Args:
            name: the repository's id.
            **options: those of ``save_pretrained``, ``private``, ``token``, ``commit_message``.

        Returns:
            Address of the commit.

        Raises:
            RunError: the hub refuses or can't be reached.
            UsageError: the base is a folder of this machine.
        """
        return push_model(self, name, **options)

    def generate(
        self, input_ids: Tensor | str | Sequence[Any], attention_mask: Tensor | None = None, **options: Any
    ) -> Generation:
        """Generate with speculative decoding.

        Args:
            input_ids: prompts, [B, L] int64; or a text, the messages of a conversation, or a list of either. A text is a
                user's turn where the base has a chat template, unless the option ``raw`` is true.
            attention_mask: 1 at prompt tokens, 0 at padding, [B, L]; None: no padding.
            **options: ``max_new_tokens``, ``decoding``, ``num_masks``, ``streamer`` and others; see
                ``mtp_lightning.decoding.generation.generate``.

        Returns:
            Sequences, steps and acceptance lengths; of text and messages also the generated ``texts``.
        """
        if _is_text(input_ids):
            if attention_mask is not None:
                raise UsageError("attention_mask belongs to token ids: prompts of text or messages have none.")
            return generate_texts(self, cast("str | Sequence[Any]", input_ids), **options)
        return generate(self, cast(Tensor, input_ids), attention_mask, **options)

    def stream(
        self,
        prompt: str | Sequence[int] | Tensor | Sequence[dict[str, Any]],
        stop: str | Sequence[str] | None = None,
        raw: bool = False,
        **options: Any,
    ) -> TextStream:
        """Generate for one prompt as an iterator over pieces of text; its attributes hold tokens and counts.

        Args:
            prompt: text, token ids, or messages for the base's chat template. A text is a user's turn where the base has a
                chat template.
            stop: one or several texts that end the generation; they are cut off.
            raw: a text is continued as it is, without the chat template.
            **options: those of ``generate``.

        Returns:
            The iterator. It may be left at any time; ``text`` and ``token_ids`` keep what was generated.
        """
        return stream_text(self, prompt, stop, raw, **options)

    @property
    def custom_generate(self) -> Callable[..., Any]:
        """For transformers: ``model.base.generate(**inputs, custom_generate=model.custom_generate, num_masks=4)``."""
        return generate_function(self)

    def clear_decode_cache(self) -> None:
        """Free the memory that decoding keeps between calls; the next call prepares it again."""
        clear_decode_cache(self)


def _is_text(prompts: Any) -> bool:
    """True for a text, the messages of a conversation, or a list of either."""
    while isinstance(prompts, list | tuple) and prompts:
        prompts = prompts[0]
    return isinstance(prompts, str | dict)
