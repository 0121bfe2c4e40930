"""A rank that is frozen: found by its silence within the set time, named, and ended, under every strategy."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import psutil
import pytest

from tests.conftest import losses, manifest
from tests.running import SOON, Started, assert_gone
from tunewright.beats import Beat, Listener
from tunewright.trainer.process_group import limit_waiting
from tunewright.trainer.pulse import where

TIMEOUT_MINUTES = 0.5
ENDLESS = ["train.logging_steps=1", "train.max_steps=100000", "data.eval_names=[]", "train.save_steps=0"]


@pytest.mark.parametrize(
    ("strategy", "ranks"),
    [
        ("zero2", 2),
        pytest.param("single", 1, marks=pytest.mark.slow),
        pytest.param("ddp", 2, marks=pytest.mark.slow),
        pytest.param("zero1", 2, marks=pytest.mark.slow),
        pytest.param("zero3", 2, marks=pytest.mark.slow),
    ],
)
def test_a_frozen_rank_ends_the_run_within_the_set_time(
    strategy: str, ranks: int, start: Callable[..., Started]
) -> None:
    settings = [f"strategy={strategy}", f"cluster.num_processes={ranks}", f"train.timeout_minutes={TIMEOUT_MINUTES}"]
    running = start("frozen", *ENDLESS, *settings)
    running.wait_for_step(2)
    processes = running.ranks()
    frozen = processes[-1]
    frozen.send_signal(signal.SIGSTOP)  # that one sleeps for a moment ends nothing
    time.sleep(3)
    frozen.send_signal(signal.SIGCONT)
    running.wait_for_step(len(losses(running.run)) + 5)
    frozen.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    assert running.process.wait(timeout=TIMEOUT_MINUTES * 60 + SOON) == 6
    assert time.monotonic() - began > TIMEOUT_MINUTES * 60 / 2
    assert_gone(processes)
    shown = running.output.read_text()
    me = f"rank {ranks - 1} on {os.uname().nodename} (process {frozen.pid})"
    assert f"Rank {ranks - 1} failed with silence: {me} has been silent since" in shown
    assert ", in step " in shown
    assert "out of memory" not in shown
    assert manifest(running.run)["status"] == "failed"
    if ranks == 2:  # where the other one waited, is in its log
        assert "most recent call first" in (running.run / "logs" / "rank0.log").read_text()


@pytest.mark.slow
def test_a_frozen_rank_of_the_users_own_launch_is_named_and_ended_by_the_other(start: Callable[..., Started]) -> None:
    """The first one here, which the others do not hear through anybody else."""
    program = ("-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2", "--multi_gpu")
    timeout = f"train.timeout_minutes={TIMEOUT_MINUTES}"
    running = start("frozen", *ENDLESS, timeout, program=(*program, "-m", "tunewright.launch.rank"))
    running.wait_for_step(2)
    processes = running.ranks()
    processes[0].send_signal(signal.SIGSTOP)
    assert running.process.wait(timeout=TIMEOUT_MINUTES * 60 + SOON) == 1  # torchrun's
    assert_gone(processes)
    shown = running.output.read_text()
    assert "Rank 1 failed: PeerError: Rank 0 on " in shown
    assert f"(process {processes[0].pid}) has been silent since" in shown
    assert "exitcode  : 6" in shown


def test_a_launcher_that_cannot_listen_says_so(tmp_path: Path) -> None:
    from tunewright.launch.watchdog import Watch

    deep = tmp_path / ("deep" * 30)
    deep.mkdir()
    said: list[str] = []
    with Watch(deep, 1.0, said.append) as watch:
        assert watch.frozen is None
    assert "Ranks are not heard by their launcher" in said[0]


def test_collectives_of_every_group_wait_no_longer_than_is_set(tmp_path: Path) -> None:
    """DeepSpeed's own groups, too, which it makes without naming a timeout."""
    import torch
    from torch import distributed

    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(minutes=7))
    try:
        groups = [distributed.group.WORLD, distributed.new_group([0])]
        limit_waiting(0.5)
        waits = [group._get_backend(torch.device("cpu")).options._timeout for group in groups]
        assert waits == [timedelta(seconds=30)] * 2
    finally:
        distributed.destroy_process_group()


def test_where_a_thread_is_has_its_collective_and_what_it_is_part_of() -> None:
    import torch

    seen = []

    class Looks(torch.autograd.Function):
        @staticmethod
        def forward(context: object, value: torch.Tensor) -> torch.Tensor:
            return value * 1

        @staticmethod
        def backward(context: object, gradient: torch.Tensor) -> torch.Tensor:
            import sys

            seen.append(where(sys._getframe()))
            return gradient

    Looks.apply(torch.ones(1, requires_grad=True)).backward()
    assert seen == [("backward", "")]


def beat(rank: int, at: float, **more: object) -> Beat:
    return Beat(rank, "host", 1, at, step=3, doing="backward", collective="all_reduce", **more)


def test_who_is_silent_is_judged_by_the_listeners_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("tunewright.beats.time.monotonic", lambda: now[0])
    listener = Listener(interval=1.0, patience=10.0, expected=[1, 2])

    def pass_time(seconds: int, *beating: int) -> int | None:
        silent = None
        for _ in range(seconds):
            now[0] += 1
            for rank in beating:
                listener.take(beat(rank, at=now[0] - 3600))  # clocks of machines differ
            silent = listener.silent()
        return silent

    assert pass_time(9, 1) is None
    assert pass_time(3, 1) == 2  # never heard at all
    listener.take(beat(2, at=5.0))
    assert pass_time(20, 1, 2) is None
    now[0] += 1000  # this process was stopped, so it has heard nobody
    assert pass_time(5) is None
    assert pass_time(8, 2) == 1
    listener.take(beat(1, at=9.0, ended=True))
    assert pass_time(50, 2) is None
    assert listener.told() == "  rank 2 on host (process 1) at " + str(listener.beats[2]).split(" at ")[1]
    assert "in step 3 (backward, all_reduce)" in listener.told()


def test_a_rank_that_does_nothing_is_said_once_with_its_stack(tmp_path: Path) -> None:
    """It lives, so it is not ended: a slow disk may hold it."""
    import json
    import socket
    import subprocess
    import sys

    from tunewright.launch.watchdog import Watch

    code = "import faulthandler, signal, time; faulthandler.register(signal.SIGUSR2); print(flush=True); time.sleep(99)"
    idle = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert idle.stdout
    idle.stdout.readline()
    said: list[str] = []
    with Watch(tmp_path, 0.05, said.append), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as mouth:
        deadline = time.monotonic() + SOON
        while not said or time.monotonic() < deadline - SOON + 8:
            assert time.monotonic() < deadline
            told = Beat(0, "host", idle.pid, time.time(), step=3, doing="saving a checkpoint", collective="")
            mouth.sendto(json.dumps(vars(told)).encode(), str(tmp_path / "beats"))
            time.sleep(0.2)
    assert psutil.pid_exists(idle.pid)
    idle.terminate()
    assert len(said) == 1
    assert "has done nothing for 0.05 minutes, in step 3 (saving a checkpoint)" in said[0]
    assert "most recent call first" in idle.communicate()[1]
