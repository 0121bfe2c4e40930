"""Each Make target is listed, and expands to a command that composes."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from launch.cli import parser
from launch.compose import compose_config
from launch.demo import WAYS

REPOSITORY = Path(__file__).resolve().parents[2]
TARGETS = [
    "help",
    "setup",
    "demo",
    "test",
    "lint",
    "test-gpu",
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
    done = subprocess.run(["make", *args], cwd=REPOSITORY, capture_output=True, text=True)
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


def test_every_tunewright_command_of_the_makefile_exists() -> None:
    commands = set(re.findall(r"\$\(BIN\)/tunewright (\w+)", (REPOSITORY / "Makefile").read_text()))
    known = next(action.choices for action in parser()._actions if action.dest == "command")
    assert commands <= set(known)


def test_the_runs_that_help_names_are_those_that_the_demo_makes() -> None:
    named = re.findall(r"runs/demo/([\w-]+)", parser().format_help() + make("help"))
    assert named
    assert set(named) <= set(WAYS)
