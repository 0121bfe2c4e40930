"""`transformers serve` on loopback: a real OpenAI-compatible server for tests, with a model from a folder."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

START_SECONDS = 120.0


class RealServer:
    """A server process, as a context manager; `url` is the base URL and `model` the name to send."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.folder = str(model), folder
        self.log = folder / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> RealServer:
        # Nothing holds the port between this and the server's start; a clash ends as "ended with 1" and is retried.
        for attempt in range(3):
            try:
                self._start()
                return self
            except RuntimeError:
                self.stop()
                if attempt == 2:
                    raise
            except BaseException:
                self.stop()
                raise
        raise AssertionError("unreachable")

    def __exit__(self, *args: object) -> None:
        self.stop()

    def _start(self) -> None:
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}/v1"
        # /v1/models fails with a 500 unless the folder of the hub's cache is there.
        hub = self.folder / "hub"
        hub.mkdir(parents=True, exist_ok=True)
        # One thread: several requests at once on several threads each are five times slower.
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(hub)}
        env.pop("OPENAI_API_KEY", None)
        command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", self.model]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
                cwd=self.folder,
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._healthy():
            code = self._process.poll()
            if code is not None or time.monotonic() > deadline:
                state = f"ended with {code}" if code is not None else f"was not ready within {START_SECONDS:.0f} s"
                raise RuntimeError(f"The server {state}:\n{self.log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.2)

    def _healthy(self) -> bool:
        # Not /v1/models, which never lists a folder.
        try:
            with urllib.request.urlopen(self.url.removesuffix("/v1") + "/health", timeout=5) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def stop(self) -> None:
        """End the process, by force where it does not end by itself. May be called twice."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
