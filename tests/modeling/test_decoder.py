# SPDX-License-Identifier: Apache-2.0
"""The context that a configuration gives, and architectures that are refused."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from mtp_lightning.errors import UsageError
from mtp_lightning.modeling.base import load_base
from mtp_lightning.modeling.decoder import check_layer_types, context_length


@pytest.mark.parametrize(
    ("positions", "rope", "context"),
    [
        (32768, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        (32768, {"rope_type": "yarn", "factor": 2.0}, 65536),
        (131072, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        (163840, {"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}, 163840),
        (16384, {"rope_type": "linear", "factor": 4.0}, 16384),  # such configurations name the extended context
        (4096, {"rope_type": "dynamic", "factor": 4.0}, 4096),
        (131072, {"rope_type": "default"}, 131072),
    ],
)
def test_contexts(positions: int, rope: dict, context: int) -> None:
    config = AutoConfig.for_model("qwen2", max_position_embeddings=positions, rope_scaling={"rope_theta": 10_000.0, **rope})
    assert context_length(config) == context


@pytest.mark.parametrize(("model_type", "options"), [("bloom", {}), ("mpt", {}), ("falcon", {"alibi": True}), ("mamba", {})])
def test_bases_without_position_ids_are_refused(model_type: str, options: dict, tmp_path) -> None:
    config = AutoConfig.for_model(model_type, **options)
    with pytest.raises(UsageError, match=f"{model_type} is not supported"):
        check_layer_types(config)
    with pytest.raises(UsageError, match=f"{model_type} is not supported"):
        context_length(config)
    config.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=f"{model_type} is not supported"):
        load_base(str(tmp_path))
