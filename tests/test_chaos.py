"""The strongest test: kills, damage, full disks, freezes and requests to stop at random, begun again until it is done.

However often, the run ends in the bits of one that nothing happened to, with not a step more, and each attempt ends
with an exit code that tells a scheduler to start it again. `make test` does it for two minutes, `make test-chaos` for
an hour: CHAOS_SECONDS says how long, CHAOS_SEED repeats one.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.conftest import manifest
from tests.faults import DAMAGE, Fault, planned
from tests.running import Started, assert_gone
from tests.test_faults import assert_same
from tunewright.checkpoints import listed, problems_of

STEPS = 24
LONGEST = 400  # seconds of one attempt, on a busy machine
FROZEN = "train.timeout_minutes=0.5"  # of an attempt in which a rank is frozen
DISK = 128 * 2**20  # bytes: room for a few checkpoints of every kind, and for what is damaged and set aside


@dataclass(frozen=True)
class Kind:
    """What is trained, on how many ranks, and the seconds added to each step, so that something can happen in one."""

    settings: list[str]
    ranks: int = 2
    slow: float = 0.15


# Without `save_steps` the time decides, and the first checkpoint of a run this small comes after ten seconds.
KINDS = {
    "single-lora": Kind(["strategy=single", "train.save_steps=3"], 1),
    "zero2-lora": Kind(["strategy=zero2", "train.save_steps=4"]),
    "zero3-full": Kind(["strategy=zero3", "method=full", "train.save_steps=5"]),
    "single-full": Kind(["strategy=single", "method=full", "model.dtype=bfloat16"], 1, slow=0.8),
    "ddp-qlora": Kind(["strategy=ddp", "method=qlora", "train.save_steps=7"]),
    "zero2-full": Kind(["strategy=zero2", "method=full", "train.save_steps=4", "data.packing=true"]),
    "zero3-lora": Kind(["strategy=zero3"], slow=0.8),
    "single-stream": Kind(["strategy=single", "data.streaming=true", "train.save_steps=2"], 1),
}
PHASES = ("before_step", "before_optimizer", "after_step", "save:*", "save:before_commit", "save:after_commit")
PHASES += ("save:before_discard", "train_end", "before_final", "final:*", "final:before_commit")
REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
FINISHED = {0}  # before anything happened to it
RANK_GONE = {6}
STOPPED = {75, 130}
FULL = {4}


class Chaos:
    """One kind of run, again and again, with faults at random.

    Args:
        disk: a folder for the runs, whose disk is small, or None.
    """

    def __init__(self, kind: Kind, seed: int, root: Path, model: Path, disk: Path | None) -> None:
        self.kind, self.random, self.root, self.disk = kind, random.Random(seed), root, disk
        self.history = [f"CHAOS_SEED={seed}"]
        self.faults = self.lives = 0
        few = [f"train.max_steps={STEPS}", "train.global_batch_size=4", "train.logging_steps=1"]
        known = ["model=folder", f"model.path={model}", "data.eval_names=[]", "train.learning_rate=1e-2"]
        dropout = [] if "method=full" in kind.settings else ["method.dropout=0.1"]
        self.settings = [*known, *few, *dropout, *kind.settings]
        if "data.streaming=true" not in kind.settings:
            self.settings.append("data.max_samples=30")
        self.whole, self.seconds = self._uninterrupted()

    def _uninterrupted(self) -> tuple[Path, float]:
        begun = time.monotonic()
        started = self._start(self.root, "whole")
        assert started.process.wait(timeout=LONGEST) == 0, started.told()
        return started.run, time.monotonic() - begun

    def _start(self, root: Path, name: str, *faults: Fault, also: Sequence[str] = ()) -> Started:
        env = planned(*faults, log=self.root / "struck.txt")
        return Started(root, name, *self.settings, *also, "resume=auto", **env, FAULTS_STEP_SECONDS=str(self.kind.slow))

    def live(self, most: int) -> None:
        """Have a run from its start to its end, with up to so many faults."""
        self.lives += 1
        name, root = f"life{self.lives}", self.root
        if self.disk and self.random.random() < 0.5:
            root = self.disk
        happenings: list[Callable[[Path, str], bool]] = [self._planned] * 4 + [self._killed] * 4 + [self._asked] * 4
        happenings += [self._asked_twice, self._rank_asked] + ([self._frozen] if self.kind.ranks > 1 else [])
        happenings += [self._full] * 4 if root == self.disk else []
        for _ in range(most):
            if self.random.choice(happenings)(root, name):
                break
            if self.random.random() < 0.4:
                self._damage(root / name)
        else:
            self._attempt(self._start(root, name), "nothing", FINISHED)
        assert_same(root / name, self.whole)
        assert manifest(root / name)["steps"] == STEPS
        shutil.rmtree(root / name)
        shutil.rmtree(root / ".trash", ignore_errors=True)

    # What happens. Each returns whether the run is done all the same.

    def _planned(self, root: Path, name: str) -> bool:
        """A kill, or a disk that is full, at a phase of one rank."""
        phase = self.random.choice(PHASES)
        kind = self.random.choice(["SIGKILL", "SIGKILL", "ENOSPC"]) if phase in ("save:*", "final:*") else "SIGKILL"
        in_save = phase.startswith("save") and phase != "save:*"
        rank = 0 if in_save or phase.startswith("final") else self.random.randrange(self.kind.ranks)
        half = STEPS // 2
        passed = {"save:*": 30, "final:*": 6, "before_step": half, "before_optimizer": half, "after_step": half}
        passed |= {"save:before_commit": 3, "save:after_commit": 3}
        skip = self.random.randrange(passed.get(phase, 1))
        fault = Fault(kind, phase, rank=rank, skip=skip)
        return self._attempt(self._start(root, name, fault), str(fault), FULL if kind == "ENOSPC" else RANK_GONE)

    def _killed(self, root: Path, name: str) -> bool:
        """A rank, the launcher, or everything."""
        started, whom = self._start(root, name), self.random.choice(["rank", "launcher", "everything"])
        self._pass_time(started)
        ranks = started.ranks()
        if whom == "rank" and not ranks:
            whom = "launcher"
        below = started.below()
        allowed = {-signal.SIGKILL}
        if whom == "rank":
            allowed = RANK_GONE
            with suppress(psutil.NoSuchProcess):
                self.random.choice(ranks).kill()
        elif whom == "launcher":
            with suppress(psutil.NoSuchProcess):
                started.process.kill()
        else:
            started.kill()
        done = self._attempt(started, f"SIGKILL to {whom}", allowed)
        assert_gone(below)
        return done

    def _asked(self, root: Path, name: str) -> bool:
        """To stop: the launcher."""
        started, number = self._start(root, name), self.random.choice(REQUESTS)
        self._pass_time(started)
        # Before it listens, a signal ends it as it ends any process.
        allowed = STOPPED if started.ranks() else {*STOPPED, -number}
        with suppress(psutil.NoSuchProcess):
            started.process.send_signal(number)
        return self._attempt(started, number.name, allowed)

    def _asked_twice(self, root: Path, name: str) -> bool:
        started = self._start(root, name)
        self._pass_time(started)
        allowed = STOPPED if started.ranks() else {*STOPPED, -signal.SIGTERM}
        for _ in range(2):
            with suppress(psutil.NoSuchProcess):
                started.process.send_signal(signal.SIGTERM)
            time.sleep(self.random.uniform(0, 4))  # within two seconds they are one request
        return self._attempt(started, "SIGTERM twice", allowed)

    def _rank_asked(self, root: Path, name: str) -> bool:
        """To stop: one rank, by whoever took it for the job."""
        fault = Fault("SIGTERM", "before_optimizer", rank=self.random.randrange(self.kind.ranks), skip=5)
        return self._attempt(self._start(root, name, fault), str(fault), {75, *RANK_GONE})

    def _frozen(self, root: Path, name: str) -> bool:
        rank, phase = self.random.randrange(self.kind.ranks), self.random.choice(["before_step", "before_optimizer"])
        fault = Fault("SIGSTOP", phase, rank=rank, skip=self.random.randrange(STEPS // 2))
        return self._attempt(self._start(root, name, fault, also=[FROZEN]), str(fault), RANK_GONE)

    def _full(self, root: Path, name: str) -> bool:
        """A disk that somebody fills up, before the start or meanwhile, and empties again."""
        assert self.disk
        ballast, left = self.disk / "ballast", self.random.randrange(DISK // 2 ** self.random.randrange(3, 8))
        begun = self.random.random() < 0.7
        started = self._start(root, name) if begun else None
        if started:
            self._pass_time(started)
        size = max(shutil.disk_usage(self.disk).free - left, 0)
        with suppress(OSError), ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
        try:
            started = started or self._start(root, name)
            told = f"{left:,} bytes left on the disk {'meanwhile' if begun else 'at the start'}"
            return self._attempt(started, told, FULL)
        finally:
            ballast.unlink(missing_ok=True)

    def _damage(self, run: Path) -> None:
        """Of the newest checkpoint, where another one is whole, or of what is written about the run."""
        checkpoints = listed(run / "checkpoints") if run.is_dir() else []
        whole = [path for path in checkpoints if problems_of(path, hashed=False) == []]
        if not whole:
            return
        if len(whole) > 1 and self.random.random() < 0.7:
            files = sorted(path for path in whole[0].rglob("*") if path.is_file() and path.stat().st_size > 1)
        else:
            files = [file for file in (run / "manifest.json", run / "config.yaml") if file.is_file()]
        if not files:
            return
        file = self.random.choice(files)
        # Of the manifest, JSON that cannot be read; a digit in it may be anything.
        damage = "remove" if file.parent == run else self.random.choice(list(DAMAGE))
        DAMAGE[damage](file, self.random.random())
        self.faults += 1
        self._note(f"{damage} {file.relative_to(run)}")

    # How it ends

    def _pass_time(self, started: Started) -> None:
        deadline = time.monotonic() + self.random.uniform(0.1, 0.9) * self.seconds
        while time.monotonic() < deadline and started.process.poll() is None:
            time.sleep(0.05)

    def _attempt(self, started: Started, what: str, allowed: set[int]) -> bool:
        begun = time.monotonic()
        try:
            code = started.process.wait(timeout=LONGEST)
        except psutil.TimeoutExpired:
            told = started.told()
            started.kill()
            raise AssertionError("\n".join(["it hangs", *self.history, what, told])) from None
        self._note(f"{what}: {code} after {time.monotonic() - begun:.0f} s, {self._stands(started.run)}")
        assert code in allowed | FINISHED, "\n".join([*self.history, started.told()])
        assert "Traceback" not in started.output.read_text(), "\n".join([*self.history, started.told()])
        self.faults += code != 0
        return code == 0

    def _stands(self, run: Path) -> str:
        names = [path.name for path in listed(run / "checkpoints")] if run.is_dir() else []
        return f"{run.name} has {', '.join(names) or 'no checkpoint'}"

    def _note(self, line: str) -> None:
        self.history.append(line)
        print(line, flush=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path | None]:
    """A small disk, where mounting is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    size = f"size={DISK}"
    mounted = not subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], capture_output=True).returncode
    yield folder if mounted else None
    if mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


