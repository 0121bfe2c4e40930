"""Ranks that fail, are killed or are stopped: told once, gone at once, and continued as if nothing had happened."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, losses, manifest
from tests.faults import Fault, planned
from tests.running import SOON, Started, assert_gone
from tunewright.errors import ConfigError, PeerError
from tunewright.launch.supervise import first_error
from tunewright.run_folder import RunDir
from tunewright.trainer.process_group import meet

LONG = ["strategy=zero2", "train.logging_steps=1", "train.max_steps=12", "data.eval_names=[]", "train.save_steps=4"]
# Of a launch that is not this one; with any of them ranks would wait for others, or be started otherwise.
LEFT_OVER = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "3",
    "MASTER_ADDR": "192.0.2.1",
    "MASTER_PORT": "29500",
    "PET_NNODES": "2",
    "PMI_SIZE": "8",
    "ACCELERATE_USE_CPU": "true",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}


def test_a_killed_rank_ends_the_run_and_resuming_it_gives_the_uninterrupted_run(
    start: Callable[..., Started], train: Callable[..., Path]
) -> None:
    whole = train("whole", *LONG, **LEFT_OVER)
    broken = start("broken", *LONG)
    broken.wait_for_step(6)
    ranks = broken.ranks()
    assert len(ranks) == 2
    ranks[1].send_signal(signal.SIGKILL)
    assert broken.process.wait(timeout=SOON) == 6
    assert_gone(ranks)
    assert "Rank 1 failed with SIGKILL" in broken.output.read_text()
    assert manifest(broken.run)["status"] == "failed"

    again = start("broken", *LONG, "resume=auto")
    assert again.process.wait(timeout=240) == 0, again.output.read_text()
    assert "Continuing" in again.output.read_text()
    assert losses(again.run) == losses(whole)
    assert manifest(again.run)["status"] == "done"


def test_a_killed_rank_on_one_device_is_named(start: Callable[..., Started]) -> None:
    run = start("alone", "train.max_steps=2000", "train.logging_steps=1", "data.eval_names=[]")
    run.wait_for_step(1)
    (rank,) = run.ranks()
    rank.kill()
    assert run.process.wait(timeout=SOON) == 6
    shown = run.output.read_text()
    assert "Rank 0 failed with SIGKILL: ended by signal 9 (out of memory is the usual cause)" in shown
    assert "Traceback" not in shown


def test_an_exception_in_one_rank_is_shown_once_with_its_rank(start: Callable[..., Started]) -> None:
    """The other rank's lost connection follows from it and is not what the user is told."""
    fault = Fault("exception", "after_step", step=2, rank=1)
    failing = start("failing", *LONG, **planned(fault))
    failing.wait_for_step(1)
    ranks = failing.ranks()
    assert failing.process.wait(timeout=SOON) == 70
    assert_gone(ranks)
    shown = failing.output.read_text()
    assert shown.count("a planned fault") == 1
    assert "Rank 1 failed with RuntimeError" in shown
    assert "Traceback" not in shown
    assert "a planned fault" in (failing.run / "logs" / "rank1.log").read_text()
    assert (failing.run / "logs" / "rank0.log").is_file()


def test_what_an_earlier_attempt_said_is_kept_and_not_told_again(tmp_path: Path) -> None:
    run, log = RunDir(tmp_path), tmp_path / "logs" / "launch.log"
    run.logs.mkdir()
    log.write_text("rank : 1 (local_rank: 1)\n  exitcode : -9 (pid: 1)\n")
    record = {"rank": 0, "time": 1.0, "type": "DataError", "exit_code": 3, "message": "of the first attempt"}
    (run.logs / "rank0.error.json").write_text(json.dumps(record))
    assert first_error(run, log).message == "of the first attempt"
    assert first_error(run, log, since=2.0).kind == "SIGKILL"
    assert first_error(run, log, since=2.0, offset=log.stat().st_size).kind == "an unexplained exit"


