"""The templates' surroundings: what is escaped, what Markdown obeys, what may be written over."""

from __future__ import annotations

import re
from pathlib import Path

import jinja2
import pytest

from tunewright.errors import StorageError
from tunewright.pages import TEMPLATES, Bars, Chart, check_replaceable, code, environment, fenced, plain, render_page


def test_pages_escape_and_markdown_does_not() -> None:
    text = environment().from_string("{{ x }}{{ y }}")
    assert environment().autoescape("x.html.jinja") is True
    assert environment().autoescape("x.md.jinja") is False
    with pytest.raises(jinja2.UndefinedError, match="'y' is undefined"):
        text.render(x=1)


def test_a_page_says_who_made_it_and_runs_nothing() -> None:
    page = render_page("page.html.jinja", title="<t>\x1b", heading="\ud800", summary="")
    assert "<title>&lt;t&gt;\\x1b</title>" in page
    assert "<h1>?</h1>" in page
    assert "script" not in page
    assert '<meta name="generator" content="tunewright">' in page[:500]


@pytest.mark.parametrize("text", ["a|b", "`x`", "``", "# a\n---\n```\n<b>*_~[x](y)&amp;"])
def test_markdown_shows_text_as_it_is(text: str) -> None:
    assert not re.search(r"(?<!\\)[|`*_\[\]<>#&~]", plain(text).replace("\\\\", ""))
    assert "\n" not in plain(text) + code(text)
    marks = re.match("`+", code(text))
    assert marks
    assert marks[0] not in text
    block = fenced(text).splitlines()
    assert block[0].removesuffix("text") == block[-1]
    assert block[-1] not in block[1:-1]


def test_bars_of_a_chart_stand_on_the_axis_and_none_is_drawn_for_nothing() -> None:
    parts = environment().get_template("parts.html.jinja").module
    series = [Bars([0.5, 0, 1], ["a", "b", "c"]), Bars([0, 0.001, 0], ["d", "e", "f"])]
    drawn = str(parts.chart(Chart("rows", "tokens", ["0", "1", "2", "3"], "100%", series)))
    assert re.findall("<title>(.)</title>", drawn) == ["a", "c", "e"]
    bars = [(float(y), float(height)) for y, height in re.findall(r'<rect.*? y="(.*?)".*? height="(.*?)"', drawn, re.S)]
    assert {y + height for y, height in bars} == {136.0}
    assert [height for _, height in bars] == [63.0, 126.0, 1.0]


def test_a_file_is_replaced_where_the_page_beside_it_was_made_here(tmp_path: Path) -> None:
    file, page = tmp_path / "comparison.md", tmp_path / "comparison.html"
    check_replaceable(file, page, "")
    file.write_text("mine", encoding="utf-8")
    with pytest.raises(StorageError, match=r"comparison\.md is there already.*: name another"):
        check_replaceable(file, page, "name another")
    page.write_text(render_page("page.html.jinja", title="", heading="", summary=""), encoding="utf-8")
    check_replaceable(file, page, "")


def test_every_template_is_one_that_something_fills_in() -> None:
    rooms = Path(__file__).parents[2]
    told = "".join(
        file.read_text(encoding="utf-8")
        for folder in ("tunewright", "launch", "deliver", "datagen")
        for file in (rooms / folder).rglob("*.*")
        if file.suffix in (".py", ".jinja")
    )
    assert [file.name for file in TEMPLATES.iterdir() if f'"{file.name}"' not in told] == []
