"""Pages and Markdown from the templates in `templates/`: one style, one kind of chart, nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunewright.errors import StorageError
from tunewright.text import one_line, visible

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"
MADE_BY = '<meta name="generator" content="tunewright">'  # in every page, near its beginning


@dataclass(frozen=True)
class Bars:
    """One of the series of a chart."""

    heights: Sequence[float]  # (bars,)
    titles: Sequence[str]  # (bars,) what a bar says when it is pointed at


@dataclass(frozen=True)
class Chart:
    """A histogram, its series side by side over the same bins."""

    caption: str
    axis: str
    edges: Sequence[str]  # (bars + 1,)
    highest: str  # the value of the highest bar
    series: Sequence[Bars]


@lru_cache
def environment() -> Environment:
    """The templates with what they may call. What a page shows is escaped unless a template says otherwise."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {"visible": visible, "plain": plain, "code": code, "fenced": fenced}
    return made


def render(template: str, **values: Any) -> str:
    """Return a template filled in. Half of a surrogate pair, which has no UTF-8 form, becomes a question mark."""
    return environment().get_template(template).render(values).encode("utf-8", errors="replace").decode()


def render_page(template: str, *, script: str = "", **values: Any) -> str:
    """Return a page, which runs `script`, a file beside the templates, and none that a shown text might bring."""
    from markupsafe import Markup

    style = Markup((TEMPLATES / "style.css").read_text(encoding="utf-8"))
    told = Markup((TEMPLATES / script).read_text(encoding="utf-8")) if script else ""
    digest = base64.b64encode(hashlib.sha256(told.encode()).digest()).decode() if script else ""
    return render(template, style=style, script=told, script_hash=Markup(digest), made_by=Markup(MADE_BY), **values)


def check_replaceable(file: Path, page: Path, advice: str) -> None:
    """Refuse to write over a file, unless the page that is written with it, or as it, is there and was made here.

    Raises:
        StorageError: it may be somebody's own.
    """
    if not file.exists():
        return
    try:
        ours = page.is_file() and MADE_BY.encode() in page.open("rb").read(2000)
    except OSError:
        ours = False
    if not ours:
        raise StorageError(f"{file} is there already, and tunewright did not make it: {advice}.")


def plain(text: object) -> str:
    """Return text that Markdown and HTML show as it is, in one line."""
    return re.sub(r"([\\`*_\[\]<>|#&~])", r"\\\1", one_line(str(text)))


def code(text: object) -> str:
    """Return text as Markdown code in one line, with as many backticks around it as it needs."""
    line = one_line(str(text)).replace("|", "\\|")
    marks = "`" * (_longest_run(line) + 1)
    pad = " " if "`" in line else ""
    return f"{marks}{pad}{line}{pad}{marks}"


def fenced(text: str, language: str = "text") -> str:
    """Return text as a Markdown block of code that it cannot end."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
