"""Train and eval loss of several runs as one PNG.

matplotlib is imported inside the functions that draw, so that the rest starts without it, and used through its object
API, so that no display or pyplot state is involved.
"""

from __future__ import annotations

import io
import math
import warnings
from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tunewright.deliver.run_record import Point, Run, run_labels, series
from tunewright.text import clip, display_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# Distinguishable with the common kinds of colour blindness (Okabe and Ito), darkest first.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX"
# Run names may be Chinese, Japanese or Korean; the first of these that is installed draws them.
CJK_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "Droid Sans Fallback",
    "PingFang SC",
    "Hiragino Sans GB",
    "Microsoft YaHei",
    "SimHei",
)
LEGEND_LABEL_WIDTH = 44
LEGEND_LINE_WIDTH = {1: 86, 2: 120}  # by number of panels
# Beyond this ratio the end of the curves, where runs differ, is a flat line on a linear axis.
LOG_SCALE_RATIO = 20.0
# Curves this close on average (relative to the loss) lie on top of each other.
COINCIDENT = 0.01


def curves_png(runs: Sequence[Run]) -> bytes:
    """Return the loss curves as the bytes of a PNG file."""
    import matplotlib
    from matplotlib import font_manager

    installed = set(font_manager.get_font_names())
    fonts = ["DejaVu Sans", *[name for name in CJK_FONTS if name in installed][:1]]
    buffer = io.BytesIO()
    with matplotlib.rc_context({"font.family": fonts}), warnings.catch_warnings():
        # Without a CJK font the name is drawn as boxes, which is no reason to alarm the user.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = _draw_figure(runs)
        figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()


def _draw_figure(runs: Sequence[Run]) -> Figure:
    from matplotlib.figure import Figure

    count = 2 if any(series(run, "tokens_seen") for run in runs) else 1
    labels = [_legend_label(run, label) for run, label in zip(runs, run_labels(runs), strict=True)]
    columns = _legend_columns(labels, LEGEND_LINE_WIDTH[count])
    legend_rows = math.ceil(len(labels) / columns)
    figure = Figure(figsize=(12.5 if count == 2 else 8.5, 4.6 + 0.24 * legend_rows), layout="constrained")
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    for index in range(len(runs)):
        _draw_run(panels, runs, index)
    for axes, x_label in zip(panels, ("optimiser step", "tokens seen"), strict=False):
        _finish_panel(axes, x_label, runs)
    _draw_style_legend(panels[0], runs)
    _draw_run_legend(figure, labels, columns)
    return figure


def _color(index: int, count: int) -> Any:
    import matplotlib

    if count <= len(PALETTE):
        return PALETTE[index]
    return matplotlib.colormaps["turbo"](0.05 + 0.9 * index / (count - 1))


def _covered_by(runs: Sequence[Run], index: int) -> int:
    """Return how many later runs draw their train curve right on top of this one.

    Strategies that compute the same thing (say DDP and ZeRO) have almost the same loss; the curve
    below is drawn wider, so that both can be seen.
    """
    points = series(runs[index], "loss")
    return sum(_coincide(points, series(later, "loss")) for later in runs[index + 1 :])


def _coincide(first: Sequence[Point], second: Sequence[Point]) -> bool:
    other = dict(second)
    shared = [(value, other[step]) for step, value in first if step in other]
    if not shared:
        return False
    difference = sum(abs(a - b) for a, b in shared)
    return difference <= COINCIDENT * sum(abs(a) for a, _ in shared)


def _draw_run(panels: Sequence[Axes], runs: Sequence[Run], index: int) -> None:
    run = runs[index]
    train, evaluation = series(run, "loss"), series(run, "eval_loss")
    tokens = series(run, "tokens_seen")
    color, covered = _color(index, len(runs)), min(_covered_by(runs, index), 3)
    for axes, remap in zip(panels, (None, tokens), strict=False):
        if remap is None or remap:
            _draw_train(axes, _over(train, remap), color, covered)
            _draw_eval(axes, _over(evaluation, remap), color, covered, MARKERS[index % len(MARKERS)])


def _draw_train(axes: Axes, points: Sequence[Point], color: Any, covered: int) -> None:
    axes.plot(
        [x for x, _ in points],
        [y for _, y in points],
        color=color,
        linewidth=1.8 + 3.2 * covered,
        # A line through a single point is invisible.
        marker="." if len(points) == 1 else "",
        # Pale below: a wide line in full colour would look more important than the others.
        alpha=0.5 if covered else 1.0,
    )


