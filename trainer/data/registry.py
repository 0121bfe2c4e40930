"""LLaMA-Factory's `dataset_info.json`: which file a dataset name means and which column means what."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.errors import DataError, did_you_mean

REGISTRY_NAME = "dataset_info.json"
ALPACA_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "system": "system"}
COLUMN_KEYS = {
    "prompt", "query", "response", "history", "messages", "system", "tools", "images", "videos", "audios",
    "chosen", "rejected", "kto_tag",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One dataset of a registry."""

    name: str
    path: Path
    registry: Path
    # Meaning -> column in the file. A column that the entry does not name keeps its default; unlike LLaMA-Factory,
    # which sets every other column to null once `columns` is there.
    columns: dict[str, str] = field(default_factory=dict)
    # The columns that the entry names itself: these must be in the file.
    named: frozenset[str] = frozenset()


def load_entry(name: str, folder: Path) -> Entry:
    """Find `name` in the registry of `folder`.

    Raises:
        DataError: no registry, broken JSON, unknown name, or an entry that cannot be read.
    """
    path = folder / REGISTRY_NAME
    registry = _read_registry(path)
    if name not in registry:
        raise DataError(
            f"`data.names` asks for '{name}', which is not in {path}.{did_you_mean(name, registry)} "
            f"It has: {', '.join(sorted(registry)) or 'nothing'}."
        )
    return _parse_entry(name, registry[name], path)


def _read_registry(path: Path) -> dict[str, Any]:
    try:
        registry = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise DataError(
            f"There is no registry at {path}. Set `data.dir` to the folder that holds {REGISTRY_NAME}."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}.") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}.") from error
    if not isinstance(registry, dict):
        raise DataError(f"{path} must hold an object of name: entry, found {type(registry).__name__}.")
    return registry


def _parse_entry(name: str, raw: Any, registry: Path) -> Entry:
    where = f"Entry '{name}' in {registry}"
    if not isinstance(raw, dict):
        raise DataError(f"{where} must be an object, found {type(raw).__name__}.")
    if "file_name" not in raw:
        raise DataError(
            f"{where} has no `file_name`.{did_you_mean('file_name', raw)} "
            f"Datasets from a hub, a script or a cloud store are not read yet."
        )
    formatting = raw.get("formatting", "alpaca")
    if formatting != "alpaca":
        raise DataError(f"{where}: `formatting` is '{formatting}'; only 'alpaca' is read yet.")
    if raw.get("ranking"):
        raise DataError(f"{where} is preference data (`ranking: true`), which supervised fine-tuning cannot use.")
    columns = raw.get("columns", {})
    for key in columns:
        if key not in COLUMN_KEYS:
            raise DataError(f"{where}: `columns` has no key '{key}'.{did_you_mean(key, COLUMN_KEYS)}")
    path = (registry.parent / raw["file_name"]).resolve()
    if not path.is_file():
        raise DataError(f"{where}: `file_name` is '{raw['file_name']}', but there is no file {path}.")
    return Entry(name, path, registry, {**ALPACA_COLUMNS, **columns}, frozenset(columns))
