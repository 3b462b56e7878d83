# SPDX-License-Identifier: Apache-2.0
"""Many processes are one: DDP and FSDP2 on a CPU with gloo against one process on the same global batch, and its files."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sharded_model
import torch
import two_processes
import yaml
from command_line import ParseOnly, read_metrics
from interrupted_runs import told
from ports import free_port
from tiny import tiny_model
from tiny_run import LAST, write_config, write_run
from zygote import Ended, Zygote

from mtp_lightning.errors import UsageError
from mtp_lightning.losses import BaseCrossEntropy, SamplerCrossEntropy
from mtp_lightning.model import MTPModel
from mtp_lightning.modeling.label_counts import LABEL_COUNTS
from mtp_lightning.saving.checkpoint_files import RESUME

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
    return [process.wait() for process in zygote.ranks(folder, free_port(), *([common] * world))]


def figures(folder: Path) -> list[dict[str, float]]:
    """The lines of metrics.csv as numbers; the losses of one step and of a validation."""
    return [{name: float(value) for name, value in line.items()} for line in read_metrics(folder)]


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
    assert expected[LABEL_COUNTS].equal(found[LABEL_COUNTS]) and expected[LABEL_COUNTS].sum() > 0
    assert expected["state_dict"].keys() == found["state_dict"].keys()
    for name, value in expected["state_dict"].items():
        torch.testing.assert_close(found["state_dict"][name], value, **CLOSE)
    states, others = expected["optimizer_states"][0]["state"], found["optimizer_states"][0]["state"]
    assert states.keys() == others.keys()
    for number, state in states.items():
        for name, value in state.items():
            torch.testing.assert_close(others[number][name], value, **CLOSE)


@pytest.mark.parametrize(
    ("name", "world", "words"),
    [
        ("ddp2", 2, ["--config", STRATEGIES / "ddp.yaml"]),
        pytest.param("ddp4", 4, ["--config", STRATEGIES / "ddp.yaml"], marks=pytest.mark.slow),
        ("fsdp2", 2, FSDP2),
        ("fsdp2_offload", 2, ["--config", STRATEGIES / "fsdp2_offload.yaml", "--trainer.strategy.load_in_turns", "false"]),
    ],
)
def test_many_processes_are_one(zygote: Zygote, here: Path, name: str, world: int, words: Sequence[Any]) -> None:
    for ended in run(zygote, here, world, name, *words):
        assert ended.code == 0, ended.err
    assert_alike(here / "one", here / name)


def test_checkpoints_go_from_one_strategy_to_another(zygote: Zygote, here: Path, tmp_path: Path) -> None:
    """One process stops at step 3; two sharded ones go on, and one process ends it: the uninterrupted run."""
    folder = tmp_path / "here"
    shutil.copytree(here, folder, ignore=lambda at, names: {"one", "ddp2", "fsdp2", "ddp4", "fsdp2_offload"} & set(names))
    last = ("--ckpt_path", "last")
    assert run(zygote, folder, 1, "run", "--trainer.max_steps", 2)[0].code == 0
    for ended in run(zygote, folder, 2, "run", *FSDP2, "--trainer.max_steps", 4, *last):
        assert ended.code == 0, ended.err
    sharded = torch.load(folder / LAST, weights_only=True)
    assert sharded["global_step"] == 4
    model = MTPModel.from_pretrained(str(folder / LAST), base_model=str(folder / "base"))  # and it is a model by itself
    weights = dict(model.trained_parameters())
    assert weights and all(sharded["state_dict"][f"model.{name}"].equal(weights[name].data) for name in weights)
    assert run(zygote, folder, 1, "run", *last)[0].code == 0
    same_state(here / "one/checkpoints/last.ckpt", folder / LAST)


def test_recomputed_layers_accumulation_clipping_and_turns(zygote: Zygote, here: Path) -> None:
    words = ["--config", STRATEGIES / "fsdp2.yaml", "--trainer.accumulate_grad_batches", 2, "--trainer.max_steps", 2]
    words += ["--data.packing", "true", "--data.max_length", 24, "--trainer.val_check_interval", 2]
    for ended in run(zygote, here, 2, "turns", *words, "--trainer.strategy.load_in_turns", "true"):
        assert ended.code == 0, ended.err
    plain = [*words[2:], "--trainer.strategy", "auto"]
    assert run(zygote, here, 1, "plain", *plain)[0].code == 0
    same_state(here / "plain/checkpoints/last.ckpt", here / "turns/checkpoints/last.ckpt")
    assert run(zygote, here, 1, "free", *plain, "--trainer.gradient_clip_val", "null")[0].code == 0
    with pytest.raises(AssertionError):  # gradients were clipped
        same_state(here / "plain/checkpoints/last.ckpt", here / "free/checkpoints/last.ckpt")


MEETINGS = """
from collections import Counter
from mtp_lightning.training import module
import torch.distributed
whole, met = module.all_reduce, Counter()

