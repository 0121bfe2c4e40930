"""Start the ranks of a run, watch them, and say in one place what went wrong and in which rank.

No rank outlives this process: Ctrl-C and SIGTERM are passed on, and Linux kills the ranks when their launcher dies.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tunewright.checkpoints import discard_part
from tunewright.errors import EXIT_CODES
from tunewright.launch.children import end, start
from tunewright.launch.command import Command
from tunewright.launch.watchdog import Watch
from tunewright.ranks import LAUNCHED_BY, SPARE_ERRORS
from tunewright.run_folder import RunDir
from tunewright.terminal import begin_line

TAIL_LINES = 15
MEMORY = "/dev/shm"
INTERRUPTED = 130  # what a shell reports for Ctrl-C


@dataclass(frozen=True)
class RankError:
    """How one rank ended."""

    rank: int
    kind: str
    message: str
    exit_code: int
    log: Path


def run_ranks(
    command: Command, run: RunDir, say: Callable[[str], None] = print, *, timeout_minutes: float = 10.0
) -> int:
    """Run the command to its end and return the exit code that says how it went.

    A rank that is silent for nearly `timeout_minutes` is ended.

    Success is the manifest's `done`, which the first rank writes after the result was verified: ranks have been seen
    to die in their teardown after a good run.
    """
    log_path = run.logs / "launch.log"
    log_path.touch()
    started, said = time.time(), log_path.stat().st_size  # the logs of earlier attempts are kept
    # In memory where there is such a place: the disk of the run may be the one that is full.
    with (
        TemporaryDirectory(prefix="tunewright-", dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as spare,
        Watch(Path(spare), timeout_minutes, say) as watch,
    ):
        with log_path.open("a") as log:
            process = start(
                command.program + command.arguments,
                {**command.env, LAUNCHED_BY: str(os.getpid()), SPARE_ERRORS: spare},
                stdin=subprocess.DEVNULL,
                stderr=log,
            )
        if _wait(process):
            _mark(run, "stopped", say)
            begin_line()
            say(stopped(run))
            return INTERRUPTED
        if run.read_manifest().get("status") == "done":
            return 0
        error = first_error(run, log_path, since=started, offset=said, spare=Path(spare))
        if watch.frozen:  # and the others failed with it
            rank = watch.frozen.rank
            error = RankError(rank, "silence", watch.told(), EXIT_CODES["PeerError"], run.logs / f"rank{rank}.log")
    discard_part(run.checkpoints)
    begin_line()
    say(f"Rank {error.rank} failed with {error.kind}: {error.message}\n  log: {error.log}")
    _mark(run, "failed", say)
    return error.exit_code


def _mark(run: RunDir, status: str, say: Callable[[str], None]) -> None:
    """Write into the manifest how it ended, as far as the disk has room."""
    try:
        run.update_manifest(status=status)
    except OSError as error:
        say(f"{run.manifest} still calls the run running: {error.strerror}.")


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
        end(process)

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return bool(received)


def first_error(
    run: RunDir, launch_log: Path, *, since: float = 0.0, offset: int = 0, spare: Path | None = None
) -> RankError:
    """Return the failure that the others followed from: the earliest that is not the loss of a peer.

    Of this attempt alone, which began at the time `since` and at the byte `offset` of the launcher's log. `spare` is
    where ranks write when the run's folder has no room.
    """
    folders = [run.logs, *([spare] if spare else [])]
    files = [path for folder in folders for path in folder.glob("rank*.error.json")]
    records = [json.loads(path.read_text(encoding="utf-8")) for path in files]
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
