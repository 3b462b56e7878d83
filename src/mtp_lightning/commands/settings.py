# SPDX-License-Identifier: Apache-2.0
"""The commands that read a configuration: their help and unknown keys, without importing what the keys configure.

Importing Lightning, torch and transformers takes seconds. Names, types and descriptions of the keys are read from the source
of the classes instead, of which they are the arguments.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, cast

from docstring_parser import parse

from mtp_lightning.commands.arguments import DecodingArguments
from mtp_lightning.commands.configuration_file import read_configuration
from mtp_lightning.errors import UsageError

CLASSES = {
    "model": ("mtp_lightning", "training/module.py", "MTPModule"),
    "model.lora": ("mtp_lightning", "modeling/gated_lora.py", "LoRA"),
    "data": ("mtp_lightning", "data/module.py", "MTPDataModule"),
    "trainer": ("lightning", "pytorch/trainer/trainer.py", "Trainer"),
}
"""Group of keys -> package, file and name of the class whose arguments they are."""
COMMON = {
    "config": "a YAML file; give several to add to the first. A first word that ends in .yaml is one too",
    "seed_everything": "seed of all random numbers. Default: 0",
    "print_config": "print the configuration with all defaults, and stop",
    "help": "show this text",
}
SAVED = {"ckpt_path": "not used; a run's config.yaml has it", "weights_only": "not used; a run's config.yaml has it"}
TRAINER_OPTIONS = {
    "ckpt_path": "path of a checkpoint, folder of a run, or last: the newest of this run. Default: this run's best",
    "weights_only": "",
}
FIT_OPTIONS = {
    "ckpt_path": "path of a checkpoint to resume from; last: the newest of the run in the folder; auto: the same, or a new"
    " run where there is none",
    "overwrite": "delete the run that is in the folder, and begin again",
    "weights_only": "",
}
VALIDATE_OPTIONS = {**TRAINER_OPTIONS, "verbose": ""}
PREDICT_OPTIONS = {
    "ckpt_path": "a checkpoint that mtp fit wrote, or the folder of a run: its best",
    "prompts": "prompts file. Default: data.test",
    "json": "one JSON line per prompt: what it always prints",
    "weights_only": "",
}
DATA_OPTIONS = {
    **SAVED,
    "split": "train, validation or test. Default: train",
    "rows": "number of rows to show. Default: 3",
    "steps": "number of optimizer steps to count. Default: 10",
}
OPTIONS = {
    "fit": FIT_OPTIONS,
    "validate": VALIDATE_OPTIONS,
    "test": VALIDATE_OPTIONS,
    "predict": PREDICT_OPTIONS,
    "data": DATA_OPTIONS,
}
"""Command -> its options besides those of all, with their help; without a text they are not shown."""
EXAMPLES = {
    "fit": """\
  mtp init --base_model BASE --data.train answers.jsonl   write a configuration for this machine: mtp.yaml
  mtp fit mtp.yaml                                        train
  mtp fit mtp.yaml --trainer.max_steps 2000 --model.lora.rank 64
  mtp fit mtp.yaml --ckpt_path last                       resume
  mtp fit mtp.yaml --config callbacks/samples.yaml        add a fragment of a configuration""",
    "validate": "  mtp validate runs/my/config.yaml --ckpt_path runs/my/checkpoints/best.ckpt",
    "test": "  mtp test runs/my/config.yaml --ckpt_path runs/my/checkpoints/best.ckpt --data.test held_out.jsonl",
    "predict": "  mtp predict runs/my/config.yaml --ckpt_path runs/my/checkpoints/best.ckpt --prompts prompts.jsonl",
    "data": "  mtp data mtp.yaml --rows 5",
}
HELP_WORDS = ("-h", "--help", "--help.trainer")


class Key(NamedTuple):
    """A key of a configuration."""

    kind: str  # its type, as it is written
    default: str | None  # as it is written; None: it must be given
    text: str  # what it means


@cache
def keys_of(group: str) -> dict[str, Key]:
    """The keys of a group by name: the arguments of its class."""
    package, file, class_name = CLASSES[group]
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations is not None
    tree = ast.parse((Path(spec.submodule_search_locations[0]) / file).read_text(encoding="utf-8"))
    owner = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    init = next((node for node in owner.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"), None)
    docs = [ast.get_docstring(node) or "" for node in (owner, init) if node is not None]
    texts = {param.arg_name: param.description or "" for doc in docs for param in parse(doc).params}
    return {
        name: Key(kind, default, " ".join(texts.get(name, "").replace("``", "").split()))
        for name, kind, default in (_arguments(init) if init else _fields(owner))
    }


def _arguments(init: ast.FunctionDef) -> Iterable[tuple[str, str, str | None]]:
    """Name, type and default of the arguments of a constructor."""
    arguments = [*init.args.args[1:], *init.args.kwonlyargs]
    positional = init.args.args[1:]
    defaults = [None] * (len(positional) - len(init.args.defaults)) + [*init.args.defaults, *init.args.kw_defaults]
    for argument, default in zip(arguments, defaults, strict=True):
        kind = "" if argument.annotation is None else ast.unparse(argument.annotation)
        yield argument.arg, kind, None if default is None else ast.unparse(default)


def _fields(owner: ast.ClassDef) -> Iterable[tuple[str, str, str | None]]:
    """Name, type and default of the fields of a dataclass."""
    for node in owner.body:
        if isinstance(node, ast.AnnAssign):
            name = cast(ast.Name, node.target).id
            yield name, ast.unparse(node.annotation), None if node.value is None else ast.unparse(node.value)


def with_configurations(words: Sequence[str]) -> list[str]:
    """The options with ``--config`` before YAML files that are named first: ``a.yaml b.yaml --x 1``."""
    number = next((at for at, word in enumerate(words) if not word.endswith((".yaml", ".yml"))), len(words))
    files = words[:number] if not words[0:1] or not words[0].startswith("-") else ()
    return [part for file in files for part in ("--config", file)] + list(words[len(files) :])


EXCLUSIVE = {
    "--data.validation": ("--data.validation_fraction", "0"),
    "--data.validation_fraction": ("--data.validation", "null"),
}
"""Option -> the one that it replaces in a file, with the value that means none."""


def with_replacements(words: Sequence[str]) -> list[str]:
    """The options with nothing in the place of what they exclude, so that a file may have it."""
    named = {}
    for word, following in itertools.zip_longest(words, words[1:], fillvalue=""):
        name, equals, value = word.partition("=")
        named[name] = value if equals else following
    nothing = dict(EXCLUSIVE.values())
    replaced = [
        other
        for name, other in EXCLUSIVE.items()
        if named.get(name, nothing[name]) != nothing[name] and other[0] not in named
    ]
    return [*words, *(word for pair in replaced for word in pair)]


def help_text(command: str, topic: str) -> str:
    """The help of a command; of all keys of Lightning's trainer with ``--help.trainer``."""
    parser = argparse.ArgumentParser(
        usage=f"mtp {command} --config F [--config G ...] [--ckpt_path C] [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"examples:\n{EXAMPLES[command]}",
        epilog="Keys can be set in a YAML file and on the command line, which comes last. The keys of a class:\n"
        "mtp fit --model.sampler_head.help GRUSamplerHead. All keys of Lightning's trainer: --help.trainer.",
        add_help=False,
    )
    if topic != "--help.trainer":
        options = parser.add_argument_group("options")
        for name, text in {**COMMON, **OPTIONS[command]}.items():
            if text:
                options.add_argument(f"--{name}", metavar="", help=text)
        if command == "predict":
            _add_decoding(parser)
    for group in ("trainer",) if topic == "--help.trainer" else ("model", "model.lora", "data"):
        _add_keys(parser.add_argument_group(group), group)
    if topic != "--help.trainer":
        _add_keys(parser.add_argument_group("trainer (Lightning's; the others: --help.trainer)"), "trainer", USUAL)
    return parser.format_help()


