"""`tunewright compare`: runs side by side, as text, Markdown, curves and a page."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from tunewright.deliver.comparison_page import comparison_html
from tunewright.deliver.comparison_text import markdown_report, text_report
from tunewright.deliver.loss_curves import curves_png
from tunewright.deliver.run_record import Run, load_run
from tunewright.errors import ConfigError, StorageError
from tunewright.files import write_bytes, write_text
from tunewright.pages import check_replaceable
from tunewright.run_folder import RunDir


def compare(run_paths: Sequence[Path], out_dir: Path, *, echo: Callable[[str], object] = print) -> Path:
    """Compare the runs: print the text, write text, Markdown, PNG and HTML, and return `out_dir`.

    Raises:
        ConfigError: there is no run, or one of them is none.
        StorageError: the files cannot be written, or are somebody's own.
    """
    out_dir = Path(out_dir)
    runs = _load_distinct(run_paths, out_dir)
    text, markdown, image, page = (out_dir / f"comparison.{kind}" for kind in ("txt", "md", "png", "html"))
    for file in (text, markdown, image, page):
        check_replaceable(file, page, "name another folder with --out")
    report = text_report(runs)
    echo(report)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        curves = curves_png(runs)
        write_text(page, comparison_html(runs, curves))
        write_text(text, f"{report}\n")
        write_text(markdown, markdown_report(runs, image.name))
        write_bytes(image, curves)
    except OSError as error:
        raise StorageError(f"cannot write the comparison to {out_dir}: {error}") from error
    echo(
        f"\nReport:      {page}  (one file, opens in any browser)\nCurves:      {image}\n"
        f"Text:        {text}, {markdown}\n"
        f"TensorBoard: tensorboard --logdir {shlex.quote(str(common_parent(runs)))}"
    )
    return out_dir


def _load_distinct(run_paths: Sequence[Path], out_dir: Path) -> list[Run]:
    """Load every run once; a shell pattern easily names the same folder twice, and that of an earlier comparison."""
    distinct: dict[Path, Path] = {}
    for path in run_paths:
        distinct.setdefault(Path(path).resolve(), Path(path))
    if (out_dir / "comparison.html").is_file() and not RunDir(out_dir).manifest.is_file():
        distinct.pop(out_dir.resolve(), None)
    if not distinct:
        raise ConfigError("nothing to compare: name at least one run folder")
    return [load_run(path) for path in distinct.values()]


def common_parent(runs: Sequence[Run]) -> Path:
    """Return the deepest folder that holds all the runs."""
    return Path(os.path.commonpath([run.path.resolve().parent for run in runs]))
