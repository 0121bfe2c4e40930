"""A hub on loopback: serves folders to the real `datasets`, `huggingface_hub` and `modelscope` packages.

`root/datasets/ORG/NAME/*` and `root/models/ORG/NAME/*` are repositories, each with one revision. The commit is a hash
of the files, so a test that changes a file has made a new commit. Nothing here checks tokens or takes uploads.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

KIND = r"(?P<kind>datasets|models)"
REPO = r"(?P<repo>\w[\w.-]*/\w[\w.-]*)"
INFO = re.compile(rf"/api/{KIND}/{REPO}(/revision/(?P<revision>[^/]+))?")
TREE = re.compile(rf"/api/{KIND}/{REPO}/(?P<what>tree|paths-info)/(?P<revision>[^/]+)(/(?P<path>.+))?")
RESOLVE = re.compile(rf"/((?P<kind>datasets)/)?{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
MODELSCOPE = re.compile(rf"/api/v1/{KIND}/{REPO}(?P<what>/repo(/tree|/files)?)?")


class NotFound(Exception):
    """Answered with 404; the code is what `huggingface_hub` reads."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Repository:
    """The files of one repository as they are now."""

    def __init__(self, folder: Path, revision: str | None) -> None:
        if not folder.is_dir():
            raise NotFound("RepoNotFound", f"Repository {folder.parent.name}/{folder.name} not found")
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        self.files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        listing = "".join(f"{name} {self.oid(name)}\n" for name in self.files)
        self.commit = hashlib.sha1(listing.encode()).hexdigest()
        if revision not in (None, "main", "master", self.commit):
            raise NotFound("RevisionNotFound", f"Invalid rev id: {revision}")

    def oid(self, name: str) -> str:
        data = self.files[name]
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def read(self, name: str) -> bytes:
        if name not in self.files:
            raise NotFound("EntryNotFound", "Entry not found")
        return self.files[name]

    def entries(self) -> dict[str, dict[str, Any]]:
        """Return files and folders by path, as the Hub's `tree` lists them."""
        folders = {str(parent) for name in self.files for parent in PurePosixPath(name).parents} - {"."}
        found = {path: {"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders}
        for path, data in self.files.items():
            found[path] = {"type": "file", "path": path, "oid": self.oid(path), "size": len(data)}
        return dict(sorted(found.items()))

    def tree(self, below: str, recursive: bool) -> list[dict[str, Any]]:
        prefix = f"{below}/" if below else ""
        found = [entry for path, entry in self.entries().items() if path.startswith(prefix)]
        if not found:
            raise NotFound("EntryNotFound", f"{below} does not exist")
        return [entry for entry in found if recursive or "/" not in entry["path"][len(prefix) :]]


class HubServer:
    """`with HubServer(root) as hub:`; `hub.requests` lists what was asked, as "GET /path?query"."""

    def __init__(self, root: Path) -> None:
        self.root, self.requests = root, list[str]()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                owner._answer(self)

            do_HEAD = do_POST = do_GET

            def log_message(self, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # the client was killed

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path, offline: bool = False) -> dict[str, str]:
        """Return the variables with which a fresh process talks to this hub alone and caches in `home`."""
        folders = {"HF_HOME": "hf", "HF_HUB_CACHE": "hf/hub", "HF_DATASETS_CACHE": "hf/datasets"}
        folders |= {"MODELSCOPE_HOME": "modelscope", "MODELSCOPE_CACHE": "modelscope/cache"}
        hub = {"HF_ENDPOINT": self.url, "MODELSCOPE_ENDPOINT": self.url, "HF_HUB_OFFLINE": str(int(offline))}
        return hub | {name: str(home / path) for name, path in folders.items()} | {"NO_PROXY": "*", "no_proxy": "*"}

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.requests.append(f"{handler.command} {handler.path}")
        sent = handler.rfile.read(int(handler.headers.get("Content-Length", 0))).decode()
        status, headers = 200, {"Content-Type": "application/json"}
        try:
            found = self._find(urlsplit(handler.path), parse_qs(sent), headers)
            body = found if isinstance(found, bytes) else json.dumps(found).encode()
        except NotFound as error:
            status = 404
            headers |= {"X-Error-Code": error.code, "X-Error-Message": str(error)}
            body = json.dumps({"error": str(error), "Code": 404, "Message": str(error), "Success": False}).encode()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range", ""))
        if status == 200 and wanted:
            first, last = int(wanted[1]), min(int(wanted[2] or len(body)), len(body) - 1)
            status, headers["Content-Range"] = 206, f"bytes {first}-{last}/{len(body)}"
            body = body[first : last + 1]
        handler.send_response(status)
        for name, value in {**headers, "Accept-Ranges": "bytes", "Content-Length": str(len(body))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body)

    def _repository(self, found: re.Match[str], revision: str | None) -> Repository:
        return Repository(self.root / (found["kind"] or "models") / found["repo"], revision)

    def _find(self, url: Any, form: dict[str, list[str]], headers: dict[str, str]) -> Any:
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        if found := MODELSCOPE.fullmatch(url.path):
            repo = self._repository(found, query.get("Revision"))
            if found["what"] == "/repo":
                return repo.read(query["FilePath"])
            if found["what"] is None:
                return {"Code": 200, "Success": True, "Data": {"Name": found["repo"].split("/")[1]}}
            files = [
                {"Path": name, "Type": "blob", "Size": len(data), "Sha256": hashlib.sha256(data).hexdigest()}
                for name, data in repo.files.items()
                if name.startswith(query.get("Root", ""))
            ]
            size = int(query.get("PageSize", len(files)))
            first = (int(query.get("PageNumber", 1)) - 1) * size
            return {"Code": 200, "Success": True, "Data": {"Files": files[first : first + size]}}
        if found := TREE.fullmatch(url.path):
            repo = self._repository(found, unquote(found["revision"]))
            if found["what"] == "tree":
                return repo.tree(unquote(found["path"] or ""), query.get("recursive", "").lower() == "true")
            return [entry for path, entry in repo.entries().items() if path in form.get("paths", [])]
        if found := INFO.fullmatch(url.path):
            repo = self._repository(found, found["revision"] and unquote(found["revision"]))
            siblings = [{"rfilename": name} for name in repo.files]
            return {"id": found["repo"], "sha": repo.commit, "private": False, "tags": [], "siblings": siblings}
        if found := RESOLVE.fullmatch(url.path):
            repo = self._repository(found, unquote(found["revision"]))
            headers["X-Repo-Commit"] = repo.commit  # the Hub sends it with a missing entry too
            data, name = repo.read(unquote(found["path"])), unquote(found["path"])
            headers |= {"Content-Type": "application/octet-stream", "ETag": f'"{repo.oid(name)}"'}
            return data
        raise NotFound("EntryNotFound", f"No such address: {url.path}")
