# SPDX-License-Identifier: Apache-2.0
"""What is read from the configuration of a base's decoder."""

from __future__ import annotations

from tiny import tiny_model

from mtp_lightning.modeling.decoder import context_length


def test_the_context_ends_where_rope_changes() -> None:
    config = tiny_model("phi3").base.config
    full = config.max_position_embeddings
    assert context_length(config) == full
    config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": full // 2}
    assert context_length(config) == full // 2
