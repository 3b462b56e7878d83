# SPDX-License-Identifier: Apache-2.0
"""Which run a folder belongs to, and what a start in it takes over, keeps and replaces."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
import torch
from command_line import read_metrics
from interrupted_runs import FIT, KILL, fresh, run_name
from tiny_run import LAST, assert_same_run
from zygote import Zygote

from mtp_lightning.saving.checkpoint_files import write_run_id
from mtp_lightning.trainer.earlier_run import differences

BEST = LAST.replace("last", "best")


def test_last_does_not_resume_an_earlier_run(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    """The figures and the id in a folder are those of a run that was killed before its first checkpoint."""
    folder, named = tmp_path / "run", tmp_path / "named"
    shutil.copytree(whole, folder)
    killed = KILL.replace("@EVENT", "'optimizer'").replace("@NUMBER", "2").replace("@SECONDS", "0")
    ended = zygote.run(folder, *FIT[:-2], "--overwrite", prelude=killed)
    assert ended.code == -signal.SIGKILL and not any(folder.glob("run/checkpoints/*"))
    assert run_name(folder) != run_name(whole)
    shutil.copytree(whole / "run/checkpoints", folder / "run/checkpoints", dirs_exist_ok=True)
    shutil.copytree(folder, named)
    ended = zygote.run(folder, *FIT)
    assert ended.code == 0, ended.err
    assert all(f"--ckpt_path {path}" in ended.err for path in (BEST, LAST)) and "training begins at step 0" in ended.err
    assert_same_run(folder, whole)
    # Named by its path, the earlier run is resumed. The new run's figures are replaced, and the folder is its own again.
    ended = zygote.run(named, *FIT[:-1], BEST, "--trainer.max_steps", 16)
    assert ended.code == 0 and "figures of another run" in ended.err
    assert run_name(named) == run_name(whole)
    first = int(read_metrics(named / "run")[0]["step"])
    assert first >= torch.load(whole / BEST, weights_only=True)["global_step"] - 1 > 1


def files(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_folder_holds_one_run(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    """A second run there is refused and changes nothing; with ``--overwrite`` it takes the place of the first."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    before = files(folder / "run")
    ended = zygote.run(folder, *FIT[:-2])
    assert ended.code == 2 and BEST in ended.error and "--overwrite" in ended.error
    assert files(folder / "run") == before
    ended = zygote.run(folder, *FIT[:-2], "--overwrite", "--trainer.max_steps", 1, "--trainer.limit_val_batches", 0)
    assert ended.code == 0, ended.err
    assert not (folder / BEST).exists() and run_name(folder) != run_name(whole)
    assert "overwrite" not in (folder / "run/config.yaml").read_text()


FAILING_CHECK = """
from mtp_lightning.training.module import MTPModule

def validation_step(self, *arguments):
    raise RuntimeError("in the sanity check")

MTPModule.validation_step = validation_step
"""


@pytest.mark.parametrize("what", ["sanity check", pytest.param("optimizer state", marks=pytest.mark.slow)])
def test_a_start_that_fails_changes_nothing(zygote: Zygote, whole: Path, tmp_path: Path, what: str) -> None:
    folder, words, prelude, reason = tmp_path / "run", list(FIT[:-2]), FAILING_CHECK, "in the sanity check"
    shutil.copytree(whole, folder)
    if what == "optimizer state":
        checkpoint = torch.load(folder / LAST, weights_only=True)
        checkpoint["mtp_resume"]["run"] = "another"
        checkpoint["optimizer_states"][0]["param_groups"] *= 2
        torch.save(checkpoint, folder / "other.ckpt")
        words, prelude, reason = [*words, "--ckpt_path", "other.ckpt"], "", "different number of parameter groups"
    ended = zygote.run(folder, *words, "--overwrite", prelude=prelude)
    assert ended.code == 1 and reason in ended.err
    assert run_name(folder) == run_name(whole)
    assert read_metrics(folder / "run") == read_metrics(whole / "run")


FULL_DISK = """
from mtp_lightning import files

def no_room(folder):
    raise OSError(28, "No space left on device")

files._sync_folder = no_room
"""


