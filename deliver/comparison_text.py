"""A comparison of runs as plain text and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from tunewright.deliver.comparison_rows import Row, comparison_rows, warning_notes
from tunewright.deliver.held_out_answers import MARKS, HeldOutAnswers, held_out_answers, score_notes
from tunewright.deliver.run_record import Run, run_labels
from tunewright.deliver.setting_differences import config_differences
from tunewright.pages import render
from tunewright.terminal import table
from tunewright.text import MISSING, clip, display_width, one_line

MAX_RUN_COLUMNS = 4
TEXT_PROMPTS = 3
REPORT_PROMPTS = 12
TEXT_WIDTH = 100
# A list of data files may run to thousands of characters; tables need only enough to tell two apart.
TEXT_VALUE_WIDTH, REPORT_VALUE_WIDTH = 48, 200
NO_ANSWERS = "(no run has any in its evaluation.json)"


def text_report(runs: Sequence[Run]) -> str:
    """Return the whole comparison as plain text: table, differing settings, a few answers."""
    notes = "\n".join([*warning_notes(runs), *score_notes(runs)])
    differences = _differences(runs, TEXT_VALUE_WIDTH)
    parts = [
        render_table(runs),
        *([notes] if notes else []),
        "Settings that differ\n" + (table(*differences, rule=True) if differences else _no_differences(runs)),
        _answers_text(held_out_answers(runs, TEXT_PROMPTS)),
    ]
    return "\n\n".join(parts)


def markdown_report(runs: Sequence[Run], image: str) -> str:
    """Return the whole comparison as Markdown, with the loss curves linked as `image`."""
    return render(
        "comparison.md.jinja",
        image=image,
        figures=_grid("run", runs, comparison_rows(runs)),
        notes=[*warning_notes(runs), *score_notes(runs)],
        differences=_differences(runs, REPORT_VALUE_WIDTH),
        no_differences=_no_differences(runs),
        answers=_answers_grid(held_out_answers(runs, REPORT_PROMPTS)),
        no_answers=NO_ANSWERS,
    )


def render_table(runs: Sequence[Run]) -> str:
    """Return the comparison as an aligned plain-text table."""
    return table(*_grid("run", runs, comparison_rows(runs)), rule=True)


def _grid(corner: str, runs: Sequence[Run], rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return head and rows, one column per run, or one row per run when they are many."""
    lines = [[corner, *run_labels(runs)], *([label, *cells] for label, cells in rows)]
    if len(runs) > MAX_RUN_COLUMNS:
        lines = [list(column) for column in zip(*lines, strict=True)]
    return lines[0], lines[1:]


def _differences(runs: Sequence[Run], width: int) -> tuple[list[str], list[list[str]]] | None:
    rows = [(key, [clip(one_line(value), width) for value in values]) for key, values in config_differences(runs)]
    return _grid("setting", runs, rows) if rows else None


def _no_differences(runs: Sequence[Run]) -> str:
    return "(none)" if sum(bool(run.config) for run in runs) > 1 else "(fewer than two runs have a configuration)"


def _answers_text(held_out: HeldOutAnswers) -> str:
    if not held_out.questions:
        return f"Held-out answers\n{NO_ANSWERS}"
    head, rows = _answers_grid(held_out)
    indent = max(map(display_width, head))
    blocks = [f"Held-out answers ({len(held_out.questions)} of {held_out.available} prompts)"]
    for prompt, expected, *answers in rows:
        cells = [f"  {prompt}", f"  {expected}", *(f"  {cell}" if cell == MISSING else cell for cell in answers)]
        lines = [
            f"{name}{' ' * (indent - display_width(name))}  {cell[:2]}{clip(one_line(cell[2:]), TEXT_WIDTH)}".rstrip()
            for name, cell in zip(head, cells, strict=True)
        ]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _answers_grid(held_out: HeldOutAnswers) -> tuple[list[str], list[list[str]]]:
    """Return head and a row for each question, the answers behind their marks."""
    rows = []
    for question in held_out.questions:
        found = [column.judged(question) for column in held_out.columns]
        rows.append([*question, *(MISSING if one is None else f"{MARKS[one[1]]} {one[0]}" for one in found)])
    return ["prompt", "expected", *(column.header for column in held_out.columns)], rows
