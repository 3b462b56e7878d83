# SPDX-License-Identifier: Apache-2.0
"""The model class ``mtp`` of the lm-evaluation-harness, so that quality is checked with the tool the paper used.

``python -m mtp_lightning.lm_eval --model mtp --model_args pretrained=FOLDER --tasks ifeval`` is ``lm_eval`` with that class
known. Likelihoods are the base model's, generation is speculative. Needs the extra ``lm_eval``.
"""

from __future__ import annotations

from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from mtp_lightning.decoding.transformers_generate import OPTIONS
from mtp_lightning.errors import UsageError
from mtp_lightning.model import MTPModel


@register_model("mtp")
class MTPLM(HFLM):
    """The harness's Hugging Face class over the base of an ``MTPModel``.

    Args:
        pretrained: an ``MTPModel``, or what ``MTPModel.from_pretrained`` opens: a folder, a checkpoint or a hub id.
        base_model: where the base is now, if it moved.
        revision: hub revision of the base; ``main``, the harness's default, means the one that was saved.
        dtype: dtype of the model.
        device: where to put it.
        **options: those of ``DecodingOptions`` that ``custom_generate`` takes (``decoding``, ``num_masks``, ``seed``, ..),
            and those of the harness's class (``batch_size``, ``max_length``, ``add_bos_token``, ..).
    """

    def __init__(
        self,
        pretrained: str | MTPModel,
        base_model: str | None = None,
        revision: str | None = None,
        dtype: str | None = "auto",
        device: str | None = None,
        **options: Any,
    ) -> None:
        if isinstance(pretrained, str):
            pretrained = MTPModel.from_pretrained(
                pretrained,
                base_model=base_model,
                revision=None if revision == "main" else revision,
                dtype=dtype or "auto",
                device=device,
            )
        if pretrained.tokenizer is None:
            raise UsageError("the harness needs a tokenizer: save the model with its tokenizer.")
        self.mtp = pretrained
        self.decoding_options = {field.name: options.pop(field.name) for field in OPTIONS if field.name in options}
        super().__init__(pretrained=pretrained.base, tokenizer=pretrained.tokenizer, **options)

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **generation_kwargs: Any) -> Any:
        return super()._model_generate(
            context, max_length, stop, custom_generate=self.mtp.custom_generate, **self.decoding_options, **generation_kwargs
        )


def main() -> None:
    """The harness's own command line."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
