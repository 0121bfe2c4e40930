"""The report of `tunewright data check` as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from tunewright.launch.data.languages import LANGUAGE_ROWS, LEAST_TEXT
from tunewright.launch.data.measure import PERCENTILES
from tunewright.launch.data.report import Languages, Report, Split
from tunewright.launch.data.report_remarks import remarks
from tunewright.terminal import table
from tunewright.text import clip_start, visible

NAME_WIDTH = 28  # terminal cells of a dataset's name in the text
ALL_WELL = "Nothing stands out: no row is dropped or cut, and none repeats another."


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
