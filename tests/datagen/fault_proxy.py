"""A reverse proxy on loopback that goes wrong on demand, in front of any OpenAI-compatible server.

A script decides for each request what happens to it: `FaultProxy(url, lambda seen: status(500) if seen.tries == 0 else
None)`. None passes it on unchanged. Every request is recorded with what became of it.
"""

from __future__ import annotations

import http.client
import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

UPSTREAM_SECONDS = 120.0


@dataclass(frozen=True)
class Fault:
    """What happens to one request. Fields combine: a slow reply may lack its usage too."""

    name: str = "pass"
    status: int | None = None  # answered here, without asking the server
    error: dict[str, Any] = field(default_factory=dict)  # of the error body
    text: str | None = None  # instead of a body in JSON, with `status` or 200
    headers: dict[str, str] = field(default_factory=dict)  # added to the answer
    wait: float = 0.0  # seconds before anything is answered
    pause: float = 0.0  # seconds in the middle of the body
    drop_before: bool = False  # the connection is reset without asking the server
    keep: float | None = None  # share of the body that is sent; then the connection is reset
    cut: float | None = None  # share of the body that is sent, as if it were all
    without: tuple[str, ...] = ()  # fields of the request that the server does not see
    edit: Callable[[dict[str, Any]], None] | None = None  # changes the completion in place


@dataclass
class Seen:
    """One request, and what became of it."""

    number: int  # from 0
    tries: int  # earlier requests with the same body
    at: float  # time.monotonic()
    path: str
    body: dict[str, Any]
    key: str
    fault: str = "pass"
    status: int | None = None  # sent to the client; None: the connection was dropped
    billed: dict[str, Any] | None = None  # the server's completion: what a provider would bill, delivered or not
    delivered: bool = False  # and the client got it whole, as JSON

    @property
    def prompt(self) -> str:
        return str(self.body["messages"][-1]["content"])


Script = Callable[[Seen], "Fault | None"]


def status(code: int, message: str = "scripted", **error: Any) -> Fault:
    """Any error in OpenAI's envelope: 500, 401, 403, 404, or a 400 that names a parameter."""
    return Fault(f"status {code}", code, {"message": message, **error})


def rate_limited(seconds: float, *, milliseconds: bool = False) -> Fault:
    headers = {"retry-after-ms": f"{seconds * 1000:.0f}"} if milliseconds else {"Retry-After": f"{seconds:g}"}
    return Fault("rate limited", 429, {"message": "slow down", "code": "rate_limit_exceeded"}, headers=headers)


def insufficient_quota() -> Fault:
    error = {"message": "You exceeded your current quota.", "type": "insufficient_quota", "code": "insufficient_quota"}
    return Fault("insufficient_quota", 429, error)


def unsupported(parameter: str) -> Fault:
    message = f"Unsupported parameter: '{parameter}' is not supported with this model."
    error = {"message": message, "param": parameter, "code": "unsupported_parameter"}
    return Fault("unsupported", 400, {**error, "type": "invalid_request_error"})


def slow(wait: float = 0.0, pause: float = 0.0) -> Fault:
    return Fault("slow", wait=wait, pause=pause)


def dropped(keep: float | None = None) -> Fault:
    """Reset the connection before the server is asked, or after that share of its answer."""
    return Fault("dropped", drop_before=keep is None, keep=keep)


def html(code: int = 200) -> Fault:
    return Fault("html", code, text="<html><body>The gateway is busy</body></html>")


def truncated(cut: float = 0.5) -> Fault:
    return Fault("truncated", cut=cut)


def no_usage() -> Fault:
    return Fault("no usage", edit=lambda completion: completion.pop("usage", None))


def ignores_format() -> Fault:
    return Fault("ignores format", without=("response_format",))


def finished_by(reason: str) -> Fault:
    return Fault(f"finished by {reason}", edit=lambda found: found["choices"][0].update(finish_reason=reason))


