"""Compare finished (or crashed) fine-tuning runs from the files they left behind.

A run folder holds ``manifest.json``, ``metrics.jsonl``, ``config.yaml`` and, when held-out
answers were generated, ``evaluation.json`` (``evaluation-N.json`` for the first N rows alone).
Only the manifest is required: a run that died early is exactly the one somebody wants to look at,
so anything else that is missing shows as ``-``.

This module reads runs and renders text; :mod:`tunewright.deliver.comparison_page` draws the PNG and the HTML page.
"""

from __future__ import annotations

import difflib
import html
import json
import os
import re
import shlex
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tunewright.deliver.scores import CONFIDENCE, score_text, told_apart
from tunewright.errors import ConfigError, StorageError
from tunewright.files import write_bytes, write_text
from tunewright.metrics import final_train_loss
from tunewright.redaction import redact_tree

MISSING = "-"
CORRECT_MARK = "✓"
WRONG_MARK = "✗"

MAX_RUN_COLUMNS = 4
TEXT_PROMPTS = 3
REPORT_PROMPTS = 12
TEXT_WIDTH = 100
# A list of data files may run to thousands of characters; tables need only enough to tell two apart.
TEXT_VALUE_WIDTH = 48

# Settings that say where a run is kept rather than how it trained: they differ between any two runs.
IGNORED_KEYS = frozenset({"name", "run_name", "run.name"})
IGNORED_LEAVES = frozenset({"output_root", "output_dir", "run_dir", "logging_dir", "log_dir"})

# YAML 1.1 reads "1e-3" (no dot) as a string; it must still equal 0.001.
_EXPONENT_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")

Row = tuple[str, list[str]]
Point = tuple[float, float]


@dataclass(frozen=True)
class Run:
    """Everything one run folder says about itself."""

    path: Path
    name: str
    manifest: Mapping[str, Any] = field(default_factory=dict)
    metrics: tuple[Mapping[str, Any], ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AnswerColumn:
    """The answers one model (a base model or a tuned run) gave, by (prompt, expected)."""

    header: str
    answers: Mapping[tuple[str, str], str]


@dataclass(frozen=True)
class HeldOutAnswers:
    """Held-out questions and the answers of every model, ready to be laid out side by side."""

    questions: tuple[tuple[str, str], ...]
    columns: tuple[AnswerColumn, ...]
    available: int


# --------------------------------------------------------------------------------------------------
# Reading a run folder
# --------------------------------------------------------------------------------------------------


def load_run(path: Path) -> Run:
    """Read one run folder; raise :class:`ConfigError` when it is not a run folder."""
    path = Path(path)
    if not path.is_dir():
        raise ConfigError(_unknown_run_message(path))
    if not (path / "manifest.json").is_file():
        raise ConfigError(_no_manifest_message(path))
    manifest = _read_mapping(path / "manifest.json", json.loads)
    if manifest is None:
        raise ConfigError(f"{path / 'manifest.json'} is not a readable JSON object")
    name = manifest.get("name")
    manifest = redact_tree(manifest)  # of an earlier version it may hold secrets
    return Run(
        path=path,
        # resolve() so that "." still gives a name
        name=one_line(name) if isinstance(name, str) and name.strip() else one_line(path.resolve().name),
        manifest=manifest,
        metrics=tuple(_read_json_lines(path / "metrics.jsonl")),
        config=redact_tree(_read_mapping(path / "config.yaml", yaml.safe_load) or {}),
        evaluation=_read_evaluation(path),
    )


def _read_evaluation(path: Path) -> dict[str, Any]:
    """Return the answers to all held-out rows, or where there are none those to the most of them."""
    numbered = [(int(file.stem.partition("-")[2]), file) for file in path.glob("evaluation-*.json") if _numbered(file)]
    files = [path / "evaluation.json", *(file for _, file in sorted(numbered, reverse=True))]
    found = (_read_mapping(file, json.loads) for file in files)
    return next((evaluation for evaluation in found if evaluation), {})


def _numbered(file: Path) -> bool:
    return file.stem.partition("-")[2].isdecimal()


def _read_mapping(path: Path, parse: Callable[[str], Any]) -> dict[str, Any] | None:
    """Return the mapping in ``path``, or None when it is missing, torn or something else."""
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):  # JSON and UTF-8 errors are both ValueErrors
        return None
    return content if isinstance(content, dict) else None