@pytest.mark.parametrize(
    ("rank", "whom"), [(0, "ranks 1, 2"), (2, "rank 0 at 127.0.0.1:")], ids=["the first", "another"]
)
def test_a_rank_says_for_whom_it_waits_and_gives_up(rank: int, whom: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr("tunewright.trainer.process_group.PATIENCE", 0.5)
    for key, value in {"RANK": rank, "WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(key, str(value))
    said: list[str] = []
    with pytest.raises(PeerError, match=rf"Rank {rank} of 3 on .* has waited 0:00:02 .* for {whom}.*unset them"):
        meet(timedelta(seconds=2), said.append)
    assert said
    assert all(f"Rank {rank} of 3" in line and f"waits for {whom}" in line for line in said)


@pytest.mark.parametrize("wrong", [{"MASTER_ADDR": ""}, {"MASTER_PORT": "x"}, {"RANK": "3"}])
def test_a_rank_that_no_launcher_made_is_refused(wrong: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for key, value in {**right, **wrong}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ConfigError, match="unset RANK and WORLD_SIZE"):
        meet(timedelta(seconds=1), print)


def test_memory_that_cannot_be_had_is_told_with_what_to_change(start: Callable[..., Started], tmp_path: Path) -> None:
    (tmp_path / "fault").mkdir()
    (tmp_path / "fault" / "sitecustomize.py").write_text(
        "import os\n"
        "if 'TUNEWRIGHT_LAUNCHER_PID' in os.environ:\n"
        "    import resource, torch\n"
        "    import torch.optim.lr_scheduler as schedules\n"
        "    def greedy(self, *args):\n"
        "        if self.last_epoch >= 1:\n"
        "            resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))\n"
        "            torch.ones(4 << 30)\n"
        "        return step(self, *args)\n"
        "    step = schedules.LambdaLR.step\n"
        "    schedules.LambdaLR.step = greedy\n"
    )
    settings = ["train.max_steps=4", "data.eval_names=[]", "train.micro_batch_size=4"]
    running = start("greedy", *settings, PYTHONPATH=str(tmp_path / "fault"))
    assert running.process.wait(timeout=240) == 7, running.output.read_text()
    shown = running.output.read_text()
    assert "Rank 0 failed with MemoryShortage: " in shown
    for told in ("can't allocate memory", "Seen: this rank held up to", "is 8.00 GiB (ulimit -v)", "Planned: 16 rows"):
        assert told in shown
    assert re.search(r"Step 2, a micro-batch of 4 rows, \d+ tokens. Held: weights 20\.0 MiB, what is trained ", shown)
    assert "Change one of: train.micro_batch_size=2 (the same steps, more slowly), train.gradient_" in shown
    assert "Traceback" not in shown


LIMIT_OF_A_RANK = """
import os, pathlib, re, resource
if "TUNEWRIGHT_LAUNCHER_PID" in os.environ:
    import torch.optim.lr_scheduler as schedules
    file = pathlib.Path(__file__).with_name("limit")
    def limited(self, *args):
        if self.last_epoch >= 1:
            if not file.exists():  # of what two steps took beside what is left when they are over, three quarters
                told = pathlib.Path("/proc/self/status").read_text()
                most, now = (int(re.search(rf"{name}:\\s+(\\d+)", told)[1]) << 10 for name in ("VmPeak", "VmSize"))
                file.write_text(str(now + (most - now) * 3 // 4))
            resource.setrlimit(resource.RLIMIT_AS, (int(file.read_text()),) * 2)
        return step(self, *args)
    step = schedules.LambdaLR.step
    schedules.LambdaLR.step = limited
"""


@pytest.mark.slow  # two starts
def test_half_the_micro_batch_trains_where_the_whole_one_has_no_room(
    start: Callable[..., Started], train: Callable[..., Path], small_model: Path, tmp_path: Path
) -> None:
    """The address space of the rank is limited for real, after two steps; nothing of them is lost."""
    (tmp_path / "fault").mkdir()
    (tmp_path / "fault" / "sitecustomize.py").write_text(LIMIT_OF_A_RANK)
    settings = ["model=folder", f"model.path={small_model}", "data.weights=[20]", "data.eval_names=[]"]
    settings += ["data.packing=true", "data.cutoff_len=16384", "train.global_batch_size=4", "train.max_steps=4"]
    settings += ["train.save_steps=1", "train.logging_steps=1"]
    running = start("limited", *settings, PYTHONPATH=str(tmp_path / "fault"))
    assert running.process.wait(timeout=400) == 0, running.told()
    shown = running.output.read_text()
    assert "Rank 0 failed with MemoryShortage: " in shown
    assert "Once more with train.micro_batch_size=2, which was auto, and the same 4 packs a step" in shown
    assert "from checkpoint-2." in shown
    assert losses(running.run) == pytest.approx(losses(train("unlimited", *settings)), rel=1e-5)
    assert "micro_batch_size: 2" in (running.run / "config.yaml").read_text()


def test_ranks_die_with_a_launcher_that_is_killed(start: Callable[..., Started]) -> None:
    running = start("orphaned", *LONG)
    running.wait_for_step(1)
    below = running.process.children(recursive=True)
    running.process.kill()
    assert_gone(below)


def test_a_loss_that_is_not_finite_ends_with_its_own_code(start: Callable[..., Started]) -> None:
    running = start("diverged", "train.learning_rate=1e30", "train.max_grad_norm=0", "train.logging_steps=1")
    assert running.process.wait(timeout=120) == 5
    assert "NumericError: " in running.output.read_text().replace("failed with NumericError", "NumericError")
    assert "Lower `train.learning_rate` (it is 1e+30" in running.output.read_text()
    assert "set `train.max_grad_norm=1.0`" in running.output.read_text()


@pytest.mark.parametrize(
    ("flags", "kind", "stage"),
    [
        (["--use_deepspeed", "--deepspeed_config_file", "configs/deepspeed/zero2.json"], "DEEPSPEED", 2),
        (["--config_file", "ACCELERATE_YAML"], "DEEPSPEED", 3),
        (["--multi_gpu"], "MULTI_CPU", None),
    ],
    ids=["flags", "their own yaml", "ddp"],
)
def test_accelerate_launch_works_without_the_launcher(
    flags: list[str], kind: str, stage: int | None, tmp_path: Path
) -> None:
    yaml = tmp_path / "accelerate.yaml"
    yaml.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nnum_machines: 1\nnum_processes: 2\n"
        "machine_rank: 0\ndeepspeed_config:\n  zero_stage: 3\n  gradient_accumulation_steps: 4\n"
        "  zero3_init_flag: true\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2"]
    command += [str(yaml) if flag == "ACCELERATE_YAML" else flag for flag in flags]
    command += [
        "-m",
        "tunewright.launch.rank",
        "train.max_steps=2",
        f"output_root={tmp_path}",
        "name=direct",
        "data.eval_names=[]",
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    facts = manifest(tmp_path / "direct")["distributed"]
    assert (facts["type"], facts["zero_stage"], facts["world_size"]) == (kind, stage, 2)


def test_a_strategy_that_is_not_what_was_started_is_refused(tmp_path: Path) -> None:
    """`accelerate launch --cpu --num_processes 2` starts one process without a word (accelerate 1.15)."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2"]
    command += [
        "-m",
        "tunewright.launch.rank",
        "strategy=zero2",
        "train.max_steps=2",
        f"output_root={tmp_path}",
        "name=pretended",
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert done.returncode != 0
    assert "is not what runs" in done.stdout + done.stderr
