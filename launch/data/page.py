"""A report on data as one HTML page that needs nothing else: no script, no file, no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from tunewright.deliver.comparison_page import PAGE, STYLE
from tunewright.errors import StorageError
from tunewright.files import write_text
from tunewright.launch.data.report import DatasetReport, Histogram, Overlap, Repeats, Report
from tunewright.launch.data.report_text import (
    ALL_WELL,
    Remark,
    figures_table,
    headline,
    languages_text,
    lengths_table,
    pairs_text,
    remarks,
    visible,
)

WIDTH, HEIGHT = 340, 150  # pixels of a histogram, labels included
LEFT, BOTTOM, TOP = 44, 34, 8  # of which these are for the labels
ROWS_SHOWN = 100  # row numbers and pairs of one kind

EXTRA_STYLE = """
:root { --bar: #0072B2; --mark: #b35900; }
@media (prefers-color-scheme: dark) { :root { --bar: #56B4E9; --mark: #E69F00; } }
.card { padding: .2rem 0; margin-bottom: .8rem; }
ul.remarks { list-style: none; margin: 0; padding: 0; }
ul.remarks li { padding: .5rem .9rem; border-top: 1px solid var(--line); }
ul.remarks li:first-child { border-top: 0; }
ul.remarks li::before { content: "!"; font-weight: 700; color: var(--mark); margin-right: .6rem; }
pre { margin: .3rem 0 0 1rem; white-space: pre-wrap; overflow-wrap: anywhere; color: var(--soft);
  font: .85em/1.5 ui-monospace, monospace; }
.words, th.numbers { text-align: left; overflow-wrap: anywhere; }
td.numbers { text-align: left; overflow-wrap: anywhere; font-family: ui-monospace, monospace; font-size: .88em; }
.charts { display: flex; flex-wrap: wrap; gap: .8rem; padding: .6rem .8rem; }
figure { margin: 0; } figcaption { color: var(--soft); font-size: .88em; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
svg rect { fill: var(--bar); } svg line { stroke: var(--line); }
"""


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
    sections = [
        _section("To look at", _remarks(remarks(report))),
        _section("Datasets", _table(*figures_table(report)), _table(*lengths_table(report))),
        *(_dataset_section(dataset) for dataset in report.datasets),
        _overlap_section(report.overlap),
        _section("Training", f"<p>{escape(report.steps.describe())}</p>"),
    ]
    return PAGE.format(
        title=escape(f"Data: {visible(names)}"),
        style=STYLE + EXTRA_STYLE,
        heading="Data",
        summary=escape(headline(report)),
        sections="\n".join(sections),
    )


def _section(title: str, *parts: str) -> str:
    body = "\n".join(part if part.startswith("<p>") else f'<div class="card">{part}</div>' for part in parts if part)
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>"


def _remarks(found: Sequence[Remark]) -> str:
    if not found:
        return f"<p>{ALL_WELL}</p>"
    items = [f"<li>{escape(remark.text)}<pre>{escape(chr(10).join(remark.details))}</pre></li>" for remark in found]
    return f'<ul class="remarks">{"".join(items)}</ul>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kinds: Sequence[str] = ()) -> str:
    """A table whose columns have the given classes; the first column heads the rows."""
    classes = [f' class="{kind}"' if kind else "" for kind in kinds] or [""] * len(head)
    titles = "".join(f"<th{kind}>{escape(cell)}</th>" for kind, cell in zip(classes, head, strict=True))
    lines = []
    for row in rows:
        cells = [f"<td{kind}>{escape(visible(cell))}</td>" for kind, cell in zip(classes, row, strict=True)]
        lines.append(f"<tr><th>{escape(visible(row[0]))}</th>{''.join(cells[1:])}</tr>")
    return f"<table><thead><tr>{titles}</tr></thead><tbody>\n{chr(10).join(lines)}\n</tbody></table>"


def _dataset_section(dataset: DatasetReport) -> str:
    charts = [
        _chart(dataset.length_histogram, "tokens of an example", "examples"),
        _chart(dataset.trained_histogram, "share of a row's tokens that is learnt", "rows"),
        _chart(dataset.answer_histogram, "characters of the last answer", "rows"),
    ]
    longest = ", ".join(f"row {row} ({tokens:,} tokens)" for row, tokens in dataset.longest)
    found = [
        [name, f"{kind.count:,}", _numbers(kind.rows, kind.count)]
        for name, kind in (
            ("cut to data.cutoff_len", dataset.truncated),
            ("very short answers", dataset.short),
            ("no stop token is learnt", dataset.unended),
            ("special tokens' strings learnt as text", dataset.special),
            ("more tokens than the model knows positions", dataset.beyond),
        )
        if kind.count
    ]
    found += _repeated([("copies of an earlier row", dataset.exact, "="), ("nearly copies", dataset.near, "~")])
    dropped = [[one.reason, f"{one.count:,}", _numbers(one.rows, one.count), one.excerpt] for one in dataset.dropped]
    return _section(
        f"{visible(dataset.name)} ({dataset.split})",
        f"<p>Languages of what is learnt: {escape(languages_text(dataset.languages))}</p>",
        f"<p>Longest: {longest or '-'}</p>",
        f'<div class="charts">{"".join(charts)}</div>' if dataset.kept else "",
        _table(["dropped because", "rows", "row numbers", "the first"], dropped, ["words", "", "numbers", "numbers"])
        if dropped
        else "",
        _table(["rows with", "rows", "row numbers"], found, ["words", "", "numbers"]) if found else "",
    )


def _overlap_section(overlap: Overlap | None) -> str:
    title = "Held-out rows that are known from training"
    if overlap is None:
        return _section(title, "<p>Nothing is held out.</p>")
    rows = _repeated(
        [
            ("the same conversation", overlap.same, "="),
            ("the same question, another answer", overlap.question, "asks like"),
            ("nearly the same", overlap.near, "~"),
        ],
        both=True,
    )
    if not rows:
        return _section(title, f"<p>None of {overlap.rows:,}.</p>")
    return _section(
        title, f"<p>Of {overlap.rows:,} held out.</p>", _table(["", "rows", "pairs"], rows, ["words", "", "numbers"])
    )


def _repeated(kinds: Sequence[tuple[str, Repeats, str]], *, both: bool = False) -> list[list[str]]:
    return [
        [name, f"{found.count:,}", pairs_text(found, sign, both=both, shown=ROWS_SHOWN)]
        for name, found, sign in kinds
        if found.count
    ]


def _numbers(rows: Sequence[int], count: int) -> str:
    return ", ".join(map(str, rows[:ROWS_SHOWN])) + (", ..." if count > ROWS_SHOWN else "")


def _chart(histogram: Histogram, label: str, counted: str) -> str:
    """Bars with the largest count at the side, the first, middle and last edge below, and each bar's figures on it."""
    edges, counts = histogram.edges, histogram.counts
    right, floor = WIDTH - 12, HEIGHT - BOTTOM
    step, highest = (right - LEFT) / len(counts), max(*counts, 1)
    bars = []
    for index, count in enumerate(counts):
        height = (floor - TOP) * count / highest
        place = f'x="{LEFT + index * step:.1f}" y="{floor - height:.1f}"'
        between = f"{edges[index]:,g} to {edges[index + 1]:,g}: {count:,} {counted}"
        size = f'width="{max(step - 1, 1):.1f}" height="{height:.1f}"'
        bars.append(f"<rect {place} {size}><title>{between}</title></rect>")
    marks = [
        f'<text x="{LEFT + index * step:.1f}" y="{floor + 14}" text-anchor="middle">{edges[index]:,g}</text>'
        for index in sorted({0, len(counts) // 2, len(counts)})
    ]
    above = f", not drawn: {histogram.above:,} from {edges[-1]:,g}" if histogram.above else ""
    return (
        f"<figure><figcaption>{counted}{above}</figcaption>"
        f'<svg width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(label)}">'
        f'<line x1="{LEFT}" y1="{floor + 0.5}" x2="{right}" y2="{floor + 0.5}"/>{"".join(bars)}{"".join(marks)}'
        f'<text x="{LEFT - 6}" y="{TOP + 10}" text-anchor="end">{highest:,}</text>'
        f'<text x="{LEFT - 6}" y="{floor}" text-anchor="end">0</text>'
        f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(label)}</text>'
        f"</svg></figure>"
    )