def _read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON-lines file, skipping the lines a crash tore."""
    try:
        # "replace": a line torn inside a multi-byte character must not cost us the other lines
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    # Not splitlines(): that also breaks at U+2028 and others, which JSON strings may hold as they are
    for line in text.split("\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record


def _run_folders(parent: Path) -> list[str]:
    """Return the names of the run folders directly inside ``parent``."""
    try:
        return sorted(child.name for child in parent.iterdir() if (child / "manifest.json").is_file())
    except OSError:
        return []


def _unknown_run_message(path: Path) -> str:
    siblings = _run_folders(path.parent)
    if path.exists():
        return f"{path} is not a folder; a run is the folder that holds manifest.json"
    message = f"there is no run at {path}"
    closest = difflib.get_close_matches(path.name, siblings, n=3, cutoff=0.5)
    if closest:
        return f"{message}; did you mean {_one_of(path.parent, closest)}?"
    if siblings:
        return f"{message}; {path.parent} holds {_short_list(siblings)}"
    return message


def _no_manifest_message(path: Path) -> str:
    message = f"{path} has no manifest.json, so it is not a run folder"
    inside = _run_folders(path)
    return f"{message}; it holds the runs {_short_list(inside)}" if inside else message


def _one_of(parent: Path, names: Sequence[str]) -> str:
    return " or ".join(str(parent / name) for name in names)


def _short_list(names: Sequence[str], limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# --------------------------------------------------------------------------------------------------
# Figures of a run
# --------------------------------------------------------------------------------------------------


def lookup(mapping: Mapping[str, Any], *keys: str) -> Any:
    """Follow ``keys`` into nested mappings; None as soon as one is missing."""
    value: Any = mapping
    for key in keys:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def as_number(value: Any) -> float | None:
    """Return ``value`` as a float when it is a number (a bool is not)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value)


def series(run: Run, key: str) -> list[Point]:
    """Return (step, value) for every logged step with ``key``.

    A resumed run logs the steps after its checkpoint a second time; the later line is the one that
    led to the final weights, so it wins.
    """
    by_step: dict[float, float] = {}
    for record in run.metrics:
        step, value = as_number(record.get("step")), as_number(record.get(key))
        if step is not None and value is not None:
            by_step[step] = value
    return sorted(by_step.items())


def run_labels(runs: Sequence[Run]) -> list[str]:
    """Return one distinct label per run: its name, plus its folder or a number on a clash."""
    labels: list[str] = []
    names = [run.name for run in runs]
    for run in runs:
        folder = run.path.resolve().name
        clash = names.count(run.name) > 1 and folder != run.name
        base = f"{run.name} ({one_line(folder)})" if clash else run.name
        label, number = base, 2
        while label in labels:
            label, number = f"{base} #{number}", number + 1
        labels.append(label)
    return labels


