"""The files made from a log: rows, held-out rows, registry entries and a manifest, each replaced in one step."""

from __future__ import annotations

import random
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from datagen.replies import ReplyLog, Row, Tally
from datagen.settings import DatagenConfig, Endpoint
from launch import __version__
from launch.errors import ConfigError
from launch.rundir import write_json
from trainer.data.registry import edited_registry, read_registry

EVAL_SHARE = 0.1
COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "system": "system"}


class Files:
    """Paths of one dataset."""

    def __init__(self, out: Path, name: str) -> None:
        self.out, self.name = out, name
        self.rows = out / f"{name}.json"
        self.eval_rows = out / f"{name}_eval.json"
        self.manifest = out / f"{name}.manifest.json"
        self.log = out / f"{name}.datagen.jsonl"
        self.lock = out / f".{name}.datagen.lock"
        self.registry = out / "dataset_info.json"

    def check_ours(self) -> None:
        """Raise ConfigError when the name belongs to a dataset that was not generated here.

        Raises:
            DataError: the registry is broken, which should be told before anything is paid for.
        """
        known = read_registry(self.registry, unique=True) if self.registry.is_file() else {}
        if self.log.exists() or self.manifest.exists():
            return
        taken = {self.name, f"{self.name}_eval"} & known.keys()
        files = [path for path in (self.rows, self.eval_rows) if path.exists()]
        if self.rows == self.registry or taken or files:
            found = f"{self.registry} has an entry '{min(taken)}'" if taken else f"{(files or [self.rows])[0]} is there"
            raise ConfigError(
                f"`name` is '{self.name}', but {found} and was not generated here. Choose another `name`."
            )


def split(rows: list[Row], seed: int) -> tuple[list[Row], list[Row]]:
    """Return (rows to train on, held-out rows): whole groups of one instruction, a tenth of the rows at most."""
    groups: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(" ".join(row["instruction"].casefold().split()), []).append(number)
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    target, held = max(1, round(len(rows) * EVAL_SHARE)), set[int]()
    for key in order:
        if len(held) + len(groups[key]) <= min(target, len(rows) - 1):
            held.update(groups[key])
    kept = [row for number, row in enumerate(rows) if number not in held]
    return kept, [rows[number] for number in sorted(held)]


def write_outputs(
    files: Files, config: DatagenConfig, endpoint: Endpoint, system: str, tally: Tally, log: ReplyLog
) -> tuple[int, int]:
    """Write every file and return how many rows are for training and how many are held out."""
    kept, held = split(tally.rows, config.seed)
    entries = {}
    for name, path, rows in ((config.name, files.rows, kept), (f"{config.name}_eval", files.eval_rows, held)):
        if rows:
            write_json(path, [{**row, "system": system} for row in rows])
            entries[name] = {"file_name": path.name, "columns": COLUMNS}
    with edited_registry(files.registry) as registry:
        for name in (config.name, f"{config.name}_eval"):
            if name in entries:
                registry[name] = {**registry.get(name, {}), **entries[name]}
            else:
                registry.pop(name, None)
    if not held:
        files.eval_rows.unlink(missing_ok=True)
    manifest = {
        "name": config.name,
        "settings": {**asdict(config), "base_url": endpoint.base_url},
        "system_message": system,
        "versions": {"tunewright": __version__, "openai": version("openai")},
        "counts": {"asked_for": config.examples, "accepted": len(tally.rows), "train": len(kept), "eval": len(held)},
        "rejects": dict(sorted(tally.rejects.items())),
        "usage": dict(log.usage()),
    }
    write_json(files.manifest, manifest)
    return len(kept), len(held)