USUAL = (
    *("max_steps", "max_epochs", "accelerator", "devices", "precision", "val_check_interval", "accumulate_grad_batches"),
    *("gradient_clip_val", "default_root_dir"),
)
"""Keys of Lightning's trainer that a first run may need."""


def _add_keys(group: Any, name: str, only: Sequence[str] = ()) -> None:
    for key, (kind, default, text) in keys_of(name).items():
        if only and key not in only:
            continue
        shown = "(required)" if default is None else "" if default == "None" else f"(default: {default.strip(chr(39))})"
        first = text.split(". ")[0] if only else text
        kind = kind.replace(" | ", "|") if len(kind) < 30 else ""
        described = f"{first} {shown if len(shown) < 40 else ''}".replace("%", "%%")
        group.add_argument(f"--{name}.{key}", metavar=kind, help=described)


def _add_decoding(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("decoding (explained in mtp generate --help)")
    for field in fields(DecodingArguments):
        group.add_argument(f"--{field.name}", metavar="", help=f"(default: {field.default})".replace("%", "%%"))


def check_words(command: str, words: Sequence[str]) -> None:
    """Refuse an unknown option, and an unknown key in a configuration file, with the known one that is nearest."""
    own = {
        *COMMON,
        *OPTIONS[command],
        *({field.name for field in fields(DecodingArguments)} if command == "predict" else ()),
    }
    for at, word in enumerate(words):
        name, _, value = word.partition("=")
        if name in ("-c", "--config"):
            file = value or (words[at + 1] if at + 1 < len(words) else "")
            _check_file(file)
        if name.startswith("--") and name != "--":
            parts = [part.rstrip("+") for part in name[2:].split(".")]
            if parts[0] in own or _is_key(parts):
                continue
            known = [*own, *(f"{group}.{key}" for group in CLASSES for key in keys_of(group))]
            raise UsageError(f"unknown option {name}{_nearest('.'.join(parts), known, '--')}")


def _is_key(parts: Sequence[str]) -> bool:
    """True for the name of a group or of a key in it; what is below a key is for its class to say."""
    if parts[0] not in CLASSES or (len(parts) > 1 and parts[1] not in keys_of(parts[0])):
        return False
    return len(parts) < 3 or parts[:2] != ["model", "lora"] or parts[2] in keys_of("model.lora") or parts[2] == "help"


def _check_file(path: str) -> None:
    content = read_configuration(path)
    for group in CLASSES:
        below: Any = content
        for name in group.split("."):
            below = below.get(name) if isinstance(below, Mapping) else None
        for key in below if isinstance(below, Mapping) else ():
            if str(key).rstrip("+") not in keys_of(group):
                nearest = _nearest(f"{group}.{key}", [f"{group}.{name}" for name in keys_of(group)])
                raise UsageError(f"configuration file {path!r}: unknown key {group}.{key}{nearest}")


_NAMED = re.compile(r"(?:class_path '|no class |Import path |Option ')([\w.]+)")
"""What the parser's messages on a class or one of its arguments name."""
_WRONG_VALUE = re.compile(r"([\w.]+): (.* got (.+))")
"""Its messages on the value of a class's argument."""


def with_full_key(message: str, words: Sequence[str], classes: Iterable[str]) -> str:
    """The parser's message on a class below a key, with the whole key where files or options name it there.

    ``model.losses: ...`` becomes ``model.losses.mine.class_path: ...``; of ``classes`` the one with a similar name is added.
    """
    key, _, reason = message.partition(": ")
    named, wrong = _NAMED.search(reason), _WRONG_VALUE.fullmatch(reason)
    if named is None and wrong is None:
        return message
    given = list[tuple[str, Any]]()
    for word, following in itertools.zip_longest(words, words[1:], fillvalue=""):
        option, equals, value = word.partition("=")
        value = value if equals else following
        given += _leaves("", read_configuration(value)) if option in ("-c", "--config") else [(option[2:], value)]
    given = [(at, value) for at, value in given if at.startswith(f"{key}.")]
    if named is None:
        assert wrong is not None
        whole = [at for at, value in given if at.endswith(f".{wrong[1]}") and str(value) == wrong[3]]
        return f"{whole[-1]}: {wrong[2]}" if whole else message
    name = named[1]
    whole = [at for at, value in given if value == name or at.endswith(f".{name}")]
    near = _nearest(name.rpartition(".")[2], classes) if "Option" not in reason and "subclass" not in reason else ""
    return f"{whole[-1] if whole else key}: {reason}{near.rstrip('.')}"


def _leaves(key: str, value: Any) -> Iterable[tuple[str, Any]]:
    """The single values in nested settings, with their keys; parts of a list have their numbers."""
    parts = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    if parts is None:
        yield key, value
    for name, part in parts or ():
        yield from _leaves(f"{key}.{name}".strip(".+"), part)


def _nearest(name: str, known: Iterable[str], dashes: str = "") -> str:
    near = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {dashes}{near[0]}?" if near else "."