def comparison_rows(runs: Sequence[Run]) -> list[Row]:
    """Return the comparison as (label, [cell per run])."""
    figures: list[tuple[str, Callable[[Run], str]]] = [
        ("status", lambda run: _text(lookup(run.manifest, "status"))),
        ("strategy", lambda run: _text(lookup(run.manifest, "strategy"))),
        ("method", lambda run: _text(lookup(run.manifest, "method"))),
        ("trainable parameters", _parameters_cell),
        ("world size", _world_cell),
        ("steps", _steps_cell),
        ("wall time", lambda run: _duration(lookup(run.manifest, "wall_seconds"))),
        ("tokens/s (non-padding)", lambda run: _count(lookup(run.manifest, "tokens_per_second"))),
        ("MFU", lambda run: _percent(lookup(run.manifest, "mfu"))),
        ("peak memory (largest rank)", lambda run: _bytes(lookup(run.manifest, "peak_memory_bytes"))),
        ("final train loss", _train_loss_cell),
        ("final eval loss", _eval_loss_cell),
        ("held-out rows", _held_out_cell),
        ("exact match before", lambda run: _score_cell(run, "base")),
        ("exact match after", lambda run: _score_cell(run, "tuned")),
        ("device", _device_cell),
    ]
    return [(label, [cell(run) for run in runs]) for label, cell in figures]


def _text(value: Any) -> str:
    return one_line(str(value)) if value not in (None, "") else MISSING


def _count(value: Any) -> str:
    number = as_number(value)
    return MISSING if number is None else f"{number:,.0f}"


def _percent(value: Any) -> str:
    number = as_number(value)
    if number is None:
        return MISSING
    # A tiny model on a large GPU has an MFU of 0.004%: "0.0%" would read as not measured.
    return f"{number:.2g}%" if 0 < (number := number * 100) < 0.1 else f"{number:.1f}%"


def _duration(value: Any) -> str:
    number = as_number(value)
    if number is None or not 0 <= number < float("inf"):
        return MISSING
    minutes, seconds = divmod(round(number), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _bytes(value: Any) -> str:
    number = as_number(value)
    if number is None:
        return MISSING
    gib = number / 1024**3
    return f"{gib:.2f} GiB" if gib >= 1 else f"{number / 1024**2:.1f} MiB"


def _loss(value: Any) -> str:
    number = as_number(value)
    if number is None:
        return MISSING
    return f"{number:.2e}" if 0 < abs(number) < 0.001 else f"{number:.4f}"


def _parameters_cell(run: Run) -> str:
    trainable = as_number(lookup(run.manifest, "parameters", "trainable"))
    total = as_number(lookup(run.manifest, "parameters", "total"))
    if trainable is None or not total:
        return _count(trainable)
    return f"{trainable:,.0f} of {total:,.0f} ({trainable / total:.3%})"


def _world_cell(run: Run) -> str:
    distributed = lookup(run.manifest, "distributed")
    world = _count(lookup(run.manifest, "distributed", "world_size"))
    if world == MISSING:
        return MISSING
    kind, stage = _text(lookup(distributed, "type")), lookup(distributed, "zero_stage")
    # "NO" is how Accelerate spells "not distributed"; alone in a cell it reads as an error.
    details = [] if kind in (MISSING, "NO") else [kind]
    if stage is not None:
        details.append(f"ZeRO {_text(stage)}")
    return f"{world} ({', '.join(details)})" if details else world


def _steps_cell(run: Run) -> str:
    steps = _count(lookup(run.manifest, "steps"))
    if steps != MISSING:
        return steps
    # A crashed or running run has no total yet, but its log says how far it came.
    logged = series(run, "loss")
    return _count(logged[-1][0]) if logged else MISSING


def _train_loss_cell(run: Run) -> str:
    return _first_loss(lookup(run.manifest, "final", "train_loss"), final_train_loss(run.metrics), _last(run, "loss"))


def _eval_loss_cell(run: Run) -> str:
    return _first_loss(lookup(run.manifest, "final", "eval_loss"), _last(run, "eval_loss"))


def _first_loss(*values: Any) -> str:
    return next((text for value in values if (text := _loss(value)) != MISSING), MISSING)


def _last(run: Run, key: str) -> float | None:
    logged = series(run, key)
    return logged[-1][1] if logged else None


def _held_out_cell(run: Run) -> str:
    rows, available = _count(run.evaluation.get("examples")), _count(run.evaluation.get("held_out"))
    return rows if available in (MISSING, rows) else f"first {rows} of {available}"


def _score_cell(run: Run, key: str) -> str:
    """Return the share of right answers with the interval that so many rows leave it."""
    share, rows = as_number(lookup(run.evaluation, key, "exact_match")), as_number(run.evaluation.get("examples"))
    if share is None or not rows or rows < 1 or not 0 <= share <= 1:
        return _percent(share)
    return score_text(round(share * rows), round(rows))


def _device_cell(run: Run) -> str:
    kind = _text(lookup(run.manifest, "distributed", "device"))
    name = _text(lookup(run.manifest, "hardware", "device_name"))
    if MISSING in (kind, name) or kind == name:
        return kind if name == MISSING else name
    return f"{name} ({kind})"


# --------------------------------------------------------------------------------------------------
# Configuration differences
# --------------------------------------------------------------------------------------------------


def flatten(config: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Return ``config`` with nested keys joined by dots; plain lists stay one value."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{dotted}."))
        else:
            flat[dotted] = value
    return flat


