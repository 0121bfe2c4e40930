"""Trainings that run beside a test, and are signalled, killed or watched meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from tests.conftest import REPOSITORY, losses

SOON = 30  # seconds: "at once" on a busy machine
TUNEWRIGHT_TRAIN = ("-m", "tunewright.launch.cli", "train")


class Started:
    """A training that runs beside the test, by `tunewright train` unless a `program` is given."""

    def __init__(
        self, root: Path, name: str, *overrides: str, program: Sequence[str] = TUNEWRIGHT_TRAIN, **env: str
    ) -> None:
        self.run = root / name
        self.output = root / f"{name}.txt"
        command = [sys.executable, *program, f"output_root={root}", f"name={name}", *overrides]
        with self.output.open("w") as output:
            self.process = psutil.Popen(
                command, cwd=REPOSITORY, env={**os.environ, **env}, stdout=output, stderr=subprocess.STDOUT
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
        """Every process that the launcher has started, and theirs."""
        with suppress(psutil.NoSuchProcess):
            return list(self.process.children(recursive=True))
        return []

    def ranks(self) -> list[psutil.Process]:
        """The processes of the ranks, in the order of their ranks."""
        ranks = []
        for child in self.below():
            with suppress(psutil.NoSuchProcess):
                command = set(child.cmdline())
                if command & {"tunewright.trainer", "tunewright.launch.rank"} and "launch" not in command:
                    ranks.append((int(child.environ().get("RANK", "0")), child))
        return [child for _, child in sorted(ranks, key=lambda found: found[0])]

    def wait_for_ranks(self, count: int) -> list[psutil.Process]:
        deadline = time.monotonic() + 120
        while len(ranks := self.ranks()) < count:
            assert time.monotonic() < deadline, self.output.read_text()
            assert self.process.poll() is None, self.output.read_text()
            time.sleep(0.05)
        return ranks

    def kill(self) -> None:
        """Kill the launcher and everything below it."""
        for process in [*self.below(), self.process]:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def told(self) -> str:
        """What the launcher has printed, and the ends of the logs."""
        logs = [f"{log.name}:\n{log.read_text()[-3000:]}" for log in sorted((self.run / "logs").glob("*.log"))]
        return "\n".join([self.output.read_text(), *logs])


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=SOON)
    assert not alive
