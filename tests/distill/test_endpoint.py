# SPDX-License-Identifier: Apache-2.0
"""Answers from a server: a small one in the test that fails as servers do."""

from __future__ import annotations

import json
import socket
import sys
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
from mtp_lightning.distill.endpoint import Endpoint, Question, Reply, Unanswered
from mtp_lightning.distill.options import AnswerOptions, EndpointOptions
from mtp_lightning.errors import RunError


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    save_base(folder, "llama", word_tokenizer(bos=False), torch.float32, eos_token_id=4)
    return str(folder)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.02)


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
        assert headers["authorization"] == "Bearer secret"
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


def test_token_ids_that_are_none_are_left_out(tmp_path: Path, base: str, serve) -> None:
    wrong = [{field: ids} for field in ("token_ids", "prompt_token_ids") for ids in (["a"], [9, 17], [-1], [True], [9.0], 9)]

    def with_ids(path: str, body: dict) -> dict:
        answer = usual(path, body)
        answer["choices"][0] |= [*wrong, {"token_ids": []}][int(body["prompt"].split()[1])]
        return answer

    write_rows(tmp_path / "q.jsonl", [{"prompt": f"one {number}", "raw": True} for number in range(len(wrong) + 1)])
    assert mtp("distill", *words(base, tmp_path, serve(reply=with_ids).url, token_ids="true")) == 0
    (row,) = read(tmp_path / "a.jsonl")
    assert row["id"] == len(wrong) + 1 and row["completion_ids"] == [9, 0, 14, 2]  # of the text


def test_an_end_in_the_text_is_not_doubled(tmp_path: Path, base: str, serve) -> None:
    def ended(path: str, body: dict) -> dict:
        answer = usual(path, body)
        if path.endswith("chat/completions"):
            answer["choices"][0]["message"]["content"] = "six<|im_end|>"
        else:
            answer["choices"][0]["text"] = " six<eos>"
        return answer

    write_rows(tmp_path / "q.jsonl", questions(2))
    assert mtp("distill", *words(base, tmp_path, serve(reply=ended).url)) == 0
    assert {row["id"]: row["completion_ids"] for row in read(tmp_path / "a.jsonl")} == {0: [14, 4], "q1": [14, 2]}


