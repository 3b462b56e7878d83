# SPDX-License-Identifier: Apache-2.0
"""Starts `mtp serve`, asks for a text and a streamed one, runs `mtp benchmark --endpoint`, and ends the server with Ctrl-C.

python benchmarks/vllm/server.py SAVED_FOLDER
"""

from __future__ import annotations

import argparse
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from engines import base_of, demo_prompts

FLAGS = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "8"]
FLAGS += ["--gpu-memory-utilization", "0.3", "--host", "127.0.0.1"]
FLAGS += ["--load_table", '[[8, "quadratic", 2]]']  # the default one may be plain


def ask(address: str, data: dict[str, Any] | None = None) -> str:
    body = None if data is None else json.dumps(data).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(answer.read().decode())


def wait_until_up(server: subprocess.Popen[str], address: str) -> None:
    for _ in range(600):
        if server.poll() is not None:
            sys.exit(f"FAIL the server ended with {server.returncode}")
        try:
            ask(address + "/health")
            return
        except OSError:
            time.sleep(1)
    sys.exit("FAIL the server is not up after 10 minutes")


def benchmark(folder: str, address: str) -> str:
    """What `mtp benchmark` prints about the running server."""
    command = [sys.executable, "-m", "mtp_lightning", "benchmark", folder, "--endpoint", address + "/v1"]
    with tempfile.TemporaryDirectory() as temporary:
        prompts = Path(temporary, "prompts.jsonl")
        prompts.write_text("".join(json.dumps({"prompt": text, "raw": True}) + "\n" for text in demo_prompts(3)))
        command += ["--prompts", str(prompts), "--max_new_tokens", "24", "--output", temporary + "/figures"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        sys.exit(f"FAIL mtp benchmark --endpoint: {done.stderr[-500:]}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    folder = parser.parse_args().folder
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mtp_lightning", "serve", folder, "--port", str(port), *FLAGS]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_until_up(server, address)
        query = {"model": base_of(folder), "prompt": demo_prompts(1)[0], "max_tokens": 48, "temperature": 0}
        whole = json.loads(ask(address + "/v1/completions", query))["choices"][0]["text"]
        lines = ask(address + "/v1/completions", query | {"stream": True}).splitlines()
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        streamed = "".join(event["choices"][0]["text"] for event in events)
        table = benchmark(folder, address)
    finally:
        server.send_signal(signal.SIGINT)
        output, _ = server.communicate(timeout=60)
    print(table)
    last = [line for line in output.splitlines() if line.startswith("mtp serve:")]
    ok = whole == streamed and len(events) > 1 and bool(last) and "tokens a step" in last[0] and server.returncode == 0
    print(
        f"{'ok  ' if ok else 'FAIL'} server: streamed text in {len(events)} events"
        f" {'equals' if whole == streamed else 'differs from'} the whole one; at the end: {last}"
    )
    sys.exit(not ok)


if __name__ == "__main__":
    main()
