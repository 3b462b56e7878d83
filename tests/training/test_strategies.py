# SPDX-License-Identifier: Apache-2.0
"""Many processes are one: DDP and FSDP2 on a CPU with gloo against one process on the same global batch, and its files."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import sharded_model
import torch
import two_processes
from command_line import read_metrics
from interrupted_runs import signal_at
from lightning.pytorch.strategies import ModelParallelStrategy
from tiny import tiny_model
from tiny_run import LAST, write_config, write_run
from zygote import Ended, Zygote

from mtp_lightning.errors import UsageError
from mtp_lightning.losses import BaseCrossEntropy, SamplerCrossEntropy
from mtp_lightning.model import MTPModel
from mtp_lightning.saving.checkpoint_files import RESUME
from mtp_lightning.trainer import FullyShardedStrategy
from mtp_lightning.training.module import MTPModule

ROOT = Path(__file__).parents[2]
STRATEGIES = ROOT / "configs" / "strategies"
FSDP2 = ["--config", STRATEGIES / "fsdp2.yaml", "--model.gradient_checkpointing", "false"]
STEPS, ROWS = 6, 4
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
"""float64 sums in another order: rounding of 1e-16 through six optimizer steps with gains well below 1e5."""


@pytest.fixture(scope="module")
def here(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that a run needs, and in ``one`` what one process with the whole global batch wrote."""
    folder = tmp_path_factory.mktemp("strategies")
    config = write_run(folder)
    config["model"]["lora"]["dropout"] = 0.0  # processes draw their own
    # With shards all processes must decode the same pair.
    config["trainer"]["callbacks+"][-1]["init_args"]["num_speed_pairs"] = 1
    config["trainer"] |= {"max_steps": STEPS, "val_check_interval": 3, "num_sanity_val_steps": 0}
    write_config(folder, config)
    assert run(zygote, folder, 1, "one")[0].code == 0
    return folder


