"""`tunewright.datagen(...)`: the command as a function, for programs and notebooks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tunewright.datagen.endpoint import find_endpoint
from tunewright.datagen.make_dataset import make_dataset
from tunewright.datagen.outputs import Files
from tunewright.datagen.settings import load_settings


@dataclass(frozen=True)
class Generated:
    """A dataset that was made: entry `name` of the registry in `folder`, and `name`_eval for what is held out."""

    name: str
    folder: Path

    @property
    def rows(self) -> Path:
        return Files(self.folder, self.name).rows

    @property
    def eval_rows(self) -> Path | None:
        """The held-out rows, or None where nothing is held out."""
        path = Files(self.folder, self.name).eval_rows
        return path if path.is_file() else None

    @property
    def preview(self) -> Path:
        return Files(self.folder, self.name).preview

    @property
    def manifest(self) -> dict[str, Any]:
        return dict(json.loads(Files(self.folder, self.name).manifest.read_text(encoding="utf-8")))


def datagen(
    *overrides: str | Mapping[str, Any],
    dry_run: bool = False,
    plan_only: bool = False,
    say: Callable[[str], None] = print,
    **settings: Any,
) -> Generated:
    """Make a dataset from the description of a task; a run that was stopped is continued, and pays for what is missing.

    Args:
        overrides: settings as on the command line ("examples=500"), and mappings of them ({"budget.usd": 5}).
        settings: the same where a setting's name is a Python one: `task="...", name="riddles"`.
        dry_run: check everything, and estimate requests, tokens and cost.
        plan_only: make and save the plan, and stop.
        say: takes the lines that tell how far it is.

    Raises:
        ConfigError, DataError, PeerError, StorageError: as `tunewright datagen`.
    """
    given: list[str] = []
    for item in (*overrides, settings):
        given += [item] if isinstance(item, str) else [f"{key}={_text(value)}" for key, value in item.items()]
    config = load_settings(given)
    work = partial(make_dataset, config, find_endpoint(config), dry_run=dry_run, plan_only=plan_only, say=say)
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        work()
    else:  # a notebook's own loop, in which no other can run
        with ThreadPoolExecutor(1) as thread:
            thread.submit(work).result()
    return Generated(config.name, Path(config.out))


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