def failing(number: int, handler: BaseHTTPRequestHandler) -> bool:
    """Two of three requests fail, in seven ways that pass."""
    if number % 3 == 0:
        return False
    kind = number % 7
    if kind in (0, 1, 2, 3):
        say(handler, (500, 429, 503, 408)[kind], b'{"error": "busy"}', {"Retry-After": ("0.001", "soon")[kind % 2]})
    elif kind == 4:
        handler.connection.shutdown(socket.SHUT_RDWR)  # before an answer
        handler.close_connection = True
    elif kind == 5:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{")  # in the middle of one
        handler.close_connection = True
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


def test_the_server_says_when_to_ask_again(serve) -> None:
    times: list[float] = []

    def busy_once(number: int, handler: BaseHTTPRequestHandler) -> bool:
        times.append(time.monotonic())
        if number == 1:
            say(handler, 429, b"{}", {"Retry-After": "0.3"})
        return number == 1

    assert isinstance(
        Endpoint(EndpointOptions(serve(busy_once).url), "m", AnswerOptions()).ask(Question(1, "one", 3)), Reply
    )
    assert times[1] - times[0] >= 0.3


def chat_answer(finish_reason: str | None = "stop", **message: object) -> dict:
    return {"choices": [{"message": {"role": "assistant", **message}, "finish_reason": finish_reason}]}


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
UNUSABLE = {
    "null after reasoning": (200, chat_answer(content=None, reasoning_content="one two")),
    "white space": (200, chat_answer(content=" \n")),
    "a cut that left nothing": (200, chat_answer("length", content=None, reasoning="one")),
    "a call": (200, chat_answer("tool_calls", content=None, tool_calls=[CALL])),
    "text and a call": (200, chat_answer(content="one", tool_calls=[CALL])),
    "filtered": (200, chat_answer("content_filter", content="one")),
    "aborted": (200, chat_answer("abort", content="one")),
    "no reason": (200, chat_answer(None, content="one")),
    "half an emoji": (200, chat_answer("length", content="six \ud83d")),
    "nothing but an end": (200, chat_answer(content="<|im_end|>")),
    "error": (200, {"error": {"message": "one"}}),
    "no choice": (200, {"choices": []}),
    "null choices": (200, {"choices": None}),
    "a list": (200, []),
    "a number": (200, 1),
    "too long": (400, {"error": {"message": "the prompt has 70000 tokens"}}),
    "too large": (413, {}),
    "wrong field": (422, {}),
    "moderated": (403, {}),
}


def test_rows_without_a_usable_answer_are_left_out_and_counted(tmp_path: Path, base: str, serve, capsys) -> None:
    rows = [{"id": name, "messages": [{"role": "user", "content": f"two {name}"}]} for name in ["first", *UNUSABLE, "last"]]
    write_rows(tmp_path / "q.jsonl", rows)

    def behave(number: int, handler: BaseHTTPRequestHandler) -> bool:
        name = server.requests[number - 1][1]["messages"][-1]["content"].removeprefix("two ")
        if name in UNUSABLE:
            status, answer = UNUSABLE[name]
            say(handler, status, json.dumps(answer).encode())
        return name in UNUSABLE

    server = serve(behave)
    assert mtp("distill", *words(base, tmp_path, server.url, concurrency=1)) == 0
    assert [row["id"] for row in read(tmp_path / "a.jsonl")] == ["first", "last"]
    shown = capsys.readouterr().err
    assert len(server.requests) == len(rows)  # none of this passes
    assert f"{len(UNUSABLE)} rows left out" in shown and "4 refused" in shown and "4 empty" in shown
    assert "1 not UTF-8" in shown and "1 no finish_reason" in shown
    assert mtp("distill", *words(base, tmp_path, server.url, concurrency=1)) == 0  # asked again, but not the empty
    assert len(read(tmp_path / "a.jsonl")) == 2 and len(server.requests) == 2 * len(rows) - 2 - 4


@pytest.mark.parametrize(("data", "said"), [(b"<html>\xff</html>", "<html>"), (b"", "empty")])
def test_a_page_in_place_of_an_answer_is_left_out(serve, data: bytes, said: str) -> None:
    def page(number: int, handler: BaseHTTPRequestHandler) -> bool:
        say(handler, 200, data, {"Content-Type": "text/html"})
        return True

    reply = Endpoint(EndpointOptions(serve(page).url), "m", AnswerOptions()).ask(Question(1, "one", 3))
    assert isinstance(reply, Unanswered) and said in reply.detail


def test_tools_and_parts_reach_the_server(tmp_path: Path, base: str, serve) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    parts = [{"type": "text", "text": "one"}]
    rows = [
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "x"}], "tools": json.dumps(tools)}
    ]
    write_rows(tmp_path / "q.jsonl", rows)
    server = serve()
    assert mtp("distill", *words(base, tmp_path, server.url)) == 0
    (_, body, _), (row,) = server.requests[0], read(tmp_path / "a.jsonl")
    assert body["tools"] == tools == row["tools"] and body["messages"] == [{"role": "user", "content": "one"}]
    assert row["messages"] == [*body["messages"], {"role": "assistant", "content": "one six"}]


def test_a_prompt_that_cannot_be_sent_is_left_out(serve) -> None:
    question = Question(1, [{"role": "user", "content": "one", "name": "\ud83d"}], 3)
    assert isinstance(Endpoint(EndpointOptions(serve().url), "m", AnswerOptions()).ask(question), Unanswered)


