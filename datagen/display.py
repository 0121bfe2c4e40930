"""How far a run is: one line that refreshes itself on a terminal, and a plain line now and then elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TextIO

from tunewright.deliver.compare import clip, display_width

REFRESH_SECONDS = 0.2  # on a terminal
PLAIN_SECONDS = 5.0  # elsewhere
WIDTH = 80  # of a terminal that does not tell
REASONS_SHOWN = 3


@dataclass(frozen=True)
class Progress:
    """What a run has done so far."""

    accepted: int
    wanted: int
    rejects: Counter[str] = field(default_factory=Counter)
    in_flight: int = 0
    tokens: int = 0
    usd: float | None = None  # None: the price of the model is not known
    made_since_start: int = 0  # rows accepted by this process, without those that it found
    seconds: float = 0.0  # since this process began to ask


def line(progress: Progress, width: int | None = None) -> str:
    """Return the progress in one line of at most `width` terminal cells; None: as long as it takes.

    The reasons of the rejects go first when there is no room, because the counts matter more.
    """
    text = ""
    for shown in (REASONS_SHOWN, 2, 1, 0):
        text = _line(progress, shown)
        if width is None or display_width(text) <= width:
            return text
    return clip(text, width) if width is not None and width > 0 else ""


def _line(progress: Progress, shown: int) -> str:
    parts = [
        f"{progress.accepted:,}/{progress.wanted:,} accepted",
        _rejected(progress.rejects, shown),
        f"{progress.in_flight:,} in flight",
        f"{progress.tokens:,} tokens",
        "" if progress.usd is None else f"${progress.usd:,.{2 if progress.usd >= 10 else 4}f}",
        _left(progress),
    ]
    return ", ".join(part for part in parts if part)


def _rejected(rejects: Counter[str], shown: int) -> str:
    text = f"{rejects.total():,} rejected"
    # A line break or an escape in a reason would tear the line apart.
    named = [f"{''.join(filter(str.isprintable, reason))} {count:,}" for reason, count in rejects.most_common(shown)]
    if not named:
        return text
    return f"{text} ({', '.join(named)}{', ...' if len(rejects) > shown else ''})"


def _left(progress: Progress) -> str:
    missing = progress.wanted - progress.accepted
    if missing <= 0 or progress.made_since_start <= 0 or progress.seconds <= 0:
        return ""
    return f"about {_duration(missing * progress.seconds / progress.made_since_start)} left"


def _duration(seconds: float) -> str:
    whole = max(1, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s" if minutes < 10 else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02} min"


class Display:
    """`with Display(say) as display:`; what is said through `display.say` stands above the line."""

    def __init__(
        self,
        say: Callable[[str], None],
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._say, self._clock = say, clock
        # Not the stream of the results: they may go to a file while a terminal watches.
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._last: Progress | None = None
        self._written = -float("inf")
        self._current = True  # what was updated last is written

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the last state as an ordinary line, whatever ended the run."""
        if self._last is None:
            return
        if self._live:
            self._write(f"\r\x1b[K{line(self._last, self._width())}\n")
        elif not self._current:
            self._say(line(self._last))
        self._last = None

    def update(self, progress: Progress) -> None:
        """Take the new state, and show it unless one was shown just now."""
        self._last, self._current = progress, False
        now = self._clock()
        if now - self._written < (REFRESH_SECONDS if self._live else PLAIN_SECONDS):
            return
        self._written, self._current = now, True
        if self._live:
            self._draw()
        else:
            self._say(line(progress))

    def say(self, text: str) -> None:
        """Say a line of its own, above the one that refreshes itself."""
        if self._live and self._last is not None:
            self._write("\r\x1b[K")
            self._say(text)
            self._draw()
        else:
            self._say(text)

    def _draw(self) -> None:
        assert self._last is not None
        self._write(f"\r\x1b[K{line(self._last, self._width())}")

    def _write(self, text: str) -> None:
        # A terminal that was closed must not end a run that is being paid for.
        with contextlib.suppress(OSError, ValueError):
            encoding = self._stream.encoding or "utf-8"
            self._stream.write(text.encode(encoding, "replace").decode(encoding))
            self._stream.flush()

    def _width(self) -> int:
        with contextlib.suppress(OSError, ValueError):
            # The last column stays free: some terminals wrap as soon as it is written.
            return (os.get_terminal_size(self._stream.fileno()).columns or WIDTH) - 1
        return WIDTH - 1
