"""`tunewright runs`: what runs there are, how far each is, and what would go on with it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright.checkpoints import newest_whole
from tunewright.errors import StorageError
from tunewright.folders import TRASH
from tunewright.locks import is_locked
from tunewright.metrics import final_train_loss, read_metrics
from tunewright.run_folder import RunDir
from tunewright.terminal import table
from tunewright.text import clock

DEPTH = 3  # folders below the one that is asked for: runs/demo/zero2


@dataclass(frozen=True)
class State:
    """One run, as its folder tells it."""

    run: RunDir
    state: str  # running, done, stopped, failed, or interrupted: nobody has written down its end
    step: int | None  # the last one in metrics.jsonl
    planned: int | None
    checkpoint: str  # the newest whole one, and what is wrong with newer ones
    loss: float | None
    age: float | None  # seconds since it last wrote metrics
    warned: bool  # its training ended with a warning

    def resumable(self) -> bool:
        return self.state in ("stopped", "failed", "interrupted", "manifest damaged")


def find_runs(root: Path) -> list[State]:
    """Return the runs below a folder, or the one that it is, those that wrote last at the end."""
    found = [state_of(RunDir(path)) for path in _folders(root, DEPTH)]
    return sorted(found, key=lambda one: -(one.age or float("inf")))


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / "manifest.json").is_file() or (folder / "checkpoints").is_dir():
        yield folder
    elif depth and folder.is_dir():
        for path in sorted(folder.iterdir()):
            if path.is_dir() and path.name != TRASH and not path.is_symlink():
                yield from _folders(path, depth - 1)


def state_of(run: RunDir) -> State:
    """Return how a run stands."""
    manifest: dict[str, Any]
    try:
        manifest = run.read_manifest()
        state = str(manifest.get("status", "no manifest"))
    except StorageError:
        manifest, state = {}, "manifest damaged"
    running = is_locked(run.path)
    if state == "running" and not running:
        state = "interrupted"  # killed: nothing was left to write it down
    lines = read_metrics(run.metrics) if run.metrics.is_file() else []
    checkpoint, damaged = newest_whole(run.checkpoints, hashed=False)
    told = checkpoint.name if checkpoint else "-"
    if damaged:
        told += f" ({', '.join(one.path.name for one in damaged)} damaged)"
    return State(
        run,
        "running" if running else state,
        lines[-1]["step"] if lines else None,
        manifest.get("steps_planned"),
        told,
        final_train_loss(lines),
        time.time() - run.metrics.stat().st_mtime if lines else None,
        state == "done" and bool(manifest.get("warnings")),
    )


def runs_text(root: Path) -> str:
    """Return a table of the runs below a folder, and how those go on that are not at their end."""
    found = find_runs(root)
    if not found:
        return f"There is no run in {root}. `tunewright train` makes one in `output_root`, by default runs."
    head = ("run", "state", "step", "loss", "newest checkpoint", "last written")
    rows = [
        (
            str(one.run.path),
            f"{one.state}, with a warning" if one.warned else one.state,
            "-" if one.step is None else f"{one.step:,}" + (f"/{one.planned:,}" if one.planned else ""),
            "-" if one.loss is None else f"{one.loss:.4f}",
            one.checkpoint,
            "-" if one.age is None else f"{clock(one.age)} ago",
        )
        for one in found
    ]
    text = table(head, rows)
    going_on = [one for one in found if one.resumable()]
    return f"{text}\n\nTo go on: tunewright resume {going_on[-1].run.path}" if going_on else text
