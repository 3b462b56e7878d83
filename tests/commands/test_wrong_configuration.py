# SPDX-License-Identifier: Apache-2.0
"""Wrong configurations and wrong data: one line that says what to change, and nothing of an earlier run is lost."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from command_line import error_of, leave_no_trace, own_cache  # noqa: F401 - some are fixtures
from trained_run import assert_message, contents

from mtp_lightning.commands.configuration_file import check_configuration
from mtp_lightning.errors import UsageError

DOTTED = "; a class_path is module.Class, of an installed package or of a file in the current folder."
WRONG_CONFIGURATION = {
    "--model.nummasks 9": "unknown key or option '--model.nummasks': did you mean 'model.num_masks'?",
    "--config typo.yaml": "unknown key or option 'model.num_maks': did you mean 'model.num_masks'?",
    "--zzzzzzzz 1": "unknown key or option '--zzzzzzzz': --help lists what there is.",
    "--model.num_masks three": "model.num_masks: expected int, got three. Change model.num_masks.",
    "--trainer.max_steps 1.5": "trainer.max_steps: expected int, got 1.5. Change trainer.max_steps.",
    "--config no_list.yaml": re.compile(r"configuration file 'no_list\.yaml', line 3: expected YAML, .*\. Correct it\."),
    "--config": "--config needs a value behind it, and there is none. --help says which.",
    "--model.num_masks 0": "num_masks must be 1 or more, got 0. Set model.num_masks in the YAML.",
    "--model.num_masks -1": "num_masks must be 1 or more, got -1. Set model.num_masks in the YAML.",
    "--model.lora.rank 0": "rank must be 1 or more, got 0. Set model.lora.rank in the YAML.",
    "--model.dtype float12": (
        "dtype must be auto or one of float64, float32, bfloat16, float16, got 'float12'. Set model.dtype, or --dtype."
    ),
    "--model.attention flash9": (
        "attention must be one of sdpa, eager, flex_attention, or null, got 'flash9'. Set model.attention."
    ),
    "--model.quantization 3bit": "quantization must be one of 4bit, 8bit, or null, got '3bit'. Set model.quantization.",
    "--model.sampler_head false --model.losses.mine.class_path SamplerCrossEntropy": (
        "loss term mine (SamplerCrossEntropy) needs a sampler head, and model.sampler_head is false."
        " Remove model.losses.mine or name a sampler head."
    ),
    "--model.sampler_head.class_path NoHead": ("model.sampler_head: NoHead is no import path" + DOTTED),
    "--model.losses.a.class_path my_losses.Focal": (
        "model.losses: Problem with given class_path 'my_losses.Focal': No module named 'my_losses'" + DOTTED
    ),
    "--model.losses.a.class_path mtp_lightning.losses.SamplerCrossEntropi": (
        "model.losses: Problem with given class_path 'mtp_lightning.losses.SamplerCrossEntropi':"
        " module 'mtp_lightning.losses' has no attribute 'SamplerCrossEntropi'" + DOTTED
    ),
    "--model.losses.a.class_path SamplerCrossEntropi": "model.losses: SamplerCrossEntropi is no import path" + DOTTED,
    "--model.losses.a.class_path torch.nn.Linear": (
        "model.losses: Import path torch.nn.Linear does not correspond to a subclass of LossTerm" + DOTTED
    ),
    "--model.losses.a.class_path BaseCrossEntropy --model.losses.a.wait 2": (
        "model.losses: unknown argument 'wait'. Change model.losses."
    ),
    "--model.lora.target_modules no_layer": re.compile(
        r"model\.lora\.target_modules 'no_layer' fits no layer of the base model: .*"
    ),
    "--data.batch_size 0": "batch_size must be 1 or more, got 0. Set data.batch_size.",
    "--data.max_length 97": "max_length must be at most the base's context, 96, got 97. Set data.max_length.",
    "--data.train config.yaml": (
        "config.yaml: expected a file that ends in one of .jsonl, .json, .parquet, .txt, got '.yaml'. Convert it."
    ),
    "--trainer.strategy no_strategy": re.compile(
        r"the trainer can't be made: .*no_strategy.* Change trainer\.\* in the configuration\."
    ),
    "--trainer.callbacks+ mtp_lightning.callbacks.AcceptanceEvaluation": (
        "trainer.callbacks: prompts is required: set it in the configuration file or on the command line."
    ),
    "--model.sampler_head 3": "model.sampler_head: 3 is no import path" + DOTTED,
    "--model.losses 3": "model.losses: expected dict, got 3. Change model.losses.",
    "--model.optimizer.class_path torch.optim.Nope": re.compile(
        r"model\.optimizer: module 'torch\.optim' has no attribute 'Nope'\. Change model\.optimizer\."
    ),
    "--trainer.callbacks+ mtp_lightning.callbacks.AcceptanceEvaluation --trainer.callbacks.prompts prompts.jsonl"
    " --trainer.callbacks.num_masks 4": (
        "num_masks must be auto or from 1 to 3, the number this model was trained with, got 4. Change num_masks."
    ),
}
WRONG_DATA = {
    "missing.jsonl": (None, "expected a file or folder, nothing is there (looked in {here}). Check the path."),
    "empty.jsonl": ("\n", "expected at least one row, it is empty."),
    "broken.jsonl": (
        '{"text": "one two"}\n{text: 1}\n',
        re.compile(r"broken\.jsonl, line 2: expected JSON, got .* at column 2\. Correct or delete the line\."),
    ),
    "fields.jsonl": (
        '{"txt": "one two"}\n',
        "expected rows with messages | prompt + completion (or completion_ids) | text | input_ids (+ labels),"
        " got the fields txt. Rename or add a field.",
    ),
    "types.jsonl": (
        '{"prompt": "one", "completion": 3}\n',
        re.compile(r"types\.jsonl, row 1: completion must be text, got int\."),
    ),
    "short.jsonl": (
        '{"input_ids": [9]}\n',
        re.compile(
            r"data\.(train|validation): none of the 1 rows can be used: 1 shorter than two tokens\. Expected rows of two"
            r" tokens or more with loss after the first; check the fields, max_length and the chat template\."
        ),
    ),
}


@pytest.mark.parametrize("options", WRONG_CONFIGURATION)
def test_wrong_configuration(here: Path, capsys, options: str) -> None:
    (here / "typo.yaml").write_text("model: {num_maks: 3}\n")
    (here / "no_list.yaml").write_text("data:\n  train: [a, b\n")
    assert_message(error_of(capsys, 2, "fit", "--config", "config.yaml", *options.split()), WRONG_CONFIGURATION[options])
    assert not [path for path in here.rglob("run/**/*") if path.is_file()]


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("name", WRONG_DATA)
def test_wrong_data(run: Path, here: Path, capsys, name: str, split: str) -> None:
    content, expected = WRONG_DATA[name]
    if content is not None:
        (here / name).write_text(content)
    before = contents(run)
    found = error_of(capsys, 1, "fit", "--config", "config.yaml", f"--data.{split}", name)
    assert_message(found, f"{name}: {expected.format(here=here)}" if isinstance(expected, str) else expected)
    assert contents(run) == before  # the run that is there loses nothing to a failed one


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            "",
            "configuration file 'c.yaml': expected keys as model, data and trainer, got nothing."
            " Correct it or leave it out.",
        ),
        (
            "# model: {num_masks: 3}",
            "configuration file 'c.yaml': expected keys as model, data and trainer, got comments alone."
            " Correct it or leave it out.",
        ),
        (
            "hello",
            "configuration file 'c.yaml': expected keys as model, data and trainer, got hello. Correct it or leave it out.",
        ),
        (
            "- a",
            "configuration file 'c.yaml': expected keys as model, data and trainer, got - a. Correct it or leave it out.",
        ),
        ("model:\n\tnum_masks: 3\n", re.compile(r"configuration file 'c\.yaml', line 2: expected YAML, .*Correct it\.")),
        (b"\xff\xfe", re.compile(r"configuration file 'c\.yaml' is no UTF-8 text: .*\. Save it as UTF-8\.")),
        ("model: 3", "configuration file 'c.yaml', line 1: expected keys below model, got 3. Correct it or leave it out."),
        ("data:\n", "configuration file 'c.yaml', line 1: expected keys below data, got none. Correct it or leave it out."),
        (
            "model: {lora: 8}",
            "configuration file 'c.yaml', line 1: expected keys below model.lora, got 8. Correct it or leave it out.",
        ),
        (
            "data: {max_length: 8}\nmodel: {num_masks: 2}\ndata: {batch_size: 1}\n",
            "configuration file 'c.yaml', line 3: the key data stands in line 1 too, and one of them would be lost."
            " Put them together.",
        ),
        ("data: {batch_size: two}", "data.batch_size: expected int, got two. Change data.batch_size."),
        (
            "data: {batch_size: null}",
            "data.batch_size must have a value, got null. Change data.batch_size, or leave it out.",
        ),
        (
            "model: {lora: {rank: null}}",
            "model.lora.rank must have a value, got null. Change model.lora.rank, or leave it out.",
        ),
        ("model: {lora: {alpha: -1}}", "alpha must be above 0, or null for 2 * rank, got -1.0. Set model.lora.alpha."),
        (
            "data: {train: {train.jsonl: lots}}",
            "data.train: expected str or list[str] or dict[str, float] or null, got {'train.jsonl': 'lots'}."
            " Change data.train.",
        ),
        ("model: {losses: {a: null}}", "model.losses: expected LossTerm (class_path and init_args), got None" + DOTTED),
        (
            "model: {sampler_head: true}",
            "model.sampler_head: expected SamplerHead (class_path and init_args) or false or null, got True" + DOTTED,
        ),
        (
            "model: {optimizer: {class_path: torch.nn.Linear}}",
            "model.optimizer: Expected 'torch.nn.Linear' to be a subclass of Optimizer. Change model.optimizer.",
        ),
        (
            "trainer: {callbacks: [{class_path: nope.Nope}]}",
            "trainer.callbacks: Problem with given class_path 'nope.Nope': No module named 'nope'" + DOTTED,
        ),
        (
            "trainer: {callbacks: [{class_path: mtp_lightning.callbacks.LastCheckpoint, init_args: {every: 3}}]}",
            "trainer.callbacks: unknown argument 'every'. Change trainer.callbacks.",
        ),
    ],
)
def test_wrong_configuration_files(here: Path, capsys, content: str | bytes, expected: str | re.Pattern[str]) -> None:
    (here / "c.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_message(error_of(capsys, 2, "fit", "--config", "config.yaml", "--config", "c.yaml"), expected)
    assert not [path for path in here.rglob("run/**/*") if path.is_file()]


@pytest.mark.parametrize(
    "content",
    [
        "common: &a {x: 1}\nmore: &b {y: 2}\nmodel:\n  <<: *a\n  <<: *b\n",
        "model: &x {lora: *x}\n",  # in itself: what is wrong with it is not the file
    ],
)
def test_yaml_that_is_unusual(tmp_path: Path, content: str) -> None:
    (tmp_path / "c.yaml").write_text(content)
    check_configuration(str(tmp_path / "c.yaml"))


def test_a_key_that_stands_twice_in_what_is_merged(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("common: &a {x: 1, x: 2}\nmodel:\n  <<: *a\n")
    with pytest.raises(UsageError, match="line 1: the key common.x stands in line 1 too"):
        check_configuration(str(tmp_path / "c.yaml"))
