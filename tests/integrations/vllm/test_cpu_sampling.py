# SPDX-License-Identifier: Apache-2.0
"""The values of requests for each of their tokens."""

from __future__ import annotations

import torch

from mtp_lightning.integrations.vllm.cpu_sampling import expand_to_tokens


def test_expand_to_tokens() -> None:
    x, ends = torch.tensor([0.5, 0.0, 2.0]), torch.tensor([2, 2, 5], dtype=torch.int32)  # the second has no tokens
    assert expand_to_tokens(x, ends, 5, 2, 7).tolist() == [0.5, 0.5, 7.0, 7.0, 7.0]