def config_differences(runs: Sequence[Run]) -> list[Row]:
    """Return (key, [value per run]) for the settings that are not the same in every run.

    A run without a configuration shows ``-`` and does not count: otherwise it would make every
    single key "different".  A key that is absent counts as null, its default in a resolved file.
    """
    flat = [flatten(run.config) for run in runs]
    known = [settings for settings in flat if settings]
    keys = list(dict.fromkeys(key for settings in known for key in settings))
    return [
        (key, [_setting_text(settings, key) for settings in flat])
        for key in keys
        if not _is_ignored(key) and len({_canonical(settings.get(key)) for settings in known}) > 1
    ]


def _is_ignored(key: str) -> bool:
    return key in IGNORED_KEYS or key.rpartition(".")[2] in IGNORED_LEAVES


def _canonical(value: Any) -> str:
    """Return a string that is equal for equal settings (1 and 1.0, but not 1 and true)."""
    if isinstance(value, str) and _EXPONENT_NUMBER.fullmatch(value):
        value = float(value)
    number = as_number(value)
    return json.dumps(value, sort_keys=True, default=str) if number is None else repr(number)


def _setting_text(settings: Mapping[str, Any], key: str) -> str:
    if key not in settings:
        return MISSING
    value = settings[key]
    if isinstance(value, str) and value.strip():
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


# --------------------------------------------------------------------------------------------------
# Held-out answers
# --------------------------------------------------------------------------------------------------


def is_correct(answer: str, expected: str) -> bool:
    """Exact match, forgiving only surrounding white space."""
    return answer.strip() == expected.strip()


def held_out_answers(runs: Sequence[Run], limit: int) -> HeldOutAnswers:
    """Line up the held-out answers of all runs for up to ``limit`` questions.

    Questions that every run answered come first: they are the ones that can be compared.
    """
    rows = [_evaluation_rows(run) for run in runs]
    counts: dict[tuple[str, str], int] = {}
    for answered in rows:
        for question in answered:
            counts[question] = counts.get(question, 0) + 1
    questions = tuple(sorted(counts, key=lambda question: -counts[question])[:limit])
    labelled = [(label, answered) for label, answered in zip(run_labels(runs), rows, strict=True) if answered]
    tuned = [_answer_column(label, answered, "tuned") for label, answered in labelled]
    return HeldOutAnswers(questions, tuple(_base_columns(labelled, questions) + tuned), len(counts))


