"""What of a report on data should be looked at before training."""

from __future__ import annotations

from dataclasses import dataclass

from tunewright.launch.data.measure import SHORT
from tunewright.launch.data.report import DatasetReport, Found, Overlap, Repeats, Report
from tunewright.text import visible

SHOWN = 5  # rows, pairs and names in a remark
REASONS_SHOWN = 5


@dataclass(frozen=True)
class Remark:
    """Something to look at, in a line, with details below it."""

    text: str
    details: list[str]


def remarks(report: Report) -> list[Remark]:
    """Return what should be looked at before training: what is lost first, then what is learnt or measured wrongly."""
    found = [remark for dataset in report.datasets for remark in _losses(dataset, report.cutoff_len)]
    if report.overlap:
        found += _overlap_remarks(report.overlap)
    return found + [remark for dataset in report.datasets for remark in _doubts(dataset, report.positions or 0)]


def _losses(dataset: DatasetReport, cutoff_len: int) -> list[Remark]:
    cut = f"cut, because they are longer than data.cutoff_len = {cutoff_len}"
    return _remarks_of(
        dataset,
        (dataset.read - dataset.kept, "dropped, because they cannot be used", _dropped_lines(dataset)),
        (dataset.truncated.count, cut, [_rows_text(dataset.truncated)]),
    )


def _remarks_of(dataset: DatasetReport, *kinds: tuple[int, str, list[str]]) -> list[Remark]:
    """Return a remark for each (count, text, details) whose count is not 0."""
    return [Remark(f"{_part(dataset, count)} {text}", details) for count, text, details in kinds if count]


def _dropped_lines(dataset: DatasetReport) -> list[str]:
    """Return two lines for each of the most frequent reasons of dropping rows: the row numbers, and one row."""
    lines = []
    for dropped in dataset.dropped[:REASONS_SHOWN]:
        lines.append(f"{dropped.count:,}: {dropped.reason} ({_rows_text(Found(dropped.count, dropped.rows))})")
        lines.append(f"  {visible(dropped.excerpt)}")
    if len(dataset.dropped) > REASONS_SHOWN:
        lines.append(f"and {len(dataset.dropped) - REASONS_SHOWN} other reasons")
    return lines


def _overlap_remarks(overlap: Overlap) -> list[Remark]:
    kinds: list[tuple[Repeats, str, str]] = [
        (overlap.same, "also among the training rows, so they measure memory", "="),
        (overlap.question, "with the question of a training row and another answer", "asks like"),
        (overlap.near, "nearly the same as a training row", "~"),
    ]
    return [
        Remark(f"{found.count:,} of {overlap.rows:,} held-out rows {text}", [pairs_text(found, sign, both=True)])
        for found, text, sign in kinds
        if found.count
    ]


def _first(counts: dict[str, int]) -> list[tuple[str, int]]:
    """Return the most frequent of some names, with their counts."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:SHOWN]


def _doubts(dataset: DatasetReport, positions: int) -> list[Remark]:
    names = ", ".join(f"{visible(name)} ({count:,})" for name, count in _first(dataset.specials))
    advice = "data.special_tokens_in_answers=true makes tokens of those that the chat template does not use"
    specials = [f"{names}: {_rows_text(dataset.special)}", advice]
    beyond = f"longer than the {positions:,} positions that the model knows"
    turn = "with a turn that has `{}`, which nobody reads"
    unread: list[tuple[int, str, list[str]]] = [(n, turn.format(visible(key)), []) for key, n in _first(dataset.unread)]
    unended = "without a stop token: they do not teach the model to stop"
    short = f"with an answer of fewer than {SHORT} characters"
    return _remarks_of(
        dataset,
        (dataset.beyond.count, beyond, [_rows_text(dataset.beyond)]),
        (dataset.special.count, "with special tokens' strings in an answer, learnt as text", specials),
        *unread,
        (dataset.unended.count, unended, [_rows_text(dataset.unended)]),
        (dataset.short.count, short, [_rows_text(dataset.short)]),
        (dataset.exact.count, "copied from an earlier row", [pairs_text(dataset.exact, "=")]),
        (dataset.near.count, "nearly the same as an earlier row", [pairs_text(dataset.near, "~")]),
    )


def _part(dataset: DatasetReport, count: int) -> str:
    return f"{visible(dataset.name)}: {count:,} of {dataset.read:,} rows ({_percent(count / dataset.read)})"


def _percent(share: float) -> str:
    """Two figures: 0.013% is not nothing, and 99.98% is not everything."""
    if 0 < share < 0.01 or 0.99 < share < 1:
        return f"{share:.2%}"
    return f"{share:.0%}"


def _rows_text(found: Found) -> str:
    numbers = ", ".join(str(row) for row in found.rows[:SHOWN])
    return f"row{'s' if found.count > 1 else ''} {numbers}{', ...' if found.count > SHOWN else ''}"


def pairs_text(found: Repeats, sign: str, *, both: bool = False, shown: int = SHOWN) -> str:
    """Return "row 3 = 1, 7 = other 2": a dataset is named where it differs, or with `both` where there are several."""
    both = both and len({name for pair in found.pairs for name in (pair.dataset, pair.other_dataset)}) > 1
    texts = []
    for pair in found.pairs[:shown]:
        here = f"{pair.dataset} {pair.row}" if both else str(pair.row)
        there = f"{pair.other_dataset} {pair.other_row}" if both or pair.other_dataset != pair.dataset else ""
        texts.append(f"{here} {sign} {there or pair.other_row}")
    return visible(f"{'' if both else 'row '}{', '.join(texts)}{', ...' if found.count > shown else ''}")
