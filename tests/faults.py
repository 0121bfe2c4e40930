"""What a test of faults needs: a plan of them by phase, trainings that run beside the test, and damage to files.

The phases are in `tests/faulty/sitecustomize.py`, which strikes in the ranks; the product has no hook for tests.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from tests.conftest import REPOSITORY, losses

FAULTY = REPOSITORY / "tests" / "faulty"
SOON = 60  # seconds: "at once" on a busy machine


@dataclass(frozen=True)
class Fault:
    """One fault, which strikes once.

    Args:
        kind: the name of a signal; or of an `errno`, for an OSError; or "exception".
        phase: before_step, before_optimizer, after_step, eval, train_end, before_final, tokenize; save:FILE,
            save:before_commit, save:before_discard (of an old one), save:after_commit; final:FILE,
            final:before_commit. `*` stands for anything.
        step: optimiser steps done at that time; None: any.
        rank: None: whichever comes there.
        skip: how often the phase is passed before.
        target: whom a signal is sent to: "rank" or "launcher".
    """

    kind: str
    phase: str
    step: int | None = None
    rank: int | None = None
    skip: int = 0
    target: str = "rank"


def planned(*faults: Fault, log: Path | None = None) -> dict[str, str]:
    """Return the environment of a process in which these strike, in itself and all below it."""
    paths = [str(FAULTY), *filter(None, [os.environ.get("PYTHONPATH")])]
    told = {"FAULTS_LOG": str(log)} if log else {}
    return {"PYTHONPATH": os.pathsep.join(paths), "FAULTS": json.dumps([asdict(fault) for fault in faults]), **told}


class Started:
    """A training that runs beside the test."""

    def __init__(self, root: Path, name: str, *overrides: str, **env: str) -> None:
        self.run, self.output = root / name, root / f"{name}.txt"
        command = [sys.executable, "-m", "tunewright.launch.cli", "train", f"output_root={root}", f"name={name}"]
        with self.output.open("w") as output:
            self.process = psutil.Popen(
                [*command, *overrides],
                cwd=REPOSITORY,
                env={**os.environ, **env},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            if (self.run / "metrics.jsonl").is_file() and len(losses(self.run)) >= step:
                return
            assert self.process.poll() is None, self.output.read_text()
            time.sleep(0.1)
        raise AssertionError(f"no step {step}: {self.output.read_text()}")

    def below(self) -> list[psutil.Process]:
        """Return every process that the launcher has started, and theirs."""
        with suppress(psutil.NoSuchProcess):
            return list(self.process.children(recursive=True))
        return []

    def ranks(self) -> list[psutil.Process]:
        """Return the processes of the ranks, in the order of their ranks."""
        found: list[tuple[int, psutil.Process]] = []
        for child in self.below():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                command = child.cmdline()
                if "tunewright.trainer" in command and "accelerate" not in str(command):
                    found.append((int(child.environ().get("RANK", "0")), child))
        return [child for _, child in sorted(found, key=lambda one: one[0])]

    def kill(self) -> None:
        """Kill the launcher and everything below it."""
        for process in [*self.below(), self.process]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def told(self) -> str:
        """Return what the launcher has printed, and the ends of the logs."""
        logs = [f"{log.name}:\n{log.read_text()[-3000:]}" for log in sorted((self.run / "logs").glob("*.log"))]
        return "\n".join([self.output.read_text(), *logs])


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=SOON)
    assert not alive


def flip(file: Path, where: float = 0.5) -> None:
    """Change one bit of a file; `where` is from 0, its beginning, to 1."""
    content = bytearray(file.read_bytes())
    content[min(int(where * len(content)), len(content) - 1)] ^= 1
    file.write_bytes(content)


def truncate(file: Path, where: float = 0.5) -> None:
    """Cut a file off."""
    os.truncate(file, int(where * file.stat().st_size))


def remove(file: Path, where: float = 0.0) -> None:
    file.unlink()


DAMAGE: dict[str, Callable[[Path, float], None]] = {"flip": flip, "truncate": truncate, "remove": remove}
KILLED = -signal.SIGKILL
