"""The launcher's ear: which rank on this machine has fallen silent, where it was, and what the others do meanwhile."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import psutil

from tunewright.beats import PATIENCE_OF_LAUNCHER, SOCKET, Beat, Listener, interval_of, patience_of

STACKS_SECONDS = 2.0  # in which ranks write their stacks
IDLE = 0.02  # of a core: a process that uses less waits for something


class Watch:
    """Hears the ranks of one machine while they run, and ends one that is frozen, so that the others need not wait.

    Args:
        folder: of the launcher's own, where ranks find the socket.
        timeout_minutes: `train.timeout_minutes`.
        say: shows a line to the user.
    """

    def __init__(self, folder: Path, timeout_minutes: float, say: Callable[[str], None]) -> None:
        self.frozen: Beat | None = None  # the last beat of the rank that was ended here
        self.interval, self.timeout = interval_of(timeout_minutes), timeout_minutes * 60
        self._say = say
        self._listener = Listener(self.interval, patience_of(timeout_minutes, PATIENCE_OF_LAUNCHER))
        # Since when a rank is where it is: its beat, the clock, and its CPU time then.
        self._moved: dict[int, tuple[Beat, float, float]] = {}
        self._stop = threading.Event()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        try:
            self._socket.bind(str(folder / SOCKET))
        except OSError as error:  # Linux allows such a path 107 bytes
            say(f"Ranks are not heard by their launcher, at {folder / SOCKET}: {error}. Only by one another.")
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._socket.close()

    def last(self, rank: int) -> Beat | None:
        """Return the last that was heard of a rank."""
        return self._listener.beats.get(rank)

    def told(self) -> str:
        """Return what is said of the rank that was ended here, and of the others."""
        assert self.frozen
        return (
            f"{self.frozen.silent()}: it is frozen (`train.timeout_minutes`). Stacks of the others are in their logs. "
            f"Where ranks were when they were last heard:\n{self._listener.told()}"
        )

    def _watch(self) -> None:
        while not self._stop.wait(self.interval):
            with suppress(BlockingIOError):
                while True:  # whatever has arrived is read before anybody is judged
                    self._listener.take(Beat(**json.loads(self._socket.recv(1 << 16))))
            for rank in list(self._listener.heard):
                with suppress(psutil.NoSuchProcess):
                    self._notice_standstill(self._listener.beats[rank])
            silent = self._listener.silent()
            if silent is not None:
                self._listener.forget(silent)
                with suppress(psutil.NoSuchProcess):
                    self._end(self._listener.beats[silent])

    def _notice_standstill(self, beat: Beat) -> None:
        """Say once of a rank that it lives and does nothing; what others wait for ends by its own timeout."""
        process, now = psutil.Process(beat.pid), time.monotonic()
        used = sum(process.cpu_times()[:2])
        began, since, used_then = self._moved.get(beat.rank, (beat, now, used))
        if began.where() != beat.where() or used - used_then > max(IDLE * (now - since), 1.0):
            self._moved[beat.rank] = (beat, now, used)
            return
        self._moved.setdefault(beat.rank, (beat, now, used))
        if now - since > self.timeout:
            self._moved[beat.rank] = (beat, float("inf"), used)
            self._say(
                f"Rank {beat.rank} on {beat.host} (process {beat.pid}) has done nothing for {self.timeout / 60:g} "
                f"minutes, in {beat.where()}. Its stack is in its log."
            )
            process.send_signal(signal.SIGUSR2)

    def _end(self, last: Beat) -> None:
        """End a rank that was last heard long ago, if there is still such a process."""
        process = psutil.Process(last.pid)
        if process.create_time() > last.time:  # another process with the same number
            return
        self.frozen = last
        for rank in self._listener.heard:
            with suppress(psutil.NoSuchProcess):
                psutil.Process(self._listener.beats[rank].pid).send_signal(signal.SIGUSR2)
        self._stop.wait(STACKS_SECONDS)
        process.kill()