def limits(**remaining: object) -> Fault:
    """Rate-limit headers: limits(limit_requests=60, remaining_requests=59, reset_requests="1s")."""
    headers = {f"x-ratelimit-{name.replace('_', '-')}": str(value) for name, value in remaining.items()}
    return Fault("limits", headers=headers)


class FaultProxy:
    """The proxy as a context manager; `url` stands for `target`, both with /v1 at the end."""

    def __init__(self, target: str, script: Script | None = None) -> None:
        self.script = script
        self.seen: list[Seen] = []
        self.most_at_once = self._now = 0
        self._target = urlsplit(target)
        self._tries: dict[str, int] = {}
        self._lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                owner._handle(self)

            def do_GET(self) -> None:
                owner._pass_get(self)

            def log_message(self, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # the client was killed

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}{self._target.path}"

    def __enter__(self) -> FaultProxy:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def billed(self) -> list[Seen]:
        """Requests that the server behind answered with a completion."""
        with self._lock:
            return [seen for seen in self.seen if seen.billed is not None]

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        at = time.monotonic()
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        same = json.dumps(body, sort_keys=True)
        with self._lock:
            tries = self._tries.get(same, 0)
            self._tries[same] = tries + 1
            key = handler.headers.get("Authorization", "").removeprefix("Bearer ")
            seen = Seen(len(self.seen), tries, at, handler.path, body, key)
            self.seen.append(seen)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            fault = (self.script and self.script(seen)) or Fault()
            seen.fault = fault.name
            self._answer(handler, seen, fault)
        finally:
            with self._lock:
                self._now -= 1

    def _answer(self, handler: BaseHTTPRequestHandler, seen: Seen, fault: Fault) -> None:
        time.sleep(fault.wait)
        if fault.drop_before:
            _reset(handler)
            return
        kind, code = "application/json", fault.status or 200
        if fault.text is not None:
            data, kind = fault.text.encode(), "text/html"
        elif fault.status is not None:
            error = {"type": "scripted", "code": None, "param": None, **fault.error}
            data = json.dumps({"error": error}).encode()
        else:
            sent = {name: value for name, value in seen.body.items() if name not in fault.without}
            code, data = self._ask("POST", handler.path, json.dumps(sent).encode())
            if code == 200:
                completion = json.loads(data)
                with self._lock:
                    seen.billed = json.loads(data)
                if fault.edit:
                    fault.edit(completion)
                    data = json.dumps(completion).encode()
        if fault.cut is not None:
            data = data[: int(len(data) * fault.cut)]
        self._send(handler, seen, fault, code, kind, data)

    def _send(
        self, handler: BaseHTTPRequestHandler, seen: Seen, fault: Fault, code: int, kind: str, data: bytes
    ) -> None:
        handler.send_response(code)
        for name, value in {"Content-Type": kind, **fault.headers, "Content-Length": str(len(data))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        middle = int(len(data) * (0.5 if fault.keep is None else fault.keep))
        handler.wfile.write(data[:middle])
        handler.wfile.flush()
        time.sleep(fault.pause)
        if fault.keep is not None:
            _reset(handler)
            return
        # Recorded before the last byte leaves: a client that has its answer finds it here.
        seen.status, seen.delivered = code, seen.billed is not None and fault.cut is None
        handler.wfile.write(data[middle:])

    def _pass_get(self, handler: BaseHTTPRequestHandler) -> None:
        code, data = self._ask("GET", handler.path, None)
        handler.send_response(code)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def _ask(self, method: str, path: str, data: bytes | None) -> tuple[int, bytes]:
        """Ask the server behind; the key stays here, as it is a test's own."""
        assert self._target.hostname
        connection = http.client.HTTPConnection(self._target.hostname, self._target.port, timeout=UPSTREAM_SECONDS)
        try:
            connection.request(method, path, data, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            return reply.status, reply.read()
        except OSError as error:
            return 502, json.dumps({"error": {"message": f"the server behind is gone: {error}"}}).encode()
        finally:
            connection.close()


def _reset(handler: BaseHTTPRequestHandler) -> None:
    """Close with a reset instead of a polite end of stream, as a crash does."""
    handler.close_connection = True
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
