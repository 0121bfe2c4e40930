"""The page that shows a generated dataset."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tunewright.datagen.curation import Rejected
from tunewright.datagen.preview import FOLD, LONGEST, _edges, _shares, preview_page

VOID = {"meta", "input"}


class Page(HTMLParser):
    """Tags, attributes and text of a page whose tags must match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.script = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []
        self.text = "\n".join(self.words)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            self.script += data
        elif data.strip() and self._open[-1] != "style":
            self.words.append(data)

    def count(self, tag: str, kind: str) -> int:
        return sum(name == tag and kind in attrs.get("class", "").split() for name, attrs in self.tags)


def row(number: int, **more: Any) -> dict[str, Any]:
    return {"instruction": f"Question {number}?", "input": "", "output": f"Answer {number}.", **more}


def manifest(**changed: Any) -> dict[str, Any]:
    return {
        "name": "riddles",
        "settings": {"task": "Answer a riddle.", "model": "gpt-4.1", "temperature": 0.4},
        "system_message": "You answer riddles.",
        "plan": {"topics": ["kitchen", "sea"], "personas": [], "forms": ["chat"]},
        "counts": {"asked_for": 50, "accepted": 50, "train": 45, "eval": 5, "requests": 1061},
        "rejects": {"duplicate": 9, "not JSON": 2},
        "usage": {"prompt_tokens": 1000, "completion_tokens": 234},
        "cost": {"usd": 0.0123, "prices": {"input": 2.0}},
        "yield": {"kitchen": {"accepted": 20, "rejected": 5}, "sea": {"accepted": 10, "rejected": 0}},
        "similarity": {"highest_train_test": 0.6996, "pair": ["one of train", "one of test"]},
        "scores": {"10": 1, "2": 4},
        "versions": {"openai": "3.52.0"},
        "hashes": {"riddles.json": "ab" * 32},
        **changed,
    }


def test_the_page_tells_everything() -> None:
    rejects = [Rejected("not JSON", "Sure! Here it is", "cell 7: sea")]
    page = Page(preview_page(manifest(), [row(1, topic="kitchen", difficulty="hard", score=4)], [row(2)], rejects))
    for told in (
        "riddles", "Answer a riddle.", "You answer riddles.", "1,061", "11", "1,234", "$0.0123", "0.699",
        "kitchen", "duplicate: 9", "not JSON: 2, 1 shown", "Sure! Here it is", "cell 7: sea", "Question 1?",
        "Answer 2.", "hard", "score 4", "held out", "one of test", "settings.model", "cost.prices.input",
        "ab" * 32, "3.52.0",
    ):  # fmt: skip
        assert told in page.words, told
    assert page.text.index("\n2\n4\n") < page.text.index("\n10\n1\n")  # scores are numbers


def test_needs_nothing_else() -> None:
    html = preview_page(manifest(), [row(1)], [row(2)], [])
    assert not [attrs for _, attrs in Page(html).tags if {"src", "href", "srcset", "data", "action"} & attrs.keys()]
    assert not re.search(r"url\(|@import|https?://", html)


def test_only_the_script_of_the_page_may_run() -> None:
    page = Page(preview_page(manifest(), [row(1)], [], []))
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv"))
    assert policy == f"default-src 'none'; img-src data:; script-src 'sha256-{digest}'; style-src 'unsafe-inline'"


EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'><i style='x'></details></div>&lt;{0}{evil}"


def test_no_field_is_read_as_html() -> None:
    """The same page with harmless text has the same tags."""

    def page(text: str) -> Page:
        told = manifest(
            name=text,
            date=text,
            settings={"task": text, text: text},
            system_message=text,
            plan={text: [text]},
            counts={"train": text, "requests": text},
            rejects={text: 3},
            cost={"usd": text, "prices": {text: text}},
            similarity={"highest_train_test": 0.1, "pair": [text, text]},
            scores={text: 2},
            versions={text: text},
            hashes={text: text},
            **{"yield": {text: {"accepted": 1, "rejected": 2}}},
        )
        fields = ("instruction", "input", "output", "system", "topic", "persona", "difficulty", "form", "score")
        evil = {**dict.fromkeys(fields, text), "history": [[text, text]]}
        return Page(preview_page(told, [evil, row(1)], [evil], [Rejected(text, text, text)]))

    found, harmless = page(EVIL), page("harmless")
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in harmless.tags]
    assert [attrs.keys() for _, attrs in found.tags] == [attrs.keys() for _, attrs in harmless.tags]
    assert found.script == harmless.script
    # Nothing is escaped twice either: all of it is there to read.
    assert sum(text.count(EVIL) for text in found.words) == sum(text.count("harmless") for text in harmless.words)


@pytest.mark.parametrize("told", [{}, {"name": None, "settings": None, "similarity": {}, "plan": {}, "yield": {}}])
def test_of_nothing(told: dict[str, Any]) -> None:
    page = Page(preview_page(told, [], [], []))
    assert "There are no rows." in page.words
    assert "None" not in page.text.replace("None.", "")
    assert not [tag for tag, _ in page.tags if tag == "svg"]


@pytest.mark.parametrize("left_out", list(manifest()))
def test_what_the_manifest_does_not_tell_is_left_out(left_out: str) -> None:
    told = manifest()
    del told[left_out]
    whole, less = (Page(preview_page(given, [row(1)], [row(2)], [])) for given in (manifest(), told))
    assert len(less.words) < len(whole.words) or left_out == "name"


def test_a_price_that_is_not_known() -> None:
    assert "price unknown" in Page(preview_page(manifest(cost={"usd": None}), [], [], [])).words


