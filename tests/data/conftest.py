# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the data tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from toy_tokenizers import word_tokenizer
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@pytest.fixture
def write(tmp_path: Path):
    """Writes rows as JSON lines, or a text as it is, and gives the path as a string."""

    def write_file(name: str, content: list | str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content))
        return str(path)

    return write_file
