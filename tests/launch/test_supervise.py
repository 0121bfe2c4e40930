"""The launcher's process: begun early, it waits for its order; without one it ends, and nothing was started."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.command import Command
from launch.supervise import AccelerateLauncher

SCRIPT = "import json, os, sys; json.dump([sys.argv[1:], os.environ['GREETING'], sys.stdin.read()], open('out', 'w'))"


def test_an_order_gives_the_script_its_arguments_and_environment_and_no_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    launcher = AccelerateLauncher()
    launcher.begin()
    command = Command(["--cpu", "--num_processes=1", "script.py", "one", "two words"], {"GREETING": "hello"}, {})
    assert launcher.launch(command, tmp_path / "log").wait() == 0
    assert json.loads((tmp_path / "out").read_text()) == [["one", "two words"], "hello", ""]


def test_what_the_launcher_complains_of_is_in_its_log(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("from before\n")
    process = AccelerateLauncher().launch(Command([], {}, {}), tmp_path / "log")
    assert process.wait() == 2
    log = (tmp_path / "log").read_text()
    assert log.startswith("from before\n")
    assert "training_script" in log


def test_a_launcher_that_turns_out_not_to_be_needed_is_ended() -> None:
    launcher = AccelerateLauncher()
    launcher.begin()
    process = launcher.process
    assert process is not None
    launcher.stop()
    assert process.poll() is not None
    launcher.stop()  # nothing is left to end


def test_without_an_order_nothing_is_launched() -> None:
    done = subprocess.run([sys.executable, "-m", "launch.launcher"], input="", capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_configuration_error_imports_nothing_heavy() -> None:
    """It comes in a third of a second; numpy, jinja2 and PyArrow alone would take as long."""
    code = """
import sys
from launch.cli import main
codes = [main(["train", "train.no_such=1"]), main(["train", "method=qlora", "strategy=zero3"])]
print(codes, sorted({"torch", "transformers", "numpy", "pyarrow", "jinja2"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[2, 2] []\n"
