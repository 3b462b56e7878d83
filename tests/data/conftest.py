# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the data tests."""

from __future__ import annotations

import pytest
from toy_tokenizers import word_tokenizer
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()
