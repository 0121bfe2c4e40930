"""The files made from a log, each replaced in one step: rows, held-out rows, registry, manifest, card, preview."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tunewright import __version__
from tunewright.datagen.budget import Budget
from tunewright.datagen.card import card
from tunewright.datagen.curation import Curation
from tunewright.datagen.endpoint import Endpoint
from tunewright.datagen.preview import preview_page
from tunewright.datagen.prompts import PROMPTS_VERSION
from tunewright.datagen.replies import Row
from tunewright.datagen.reply_log import ReplyLog
from tunewright.datagen.settings import Format, as_plain, prices
from tunewright.datagen.split import split
from tunewright.errors import ConfigError, DataError
from tunewright.files import write_json, write_text
from tunewright.registry import edited_registry, read_registry
from tunewright.trees import map_texts

ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"}
OURS = ("file_name", "formatting", "columns", "tags")  # keys of a registry entry that follow from the rows
SHAREGPT = {"messages": "conversations", "system": "system"}


class Files:
    """Paths of one dataset."""

    def __init__(self, out: Path, name: str) -> None:
        self.out, self.name = out, name
        self.rows = out / f"{name}.json"
        self.eval_rows = out / f"{name}_eval.json"
        self.system = out / f"{name}.system.txt"
        self.plan = out / f"{name}.plan.json"
        self.manifest = out / f"{name}.manifest.json"
        self.card = out / f"{name}.md"
        self.preview = out / f"{name}.html"
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


@dataclass(frozen=True)
class Written:
    """What went into the files."""

    train: list[Row]
    test: list[Row]
    highest: float  # similarity of a row to train on and one held out


def write_outputs(files: Files, curation: Curation, endpoint: Endpoint, log: ReplyLog, budget: Budget) -> Written:
    """Write every file.

    Raises:
        DataError: a row to train on and one held out are alike after all.
    """
    config, plan = curation.config, curation.plan
    # The log has no key in it, but may have one in an escaped form that is plain here.
    rows_kept: list[Row] = map_texts(curation.rows, endpoint.scrub)
    dealt = split(rows_kept, config.eval_share, config.seed, config.similarity)
    if dealt.test and dealt.highest >= config.similarity:
        raise DataError(f"Rows {dealt.pair} of training and held-out data are alike ({dealt.highest:.2f}).")
    train, test = ([rows_kept[number] for number in side] for side in (dealt.train, dealt.test))
    entries: dict[str, dict[str, Any]] = {}
    for name, path, rows in ((config.name, files.rows, train), (f"{config.name}_eval", files.eval_rows, test)):
        if rows:
            write_json(path, [shaped(row, plan.system, config.format) for row in rows])
            entries[name] = entry(path, config.format, rows)
    write_text(files.system, plan.system + "\n")
    plan.write(files.plan)
    with edited_registry(files.registry) as registry:
        for name in (config.name, f"{config.name}_eval"):
            if name in entries:
                kept = {key: value for key, value in registry.get(name, {}).items() if key not in OURS}
                registry[name] = {**kept, **entries[name]}
            else:
                registry.pop(name, None)
    if not test:  # after the registry, which may have named it
        files.eval_rows.unlink(missing_ok=True)
    manifest = _manifest(files, curation, endpoint, log, budget)
    manifest["counts"] |= {"train": len(train), "eval": len(test)}
    manifest["similarity"] = {"highest_train_test": dealt.highest, "pair": list(dealt.pair) if dealt.pair else None}
    write_json(files.manifest, manifest)
    write_text(files.card, card(manifest, train))
    write_text(files.preview, preview_page(manifest, train, test, curation.rejected))
    return Written(train, test, dealt.highest)


def shaped(row: Row, system: str, shape: Format) -> dict[str, Any]:
    """Return a row as it is written."""
    if shape is Format.alpaca:
        kept = {key: row[key] for key in ("instruction", "input", "output")}
        return {**kept, "system": system, **({"history": row["history"]} if "history" in row else {})}
    last = "\n".join(text for text in (row["instruction"], row["input"]) if text)
    exchanges = [*row.get("history", []), [last, row["output"]]]
    said = [
        {"from": speaker, "value": text}
        for exchange in exchanges
        for speaker, text in zip(("human", "gpt"), exchange, strict=True)
    ]
    return {"conversations": said, "system": system}


def entry(path: Path, shape: Format, rows: list[Row]) -> dict[str, Any]:
    """Return the registry entry of a file."""
    if shape is Format.sharegpt:
        return {"file_name": path.name, "formatting": "sharegpt", "columns": SHAREGPT}
    columns = {key: value for key, value in ALPACA.items() if key != "history" or "history" in rows[0]}
    return {"file_name": path.name, "columns": columns}


def _manifest(files: Files, curation: Curation, endpoint: Endpoint, log: ReplyLog, budget: Budget) -> dict[str, Any]:
    config, plan = curation.config, curation.plan
    tokens_in, tokens_out = log.spent()
    known = prices(config)
    return {
        "name": config.name,
        "settings": {**as_plain(config), "base_url": endpoint.base_url},
        "plan": asdict(plan),
        "system_message": plan.system,
        "sources": sorted({f"{chunk.file}#{chunk.number} {chunk.digest}" for chunk in curation.chunks}),
        "prompts_version": PROMPTS_VERSION,
        "versions": {"tunewright": __version__, "openai": version("openai")},
        "models": sorted({str(record["model"]) for record in log.records.values() if record.get("model")}),
        "counts": {
            "asked_for": config.examples,
            "accepted": len(curation.rows),
            "replies": curation.replies,
            "requests": log.requests(),
        },
        "rejects": dict(sorted(curation.rejects.items())),
        "yield": {topic: dict(counts) for topic, counts in sorted(curation.by_topic.items())},
        "scores": {str(score): count for score, count in sorted(curation.scores.items())},
        "usage": {"prompt_tokens": tokens_in, "completion_tokens": tokens_out},
        "cost": {
            "usd": sum(map(budget.cost, log.replies())) if known else None,
            "prices": {"input": known[0], "output": known[1]} if known else None,
        },
        "hashes": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (files.rows, files.eval_rows)
            if path.is_file()
        },
    }
