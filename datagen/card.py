"""The card of a dataset: a README.md for people and for the Hugging Face Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import yaml

from tunewright.deliver.compare import clip

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
    name = str(manifest.get("name") or "dataset")
    parts = [
        f"---\n{_head(manifest, train)}---",
        f"# {_plain(name)}",
        "Synthetic examples for fine-tuning a language model. **The answers were written by a model and nobody has "
        "checked them:** they may be wrong, biased or made up. Read some before you train on them.",
        _origin(manifest),
        _figures(manifest),
        _example(train),
        _files(manifest, name),
        _training(manifest, train, name),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    # Half of a surrogate pair, which a broken row may hold, has no UTF-8 form.
    return text.encode("utf-8", errors="replace").decode()


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


def _origin(manifest: Mapping[str, Any]) -> str:
    settings = _part(manifest, "settings")
    parts = ["## What it was made from"]
    if settings.get("task"):
        parts.append(f"The task:\n\n{_fenced(str(settings['task']))}")
    if manifest.get("system_message"):
        parts.append(f"The system message of every example:\n\n{_fenced(str(manifest['system_message']))}")
    rows = [("model", settings.get("model")), ("date", manifest.get("date"))]
    rows += [(key, value) for key, value in settings.items() if key not in NOT_SHOWN]
    rows += [(key, value) for key, value in _part(manifest, "versions").items()]
    parts.append(_table(rows))
    return "\n\n".join(part for part in parts if part) if len(parts) > 1 else ""


def _figures(manifest: Mapping[str, Any]) -> str:
    counts, rejects = _part(manifest, "counts"), _part(manifest, "rejects")
    names = {
        "asked_for": "rows asked for", "requests": "requests", "accepted": "rows accepted", "train": "rows to train on",
        "eval": "rows held out",
    }  # fmt: skip
    rows: list[tuple[str, Any]] = [(text, counts.get(key)) for key, text in names.items()]
    rows += [(f"rejected: {reason}", count) for reason, count in rejects.items()]
    usage = _part(manifest, "usage")
    if usage:
        rows.append(("tokens", sum(value for value in usage.values() if isinstance(value, int))))
    rows.append(("cost in US dollars", _part(manifest, "cost").get("usd")))
    table = _table(rows)
    if "test" not in split_files(manifest):
        return f"## Figures\n\n{table}\n\nNo rows are held out." if table else ""
    rule = "Rows whose requests are alike stand on the same side of the split, so none repeats across it."
    highest = _part(manifest, "similarity").get("highest_train_test")
    if highest is not None:
        # Cut, not rounded: 0.699 is below a limit of 0.7 and must read so.
        rule += f" The highest similarity of a held-out row to one that is trained on is {_floor(highest)}."
    return f"## Figures\n\n{table}\n\n{rule}" if table else f"## Split\n\n{rule}"


def _example(train: Sequence[Mapping[str, Any]]) -> str:
    if not train:
        return ""
    row = {
        key: clip(value, EXAMPLE_LENGTH) if isinstance(value, str) else value
        for key, value in train[0].items()
        if value not in ("", None, [])
    }
    return f"## An example\n\n{_fenced(json.dumps(row, ensure_ascii=False, indent=2), 'json')}"


def _files(manifest: Mapping[str, Any], name: str) -> str:
    hashes, splits = _part(manifest, "hashes"), {path: split for split, path in split_files(manifest).items()}
    what = {"train": "rows to train on", "test": "rows held out"}
    described = {path: what[split] for path, split in splits.items()}
    described.setdefault(f"{name}.manifest.json", "settings, counts, versions and hashes")
    lines = []
    for file in dict.fromkeys([*described, *hashes]):
        checked = f"sha256 {_code(str(hashes[file]))}" if hashes.get(file) else ""
        lines.append(f"- {_code(file)}: {', '.join(part for part in (described.get(file, ''), checked) if part)}")
    return "## Files\n\n" + "\n".join(line.removesuffix(": ") for line in lines)


def _training(manifest: Mapping[str, Any], train: Sequence[Mapping[str, Any]], name: str) -> str:
    columns = {"prompt": "instruction", "query": "input", "response": "output"}
    columns |= {key: key for key in ("system", "history") if any(row.get(key) for row in train)}
    splits = split_files(manifest)
    names = {"train": name, "test": f"{name}_eval"}
    entries = _part(manifest, "entries") or {
        names[split]: {"file_name": path, "columns": columns} for split, path in splits.items()
    }
    held = f" 'data.eval_names=[{name}_eval]'" if "test" in splits else ""
    command = f"tunewright train data=registry data.dir=data 'data.names=[{name}]'{held}"
    return (
        "## Training on it\n\nPut the files into a folder `data` with this as `data/dataset_info.json`, or add the "
        f"entries to the one that is there:\n\n{_fenced(json.dumps(entries, ensure_ascii=False, indent=2), 'json')}"
        f"\n\nThen:\n\n{_fenced(command, 'bash')}"
    )


def _part(manifest: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = manifest.get(key)
    return value if isinstance(value, Mapping) else {}


def _count(counts: Mapping[str, Any], key: str) -> int:
    value = counts.get(key)
    return value if isinstance(value, int) else 0


def _floor(value: Any) -> str:
    return f"{int(value * 1000) / 1000:.3f}" if isinstance(value, (int, float)) else str(value)


def _table(rows: Sequence[tuple[str, Any]]) -> str:
    lines = [f"| {_plain(key)} | {_code(_text(value))} |" for key, value in rows if value not in (None, "", [], {})]
    return "\n".join(["| | |", "|---|---|", *lines]) if lines else ""


def _text(value: Any) -> str:
    if isinstance(value, (Mapping, list, tuple, bool)):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def _plain(text: str) -> str:
    """Return text that Markdown and HTML show as it is, in one line."""
    return re.sub(r"([\\`*_\[\]<>|#&~])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """Return text as code in one line, with as many backticks around it as it needs."""
    text = " ".join(text.split()).replace("|", "\\|")
    marks = "`" * (_longest_run(text) + 1)
    pad = " " if "`" in text else ""
    return f"{marks}{pad}{text}{pad}{marks}"


def _fenced(text: str, language: str = "text") -> str:
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
