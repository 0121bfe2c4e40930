"""Figures and foreign text as they are shown, one way in all tables, lines and pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.cells import cell_len, set_cell_size

MISSING = "-"


def as_number(value: Any) -> float | None:
    """Return `value` as a float when it is a number (a bool is not)."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def count(value: Any) -> str:
    """Return 1,234, or `-` for what is no number."""
    number = as_number(value)
    return MISSING if number is None else f"{number:,.0f}"


def percent(value: Any) -> str:
    """Return a share as 12.3%, or `-` for what is no number."""
    number = as_number(value)
    if number is None:
        return MISSING
    # A tiny model on a large GPU has an MFU of 0.004%: "0.0%" would read as not measured.
    return f"{number:.2g}%" if 0 < (number := number * 100) < 0.1 else f"{number:.1f}%"


def clock(seconds: Any) -> str:
    """Return a duration as 1:05 or 2:01:05, or `-` for what is none."""
    number = as_number(seconds)
    if number is None or not 0 <= number < float("inf"):
        return MISSING
    minutes, rest = divmod(round(number), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(value: Any) -> str:
    """Return bytes as 1.50 GiB or 12.0 MiB, or `-` for what is no number."""
    number = as_number(value)
    if number is None:
        return MISSING
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"


def listed(names: Sequence[str], limit: int = 6) -> str:
    """Return "a, b, c and 4 more"."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def one_line(text: str) -> str:
    """Return `text` on one line, without what a terminal would obey: an answer may hold escape sequences."""
    return "".join(char for char in " ".join(text.split()) if char.isprintable())


def visible(text: str) -> str:
    """Return text with characters that a terminal would obey, or would not show, written as escapes."""
    return "".join(
        character
        if character.isprintable() or character == "\u3000"  # the space of Chinese and Japanese
        else character.encode("unicode_escape", "surrogatepass").decode("ascii")
        for character in text
    )


def display_width(text: str) -> int:
    """Return how many terminal cells `text` takes: wide characters two, combining ones none."""
    return cell_len(text)


def clip(text: str, width: int) -> str:
    """Shorten `text` to at most `width` terminal cells, with an ellipsis at its end."""
    if cell_len(text) <= width:
        return text
    return set_cell_size(text, width - 1).rstrip() + "…" if width > 0 else ""


def clip_start(text: str, width: int) -> str:
    """Shorten `text` at its start: a long path keeps its end, which tells it from others."""
    while cell_len(text) > width:
        text = "…" + text.lstrip("…")[1:]
    return text