def score_notes(runs: Sequence[Run]) -> list[str]:
    """Say what the shares of right answers of several runs do not say by themselves, one sentence each."""
    asked = [(label, rows) for label, run in zip(run_labels(runs), runs, strict=True) if (rows := _right_answers(run))]
    if len(asked) < 2:
        return []
    shared = set.intersection(*(set(rows) for _, rows in asked))
    notes = []
    if any(set(rows) != shared for _, rows in asked):
        counts = ", ".join(f"{label} {len(rows)}" for label, rows in asked)
        notes.append(f"The runs were not asked the same held-out rows ({counts}): their shares do not compare.")
        if not shared:
            return notes
        on_shared = (f"{label} {score_text(sum(rows[row] for row in shared), len(shared))}" for label, rows in asked)
        notes.append(f"On the {len(shared)} rows that all were asked, exact match after: {', '.join(on_shared)}.")
    ranked = sorted(asked, key=lambda one: -sum(one[1][row] for row in shared))
    best, best_rows = ranked[0]
    alike = [
        label for label, rows in ranked[1:] if not told_apart([(best_rows[row], rows[row]) for row in sorted(shared)])
    ]
    if alike:
        names = f"{', '.join(alike[:6])}{' and others' if len(alike) > 6 else ''}"
        notes.append(
            f"{len(shared)} rows do not tell {names} from the best, {best} (McNemar's exact test, {CONFIDENCE:.0%})."
        )
    return notes


def _right_answers(run: Run) -> dict[tuple[str, str, int], bool]:
    """Return whether the tuned model answered each held-out row right; the number tells rows that are alike apart."""
    found = run.evaluation.get("rows")
    right: dict[tuple[str, str, int], bool] = {}
    times: dict[tuple[str, str], int] = {}
    for row in found if isinstance(found, list) else []:
        if isinstance(row, Mapping) and "prompt" in row and row.get("tuned") is not None:
            question = str(row["prompt"]), str(row.get("expected", ""))
            times[question] = times.get(question, 0) + 1
            right[question[0], question[1], times[question]] = is_correct(str(row["tuned"]), question[1])
    return right


def _evaluation_rows(run: Run) -> dict[tuple[str, str], Mapping[str, Any]]:
    """Return the evaluation rows of a run by (prompt, expected), the first of any repeats."""
    rows = run.evaluation.get("rows")
    answered: dict[tuple[str, str], Mapping[str, Any]] = {}
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, Mapping) and "prompt" in row:
            answered.setdefault((str(row["prompt"]), str(row.get("expected", ""))), row)
    return answered


def _answer_column(header: str, answered: Mapping[tuple[str, str], Mapping[str, Any]], key: str) -> AnswerColumn:
    answers = {question: str(row[key]) for question, row in answered.items() if row.get(key) is not None}
    return AnswerColumn(header, answers)


def _base_columns(
    labelled: Sequence[tuple[str, Mapping[tuple[str, str], Mapping[str, Any]]]],
    questions: Sequence[tuple[str, str]],
) -> list[AnswerColumn]:
    """Return one column for the base model, or one per run when the runs' base answers differ."""
    columns = [_answer_column(f"base of {label}", answered, "base") for label, answered in labelled]
    columns = [column for column in columns if column.answers]
    merged: dict[tuple[str, str], str] = {}
    for column in columns:
        for question in questions:
            answer = column.answers.get(question)
            if answer is not None and merged.setdefault(question, answer) != answer:
                return columns
    return [AnswerColumn("base", merged)] if merged else []


# --------------------------------------------------------------------------------------------------
# Text and Markdown
# --------------------------------------------------------------------------------------------------


def one_line(text: str) -> str:
    """Return ``text`` on one line without control characters.

    A model's answer may hold terminal escape sequences; they must not reach the terminal.
    """
    spaced = " ".join(text.split())
    return "".join(char for char in spaced if unicodedata.category(char) not in ("Cc", "Cs"))


def display_width(text: str) -> int:
    """Return how many terminal cells ``text`` takes: wide characters two, combining ones none."""
    return sum(_char_width(char) for char in text)


def _char_width(char: str) -> int:
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in ("W", "F") else 1


def clip(text: str, width: int) -> str:
    """Shorten ``text`` to at most ``width`` terminal cells."""
    if display_width(text) <= width:
        return text
    kept, used = [], 0
    for char in text:
        used += _char_width(char)
        if used > width - 1:
            break
        kept.append(char)
    return "".join(kept) + "…"


