"""The report of `tunewright data check` in words: what to look at first, then the figures."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tunewright.launch.data.languages import LANGUAGE_ROWS, LEAST_TEXT
from tunewright.launch.data.measure import PERCENTILES, SHORT
from tunewright.launch.data.report import DatasetReport, Found, Languages, Overlap, Repeats, Report, Split
from tunewright.terminal import table
from tunewright.text import clip_start, visible

SHOWN = 5  # of these, in the text
NAME_WIDTH = 28  # terminal cells of a dataset's name in the text
REASONS_SHOWN = 5
ALL_WELL = "Nothing stands out: no row is dropped or cut, and none repeats another."


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
    found = []
    if dataset.dropped:
        text = f"{_part(dataset, dataset.read - dataset.kept)} dropped, because they cannot be used"
        found.append(Remark(text, dropped_lines(dataset, REASONS_SHOWN)))
    if dataset.truncated.count:
        text = f"{_part(dataset, dataset.truncated.count)} cut, because they are longer than data.cutoff_len"
        found.append(Remark(f"{text} = {cutoff_len}", [_rows_text(dataset.truncated)]))
    return found


def dropped_lines(dataset: DatasetReport, reasons: int) -> list[str]:
    """Return two lines for each of the most frequent reasons of dropping rows: the row numbers, and one row."""
    lines = []
    for dropped in dataset.dropped[:reasons]:
        lines.append(f"{dropped.count:,}: {dropped.reason} ({_rows_text(Found(dropped.count, dropped.rows))})")
        lines.append(f"  {visible(dropped.excerpt)}")
    if len(dataset.dropped) > reasons:
        lines.append(f"and {len(dataset.dropped) - reasons} other reasons")
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
    found = []
    if dataset.beyond.count:
        text = f"{_part(dataset, dataset.beyond.count)} longer than the {positions:,} positions that the model knows"
        found.append(Remark(text, [_rows_text(dataset.beyond)]))
    if dataset.special.count:
        text = f"{_part(dataset, dataset.special.count)} with special tokens' strings in an answer, learnt as text"
        names = ", ".join(f"{visible(name)} ({count:,})" for name, count in _first(dataset.specials))
        advice = "data.special_tokens_in_answers=true makes tokens of those that the chat template does not use"
        found.append(Remark(text, [f"{names}: {_rows_text(dataset.special)}", advice]))
    for key, count in _first(dataset.unread):
        found.append(Remark(f"{_part(dataset, count)} with a turn that has `{visible(key)}`, which nobody reads", []))
    if dataset.unended.count:
        text = f"{_part(dataset, dataset.unended.count)} without a stop token: they do not teach the model to stop"
        found.append(Remark(text, [_rows_text(dataset.unended)]))
    if dataset.short.count:
        text = f"{_part(dataset, dataset.short.count)} with an answer of fewer than {SHORT} characters"
        found.append(Remark(text, [_rows_text(dataset.short)]))
    if dataset.exact.count:
        text = f"{_part(dataset, dataset.exact.count)} copied from an earlier row"
        found.append(Remark(text, [pairs_text(dataset.exact, "=")]))
    if dataset.near.count:
        text = f"{_part(dataset, dataset.near.count)} nearly the same as an earlier row"
        found.append(Remark(text, [pairs_text(dataset.near, "~")]))
    return found


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


def report_json(report: Report) -> dict[str, Any]:
    """Return the report for programs: the fields of the data classes, and the remarks as lines."""
    lines = [remark.text for remark in remarks(report)]
    return {"remarks": lines, **asdict(report)}


def report_text(report: Report) -> str:
    """Return the report for people: what to look at first, then the figures."""
    lines = [headline(report), ""]
    found = remarks(report)
    if found:
        lines.append("To look at:")
        for remark in found:
            lines += [f"  ! {remark.text}", *(f"      {line}" for line in remark.details)]
    else:
        lines.append(ALL_WELL)
    lines += ["", _table(*figures_table(report)), "", _table(*lengths_table(report))]
    lines += ["", f"Languages of what is learnt, guessed on a sample of at most {LANGUAGE_ROWS}:"]
    lines += [f"  {_clipped(dataset.name)}: {languages_text(dataset.languages)}" for dataset in report.datasets]
    lines += [
        f"Columns of {_clipped(dataset.name)} that are not read: {visible(', '.join(dataset.unread_columns))}"
        for dataset in report.datasets
        if dataset.unread_columns
    ]
    lines += ["", report.steps.describe()]
    if found:
        lines += ["", "`tunewright data show NAME --row N` shows a row as the model sees it."]
    return "\n".join(lines)


def headline(report: Report) -> str:
    train, held = report.splits["train"], report.splits["eval"]
    text = f"{_examples(train)} to train on"
    text += f", {_examples(held)} held out" if held.examples else ", nothing held out"
    sampled = f"; of each stream the first {report.sample:,} rows" if report.sample else ""
    return f"{text} (model {report.model}, data.cutoff_len = {report.cutoff_len}{sampled})"


def _examples(split: Split) -> str:
    return f"{split.examples:,} example{'' if split.examples == 1 else 's'} ({split.tokens:,} tokens)"


def figures_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Return a head and a row for each dataset: counts of rows and tokens."""
    head = ["dataset", "used for", "rows", "kept", "cut", "copies", "near copies", "tokens", "learnt"]
    rows = []
    for dataset in report.datasets:
        counts = (dataset.read, dataset.kept, dataset.truncated.count, dataset.exact.count, dataset.near.count)
        share = f"{dataset.scored / dataset.tokens:.0%}" if dataset.tokens else "-"
        rows.append([dataset.name, dataset.split, *(f"{count:,}" for count in counts), f"{dataset.tokens:,}", share])
    return head, rows


def lengths_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Return a head and a row for each dataset: percentiles of the tokens of an example, and the longest rows."""
    names = [*(f"{percent}%" for percent in PERCENTILES), "max"]
    rows = []
    for dataset in report.datasets:
        longest = ", ".join(str(row) for row, _ in dataset.longest) or "-"
        rows.append([dataset.name, *(f"{dataset.lengths[name]:,}" if dataset.lengths else "-" for name in names)])
        rows[-1].append(longest)
    return ["tokens an example", *names, "longest: rows"], rows


def _table(head: list[str], rows: list[list[str]]) -> str:
    return table(head, [[_clipped(name), *figures] for name, *figures in rows])


def _clipped(name: str) -> str:
    return clip_start(visible(name), NAME_WIDTH)


def languages_text(languages: Languages) -> str:
    """Return "en 50%, zh 48%, other 2% (of 300 answers)"."""
    if not languages.sampled:
        return "no answer to guess from"
    if not languages.classified:
        return f"all of {languages.sampled} answers are shorter than {LEAST_TEXT} characters, too short to guess"
    named = {code: share for code, share in list(languages.shares.items())[:4] if share >= 0.02}
    texts = [f"{code} {share:.0%}" for code, share in named.items()]
    rest = 1 - sum(named.values())
    if rest > 0.005:
        texts.append(f"other {rest:.0%}")
    skipped = languages.sampled - languages.classified
    short = f"; {skipped} more shorter than {LEAST_TEXT} characters" if skipped else ""
    return f"{', '.join(texts)} (of {languages.classified} answers{short})"
