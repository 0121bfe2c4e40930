"""LLaMA-Factory's `dataset_info.json`: what a dataset's name means.

The whole schema is read. Two rules are kinder than LLaMA-Factory's, unless `data.compat=llamafactory` asks for its own:
a column or tag that an entry does not name keeps its default (there, naming one sets all others to null), and a key
that nobody reads is an error instead of being passed over.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

from tunewright.config.schema import Compat, DataConfig
from tunewright.errors import DataError, did_you_mean
from tunewright.files import write_json
from tunewright.plugins import PLUGINS
from tunewright.shipped import shipped

REGISTRY_NAME = "dataset_info.json"

TEXT_COLUMNS = ("prompt", "query", "response", "history", "messages", "system", "tools")
MEDIA_COLUMNS = ("images", "videos", "audios")
PREFERENCE_COLUMNS = ("chosen", "rejected", "kto_tag")
# `completion` and `text` belong to the two formattings that LLaMA-Factory does not have.
COLUMN_KEYS = (*TEXT_COLUMNS, *MEDIA_COLUMNS, *PREFERENCE_COLUMNS, "completion", "text")
SOURCE_KEYS = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name", "file_name")
ENTRY_KEYS = (*SOURCE_KEYS, "formatting", "ranking", "columns", "tags", "subset", "split", "folder", "num_samples")
LEGACY_KEYS = ("file_sha1", "stage")  # in old registries; LLaMA-Factory passes them over as well

DEFAULT_COLUMNS: dict[str, dict[str, str]] = {
    "alpaca": {
        "prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history",
    },
    "sharegpt": {"messages": "conversations", "system": "system", "tools": "tools"},
    "openai": {"messages": "messages", "system": "system", "tools": "tools"},
    "prompt_completion": {"prompt": "prompt", "completion": "completion", "tools": "tools"},
    "text": {"text": "text"},
}  # fmt: skip
# A row without one of these teaches nothing.
REQUIRED_COLUMNS = {
    "alpaca": ("prompt", "response"),
    "sharegpt": ("messages",),
    "openai": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
SHAREGPT_TAGS = {
    "role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
    "observation_tag": "observation", "function_tag": "function_call", "system_tag": "system",
}  # fmt: skip
OPENAI_TAGS = {
    "role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
    "observation_tag": "tool", "function_tag": "function_call", "system_tag": "system",
}  # fmt: skip


# What `cloud_file_name` may name: stores elsewhere, none of which is this machine's disk.
STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "hdfs", "hf", "http", "https")
ALLOW_OUTSIDE = "If that is meant, set data.allow_outside=true."


class Place(Enum):
    """Where the rows of an entry are."""

    file = "file"
    cloud = "cloud"
    hub = "hub"
    modelscope = "modelscope"


@dataclass(frozen=True)
class Entry:
    """One dataset: where its rows are, and what their columns mean."""

    name: str
    where: str  # for messages: "entry 'mine' of data/dataset_info.json"
    place: Place
    location: str  # path, URL, or ORG/NAME
    formatting: str = "alpaca"
    # Meaning -> column. A meaning that no column has is absent.
    columns: dict[str, str] = field(default_factory=dict)
    named: frozenset[str] = frozenset()  # the columns that the entry names itself: these must be in the data
    without: frozenset[str] = frozenset()  # the columns that the entry says there are none of
    tags: dict[str, str | None] = field(default_factory=dict)
    subset: str | None = None
    split: str | None = None
    folder: str | None = None
    num_samples: int | None = None
    compat: Compat = Compat.none
    within: Path | None = None  # the folder that its files must not lie outside of

    def meaning(self) -> dict[str, Any]:
        """Return what decides how a row is read: part of the key of its tokens."""
        added = PLUGINS.formats.get(self.formatting)
        return {
            "formatting": self.formatting, "columns": self.columns, "tags": self.tags, "compat": self.compat.value,
            "without": sorted(self.without), **({"code": added.code} if added else {}),
        }  # fmt: skip


def load_entry(name: str, data: DataConfig) -> Entry:
    """Find a dataset by its name: an entry of the registry, `hub:ORG/NAME`, `modelscope:ORG/NAME`, or a path.

    An entry without formatting, as a path or a hub name gives, has the formatting "" until `sources.open_datasets` has
    seen its columns.

    Raises:
        DataError: no registry, broken JSON, unknown name, or an entry that cannot be used for supervised fine-tuning.
    """
    setting = "data.names" if name in data.names or name not in data.eval_names else "data.eval_names"
    if not name.strip():
        raise DataError(f"A name of `{setting}` is empty.")
    place, _, repository = name.partition(":")
    if place in (Place.hub.value, Place.modelscope.value) and repository:
        return Entry(name, f"'{name}'", Place(place), repository, formatting="")
    root = Path(data.root or "")
    users = root / Path(data.dir).expanduser() / REGISTRY_NAME
    # The datasets that come with tunewright have their names wherever it is used, unless those mean something there.
    paths = [users, *([shipped("data") / REGISTRY_NAME] if data.dir == DataConfig.dir else [])]
    registries = {path: read_registry(path) for path in paths if path.is_file()}
    path = next((path for path, registry in registries.items() if name in registry), None)
    if path is None:
        direct = root / Path(name).expanduser()
        if direct.exists():
            return Entry(name, f"'{name}'", Place.file, str(direct), formatting="")
        raise DataError(_unknown(name, setting, users, registries))
    raw = registries[path][name]
    entry = parse_entry(name, raw, path, data.compat, prefer_modelscope=data.prefer_modelscope)
    check_trainable(entry, ranking=bool(raw.get("ranking")))
    return entry if data.allow_outside else _confined(entry, path.parent)


def _unknown(name: str, setting: str, path: Path, registries: dict[Path, dict[str, Any]]) -> str:
    names = sorted(set().union(*registries.values()))
    known = ", ".join(names) or "nothing"
    known = known if len(known) < 600 else known[:600] + " ..."
    if path in registries:
        return (
            f"`{setting}` asks for '{name}', which is neither in {path} nor a file or folder."
            f"{did_you_mean(name, names)} The registry has: {known}."
        )
    problem = f"There is no file or folder '{name}', and" if "/" in name or Path(name).suffix else "There is"
    return (
        f"{problem} no registry at {path}, which `{setting}` looks '{name}' up in.{did_you_mean(name, names)} Set "
        f"`data.dir` to the folder that holds {REGISTRY_NAME}, or name a file, a folder or hub:ORG/NAME."
        f"{f' With tunewright come: {known}.' if names else ''}"
    )


def read_registry(path: Path, *, unique: bool = False) -> dict[str, Any]:
    """Read a registry; of a key that is there twice the last one counts, unless `unique` refuses it.

    Raises:
        DataError: not UTF-8, not JSON, or not an object; or a key that is there twice.
    """
    try:
        registry = json.loads(
            path.read_bytes().decode("utf-8-sig"), object_pairs_hook=partial(_once, path) if unique else None
        )
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}.") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}.") from error
    if not isinstance(registry, dict):
        raise DataError(f"{path} must hold an object of name: entry, found {type(registry).__name__}.")
    return registry


def _once(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = Counter(key for key, _ in pairs)
    twice = [key for key, count in keys.items() if count > 1]
    if twice:
        raise DataError(f"{path} has {', '.join(repr(key) for key in twice)} twice; remove one of them.")
    return dict(pairs)


@contextmanager
def edited_registry(path: Path) -> Iterator[dict[str, Any]]:
    """Give the entries of a registry to change, and write them when the context ends; one writer at a time.

    The file is made when there is none, replaced in one step, and left alone when nothing changed.

    Raises:
        DataError: the file is broken, or has a name twice, one of which would be lost.
    """
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock"), timeout=60):
        before = read_registry(path, unique=True) if path.is_file() else {}
        entries = dict(before)
        yield entries
        if entries != before:
            write_json(path.resolve(), entries)  # a link stays a link


def parse_entry(
    name: str, raw: Any, registry: Path, compat: Compat = Compat.none, *, prefer_modelscope: bool = False
) -> Entry:
    """Read one entry of the registry at `registry`, whatever it is for.

    Raises:
        DataError: a key or a value that the schema does not have, or no source.
    """
    where = f"entry '{name}' of {registry}"
    if not isinstance(raw, dict):
        raise DataError(f"{where} must be an object, found {type(raw).__name__}.")
    if compat is Compat.none:
        _known_keys(raw, (*ENTRY_KEYS, *LEGACY_KEYS), where)
    given = raw.get("columns") or {}
    formatting = raw.get("formatting", "alpaca")
    if formatting not in (known := PLUGINS.names("format")):
        raise DataError(
            f"{where}: `formatting` is '{formatting}'.{did_you_mean(str(formatting), known)} "
            f"It can be {', '.join(known)}."
        )
    added = PLUGINS.formats.get(formatting)
    texts = (*SOURCE_KEYS, "subset", "split", "folder")
    for key, kind in (*((key, str) for key in texts), ("num_samples", int), ("ranking", bool)):
        if raw.get(key) is not None and not isinstance(raw[key], kind):
            raise DataError(f"{where}: `{key}` is {json.dumps(raw[key])}; it must be {kind.__name__}.")
    keys, defaults = (tuple(added.columns), added.columns) if added else (COLUMN_KEYS, DEFAULT_COLUMNS[formatting])
    columns = _filled(raw, "columns", keys, defaults, where, compat)
    tags = _filled(
        raw, "tags", tuple(SHAREGPT_TAGS), SHAREGPT_TAGS if formatting == "sharegpt" else OPENAI_TAGS, where, compat
    )
    place, location = _source(raw, registry, where, prefer_modelscope=prefer_modelscope)
    if raw.get("num_samples") is not None and raw["num_samples"] < 1:
        raise DataError(f"{where}: `num_samples` is {raw['num_samples']}; write a number of rows from 1.")
    return Entry(
        name, where, place, location, formatting,
        columns={key: column for key, column in columns.items() if column is not None},
        named=frozenset(key for key, column in given.items() if column),
        without=frozenset(key for key, column in given.items() if not column),
        tags=tags,
        subset=raw.get("subset"), split=raw.get("split"), folder=raw.get("folder"), num_samples=raw.get("num_samples"),
        compat=compat,
    )  # fmt: skip


def _known_keys(block: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in block:
        if key not in known:
            raise DataError(f"{where} has no key '{key}'.{did_you_mean(key, known)} Known keys: {', '.join(known)}.")


def _filled(
    raw: dict[str, Any], block: str, known: tuple[str, ...], defaults: Mapping[str, str], where: str, compat: Compat
) -> dict[str, str | None]:
    """Return the block `columns` or `tags` of an entry with the defaults of what it does not name."""
    given = raw.get(block) or {}
    if not isinstance(given, dict):
        raise DataError(f"{where}: `{block}` must be an object, found {type(given).__name__}.")
    _known_keys(given, known, f"`{block}` of {where}")
    for key, value in given.items():
        if value is not None and not isinstance(value, str):
            raise DataError(f"{where}: `{block}.{key}` is {json.dumps(value)}; it must be a column's name or null.")
    given = {key: value or None for key, value in given.items()}  # LLaMA-Factory's users write "" for null as well
    if given and compat is Compat.llamafactory:
        return {**dict.fromkeys(defaults), **given}
    return {**defaults, **given}


def _source(raw: dict[str, Any], registry: Path, where: str, *, prefer_modelscope: bool) -> tuple[Place, str]:
    if raw.get("hf_hub_url") and not (prefer_modelscope and raw.get("ms_hub_url")):
        return Place.hub, raw["hf_hub_url"]
    if raw.get("ms_hub_url"):
        return Place.modelscope, raw["ms_hub_url"]
    if raw.get("om_hub_url"):
        raise DataError(f"{where} is on OpenMind (`om_hub_url`), which is not read. Add `hf_hub_url` or `ms_hub_url`.")
    if raw.get("script_url"):
        raise DataError(
            f"{where} is a loading script (`script_url`): Python code from elsewhere that would run here, and that "
            f"datasets has not run since version 4. Save its rows as JSON or parquet and name the file."
        )
    if raw.get("cloud_file_name"):
        return Place.cloud, raw["cloud_file_name"]
    if raw.get("file_name"):
        return Place.file, str(registry.parent / Path(raw["file_name"]).expanduser())
    raise DataError(
        f"{where} names no source.{did_you_mean('file_name', raw)} It needs one of: {', '.join(SOURCE_KEYS)}."
    )


def check_trainable(entry: Entry, *, ranking: bool = False) -> None:
    """Refuse what supervised fine-tuning on text cannot use.

    Raises:
        DataError: with what the entry would have to say instead.
    """
    marks = [f"`{entry.columns[key]}`" for key in PREFERENCE_COLUMNS if key in entry.columns]
    if ranking or marks:
        label = entry.columns.get("kto_tag")
        advice = (
            f'keep the rows whose `{label}` is true, and write "kto_tag": null into `columns`'
            if label
            else 'write an entry whose `response` (or `messages`) is the preferred answer alone: "columns": '
            f'{{"response": "{entry.columns.get("chosen", "chosen")}"}}'
        )
        raise DataError(
            f"{entry.where} is preference data ({', '.join(marks or ['`ranking`'])}), which supervised fine-tuning "
            f"cannot use. To learn the good answers, {advice}."
        )
    media = [key for key in MEDIA_COLUMNS if key in entry.columns]
    if media:
        raise DataError(
            f"{entry.where} has {', '.join(media)} (`{entry.columns[media[0]]}`); tunewright trains on text. Take out "
            f'the rows that have them, or write "{media[0]}": null into the `columns` of an entry.'
        )
    if "response" not in entry.columns and entry.formatting == "alpaca":
        raise DataError(
            f"{entry.where} names no `response` column, so there is nothing to learn. Text that is "
            f'learnt whole is "formatting": "text", "columns": {{"text": "{entry.columns.get("prompt", "text")}"}}.'
        )
    if "messages" not in entry.columns and entry.formatting in ("sharegpt", "openai"):
        raise DataError(f"{entry.where} names no `messages` column, so there is nothing to learn.")


# ---- what a registry that came from elsewhere must not reach --------------------------------------------------------


def _confined(entry: Entry, folder: Path) -> Entry:
    """Return an entry that may read what lies in the registry's folder, or in a store, and nothing else.

    Raises:
        DataError: it names something else.
    """
    if entry.folder and (Path(entry.folder).is_absolute() or ".." in Path(entry.folder).parts):
        raise DataError(f"{entry.where}: `folder` is '{entry.folder}', which leaves the dataset. {ALLOW_OUTSIDE}")
    store = entry.location.partition("://")[0] if "://" in entry.location else ""
    if entry.place is Place.cloud and (store not in STORES or "::" in entry.location):
        raise DataError(
            f"{entry.where}: `cloud_file_name` is '{entry.location}', which is in no store that a registry may name "
            f"({', '.join(f'{name}://' for name in STORES)}). A file beside the registry is `file_name`. "
            f"{ALLOW_OUTSIDE}"
        )
    if entry.place is not Place.file:
        return entry
    confined = replace(entry, within=folder.resolve())
    check_inside(confined, Path(entry.location))
    return confined


def check_inside(entry: Entry, file: Path) -> None:
    """Refuse a file of an entry that lies, all links followed, outside of the folder it is confined to.

    Raises:
        DataError: with where the file lies.
    """
    if entry.within and not file.resolve().is_relative_to(entry.within):
        raise DataError(f"{entry.where} reaches outside its own folder: {file.resolve()}. {ALLOW_OUTSIDE}")
