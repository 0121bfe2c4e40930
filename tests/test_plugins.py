"""Extensions from outside: one of each kind in a package that is installed, and by `imports`, trained and evaluated."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY, TIMEOUT, losses, manifest
from tunewright.config.compose import compose_config, load_config
from tunewright.errors import ConfigError
from tunewright.plugins import SHIPPED, STRATEGIES, Loaded, Plugins

PACKAGE = REPOSITORY / "tests" / "plugin_package"
ROWS = [{"q": f"What comes after {number}?", "a": f"{number + 1} comes."} for number in range(24)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a registry whose rows only the plug-in's format can read."""
    path = tmp_path_factory.mktemp("work")
    (path / "data").mkdir()
    (path / "data" / "qa.json").write_text(json.dumps(ROWS))
    entry = {"file_name": "qa.json", "formatting": "qa"}
    (path / "data" / "dataset_info.json").write_text(json.dumps({"qa": entry}))
    return path


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as an installer leaves it: module and metadata in a folder of the path."""
    path = tmp_path_factory.mktemp("site")
    shutil.copy(PACKAGE / "house_style.py", path)
    about = path / "tunewright_house_style-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: tunewright-house-style\nVersion: 1.0\n")
    section, _, names = (PACKAGE / "pyproject.toml").read_text().partition('entry-points."')[2].partition('"]\n')
    point = names.split("\n\n")[0].replace('"', "")
    (about / "entry_points.txt").write_text(f"[{section}]\n{point}\n")
    return path


@pytest.fixture
def command(folder: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*args: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, **({"PYTHONPATH": str(path)} if path else {})}
        command = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", "-m", "tunewright.launch.cli", *args]
        return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=TIMEOUT)

    return run


FEW = ["train.max_steps=3", "train.logging_steps=1", "train.global_batch_size=8", "data.eval_size=6"]
QA = ["data=registry", "data.names=[qa]", *FEW]


def test_an_installed_package_adds_one_of_each(command: Callable[..., Any], installed: Path, folder: Path) -> None:
    chosen = ["method=norms", "model.template=arrows", "train.callbacks=[stop_at_loss]", "train.loss=smooth"]
    done = command("train", "name=all", *chosen, *QA, path=installed)
    assert done.returncode == 0, done.stdout + done.stderr
    run = folder / "runs" / "all"
    assert manifest(run)["method"] == "norms"
    assert 0 < manifest(run)["parameters"]["trainable"] < 10_000
    assert len(losses(run)) == 3
    shown = command("data", "show", "qa", "model.template=arrows", path=installed).stdout
    assert "assistant|>| [[1| comes|.|<|im_end|>" in shown

    done = command("evaluate", str(run), "--examples", "3", path=installed)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((run / "evaluation-3.json").read_text())
    assert 0 <= found["tuned"]["metrics"]["overlap"] <= 1
    assert "overlap" in done.stdout
    assert re.search(r"overlap after +\d", command("compare", str(run), path=installed).stdout)
    shown = command("config", path=installed).stdout
    assert re.search(r"norms +the normalisations' weights", shown)
    for name in ("arrows", "smooth", "stop_at_loss", "qa", "overlap"):
        assert name in shown


def test_imports_load_a_module_of_the_working_directory_in_every_rank(
    command: Callable[..., Any], folder: Path
) -> None:
    shutil.copy(PACKAGE / "house_style.py", folder)
    two = ["strategy=ddp", "cluster.num_processes=2", "method=norms", "train.loss=smooth"]
    done = command("train", "name=two", *two, *QA, "imports=[house_style]")
    assert done.returncode == 0, done.stdout + done.stderr
    assert manifest(folder / "runs" / "two")["distributed"]["world_size"] == 2
    assert "`method` has no choice 'norms'" in command("train", "method=norms").stderr
    refused = command("train", "method=norms", "strategy=zero3", "imports=[house_style]", "--dry-run").stderr
    assert "does not train under `strategy=zero3`, says the plug-in" in refused
    checked = command("train", "method=norms", "train.learning_rate=0.5", "imports=[house_style]", "--dry-run").stderr
    assert "normalisations take 1e-1 at most" in checked


def test_nothing_in_the_working_directory_shadows_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizers.py").write_text("raise RuntimeError('shadowed')\n")
    (tmp_path / "mine_alone.py").write_text("import tokenizers\ndef register(plugins): pass\n")
    monkeypatch.chdir(tmp_path)
    code = "from tunewright.plugins import PLUGINS; PLUGINS.load(['mine_alone'])"
    flags = ["-P"] if sys.version_info >= (3, 11) else ["-I"]
    done = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "import nothing_of_the_kind",
            "cannot be imported: ModuleNotFoundError: No module named 'nothing_of_the_kind'",
        ),
        ("1 / 0", r"cannot be imported: ZeroDivisionError: division by zero \(.*broken.py, line 1\)"),
        ("", r"has no function register\(plugins\)"),
        ("def register(plugins): plugins.add_method('lora', print)", "The method 'lora' comes with tunewright"),
        ("def register(plugins): plugins.add_template('chatml', '')", "The template 'chatml' comes with tunewright"),
        ("def register(plugins): plugins.add_metric('f1', 3)", "The metric 'f1' is int, which cannot be called"),
        ("def register(plugins): plugins.add_metric('F1', print)", "cannot be called 'F1'"),
        ("def register(plugins): plugins.add_method('m', print, strategies=['zero9'])", "there is no strategy 'zero9'"),
        ("def register(plugins): raise KeyError('x')", "register failed: KeyError: 'x'"),
    ],
)
def test_what_is_wrong_with_a_module_is_told(
    text: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    with pytest.raises(ConfigError, match=f"`imports` names broken.*{told}"):
        Loaded().load(["broken"])
    monkeypatch.delitem(sys.modules, "broken", raising=False)


def test_two_plugins_cannot_add_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one_of_two", "two_of_two"):
        (tmp_path / f"{name}.py").write_text("def register(plugins): plugins.add_metric('same', lambda a, e: 0.0)")
    monkeypatch.syspath_prepend(tmp_path)
    loaded = Loaded()
    loaded.load(["one_of_two"])
    loaded.load(["one_of_two"])  # again is nothing new
    with pytest.raises(ConfigError, match="added by both one_of_two and two_of_two"):
        loaded.load(["two_of_two"])


def test_imports_of_a_file_of_settings_or_of_a_run_from_elsewhere_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spy.py").write_text("open('was_here', 'w')\ndef register(plugins): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "x.yaml").write_text("# @package _global_\nimports: [spy]\n")
    with pytest.raises(ConfigError, match=r"`imports` is .'spy'.*in a file of settings it does not count"):
        compose_config(["experiment=x"], tmp_path / "mine")
    (tmp_path / "config.yaml").write_text("imports: [spy]\nmethod: {name: lora}\n")
    with pytest.raises(ConfigError, match="was not made by you"):
        load_config(tmp_path / "config.yaml")
    assert not (tmp_path / "was_here").exists()
    load_config(tmp_path / "config.yaml", trusted=True)
    assert (tmp_path / "was_here").exists()


def test_a_name_that_no_plugin_adds_is_told() -> None:
    from tunewright.plan.devices import find_devices
    from tunewright.plan.rules import check

    for override, told in (
        ("train.loss=smoth", "`train.loss` names 'smoth'"),
        ("train.callbacks=[early]", "`train.callbacks` names 'early'"),
    ):
        with pytest.raises(ConfigError, match=told):
            check(compose_config([override]), find_devices())


def test_what_is_reserved_is_what_is_shipped() -> None:
    from tunewright.config.choices import choices
    from tunewright.trainer.data.formats import READERS

    assert sorted(SHIPPED["method"]) == choices("method")
    assert sorted(["auto", *STRATEGIES]) == choices("strategy")
    assert set(SHIPPED["format"]) == set(READERS)


def test_the_document_shows_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (PACKAGE / "house_style.py").read_text(encoding="utf-8")
    shown = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "extending.md").read_text(), flags=re.DOTALL)
    assert len(shown) > 8
    for block in shown:
        assert block in text
        assert block.count("\n") <= 20
    spec = importlib.util.spec_from_file_location("shown_style", PACKAGE / "house_style.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    added = Plugins()
    module.register(added)
    assert all(added._of(kind) for kind in SHIPPED)
