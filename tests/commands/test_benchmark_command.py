# SPDX-License-Identifier: Apache-2.0
"""``mtp benchmark`` on the command line, of a model and of servers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from command_line import error_of, mtp
from tiny_run import LAST

from mtp_lightning.evaluation.benchmark_report import markdown
from mtp_lightning.evaluation.transformers_systems import GENERATE, LOOKUP
from mtp_lightning.model import MTPModel

SHARED = ["--prompts", "prompts.jsonl", "--max_new_tokens", 8, "--dtype", "float64"]


def test_the_command(run: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["benchmark", LAST, *SHARED]
    assert mtp(*words) == 0
    out, err = capsys.readouterr()
    report = json.loads(Path("benchmark/benchmark.json").read_text())
    assert {path.name for path in Path("benchmark").iterdir()} == {"benchmark.json", "benchmark.md", "benchmark.png"}
    assert Path("benchmark/benchmark.md").read_text() == markdown(report)
    assert max(map(len, out.splitlines())) <= 80 and "plain" in out and "texts: 8 of 8" in err
    assert [figures["num_masks"] for figures in report["settings"]] == [2, 3, "auto"]
    assert all(f["overall"]["lossless"] == {"equal": 2, "checked": 2, "differences": []} for f in report["settings"])
    assert all(f["overall"]["speed_up"]["num_pairs"] == 2 for f in report["settings"])
    # A folder's benchmark is not replaced by accident.
    before = Path("benchmark/benchmark.json").read_bytes()
    assert "--overwrite" in error_of(capsys, 2, *words)
    assert Path("benchmark/benchmark.json").read_bytes() == before
    options = ["--decoding", "linear", "--sampler_head", "false", "--num_masks", 2, "--batch_size", 2]
    assert mtp(*words, *options, "--json", "--num_prompts", 2, "--overwrite") == 0
    (setting,) = json.loads(capsys.readouterr().out)["settings"]
    assert (setting["decoding"], setting["sampler_head"], setting["num_masks"]) == ("linear", False, 2)


def test_the_grid(run: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mtp("benchmark", LAST, *SHARED, "--max_new_tokens", 3, "--grid", "--num_prompts", 1, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    *ours, generate, lookup = report["settings"]
    assert [(e["decoding"], e["sampler_head"], e["num_masks"]) for e in ours] == [
        (decoding, head, masks)
        for decoding in ("quadratic", "linear")
        for head in (True, False)
        for masks in (1, 2, 3, "auto")
    ]
    assert [generate["name"], lookup["name"]] == [GENERATE, LOOKUP]
    assert all(figures["overall"]["lossless"]["equal"] == 1 for figures in report["settings"])
    assert len(report["order"]["quadratic is below linear: base head"]) == 3


@pytest.mark.parametrize(
    ("options", "code", "named"),
    [
        ("", 2, ["prompts"]),
        ("--prompts prompts.jsonl --batch_size 0", 2, ["batch_size", "got 0"]),
        ("--prompts prompts.jsonl --decoding autoregressive", 2, ["autoregressive"]),
        ("--prompts prompts.jsonl --baseline_endpoint http://localhost:1/v1", 2, ["--endpoint"]),
        ("--prompts prompts.jsonl --endpoint http://localhost:1/v1", 1, ["http://localhost:1/v1"]),
        ("--prompts long.txt --raw", 1, ["long.txt, line 2", "100 tokens", "96"]),
        ("--prompts prompts.jsonl --output config.yaml", 1, ["config.yaml", "not a folder"]),
    ],
)
def test_wrong_command_lines(run: Path, here: Path, capsys, options: str, code: int, named: list[str]) -> None:
    Path("long.txt").write_text("one\n" + "one " * 99 + "\n")
    message = error_of(capsys, code, "benchmark", LAST, *options.split())
    assert all(name in message for name in named), message
    assert not Path("benchmark").exists()


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Starts a server that answers with a model's own text and vLLM's fields; returns its address."""
    servers = []

    def start(model: MTPModel, accepted_per_text: int | None, cut: int | None = None) -> str:
        class Handler(BaseHTTPRequestHandler):
            accepted = 0

            def say(self, text: str) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "application/json" if text.startswith("{") else "text/plain")
                self.end_headers()
                self.wfile.write(text.encode())

            def do_GET(self) -> None:
                if self.path == "/v1/models":
                    self.say(json.dumps({"object": "list", "data": [{"id": "served", "object": "model"}]}))
                elif accepted_per_text is None:
                    self.send_error(404)
                else:
                    name = "vllm:spec_decode_num_accepted_tokens_total"
                    self.say(f'# TYPE {name} counter\n{name}{{engine="0"}} {float(Handler.accepted)}\n')

            def do_POST(self) -> None:
                body: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert body["model"] == "served" and body["return_token_ids"]
                import torch

                ids = torch.tensor([body["prompt"]])
                text = model.generate(ids, max_new_tokens=body["max_tokens"], num_masks=2).sequences[0, ids.shape[1] :]
                Handler.accepted += accepted_per_text or 0
                choice = {"index": 0, "text": "", "finish_reason": "length", "token_ids": text.tolist()[:cut]}
                self.say(
                    json.dumps({"id": "1", "object": "text_completion", "created": 0, "model": "", "choices": [choice]})
                )

            def log_message(self, *arguments: object) -> None:
                """Nothing."""

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/v1"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_servers(run: Path, here: Path, serve: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    model = MTPModel.from_pretrained(LAST, dtype="float64")
    plain, ours, cut = serve(model, None), serve(model, 4), serve(model, 0, cut=5)
    words = ["benchmark", LAST, *SHARED, "--json", "--overwrite", "--endpoint"]
    assert mtp(*words, ours, "--baseline_endpoint", plain, "--batch_size", 2) == 0
    report = json.loads(capsys.readouterr().out)
    (server,) = report["settings"]
    assert report["endpoints"]["server"] == {"url": ours, "model": "served"}
    assert server["overall"]["acceptance_length"] == 2.0 and report["plain"]["overall"]["acceptance_length"] is None
    assert server["overall"]["lossless"]["equal"] == 2 and server["overall"]["speed_up"]["num_pairs"] == 2  # domains
    assert mtp(*words, cut, "--baseline_endpoint", plain) == 0
    lossless = json.loads(capsys.readouterr().out)["settings"][0]["overall"]["lossless"]
    assert [difference["position"] for difference in lossless["differences"]] == [5, 5]
    assert mtp(*words, cut, "--baseline_endpoint", plain, "--temperature", 1, "--seed", 0) == 0
    lossless = json.loads(capsys.readouterr().out)["settings"][0]["overall"]["lossless"]
    assert lossless["checked"] == 0  # servers draw as they like
    assert mtp(*words, ours) == 0  # alone
    assert json.loads(capsys.readouterr().out)["plain"] is None
