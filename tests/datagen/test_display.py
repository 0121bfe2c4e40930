"""The line that tells how far a run is."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tunewright.datagen.display import Display, Progress, line
from tunewright.deliver.compare import display_width

HALF = Progress(
    accepted=30,
    wanted=50,
    rejects=Counter({"duplicate": 4, "not JSON": 2, "empty": 1, "refused": 1}),
    in_flight=8,
    tokens=12_345,
    usd=0.0123,
    made_since_start=10,
    seconds=20.0,
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_line_tells_everything() -> None:
    assert line(HALF) == (
        "30/50 accepted, 8 rejected (duplicate 4, not JSON 2, empty 1, ...), 8 in flight, 12,345 tokens, $0.0123, "
        "about 40 s left"
    )


def test_line_of_a_run_that_has_not_begun() -> None:
    assert line(Progress(0, 50)) == "0/50 accepted, 0 rejected, 0 in flight, 0 tokens"
    assert line(Progress(0, 0)) == "0/0 accepted, 0 rejected, 0 in flight, 0 tokens"


@pytest.mark.parametrize(
    ("made", "seconds", "told"),
    [
        (10, 0.1, "about 1 s left"),
        (10, 20.0, "about 40 s left"),
        (1, 6.5, "about 2 min 10 s left"),
        (1, 90.0, "about 30 min left"),
        (1, 400.0, "about 2 h 13 min left"),
        (0, 20.0, ""),
        (10, 0.0, ""),
    ],
)
def test_time_left_counts_only_what_this_process_made(made: int, seconds: float, told: str) -> None:
    text = line(Progress(30, 50, made_since_start=made, seconds=seconds))
    assert text.endswith(told or "tokens")


def test_nothing_is_left_of_a_run_that_is_done() -> None:
    assert "left" not in line(Progress(50, 50, made_since_start=50, seconds=9.0))


def test_reasons_go_first_when_there_is_no_room() -> None:
    assert "duplicate 4, ..." in line(HALF, 100)
    assert "duplicate" not in line(HALF, 80)
    assert line(HALF, 80).endswith("about 40 s left")


@pytest.mark.parametrize("width", [0, 1, 2, 10, 33, 79, 500])
def test_line_fits(width: int) -> None:
    wide = Progress(1, 2, rejects=Counter({"重复的问题": 3, "line\nbreak \x1b[2J": 2}))
    for progress in (HALF, wide):
        assert display_width(line(progress, width)) <= width
        assert line(progress, width).isprintable()


def test_elsewhere_a_plain_line_every_few_seconds() -> None:
    said: list[str] = []
    clock, stream = Clock(), io.StringIO()
    with Display(said.append, stream, clock) as display:
        for accepted in range(1, 121):
            display.update(Progress(accepted, 120))
            clock.now += 0.125
        display.say("hello")
    assert [text.partition(" ")[0] for text in said] == ["1/120", "41/120", "81/120", "hello", "120/120"]
    assert stream.getvalue() == ""


def test_on_a_terminal_at_most_five_times_a_second() -> None:
    clock, stream = Clock(), Terminal()
    with Display(lambda _: None, stream, clock) as display:
        for accepted in range(1, 101):
            display.update(Progress(accepted, 100))
            clock.now += 0.01
    drawn = stream.getvalue().split("\r\x1b[K")[1:]
    assert 5 <= len(drawn) <= 6
    assert drawn[-1].startswith("100/100")
    assert drawn[-1].endswith("\n")
    assert stream.getvalue().count("\n") == 1


def test_said_lines_stand_above() -> None:
    stream = Terminal()
    with Display(lambda text: stream.write(f"{text}\n") and None, stream, Clock()) as display:
        display.say("before")
        display.update(HALF)
        display.say("hello")
    rows = screen(stream.getvalue())
    assert rows[:2] == ["before", "hello"]
    assert rows[2].startswith("30/50")
    assert len(rows) == 3


def test_the_line_stays_when_a_run_fails() -> None:
    stream = Terminal()

    def run() -> None:
        with Display(print, stream, Clock()) as display:
            display.update(HALF)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert screen(stream.getvalue())[0].startswith("30/50")
    assert stream.getvalue().endswith("\n")


def test_nothing_is_shown_of_a_run_that_never_began() -> None:
    stream = Terminal()
    with Display(print, stream, Clock()):
        pass
    assert stream.getvalue() == ""


def test_a_terminal_that_went_away_ends_no_run() -> None:
    stream = Terminal()
    with Display(lambda _: None, stream, Clock()) as display:
        stream.isatty()
        stream.close()
        display.update(HALF)


def test_on_a_real_terminal(tmp_path: Path) -> None:
    """With its width, while the results go to a file."""
    script = (
        "from tunewright.datagen.display import *\nimport fcntl, struct, sys, termios, time\n"
        "fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 50, 0, 0))\n"
        "with Display(lambda text: print(text, flush=True)) as display:\n"
        "    display.update(Progress(1, 50, Counter({'a very long reason': 7}), 16, 1234567, 12.5, 1, 9.0))\n"
        "    display.say('said')\n"
    )
    ours, theirs = pty.openpty()
    with (tmp_path / "out").open("wb") as out:
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=Path(__file__).resolve().parents[2],
            env={**os.environ, "TERM": "xterm"},
            stdout=out,
            stderr=theirs,
            timeout=60,
        )
    os.close(theirs)
    text = os.read(ours, 65536).decode()
    os.close(ours)
    assert done.returncode == 0, text
    assert (tmp_path / "out").read_text() == "said\n"
    rows = screen(text.replace("\r\n", "\n"))
    assert len(rows) == 1
    assert rows[0].startswith("1/50 accepted, 7 rejected, 16 in flight")
    assert display_width(rows[0]) <= 49


def screen(text: str) -> list[str]:
    """What a terminal shows of text in which lines are erased and written anew."""
    return [row.split("\r\x1b[K")[-1] for row in text.split("\n") if row.split("\r\x1b[K")[-1]]
