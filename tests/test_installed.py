"""The wheel, in an environment of its own and a folder whose files bear the names of everything that is imported."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, TIMEOUT, manifest

SOURCES = ["tunewright", "datagen", "trainer", "launch", "deliver", "configs", "data"]
FILES = ["pyproject.toml", "README.md", "LICENSE"]
# Of the user's own, in the working directory; imported by nobody.
THEIRS = ["trainer.py", "launch/__init__.py", "configs/__init__.py", "data/__init__.py", "deliver.py"]
THEIRS += ["datasets.py", "yaml.py", "torch.py", "accelerate.py", "transformers/__init__.py", "numpy.py"]
ACCELERATE = "#!{}\nimport sys\nfrom accelerate.commands.accelerate_cli import main\nsys.exit(main())\n"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of scripts of an environment that holds the wheel, and borrows everything else from this one."""
    root = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:  # a copy: setuptools would put what an earlier build left into the wheel
        shutil.copytree(REPOSITORY / name, root / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(REPOSITORY / name, root / "source")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(root), str(root / "source")]
    subprocess.run(build, check=True)
    (wheel,) = root.glob("*.whl")
    venv.create(root / "env", with_pip=False, symlinks=True)
    scripts = root / "env" / "bin"
    subprocess.run([*pip, "--python", str(scripts / "python"), "install", "--no-deps", "--no-index", wheel], check=True)
    (site,) = root.glob("env/lib/python*/site-packages")
    # Folders alone: their own .pth files, with the checkout's, are not read from here.
    borrowed = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "borrowed.pth").write_text("\n".join(borrowed))
    (scripts / "accelerate").write_text(ACCELERATE.format(scripts / "python"))  # as pip writes it
    (scripts / "accelerate").chmod(0o755)
    return scripts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Somebody's working directory."""
    folder = tmp_path_factory.mktemp("theirs")
    for name in THEIRS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"raise AssertionError('{name} of the working directory was imported')\n")
    (folder / "data" / "notes.txt").write_text("mine\n")
    (folder / "configs" / "mine.yaml").write_text("mine: 1\n")
    return folder


@pytest.fixture(scope="module")
def tunewright(environment: Path) -> Callable[..., str]:
    """Run the installed command in a folder, and return what it prints."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env["PATH"] = f"{environment}{os.pathsep}{env['PATH']}"

    def run(folder: Path, *args: str) -> str:
        done = subprocess.run(
            [environment / "tunewright", *args], cwd=folder, env=env, capture_output=True, text=True, timeout=TIMEOUT
        )
        logs = "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("runs/*/logs/*")))
        assert done.returncode == 0, f"{args}:\n{done.stdout}\n{done.stderr}\n{logs}"
        return done.stdout

    return run


def test_the_wheel_is_what_runs(environment: Path) -> None:
    code = "import tunewright.datagen, tunewright.launch as launch; print(launch.__file__)"
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    found = subprocess.check_output([environment / "python", "-c", code], cwd=environment, env=env, text=True)
    assert Path(found.strip()).is_relative_to(environment.parent)


def test_everything_works_in_a_folder_of_other_things(
    tunewright: Callable[..., str], folder: Path, tmp_path: Path, tiny_model: Path
) -> None:
    few = ["data.max_samples=40", "train.eval_steps=2"]
    tunewright(folder, "train", "experiment=demo", "train.max_steps=3", "output_root=runs", "name=first", *few)
    tunewright(folder, "train", "strategy=zero2", "train.max_steps=2", "name=second", *few)
    assert manifest(folder / "runs" / "second")["distributed"]["world_size"] == 2
    assert "demo" in tunewright(folder, "data", "check")
    server = ["provider=openai_compatible", "base_url=http://localhost:1/v1", "model=none"]  # which nobody asks
    assert "requests" in tunewright(folder, "datagen", "task=Answer riddles.", "name=riddles", *server, "--dry-run")
    assert "second" in tunewright(folder, "compare", "runs/first", "runs/second")
    tunewright(folder, "merge", "runs/first")
    assert (folder / "runs" / "first" / "merged" / "merge.json").is_file()
    assert "tuned | " in tunewright(folder, "chat", "runs/first", "--prompt", "Hello?", "--max-new-tokens", "4")
    # From somewhere else, whose own data has the same name.
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text('{"demo_eval": {"file_name": "missing.json"}}')
    told = tunewright(tmp_path, "evaluate", str(folder / "runs" / "first"), "--examples", "2")
    assert "on 2 rows" in told
    assert "others than when it was trained" not in told
