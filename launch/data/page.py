"""A report on data as one HTML page that needs nothing else: no script, no file, no network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunewright.errors import StorageError
from tunewright.files import write_text
from tunewright.launch.data.report import DatasetReport, Histogram, Overlap, Repeats, Report
from tunewright.launch.data.report_remarks import pairs_text, remarks
from tunewright.launch.data.report_text import ALL_WELL, figures_table, headline, languages_text, lengths_table
from tunewright.pages import Bars, Chart, render_page

ROWS_SHOWN = 100  # row numbers and pairs of one kind


def write_page(report: Report, file: Path) -> None:
    """Write the page of a report.

    Raises:
        StorageError: the file cannot be written.
    """
    try:
        write_text(file, report_html(report))
    except OSError as error:
        raise StorageError(f"Cannot write {file}: {error.strerror}.") from error


def report_html(report: Report) -> str:
    """Return the page of a report."""
    names = ", ".join(dict.fromkeys(dataset.name for dataset in report.datasets))
    return render_page(
        "data_report.html.jinja",
        title=f"Data: {names}",
        heading="Data",
        summary=headline(report),
        remarks=remarks(report),
        all_well=ALL_WELL,
        tables=[figures_table(report), lengths_table(report)],
        datasets=[_dataset(dataset) for dataset in report.datasets],
        held_out=report.overlap.rows if report.overlap else None,
        overlap=_overlap(report.overlap) if report.overlap else [],
        steps=report.steps.describe(),
    )


def _dataset(dataset: DatasetReport) -> dict[str, Any]:
    charts = [
        _chart(dataset.length_histogram, "tokens of an example", "examples"),
        _chart(dataset.trained_histogram, "share of a row's tokens that is learnt", "rows"),
        _chart(dataset.answer_histogram, "characters of the last answer", "rows"),
    ]
    kinds = (
        ("cut to data.cutoff_len", dataset.truncated),
        ("very short answers", dataset.short),
        ("no stop token is learnt", dataset.unended),
        ("special tokens' strings learnt as text", dataset.special),
        ("more tokens than the model knows positions", dataset.beyond),
    )
    found = [[name, f"{kind.count:,}", _numbers(kind.rows, kind.count)] for name, kind in kinds if kind.count]
    found += _repeated([("copies of an earlier row", dataset.exact, "="), ("nearly copies", dataset.near, "~")])
    return {
        "title": f"{dataset.name} ({dataset.split})",
        "languages": languages_text(dataset.languages),
        "longest": ", ".join(f"row {row} ({tokens:,} tokens)" for row, tokens in dataset.longest),
        "charts": charts if dataset.kept else [],
        "dropped": [
            [one.reason, f"{one.count:,}", _numbers(one.rows, one.count), one.excerpt] for one in dataset.dropped
        ],
        "found": found,
    }


def _overlap(overlap: Overlap) -> list[list[str]]:
    kinds = [
        ("the same conversation", overlap.same, "="),
        ("the same question, another answer", overlap.question, "asks like"),
        ("nearly the same", overlap.near, "~"),
    ]
    return _repeated(kinds, both=True)


def _repeated(kinds: Sequence[tuple[str, Repeats, str]], *, both: bool = False) -> list[list[str]]:
    return [
        [name, f"{found.count:,}", pairs_text(found, sign, both=both, shown=ROWS_SHOWN)]
        for name, found, sign in kinds
        if found.count
    ]


def _numbers(rows: Sequence[int], count: int) -> str:
    return ", ".join(map(str, rows[:ROWS_SHOWN])) + (", ..." if count > ROWS_SHOWN else "")


def _chart(histogram: Histogram, axis: str, counted: str) -> Chart:
    edges, counts = [f"{edge:,g}" for edge in histogram.edges], histogram.counts
    above = f", not drawn: {histogram.above:,} from {edges[-1]}" if histogram.above else ""
    titles = [f"{edges[i]} to {edges[i + 1]}: {count:,} {counted}" for i, count in enumerate(counts)]
    return Chart(f"{counted}{above}", axis, edges, f"{max(*counts, 1):,}", [Bars(counts, titles)])
