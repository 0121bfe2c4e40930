from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tunewright.errors import TunewrightError

CANARY = "sk-canary-51f0c3a97be2"


def _load(name: str) -> Any:
    """Import a module beside this file: with importlib mode, tests are no packages."""
    spec = importlib.util.spec_from_file_location(f"datagen_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def fake() -> Any:
    """The module fake_server: Reply, good, SYSTEM_MESSAGE."""
    return _load("fake_server")


@pytest.fixture
def serve(fake: Any) -> Iterator[Callable[..., Any]]:
    """Start a server: serve(script=None, delay=0.0)."""
    with ExitStack() as stack:
        yield lambda *args, **kwargs: stack.enter_context(fake.FakeServer(*args, **kwargs))


@pytest.fixture(scope="session")
def json_model() -> Any:
    """The module json_model: KINDS, build_json_model."""
    return _load("json_model")


@pytest.fixture(scope="session")
def real_server(json_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """`transformers serve` with a model that replies in JSON: url and model. The model is built on the first use."""
    cache = Path(os.environ.get("TUNEWRIGHT_CACHE", "~/.cache/tunewright")).expanduser()
    model = json_model.build_json_model(cache)
    with _load("real_server").RealServer(model, tmp_path_factory.mktemp("real-server")) as server:
        yield server


@pytest.fixture(scope="session")
def faults() -> Any:
    """The module fault_proxy: what can go wrong."""
    return _load("fault_proxy")


@pytest.fixture
def proxy(faults: Any, real_server: Any) -> Iterator[Callable[..., Any]]:
    """Start a proxy in front of the real server: proxy(script=None)."""
    with ExitStack() as stack:
        yield lambda script=None: stack.enter_context(faults.FaultProxy(real_server.url, script))


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    """A key in the environment that must turn up nowhere else."""
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    return CANARY


@pytest.fixture
def datagen(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run the subcommand as the command line does and return exit code and everything it printed."""
    from tunewright.datagen.cli import add_parser

    def run(*arguments: str) -> tuple[int, str]:
        parser = argparse.ArgumentParser()
        add_parser(parser.add_subparsers())
        args = parser.parse_args(["datagen", *arguments])
        capfd.readouterr()
        try:
            code, text = int(args.run(args)), ""
        except TunewrightError as error:
            code, text = error.exit_code, f"{type(error).__name__}: {error}"
        out, err = capfd.readouterr()
        return code, out + err + text

    return run
