"""Start the ranks of a run, watch them, and say in one place what went wrong and in which rank.

No rank outlives this process: Ctrl-C and SIGTERM are passed on, and Linux kills the ranks when their launcher dies.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tunewright.errors import EXIT_CODES
from tunewright.launch.command import Command
from tunewright.ranks import die_with_parent, interrupt_waits, without_ranks
from tunewright.run_folder import RunDir

GRACE_SECONDS = 10.0  # between asking the ranks to stop and killing them
TAIL_LINES = 15
INTERRUPTED = 130  # what a shell reports for Ctrl-C


@dataclass(frozen=True)
class RankError:
    """How one rank ended."""

    rank: int
    kind: str
    message: str
    exit_code: int
    log: Path


class AccelerateLauncher:
    """`accelerate launch` as a process, which can be begun before it is known what to launch; see `launcher`."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def begin(self) -> None:
        if self.process is not None:
            return
        with interrupt_waits():
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tunewright.launch.launcher"],
                stdin=subprocess.PIPE,
                encoding="utf-8",
                env=without_ranks(os.environ),
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def launch(self, command: Command, log: Path) -> subprocess.Popen[str]:
        """Start the ranks and return the process that does; what it says itself goes into the log."""
        self.begin()
        process, self.process = self.process, None
        assert process is not None
        assert process.stdin is not None
        env = {**command.env, "TUNEWRIGHT_LAUNCHER_PID": str(os.getpid())}
        with suppress(BrokenPipeError), process.stdin as told:  # it ended by itself: seen when it is waited for
            json.dump({"arguments": command.arguments, "env": env, "log": str(log)}, told)
        return process

    def stop(self) -> None:
        """End a process that was begun and is not needed."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def run_ranks(command: Command, run: RunDir, launcher: AccelerateLauncher, say: Callable[[str], None] = print) -> int:
    """Run the command to its end and return the exit code that says how it went.

    Success is the manifest's `done`, which the first rank writes after the result was verified: ranks have been seen
    to die in their teardown after a good run.
    """
    log_path = run.logs / "launch.log"
    log_path.touch()
    started, said = time.time(), log_path.stat().st_size  # the logs of earlier attempts are kept
    if _wait(launcher.launch(command, log_path)):
        run.update_manifest(status="stopped")
        say(stopped(run))
        return INTERRUPTED
    if run.read_manifest().get("status") == "done":
        return 0
    run.update_manifest(status="failed")
    error = first_error(run, log_path, since=started, offset=said)
    say(f"Rank {error.rank} failed with {error.kind}: {error.message}\n  log: {error.log}")
    return error.exit_code


def stopped(run: RunDir) -> str:
    """Return what the user is told of a run that was stopped: what there is to go on from."""
    checkpoint = run.last_checkpoint()
    if checkpoint:
        return f"Stopped. The same command with resume=auto goes on from {checkpoint.name}. Logs: {run.logs}"
    return (
        f"Stopped before a checkpoint was written: the same command with resume=auto starts from the beginning. How "
        f"often one is written, train.save_steps says. Logs: {run.logs}"
    )


def _wait(process: subprocess.Popen[str]) -> bool:
    """Wait for the process; return True when a signal to this process ended it early."""
    received: list[int] = []

    def on_signal(number: int, frame: object) -> None:
        received.append(number)
        _end(process)

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return bool(received)


def _end(process: subprocess.Popen[str]) -> None:
    """Ask the launcher to end its ranks, and kill everything that is still there after a grace period."""
    ranks = _descendants(process.pid)
    for pid in (process.pid, *ranks):
        _signal(pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline and any(_alive(pid) for pid in (*ranks, process.pid)):
        process.poll()  # reaps it, so that it does not count as alive
        time.sleep(0.05)
    for pid in (*ranks, process.pid):
        if _alive(pid):
            _signal(pid, signal.SIGKILL)


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):  # it ended by itself in the meantime
        os.kill(pid, number)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def _descendants(pid: int) -> list[int]:
    """Return every process below `pid`; ranks are sessions of their own, so the process group does not hold them."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended while we looked
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, queue = [], [pid]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def first_error(run: RunDir, launch_log: Path, *, since: float = 0.0, offset: int = 0) -> RankError:
    """Return the failure that the others followed from: the earliest that is not the loss of a peer.

    Of this attempt alone, which began at the time `since` and at the byte `offset` of the launcher's log.
    """
    records = [json.loads(path.read_text(encoding="utf-8")) for path in run.logs.glob("rank*.error.json")]
    records = [record for record in records if record["time"] >= since]
    own = [record for record in records if record["exit_code"] != EXIT_CODES["PeerError"]]
    report = launch_log.read_bytes()[offset:].decode(errors="replace")
    killed = _killed_rank(report)
    if own:
        record = min(own, key=lambda record: record["time"])
        log = run.logs / f"rank{record['rank']}.log"
        return RankError(record["rank"], record["type"], record["message"], record["exit_code"], log)
    if killed:
        rank, number = killed
        name = signal.Signals(number).name
        hint = " (out of memory is the usual cause)" if number == signal.SIGKILL else ""
        log = run.logs / f"rank{rank}.log"
        return RankError(rank, name, f"ended by signal {number}{hint}. {_tail(log)}", EXIT_CODES["PeerError"], log)
    if records:
        record = min(records, key=lambda record: record["time"])
        log = run.logs / f"rank{record['rank']}.log"
        return RankError(record["rank"], record["type"], record["message"], record["exit_code"], log)
    return RankError(0, "an unexplained exit", f"the launcher's last lines:\n{_tail(launch_log)}", 70, launch_log)


def _killed_rank(report: str) -> tuple[int, int] | None:
    """Return (rank, signal) of a rank that a signal ended, from torchrun's report.

    Not SIGTERM, with which torchrun ends the ranks that are left. Its "root cause" is the failure that it saw first,
    which may be a peer's.
    """
    for found in re.finditer(r"rank\s*:\s*(\d+)[^\n]*\n\s*exitcode\s*:\s*-(\d+)", report):
        if int(found.group(2)) != signal.SIGTERM:
            return int(found.group(1)), int(found.group(2))
    return None


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    return "\n".join(f"    {line}" for line in lines[-TAIL_LINES:])
