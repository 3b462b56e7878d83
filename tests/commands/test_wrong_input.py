# SPDX-License-Identifier: Apache-2.0
"""What people get wrong: the exit code, one line that names the key or file, and no change to an earlier run."""

from __future__ import annotations

import io
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from command_line import error_of
from saved import files_of
from tiny_run import LAST

FILES = {
    "empty.txt": "",
    "long.txt": "one\n" + "one " * 99 + "\n",
    # configurations
    "comments.yaml": "# model: {num_masks: 3}\n",
    "text.yaml": "hello",
    "latin.yaml": b"\xff\xfe",
    "tab.yaml": "model:\n\tnum_masks: 3\n",
    "typo.yaml": "model: {num_maks: 3}\n",
    "empty_group.yaml": "data:\n",
    "no_group.yaml": "model: {lora: 8}\n",
    "twice.yaml": "data: {max_length: 8}\nmodel: {num_masks: 2}\ndata: {batch_size: 1}\n",
    "null.yaml": "model: {lora: {rank: null}}\n",
    "mix.yaml": "data: {train: {train.jsonl: lots}}\n",
    "head.yaml": "model: {sampler_head: true}\n",
    "optimizer.yaml": "model: {optimizer: {class_path: torch.nn.Linear}}\n",
    "callback.yaml": "trainer: {callbacks: [{class_path: nope.Nope}]}\n",
    "monitor.yaml": "trainer: {callbacks+: [{class_path: EarlyStopping, init_args: {monitor: val/los}}]}\n",
    "term.yaml": "model: {losses: {good: {class_path: BaseCrossEntropy}, mine: {class_path: BaseCrossEntropi}}}\n",
    "term_argument.yaml": "model: {losses: {mine: {class_path: BaseCrossEntropy, init_args: {wait: 2}}}}\n",
    "term_value.yaml": "model: {losses: {mine: {class_path: AnchorDistillation, init_args: {head: samplr}}}}\n",
    "list.yaml": "trainer: {callbacks: [{class_path: LastCheckpoint}, {class_path: LastCheckpoin}]}\n",
    "argument.yaml": "trainer: {callbacks: [{class_path: mtp_lightning.callbacks.LastCheckpoint, init_args: {every: 3}}]}\n",
    # rows
    "empty.jsonl": "\n",
    "broken.jsonl": '{"text": "one two"}\n{text: 1}\n',
}
COMMANDS = [
    ("fit", 2, "--model.base_model"),
    ("fit --config no.yaml", 1, "no.yaml"),
    ("serve nowhere", 1, "nowhere"),
    ("fit --config base", 1, "'base'"),
    ("fit --confi config.yaml", 2, "--confi"),
    ("test --config config.yaml", 2, "data.test"),
    ("validate --config config.yaml --ckpt_path no.ckpt", 1, "no.ckpt"),
    ("validate --config config.yaml --trainer.default_root_dir no_run", 2, "--ckpt_path"),
    ("predict --config config.yaml --ckpt_path last", 2, "--ckpt_path"),
    ("predict --config config.yaml --ckpt_path {last}", 2, "--prompts"),
    ("predict --config config.yaml --ckpt_path {last} --prompts no.jsonl", 1, "no.jsonl"),
    ("predict --config config.yaml --ckpt_path {last} --prompts p --model.nummasks 2", 2, "model.num_masks"),
    ("generate no.ckpt --prompt a", 1, "no.ckpt"),
    ("generate base --prompt a", 1, "base is a base model"),
    ("generate Owner/none --prompt a", 1, "'Owner/none'"),
    ("generate nowhere", 2, "--prompt"),
    ("generate nowhere --prompts no.json", 1, "no.json"),
    ("generate nowhere --prompt a --num_masks 0", 2, "num_masks"),
    ("generate nowhere --prompt a --html /proc/x.html", 1, "/proc/x.html"),
    ("distill nowhere --prompts empty.txt --output a.jsonl", 1, "empty.txt"),
    ("init --base_model base --data.train train.jsonl --hours 0", 2, "hours: expected a number >0"),
    ("generate {last} --prompt a --device cuda:9", 2, "cuda:9"),
    ("generate {last} --prompt a --prompts prompts.jsonl", 2, "--prompts"),
    ("generate {last} --prompts long.txt", 1, "long.txt, line 2"),
    ("generate {last} --prompt a --base_model ./no_base", 1, "./no_base"),
    ("generate runs/nope --prompt a", 1, "no folder runs/nope"),
    ("generate {last} --prompt a --decoding cubic", 2, "decoding"),
    ("generate {last} --prompt a --num_mask 3", 2, "num_masks"),
    ("generate {last} --prompt a --num_masks 4", 2, "num_masks"),
    ("generate {last} --prompt a --compile maybe", 2, "compile"),
    ("generate {last} --prompt a --dtype half", 2, "dtype"),
    ("chat {last} --batch_size 2", 2, "--batch_size"),
    ("chat {last} --chat_template no.jinja", 1, "no.jinja"),
    ("data --config config.yaml --split tset", 2, "split"),
    ("distill", 2, "prompts"),
    ("distill no_base --prompts prompts.jsonl --output a.jsonl", 1, "'no_base'"),
    ("distill runs/nope --prompts prompts.jsonl --output a.jsonl", 1, "no folder runs/nope"),
]
FIT = [
    ("--config comments.yaml", 2, "comments.yaml"),
    ("--config text.yaml", 2, "text.yaml"),
    ("--config latin.yaml", 2, "latin.yaml"),
    ("--config tab.yaml", 2, '"tab.yaml", line 2'),
    ("--config typo.yaml", 2, "model.num_masks"),
    ("--config empty_group.yaml", 2, "data"),
    ("--config no_group.yaml", 2, "model.lora"),
    ("--config twice.yaml", 2, '"twice.yaml", line 3'),
    ("--config null.yaml", 2, "model.lora.rank"),
    ("--config mix.yaml", 2, "data.train"),
    ("--config head.yaml", 2, "model.sampler_head"),
    ("--config optimizer.yaml", 2, "model.optimizer"),
    ("--config callback.yaml", 2, "nope.Nope"),
    ("--config argument.yaml", 2, "trainer.callbacks.0.init_args.every: "),
    ("--config monitor.yaml", 2, "EarlyStopping.monitor 'val/los'"),
    ("--config term.yaml", 2, "model.losses.mine.class_path: "),
    ("--config term_argument.yaml", 2, "model.losses.mine.init_args.wait: "),
    ("--config term_value.yaml", 2, "model.losses.mine.init_args.head: "),
    ("--config list.yaml", 2, "trainer.callbacks.1.class_path: "),
    ("--model.sampler_head.class_path GRUHead", 2, "model.sampler_head.class_path: "),
    ("--ckpt_path best", 2, "ckpt_path"),
    ("--model.lora.rank 0", 2, "rank"),
    ("--model.lora.target_modules no_layer", 2, "target_modules"),
    ("--model.dtype float12", 2, "dtype"),
    ("--model.attention flash9", 2, "attention"),
    ("--model.quantization 3bit", 2, "quantization"),
    ("--model.losses.a.class_path my_losses.Focal", 2, "model.losses.a.class_path: "),
    ("--model.losses.a.class_path SamplerCrossEntropi", 2, "SamplerCrossEntropy"),
    ("--model.sampler_head false --model.losses.mine.class_path SamplerCrossEntropy", 2, "mine"),
    ("--model.optimizer.lr fast", 2, "lr: "),
    ("--trainer.strategy no_strategy", 2, "no_strategy"),
    ("--trainer.callbacks+ mtp_lightning.callbacks.AcceptanceEvaluation", 2, "prompts"),
    ("--trainer.default_root_dir /proc/x", 1, "trainer.default_root_dir /proc/x"),
    ("--data.batch_size 0", 2, "batch_size"),
    ("--data.train config.yaml", 2, "config.yaml"),
    ("--data.train missing.jsonl", 1, "missing.jsonl"),
    ("--data.validation empty.jsonl", 1, "empty.jsonl"),
    ("--data.train broken.jsonl", 1, "broken.jsonl, line 2"),
]


@pytest.fixture(scope="module")
def folder(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run and the wrong files."""
    folder = tmp_path_factory.mktemp("wrong") / "here"
    shutil.copytree(trained, folder)
    for name, content in FILES.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.mark.parametrize(
    ("words", "code", "name"),
    [*COMMANDS, *((f"fit --config config.yaml --overwrite {words}", code, name) for words, code, name in FIT)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_input(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str, code: int, name: str
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    before = files_of(folder)
    # str.format would take the braces of a mix of sources for a field.
    assert name in error_of(capsys, code, *shlex.split(words.replace("{last}", LAST)))
    assert files_of(folder) == before
