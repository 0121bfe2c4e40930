"""Start the ranks of a run, watch them, and say in one place what went wrong and in which rank.

The first signal that asks to stop is passed on to the ranks, which save a checkpoint and end; a second one ends them at
once. No rank outlives this process: Linux kills the ranks when their launcher dies.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from tunewright.checkpoints import discard_part
from tunewright.errors import EXIT_CODES, Preempted
from tunewright.launch.children import OUT_OF_MEMORY, kill, start
from tunewright.launch.command import RANK_MODULE, Command
from tunewright.launch.watchdog import Watch
from tunewright.ranks import LAUNCHED_BY, SPARE_ERRORS
from tunewright.run_folder import RunDir
from tunewright.stop_signals import STOP_SIGNALS, Requests, heard_by
from tunewright.terminal import begin_line

TAIL_LINES = 15
MEMORY = "/dev/shm"
LOOK_SECONDS = 0.2  # between two looks at what signals asked for
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
    command: Command,
    run: RunDir,
    say: Callable[[str], None] = print,
    *,
    timeout_minutes: float = 10.0,
    quiet: bool = False,
) -> int:
    """Run the command to its end and return the exit code that says how it went.

    A rank that is silent for nearly `timeout_minutes` is ended. With `quiet`, what ranks print goes to the log.

    Success is the manifest's `done`, which the first rank writes after the result was verified: ranks have been seen
    to die in their teardown after a good run.
    """
    log_path = run.logs / "launch.log"
    log_path.touch()
    started, said = time.time(), log_path.stat().st_size  # the logs of earlier attempts are kept
    requests = Requests()
    # In memory where there is such a place: the disk of the run may be the one that is full.
    with (
        TemporaryDirectory(prefix="tunewright-", dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as spare,
        Watch(Path(spare), timeout_minutes, say) as watch,
    ):
        with heard_by(lambda number, frame: requests.hear(number)):
            with log_path.open("a") as log:
                process = start(
                    command.program + command.arguments,
                    {**command.env, LAUNCHED_BY: str(os.getpid()), SPARE_ERRORS: spare},
                    # torchrun would end its ranks, and a rank that hears nothing yet would die.
                    held_back=STOP_SIGNALS,
                    stdin=subprocess.DEVNULL,
                    stdout=log if quiet else None,
                    stderr=log,
                )
            _watch(process, requests, say)
        if run.read_manifest().get("status") == "done":
            return 0
        error = first_error(run, log_path, since=started, offset=said, spare=Path(spare), asked=bool(requests.first))
        if watch.frozen:  # and the others failed with it
            rank = watch.frozen.rank
            error = RankError(rank, "silence", watch.told(), EXIT_CODES["PeerError"], run.logs / f"rank{rank}.log")
    discard_part(run.checkpoints)
    begin_line()
    if requests.again or error.exit_code == Preempted.exit_code:
        _mark(run, "stopped", say)
        say(stopped(run))
        return INTERRUPTED if requests.again else error.exit_code
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
        return f"Stopped. `tunewright resume {run.path}` goes on from {checkpoint.name}. Logs: {run.logs}"
    return (
        f"Stopped before a checkpoint was written: `tunewright resume {run.path}` starts from the beginning. How "
        f"often one is written, train.save_steps says. Logs: {run.logs}"
    )


def _watch(process: subprocess.Popen[str], requests: Requests, say: Callable[[str], None]) -> None:
    """Wait for the process, and pass on what signals ask for."""
    told: set[int] = set()
    said = False
    while process.poll() is None:
        with suppress(subprocess.TimeoutExpired):
            process.wait(LOOK_SECONDS)
        if requests.again:
            kill(process)
        elif requests.first:
            if not said:
                begin_line()
                say(f"{requests.first}: stopping at the end of this step, with a checkpoint. Once more stops at once.")
            said = True
            told |= _ask_ranks(process, told)


def _ask_ranks(process: subprocess.Popen[str], told: set[int]) -> set[int]:
    """Ask the ranks to stop that have not been `told` yet, and return their process ids.

    They are children of accelerate, which runs torchrun's agent in its own process; some may not have been started yet.
    """
    asked = set()
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children():
            with suppress(psutil.NoSuchProcess):
                if child.pid not in told and RANK_MODULE in child.cmdline():
                    child.send_signal(signal.SIGTERM)
                    asked.add(child.pid)
    return asked


def first_error(
    run: RunDir,
    launch_log: Path,
    *,
    since: float = 0.0,
    offset: int = 0,
    spare: Path | None = None,
    asked: bool = False,
) -> RankError:
    """Return the failure that the others followed from: the earliest that is not the loss of a peer.

    Of this attempt alone, which began at the time `since` and at the byte `offset` of the launcher's log. `spare` is
    where ranks write when the run's folder has no room. Unless the launcher was `asked` to stop, a rank that was killed
    comes before those that were asked to: torchrun asks the others by the same signal.
    """
    folders = [run.logs, *([spare] if spare else [])]
    files = [path for folder in folders for path in folder.glob("rank*.error.json")]
    records = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    records = [record for record in records if record["time"] >= since]
    by_code: dict[int, list[dict[str, Any]]] = {}
    for record in sorted(records, key=lambda record: record["time"]):
        by_code.setdefault(record["exit_code"], []).append(record)
    stopped, lost = by_code.pop(Preempted.exit_code, []), by_code.pop(EXIT_CODES["PeerError"], [])
    own = [record for records in by_code.values() for record in records]
    killed = _killed_rank(launch_log.read_bytes()[offset:].decode(errors="replace"))
    if own:
        return _recorded(run, min(own, key=lambda record: record["time"]))
    if killed and not (asked and stopped):
        rank, number = killed
        hint = OUT_OF_MEMORY if number == signal.SIGKILL else ""
        log = run.logs / f"rank{rank}.log"
        told = f"ended by signal {number}{hint}. {_tail(log)}"
        return RankError(rank, signal.Signals(number).name, told, EXIT_CODES["PeerError"], log)
    if stopped or lost:
        return _recorded(run, (stopped or lost)[0])
    return RankError(0, "an unexplained exit", f"the launcher's last lines:\n{_tail(launch_log)}", 70, launch_log)


def _recorded(run: RunDir, record: dict[str, Any]) -> RankError:
    log = run.logs / f"rank{record['rank']}.log"
    return RankError(record["rank"], record["type"], record["message"], record["exit_code"], log)


def _killed_rank(report: str) -> tuple[int, int] | None:
    """Return (rank, signal) of a rank that a signal ended, from torchrun's report, or accelerate's on one device.

    Not SIGTERM, with which torchrun ends the ranks that are left. Its "root cause" is the failure that it saw first,
    which may be a peer's.
    """
    alone = re.search(r"died with <Signals\.\w+: (\d+)>", report)
    if alone:
        return 0, int(alone[1])
    for found in re.finditer(r"rank\s*:\s*(\d+)[^\n]*\n\s*exitcode\s*:\s*-(\d+)", report):
        if int(found.group(2)) != signal.SIGTERM:
            return int(found.group(1)), int(found.group(2))
    return None


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    return "\n".join(f"    {line}" for line in lines[-TAIL_LINES:])
