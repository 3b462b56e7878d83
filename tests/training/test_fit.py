# SPDX-License-Identifier: Apache-2.0
"""``mtp fit``, ``validate`` and ``test``: files, logged names, resuming, and what the configuration changes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from command_line import mtp, read_metrics
from saved import files_of
from tiny_run import LAST
from trained_run import NUM_MASKS, STEPS, fit, losses, validations, weights

from mtp_lightning import MTPModel

TERMS = ("base", "lcm", "sampler")
FIGURES = {"ntp_loss", "forced_acceptance_length", "forced_reference", "share_of_reference", "loss"}
FIGURES |= {f"loss/{term}" for term in TERMS} | {f"accuracy/offset_{o}" for o in range(2, NUM_MASKS + 2)}


def test_a_run_folder_and_the_logged_names(trained: Path) -> None:
    assert set(files_of(trained / "run")) == {
        *("config.yaml", "hparams.yaml", "metrics.csv", "run_id.txt"),
        *("checkpoints/best.ckpt", "checkpoints/last.ckpt"),
    }
    lines = read_metrics(trained / "run")
    training, validation = [line for line in lines if "train/loss" in line], validations(trained / "run")
    assert len(training) == STEPS and len(validation) == STEPS // 2 and len(lines) == 3 * STEPS // 2
    for line in training:
        logged = {"train/loss", "train/learning_rate", "train/gradient_norm", *(f"train/loss/{term}" for term in TERMS)}
        assert set(line) == {"epoch", "step", *logged}
        assert float(line["train/loss"]) == pytest.approx(sum(float(line[f"train/loss/{term}"]) for term in TERMS), rel=1e-6)
    for line in validation:
        assert set(line) == {"epoch", "step", *(f"val/{name}" for name in FIGURES)}
        forced, reference = float(line["val/forced_acceptance_length"]), float(line["val/forced_reference"])
        assert reference > 2 and 1 <= forced <= 1 + NUM_MASKS
        assert float(line["val/share_of_reference"]) == pytest.approx((forced - 1) / (reference - 1))
    assert len({line["val/loss"] for line in validation}) == len(validation)  # it trains
    for name in ("val/ntp_loss", "val/forced_reference"):  # text and blocks are the same in each validation
        assert len({line[name] for line in validation}) == 1


def test_a_checkpoint_holds_trained_weights_alone(trained: Path, here: Path) -> None:
    for name in ("best", "last"):
        path = trained / "run" / "checkpoints" / f"{name}.ckpt"
        checkpoint = torch.load(path, weights_only=True)
        model = MTPModel.from_pretrained(str(path))
        expected = {f"model.{name}": p.shape for name, p in model.trained_parameters()}
        assert {name: p.shape for name, p in checkpoint["state_dict"].items()} == expected
        assert not [name for name in expected if ".base." in name and ".lora_" not in name]
        # Weights and Adam's two moments of each; the rest is settings and the loops' counters.
        assert path.stat().st_size < 3 * 4 * sum(shape.numel() for shape in expected.values()) + 100_000
        assert path.stat().st_size < sum(p.numel() * 4 for p in model.parameters()) + 100_000
    assert checkpoint["global_step"] == STEPS


def test_the_saved_configuration_alone_is_the_same_run(trained: Path, here: Path) -> None:
    shutil.copy(trained / "run" / "config.yaml", "saved.yaml")
    assert mtp("fit", "--config", "saved.yaml") == 0
    assert files_of(here / "run")["metrics.csv"] == files_of(trained / "run")["metrics.csv"]
    assert (here / "run" / "config.yaml").read_text() == Path("saved.yaml").read_text()


def test_without_a_logger_all_starts_use_one_folder(here: Path) -> None:
    config = yaml.safe_load((here / "config.yaml").read_text())
    del config["trainer"]["logger"]
    (here / "config.yaml").write_text(yaml.safe_dump(config))
    for steps in (1, 2):
        assert fit("--ckpt_path", "auto", "--trainer.max_steps", steps) == 0
    assert len(losses(here / "lightning_logs")) == 2
    assert list((here / "lightning_logs").glob("events.out.tfevents.*"))
    assert not list((here / "lightning_logs").glob("version_*"))


def test_the_runs_files_are_in_the_root_folder_whatever_the_loggers(here: Path) -> None:
    config = yaml.safe_load((here / "config.yaml").read_text())
    config["trainer"]["logger"] = [{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "other"}}]
    (here / "config.yaml").write_text(yaml.safe_dump(config))
    assert fit("--trainer.default_root_dir", "root", "--trainer.max_steps", 2) == 0
    assert {"config.yaml", "metrics.csv", "run_id.txt", LAST.removeprefix("run/")} <= set(files_of(here / "root"))
    assert read_metrics(here / "root") == read_metrics(here / "other/lightning_logs/version_0")
    assert not list((here / "other").rglob("*.ckpt"))


def test_validate_and_test_leave_the_run_as_it_is(run: Path, capsys) -> None:
    """They give the figures of the last validation, in a folder of their own."""
    figures = {name: value for name, value in validations(run)[-1].items() if name.startswith("val/")}
    files = files_of(run)
    for command, prefix in (("validate", "val/"), ("test", "test/")):
        options = ["--ckpt_path", "last", "--data.test", "validation.jsonl"]
        assert mtp(command, "--config", "config.yaml", *options) == 0
        out, err = capsys.readouterr()
        expected = {name.replace("val/", prefix): value for name, value in figures.items()}
        assert all(name in out for name in expected) and f"run/{command}" in err
        (line,) = read_metrics(run / command)
        assert {name: value for name, value in line.items() if "/" in name} == expected
    after = files_of(run)
    assert {name: after[name] for name in files} == files
    assert set(after) - set(files) == {"validate/metrics.csv", "test/metrics.csv"}
    assert mtp("validate", "--config", "config.yaml", "--ckpt_path", "run") == 0  # the folder of a run: its best checkpoint
    capsys.readouterr()
    begun_from = ["--model.init_from", LAST]  # what the run began with, which its configuration keeps
    elsewhere = ["--trainer.default_root_dir", "elsewhere"]
    for words, name in (([], "best.ckpt"), (begun_from, "best.ckpt"), ([*begun_from, *elsewhere], "last.ckpt")):
        assert mtp("validate", "--config", "config.yaml", *words) == 0
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("weights "))
        assert line.endswith(f"run/checkpoints/{name}")


def test_a_run_without_a_validation_leaves_its_last_checkpoint(here: Path, capsys) -> None:
    assert fit("--trainer.max_steps", 1, "--trainer.limit_val_batches", 0) == 0
    out = capsys.readouterr().out
    assert f"--ckpt_path {LAST}" in out and not list(Path("run").rglob("best*.ckpt"))
    assert mtp("export", "--ckpt_path", "run", "--output", "saved") == 0  # what it says comes next


def test_a_run_begins_with_the_weights_of_another(run: Path, capsys) -> None:
    still = ["--model.optimizer.init_args.lr", "0", "--trainer.val_check_interval", "1"]
    second = ["--trainer.logger.save_dir", "second"]
    assert fit("--model.init_from", "run", *still, *second, "--trainer.max_steps", "1") == 0
    found, expected = weights("second/checkpoints/last.ckpt"), weights("run/checkpoints/best.ckpt")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], value) for name, value in expected.items())
    shutil.rmtree("run")
    resumed = [*still, *second, "--ckpt_path", "second/checkpoints/last.ckpt", "--trainer.max_steps", "2"]
    assert fit("--model.init_from", "run", *resumed) == 0  # a resumed run does not read it


@pytest.mark.parametrize("num_masks", [2, 5])
def test_a_run_may_have_fewer_or_more_masks_than_the_weights_it_begins_with(run: Path, num_masks: int) -> None:
    options = ["--model.num_masks", num_masks, "--model.optimizer.init_args.lr", "0", "--trainer.max_steps", "1"]
    options += ["--trainer.val_check_interval", "1", "--trainer.logger.save_dir", "second"]
    assert fit("--model.init_from", "run", *options) == 0
    name = "model.mask_embeddings"
    found, first = weights("second/checkpoints/last.ckpt"), weights("run/checkpoints/best.ckpt")
    k = len(first[name])
    expected = {**first, name: torch.stack([first[name][min(j, k - 1)] for j in range(num_masks)])}
    assert 2 < k < 5 and found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_damaged_masks_to_begin_with_are_refused(run: Path, capsys) -> None:
    checkpoint = torch.load("run/checkpoints/best.ckpt", weights_only=True)
    checkpoint["state_dict"]["model.mask_embeddings"] = torch.empty(0, 32)
    torch.save(checkpoint, "damaged.ckpt")
    options = ["--model.num_masks", "5", "--trainer.logger.save_dir", "second"]
    assert fit("--model.init_from", "damaged.ckpt", *options) == 1
    assert "mask_embeddings" in capsys.readouterr().err


def test_weights_to_begin_with_must_fit(run: Path, capsys) -> None:
    for key, options in {
        "model.lora.rank": ["--model.lora.rank", "4"],
        "model.sampler_head.init_args.hidden_size": ["--model.sampler_head.init_args.hidden_size", "16"],
        "model.init_from": ["--model.init_from", "nowhere.ckpt"],
    }.items():
        assert fit("--model.init_from", "run", "--trainer.logger.save_dir", "second", *options) == 1
        assert key in capsys.readouterr().err
    share = ["--model.sampler_head.init_args.hidden_size", "0.25"]  # of 32: the 8 of the other run
    assert fit("--model.init_from", "run", "--trainer.logger.save_dir", "second", *share) == 0


def test_a_standard_lora_without_sampler_head(here: Path) -> None:
    assert fit("--model.lora.gated", "false", "--model.sampler_head", "false") == 0
    assert len({line["val/ntp_loss"] for line in validations(here / "run")}) == STEPS // 2  # it changes the base
    assert "train/loss/sampler" not in read_metrics(here / "run")[0]
    assert not [name for name in weights(LAST) if "sampler" in name]


def test_noise_in_place_of_mask_embeddings(here: Path, capsys) -> None:
    options = ["--model.mask_tokens", "noise", "--model.sampler_head", "null"]
    assert fit(*options, "--trainer.logger.save_dir", "whole") == 0
    assert fit(*options, "--trainer.max_steps", 2) == 0
    assert fit(*options, "--ckpt_path", LAST) == 0
    found, expected = weights(LAST), weights("whole/checkpoints/last.ckpt")
    assert all(".lora_" in name and torch.equal(value, expected[name]) for name, value in found.items())
    capsys.readouterr()
    assert fit("--model.sampler_head", "false", "--ckpt_path", LAST) == 1
    assert "model.mask_tokens" in capsys.readouterr().err
    assert mtp("generate", LAST, "--prompt", "one two", "--max_new_tokens", 4) == 0


def test_accumulated_batches_are_one_large_batch(here: Path) -> None:
    # Packed rows are not sorted by length, so that two batches of 2 are one of 4. Adam would hide a factor.
    options = ["--model.dtype", "float64", "--model.optimizer.class_path", "torch.optim.SGD", "--trainer.max_steps", 2]
    options += ["--data.packing", "true", "--data.max_length", 64]
    assert fit(*options, "--trainer.logger.save_dir", "large") == 0
    options += ["--data.batch_size", 2, "--trainer.accumulate_grad_batches", 2, "--trainer.val_check_interval", 4]
    assert fit(*options, "--trainer.logger.save_dir", "accumulated") == 0
    large, accumulated = weights("large/checkpoints/last.ckpt"), weights("accumulated/checkpoints/last.ckpt")
    assert large.keys() == accumulated.keys()
    figures = [[float(loss) for loss in losses(here / name)] for name in ("large", "accumulated")]
    assert figures[1] == pytest.approx(figures[0], rel=1e-9)
    for name in large:
        torch.testing.assert_close(accumulated[name], large[name], rtol=1e-8, atol=1e-10)


def test_schedules_weigh_terms_in_training_alone(here: Path, capsys) -> None:
    options = ["--model.loss_schedules", '{"base": {"start": 1, "end": 0}}', "--model.num_masks_schedule.start", 1]
    options += ["--model.num_masks_schedule.end", 3, "--model.num_masks_schedule.steps", 2, "--model.optimizer.lr", 0]
    assert fit(*options) == 0
    lines = [line for line in read_metrics(here / "run") if "train/loss" in line]
    for step, line in enumerate(lines):
        base, lcm, sampler = (float(line[f"train/loss/{term}"]) for term in TERMS)
        assert float(line["train/loss"]) == pytest.approx((1 - step / STEPS) * base + lcm + sampler, rel=1e-5)
    line = validations(here / "run")[-1]
    assert float(line["val/loss"]) == pytest.approx(sum(float(line[f"val/loss/{term}"]) for term in TERMS), rel=1e-5)
    options[-5] = 4
    capsys.readouterr()
    assert fit(*options) == 2 and "model.num_masks_schedule.end" in capsys.readouterr().err


def test_a_loss_and_a_head_from_the_current_folder(here: Path, capsys) -> None:
    (here / "my_losses.py").write_text(
        "import torch\nimport torch.nn.functional as F\nfrom mtp_lightning.losses import SamplerCrossEntropy\n\n\n"
        "class Focal(SamplerCrossEntropy):\n"
        "    def per_position(self, logits, targets):\n"
        "        loss = F.cross_entropy(logits, targets.labels, reduction='none')\n"
        "        return (1 - torch.exp(-loss)) ** 2 * loss\n"
    )
    (here / "my_heads.py").write_text(
        "from torch import nn\nfrom mtp_lightning.sampler_heads import SamplerHead\n\n\n"
        "class Added(SamplerHead):\n"
        "    def __init__(self, bias: bool = True):\n"
        "        super().__init__()\n"
        "        self.bias = bias\n\n"
        "    def build(self, width):\n"
        "        self.layer = nn.Linear(width, width, self.bias)\n\n"
        "    def forward(self, hidden, previous):\n"
        "        return hidden + self.layer(previous)\n\n"
        "    def step(self, hidden, previous, state):\n"
        "        return self(hidden, previous), None\n"
    )
    head = ["--model.sampler_head.class_path", "my_heads.Added", "--model.sampler_head.bias", "false"]
    both = ["--model.losses.plain.class_path", "SamplerCrossEntropy", "--model.losses.focal.class_path", "my_losses.Focal"]
    assert fit(*head, *both, "--model.losses.focal.weight", 0.5, "--trainer.max_steps", 2) == 0
    line = read_metrics(here / "run")[0]
    plain, focal = float(line["train/loss/plain"]), float(line["train/loss/focal"])
    assert 0 < focal < plain and float(line["train/loss"]) == pytest.approx(plain + 0.5 * focal)
    assert [name for name in weights(LAST) if "sampler_head" in name] == ["model.sampler_head.layer.weight"]
    out = capsys.readouterr().out
    assert "run/checkpoints/best.ckpt" in out and "mtp generate run " in out
    assert mtp("generate", LAST, "--prompt", "one", "--raw", "--max_new_tokens", 3) == 0
    assert capsys.readouterr().out.startswith("one")
