"""A hub on loopback that takes uploads of small files, as the real `huggingface_hub` client makes them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_canary51f0c3a97be2"
OWNER = "alice"  # whose token it is
ADDRESS = re.compile(r"/api/datasets/(?P<repo>[\w.-]+/[\w.-]+)(/(?P<what>preupload|commit|revision)/main)?")

Answer = tuple[int, dict[str, Any], dict[str, str]]


class WriteHub:
    """`with WriteHub() as hub:`; `hub.repos` holds the files of each repository, `hub.commits` counts."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.commits: list[tuple[str, str, list[str]]] = []  # repository, message, files
        self.fail: dict[str, Answer] = {}  # by the part of the address to which it is the answer
        self.raw: bytes | None = None  # sent instead of JSON
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                owner._answer(self)

            do_GET = do_POST

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> WriteHub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, repo: str, *, private: bool) -> None:
        self.repos[repo], self.private[repo] = {}, private

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        sent = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        path = handler.path.partition("?")[0]
        found = next((answer for part, answer in self.fail.items() if part in path), None)
        if found is None and handler.headers.get("Authorization") != f"Bearer {TOKEN}":
            found = _error(401, f"Invalid credentials for {handler.headers.get('Authorization')}")
        status, content, headers = found or self._find(path, sent)
        body = self.raw if self.raw is not None else json.dumps(content).encode()
        handler.send_response(status)
        for name, value in {**headers, "Content-Type": "application/json", "Content-Length": str(len(body))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    def _find(self, path: str, sent: bytes) -> Answer:
        if path == "/api/repos/create":
            return self._create(json.loads(sent))
        if path == "/api/validate-yaml":
            good = json.loads(sent)["content"].startswith("---\n")
            return (200, {"warnings": []}, {}) if good else (400, {"errors": [{"message": "no head"}]}, {})
        found = ADDRESS.fullmatch(path)
        if not found or found["repo"] not in self.repos:
            return _error(404, "Repository not found", "RepoNotFound")
        files = self.repos[found["repo"]]
        if found["what"] == "preupload":
            listed = [self._mode(files, entry["path"]) for entry in json.loads(sent)["files"]]
            return 200, {"files": listed}, {}
        if found["what"] == "commit":
            return self._commit(found["repo"], [json.loads(line) for line in sent.splitlines()])
        return 200, {"id": found["repo"], "sha": "0" * 40, "private": self.private[found["repo"]]}, {}

    def _create(self, wanted: dict[str, Any]) -> Answer:
        owner = wanted["organization"] or OWNER
        repo = f"{owner}/{wanted['name']}"
        assert wanted["type"] == "dataset"
        if owner != OWNER:
            return _error(403, f"You don't have the rights to create a dataset under the namespace {owner}")
        address = {"url": f"{self.url}/datasets/{repo}"}
        if repo in self.repos:
            return 409, {"error": "You already created this dataset repo", **address}, {}
        self.add(repo, private=wanted["visibility"] == "private")
        return 200, address, {}

    def _mode(self, files: dict[str, bytes], path: str) -> dict[str, Any]:
        oid = hashlib.sha1(b"blob %d\0" % len(files[path]) + files[path]).hexdigest() if path in files else None
        return {"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": oid}

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> Answer:
        header, *changes = lines
        assert all(change["key"] == "file" and change["value"]["encoding"] == "base64" for change in changes)
        new = {change["value"]["path"]: base64.b64decode(change["value"]["content"]) for change in changes}
        self.repos[repo].update(new)
        self.commits.append((repo, header["value"]["summary"], sorted(new)))
        return 200, {"commitUrl": f"{self.url}/datasets/{repo}/commit/{'1' * 40}", "commitOid": "1" * 40}, {}


def _error(status: int, message: str, code: str = "") -> Answer:
    headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
    return status, {"error": message}, headers
