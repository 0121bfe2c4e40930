"""How processes are started: as nobody's rank, without the working directory's modules, their complaints kept."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tunewright.config.compose import compose_config
from tunewright.errors import ConfigError, PeerError, TunewrightError
from tunewright.launch.children import ask, start
from tunewright.launch.command import Command, accelerate_launch
from tunewright.launch.supervise import run_ranks
from tunewright.run_folder import RunDir
from tunewright.stop_signals import StopAsked

SCRIPT = """
import json, os, sys
from tunewright.ranks import rank_variables
ranks = {name: os.environ[name] for name in rank_variables(os.environ)}
json.dump([sys.argv[1:], os.environ['GREETING'], sys.stdin.read(), ranks], open('out', 'w'))
"""


def test_ranks_get_their_arguments_and_environment_and_no_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PET_NNODES", "ACCELERATE_USE_FSDP", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.setenv(name, "7")  # of another launch
    run = RunDir(tmp_path / "run")
    run.logs.mkdir(parents=True)
    run.update_manifest(status="done")
    arguments = ["--cpu", "--num_processes=1", "script.py", "one", "two words"]
    command = Command(accelerate_launch(), arguments, {"GREETING": "hello"}, {})
    assert run_ranks(command, run) == 0
    told, greeting, read, ranks = json.loads((tmp_path / "out").read_text())
    assert (told, greeting, read) == (["one", "two words"], "hello", "")
    assert "7" not in ranks.values()
    shown = command.shown()
    assert shown.startswith(
        "env -u ACCELERATE_USE_FSDP -u LOCAL_RANK -u OMPI_COMM_WORLD_SIZE -u PET_NNODES -u RANK -u WORLD_SIZE "
        "PYTHONSAFEPATH=1 GREETING=hello "
    )
    # What is printed does the same when it is typed.
    (tmp_path / "out").unlink()
    subprocess.run(shlex.split(shown), stdin=subprocess.DEVNULL, check=True)
    assert json.loads((tmp_path / "out").read_text())[:2] == [["one", "two words"], "hello"]


def test_what_the_launcher_complains_of_is_in_its_log(tmp_path: Path) -> None:
    run, said = RunDir(tmp_path), list[str]()
    run.logs.mkdir()
    (run.logs / "launch.log").write_text("from before\n")
    assert run_ranks(Command(accelerate_launch(), [], {}, {}), run, said.append) == 70
    log = (run.logs / "launch.log").read_text()
    assert log.startswith("from before\n")
    assert "training_script" in log
    assert "an unexplained exit" in said[0]


def test_an_error_of_an_own_process_is_raised_here(capfd: pytest.CaptureFixture[str]) -> None:
    config = compose_config(["model=folder", "model.path=/nowhere/at/all"])
    with pytest.raises(ConfigError, match="/nowhere/at/all"):
        ask("tunewright.launch.ask_torch", "architecture", config)
    with pytest.raises(TunewrightError, match="ended with 1, see above"):
        ask("tunewright.launch.no_such_module", "", config)
    assert "no_such_module" in capfd.readouterr().err


def test_an_own_process_that_is_killed_is_not_a_bug_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "victim.py").write_text("import os, sys\nos.kill(os.getpid(), int(sys.argv[1]))\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    config = compose_config([])
    with pytest.raises(PeerError, match=r"victim was ended by SIGKILL \(out of memory is the usual cause\)"):
        ask("victim", "9", config)
    with pytest.raises(StopAsked):
        ask("victim", "15", config)


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


def test_an_own_process_imports_nothing_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # as accelerate sets it for DeepSpeed
    code = "import tunewright, sys; from importlib.util import find_spec; sys.exit(find_spec('theirs') is not None)"
    assert start([sys.executable, "-c", code], {}).wait() == 0
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 1
