"""Token ids on disk: made once, before ranks start, and opened by every rank as memory-mapped Arrow files.

The folder's name is a digest of everything that decides what is in it, so that nothing stale is ever opened and a
second start with nothing changed makes nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from launch.errors import DataError
from launch.schema import DataConfig
from trainer.data.registry import Entry, load_entry
from trainer.data.rows import Row, read_rows, to_messages

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

FORMAT = 1  # raise it when the meaning of the cached columns changes
SPLITS = ("train", "eval")
REPORT_NAME = "report.json"
Progress = Callable[[int, int], None]  # (rows done, rows in all)


@dataclass
class SplitReport:
    """What became of the rows of one split."""

    read: int = 0
    kept: int = 0
    tokens: int = 0
    scored_tokens: int = 0
    longest: int = 0
    # Reason -> row numbers, as "name:row".
    dropped: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenCache:
    """A finished cache: where it is, what it holds."""

    folder: Path
    reports: dict[str, SplitReport]

    @property
    def fingerprint(self) -> str:
        return self.folder.name

    def open(self, split: str) -> Dataset | None:
        """Open a split: columns `input_ids` and `labels`, lists of int32. None when the split is empty."""
        from datasets import load_from_disk

        return load_from_disk(str(self.folder / split)) if self.reports[split].kept else None  # type: ignore[return-value]


def cache_key(data: DataConfig, seed: int, model_path: Path | None) -> str:
    """Return the digest of everything that decides the token ids, read without importing torch or transformers."""
    digest = hashlib.sha256()
    settings = {
        "format": FORMAT,
        "cutoff_len": data.cutoff_len,
        "eval_size": data.eval_size,
        "max_samples": data.max_samples,
        "seed": seed,
        "versions": [version("transformers"), version("tokenizers")],
    }
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for name in (*data.names, "|", *data.eval_names):
        digest.update(name.encode())
        if name != "|":
            entry = load_entry(name, Path(data.dir))
            digest.update(json.dumps(sorted(entry.columns.items())).encode())
            digest.update(entry.path.read_bytes())
    if model_path is not None:
        for pattern in ("*token*", "*vocab*", "merges.txt", "*template*", "special_tokens_map.json"):
            for file in sorted(model_path.glob(pattern)):
                digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def open_cache(data: DataConfig, key: str) -> TokenCache | None:
    """Return the finished cache of that key, or None."""
    folder = Path(data.cache_dir).expanduser() / "tokens" / key
    try:
        reports = json.loads((folder / REPORT_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return TokenCache(folder, {split: SplitReport(**reports[split]) for split in SPLITS})


def build_cache(
    data: DataConfig,
    seed: int,
    key: str,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress = lambda done, total: None,
) -> TokenCache:
    """Render and tokenise every row, unless the cache is there. Safe to call from several processes at once.

    Raises:
        DataError: no row of the training split is left.
    """
    root = Path(data.cache_dir).expanduser() / "tokens"
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{key}.lock"):
        found = open_cache(data, key)
        if found:
            return found
        staging = root / f"{key}.{os.getpid()}.part"
        shutil.rmtree(staging, ignore_errors=True)
        reports = _write_splits(data, seed, staging, tokenizer, progress)
        (staging / REPORT_NAME).write_text(json.dumps({k: asdict(r) for k, r in reports.items()}, indent=1))
        staging.rename(root / key)
    return TokenCache(root / key, reports)


def split_rows(data: DataConfig, seed: int) -> dict[str, list[tuple[Entry, int, Row]]]:
    """Read the datasets and deal their rows into train and eval, the same way under the same seed."""
    train = [row for name in data.names for row in _sampled(load_entry(name, Path(data.dir)), data.max_samples, seed)]
    if data.eval_names:
        return {
            "train": train,
            "eval": [row for name in data.eval_names for row in _sampled(load_entry(name, Path(data.dir)), None, seed)],
        }
    held_out = round(data.eval_size * len(train)) if data.eval_size < 1 else int(data.eval_size)
    if held_out >= len(train):
        raise DataError(
            f"`data.eval_size` is {data.eval_size}, which holds out {held_out} of {len(train)} rows: none is left."
        )
    order = list(range(len(train)))
    random.Random(seed).shuffle(order)
    evaluated = set(order[:held_out])
    return {
        "train": [row for index, row in enumerate(train) if index not in evaluated],
        "eval": [train[index] for index in sorted(evaluated)],
    }


def _sampled(entry: Entry, limit: int | None, seed: int) -> list[tuple[Entry, int, Row]]:
    rows = [(entry, number, row) for number, row in enumerate(read_rows(entry))]
    if limit is not None and limit < len(rows):
        chosen = sorted(random.Random(seed).sample(range(len(rows)), limit))
        rows = [rows[index] for index in chosen]
    return rows


def _write_splits(
    data: DataConfig, seed: int, folder: Path, tokenizer: PreTrainedTokenizerBase, progress: Progress
) -> dict[str, SplitReport]:
    from datasets import Dataset, Features, List, Value

    splits = split_rows(data, seed)
    total = sum(len(rows) for rows in splits.values())
    features = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})
    reports, done = {}, 0
    for split, rows in splits.items():
        report = SplitReport(read=len(rows))
        columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
        for entry, number, row in rows:
            example = _tokenize(row, entry, data, tokenizer)
            if isinstance(example, str):
                report.dropped.setdefault(example, []).append(f"{entry.name}:{number}")
            else:
                for key, values in example.items():
                    columns[key].append(values)
                report.tokens += len(example["input_ids"])
                report.scored_tokens += sum(label >= 0 for label in example["labels"])
                report.longest = max(report.longest, len(example["input_ids"]))
            done += 1
            if done % 1000 == 0 or done == total:
                progress(done, total)
        report.kept = len(columns["input_ids"])
        if split == "train" and not report.kept:
            reasons = "; ".join(f"{len(where)} rows: {reason}" for reason, where in report.dropped.items())
            raise DataError(f"No row of {', '.join(data.names)} can be trained on. {reasons}.")
        Dataset.from_dict(columns, features=features).save_to_disk(str(folder / split))
        reports[split] = report
    return reports


def _tokenize(
    row: Row, entry: Entry, data: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[int]] | str:
    """Return the columns of one row, or the reason why it is dropped."""
    from trainer.data.render import render

    messages = to_messages(row, entry.columns)
    if isinstance(messages, str):
        return messages
    example = render(messages, tokenizer)
    if len(example.input_ids) > data.cutoff_len:
        return f"longer than data.cutoff_len = {data.cutoff_len} tokens"
    if all(label < 0 for label in example.labels[1:]):
        return "no token to learn"
    return {"input_ids": example.input_ids, "labels": example.labels}


def describe(cache: TokenCache) -> list[str]:
    """Return lines that say what was kept and what was dropped, and why."""
    lines = []
    for split, report in cache.reports.items():
        if not report.read:
            continue
        share = report.scored_tokens / max(report.tokens, 1)
        lines.append(
            f"{split}: {report.kept:,} of {report.read:,} rows, {report.tokens:,} tokens, {share:.0%} of them learnt, "
            f"longest {report.longest}"
        )
        counts = Counter({reason: len(where) for reason, where in report.dropped.items()})
        for reason, count in counts.most_common():
            lines.append(f"  dropped {count:,} ({reason}), for example {', '.join(report.dropped[reason][:3])}")
    return lines


def as_json(cache: TokenCache) -> dict[str, Any]:
    """Return what a run's manifest says about its data."""
    return {"fingerprint": cache.fingerprint, **{split: asdict(report) for split, report in cache.reports.items()}}
