"""A server on loopback that speaks the chat-completions shape and can be told to go wrong."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SYSTEM_MESSAGE = "You are given a riddle and answer it with one word."
PLAN = {"system": SYSTEM_MESSAGE, "topics": ["animals", "food", "tools", "weather"], "personas": ["a child", "a cook"]}


@dataclass
class Reply:
    """What the server sends back."""

    content: str | None = None
    status: int = 200
    finish_reason: str = "stop"
    refusal: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: str | None = None  # instead of a chat completion
    content_type: str = "application/json"
    error: dict[str, Any] | None = None
    usage: tuple[int, int] = (100, 20)  # billed
    tells_usage: bool = True
    drop: bool = False  # billed, but the connection breaks before the reply


@dataclass
class Asked:
    """One request that the server saw."""

    number: int  # of the request, from 0
    cell: int | None  # number of the example from 0; None for the system message
    tries: int  # earlier requests for the same cell
    body: dict[str, Any]
    key: str
    path: str = ""


def good(cell: int) -> Reply:
    """An example that depends on the number of its cell alone."""
    digest = hashlib.sha256(str(cell).encode()).hexdigest()
    words = " ".join(digest[start : start + 4] for start in range(0, 32, 4))  # unlike those of all other cells
    row = {"instruction": f"Solve {words}.", "input": f"riddle {cell} 谜语", "output": f"answer {digest[:8]}"}
    return Reply(json.dumps(row, ensure_ascii=False))


Script = Callable[[Asked], "Reply | None"]


class FakeServer:
    """Answers every request with a good example, except where `script` returns something else."""

    def __init__(self, script: Script | None = None, delay: float = 0.0) -> None:
        self.script, self.delay = script, delay
        self.asked: list[Asked] = []
        self.answered: list[int | None] = []  # cells of complete chat completions: what a provider would bill
        self.billed = [0, 0]  # tokens of prompts and replies
        self.batches: FakeBatches | None = None
        self.most_at_once = self._now = 0
        self._lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                sent = self.rfile.read(int(self.headers["Content-Length"]))
                if "/chat/completions" in self.path:
                    owner._answer(self, json.loads(sent))
                else:
                    owner._other(self, sent)

            def do_GET(self) -> None:
                owner._other(self, b"")

            def log_message(self, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # the client was killed

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> FakeServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        found = re.search(r"example number (\d+)", body["messages"][-1]["content"])
        cell = int(found.group(1)) - 1 if found else None
        with self._lock:
            tries = sum(asked.cell == cell for asked in self.asked)
            key = handler.headers.get("api-key") or handler.headers.get("Authorization", "").removeprefix("Bearer ")
            asked = Asked(len(self.asked), cell, tries, body, key, handler.path)
            self.asked.append(asked)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        time.sleep(self.delay)
        reply = (self.script and self.script(asked)) or (Reply(json.dumps(PLAN)) if cell is None else good(cell))
        with self._lock:
            self._now -= 1
            if reply.status == 200 and reply.body is None:
                self.answered.append(cell)
                self.billed = [total + count for total, count in zip(self.billed, reply.usage, strict=True)]
        if reply.drop:
            handler.close_connection = True
            return
        text = reply.body if reply.body is not None else json.dumps(self._completion(reply, body))
        data = text.encode()
        handler.send_response(reply.status)
        for name, value in {"Content-Type": reply.content_type, **reply.headers}.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def _other(self, handler: BaseHTTPRequestHandler, sent: bytes) -> None:
        found = self.batches and self.batches.answer(handler.command, handler.path.partition("?")[0], sent)
        if not found:
            status, data = 404, b'{"error": {"message": "Not Found"}}'
        else:
            status, data = found[0], found[1] if isinstance(found[1], bytes) else json.dumps(found[1]).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    @staticmethod
    def _completion(reply: Reply, body: dict[str, Any]) -> dict[str, Any]:
        if reply.status != 200:
            return {"error": reply.error or {"message": "scripted", "type": "scripted", "code": None, "param": None}}
        message = {"role": "assistant", "content": reply.content, "refusal": reply.refusal}
        return {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": reply.finish_reason, "logprobs": None}],
            "usage": _usage(*reply.usage) if reply.tells_usage else None,
        }


def _usage(tokens_in: int, tokens_out: int) -> dict[str, int]:
    return {"prompt_tokens": tokens_in, "completion_tokens": tokens_out, "total_tokens": tokens_in + tokens_out}


@dataclass
class FakeBatches:
    """The files and batches of OpenAI's API, as far as `tunewright datagen` uses them."""

    status: str = "in_progress"
    answers: Callable[[int, int], bool] = lambda batch, cell: True  # whether a batch answers a cell before it ends
    reply: Callable[[int], Reply] = good
    spoil: Callable[[str], str] = str  # changes the text of the results
    files: dict[str, str] = field(default_factory=dict)
    made: list[dict[str, Any]] = field(default_factory=list)
    asked: list[list[int]] = field(default_factory=list)  # cells of each batch
    fail_create: int = 0  # HTTP status
    lose_create: bool = False  # the batch is made, and the answer is an error

    def answer(self, method: str, path: str, sent: bytes) -> tuple[int, Any] | None:
        parts = path.removeprefix("/v1/").split("/")
        if (method, parts) == ("POST", ["files"]):
            content = re.search(rb"(\{.*\})\r\n--", sent, re.DOTALL)
            assert content
            name = f"file-{len(self.files)}"
            self.files[name] = content.group(1).decode()
            return 200, {"id": name, "object": "file", "bytes": 1, "created_at": 1, "filename": "x", "purpose": "batch"}
        if method == "GET" and parts[0] == "files":
            return 200, self.files[parts[1]].encode()
        if (method, parts) == ("POST", ["batches"]):
            return self._create(json.loads(sent))
        if (method, parts) == ("GET", ["batches"]):
            return 200, {"object": "list", "data": self.made[::-1], "has_more": False}
        if method == "GET" and parts[0] == "batches":
            return 200, self._end(int(parts[1].removeprefix("batch_")))
        return None

    def _create(self, wanted: dict[str, Any]) -> tuple[int, Any]:
        if self.fail_create:
            return self.fail_create, {"error": {"message": "no"}}
        cells = [self._cell(json.loads(line)) for line in self.files[wanted["input_file_id"]].splitlines()]
        self.asked.append(cells)
        batch = {"id": f"batch_{len(self.made)}", "object": "batch", "created_at": 1, "status": "in_progress", **wanted}
        self.made.append(batch)
        return (500, {"error": {"message": "broken"}}) if self.lose_create else (200, batch)

    @staticmethod
    def _cell(line: dict[str, Any]) -> int:
        found = re.search(r"example number (\d+)", line["body"]["messages"][-1]["content"])
        assert found
        return int(found.group(1)) - 1

    def _end(self, number: int) -> dict[str, Any]:
        batch = self.made[number]
        batch["status"] = self.status
        if self.status in ("completed", "expired", "cancelled"):
            results = []
            for text in self.files[batch["input_file_id"]].splitlines():
                line = json.loads(text)
                if self.answers(number, self._cell(line)):
                    reply = self.reply(self._cell(line))
                    body = FakeServer._completion(reply, line["body"])
                    response = {"status_code": reply.status, "request_id": "r", "body": body}
                    results.append(json.dumps({"id": "x", "custom_id": line["custom_id"], "response": response}))
            self.files[f"out-{number}"] = self.spoil("\n".join(results))
            batch["output_file_id"] = f"out-{number}"
        if self.status == "failed":
            batch["errors"] = {"object": "list", "data": [{"code": "x", "message": "the file is not right"}]}
        return batch


