"""The card of a dataset: a README.md for people and for the Hugging Face Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import PurePosixPath
from typing import Any

import yaml

from tunewright.pages import render
from tunewright.text import clip

SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}
LANGUAGES = {
    "chinese": "zh", "english": "en", "french": "fr", "german": "de", "italian": "it", "japanese": "ja",
    "korean": "ko", "portuguese": "pt", "russian": "ru", "spanish": "es",
}  # fmt: skip
ROWS_READ = 200  # to guess the language
EXAMPLE_LENGTH = 1_200  # characters of a field of the example
# Where things lay and how they were reached says nothing about the data, and may be nobody's business.
NOT_SHOWN = {"name", "task", "model", "language", "base_url", "out", "concurrency", "timeout"}


def card(manifest: Mapping[str, Any], train: Sequence[Mapping[str, Any]]) -> str:
    """Return the card in Markdown, with the head that the Hub reads."""
    name, settings = str(manifest.get("name") or "dataset"), _part(manifest, "settings")
    highest = _part(manifest, "similarity").get("highest_train_test")
    return render(
        "dataset_card.md.jinja",
        head=_head(manifest, train),
        name=name,
        task=str(settings.get("task") or ""),
        system=str(manifest.get("system_message") or ""),
        origin=_shown(
            [("model", settings.get("model")), ("date", manifest.get("date"))],
            ((key, value) for key, value in settings.items() if key not in NOT_SHOWN),
            _part(manifest, "versions").items(),
        ),
        figures=_figures(manifest),
        splits=split_files(manifest),
        # Cut, not rounded: 0.6996 is below a limit of 0.7 and must read so.
        highest=f"{int(highest * 1000) / 1000:.3f}" if isinstance(highest, (int, float)) else "",
        example=_example(train),
        files=_files(manifest, name),
        entries=json.dumps(_entries(manifest, train, name), ensure_ascii=False, indent=2),
    )


def _head(manifest: Mapping[str, Any], train: Sequence[Mapping[str, Any]]) -> str:
    counts = _part(manifest, "counts")
    rows = sum(_count(counts, key) for key in ("train", "eval")) or len(train)
    language = language_code(str(_part(manifest, "settings").get("language") or "")) or guess_language(train)
    head: dict[str, Any] = {"pretty_name": str(manifest.get("name") or "dataset")}
    if language:
        head["language"] = [language]
    head["size_categories"] = [next((size for most, size in SIZES.items() if rows < most), "n>1M")]
    head["task_categories"] = ["text-generation"]
    head["tags"] = ["synthetic", "tunewright"]
    files = split_files(manifest)
    # Without this the Hub would read the manifest as rows too.
    splits = [{"split": split, "path": path} for split, path in files.items()]
    head["configs"] = [{"config_name": "default", "data_files": splits}]
    return str(yaml.safe_dump(head, sort_keys=False, allow_unicode=True))


def language_code(language: str) -> str:
    """Return the code of a language that is given by code or by its English name, or an empty string."""
    word = language.strip().casefold()
    code = LANGUAGES.get(word, re.split("[-_]", word)[0])
    return code if re.fullmatch("[a-z]{2,3}", code) else ""


def guess_language(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the code of the language that most of the first rows seem to be in, or an empty string."""
    import py3langid

    found: dict[str, int] = {}
    for row in rows[:ROWS_READ]:
        # Both together: an answer of one word says little about its language.
        text = f"{row.get('instruction', '')} {row.get('output', '')}".strip()
        if text:
            code = str(py3langid.classify(text)[0])
            found[code] = found.get(code, 0) + 1
    return max(found, key=lambda code: found[code]) if found else ""


def split_files(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return the file of each split, by the names that the Hub gives to splits."""
    name, named = str(manifest.get("name") or "dataset"), list(_part(manifest, "hashes"))
    stems = {"train": (name,), "test": (f"{name}_eval", f"{name}_test")}
    found: dict[str, str] = {}
    for split, wanted in stems.items():
        for file in named:
            path = PurePosixPath(file)
            if path.stem in wanted and path.suffix in (".json", ".jsonl", ".parquet"):
                found.setdefault(split, file)
    if "train" not in found:
        found = {"train": f"{name}.json"}
        if _count(_part(manifest, "counts"), "eval"):
            found["test"] = f"{name}_eval.json"
    return found


def _figures(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    counts, usage = _part(manifest, "counts"), _part(manifest, "usage")
    names = {
        "asked_for": "rows asked for", "requests": "requests", "accepted": "rows accepted", "train": "rows to train on",
        "eval": "rows held out",
    }  # fmt: skip
    tokens = sum(value for value in usage.values() if isinstance(value, int)) if usage else None
    return _shown(
        ((text, counts.get(key)) for key, text in names.items()),
        ((f"rejected: {reason}", count) for reason, count in _part(manifest, "rejects").items()),
        [("tokens", tokens), ("cost in US dollars", _part(manifest, "cost").get("usd"))],
    )


def _shown(*rows: Iterable[tuple[str, Any]]) -> list[tuple[str, str]]:
    """Return the rows that have a value, as text."""
    told = [(key, value) for key, value in chain(*rows) if value not in (None, "", [], {})]
    as_json = (Mapping, list, tuple, bool)
    return [
        (key, json.dumps(value, ensure_ascii=False) if isinstance(value, as_json) else str(value))
        for key, value in told
    ]


def _example(train: Sequence[Mapping[str, Any]]) -> str:
    row = {
        key: clip(value, EXAMPLE_LENGTH) if isinstance(value, str) else value
        for key, value in (train[0] if train else {}).items()
        if value not in ("", None, [])
    }
    return json.dumps(row, ensure_ascii=False, indent=2) if train else ""


def _files(manifest: Mapping[str, Any], name: str) -> list[tuple[str, str, str]]:
    """Return each file, what it holds, and its hash."""
    hashes = _part(manifest, "hashes")
    what = {"train": "rows to train on", "test": "rows held out"}
    described = {path: what[split] for split, path in split_files(manifest).items()}
    described.setdefault(f"{name}.manifest.json", "settings, counts, versions and hashes")
    files = dict.fromkeys([*described, *hashes])
    return [(file, described.get(file, ""), str(hashes.get(file) or "")) for file in files]


def _entries(manifest: Mapping[str, Any], train: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    columns = {"prompt": "instruction", "query": "input", "response": "output"}
    columns |= {key: key for key in ("system", "history") if any(row.get(key) for row in train)}
    names = {"train": name, "test": f"{name}_eval"}
    return _part(manifest, "entries") or {
        names[split]: {"file_name": path, "columns": columns} for split, path in split_files(manifest).items()
    }


def _part(manifest: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = manifest.get(key)
    return value if isinstance(value, Mapping) else {}


def _count(counts: Mapping[str, Any], key: str) -> int:
    value = counts.get(key)
    return value if isinstance(value, int) else 0
