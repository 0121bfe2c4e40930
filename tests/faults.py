"""What a test of faults needs: a plan of them by phase, and damage to files. Trainings beside the test: `running.py`.

The phases are in `tests/faulty/sitecustomize.py`, which strikes in the ranks; the product has no hook for tests.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.conftest import REPOSITORY

FAULTY = REPOSITORY / "tests" / "faulty"


@dataclass(frozen=True)
class Fault:
    """One fault, which strikes once.

    Args:
        kind: the name of a signal; or of an `errno`, for an OSError; or "exception".
        phase: before_step, before_optimizer, after_step, eval, train_end, before_final, tokenize; save:FILE,
            save:before_commit, save:before_discard (of an old one), save:after_commit; final:FILE,
            final:before_commit; run:FILE, manifest or configuration. `*` stands for anything.
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
