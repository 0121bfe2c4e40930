"""Each Make target is listed, and expands to a command that composes."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tunewright.config.compose import compose_config
from tunewright.launch.cli import parser
from tunewright.launch.demo import WAYS

REPOSITORY = Path(__file__).resolve().parents[2]
TARGETS = [
    "help",
    "setup",
    "demo",
    "test",
    "lint",
    "test-chaos",
    "test-gpu",
    "docs-check",
    "datagen",
    "check",
    "zero2",
    "zero3",
    "single",
    "compare",
    "tensorboard",
    "chat",
    "bench",
    "bench-check",
    "bench-start",
    "bench-data",
    "clean",
]


def make(*args: str) -> str:
    # Where a make runs the tests, this one would say where it is.
    done = subprocess.run(["make", "--no-print-directory", *args], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_is_the_default_and_lists_every_target() -> None:
    listed = make()
    assert listed == make("help")
    assert all(re.search(rf"^  {target} ", listed, flags=re.MULTILINE) for target in TARGETS)


@pytest.mark.parametrize("target", TARGETS)
def test_each_target_has_a_dry_run(target: str) -> None:
    assert make("-n", target)


@pytest.mark.parametrize(
    ("target", "strategy", "method"),
    [("zero2", "zero2", "lora"), ("zero3", "zero3", "lora"), ("single", "single", "qlora")],
)
def test_a_training_target_passes_its_variables_through(target: str, strategy: str, method: str) -> None:
    recipe = make(
        "-n", target, "MODEL=qwen2_5_7b", "DATA=huanhuan", "NPROC=1", "ARGS=train.learning_rate=1e-4 resume=auto"
    )
    command = next(line for line in recipe.splitlines() if "tunewright train" in line)
    overrides = shlex.split(command)[2:]
    config = compose_config(overrides)
    assert (config.strategy.name, config.method.name) == (strategy, method)
    assert (config.model.name, list(config.data.names)) == ("qwen2_5_7b", ["huanhuan"])
    assert (config.cluster.num_processes, config.train.learning_rate) == (1, 1e-4)


def test_cleaning_leaves_runs_alone(tmp_path: Path) -> None:
    shutil.copy(REPOSITORY / "Makefile", tmp_path)
    for folder in ("runs/first/final", "runs/.trash/20260101-120000-first", ".venv", ".mypy_cache"):
        (tmp_path / folder).mkdir(parents=True)
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".venv", "Makefile", "runs"]
    assert (tmp_path / "runs" / "first" / "final").is_dir()


def test_tensorboard_does_not_show_what_was_replaced(tmp_path: Path) -> None:
    """It looks into hidden folders too."""
    for run in ("a", "demo/b"):
        (tmp_path / run / "tensorboard").mkdir(parents=True)
    assert make("-n", "tensorboard", f"LOGDIR={tmp_path}").splitlines()[-1].endswith(f"--logdir {tmp_path}")
    (tmp_path / ".trash" / "20260101-120000-a" / "tensorboard").mkdir(parents=True)
    shown = make("-n", "tensorboard", f"LOGDIR={tmp_path}").splitlines()[-1].partition("--logdir_spec ")[2]
    folders = sorted(shown.strip('"').split(","))
    assert folders == [f"{run}/tensorboard:{tmp_path}/{run}/tensorboard" for run in ("a", "demo/b")]


def test_every_tunewright_command_of_the_makefile_exists() -> None:
    commands = set(re.findall(r"\$\(BIN\)/tunewright (\w+)", (REPOSITORY / "Makefile").read_text()))
    known = next(action.choices for action in parser()._actions if action.dest == "command")
    assert commands <= set(known)


def test_the_runs_that_help_names_are_those_that_the_demo_makes() -> None:
    named = re.findall(r"runs/demo/([\w-]+)", parser().format_help() + make("help"))
    assert named
    assert set(named) <= set(WAYS)
