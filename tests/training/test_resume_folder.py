# SPDX-License-Identifier: Apache-2.0
"""Which run a folder belongs to, and what a start in it takes over, keeps and replaces."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
import torch
from command_line import read_metrics
from interrupted_runs import FIT, KILL, fresh, history, run_name
from ports import free_port
from tiny_run import LAST, assert_same_run
from zygote import Zygote


def test_an_earlier_runs_checkpoints_are_not_gone_on_from(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    """A run that begins anew in the folder of an earlier one and is killed before its first checkpoint."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    before = {path.name: path.read_bytes() for path in (folder / "run/checkpoints").iterdir()}
    last, best = LAST, LAST.replace("last", "best")
    killed = KILL.replace("@EVENT", "'optimizer'").replace("@NUMBER", "2").replace("@SECONDS", "0")
    ended = zygote.run(folder, *FIT[:-2], prelude=killed)
    assert ended.code == -signal.SIGKILL
    assert f"mtp: checkpoints of an earlier run are there ({best}, {last}), and this one begins at step 0: its" in ended.err
    assert {path.name: path.read_bytes() for path in (folder / "run/checkpoints").iterdir()} == before
    assert run_name(folder) != run_name(whole)
    validated = zygote.run(folder, "validate", *FIT[1:])
    assert validated.code == 1 and "no complete checkpoint of this run in 'run/checkpoints'." in validated.err
    killed = killed.replace("left = 2", "left = 3")
    ended = zygote.run(folder, *FIT, prelude=killed)  # killed again before its first checkpoint
    assert ended.code == -signal.SIGKILL
    for path in (last, best):
        said = f"mtp: checkpoint '{path}' is passed over: it belongs to an earlier run in this folder. To go on from it give"
        assert f"{said} --ckpt_path {path}." in ended.err
    assert "no complete checkpoint of this run in 'run/checkpoints': training begins at step 0." in ended.err
    named = tmp_path / "named"
    shutil.copytree(folder, named)
    assert zygote.run(folder, *FIT).code == 0
    assert_same_run(folder, whole)
    # By its name the earlier run can be gone on with; the folder is its own again, also for the start after a kill.
    words = (*FIT[:-1], best, "--trainer.max_steps", 16)
    ended = zygote.run(named, *words, prelude=killed.replace("left = 3", "left = 1"))
    step = torch.load(named / best, weights_only=True)["global_step"]
    assert ended.code == -signal.SIGKILL
    assert (
        "mtp: 'run' has figures of another run than the checkpoint's: metrics.csv begins anew, after step"
        f" {step}." in ended.err
    )
    assert run_name(named) == run_name(whole)
    assert not (named / "run/metrics.csv").exists()  # it had the new run's figures, of steps 0 and 1
    ended = zygote.run(named, *FIT[:-1], "last", "--trainer.max_steps", 16)
    assert ended.code == 0 and f"Restoring states from the checkpoint path at {last}" in ended.err
    steps = {int(line["step"]) for line in read_metrics(named / "run")}
    assert steps == {13, 14, 15}  # the first is what the checkpoint's step was about to log


FAILING_CHECK = """
from mtp_lightning.training.module import MTPModule

def validation_step(self, *arguments):
    raise RuntimeError("in the sanity check")

MTPModule.validation_step = validation_step
"""


@pytest.mark.parametrize("what", ["no weights", "sanity check", "optimizer state"])
def test_a_start_that_fails_takes_no_folder_over(zygote: Zygote, whole: Path, tmp_path: Path, what: str) -> None:
    folder, words, prelude = tmp_path / "run", list(FIT[:-2]), ""
    shutil.copytree(whole, folder)
    if what == "no weights":
        (folder / "base/model.safetensors").unlink()  # all but the last thing that is loaded is there
        said = "base"
    elif what == "sanity check":
        prelude, said = FAILING_CHECK, "in the sanity check"
    else:
        checkpoint = torch.load(folder / LAST, weights_only=True)
        checkpoint["mtp_resume"]["run"] = "another"
        checkpoint["optimizer_states"][0]["param_groups"] *= 2
        torch.save(checkpoint, folder / "other.ckpt")
        words, said = [*words, "--ckpt_path", "other.ckpt"], "different number of parameter groups"
    ended = zygote.run(folder, *words, prelude=prelude)
    assert ended.code == 1 and said in ended.err
    assert run_name(folder) == run_name(whole)
    assert read_metrics(folder / "run") == read_metrics(whole / "run")


FULL_DISK = """
from mtp_lightning import files

def no_room(folder):
    raise OSError(28, "No space left on device")

files._sync_folder = no_room
"""


def test_a_folder_that_can_not_be_taken_over_ends_all_processes(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    folder = fresh(whole, tmp_path / "run")
    words = [*FIT[:-2], "--trainer.strategy", "ddp", "--trainer.devices", 2]
    started = zygote.ranks(folder, free_port(), words, words, preludes=[FULL_DISK, FULL_DISK])
    first, second = (process.wait() for process in started)
    assert (first.code, second.code) == (1, 0) and "mtp: error" not in second.err
    assert first.error.startswith("'run/run_id.txt' could not be written: No space left on device.")


def test_one_process_speaks_for_all(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    words = ["--trainer.strategy", "ddp", "--trainer.devices", 2, "--data.train", "nowhere.jsonl"]
    for more, said in (([], "earlier run are there"), (["--ckpt_path", "last"], "is passed over")):
        first, second = (p.wait() for p in zygote.ranks(folder, free_port(), *([[*FIT[:-2], *words, *more]] * 2)))
        assert said in first.err and said not in second.err
        (folder / "run/run_id.txt").write_text("another")


def test_a_process_that_hangs_fails_its_test(zygote: Zygote, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no end in 1 seconds"):
        zygote.start(tmp_path, ["--version"], "import time; time.sleep(60)").wait(1)


def test_validate_adds_to_the_history_at_the_checkpoints_step(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    best = LAST.replace("last", "best")
    step = torch.load(folder / best, weights_only=True)["global_step"]

    before, lines = history(folder), read_metrics(folder / "run")
    of_the_step = next(line for line in lines if line.get("val/loss") and int(line["step"]) == step - 1)
    ended = zygote.run(folder, "validate", "--config", "config.yaml", "--ckpt_path", best)
    assert ended.code == 0, ended.err
    assert f"after {step} training steps" in ended.out
    assert history(folder) == [*(entry for entry in before if entry != ("val", step)), ("val", step)] and len(before) > 2
    *others, line = read_metrics(folder / "run")
    assert others == lines and (line["step"], line["epoch"]) == (of_the_step["step"], of_the_step["epoch"])
    assert line["val/loss"] == of_the_step["val/loss"]


def test_commands_that_only_read_need_a_checkpoint(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    folder = fresh(whole, tmp_path / "run")
    ended = zygote.run(folder, "validate", "--config", "config.yaml", "--ckpt_path", "last")
    assert ended.code == 1
    assert (
        ended.error
        == "no complete checkpoint of this run in 'run/checkpoints'. Give the path of a .ckpt file with --ckpt_path."
    )
