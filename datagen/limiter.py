"""How many requests may be in flight, learnt from the server: more while it answers, fewer when it says stop."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping

START = 8.0
LESS = 0.75
COOL_DOWN = 2.0  # seconds in which further refusals of the same moment do not count again


class Limiter:
    """Additive increase, multiplicative decrease, and a pause that holds back every request.

    Until the server first refuses, each reply allows one request more, so that the limit doubles with every round.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.allowed = min(START, float(most))
        self._refused = False
        self._lowered_at = float("-inf")
        self._open_at = 0.0

    @property
    def room(self) -> int:
        return max(1, int(self.allowed))

    def answered(self, headers: Mapping[str, str] | None = None) -> None:
        """Take note of a reply, and of what its headers say is left in this minute."""
        step = 1.0 if not self._refused else 1.0 / max(self.allowed, 1.0)
        self.allowed = min(float(self.most), self.allowed + step)
        left = _number((headers or {}).get("x-ratelimit-remaining-requests"))
        if left is not None and left < self.allowed:
            self.allowed = max(1.0, left)

    def refused(self, wait: float | None) -> None:
        """Take note of a refusal for haste: fewer at once, and none at all for `wait` seconds."""
        now = asyncio.get_running_loop().time()
        if now - self._lowered_at > COOL_DOWN:
            self.allowed = max(1.0, self.allowed * LESS)
            self._lowered_at, self._refused = now, True
        if wait is not None:
            self._open_at = max(self._open_at, now + wait)

    async def opened(self) -> None:
        """Wait until requests may be sent again, each a little later than the others."""
        clock = asyncio.get_running_loop().time
        while (left := self._open_at - clock()) > 0:
            await asyncio.sleep(left + random.uniform(0, 0.2))


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
