# SPDX-License-Identifier: Apache-2.0
"""Answers from a server: a small one in the test that fails as servers do."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from command_line import error_of, mtp, save_base, write_rows
from distill_rows import questions, read
from toy_tokenizers import word_tokenizer

from mtp_lightning.data.encoding import encode_row
from mtp_lightning.data.preparing import prepare
from mtp_lightning.distill import endpoint as endpoint_file
from mtp_lightning.distill.base_answers import AnswerOptions
from mtp_lightning.distill.endpoint import Endpoint, EndpointOptions, Question, Reply
from mtp_lightning.errors import RunError, UsageError


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    save_base(folder, "llama", word_tokenizer(bos=False), torch.float32, eos_token_id=4)
    return str(folder)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_file, "MAX_BACKOFF", 0.02)


def usual(path: str, body: dict) -> dict:
    """What a server answers: the question's last word, and its own limit."""
    chat = path.endswith("/chat/completions")
    text = body["messages"][-1]["content"] if chat else body["prompt"]
    choice = {"message": {"role": "assistant", "content": f"{text} six"}} if chat else {"text": f"{text} six"}
    return {"choices": [choice | {"index": 0, "finish_reason": "stop"}]}


class Server:
    """An HTTP server in a thread. ``behave(number of the request, handler)`` may answer itself and say True.

    Attributes:
        requests: path and body of each request.
        most: most requests that were under way at once.
    """

    def __init__(self, behave: Callable[[int, BaseHTTPRequestHandler], bool] = lambda n, h: False, reply=usual) -> None:
        self.requests: list[tuple[str, dict, dict]] = []
        self.most = self._now = 0
        lock, server = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.requests.append((self.path, body, dict(self.headers)))
                    number = len(server.requests)
                    server._now += 1
                    server.most = max(server.most, server._now)
                try:
                    if not behave(number, self):
                        say(self, 200, json.dumps(reply(self.path, body)).encode())
                finally:
                    with lock:
                        server._now -= 1

            def log_message(self, *arguments: object) -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def say(handler: BaseHTTPRequestHandler, status: int, data: bytes, headers: dict | None = None) -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(data)


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(*arguments: object, **options: object) -> Server:
        servers.append(Server(*arguments, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def words(base: str, folder: Path, server: str, **options: object) -> list[str]:
    named = {"prompts": folder / "q.jsonl", "output": folder / "a.jsonl", "endpoint": server} | options
    return [base, *(str(word) for name, value in named.items() for word in (f"--{name}", value))]


def test_rows_of_a_server(tmp_path: Path, base: str, serve, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "q.jsonl", questions(6))
    monkeypatch.setenv("MTP_API_KEY", "secret")
    server = serve()
    options = {"max_new_tokens": 7, "temperature": 0.5, "top_p": 0.9, "endpoint_model": "name"}
    assert mtp("distill", *words(base, tmp_path, server.url, **options)) == 0
    rows = {row["id"]: row for row in read(tmp_path / "a.jsonl")}
    assert set(rows) == {0, "q1", 2, "q3", 4, "q5"}
    tokenizer = word_tokenizer(bos=False)
    for row in rows.values():
        text = row["messages"][0]["content"] if "messages" in row else row["prompt"]
        assert row["completion"] == f"{text} six" and row["finish_reason"] == "stop"
        # Without token ids from the server: those of the texts, and the end of a turn (<|im_end|>, 4) or of a text (2).
        assert row["completion_ids"] == tokenizer(f"{text} six")["input_ids"] + [4 if "messages" in row else 2]
        seen = encode_row({"messages": row["messages"]} if "messages" in row else {"text": row["prompt"]}, tokenizer)
        assert row["prompt_ids"] == seen.input_ids[: len(row["prompt_ids"])]
    for path, body, headers in server.requests:
        assert headers["Authorization"] == "Bearer secret"
        name = next(name for name, row in rows.items() if body["seed"] == row["seed"])
        kind = {"messages": rows[name]["messages"][:1]} if "messages" in rows[name] else {"prompt": rows[name]["prompt"]}
        assert path == f"/v1/{'chat/' if 'messages' in kind else ''}completions"
        fixed = {"model": "name", "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "stream": False}
        assert body == fixed | kind | {"seed": AnswerOptions().row_seed(name)}
    prepared = prepare(str(tmp_path / "a.jsonl"), tokenizer, max_length=64)[0]
    assert prepared.rows.row(0).input_ids.tolist()[-1] in (2, 4) and prepared.report.rows_read == 6


def test_an_answer_cut_at_the_limit_has_no_end_token(tmp_path: Path, base: str, serve) -> None:
    def cut(path: str, body: dict) -> dict:
        answer = usual(path, body)
        answer["choices"][0]["finish_reason"] = "length"
        return answer

    write_rows(tmp_path / "q.jsonl", questions(2))
    assert mtp("distill", *words(base, tmp_path, serve(reply=cut).url)) == 0
    assert [(row["finish_reason"], row["completion_ids"][-1]) for row in read(tmp_path / "a.jsonl")] == [("length", 14)] * 2


def test_token_ids_of_the_server_are_taken(tmp_path: Path, base: str, serve) -> None:
    def with_ids(path: str, body: dict) -> dict:
        assert body["return_token_ids"] is True
        answer = usual(path, body)
        answer["choices"][0]["token_ids"] = [9, 9, 4]
        if path.endswith("chat/completions"):
            answer["prompt_token_ids"] = [3, 7]
        else:
            answer["choices"][0]["prompt_token_ids"] = [3, 8]
        return answer

    write_rows(tmp_path / "q.jsonl", questions(2))
    assert mtp("distill", *words(base, tmp_path, serve(reply=with_ids).url, token_ids="true")) == 0
    found = {row["id"]: (row["prompt_ids"], row["completion_ids"]) for row in read(tmp_path / "a.jsonl")}
    assert found == {0: ([3, 7], [9, 9, 4]), "q1": ([3, 8], [9, 9, 4])}


def failing(number: int, handler: BaseHTTPRequestHandler) -> bool:
    """Two of three requests fail, in ten ways."""
    if number % 3 == 0:
        return False
    kind = number % 10
    if kind in (0, 1, 2, 3):
        say(handler, (500, 429, 503, 408)[kind], b'{"error": "busy"}', {"Retry-After": ("0.001", "soon")[kind % 2]})
    elif kind in (4, 5):
        handler.connection.shutdown(socket.SHUT_RDWR)  # before an answer
        handler.close_connection = True
    elif kind == 6:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{")  # in the middle of one
        handler.close_connection = True
    elif kind == 7:
        say(handler, 200, b"<html>no JSON</html>")
    elif kind == 8:
        say(handler, 200, b"[]")
    else:
        time.sleep(0.4)  # past the timeout
    return True


def test_a_server_that_fails_most_of_the_time(tmp_path: Path, base: str, serve) -> None:
    write_rows(tmp_path / "q.jsonl", questions(30))
    server = serve(failing)
    assert mtp("distill", *words(base, tmp_path, server.url, concurrency=4, retries=40, timeout=0.2)) == 0
    rows = read(tmp_path / "a.jsonl")
    assert len(rows) == 30 == len({row["id"] for row in rows}) and len(server.requests) > 60
    assert all(row["completion"].endswith(" six") for row in rows)


def test_concurrency(tmp_path: Path, base: str, serve) -> None:
    write_rows(tmp_path / "q.jsonl", questions(24))
    server = serve(lambda number, handler: time.sleep(0.02))
    assert mtp("distill", *words(base, tmp_path, server.url, concurrency=3)) == 0
    assert server.most == 3 and len(server.requests) == 24


def test_giving_up_keeps_what_was_answered(tmp_path: Path, base: str, serve, capsys) -> None:
    write_rows(tmp_path / "q.jsonl", questions(8))

    def down_after_five(number: int, handler: BaseHTTPRequestHandler) -> bool:
        if number > 5:
            say(handler, 500, b"out of\nmemory")
        return number > 5

    server = serve(down_after_five)
    message = error_of(capsys, 1, "distill", *words(base, tmp_path, server.url, concurrency=1, retries=2))
    assert message.startswith(f"{server.url}: no answer to row 'q5' after 3 attempts: status 500: out of memory.")
    assert [row["id"] for row in read(tmp_path / "a.jsonl")] == [0, "q1", 2, "q3", 4] and len(server.requests) == 8


def test_a_server_that_refuses(tmp_path: Path, base: str, serve, capsys) -> None:
    write_rows(tmp_path / "q.jsonl", questions(3))

    def refuse(number: int, handler: BaseHTTPRequestHandler) -> bool:
        say(handler, 404, b'{"message": "The model `x` does not exist."}')
        return True

    server = serve(refuse)
    message = error_of(capsys, 1, "distill", *words(base, tmp_path, server.url, endpoint_model="x", concurrency=1))
    assert message.startswith(f"{server.url}/chat/completions: the server refuses row 0 with status 404: ")
    assert "The model `x` does not exist." in message and "--endpoint_model (x)" in message
    assert len(server.requests) == 1  # not a transient failure


def test_an_error_comes_after_what_was_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Endpoint(EndpointOptions("http://localhost:1/v1", concurrency=3), "m", AnswerOptions())
    begun = {name: threading.Event() for name in range(3)}
    threads: dict[int, threading.Thread] = {}

    def ask(question: Question) -> Reply:
        threads[question.row_id] = threading.current_thread()
        begun[question.row_id].set()
        assert begun[1].wait(10) and begun[2].wait(10) and question.row_id < 3  # a fourth is never asked
        if question.row_id:
            threads[question.row_id - 1].join(10)  # in order
        if question.row_id == 1:
            raise RunError("refused")
        return Reply(question.row_id, "one", True, None, None)

    monkeypatch.setattr(server, "ask", ask)
    replies = server.replies(Question(name, "one", 3) for name in range(3))
    assert next(replies).row_id == 0
    threads[2].join(10)
    assert next(replies).row_id == 2
    with pytest.raises(RunError, match="refused"):
        next(replies)
    assert all(thread.daemon for thread in threads.values())  # pending requests do not keep the process alive


def test_a_server_of_another_kind(serve) -> None:
    server = Endpoint(EndpointOptions(serve(reply=lambda path, body: {"ok": True}).url), "m", AnswerOptions())
    with pytest.raises(RunError, match=r'completions: expected choices with finish_reason, got {"ok": true}.'):
        server.ask(Question(1, "one", 3))


def test_no_server_answers() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Endpoint(EndpointOptions(f"http://127.0.0.1:{port}/v1", retries=1), "m", AnswerOptions())
    with pytest.raises(RunError, match="row 1 after 2 attempts: .*[Cc]onnection refused"):
        server.ask(Question(1, "one", 3))


@pytest.mark.parametrize("options", [{"concurrency": 0}, {"retries": -1}, {"timeout": 0}, {"endpoint": "localhost:8000"}])
def test_wrong_options(options: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        EndpointOptions(**{"endpoint": "http://localhost:1/v1", **options})
