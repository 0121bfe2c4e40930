"""Shared by the trainer's tests: the embedded model, and training in this process where one device is enough."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.compose import compose_config
from launch.rundir import Claim, RunDir, prepare_folder
from trainer.prepare import prepare


class Quiet:
    """A console for runs inside a test."""

    def say(self, text: str) -> None:
        pass


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """The folder of the embedded model, built on first use."""
    return prepare(compose_config(), lambda line: None).model_path


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="session")
def train_here(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Train on one device in this process, and return the run folder."""
    from accelerate import PartialState

    from trainer.run import train

    root = tmp_path_factory.mktemp("here")

    def run(name: str, *overrides: str, checkpoint: Path | None = None) -> Path:
        config = compose_config([f"output_root={root}", f"name={name}", *overrides])
        folder = RunDir(root / name)
        prepare_folder(config, Claim(folder, checkpoint))
        prepared = prepare(config, lambda line: None)
        train(config, folder, prepared.cache, prepared.model_path, PartialState(cpu=True), Quiet(), checkpoint)
        return folder.path

    return run