def _pad(text: str, width: int, *, right: bool) -> str:
    fill = " " * (width - display_width(text))
    return fill + text if right else text + fill


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lay out rows of cells: the first column to the left, figures to the right, a rule below the header."""
    widths = [max(display_width(cell) for cell in column) for column in zip(*lines, strict=True)]

    def laid_out(cells: Sequence[str]) -> str:
        padded = (_pad(cell, widths[i], right=i > 0) for i, cell in enumerate(cells))
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([laid_out(lines[0]), rule, *(laid_out(cells) for cells in lines[1:])])


def _grid(corner: str, runs: Sequence[Run], rows: Sequence[Row]) -> list[list[str]]:
    """Return header and cells, one column per run, or one row per run when they are many."""
    columns = [[corner, *(label for label, _ in rows)]]
    for index, name in enumerate(run_labels(runs)):
        columns.append([name, *(cells[index] for _, cells in rows)])
    if len(runs) > MAX_RUN_COLUMNS:
        return columns
    return [list(line) for line in zip(*columns, strict=True)]


def render_table(runs: Sequence[Run]) -> str:
    """Return the comparison as an aligned plain-text table."""
    return _aligned(_grid("run", runs, comparison_rows(runs)))


def render_markdown(runs: Sequence[Run]) -> str:
    """Return the comparison as a Markdown table."""
    return _markdown_table(_grid("run", runs, comparison_rows(runs)))


def _markdown_table(lines: Sequence[Sequence[str]], align: str = "---:") -> str:
    header, *body = ["| " + " | ".join(map(_markdown_cell, cells)) + " |" for cells in lines]
    rule = "| " + " | ".join(["---"] + [align] * (len(lines[0]) - 1)) + " |"
    return "\n".join([header, rule, *body])


def _markdown_cell(text: str) -> str:
    """Escape what would end the cell or be taken for markup; an answer is data, not formatting."""
    escaped = re.sub(r"([\\`*_|\[\]~])", r"\\\1", one_line(text))
    return html.escape(escaped, quote=False)


def _differences_grid(runs: Sequence[Run], width: int) -> list[list[str]]:
    rows = [(key, [clip(one_line(value), width) for value in values]) for key, values in config_differences(runs)]
    return _grid("setting", runs, rows) if rows else []


def _no_differences(runs: Sequence[Run]) -> str:
    if sum(bool(run.config) for run in runs) < 2:
        return "(fewer than two runs have a configuration)"
    return "(none)"


def _differences_text(runs: Sequence[Run]) -> str:
    grid = _differences_grid(runs, TEXT_VALUE_WIDTH)
    return _aligned(grid) if grid else _no_differences(runs)


def _answers_text(runs: Sequence[Run]) -> str:
    held_out = held_out_answers(runs, TEXT_PROMPTS)
    if not held_out.questions:
        return "Held-out answers\n(no run has any in its evaluation.json)"
    headers = ["prompt", "expected", *(column.header for column in held_out.columns)]
    indent = max(map(display_width, headers))
    blocks = []
    for question in held_out.questions:
        prompt, expected = question
        cells = [f"  {prompt}", f"  {expected}"]
        cells += [marked_answer(column, question) for column in held_out.columns]
        pairs = zip(headers, cells, strict=True)
        blocks.append("\n".join(_answer_line(header, cell, indent) for header, cell in pairs))
    shown = f"Held-out answers ({len(held_out.questions)} of {held_out.available} prompts)"
    return "\n\n".join([shown, *blocks])


def _answer_line(header: str, cell: str, indent: int) -> str:
    # The two cells before the text hold the mark, or nothing for the question itself.
    mark, text = cell[:2], one_line(cell[2:])
    return f"{_pad(header, indent, right=False)}  {mark}{clip(text, TEXT_WIDTH)}".rstrip()


def marked_answer(column: AnswerColumn, question: tuple[str, str]) -> str:
    """Return the answer behind its mark, or ``-`` when this model was not asked."""
    answer = column.answers.get(question)
    if answer is None:
        return f"  {MISSING}"
    return f"{CORRECT_MARK if is_correct(answer, question[1]) else WRONG_MARK} {answer}"


def text_report(runs: Sequence[Run]) -> str:
    """Return the whole comparison as plain text: table, differing settings, a few answers."""
    notes = "\n".join(score_notes(runs))
    return "\n\n".join(
        [
            render_table(runs),
            *([notes] if notes else []),
            "Settings that differ\n" + _differences_text(runs),
            _answers_text(runs),
        ]
    )


def markdown_report(runs: Sequence[Run], image: str) -> str:
    """Return the whole comparison as Markdown, with the loss curves linked as ``image``."""
    differences = _differences_grid(runs, 200)
    parts = [
        "# Comparison of fine-tuning runs",
        render_markdown(runs),
        *map(_markdown_cell, score_notes(runs)),
        "## Loss curves",
        f"![Train and eval loss of every run]({image})",
        "## Settings that differ",
        _markdown_table(differences) if differences else _no_differences(runs),
        "## Held-out answers",
        _answers_markdown(runs),
    ]
    return "\n\n".join(parts)


def _answers_markdown(runs: Sequence[Run]) -> str:
    held_out = held_out_answers(runs, REPORT_PROMPTS)
    if not held_out.questions:
        return "(no run has any in its evaluation.json)"
    lines = [["prompt", "expected", *(column.header for column in held_out.columns)]]
    for question in held_out.questions:
        answers = [marked_answer(column, question) for column in held_out.columns]
        lines.append([*question, *answers])
    return _markdown_table(lines, align="---")


# --------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------


def compare(run_paths: list[Path], out_dir: Path, *, echo: Callable[[str], Any] = print) -> Path:
    """Compare the runs: print the text, write text, Markdown, PNG and HTML, and return ``out_dir``."""
    # Imported here because report builds on this module, and only this function needs it.
    from tunewright.deliver.comparison_page import comparison_html, curves_png_bytes

    runs = _load_distinct(run_paths)
    text = text_report(runs)
    echo(text)
    out_dir = Path(out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        curves = curves_png_bytes(runs)
        write_text(out_dir / "comparison.txt", f"{text}\n")
        write_text(out_dir / "comparison.md", f"{markdown_report(runs, 'comparison.png')}\n")
        write_bytes(out_dir / "comparison.png", curves)
        comparison_html(runs, out_dir / "comparison.html", curves=curves)
    except OSError as error:
        raise StorageError(f"cannot write the comparison to {out_dir}: {error}") from error
    echo(_where(runs, out_dir))
    return out_dir


def _load_distinct(run_paths: Sequence[Path]) -> list[Run]:
    """Load every run once; a shell pattern easily names the same folder twice."""
    distinct: dict[Path, Path] = {}
    for path in run_paths:
        distinct.setdefault(Path(path).resolve(), Path(path))
    if not distinct:
        raise ConfigError("nothing to compare: name at least one run folder")
    return [load_run(path) for path in distinct.values()]


def common_parent(runs: Sequence[Run]) -> Path:
    """Return the deepest folder that holds all the runs."""
    return Path(os.path.commonpath([run.path.resolve().parent for run in runs]))


def _where(runs: Sequence[Run], out_dir: Path) -> str:
    return "\n".join(
        [
            "",
            f"Report:      {out_dir / 'comparison.html'}  (one file, opens in any browser)",
            f"Curves:      {out_dir / 'comparison.png'}",
            f"Text:        {out_dir / 'comparison.txt'}, {out_dir / 'comparison.md'}",
            f"TensorBoard: tensorboard --logdir {shlex.quote(str(common_parent(runs)))}",
        ]
    )