def seed() -> int:
    return int(os.environ.get("CHAOS_SEED", time.time_ns() % 100_000))


@pytest.mark.parametrize("kind", ["single-lora", "zero2-lora"])
def test_a_minute_of_chaos(kind: str, small_model: Path, tmp_path: Path, disk: Path | None) -> None:
    begun = time.monotonic()
    chaos = Chaos(KINDS[kind], seed(), tmp_path, small_model, disk)
    while chaos.faults < 3 or time.monotonic() - begun < 45:
        chaos.live(most=3)


@pytest.mark.chaos
def test_an_hour_of_chaos(small_model: Path, tmp_path: Path, disk: Path | None) -> None:
    end = time.monotonic() + float(os.environ.get("CHAOS_SECONDS", "3600"))
    chosen, number = os.environ.get("CHAOS_KINDS", ",".join(KINDS)).split(","), seed()
    faults = 0
    while time.monotonic() < end:
        for kind in chosen:
            if time.monotonic() < end:
                number += 1
                root = tmp_path / f"{kind}-{number}"
                root.mkdir()
                print(f"{kind}, {(end - time.monotonic()) / 60:.0f} minutes left, {faults} faults so far", flush=True)
                chaos = Chaos(KINDS[kind], number, root, small_model, disk)
                chaos.live(most=8)
                faults += chaos.faults
                shutil.rmtree(root)
    assert faults
