# SPDX-License-Identifier: Apache-2.0
"""The flags that ``mtp serve`` gives vLLM. The server itself is started by scripts/vllm_check.sh."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest
from saved import saved_model

from mtp_lightning.commands.serve import acceptance, run_serve, server_command
from mtp_lightning.errors import RunError, UsageError
from mtp_lightning.integrations.vllm.settings import KEY, PROPOSER


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    saved_model(folder)
    return folder


def flags_of(command: list[str]) -> dict[str, str]:
    """The flags behind ``python -m MODULE``, each with its value."""
    return dict(zip(command[3::2], command[4::2], strict=True))


def test_flags(folder: Path) -> None:
    saved = str(folder / "saved")
    table = '[[2, "linear", 2]]'
    command, metrics = server_command(
        [saved, "--decoding", "linear", "--num_masks", "2", "--load_table", table, "--port", "81", "--host", "0.0.0.0"]
    )
    flags = flags_of(command)
    assert flags["--model"] == str(folder / "base")
    assert json.loads(flags["--hf-overrides"]) == {"architectures": ["MTPLlamaForCausalLM"]}
    options = {"folder": saved, "decoding": "linear", "draft_candidates": 64, "load_table": [[2, "linear", 2]]}
    assert json.loads(flags["--additional-config"]) == {KEY: options}
    speculative = {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": 2}
    assert json.loads(flags["--speculative-config"]) == speculative
    assert (flags["--port"], metrics) == ("81", "http://127.0.0.1:81/metrics")
    everything, _ = server_command([saved])
    assert json.loads(flags_of(everything)["--speculative-config"])["num_speculative_tokens"] == 3


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--num_masks", "4"], "num_masks"),
        (["--decoding", "cubic"], "decoding"),
        (["--draft_candidates", "few"], "draft_candidates"),
        (["--load_table", "{"], "load_table"),
        (["--load_table", '[[1, "linear", 9]]'], "load_table"),
        (["--speculative-config", "{}"], "--speculative-config"),
        (["--hf_overrides.x=1"], "--hf_overrides"),
    ],
)
def test_wrong_options(folder: Path, options: list[str], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        server_command([str(folder / "saved"), *options])


def test_checkpoint_is_not_served() -> None:
    with pytest.raises(UsageError, match="mtp export"):
        server_command(["runs/last.ckpt"])


def test_base_that_cannot_be_served(tmp_path: Path) -> None:
    saved_model(tmp_path, architecture="olmo2")
    with pytest.raises(UsageError, match="Olmo2ForCausalLM"):
        server_command([str(tmp_path / "saved")])


def test_without_vllm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("mtp_lightning.commands.serve.version", no_version)
    with pytest.raises(RunError, match="pip install"):
        run_serve([str(folder / "saved")])


def test_acceptance_from_metrics() -> None:
    metrics = """# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 8.0
vllm:spec_decode_num_drafts_created{engine="0",model_name="m"} 1.7e9
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 32.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="/my models/m"} 4.0
vllm:spec_decode_num_accepted_tokens_total{engine="1",model_name="m"} 2.0
"""
    assert "1.75 tokens" in acceptance(metrics) and "6 of 32" in acceptance(metrics)
    assert "no draft" in acceptance("")