ROOT = Path(__file__).parents[2]
TASK = "Answer a riddle with a single word, said plainly, e.g. ${echo} {braces} {0}: 谜语."
COMMAND = "import argparse, sys; from tunewright.datagen.cli import add_parser; p = argparse.ArgumentParser()\n"
COMMAND += "add_parser(p.add_subparsers()); a = p.parse_args(sys.argv[1:]); sys.exit(a.run(a))"


def settings(server: Any, out: Path, **changed: Any) -> list[str]:
    """Arguments of the command; budget__usd=1 stands for budget.usd=1."""
    values = {"task": TASK, "name": "riddles", "examples": 20, "out": out, "base_url": server.url, **changed}
    return [f"{key.replace('__', '.')}={value}" for key, value in values.items()]


def start(server: Any, out: Path, *before: str, **changed: Any) -> subprocess.Popen[str]:
    """Start the command as a process of its own; `before` is Python that runs first."""
    code = "\n".join([*before, COMMAND])
    command = [sys.executable, "-c", code, "datagen", *settings(server, out, **changed)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def written(out: Path) -> dict[str, str]:
    """The files that are made from the log, without settings that differ between the servers and folders of a test."""
    texts = {}
    for path in sorted(out.glob("riddles*")):
        if path.name != "riddles.datagen.jsonl":
            texts[path.name] = path.read_text(encoding="utf-8")
    texts["dataset_info.json"] = (out / "dataset_info.json").read_text()
    manifest = json.loads(texts["riddles.manifest.json"])
    for key in ("out", "base_url", "concurrency"):
        del manifest["settings"][key]
    texts["riddles.manifest.json"] = json.dumps(manifest)
    texts.pop("riddles.html", None)  # has the settings too
    return texts


def manifest(out: Path) -> Any:
    return json.loads((out / "riddles.manifest.json").read_text())


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "riddles.datagen.jsonl").read_text().splitlines()]
