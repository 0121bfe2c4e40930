"""`tunewright resume RUN` needs nothing but the folder, and `tunewright runs` says what stands in each."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import losses, manifest, write_checkpoint
from tunewright.claims import claim, prepare_folder
from tunewright.config.compose import compose_config
from tunewright.errors import ConfigError
from tunewright.launch.resume import resume
from tunewright.launch.runs import find_runs, runs_text
from tunewright.run_folder import RunDir


def cli(where: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tunewright.launch.cli", *args], cwd=where, capture_output=True, text=True, timeout=400
    )


def test_a_run_goes_on_by_its_folder_alone_from_anywhere(small_model: Path, tmp_path: Path) -> None:
    """Its paths are relative to where it was started; the newest checkpoint is damaged, and the one before is taken."""
    home, away = tmp_path / "home", tmp_path / "away"
    away.mkdir()
    shutil.copytree(small_model, home / "model")
    few = ["train.max_steps=6", "data.max_samples=12", "train.global_batch_size=4", "train.logging_steps=1"]
    settings = ["model=folder", "model.path=model", *few, "train.save_steps=2", "data.eval_names=[]", "name=a"]
    whole = cli(home, "train", *settings)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    run = home / "runs" / "a"
    expected, weights = losses(run), load_file(run / "final" / "adapter_model.safetensors")
    shutil.rmtree(run / "final")
    RunDir(run).update_manifest(status="failed")
    damaged = run / "checkpoints" / "checkpoint-6" / "optimizer.pt"
    os.truncate(damaged, damaged.stat().st_size - 1)

    told = cli(away, "resume", str(run), "--dry-run").stdout
    assert f"In {home}, where it was started." in told
    assert "checkpoint-6 is damaged: optimizer.pt has " in told
    assert "would continue from checkpoint-4" in told
    done = cli(away, "resume", str(run))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Continuing runs/a from checkpoint-4" in done.stdout
    assert losses(run) == expected
    for key, tensor in load_file(run / "final" / "adapter_model.safetensors").items():
        assert torch.equal(tensor, weights[key]), key
    assert "nothing to do" in cli(away, "resume", str(run)).stdout
    longer = cli(away, "resume", str(run), "train.max_steps=7")
    assert longer.returncode == 0, longer.stderr
    assert len(losses(run)) == 7
    assert manifest(run)["status"] == "done"


@pytest.fixture
def stopped(tmp_path: Path) -> Callable[..., RunDir]:
    def make(name: str, status: str, *overrides: str) -> RunDir:
        config = compose_config([f"output_root={tmp_path / 'runs'}", f"name={name}", *overrides])
        prepare_folder(config, claim(config))
        run = RunDir(tmp_path / "runs" / name)
        write_checkpoint(run, 8)
        run.update_manifest(status=status, steps_planned=40)
        run.metrics.write_text('{"step": 9, "loss": 2.0, "step_losses": [1.0, 3.0]}\n')
        return run

    return make


@pytest.mark.parametrize(
    ("item", "told"),
    [
        ("method=full", "With another method it is another run"),
        ("train.learning_rat=1", "cannot be set"),
        ("train.epochs=x", "cannot be set"),
        ("method.r=2", r"method\.r: there 16, now 2"),
    ],
)
def test_what_would_be_another_run_is_refused(item: str, told: str, stopped: Callable[..., RunDir]) -> None:
    with pytest.raises(ConfigError, match=told):
        resume(stopped("a", "failed").path, [item])


def test_a_folder_of_nobody_and_a_run_of_somebody_else_are_refused(
    stopped: Callable[..., RunDir], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="holds no run that could go on"):
        resume(tmp_path)
    run = stopped("a", "failed")
    run.config.write_text(run.config.read_text() + "\n")
    with pytest.raises(ConfigError, match=r"was not made by you .* --trust"):
        resume(run.path)


def test_runs_are_listed_with_what_stands(stopped: Callable[..., RunDir], tmp_path: Path) -> None:
    stopped("done", "done")
    killed = stopped("killed", "running")
    (killed.checkpoints / "checkpoint-16").mkdir()
    stopped("halted", "stopped").manifest.write_text("{")
    found = {one.run.path.name: one for one in find_runs(tmp_path)}
    assert {name: one.state for name, one in found.items()} == {
        "done": "done",
        "killed": "interrupted",
        "halted": "manifest damaged",
    }
    assert (found["killed"].step, found["killed"].planned, found["killed"].loss) == (9, 40, 2.0)
    assert found["killed"].checkpoint == "checkpoint-8 (checkpoint-16 damaged)"
    assert "with a warning" not in runs_text(tmp_path)
    for run in (RunDir(tmp_path / "runs" / "done"), killed):
        run.update_manifest(warnings=["The loss is at 8.32."])
    assert re.findall(r"(\w+) +\w+, with a warning", runs_text(tmp_path)) == ["done"]  # another may yet recover
    assert "To go on: tunewright resume" in runs_text(tmp_path)
    assert "There is no run in" in runs_text(tmp_path / "nowhere")
