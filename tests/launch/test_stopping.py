"""Trainings that are asked to stop: what is saved, what is said, the exit code, and that no process is left."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.conftest import REPOSITORY, losses, manifest, write_checkpoint
from tests.running import SOON, Started, assert_gone
from tunewright.launch.supervise import stopped
from tunewright.run_folder import RunDir
from tunewright.stop_signals import RANK_STOP_SIGNALS, SAME_REQUEST_SECONDS

STEPS = ["train.logging_steps=1", "train.max_steps=12", "data.eval_names=[]", "cluster.threads_per_process=1"]
MANY = [*STEPS, "train.max_steps=2000"]  # it is stopped, whatever happens
STOPPING = 120  # seconds for a step and a checkpoint, on a busy machine


def assert_stopped(run: Started, ranks: list[psutil.Process]) -> int:
    """Look at what a request to stop has left, and return the step of the checkpoint."""
    assert run.process.wait(timeout=STOPPING) == 75, run.output.read_text()
    assert_gone(ranks)
    assert manifest(run.run)["status"] == "stopped"
    assert not (run.run / "final").exists()
    checkpoint = RunDir(run.run).last_checkpoint()
    assert checkpoint
    assert f"Stopped. `tunewright resume {run.run}` goes on from {checkpoint.name}" in run.output.read_text()
    step = int(checkpoint.name.rpartition("-")[2])
    assert len(losses(run.run)) == step
    return step


def test_a_run_that_was_stopped_ends_in_the_bits_of_one_that_was_not(
    start: Callable[..., Started], train: Callable[..., Path]
) -> None:
    settings = ["strategy=zero2", *STEPS, "method.dropout=0.1"]
    whole = train("not-stopped", *settings)
    run = start("stopped", *settings)
    run.wait_for_step(4)
    ranks = run.ranks()
    run.process.send_signal(signal.SIGUSR1)
    assert 4 <= assert_stopped(run, ranks) < 12

    again = start("stopped", *settings, "resume=auto", "train.grace_seconds=0.01")
    assert again.process.wait(timeout=240) == 0, again.output.read_text()
    assert "train.grace_seconds leaves 0.01 s between the request to stop and the kill" in again.output.read_text()
    assert losses(again.run) == losses(whole)
    weights = [run / "final" / "adapter_model.safetensors" for run in (again.run, whole)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_signal_to_one_rank_alone_stops_all_of_them(start: Callable[..., Started], tmp_path: Path) -> None:
    """And they wait until the checkpoint is in the second place too."""
    (tmp_path / "second").mkdir()
    run = start("ddp", "strategy=ddp", *MANY, f"train.mirror={tmp_path / 'second'}")
    run.wait_for_step(2)
    ranks = run.ranks()
    ranks[1].send_signal(signal.SIGTERM)
    step = assert_stopped(run, ranks)
    assert manifest(run.run)["mirror"]["checkpoint"] == f"checkpoint-{step}"


def test_a_sweep_stops_as_a_whole(start: Callable[..., Started]) -> None:
    run = start("sweep", "--multirun", *MANY, "train.seed=1,2")
    run.run = run.run.with_name("sweep-seed=1")
    run.wait_for_step(2)
    ranks = run.ranks()
    run.process.send_signal(signal.SIGINT)
    assert_stopped(run, ranks)
    assert not run.run.with_name("sweep-seed=2").exists()


def test_a_terminal_that_is_gone_stops_with_a_checkpoint(tmp_path: Path) -> None:
    """As when ssh is dropped: the kernel sends SIGHUP, and what is said from then on cannot be written."""
    command = [sys.executable, "-m", "tunewright.launch.cli", "train", f"output_root={tmp_path}", "name=gone", *MANY]
    child, terminal = pty.fork()
    if child == 0:
        for one in RANK_STOP_SIGNALS:  # some are ignored under nohup, and after tests that call the command here
            signal.signal(one, signal.SIG_DFL)
        os.chdir(REPOSITORY)
        os.execv(sys.executable, command)
    shown, deadline = b"", time.monotonic() + 240
    while b"3/2,000" not in shown:
        assert select.select([terminal], [], [], deadline - time.monotonic())[0], shown
        shown += os.read(terminal, 4096)
    below = psutil.Process(child).children(recursive=True)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 75
    assert_gone(below)
    assert manifest(tmp_path / "gone")["status"] == "stopped"
    assert RunDir(tmp_path / "gone").last_checkpoint()


def test_a_second_signal_ends_at_once(start: Callable[..., Started]) -> None:
    """Also ranks that would never come to the end of their step."""
    run = start("twice", "strategy=zero2", *MANY, "train.save_steps=2")
    run.wait_for_step(3)
    ranks = run.ranks()
    ranks[1].suspend()
    run.process.send_signal(signal.SIGTERM)
    time.sleep(SAME_REQUEST_SECONDS / 4)
    run.process.send_signal(signal.SIGTERM)  # the same request: `timeout` signals its child and then the group
    time.sleep(SAME_REQUEST_SECONDS + 1)
    assert run.process.is_running()
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(timeout=SOON) == 130
    assert_gone(ranks)
    assert "SIGTERM: stopping at the end of this step" in run.output.read_text()
    assert f"`tunewright resume {run.run}` goes on from checkpoint-" in run.output.read_text()
    assert manifest(run.run)["status"] == "stopped"


def test_ranks_that_are_still_loading_leave_at_once(
    start: Callable[..., Started], tunewright: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    run = start("early", "strategy=ddp", *MANY)
    ranks = run.wait_for_ranks(2)
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(timeout=SOON) == 75
    assert_gone(ranks)
    assert "Stopped before a checkpoint was written" in run.output.read_text()
    assert manifest(run.run)["status"] == "stopped"
    assert not (run.run / "metrics.jsonl").exists()
    assert f"`tunewright resume {run.run}` starts from the beginning" in run.output.read_text()
    assert tunewright("resume", run.run, "--dry-run").returncode == 0


def test_training_goes_on_when_nobody_reads_what_it_says(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tunewright.launch.cli", "train", f"output_root={tmp_path}", "name=head", *STEPS]
    command.append("train.max_steps=3")
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=240) == 0
    assert manifest(tmp_path / "head")["status"] == "done"
    assert len(losses(tmp_path / "head")) == 3
    assert "Saved to" in (tmp_path / "head" / "logs" / "rank0.log").read_text()


@pytest.mark.parametrize("count", [1, 2])
def test_an_accelerate_launch_of_the_users_own_stops_likewise(count: int, start: Callable[..., Started]) -> None:
    """On one device accelerate ends at once; with more, torchrun passes the signal on, and waits."""
    flags = ["--num_processes", str(count), *(["--multi_gpu"] if count > 1 else [])]
    module = ["-m", "tunewright.launch.rank"]
    program = ["-m", "accelerate.commands.accelerate_cli", "launch", *flags, *module]
    run = start("own", *MANY, program=program)
    run.wait_for_step(2)
    ranks = run.ranks()
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(timeout=STOPPING) not in (0, None)
    _, alive = psutil.wait_procs(ranks, timeout=STOPPING)
    assert not alive
    assert manifest(run.run)["status"] == "stopped"
    assert RunDir(run.run).last_checkpoint()


def test_stopping_promises_only_a_checkpoint_that_is_there(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    assert "Stopped before a checkpoint was written" in stopped(run)
    run.path.mkdir()
    run.config.write_text("")
    (run.checkpoints / "checkpoint-8").mkdir(parents=True)
    assert "Stopped before a checkpoint was written" in stopped(run)
    write_checkpoint(run, 4)
    assert f"`tunewright resume {run.path}` goes on from checkpoint-4" in stopped(run)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR2, signal.SIGTERM])
def test_a_request_before_ranks_start_leaves_nothing_and_says_one_line(
    number: signal.Signals, tmp_path: Path, tiny_model: Path
) -> None:
    """A process is importing then, to prepare the data."""
    settings = [f"output_root={tmp_path}", "name=early", "model=folder", f"model.path={tiny_model}"]
    settings.append(f"data.cache_dir={tmp_path / 'cache'}")
    process = psutil.Popen(
        [sys.executable, "-m", "tunewright.launch.cli", "train", *settings],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + SOON
    while not (begun := process.children()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if number == signal.SIGTERM:  # Slurm signals every process, in any order
        begun[0].send_signal(number)
        time.sleep(0.2)
    os.killpg(process.pid, number)
    assert process.communicate(timeout=SOON)[0] == (
        f"Stopped by {number.name} while nothing was trained: the same command begins here again.\n"
    )
    assert process.returncode == 75
    assert not psutil.wait_procs(begun, timeout=SOON)[1]
    assert not (tmp_path / "early").exists()
