"""Tables as text, and the bar that tells how far something is."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunewright.terminal import Progress, begin_line, table, writes
from tunewright.text import clip, clip_start, clock, display_width, one_line


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def screen(text: str) -> list[str]:
    """What a terminal shows of text in which lines are erased and written anew."""
    rows, place = [""], 0
    for part in re.findall(r"\x1b\[[\d;?]*[A-Za-z]|\n|\r|[^\x1b\n\r]+", text):
        if part == "\n":
            place += 1
            rows += [""] * (place == len(rows))
        elif part == "\x1b[1A":
            place -= 1
        elif part == "\x1b[2K":
            rows[place] = ""
        elif part[0] not in "\x1b\r":
            rows[place] += part
    return [row for row in rows if row]


def test_table_is_aligned_in_cells_and_reads_nothing_as_markup() -> None:
    text = table(["run", "微调实验", "[b]x[/b]"], [["steps :smile:", "1", "2"], ["a", "3,000", "-"]], rule=True)
    head, line, *rows = text.splitlines()
    assert head == "run            微调实验  [b]x[/b]"
    assert set(line) == {"-"}
    assert rows == ["steps :smile:         1         2", "a                 3,000         -"]
    assert {display_width(row) for row in (head, line, *rows)} == {33}


@pytest.mark.parametrize("width", range(12))
def test_clipped_text_fits(width: int) -> None:
    for text in ("微调实验微调", "an answer", "e\u0301" * 20, ""):
        assert display_width(clip(text, width)) <= width
    if width:
        assert display_width(clip_start("/a/path/微调", width)) <= width


def test_one_line_holds_nothing_that_a_terminal_obeys() -> None:
    assert one_line("a\x1b[2J\x07 b\n\tc \ud83d\u202e") == "a[2J b c "


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (float("inf"), "-"), (None, "-"), (-1, "-")],
)
def test_clock(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown


def test_elsewhere_a_plain_line_every_few_seconds() -> None:
    said: list[str] = []
    now, stream = Clock(), io.StringIO()
    with Progress(said.append, stream, now=now) as progress:
        for done in range(1, 121):
            progress.update("rows", done, 120, f"{done} seen", "")
            now.now += 0.125
        progress.say("hello")
    assert said[:2] == ["rows 1/120  1 seen", "rows 41/120  41 seen  0:10 left"]
    assert [text.split()[-1] for text in said[2:]] == ["left", "hello", "seen"]
    assert stream.getvalue() == ""


def test_what_takes_no_time_shows_nothing_where_nothing_is_to_be_left() -> None:
    said: list[str] = []
    now = Clock()
    with Progress(said.append, io.StringIO(), every=2, leave=False, now=now) as progress:
        for done in range(5):
            progress.update("rows", done, None)
            now.now += 0.9
    assert said == ["rows 3"]


def test_time_left_counts_from_the_first_update_of_a_label() -> None:
    said: list[str] = []
    now = Clock()
    progress = Progress(said.append, io.StringIO(), every=0, now=now)
    for label, done in (("a", 90), ("a", 91), ("b", 0), ("b", 5), ("b", 20)):
        progress.update(label, done, 20 if label == "b" else 100)
        now.now += 10
    assert said == ["a 90/100", "a 91/100  1:30 left", "b 0/20", "b 5/20  0:30 left", "b 20/20"]


def test_on_a_terminal_at_most_five_times_a_second() -> None:
    now, stream = Clock(), Terminal()
    with Progress(print, stream, now=now) as progress:
        for done in range(1, 101):
            progress.update("step", done, 100)
            now.now += 0.01
    assert 5 <= stream.getvalue().count("\x1b[2Kstep") <= 8
    assert screen(stream.getvalue()) == ["step 100/100"]


def test_said_lines_stand_above_and_the_last_state_stays_when_a_run_fails() -> None:
    stream = Terminal()

    def run() -> None:
        with Progress(lambda text: stream.write(f"{text}\n"), stream, now=Clock()) as progress:
            progress.say("before")
            progress.update("step", 3, 10, "loss 1.5", "[red]x")
            assert screen(stream.getvalue())[-1].endswith(" loss 1.5  [red]x")
            progress.say("hello")
            assert screen(stream.getvalue())[-1].startswith("step ")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert screen(stream.getvalue()) == ["before", "hello", "step 3/10  loss 1.5  [red]x"]
    assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")


def test_the_cursor_is_there_while_a_bar_is_drawn() -> None:
    """A process that is killed cannot bring it back."""
    stream = Terminal()
    progress = Progress(print, stream)
    progress.update("step", 1, 2)
    assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")


def test_a_terminal_that_went_away_ends_no_run() -> None:
    stream = Terminal()
    with Progress(lambda _: None, stream) as progress:
        progress.update("step", 1, 2)
        stream.close()
        progress.say("hello")
        progress.update("step", 2, 2)


def test_what_is_said_after_a_process_was_ended_stands_below_its_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr("sys.stdout", stream)
    Progress(print, stream).update("step", 1, 2)  # and it is killed
    begin_line()
    print("Stopped.")
    assert [row.split()[0] for row in screen(stream.getvalue())] == ["step", "Stopped."]
    monkeypatch.setattr("sys.stdout", elsewhere := io.StringIO())
    begin_line()
    assert elsewhere.getvalue() == ""


@pytest.mark.parametrize("columns", [8, 20, 50, 200])
def test_on_a_real_terminal_one_line_with_its_width(tmp_path: Path, columns: int) -> None:
    """Its own width, while standard output goes to a file and the bar to a duplicated descriptor."""
    script = (
        "from tunewright.terminal import Progress\nimport fcntl, os, struct, termios\n"
        f"fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack('HHHH', 24, {columns}, 0, 0))\n"
        "terminal = os.fdopen(os.dup(2), 'w')\n"
        "os.dup2(1, 2)\n"
        "progress = Progress(lambda text: print(text, flush=True), terminal)\n"
        "progress.update('a dataset', 1, 50, 'a very long reason of something', '微调实验' * 9)\n"
        "terminal.flush()\nos._exit(0)\n"
    )
    ours, theirs = pty.openpty()
    with (tmp_path / "out").open("wb") as out:
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=Path(__file__).resolve().parents[2],
            env={**os.environ, "TERM": "xterm"},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=theirs,
            timeout=60,
        )
    os.close(theirs)
    text = os.read(ours, 65536).decode()
    os.close(ours)
    assert done.returncode == 0, text
    assert (tmp_path / "out").read_text() == ""
    (row,) = screen(text)
    assert row.startswith("a dataset 1/50"[: columns - 7])
    assert display_width(row) <= columns - 1
    assert ("a very" in row) == (columns >= 50)


def test_an_encoding_that_lacks_a_sign(tunewright: Callable[..., Any], tmp_path: Path) -> None:
    assert writes(io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), "✓")
    assert not writes(io.TextIOWrapper(io.BytesIO(), encoding="gbk"), "✓")
    done = tunewright("runs", tmp_path / "ü", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"There is no run in {tmp_path}/?.")