def run(zygote: Zygote, folder: Path, world: int, name: str, *words: object) -> list[Ended]:
    """Train on ``world`` processes, each with its share of the global batch, into ``name``."""
    common = ["fit", "--config", "config.yaml", *words, "--trainer.devices", world, "--data.batch_size", ROWS // world]
    common += ["--trainer.logger.save_dir", name]
    if world == 1:
        return [zygote.run(folder, *common)]
    return [process.wait() for process in zygote.ranks(folder, *([common] * world))]


def figures(folder: Path) -> list[dict[str, float]]:
    """The lines of metrics.csv as numbers; the losses of one step and of a validation."""
    return [{name: float(value) for name, value in line.items() if "speed_up" not in name} for line in read_metrics(folder)]


def assert_alike(one: Path, many: Path) -> None:
    """The same figures and weights, to rounding."""
    lines, others = figures(one), figures(many)
    assert len(lines) == len(others) and lines
    for line, other in zip(lines, others, strict=True):
        assert line.keys() == other.keys()
        for name in line:
            # Acceptance lengths and what metrics keep are float32 somewhere on their way.
            loose = 1e-6 if name.startswith("val/") else CLOSE["rtol"]
            assert other[name] == pytest.approx(line[name], rel=loose, abs=1e-11, nan_ok=True), name
    same_state(one / "checkpoints/last.ckpt", many / "checkpoints/last.ckpt")


def same_state(one: Path, many: Path) -> None:
    """The same trained weights and optimizer state, in the same form."""
    expected, found = (torch.load(path, weights_only=True) for path in (one, many))
    assert expected["state_dict"].keys() == found["state_dict"].keys()
    for name, value in expected["state_dict"].items():
        torch.testing.assert_close(found["state_dict"][name], value, **CLOSE)
    states, others = expected["optimizer_states"][0]["state"], found["optimizer_states"][0]["state"]
    assert states.keys() == others.keys()
    for number, state in states.items():
        for name, value in state.items():
            torch.testing.assert_close(others[number][name], value, **CLOSE)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ddp_is_one_process(zygote: Zygote, here: Path, world: int) -> None:
    for ended in run(zygote, here, world, f"ddp{world}", "--config", STRATEGIES / "ddp.yaml"):
        assert ended.code == 0, ended.err
    assert_alike(here / "one", here / f"ddp{world}")


def test_fsdp2_resumes_one_process(zygote: Zygote, here: Path) -> None:
    """One process stops at step 2 and two sharded ones continue: the run of one process, and its checkpoint."""
    assert run(zygote, here, 1, "fsdp2", "--trainer.max_steps", 2)[0].code == 0
    for ended in run(zygote, here, 2, "fsdp2", *FSDP2, "--ckpt_path", "last"):
        assert ended.code == 0, ended.err
    assert_alike(here / "one", here / "fsdp2")
    path = here / "fsdp2/checkpoints/last.ckpt"
    state = torch.load(path, weights_only=True)["state_dict"]
    weights = dict(MTPModel.from_pretrained(str(path), base_model=str(here / "base")).trained_parameters())
    assert weights and all(state[f"model.{name}"].equal(weights[name].data) for name in weights)


@pytest.mark.slow
def test_offloaded_recomputed_and_accumulated(zygote: Zygote, here: Path) -> None:
    """Shards in host memory, loaded in turns, with recomputed layers, accumulated batches and clipped gradients."""
    common = ["--trainer.accumulate_grad_batches", 2, "--trainer.max_steps", 2, "--trainer.gradient_clip_val", 0.01]
    common += ["--data.packing", "true", "--data.max_length", 24, "--trainer.val_check_interval", 2]
    for ended in run(zygote, here, 2, "offloaded", "--config", STRATEGIES / "fsdp2_offload.yaml", *common):
        assert ended.code == 0, ended.err
    assert run(zygote, here, 1, "single", *common)[0].code == 0
    same_state(here / "single/checkpoints/last.ckpt", here / "offloaded/checkpoints/last.ckpt")


STOPS_IN_A_STEP = """
from mtp_lightning.callbacks import LastCheckpoint
ends, batches = LastCheckpoint.on_train_batch_end, 0

def stops(self, trainer, *others):
    global batches
    batches += 1
    if batches == 4:
        trainer.should_stop = True
    ends(self, trainer, *others)

LastCheckpoint.on_train_batch_end = stops
"""


@pytest.mark.slow
def test_the_logged_loss_is_of_all_batches_and_processes(zygote: Zygote, here: Path) -> None:
    """Steps of 3 batches; a stop is asked for in the second step, which is logged only because it is the last."""
    common = ["--trainer.limit_val_batches", 0, "--data.packing", "true"]
    words = [*common, "--trainer.accumulate_grad_batches", 3, "--trainer.log_every_n_steps", 50]
    words = ["fit", "--config", "config.yaml", *words, "--data.batch_size", 2, "--trainer.devices", 2]
    words += ["--trainer.strategy", "ddp", "--trainer.logger.save_dir", "stopped"]
    for process in zygote.ranks(here, words, words, preludes=[STOPS_IN_A_STEP] * 2):
        ended = process.wait()
        assert ended.code == 0, ended.err
    at_once = ["--data.batch_size", 12, "--trainer.max_steps", 2, "--trainer.logger.save_dir", "at_once"]
    assert zygote.run(here, "fit", "--config", "config.yaml", *common, *at_once).code == 0
    (stopped,) = (line for line in figures(here / "stopped") if "train/loss" in line)
    expected = next(line for line in figures(here / "at_once") if line["step"] == stopped["step"])
    assert stopped["step"] == 1 and stopped == pytest.approx(expected, rel=CLOSE["rtol"], abs=CLOSE["atol"])
    # The checkpoint was written before the figure was logged, and a run that resumes from it logs the figure.
    pending = torch.load(here / "stopped/checkpoints/last.ckpt", weights_only=True)[RESUME]["pending"]
    assert pending["step"] == 1 and pending["figures"]["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-9)


def two(zygote: Zygote, folder: Path, first: Sequence[object], second: Sequence[object], *preludes: str) -> list[Ended]:
    """Two DDP processes with words of their own."""
    words = ["fit", "--config", "config.yaml", "--trainer.strategy", "ddp", "--trainer.devices", 2]
    started = zygote.ranks(folder, [*words, *first], [*words, *second], preludes=preludes)
    return [process.wait() for process in started]


@pytest.mark.slow
def test_processes_that_disagree_stop_at_the_start(zygote: Zygote, here: Path, tmp_path: Path) -> None:
    """The second process has the same configuration and another file of the same name."""
    other = tmp_path / "other"
    other.mkdir()
    shutil.copytree(here / "base", other / "base")
    for name in ("config.yaml", "validation.jsonl", "prompts.jsonl"):
        shutil.copy(here / name, other)
    (other / "train.jsonl").write_text("\n".join((here / "train.jsonl").read_text().splitlines()[:-1]) + "\n")
    words = ["--trainer.logger.save_dir", tmp_path / "run"]
    first, second = two(zygote, here, words, words, "", f"import os; os.chdir({str(other)!r})")
    assert (first.code, second.code) == (1, 0) and "mtp: error" not in second.err
    assert "disagree on data.train" in first.error and "22 rows" in first.error and "21 rows" in first.error
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file()]


@pytest.mark.slow
def test_a_signal_to_one_process_saves_in_all(zygote: Zygote, here: Path, tmp_path: Path) -> None:
    words = ["--trainer.logger.save_dir", tmp_path / "run"]
    first, second = two(zygote, here, words, words, "", signal_at(2))
    assert (first.code, second.code) == (143, 0), first.err
    assert "after step 2." in first.err and "mtp: SIGTERM" not in second.err
    assert torch.load(tmp_path / LAST, weights_only=True)["global_step"] == 2


def test_what_can_not_be_sharded_is_refused() -> None:
    with pytest.raises(UsageError, match="configs/strategies/fsdp2.yaml"):
        MTPModule("nowhere")._check_sharding(ModelParallelStrategy())
    with pytest.raises(UsageError, match="model.quantization 4bit can't be sharded"):
        MTPModule("nowhere", quantization="4bit")._check_sharding(FullyShardedStrategy())
    heavy = BaseCrossEntropy()
    heavy.temperature = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(UsageError, match="a loss term has weights of its own"):
        MTPModule("nowhere", losses={"a": heavy, "b": SamplerCrossEntropy()})._check_sharding(FullyShardedStrategy())


SHARDED = """
import sys, sharded_model, two_processes
two_processes.work({rank}, sharded_model.sharded, {folder!r})
sys.exit()
"""


def test_shards_of_a_model(zygote: Zygote, tmp_path: Path) -> None:
    preludes = [SHARDED.format(rank=rank, folder=str(tmp_path)) for rank in range(2)]
    for process in zygote.ranks(tmp_path, [], [], preludes=preludes):
        ended = process.wait()
        assert ended.code == 0, ended.err
    (first, own_0, calls_0, found, dtypes), (second, own_1, calls_1, *_) = two_processes.results(tmp_path)
    assert own_0 != own_1 and calls_0 == calls_1 == max(own_0, own_1)  # one process kept the other company
    together = sorted(first + second, key=lambda each: each["prompt_index"])
    assert together == sharded_model.decoded(tiny_model("llama"))
    # The frozen base stays in bfloat16 and what is trained in float32; gradients are the mean over the processes.
    assert dtypes == {(False, "torch.bfloat16"), (True, "torch.float32")}
    alone = [sharded_model.gradients(sharded_model.mixed_model(), row) for row in range(2)]
    assert found.keys() == alone[0].keys()
    for name, grad in found.items():
        # The same products in each process; the mean is rounded in float32.
        torch.testing.assert_close(grad, (alone[0][name] + alone[1][name]) / 2, rtol=1e-5, atol=1e-6)
