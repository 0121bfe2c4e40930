"""Two machines under the user's own `accelerate launch`: one training and one folder, or a refusal."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.conftest import losses, manifest
from tests.two_hosts import Host, needs_two_hosts, two_hosts

pytestmark = [needs_two_hosts, pytest.mark.slow]

TIMEOUT_MINUTES = 0.75
LONG = 240  # seconds for what takes 30 on a quiet machine
STANDARD = ("--use_deepspeed", "--zero_stage", "2", "--deepspeed_multinode_launcher", "standard")


class Launch:
    """`accelerate launch` on both hosts."""

    def __init__(self, root: Path, hosts: tuple[Host, Host]) -> None:
        self.root, self.hosts = root, hosts
        self.runs = root / "runs"
        self.runs.mkdir()
        self.started: list[subprocess.Popen[str]] = []

    def __call__(
        self, number: int, *settings: str, flags: tuple[str, ...] = STANDARD, own: Path | None = None, **env: str
    ) -> subprocess.Popen[str]:
        """Start the ranks of one host."""
        network = ("--main_process_ip", self.hosts[0].address, "--main_process_port", "29511")
        command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_machines", "2"]
        command += ["--num_processes", "2", "--machine_rank", str(number), *network, *flags]
        command += ["-m", "tunewright.launch.rank", "train.logging_steps=1", "data.eval_names=[]", *settings]
        command += [f"output_root={self.runs}", "name=two", f"train.timeout_minutes={TIMEOUT_MINUTES}"]
        with (self.root / f"{number}.txt").open("w") as output:
            path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # accelerate calls `deepspeed` by its name
            # Where it runs, accelerate leaves a file with the whole environment.
            self.started.append(self.hosts[number].start(command, output, cwd=self.root, own=own, PATH=path, **env))
        return self.started[-1]

    def said(self, number: int) -> str:
        return (self.root / f"{number}.txt").read_text()

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + LONG
        while not (self.runs / "two" / "metrics.jsonl").is_file() or len(losses(self.runs / "two")) < step:
            alive = all(process.poll() is None for process in self.started)
            assert alive, self.said(0) + self.said(1)
            assert time.monotonic() < deadline, self.said(0) + self.said(1)
            time.sleep(0.2)


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    with two_hosts() as hosts:
        both = Launch(tmp_path, hosts)
        yield both
        for process in both.started:
            with suppress(psutil.NoSuchProcess):
                for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                    one.kill()


def test_machines_that_would_each_train_alone_are_refused(launch: Launch) -> None:
    """Unless told otherwise, accelerate 1.15 uses DeepSpeed's launcher, which without a hostfile starts one alone."""
    alone = [launch(number, "train.max_steps=2", flags=STANDARD[:3]) for number in (0, 1)]
    assert all(process.wait(timeout=LONG) != 0 for process in alone)
    for number in (0, 1):
        assert "was asked for 2 processes on 2 machines, and this is rank 0 of 1 on 1 machine" in launch.said(number)
        assert "--deepspeed_multinode_launcher standard" in launch.said(number)
    assert not (launch.runs / "two").exists()


def test_two_machines_train_one_run_and_go_on_only_from_a_checkpoint_that_both_see(launch: Launch) -> None:
    for process in [launch(number, "train.max_steps=4", "train.save_steps=2") for number in (0, 1)]:
        assert process.wait(timeout=LONG) == 0, launch.said(0) + launch.said(1)
    assert manifest(launch.runs / "two")["distributed"]["hosts"] == ["0: host-a", "1: host-b"]
    # The second machine has a disk of its own under the same name.
    more = ("train.max_steps=6", "train.save_steps=2", "resume=auto")
    for process in [launch(0, *more), launch(1, *more, own=launch.runs)]:
        assert process.wait(timeout=LONG) != 0
    for number in (0, 1):
        assert "StorageError: host-b does not see" in launch.said(number)
        assert "To go on from checkpoint-4, all ranks need one folder" in launch.said(number)


def test_a_pulled_cable_ends_both_sides_and_each_names_the_other(launch: Launch) -> None:
    """On separate disks, which is allowed without checkpoints."""
    settings = ("train.max_steps=100000", "train.save_steps=0")
    both = [launch(0, *settings), launch(1, *settings, own=launch.runs)]
    launch.wait_for_step(3)
    assert "host-b does not see" in launch.said(0)
    cut = time.monotonic()
    launch.hosts[1].cut()
    assert all(process.wait(timeout=TIMEOUT_MINUTES * 60 + 90) != 0 for process in both)
    assert "PeerError: Rank 1 on host-b" in launch.said(0)
    assert "PeerError: Rank 0 on host-a" in launch.said(1)
    for number in (0, 1):
        assert "has been silent since" in launch.said(number)
        assert "exitcode  : 6" in launch.said(number)
    assert time.monotonic() - cut < TIMEOUT_MINUTES * 60 + 60


def test_a_stop_on_separate_disks_leaves_no_half_checkpoint(launch: Launch) -> None:
    """Each machine has a part of it, which would pass for a whole one."""
    settings = ("train.max_steps=100000", "train.save_steps=0")
    both = [launch(0, *settings), launch(1, *settings, own=launch.runs)]
    launch.wait_for_step(3)
    for process in psutil.Process(both[1].pid).children(recursive=True):
        if "tunewright.launch.rank" in process.cmdline() and "RANK" in process.environ():
            process.terminate()
    assert all(process.wait(timeout=LONG) != 0 for process in both)
    assert "StorageError: No checkpoint can be written: host-b and host-a do not share" in launch.said(0)
    assert not list((launch.runs / "two" / "checkpoints").glob("checkpoint-*"))


def test_what_ends_a_rank_on_one_machine_is_told_on_the_other(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import torch.optim.lr_scheduler as schedules\n"
        "    def broken(self, *args):\n"
        "        if self.last_epoch >= 2:\n"
        "            raise RuntimeError('the disk of this rank is on fire')\n"
        "        return step(self, *args)\n"
        "    step = schedules.LambdaLR.step\n"
        "    schedules.LambdaLR.step = broken\n"
    )
    both = [launch(number, "train.save_steps=0", PYTHONPATH=str(tmp_path)) for number in (0, 1)]
    assert all(process.wait(timeout=LONG) != 0 for process in both)
    assert "Rank 1 failed: RuntimeError: the disk of this rank is on fire" in launch.said(1)
    assert "Rank 0 failed: PeerError: " in launch.said(0)
    assert "Rank 1 on host-b failed with RuntimeError: the disk of this rank is on fire" in launch.said(0)


def test_a_machine_that_stays_alone_gives_up_after_what_torchrun_is_told(launch: Launch) -> None:
    alone = launch(0, flags=(*STANDARD, "--rdzv_conf", "timeout=10"))
    assert alone.wait(timeout=LONG) != 0
    assert "1/2 clients joined" in launch.said(0)


def test_a_second_machine_that_fails_before_it_joins_is_named(launch: Launch) -> None:
    first, second = launch(0), launch(1, "train.no_such=1")
    assert second.wait(timeout=LONG) != 0
    assert "train.no_such" in launch.said(1)
    assert first.wait(timeout=LONG) != 0
    assert "Rank 0 of 2 on host-a has waited" in launch.said(0)
    assert "for rank 1: look there for the reason" in launch.said(0)
