# SPDX-License-Identifier: Apache-2.0
"""The program in processes of its own that start at once: one process imports everything and forks at each request.

A process that has once computed a gradient can't be forked, so this one computes nothing. Helpers of the tests, no tests.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

TESTS = Path(__file__).parent
LONG = (
    "mtp_lightning.commands.lightning_cli",
    "datasets",
    "pandas",
    "peft",
    "matplotlib.backends.backend_agg",
    "matplotlib.font_manager",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.tokenization_auto",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
)
"""What a run imports and takes long to."""
MOST_SECONDS = 240
"""A process that takes longer hangs: processes that wait for each other do so for ever."""


class Ended(NamedTuple):
    """What a process left: its exit code (negative: the signal that ended it) and its output."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The program's one line, which must be the last and come without a traceback."""
        assert "Traceback" not in self.err, self.err
        lines = [line for line in self.err.splitlines() if line.startswith("mtp: error: ")]
        assert len(lines) == 1, self.err
        return lines[0].removeprefix("mtp: error: ")


class Process(NamedTuple):
    """A process that runs ``mtp``."""

    pid: int
    output: Path
    zygote: Zygote

    def wait(self, seconds: int = MOST_SECONDS) -> Ended:
        """Wait for its end; one that takes longer is killed, and fails the test."""
        code = self.zygote.ask({"wait": self.pid, "seconds": seconds})
        assert code is not None, f"no end in {seconds} seconds: {self.output.with_suffix('.err').read_text()[-2000:]}"
        return Ended(code, self.output.with_suffix(".out").read_text(), self.output.with_suffix(".err").read_text())


class Zygote:
    """Starts processes.

    Args:
        cache: folder for encoded data sets.
    """

    def __init__(self, cache: Path) -> None:
        environment = os.environ | {"HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([*sys.path, str(TESTS)])
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.count = 0

    def ask(self, request: dict[str, Any]) -> Any:
        """One request, one answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(
        self, folder: Path, words: Sequence[object], prelude: str = "", environment: Mapping[str, str] | None = None
    ) -> Process:
        """Run ``mtp words`` in ``folder``, after the Python code ``prelude``."""
        self.count += 1
        output = folder / f"process_{self.count}"
        request = {"words": [str(word) for word in words], "folder": str(folder), "output": str(output)}
        return Process(self.ask({**request, "prelude": prelude, "environment": dict(environment or {})}), output, self)

    def run(self, folder: Path, *words: object, prelude: str = "", **environment: str) -> Ended:
        """Run ``mtp words`` to its end."""
        return self.start(folder, words, prelude, environment).wait()

    def ranks(self, folder: Path, *words: Sequence[object], preludes: Sequence[str] = ()) -> list[Process]:
        """One process a rank, each with its own words, as a cluster starts them."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = []
        for rank, each in enumerate(words):
            environment = {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            started.append(self.start(folder, each, preludes[rank] if preludes else "", environment))
        return started

    def close(self) -> None:
        """End."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def _serve() -> None:
    import torch

    torch.set_num_threads(1)
    for name in LONG:
        import_module(name)

    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = _ended(request["wait"], request["seconds"])
        else:
            answer = os.fork()
            if answer == 0:
                _work(request)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _ended(pid: int, seconds: int) -> int | None:
    """A process's exit code, or None where it had to be killed."""
    late = False

    def kill(*_: object) -> None:
        nonlocal late
        late = True
        os.kill(pid, signal.SIGKILL)

    before = signal.signal(signal.SIGALRM, kill)
    signal.alarm(seconds)
    try:
        _, status = os.waitpid(pid, 0)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return None if late else os.waitstatus_to_exitcode(status)


def _work(request: dict[str, Any]) -> None:
    from mtp_lightning.commands.cli import main

    code = 1
    try:
        for number, ending in ((1, ".out"), (2, ".err")):
            file = os.open(request["output"] + ending, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, number)
        os.chdir(request["folder"])
        os.environ.update(request["environment"])
        sys.argv = ["mtp", *request["words"]]
        if request["prelude"]:
            exec(compile(request["prelude"], "prelude", "exec"), {"__name__": "prelude"})
        main(request["words"])
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
