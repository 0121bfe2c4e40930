"""A server on loopback that speaks the chat-completions shape and can be told to go wrong."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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


@dataclass
class Asked:
    """One request that the server saw."""

    number: int  # of the request, from 0
    cell: int | None  # number of the example from 0; None for the system message
    tries: int  # earlier requests for the same cell
    body: dict[str, Any]
    key: str


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
        self.most_at_once = self._now = 0
        self._lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                owner._answer(self, body)

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
            key = handler.headers.get("Authorization", "").removeprefix("Bearer ")
            asked = Asked(len(self.asked), cell, tries, body, key)
            self.asked.append(asked)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        time.sleep(self.delay)
        reply = (self.script and self.script(asked)) or (Reply(json.dumps(PLAN)) if cell is None else good(cell))
        with self._lock:
            self._now -= 1
            if reply.status == 200 and reply.body is None:
                self.answered.append(cell)
        text = reply.body if reply.body is not None else json.dumps(self._completion(reply, body))
        data = text.encode()
        handler.send_response(reply.status)
        for name, value in {"Content-Type": reply.content_type, **reply.headers}.items():
            handler.send_header(name, value)
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
            "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
        }