def test_no_proxy_is_asked_for_this_machine(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    url = serve().url
    for address in (url, url.replace("127.0.0.1", "localhost")):
        reply = Endpoint(EndpointOptions(address, retries=0), "m", AnswerOptions()).ask(Question(1, "one", 3))
        assert isinstance(reply, Reply) and reply.text == "one six"


def test_concurrency(tmp_path: Path, base: str, serve) -> None:
    write_rows(tmp_path / "q.jsonl", questions(24))
    server = serve(lambda number, handler: time.sleep(0.02))
    assert mtp("distill", *words(base, tmp_path, server.url, concurrency=3)) == 0
    assert server.most == 3 and len(server.requests) == 24


def test_a_server_that_went_down(tmp_path: Path, base: str, serve, capsys) -> None:
    write_rows(tmp_path / "q.jsonl", questions(9))

    def down_after_five(number: int, handler: BaseHTTPRequestHandler) -> bool:
        if number > 5:
            say(handler, 500, b"out of\nmemory")
        return number > 5

    server = serve(down_after_five)
    message = error_of(capsys, 1, "distill", *words(base, tmp_path, server.url, concurrency=1, retries=2))
    assert server.url in message and "status 500: out of memory" in message
    assert [row["id"] for row in read(tmp_path / "a.jsonl")] == [0, "q1", 2, "q3", 4] and len(server.requests) == 5 + 3 * 3


def test_one_question_that_breaks_the_server_is_left_out(tmp_path: Path, base: str, serve, capsys) -> None:
    write_rows(tmp_path / "q.jsonl", [{"prompt": word, "raw": True} for word in ("one", "two", "three")])

    def breaks(number: int, handler: BaseHTTPRequestHandler) -> bool:
        if is_two := server.requests[number - 1][1]["prompt"] == "two":
            say(handler, 500, b"assertion failed")
        return is_two

    server = serve(breaks)
    assert mtp("distill", *words(base, tmp_path, server.url, concurrency=1, retries=1)) == 0
    assert [row["prompt"] for row in read(tmp_path / "a.jsonl")] == ["one", "three"]
    assert "1 no answer (row 2: status 500: assertion failed)" in capsys.readouterr().err


@pytest.mark.parametrize("status", [400, 403])
def test_a_server_that_refuses_everything(tmp_path: Path, base: str, serve, capsys, status: int) -> None:
    write_rows(tmp_path / "q.jsonl", questions(130))

    def refuse(number: int, handler: BaseHTTPRequestHandler) -> bool:
        say(handler, status, b"unknown field top_k")
        return True

    server = serve(refuse)
    assert "unknown field top_k" in error_of(capsys, 1, "distill", *words(base, tmp_path, server.url, concurrency=1))
    assert len(server.requests) == 100 and not (tmp_path / "a.jsonl").exists()
    write_rows(tmp_path / "q.jsonl", questions(2))
    assert "unknown field top_k" in error_of(capsys, 1, "distill", *words(base, tmp_path, server.url, concurrency=1))


def test_a_server_that_refuses(tmp_path: Path, base: str, serve, capsys) -> None:
    write_rows(tmp_path / "q.jsonl", questions(3))

    def refuse(number: int, handler: BaseHTTPRequestHandler) -> bool:
        say(handler, 404, b'{"message": "The model `x` does not exist."}')
        return True

    server = serve(refuse)
    message = error_of(capsys, 1, "distill", *words(base, tmp_path, server.url, endpoint_model="x", concurrency=1))
    assert message.startswith(f"{server.url}: the server refuses row 0 with status 404: ")
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


def test_no_server_answers(tmp_path: Path, base: str, capsys) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Endpoint(EndpointOptions(f"http://127.0.0.1:{port}/v1", retries=1), "m", AnswerOptions())
    reply = server.ask(Question(1, "one", 3))
    assert isinstance(reply, Unanswered) and "refused" in reply.detail


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("concurrency", 0),
        ("retries", -1),
        ("timeout", 0),
        ("endpoint", "localhost:8000"),
        ("top_p", 1.5),
        ("top_p", 0),
        ("temperature", 1e-9),
    ],
)
def test_wrong_options(tmp_path: Path, base: str, capsys, name: str, value: object) -> None:
    options = {"temperature": 1, name: value}
    write_rows(tmp_path / "q.jsonl", questions(1))
    assert name in error_of(capsys, 2, "distill", *words(base, tmp_path, "http://localhost:1/v1", **options))


def test_without_the_openai_package(tmp_path: Path, base: str, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "q.jsonl", questions(1))
    monkeypatch.setitem(sys.modules, "openai", None)
    assert "mtp-lightning[endpoint]" in error_of(capsys, 2, "distill", *words(base, tmp_path, "http://localhost:1/v1"))