def _draw_eval(axes: Axes, points: Sequence[Point], color: Any, covered: int, marker: str) -> None:
    axes.plot(
        [x for x, _ in points],
        [y for _, y in points],
        color=color,
        linestyle="--",
        linewidth=1.2,
        marker=marker,
        # Like the line widths: a smaller marker inside a larger one shows both.
        markersize=5.0 + 3.5 * covered,
        markerfacecolor="white",
        markeredgewidth=1.3,
        zorder=3,
    )


def _over(points: Sequence[Point], axis: Sequence[Point] | None) -> list[Point]:
    """Replace the step of every point by the value of ``axis`` at that step (None: keep the step)."""
    if axis is None:
        return list(points)
    return [(_interpolated(axis, step), value) for step, value in points]


def _interpolated(axis: Sequence[Point], step: float) -> float:
    """Return ``axis`` at ``step``: eval lines carry no token count, and fall between two that do."""
    right = bisect_left(axis, step, key=lambda point: point[0])
    if right == len(axis):
        return axis[-1][1]
    if axis[right][0] == step:
        return axis[right][1]
    (x0, y0), (x1, y1) = axis[right - 1] if right else (0.0, 0.0), axis[right]
    return y0 + (y1 - y0) * (step - x0) / (x1 - x0) if x1 != x0 else y1


def _finish_panel(axes: Axes, x_label: str, runs: Sequence[Run]) -> None:
    from matplotlib.ticker import EngFormatter

    axes.set_xlabel(x_label)
    axes.set_ylabel("loss")
    axes.set_title(f"Loss over {x_label.replace('optimiser step', 'optimiser steps')}", fontsize=11)
    axes.grid(True, which="both", color="#e3e6ea", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if x_label == "tokens seen":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    _scale_loss_axis(axes, [y for run in runs for key in ("loss", "eval_loss") for _, y in series(run, key)])


def _scale_loss_axis(axes: Axes, values: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        axes.text(0.5, 0.5, "no loss was logged", ha="center", transform=axes.transAxes, color="#667")
        axes.set(xticks=[], yticks=[])
        return
    if min(finite) <= 0 or max(finite) / min(finite) < LOG_SCALE_RATIO:
        return
    axes.set_yscale("log")
    axes.set_ylabel("loss (log scale)")
    # Plain numbers at 1, 2 and 5 read better than powers of ten over one or two decades.
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _legend_label(run: Run, label: str) -> str:
    silent = "" if series(run, "loss") or series(run, "eval_loss") else " (no loss logged)"
    return clip(label, LEGEND_LABEL_WIDTH) + silent


def _legend_columns(labels: Sequence[str], line_width: int) -> int:
    """Return how many legend columns fit side by side below the panels."""
    widest = max(display_width(label) for label in labels) + 8
    return max(1, min(len(labels), line_width // widest))


def _draw_run_legend(figure: Figure, labels: Sequence[str], columns: int) -> None:
    """Name the runs below the panels, where long names clip nothing and hide no curve."""
    # matplotlib drops labels that begin with "_" and reads "$" as math, and a run name may have
    # either: place neutral labels first, then set the text as it is.
    legend = figure.legend(
        [_legend_handle(index, len(labels)) for index in range(len(labels))],
        [str(number) for number in range(len(labels))],
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=9,
    )
    for artist, text in zip(legend.get_texts(), labels, strict=True):
        artist.set_parse_math(False)
        artist.set_text(text)


def _legend_handle(index: int, count: int) -> Line2D:
    from matplotlib.lines import Line2D

    return Line2D(
        [],
        [],
        color=_color(index, count),
        linewidth=2.2,
        marker=MARKERS[index % len(MARKERS)],
        markersize=5,
        markerfacecolor="white",
    )


def _draw_style_legend(axes: Axes, runs: Sequence[Run]) -> None:
    """Say which line style is train and which is eval, in the corner that falling curves leave free."""
    from matplotlib.lines import Line2D

    handles = []
    if any(series(run, "loss") for run in runs):
        handles.append(Line2D([], [], color="#667", linewidth=1.8, label="train"))
    if any(series(run, "eval_loss") for run in runs):
        marks: dict[str, Any] = {"marker": "o", "markersize": 5, "markerfacecolor": "white"}
        handles.append(Line2D([], [], color="#667", linewidth=1.2, linestyle="--", label="eval", **marks))
    if handles:
        axes.legend(handles=handles, loc="upper right", frameon=False, fontsize=9)
