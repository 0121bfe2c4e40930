"""How many requests may be in flight, learnt from the server: fewer when it says stop, more while it answers."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

LESS = 0.5
COOL_DOWN = 1.0  # seconds in which further refusals of the same moment do not count again
LONGEST_RESET = 120.0  # seconds that the headers of a reply may ask to wait
UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


class Stopped(Exception):
    """No request may be sent any more."""


class Limiter:
    """Additive increase, multiplicative decrease, and a pause that holds back every request.

    It begins with the most that the user allows: a server that can take less says so, and a slow start would cost every
    other run several round trips.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.allowed = float(most)
        self._sent = 0  # requests that the server has now
        self._lowered_at = float("-inf")
        self._open_at = 0.0
        self._stop: asyncio.Event | None = None
        self._stopped = False

    @property
    def room(self) -> int:
        return max(1, int(self.allowed))

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Wait until a request may be sent, and count it while the server has it.

        Raises:
            Stopped: nothing may be sent any more.
        """
        clock = asyncio.get_running_loop().time
        # Those that were refused do not all come back at once: each takes a slot again.
        while (left := self._open_at - clock()) > 0 or self._sent >= self.room:
            await self.pause(max(left, 0.0) + random.uniform(0.01, 0.1))
        if self._stopped:
            raise Stopped
        self._sent += 1
        try:
            yield
        finally:
            self._sent -= 1

    async def pause(self, seconds: float) -> None:
        """Sleep.

        Raises:
            Stopped: nothing may be sent any more, so there is nothing to wait for.
        """
        if self._stop is None:
            self._stop = asyncio.Event()
        if not self._stopped:
            try:
                await asyncio.wait_for(self._stop.wait(), seconds)
            except asyncio.TimeoutError:
                return
        raise Stopped

    def stop(self) -> None:
        """Send nothing more; what waits gives up at once, what is under way ends."""
        self._stopped = True
        if self._stop is not None:
            self._stop.set()

    def answered(self, headers: Mapping[str, str]) -> None:
        """Take note of a reply, and of what its headers say is left in this minute."""
        self.allowed = min(float(self.most), self.allowed + 1.0 / max(self.allowed, 1.0))
        for kind in ("requests", "tokens"):
            left = _number(headers.get(f"x-ratelimit-remaining-{kind}"))
            if left is not None and left <= 0:
                wait = min(_duration(headers.get(f"x-ratelimit-reset-{kind}")), LONGEST_RESET)
                self._open_at = max(self._open_at, asyncio.get_running_loop().time() + wait)
            elif left is not None and kind == "requests":
                self.allowed = max(1.0, min(self.allowed, left + self._sent))

    def refused(self, wait: float | None) -> None:
        """Take note of a refusal for haste: fewer at once, and none at all for `wait` seconds."""
        now = asyncio.get_running_loop().time()
        if now - self._lowered_at > COOL_DOWN:
            self.allowed = max(1.0, self.allowed * LESS)
            self._lowered_at = now
        if wait is not None:
            self._open_at = max(self._open_at, now + wait)


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _duration(text: str | None) -> float:
    """Return the seconds of `6m0s`, `20ms` or `1.5`; 0 for anything else."""
    found = _number(text)
    if found is not None:
        return max(0.0, found) if found < float("inf") else 0.0
    return sum(float(number) * UNITS[unit] for number, unit in re.findall(r"(\d+(?:\.\d+)?)(ms|h|m|s)", text or ""))
