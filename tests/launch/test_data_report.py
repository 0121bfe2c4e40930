"""The report on data finds what is wrong with rows, and says it to people, to programs and on a page."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tunewright.errors import ConfigError
from tunewright.launch.data.check import Tokens, compose, make_tokens
from tunewright.launch.data.measure import make_report
from tunewright.launch.data.page import report_html
from tunewright.launch.data.report import Pair, Report
from tunewright.launch.data.report_remarks import remarks
from tunewright.launch.data.report_text import report_json, report_text
from tunewright.pages import check_replaceable, render_page
from tunewright.plan.devices import Devices
from tunewright.plan.rules import check
from tunewright.trainer.model.config_json import known_positions

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
WORDS = ("river", "copper", "seven", "gladly", "under", "window", "music", "never", "paper", "orange", "quick", "stone")
SENTENCES = [
    {"instruction": f"Say something about the {WORDS[a]} and the {WORDS[b]}.", "input": "", "output": f"{WORDS[c]} {a}"}
    for a, b, c in [(n % 12, (5 * n + 1) % 12, (7 * n + 2) % 12) for n in range(12)]
]
LONG = (
    "The parcel that I ordered on the third of May has still not arrived, although the shop promised to deliver it "
    "within a week, and nobody answers the telephone when I call to ask where it is."
)


@pytest.fixture(autouse=True)
def _model(tiny_model: Path) -> None:
    """Every report needs the tokenizer."""


def row(instruction: str, output: str) -> dict[str, str]:
    return {"instruction": instruction, "input": "", "output": output}


def written(file: Path, rows: list[Any]) -> str:
    file.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return str(file)


def report_of(names: list[str], *overrides: str, held: str | None = None) -> tuple[Report, Tokens]:
    config = compose(names, overrides, None)
    if held:
        config.data.eval_names = [held]
    tokens = make_tokens(config)
    return make_report(tokens.cache, config, check(config, Devices("cpu", 0, 2)), tokens.tokenizer), tokens


def test_a_copy_is_found_with_both_row_numbers_and_not_as_nearly_the_same(tmp_path: Path) -> None:
    report, _ = report_of([written(tmp_path / "rows.json", [*SENTENCES, SENTENCES[3], SENTENCES[3]])])
    dataset = report.datasets[0]
    assert [(pair.row, pair.other_row) for pair in dataset.exact.pairs] == [(12, 3), (13, 3)]
    assert (dataset.exact.count, dataset.near.count) == (2, 0)
    assert "2 of 14 rows (14%) copied from an earlier row\n      row 12 = 3, 13 = 3" in report_text(report)


def test_rows_that_are_nearly_the_same_are_found(tmp_path: Path) -> None:
    rows = [*SENTENCES, row(LONG, "We are sorry."), row(LONG.replace("third", "fourth"), "We are sorry.")]
    report, _ = report_of([written(tmp_path / "rows.json", rows)])
    dataset = report.datasets[0]
    assert [(pair.row, pair.other_row) for pair in dataset.near.pairs] == [(13, 12)]
    assert dataset.exact.count == 0


def test_a_copy_from_another_dataset_names_it(tmp_path: Path) -> None:
    first = written(tmp_path / "first.json", SENTENCES)
    second = written(tmp_path / "second.json", [row("Only here", "and nowhere else"), SENTENCES[5]])
    report, _ = report_of([first, second])
    assert report.datasets[0].exact.count == 0
    assert report.datasets[1].exact.pairs == [Pair(second, 1, first, 5)]
    assert f"row 1 = {first} 5" in report_text(report)


def test_held_out_rows_known_from_training_are_found_each_once(tmp_path: Path) -> None:
    train = [*SENTENCES, row(LONG, "We are sorry.")]
    held = [
        row("Quite another question", "with an answer"),
        SENTENCES[2],
        row(SENTENCES[4]["instruction"], "Another answer"),
        row(LONG.replace("third", "fourth"), "We are sorry."),
    ]
    names = written(tmp_path / "train.json", train), written(tmp_path / "held.json", held)
    report, _ = report_of([names[0]], held=names[1])
    overlap = report.overlap
    assert overlap is not None
    assert overlap.rows == 4
    found = [[(pair.row, pair.other_row) for pair in kind.pairs] for kind in (overlap.same, overlap.question)]
    assert found == [[(1, 2)], [(2, 4)]]
    assert overlap.near.pairs == [Pair(names[1], 3, names[0], 12)]
    text = report_text(report)
    for kind in (
        "also among the training rows",
        "with the question of a training row",
        "nearly the same as a training row",
    ):
        assert f"1 of 4 held-out rows {kind}" in text


def test_copies_in_one_file_show_as_overlap_once_it_is_split(tmp_path: Path) -> None:
    report, tokens = report_of([written(tmp_path / "rows.json", SENTENCES * 2)], "data.eval_size=6")
    held = set(tokens.cache.chosen("eval")[0][1].tolist())
    known = {number for number in held if (number + 12) % 24 not in held}
    assert report.overlap is not None
    assert {pair.row for pair in report.overlap.same.pairs} == known
    assert known


def test_dropped_rows_are_told_by_reason_with_numbers_and_an_excerpt(tmp_path: Path) -> None:
    rows = [
        *SENTENCES * 4,
        row("lonely question", ""),
        row("x", "y"),
        row("another", ""),
        {"instruction": "", "output": "z"},
    ]
    report, _ = report_of([written(tmp_path / "rows.json", rows)])
    reasons = {dropped.reason: dropped.rows for dropped in report.datasets[0].dropped}
    assert reasons == {"`output` is empty": [48, 50], "`instruction` is empty": [51]}
    text = report_text(report)
    assert "3 of 52 rows (6%) dropped" in text
    assert (
        '2: `output` is empty (rows 48, 50)\n        {"instruction": "lonely question", "input": "", "output": ""}'
        in text
    )


def test_lengths_are_those_of_the_examples_in_the_cache(tmp_path: Path) -> None:
    report, tokens = report_of([written(tmp_path / "rows.json", [*SENTENCES, row(LONG, LONG)])])
    cached, dataset = tokens.cache.train[0], report.datasets[0]
    lengths = np.array([len(ids) for ids in cached.examples()["input_ids"]])
    assert dataset.lengths["max"] == lengths.max()
    assert dataset.lengths["50%"] == sorted(lengths)[6]
    assert dataset.longest[0] == (12, lengths[12])
    assert sum(dataset.length_histogram.counts) + dataset.length_histogram.above == len(lengths)
    assert dataset.tokens == lengths.sum()


def test_every_value_of_a_long_tail_is_counted_once(tmp_path: Path) -> None:
    report, _ = report_of([written(tmp_path / "rows.json", [*SENTENCES * 10, row("tail", LONG * 3)])])
    histogram = report.datasets[0].answer_histogram
    assert (sum(histogram.counts), histogram.above) == (120, 1)


def test_cut_rows_and_short_answers_are_numbered(tmp_path: Path) -> None:
    rows = [*SENTENCES, row("Is it so?", "Y"), row("Tell me.", LONG), row("Is it so?", "Yes")]
    report, _ = report_of([written(tmp_path / "rows.json", rows)], "data.cutoff_len=48")
    dataset = report.datasets[0]
    assert (dataset.truncated.rows, dataset.short.rows) == ([13], [12])
    assert [remark.details for remark in remarks(report)][:2] == [["row 13"], ["row 12"]]


def test_languages_are_those_of_the_answers(tmp_path: Path) -> None:
    chinese = "我昨天在网上买了一本书，可是今天还没有收到，请问什么时候可以送到我家里？"
    answers = [*[chinese] * 2, LONG, '{"team": "billing", "priority": "high"}', "too short"]
    rows = [row(f"Question {number}", answer) for number, answer in enumerate(answers)]
    report, _ = report_of([written(tmp_path / "rows.json", rows)])
    languages = report.datasets[0].languages
    assert (languages.sampled, languages.classified) == (5, 4)
    assert languages.shares == {"zh": 0.5, "en": 0.25, "JSON": 0.25}
    assert "zh 50%, en 25%, JSON 25% (of 4 answers; 1 more shorter" in report_text(report)


@pytest.mark.parametrize(("overrides", "total"), [((), 3 * math.ceil(24 / 16)), (("train.max_steps=7",), 7)])
def test_steps_are_those_that_training_takes(tmp_path: Path, overrides: tuple[str, ...], total: int) -> None:
    report, _ = report_of([written(tmp_path / "rows.json", SENTENCES * 2)], *overrides)
    assert (report.steps.total, report.steps.per_epoch) == (total, 2)
    assert f"{total} optimiser steps: 2 an epoch" in report_text(report)


def test_data_without_faults_get_no_remark_and_bad_data_no_endless_text(tmp_path: Path) -> None:
    report, _ = report_of([written(tmp_path / "good.json", SENTENCES)])
    assert remarks(report) == []
    assert "Nothing stands out" in report_text(report)
    bad = [{"messages": [{"role": f"role {number % 40}", "content": "x"}]} for number in range(200)]
    good = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    report, tokens = report_of([written(tmp_path / "bad.json", [good, *bad])])
    text = report_text(report)
    assert tokens.refusal is not None
    assert len(text.splitlines()) <= 60
    assert "and 35 other reasons" in text


def test_a_file_of_which_nothing_can_be_used_is_reported_too(tmp_path: Path) -> None:
    report, tokens = report_of([written(tmp_path / "rows.json", [row("question", "")])])
    assert "No row" in str(tokens.refusal)
    assert "1 of 1 rows (100%) dropped" in report_text(report)
    assert "<svg" not in report_html(report)


def test_what_a_terminal_would_obey_is_shown_as_an_escape(tmp_path: Path) -> None:
    file = written(tmp_path / "ro\x1b[31mws.json", [*SENTENCES, row("Is it so?", "Y"), row("\x9b31m", "")])
    text = report_text(report_of([file], "data.max_dropped=1")[0])
    assert "ro\\x1b[31mws.json" in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)


def test_the_page_escapes_what_rows_and_names_say_and_needs_nothing_else(tmp_path: Path) -> None:
    rows = [*SENTENCES, SENTENCES[0], row("<script>alert(1)</script>", "")]
    page = report_html(report_of([written(tmp_path / "<b>&.json", rows)])[0])
    assert "<script" not in page
    assert "<b>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "row 12 = 0" in page
    assert page.count("<svg") == 3
    assert not re.search(r"""(src|href)=|url\(|@import|https?:""", page)


def test_datasets_are_named_before_or_as_a_setting_not_both() -> None:
    with pytest.raises(ConfigError, match="both say which data"):
        compose(["demo"], ["data.names=[demo]"], None)
    name = "with, comma = and 'quote'.json"
    assert list(compose([name], ["data.cutoff_len=64"], None).data.names) == [name]


def test_too_many_dropped_rows_end_with_3_after_the_whole_report(tunewright: Cli, tmp_path: Path) -> None:
    file = written(tmp_path / "key=value, and more.json", [*SENTENCES, row("lonely <question>", ""), row("x", "")])
    page = tmp_path / "page.html"
    done = tunewright("data", "check", file, "data.max_dropped=0.1", "--html", page)
    assert done.returncode == 3
    assert "2 of 14 rows (14%) dropped" in done.stdout
    assert "3 optimiser steps" in done.stdout
    assert "DataError: 2 of 14 rows" in done.stderr
    assert "data.max_dropped = 10%" in done.stderr
    assert "Traceback" not in done.stderr
    assert "lonely &lt;question&gt;" in page.read_text(encoding="utf-8")


def test_a_page_replaces_a_page_and_nothing_else(tunewright: Cli, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<p>mine</p>", encoding="utf-8")
    done = tunewright("data", "check", "--html", page)
    assert done.returncode == 4
    assert f"{page} is there already, and tunewright did not make it: name another file with --html." in done.stderr
    assert page.read_text(encoding="utf-8") == "<p>mine</p>"
    page.write_text(render_page("page.html.jinja", title="t", heading="h", summary="s"), encoding="utf-8")
    check_replaceable(page, page, "")


def test_json_is_all_that_is_printed_and_agrees_with_the_text(tunewright: Cli, tmp_path: Path) -> None:
    file = written(tmp_path / "rows.json", [*SENTENCES * 2, row("甄嬛", "")])
    done = tunewright("data", "check", "--json", file, "data.eval_size=0.2")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    report, _ = report_of([file], "data.eval_size=0.2")
    assert told == json.loads(json.dumps(report_json(report)))
    text = report_text(report)
    for remark in told["remarks"]:
        assert remark in text
    dataset = told["datasets"][0]
    assert dataset["dropped"][0]["rows"] == [24]
    assert "甄嬛" in done.stdout
    assert f"{told['splits']['train']['examples']} examples ({told['splits']['train']['tokens']:,} tokens)" in text
    assert f"{told['steps']['total']} optimiser steps" in text
    assert dataset["exact"]["count"] == 12


def test_help_needs_no_heavy_library() -> None:
    code = (
        "import sys\n"
        "from tunewright.launch.cli import parser\n"
        "for words in (['data', 'check', '--help'], ['data', 'show', '--help'], ['data', 'add', '--help']):\n"
        "    try: parser().parse_args(words)\n"
        "    except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'pyarrow', 'datasets', 'numpy'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "max_dropped" in done.stdout


def test_what_is_learnt_otherwise_than_it_looks_is_remarked(tmp_path: Path) -> None:
    ended = {"role": "assistant", "content": "Yes.<|im_end|>", "learn": False}
    rows = [
        {
            "id": 7,
            "messages": [{"role": "user", "content": f"Is it {word}?"}, {**ended, "content": f"{word}<|im_end|>"}],
        }
        for word in WORDS[:2]
    ]
    long = {"messages": [{"role": "user", "content": "Repeat."}, {"role": "assistant", "content": "parcel " * 2100}]}
    file = written(tmp_path / "rows.json", [*rows, long])
    report, _ = report_of([file], "data.cutoff_len=4096")
    assert [remark.text.removeprefix(f"{file}: ") for remark in remarks(report)] == [
        "1 of 3 rows (33%) longer than the 2,048 positions that the model knows",
        "2 of 3 rows (67%) with special tokens' strings in an answer, learnt as text",
        "2 of 3 rows (67%) with a turn that has `learn`, which nobody reads",
    ]
    text = report_text(report)
    assert "rows 0, 1" in text
    assert "<|im_end|> (2): rows 0, 1" in text
    assert "that are not read: id\n" in text
    assert "longer than the 2,048 positions" not in report_text(report_of([file], "data.cutoff_len=2048")[0])


def scaled(factor: float, original: int) -> dict[str, float]:
    return {"factor": factor, "original_max_position_embeddings": original}


@pytest.mark.parametrize(
    ("numbers", "positions"),
    [
        ({"max_position_embeddings": 2048}, 2048),
        ({"text_config": {"max_position_embeddings": 4096}, "max_position_embeddings": 1}, 4096),
        ({"max_position_embeddings": 32768, "rope_scaling": scaled(4, 32768)}, 131072),
        ({"max_position_embeddings": 131072, "rope_parameters": scaled(8, 8192)}, 131072),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 2.0}}, 8192),
        ({}, None),
    ],
)  # fmt: skip
def test_the_positions_of_a_model_are_read_off_its_configuration(
    numbers: dict[str, Any], positions: int | None
) -> None:
    assert known_positions(numbers) == positions