def all_reduce(value, how):
    met[how] += 1
    return whole(value, how)

module.all_reduce = all_reduce
every, total = torch.distributed.all_reduce, Counter()

def counted(*arguments, **options):
    total["all_reduce"] += 1
    return every(*arguments, **options)

def begins(self):
    total.clear()

torch.distributed.all_reduce = counted
module.MTPModule.on_train_start = begins
module.MTPModule.on_train_end = lambda self: print("meetings", met["sum"], met["mean"], total["all_reduce"], flush=True)
"""


def test_processes_meet_for_the_loss_only_where_it_is_logged(zygote: Zygote, here: Path) -> None:
    """6 steps of 3 batches, every third step logged; and the figure is that of all batches and processes of its step."""
    common = [
        "fit",
        "--config",
        "config.yaml",
        "--trainer.limit_val_batches",
        0,
        "--data.packing",
        "true",
    ]  # in no order of lengths
    common += ["--trainer.log_every_n_steps", 3, "--trainer.max_steps", 6]
    words = [*common, "--trainer.accumulate_grad_batches", 3, "--data.batch_size", 2, "--trainer.devices", 2]
    words += ["--trainer.strategy", "ddp", "--trainer.logger.save_dir", "meetings"]
    for process in zygote.ranks(here, free_port(), words, words, preludes=[MEETINGS, MEETINGS]):
        ended = process.wait()
        assert ended.code == 0, ended.err
        sums, means, every = next(map(int, line.split()[1:]) for line in ended.out.splitlines() if "meetings" in line)
        # A denominator a batch, and the labels at the checkpoints after steps 4 and 6; a figure every third step.
        assert (sums, means) == (18 + 2, 2)
        assert every == 18 + 2 + 2 + 2 * 6  # and each step: is all finite, was anybody told to stop
    assert zygote.run(here, *common, "--data.batch_size", 12, "--trainer.logger.save_dir", "at_once").code == 0
    one, many = ([line for line in figures(here / name) if "train/loss" in line] for name in ("at_once", "meetings"))
    assert [line["step"] for line in one] == [line["step"] for line in many] == [2, 5]
    for line, other in zip(one, many, strict=True):
        assert other == pytest.approx(line, rel=CLOSE["rtol"], abs=CLOSE["atol"])


STOPS_IN_A_STEP = """
from mtp_lightning.callbacks import LastCheckpoint
ends, batches = LastCheckpoint.on_train_batch_end, 0

def stops(self, trainer, *others):
    global batches
    batches += 1
    if batches == {at}:
        trainer.should_stop = True
    ends(self, trainer, *others)