@pytest.mark.slow
def test_one_process_reports_for_all(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    """An error in the first process alone ends both."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    words = [*FIT[:-2], "--overwrite", "--trainer.strategy", "ddp", "--trainer.devices", 2]
    started = zygote.ranks(folder, words, words, preludes=[FULL_DISK, FULL_DISK])
    first, second = (process.wait() for process in started)
    assert (first.code, second.code) == (1, 0)
    assert "run_id.txt" in first.error and "mtp: error" not in second.err


def test_a_damaged_checkpoint_is_skipped(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / LAST).write_bytes((folder / LAST).read_bytes()[:-1000])
    (folder / f"{LAST}.part").write_bytes(b"half")  # what a killed run may leave
    ended = zygote.run(folder, *FIT)
    assert ended.code == 0 and f"'{LAST}'" in ended.err
    assert f"Restoring states from the checkpoint path at {BEST}" in ended.err
    assert_same_run(folder, whole)


def test_last_needs_a_checkpoint(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    folder = fresh(whole, tmp_path / "run")
    for command in ("validate", "fit"):
        ended = zygote.run(folder, command, *FIT[1:-1], "last")
        assert ended.code == 1 and "run/checkpoints" in ended.error and "--ckpt_path" in ended.error
        assert not (folder / "run/metrics.csv").exists()


def test_settings_that_differ_on_resume(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    """What the checkpoint restores is refused; others are named."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    before, last = files(folder / "run"), [*FIT[:-1], "last"]
    for key, old, new in (
        ("model.optimizer.init_args.lr", "0.01", "0.1"),
        ("model.lr_scheduler.init_args.warmup_steps", "3", "5"),
    ):
        ended = zygote.run(folder, *last, f"--{key}", new)
        assert ended.code == 2 and all(each in ended.error for each in (key, old, new))
    assert files(folder / "run") == before
    words = ["--data.block_fraction", "0.25", "--model.lr_scheduler.init_args.total_steps", 30]
    ended = zygote.run(folder, *last, *words, "--seed_everything", 1, "--trainer.max_steps", 15)
    line = next(line for line in ended.err.splitlines() if "config.yaml" in line)
    names = ("data.block_fraction 0.5 -> 0.25", "data.seed 0 -> 1", "model.lr_scheduler.init_args.total_steps 24 -> 30")
    assert ended.code == 2 and "data.seed" in ended.error  # within an epoch
    assert all(name in line for name in names) and line.count("->") == len(names)


def test_a_run_that_is_resumed_in_another_folder(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    """Its settings are compared too, and the run that is in that folder is kept."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "moved").mkdir()
    shutil.copy(folder / LAST, folder / "moved/last.ckpt")
    words = [*FIT[:-1], LAST, "--trainer.logger.save_dir", "other", "--trainer.max_steps", 15]
    ended = zygote.run(folder, *words, "--model.optimizer.init_args.lr", "0.1")
    assert ended.code == 2 and "model.optimizer.init_args.lr" in ended.error and not (folder / "other").exists()
    ended = zygote.run(folder, *words, "--data.eval_batch_size", 1)
    assert ended.code == 0 and "data.eval_batch_size null -> 1" in ended.err
    steps = [int(line["step"]) for line in read_metrics(folder / "other") if "train/loss" in line]
    assert steps == [13, 14]  # the last one of the first run is logged after its checkpoint
    write_run_id(folder / "run", "another")
    before = files(folder / "run")
    ended = zygote.run(folder, *FIT[:-1], "moved/last.ckpt")
    assert ended.code == 2 and "'run'" in ended.error and "--overwrite" in ended.error
    assert files(folder / "run") == before
    shutil.copytree(whole / "run", folder / "own")
    words_lr = ["--overwrite", "--model.optimizer.init_args.lr", "0.1"]
    ended = zygote.run(folder, *FIT[:-1], LAST.replace("run/", "own/", 1), *words_lr)
    assert ended.code == 2 and "model.optimizer.init_args.lr" in ended.error and files(folder / "run") == before
    words[words.index("other")] = "third"
    words[words.index(LAST)] = "moved/last.ckpt"
    ended = zygote.run(folder, *words)
    assert ended.code == 0 and "no config.yaml" in ended.err


def test_differences_of_two_configurations() -> None:
    saved = {
        "losses": {"base": {"class_path": "old.place.Base", "init_args": {"weight": 1}}, "lcm": {"class_path": "a.Lcm"}},
        "sampler_head": {"class_path": "a.Gru", "init_args": {"hidden_size": 8}},
        "loss_schedules": {},
        "removed": 1,
    }
    new = {
        "losses": {"base": {"class_path": "place.Base", "init_args": {"weight": 1.0, "added": 2}}},
        "sampler_head": {"class_path": "a.Mlp", "init_args": {"hidden_size": 9}},
        "loss_schedules": {"base": {"start": 1}},
        "added": None,
    }
    assert differences("model", saved, saved) == {}
    assert differences("model", saved, new) == {
        "model.losses.lcm": ({"class_path": "a.Lcm"}, "nothing"),
        "model.sampler_head.class_path": ("a.Gru", "a.Mlp"),
        "model.loss_schedules.base": ("nothing", {"start": 1}),
    }
