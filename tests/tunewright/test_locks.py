"""One process writes into a folder: among twenty that start at once, after one was killed, and from another machine."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tunewright.locks import is_locked

# `flock` says what the file system is like: yes; local: another machine's locks are not seen; no: there are none.
HOLD = """
import errno, fcntl, sys, time
from pathlib import Path
folder, flock, seconds, begin = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), float(sys.argv[4])
if flock == "local":
    fcntl.flock = lambda descriptor, how: None
if flock == "no":
    def refuse(descriptor, how):
        raise OSError(errno.ENOLCK, "No locks available")
    fcntl.flock = refuse
from tunewright import locks
locks.LEASE_SECONDS, locks.TOUCH_SECONDS = 6.0, 0.5
time.sleep(max(begin - time.time(), 0))
try:
    with locks.locked(folder):
        print("held", flush=True)
        time.sleep(seconds)
except locks.InUse as error:
    print("refused:", error, flush=True)
"""


def hold(
    folder: Path, *, flock: str = "yes", seconds: float = 60, begin: float = 0, host: str | None = None
) -> subprocess.Popen[str]:
    command: Sequence[str] = [sys.executable, "-c", HOLD, str(folder), flock, str(seconds), str(begin)]
    if host:
        command = ["unshare", "--uts", "sh", "-c", f'hostname {host} && exec "$@"', "sh", *command]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def answer(process: subprocess.Popen[str]) -> str:
    """Return what a process has come to, without what it said of its waiting."""
    while "waiting up to" in (line := first_line(process)):
        pass
    return line


def can_be_another_host() -> bool:
    return bool(shutil.which("unshare")) and subprocess.run(["unshare", "--uts", "true"], check=False).returncode == 0


another_host = pytest.mark.skipif(not can_be_another_host(), reason="another host's name needs unshare --uts (root)")


@pytest.mark.parametrize("flock", ["yes", "no"])
def test_of_twenty_that_start_at_once_one_gets_the_folder(flock: str, tmp_path: Path) -> None:
    started = [hold(tmp_path, flock=flock, begin=time.time() + 6) for _ in range(20)]
    said = [answer(process) for process in started]
    winner = started[said.index("held")]
    assert said.count("held") == 1
    assert {line.split(" since ")[0] for line in said if line != "held"} == {
        f"refused: process {winner.pid} on {os.uname().nodename}"
    }
    winner.kill()
    winner.wait()
    after = hold(tmp_path, flock=flock, seconds=0)
    assert first_line(after) == "held"  # what a killed process left behind is nobody's, at once
    assert after.wait() == 0
    assert not is_locked(tmp_path)


@another_host
def test_a_lock_of_another_machine_holds_where_the_systems_is_not_seen(tmp_path: Path) -> None:
    there = hold(tmp_path, flock="local", host="otherhost")
    assert first_line(there) == "held"
    here = hold(tmp_path, flock="local")
    assert answer(here).startswith("refused: process ")
    there.send_signal(signal.SIGKILL)
    there.wait()
    began = time.monotonic()
    later = hold(tmp_path, flock="local", seconds=0)
    assert "on otherhost since" in first_line(later)
    assert first_line(later) == "held"
    assert time.monotonic() - began >= 6


@another_host
def test_a_process_whose_folder_another_machine_took_stops(tmp_path: Path) -> None:
    """It slept for so long that it counted as gone."""
    sleeper = hold(tmp_path, flock="local", host="otherhost")
    assert first_line(sleeper) == "held"
    sleeper.send_signal(signal.SIGSTOP)
    taker = hold(tmp_path, flock="local")
    assert answer(taker) == "held"
    sleeper.send_signal(signal.SIGCONT)
    assert sleeper.wait(timeout=30) != 0  # KeyboardInterrupt
    taker.kill()