LastCheckpoint.on_train_batch_end = stops
"""


@pytest.mark.parametrize("at", [4, 6])
def test_the_last_loss_of_a_run_that_is_stopped_is_of_all_processes(zygote: Zygote, here: Path, at: int) -> None:
    """Steps of 3 batches; the stop is asked for at the end of one of the second step, which is logged for that alone."""
    common = ["fit", "--config", "config.yaml", "--trainer.limit_val_batches", 0, "--data.packing", "true"]
    words = [*common, "--trainer.accumulate_grad_batches", 3, "--data.batch_size", 2, "--trainer.devices", 2]
    words += ["--trainer.strategy", "ddp", "--trainer.logger.save_dir", "stopped", "--trainer.log_every_n_steps", 50]
    for process in zygote.ranks(here, free_port(), words, words, preludes=[STOPS_IN_A_STEP.format(at=at)] * 2):
        ended = process.wait()
        assert ended.code == 0, ended.err
    assert zygote.run(here, *common, "--data.batch_size", 12, "--trainer.logger.save_dir", "on").code == 0
    (stopped,) = (line for line in figures(here / "stopped") if "train/loss" in line)
    whole = next(line for line in figures(here / "on") if line["step"] == stopped["step"])
    assert stopped["step"] == 1 and stopped == pytest.approx(whole, rel=CLOSE["rtol"], abs=CLOSE["atol"])
    # What last.ckpt says was about to be logged, and a run that goes on from it logs.
    last = torch.load(here / "stopped" / "checkpoints" / "last.ckpt", weights_only=True)
    pending = last[RESUME]["pending"]["figures"]
    assert pending["train/loss"] == pytest.approx(whole["train/loss"], rel=CLOSE["rtol"])


# one sentence for all processes


def two(zygote: Zygote, folder: Path, first: Sequence[object], second: Sequence[object], *preludes: str) -> list[Ended]:
    """Two DDP processes with words of their own."""
    words = ["fit", "--config", "config.yaml", "--trainer.strategy", "ddp", "--trainer.devices", 2]
    started = zygote.ranks(folder, free_port(), [*words, *first], [*words, *second], preludes=preludes)
    return [process.wait() for process in started]


def test_processes_that_disagree_stop_at_the_start(zygote: Zygote, here: Path, tmp_path: Path) -> None:
    run_folder = ["--trainer.logger.save_dir", tmp_path / "run"]
    first, second = two(zygote, here, run_folder, [*run_folder, "--data.block_fraction", 0.25])
    assert (first.code, second.code) == (1, 0) and "mtp: error" not in second.err
    assert first.error == (
        "the processes of this run disagree on data.block_fraction: 0.5 in process 0, 0.25 in process 1. Start all of them"
        " with the same configuration, code and data."
    )
    other = tmp_path / "other.jsonl"
    lines = (here / "train.jsonl").read_text().splitlines()
    other.write_text("\n".join(lines[:-1]) + "\n")
    (here / "same.jsonl").unlink(missing_ok=True)
    (here / "same.jsonl").symlink_to(other)
    prelude = f"import os; os.chdir({str(tmp_path)!r})"  # the same words, but another file of that name
    shutil.copytree(here / "base", tmp_path / "base")
    for name in ("config.yaml", "validation.jsonl", "prompts.jsonl"):
        shutil.copy(here / name, tmp_path / name)
    shutil.copy(here / "train.jsonl", tmp_path / "same.jsonl")
    data = [*run_folder, "--data.train", "same.jsonl"]
    first, second = two(zygote, here, data, data, "", prelude)
    assert (first.code, second.code) == (1, 0)
    assert first.error.startswith("the processes of this run disagree on data.train: 21 rows, ")
    assert " in process 0, 22 rows, " in first.error
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file()]


def test_a_signal_to_one_process_saves_in_all(zygote: Zygote, here: Path, tmp_path: Path) -> None:
    words = ["--trainer.logger.save_dir", tmp_path / "run"]
    first, second = two(zygote, here, words, words, "", told(2))
    assert (first.code, second.code) == (143, 0), first.err
    assert "after step 2. Go on with --ckpt_path last." in first.err and "mtp: SIGTERM" not in second.err
    assert torch.load(tmp_path / LAST, weights_only=True)["global_step"] == 2


def test_strategies_that_can_not_shard_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.strategies import ModelParallelStrategy

    from mtp_lightning.trainer import FullyShardedStrategy
    from mtp_lightning.training.module import MTPModule

    with pytest.raises(UsageError, match="Use --config configs/strategies/fsdp2.yaml"):
        MTPModule("nowhere")._check_sharding(ModelParallelStrategy())
    with pytest.raises(UsageError, match="model.quantization 4bit can't be sharded"):
        MTPModule("nowhere", quantization="4bit")._check_sharding(FullyShardedStrategy())
    heavy = BaseCrossEntropy()
    heavy.temperature = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(UsageError, match="a loss term has weights of its own"):
        MTPModule("nowhere", losses={"a": heavy, "b": SamplerCrossEntropy()})._check_sharding(FullyShardedStrategy())


# decoding


def test_shards_of_a_model(tmp_path: Path) -> None:
    (first, own_0, calls_0, found, dtypes), (second, own_1, calls_1, *_) = two_processes.run(sharded_model.sharded, tmp_path)
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


# the files


@pytest.mark.parametrize("path", sorted(STRATEGIES.glob("*.yaml")), ids=lambda path: path.name)
@pytest.mark.parametrize("config", ["demo.yaml", "qwen.yaml", "tulu3_8b.yaml"])
def test_a_strategy_fits_every_configuration(path: Path, config: str) -> None:
    whole = ROOT / "configs" / config
    own, together = ParseOnly("--config", whole).settings, ParseOnly("--config", whole, "--config", path).settings
    expected = yaml.safe_load(path.read_text())
    assert together.trainer.strategy.class_path == expected["trainer"]["strategy"]["class_path"]
    for name, value in expected["trainer"]["strategy"]["init_args"].items():
        assert getattr(together.trainer.strategy.init_args, name) == value
    assert together.model.gradient_checkpointing == expected.get("model", {}).get(
        "gradient_checkpointing", own.model.gradient_checkpointing
    )
    assert together.data == own.data
