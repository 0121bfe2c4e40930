"""What people see in a terminal: tables as text, and how far something is.

rich is imported by what uses it, so that a command that shows neither starts without it.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

from tunewright.text import clip, clip_start, clock, display_width, one_line

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

REFRESH_SECONDS = 0.2  # of a bar
PLAIN_SECONDS = 5.0  # between lines, where there is no terminal
BAR_WIDTH = 24  # terminal cells
LABEL_WIDTH = 28


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, rule: bool = False) -> str:
    """Return a table as text: the first column to the left, figures to the right, in terminal cells.

    With a `rule` there is a line below the head. Cells are shown as they are, each on one line.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Of the lines of a box only the one below the head is drawn; columns are two cells apart.
    lines = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True) if rule else None
    drawn = Table(box=lines, show_edge=False, padding=(0, 1 if rule else 2, 0, 0), pad_edge=False, header_style="")
    for place, name in enumerate(head):
        drawn.add_column(Text(name), no_wrap=True, justify="right" if place else "left")
    for row in rows:
        drawn.add_row(*map(Text, row))
    console = Console(file=io.StringIO(), width=1_000_000, color_system=None)
    with console.capture() as captured:
        console.print(drawn)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


class Progress:
    """How far something is: a bar that refreshes itself on a terminal, a plain line now and then elsewhere.

        with Progress(say, stream) as progress:
            progress.update("step", 3, 75, "loss 1.2345", "3,210 tokens/s")
            progress.say("a line of its own, above the bar")

    The time left is counted from the first update of a label, so that what was there before counts nothing.

    Args:
        say: takes a plain line; it may write somewhere else than `stream`.
        stream: where the bar is drawn, if that is a terminal; by default standard error.
        every: seconds between two plain lines at least.
        leave: the first and the last state are plain lines too; otherwise what takes no time shows nothing.
    """

    def __init__(
        self,
        say: Callable[[str], object] = print,
        stream: TextIO | None = None,
        *,
        every: float = PLAIN_SECONDS,
        leave: bool = True,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._say, self._every, self._leave, self._now = say, every, leave, now
        # By default not the stream of the results: they may go to a file while a terminal watches.
        self._stream = sys.stderr if stream is None else stream
        self.live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self.line = ""  # the last state, as a plain line
        self._bar: Bar | None = None
        self._began: tuple[str, int, float] | None = None
        self._shown = 0.0
        self._current = True  # the last state is shown

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away and leave the last state as a plain line, whatever ended what was done."""
        drawn = self._erase()
        if self.line and self._leave and (drawn or not self._current):
            if drawn:
                with suppress(OSError, ValueError):
                    print(_encodable(self.line, self._stream), file=self._stream, flush=True)
            else:
                self._say(self.line)
        self.line, self._bar, self._began, self._current = "", None, None, True

    def update(self, label: str, done: int, total: int | None, *details: str, unit: str = "") -> None:
        """Take the new state, and show it unless one was shown just now; with a unit it tells how many a second."""
        label, details = one_line(label), tuple(map(one_line, details))
        now = self._now()
        first = self._began is None or self._began[0] != label
        if self._began is None or first:
            self._began = (label, done, now)
        made, seconds = done - self._began[1], now - self._began[2]
        if unit and made > 0 and seconds > 0:
            details = (f"{made / seconds:,.0f} {unit}/s", *details)
        left = f"{clock(seconds / made * max(total - done, 0))} left" if total and made > 0 and done < total else ""
        of = f"{done:,}/{total:,}" if total is not None else f"{done:,}"
        self.line, self._current = _joined(f"{label} {of}", *details, left), False
        if first and not self._leave and not self.live:
            self._shown = now
        elif first or now - self._shown >= (REFRESH_SECONDS if self.live else self._every):
            self._shown, self._current = now, True
            if self.live:
                self._draw(label, of, _joined(left, *details), done, total)
            else:
                self._say(self.line)

    def say(self, text: str) -> None:
        """Say a line of its own, above the bar."""
        drawn = self._erase()
        self._say(text)
        if drawn and self._bar:
            with suppress(OSError, ValueError):
                self._start(self._bar)

    def _draw(self, label: str, of: str, words: str, done: int, total: int | None) -> None:
        # A terminal that was closed must not end what is being computed or paid for.
        with suppress(OSError, ValueError):
            if self._bar is None:
                self._bar = _bar(self._stream)
                self._bar.add_task("")
            with suppress(OSError):
                # The last column stays free: some terminals wrap as soon as it is written.
                self._bar.console.width = (os.get_terminal_size(self._stream.fileno()).columns or 80) - 1
            label = f"{clip_start(label, LABEL_WIDTH)} {of}"
            words = clip(words, self._bar.console.width - display_width(label) - BAR_WIDTH - 2)
            label, words = _encodable(label, self._stream), _encodable(words, self._stream)
            self._bar.update(self._bar.task_ids[0], description=label, completed=done, total=total, words=words)
            self._start(self._bar)
            self._bar.refresh()

    def _start(self, bar: Bar) -> None:
        if not bar.live.is_started:
            bar.start()
            bar.console.show_cursor()  # rich hides it, and a process that is killed would leave it so

    def _erase(self) -> bool:
        """Take the bar off the terminal, and tell whether there was one."""
        if self._bar is None:
            return False
        with suppress(OSError, ValueError):
            self._bar.stop()
        return True


def begin_line() -> None:
    """Begin a new line of the terminal: a process that was ended has left its bar in the present one."""
    if sys.stdout.isatty():
        tell("")


def tell(text: str, stream: TextIO | None = None) -> None:
    """Print a line, by default to standard output, for what goes on where nobody reads any more.

    The reader may have left (`| head`), the terminal may be gone: from then on everything goes to nowhere, also what
    is in the stream's buffer and what processes print that are started later.
    """
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _bar(stream: TextIO) -> Bar:
    """A bar in one line, refreshed by hand: a thread would live on in forks, and draw when a process is being ended."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar
    from rich.table import Column

    console = Console(file=stream, force_terminal=True, force_jupyter=False, width=79)
    return Bar(
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="crop")),
        BarColumn(bar_width=BAR_WIDTH, complete_style="cyan", finished_style="green"),
        TextColumn("{task.fields[words]}", markup=False, table_column=Column(no_wrap=True, overflow="crop")),
        console=console,
        auto_refresh=False,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )


def _joined(*parts: str) -> str:
    return "  ".join(part for part in parts if part)


def writes(stream: TextIO, text: str) -> bool:
    """Tell whether a stream's encoding has all signs of a text."""
    return _encodable(text, stream) == text


def _encodable(text: str, stream: TextIO) -> str:
    """Return text without what the stream cannot write."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)