def test_samples_are_spread_over_all_rows() -> None:
    train, test = [row(number) for number in range(90)], [row(1000 + number) for number in range(10)]
    page = Page(preview_page({}, train, test, [], samples=20))
    assert page.count("div", "sample") == 20
    assert page.count("span", "held") == 2
    assert "20 of 100 rows. " in page.words
    assert Page(preview_page({}, train, test, [], samples=500)).count("div", "sample") == 100
    assert Page(preview_page({}, train, test, [], samples=0)).count("div", "sample") == 0


def test_a_conversation_is_shown_in_order() -> None:
    talk = row(3, history=[["first", "second"], ["third", "fourth"]], input="given", system="be kind")
    page = Page(preview_page({}, [talk, row(4, system="be brief")], [], []))
    shown = [page.words.index(text) for text in ("be kind", "first", "second", "third", "fourth", "Question 3?")]
    shown += [page.words.index("given"), page.words.index("Answer 3.")]
    assert shown == sorted(shown)
    same = Page(preview_page({}, [talk, row(4, system="be kind")], [], []))
    assert "be kind" not in same.words  # all rows share it


def test_long_texts_are_folded_and_the_longest_cut() -> None:
    long, longest = "字" * (FOLD + 1), "x" * (LONGEST + 5)
    page = Page(preview_page({}, [row(1, output=long), row(2, output=longest)], [], []))
    assert page.count("details", "fold") == 2
    assert long in page.words
    assert "[... 5 more characters are not on this page]" in page.text
    assert Page(preview_page({}, [row(1, output="字" * FOLD)], [], [])).count("details", "fold") == 0
    assert Page(preview_page({}, [row(1, output="line\n" * 40)], [], [])).count("details", "fold") == 1


def test_broken_characters_can_be_written(tmp_path: Path) -> None:
    html = preview_page({"name": "\ud800"}, [row(1, output="\udfff \x00 \u202e")], [], [Rejected("x", "\ud83d", "")])
    (tmp_path / "page.html").write_text(html, encoding="utf-8")


def test_rejects_are_counted_from_the_manifest_and_shown_a_few_times() -> None:
    rejects = [Rejected("duplicate", f"reply {number}", "") for number in range(8)] + [Rejected("new", "", "")]
    page = Page(preview_page({"rejects": {"empty": 3, "duplicate": 20}}, [], [], rejects))
    heads = [text for text in page.words if re.match(r"\w+: \d", text)]
    assert heads == ["duplicate: 20, 5 shown", "empty: 3", "new: 1, 1 shown"]
    assert sum(text.startswith("reply ") for text in page.words) == 5
    assert "(nothing)" in page.words


def titles(html: str) -> list[str]:
    return re.findall("<title>(.*?)</title></rect>", html)


def test_histograms_hold_every_row_of_both_parts() -> None:
    train, test = [row(1, output="x" * length) for length in (0, 9, 10, 95)], [row(2, output="x" * 95)]
    told = titles(preview_page({}, train, test, []))
    assert "0 to 4: 1 train (25.0%)" in told
    assert [text for text in told if "95 to 99" in text] == [
        "95 to 99: 1 train (25.0%)",
        "95 to 99: 1 held out (100.0%)",
    ]
    # Of each row a prompt and an answer.
    assert sum(int(re.findall(r": (\d+) ", text)[0]) for text in told) == 10


def test_a_few_very_long_rows_do_not_press_the_others_together() -> None:
    html = preview_page({}, [row(1, output="x" * 50)] * 300 + [row(2, output="x" * 90_000)], [], [])
    assert "not drawn: 1 longer, up to 90,000" in html
    assert "50 to 51: 300 train (99.7%)" in titles(html)


@pytest.mark.parametrize("values", [[0], [1], [29, 30], [31], [7] * 50, list(range(1000)), [10**7, 3]])
def test_bins(values: list[int]) -> None:
    edges = _edges(values)
    assert 2 <= len(edges) <= 31
    assert {after - before for before, after in pairwise(edges)} == {edges[1]}
    assert sum(count for count, _ in _shares(values, edges)) >= 0.99 * len(values) - 1
    assert sum(share for _, share in _shares([], edges)) == 0


def test_prompts_count_what_the_model_reads() -> None:
    talk = row(1, instruction="x" * 10, input="y" * 20, history=[["z" * 30, "z" * 40]])
    assert any(text.startswith("100 to ") for text in titles(preview_page({}, [talk], [], [])))


def test_needs_no_torch() -> None:
    names = "tunewright.datagen.preview, tunewright.datagen.card, tunewright.datagen.push"
    script = f"import sys, {names}\nassert not {{'torch', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).resolve().parents[2], check=True, timeout=60)


@pytest.mark.skipif(
    shutil.which("node") is None,
    reason="runs the page's script, which takes node",
)
def test_the_filter_works() -> None:
    page = Page(preview_page({}, [row(1)], [], []))
    fake = """
const samples = ["Apple pie", "pear PIE", "plum"].map(textContent => ({textContent, hidden: false}));
const found = {}, field = {hidden: true, value: "", addEventListener: (_, run) => { field.run = run; }};
globalThis.document = {getElementById: id => id === "search" ? field : found, querySelectorAll: () => samples};
"""
    ask = 'field.value = "pie  APP"; field.run(); const first = [samples.map(s => s.hidden), found.textContent];'
    ask += 'field.value = " "; field.run();'
    ask += "console.log(JSON.stringify([...first, samples.map(s => s.hidden), found.textContent, field.hidden]));"
    # The page declares the same names: a block of its own for it.
    done = subprocess.run(
        ["node", "-e", f"{fake}{{{page.script}}}{ask}"], capture_output=True, text=True, check=True, timeout=60
    )
    shown = json.loads(done.stdout)
    assert shown == [[False, True, True], "1 of 3 shown.", [False, False, False], "", False]
