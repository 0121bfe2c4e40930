"""`tunewright data add`: a registry entry for a file, proposed and merged into what is there."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tunewright.config.compose import compose_config
from tunewright.errors import ConfigError, DataError, StorageError, did_you_mean
from tunewright.files import written_aside
from tunewright.launch.data.check import compose
from tunewright.launch.data.show import shown
from tunewright.registry import REGISTRY_NAME, edited_registry, read_registry
from tunewright.trainer.data.detect import detect
from tunewright.trainer.data.formats import Plain, to_conversation
from tunewright.trainer.data.messages import Unusable
from tunewright.trainer.data.sources import PEEK, open_datasets

PLAIN = r"\w.+-"  # characters of names, as a class of a regular expression
MESSAGE_SHOWN = 200  # characters of a message in a preview


def run(args: argparse.Namespace) -> int:
    """Run `tunewright data add` and return its exit code.

    Raises:
        DataError: the file is not there, cannot be understood or lies outside the registry's folder, or the name is
            taken.
    """
    file, folder = args.file.expanduser(), _folder(args)
    if not file.exists():
        near = did_you_mean(file.name, os.listdir(file.parent)) if file.parent.is_dir() else ""
        raise DataError(f"There is no file or folder {file}.{near}")
    inside = file.resolve().is_relative_to(folder.resolve())
    if not inside and not args.copy:
        raise DataError(
            f"{file} is not in {folder}, and a registry names the files of its own folder. Add --copy to copy it "
            f"there, or train on it without a registry: tunewright train data=registry "
            f"{shlex.quote(f'data.names=[{_hydra_value(str(file))}]')}"
        )
    name = args.name or re.sub(rf"[^{PLAIN}]+", "_", file.resolve().name if file.is_dir() else file.resolve().stem)
    if not re.fullmatch(rf"[{PLAIN}]+", name):
        raise DataError(f"'{name}' would have to be quoted wherever it is used: write letters, digits, _, - and dots.")
    location = file.resolve().relative_to(folder.resolve()).as_posix() if inside else file.resolve().name
    meaning, preview = propose(file)
    entry = {"file_name": location, **meaning}
    registry = folder / REGISTRY_NAME
    print(json.dumps({name: entry}, ensure_ascii=False, indent=2))
    print("\n".join(["", *preview, ""]))
    known = read_registry(registry, unique=True) if registry.is_file() else {}
    new = is_new(known, registry, name, entry)
    if not inside and not args.dry_run:
        copy_in(file, folder)  # raises when another file of that name is there
    if not new:
        print(f"{registry} has this entry already; nothing to do.")
        return 0
    if args.dry_run:
        print(f"Nothing was written to {registry} (--dry-run).")
        return 0
    add_entry(registry, name, entry)
    print(f"Added '{name}' to {registry}.")
    where = "" if folder == Path("data") else f" {shlex.quote(f'data.dir={folder}')}"
    print(f"Look at it: tunewright data check {name}{where}")
    return 0


def _folder(args: argparse.Namespace) -> Path:
    """Return the registry's folder, which `--dir` or the override `data.dir=` names."""
    for item in args.overrides:
        if not item.startswith("data.dir="):
            raise ConfigError(f"`data add` takes no '{item}': the only setting it knows is data.dir.")
    return Path(compose([], args.overrides, None, args.dir).data.dir).expanduser()


def _hydra_value(path: str) -> str:
    """Return a path as an element of a list in a Hydra override, in quotes where it holds what is syntax there."""
    if re.fullmatch(rf"[{PLAIN}/]+", path):
        return path
    escaped = path.replace("'", "\\'")
    return f"'{escaped}'"


def propose(file: Path) -> tuple[dict[str, Any], list[str]]:
    """Return a registry entry without its source, and lines that show its first usable row as a conversation.

    Raises:
        DataError: the file is broken, its columns do not tell what they mean, or no row can be used.
    """
    # The absolute path cannot be the name of an entry.
    rows = open_datasets([str(file.resolve())], compose_config().data, offline=True)[0]
    first = list(islice(rows, PEEK))
    meaning = detect(first)
    assert meaning is not None  # `open_datasets` has understood the columns by the same means
    reasons, usable = Counter[str](), []
    for number, row in enumerate(first):
        try:
            usable.append((number, to_conversation(row, rows.entry)))
        except Unusable as reason:
            reasons[str(reason)] += 1
    common = reasons.most_common(1)[0][0] if reasons else ""
    if not usable:
        raise DataError(
            f"None of the first {len(first)} rows of {file} can be used. The most frequent reason: {common}."
        )
    told = f"{reasons.total():,} of the first {len(first):,} rows cannot be used. The most frequent reason: {common}."
    return meaning, [*_preview(*usable[0]), *([told] if reasons else [])]


def _preview(number: int, source: Any) -> list[str]:
    if isinstance(source, Plain):
        parts = [("prompt", source.prompt), ("completion", source.completion)] if source.prompt else []
        return [f"Row {number}, text without a chat template:", *_said(parts or [("text", source.completion)])]
    turns = [(message["role"], message["content"]) for message in source.messages]
    for index, message in enumerate(source.messages):
        if message.get("tool_calls"):
            turns[index] = (message["role"], message["content"] + json.dumps(message["tool_calls"], ensure_ascii=False))
    tools = [f"  with {len(source.tools)} tools"] if source.tools else []
    return [f"Row {number} as a conversation:", *tools, *_said(turns)]


def _said(turns: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(role) for role, _ in turns)
    lines = []
    for role, text in turns:
        clipped = text if len(text) <= MESSAGE_SHOWN else text[:MESSAGE_SHOWN] + " ..."
        begin, *rest = shown(clipped).split("\n")
        lines += [f"  {role:<{width}}  {begin}", *(f"  {'':<{width}}  {line}" for line in rest)]
    return lines


def is_new(known: dict[str, Any], registry: Path, name: str, entry: dict[str, Any]) -> bool:
    """Tell whether an entry is new to the known ones of a registry.

    Raises:
        DataError: the name stands for another entry.
    """
    if name in known and known[name] != entry:
        raise DataError(
            f"{registry} has another entry '{name}': {json.dumps(known[name], ensure_ascii=False)}. Choose another "
            f"name with --name."
        )
    return name not in known


def add_entry(registry: Path, name: str, entry: dict[str, Any]) -> None:
    """Add an entry to a registry, which is made when there is none; others may do the same at the same time.

    Raises:
        DataError: the registry is broken, or see `is_new`.
        StorageError: the registry cannot be written.
    """
    try:
        with edited_registry(registry) as entries:
            if is_new(entries, registry, name, entry):
                entries[name] = entry
    except OSError as error:
        raise StorageError(f"Cannot write {registry}: {error.strerror}.") from error


def copy_in(file: Path, folder: Path) -> None:
    """Copy a file or a folder into a registry's folder, unless the same is there.

    Raises:
        DataError: something else has its name there.
        StorageError: it cannot be written.
    """
    target = folder / file.resolve().name
    if target.exists():
        if _content(target) == _content(file):
            return
        raise DataError(f"{target} is there already and is not the same as {file}. Rename one of them.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with written_aside(target) as staging:
            if file.is_dir():
                shutil.copytree(file, staging)
            else:
                shutil.copyfile(file, staging)
    except OSError as error:  # copytree's gathers several, and has no strerror
        raise StorageError(f"Cannot copy {file} to {target}: {error.strerror or error}.") from error


def _content(path: Path) -> list[tuple[str, bytes]]:
    files = sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]
    return [(item.relative_to(path).as_posix(), hashlib.sha256(item.read_bytes()).digest()) for item in files]
