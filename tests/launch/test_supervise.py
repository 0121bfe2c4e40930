"""Processes begun early: they wait for an order, and without one they end and nothing was done."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tunewright.config.compose import compose_config
from tunewright.launch.command import Command
from tunewright.launch.preparation import Preparation
from tunewright.launch.supervise import AccelerateLauncher

SCRIPT = """
import json, os, sys
from tunewright.ranks import rank_variables
ranks = {name: os.environ[name] for name in rank_variables(os.environ)}
json.dump([sys.argv[1:], os.environ['GREETING'], sys.stdin.read(), ranks], open('out', 'w'))
"""


def test_an_order_gives_the_script_its_arguments_and_environment_and_no_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PET_NNODES", "ACCELERATE_USE_FSDP", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.setenv(name, "7")  # of another launch
    launcher = AccelerateLauncher()
    launcher.begin()
    command = Command(["--cpu", "--num_processes=1", "script.py", "one", "two words"], {"GREETING": "hello"}, {})
    assert launcher.launch(command, tmp_path / "log").wait() == 0
    arguments, greeting, read, ranks = json.loads((tmp_path / "out").read_text())
    assert (arguments, greeting, read) == (["one", "two words"], "hello", "")
    assert "7" not in ranks.values()
    assert command.shown().startswith(
        "env -u ACCELERATE_USE_FSDP -u LOCAL_RANK -u OMPI_COMM_WORLD_SIZE -u PET_NNODES -u RANK -u WORLD_SIZE GREETING="
    )


def test_what_the_launcher_complains_of_is_in_its_log(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("from before\n")
    process = AccelerateLauncher().launch(Command([], {}, {}), tmp_path / "log")
    assert process.wait() == 2
    log = (tmp_path / "log").read_text()
    assert log.startswith("from before\n")
    assert "training_script" in log


def _preparation() -> Preparation:
    preparation = Preparation()
    preparation.begin(compose_config())
    return preparation


def _launcher() -> AccelerateLauncher:
    launcher = AccelerateLauncher()
    launcher.begin()
    return launcher


@pytest.mark.parametrize("begun", [_preparation, _launcher])
def test_what_turns_out_not_to_be_needed_is_ended(begun: Callable[[], Preparation | AccelerateLauncher]) -> None:
    early = begun()
    process = early.process
    assert process is not None
    early.stop()
    assert process.poll() is not None
    early.stop()  # nothing is left to end


@pytest.mark.parametrize("module", ["tunewright.launch.prepare", "tunewright.launch.launcher"])
def test_without_an_order_nothing_is_done(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module], input="", capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_configuration_error_imports_nothing_heavy() -> None:
    """It comes in a third of a second; numpy, jinja2 and PyArrow alone would take as long."""
    code = """
import sys
from tunewright.launch.cli import main
codes = [main(["train", "train.no_such=1"]), main(["train", "method=qlora", "strategy=zero3"])]
print(codes, sorted({"torch", "transformers", "numpy", "pyarrow", "jinja2"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[2, 2] []\n"
