"""Trainings that are started, and end with the test at the latest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.running import Started


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    started: list[Started] = []

    def begin(name: str, *overrides: str, **options: Any) -> Started:
        started.append(Started(tmp_path, name, *overrides, **options))
        return started[-1]

    yield begin
    for run in started:
        for process in [*run.process.children(recursive=True), run.process] if run.process.is_running() else []:
            process.kill()
