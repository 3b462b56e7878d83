# SPDX-License-Identifier: Apache-2.0
"""What a run shows on the terminal: the bar of a run that ends after a number of steps, and no advertisements."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import mtp
from lightning import Trainer
from tiny_run import write_config, write_run

from mtp_lightning.callbacks.steps_progress_bar import StepsProgressBar


@pytest.mark.parametrize(
    ("options", "said"),
    [({"max_steps": 9}, "Epoch 2   "), ({"max_epochs": 5}, "Epoch 2/4 "), ({"max_epochs": -1}, "Epoch 2   ")],
)
def test_the_number_of_epochs_is_named_where_it_is_known(options: dict[str, int], said: str, tmp_path: Path) -> None:
    bar = StepsProgressBar()
    trainer = Trainer(callbacks=[bar], logger=False, enable_checkpointing=False, default_root_dir=tmp_path, **options)
    bar._trainer = trainer
    assert bar._get_train_description(2) == said and len(said) == len(bar.validation_description)


def test_the_terminal_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd, caplog) -> None:
    config = write_run(tmp_path)
    config["trainer"] |= {"max_steps": 2, "enable_progress_bar": True, "callbacks+": []}
    write_config(tmp_path, config)
    monkeypatch.chdir(tmp_path)
    assert mtp("fit", "--config", "config.yaml") == 0
    out, err = capfd.readouterr()
    assert "Epoch 0  " in out and "/-2" not in out and "Tip:" not in out + err + caplog.text
    assert "max_steps=2` reached" in caplog.text  # other messages of Lightning are shown
