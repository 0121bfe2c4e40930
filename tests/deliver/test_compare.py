"""The comparison of runs, on run folders as the trainer writes them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from tunewright.deliver.compare import common_parent, compare
from tunewright.deliver.comparison_page import comparison_html
from tunewright.deliver.comparison_rows import comparison_rows
from tunewright.deliver.comparison_text import markdown_report, render_table, text_report
from tunewright.deliver.held_out_answers import held_out_answers, score_notes
from tunewright.deliver.loss_curves import curves_png
from tunewright.deliver.run_record import load_run, run_labels, series
from tunewright.deliver.setting_differences import config_differences
from tunewright.errors import ConfigError, StorageError
from tunewright.text import display_width

ROOT = Path(__file__).resolve().parents[2]


def manifest(name: str, **changes: Any) -> dict[str, Any]:
    content = {
        "name": name,
        "status": "done",
        "strategy": "zero2",
        "method": "lora",
        "parameters": {"trainable": 24576, "total": 1228800},
        "distributed": {"world_size": 2, "type": "DEEPSPEED", "zero_stage": 2, "device": "cpu"},
        "steps": 75,
        "wall_seconds": 101.4,
        "tokens_per_second": 3210.4,
        "mfu": 0.314,
        "peak_memory_bytes": 812345678,
        "final": {"train_loss": 0.1234, "eval_loss": 0.5678},
        "versions": {"torch": "2.13.0"},
        "hardware": {"device_name": "EPYC"},
    }
    return {**content, **changes}


def metric_lines(scale: float = 1.0, steps: int = 75) -> list[str]:
    lines = []
    for step in range(5, steps + 1, 5):
        loss = scale * (3.2 * 0.955**step + 0.12)
        lines.append(json.dumps({"step": step, "loss": loss, "tokens_seen": step * 1600}))
        if step % 25 == 0:
            lines.append(json.dumps({"step": step, "eval_loss": loss * 1.1}))
    return lines


CONFIG = {
    "name": "x",
    "output_root": "runs",
    "model": {"name": "tiny"},
    "optimizer": {"learning_rate": 0.001, "betas": [0.9, 0.999]},
    "lora": {"rank": 8},
}

ROWS = [
    {"prompt": "Capital of X?", "expected": "Lumo", "base": "<script>alert(1)</script>", "tuned": "Lumo "},
    {"prompt": "Capital of Y?", "expected": "Rima", "base": "I | do\nnot know", "tuned": "Rome"},
]


def make_run(
    parent: Path,
    name: str,
    *,
    config: dict[str, Any] | None = None,
    metrics: list[str] | None = None,
    rows: list[dict[str, str]] | None = None,
    **changes: Any,
) -> Path:
    """Write a complete run folder; ``changes`` replace manifest entries."""
    folder = parent / name
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(manifest(name, **changes)), encoding="utf-8")
    lines = metric_lines() if metrics is None else metrics
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {**CONFIG, "name": name, "output_root": str(parent), **(config or {})}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    evaluation = {
        "examples": 80,
        "base": {"exact_match": 0.0},
        "tuned": {"exact_match": 0.9125},
        "rows": ROWS if rows is None else rows,
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation), encoding="utf-8")
    return folder


def bare_run(parent: Path, name: str, content: str = "{}") -> Path:
    """Write what a run that died at once leaves: a manifest with next to nothing in it."""
    folder = parent / name
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(content, encoding="utf-8")
    return folder


def cells(folder: Path) -> dict[str, str]:
    return {label: row[0] for label, row in comparison_rows([load_run(folder)])}


class TestFigures:
    def test_complete_run(self, tmp_path: Path) -> None:
        assert cells(make_run(tmp_path, "a")) == {
            "status": "done",
            "strategy": "zero2",
            "method": "lora",
            "trainable parameters": "24,576 of 1,228,800 (2.000%)",
            "world size": "2 (DEEPSPEED, ZeRO 2)",
            "steps": "75",
            "wall time": "1:41",
            "tokens/s (non-padding)": "3,210",
            "MFU": "31.4%",
            "peak memory (largest rank)": "774.7 MiB",
            "final train loss": "0.1234",
            "final eval loss": "0.5678",
            "held-out rows": "80",
            "exact match before": "0.0% (0.0 to 4.6)",
            "exact match after": "91.2% (83.0 to 95.7)",
            "device": "EPYC (cpu)",
        }

    def test_a_warning_of_the_training_is_told_in_each_report(self, tmp_path: Path) -> None:
        warned = load_run(make_run(tmp_path, "a", warnings=["The loss is at <8.32>.", 7]))
        runs = [warned, load_run(make_run(tmp_path, "b", warnings=[])), load_run(make_run(tmp_path, "c", warnings="x"))]
        assert [row for row in comparison_rows(runs) if row[0] == "status"] == [
            ("status", ["done, with a warning", "done", "done"])
        ]
        assert "a: The loss is at <8.32>." in text_report(runs)
        assert "a: The loss is at" in markdown_report(runs, "x.png")
        assert "<p>a: The loss is at &lt;8.32&gt;.</p>" in comparison_html(runs, b"PNG")

    def test_missing_files_and_entries_show_a_dash(self, tmp_path: Path) -> None:
        assert set(cells(bare_run(tmp_path, "died")).values()) == {"-"}

    def test_entries_of_the_wrong_kind_show_a_dash(self, tmp_path: Path) -> None:
        odd: dict[str, Any] = {
            "parameters": 7,
            "distributed": None,
            "mfu": "fast",
            "final": [],
            "steps": True,
        }
        assert set(cells(bare_run(tmp_path, "odd", json.dumps(odd))).values()) == {"-"}

    def test_single_process_and_unknown_mfu(self, tmp_path: Path) -> None:
        alone = {"world_size": 1, "type": "NO", "zero_stage": None, "device": "cuda"}
        found = cells(make_run(tmp_path, "a", distributed=alone, mfu=None, peak_memory_bytes=3 * 1024**3))
        assert (found["world size"], found["MFU"]) == ("1", "-")
        assert found["peak memory (largest rank)"] == "3.00 GiB"

    def test_running_run_reports_its_last_logged_figures(self, tmp_path: Path) -> None:
        folder = make_run(tmp_path, "a", status="running", steps=None, final=None)
        found = cells(folder)
        assert found["steps"] == "75"
        last = dict(series(load_run(folder), "loss"))[75]
        assert found["final train loss"] == f"{last:.4f}"

    @pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00")])
    def test_wall_time(self, tmp_path: Path, seconds: float, shown: str) -> None:
        assert cells(make_run(tmp_path, "a", wall_seconds=seconds))["wall time"] == shown


class TestLoading:
    def test_torn_last_line_loses_only_that_line(self, tmp_path: Path) -> None:
        folder = make_run(tmp_path, "a")
        whole = series(load_run(folder), "loss")
        with (folder / "metrics.jsonl").open("ab") as stream:
            stream.write('{"step": 80, "note": "é'.encode()[:-1])
        assert series(load_run(folder), "loss") == whole

    def test_repeated_steps_of_a_resumed_run_keep_the_later_value(self, tmp_path: Path) -> None:
        lines = ['{"step": 1, "loss": 3}', '{"step": 2, "loss": 9}', '{"ste', '{"step": 2, "loss": 2}']
        assert series(load_run(make_run(tmp_path, "a", metrics=lines)), "loss") == [(1, 3), (2, 2)]

    def test_torn_side_files_count_as_missing(self, tmp_path: Path) -> None:
        folder = make_run(tmp_path, "a")
        (folder / "evaluation.json").write_text('{"base": {"exact', encoding="utf-8")
        (folder / "config.yaml").write_text("a: [1,", encoding="utf-8")
        run = load_run(folder)
        assert (run.config, run.evaluation) == ({}, {})
        assert cells(folder)["exact match after"] == "-"

    def test_unknown_run_names_the_closest(self, tmp_path: Path) -> None:
        make_run(tmp_path, "demo-zero2")
        make_run(tmp_path, "other")
        with pytest.raises(ConfigError, match=r"Did you mean 'demo-zero2'\?") as caught:
            load_run(tmp_path / "demo-zero")
        assert caught.value.exit_code == 2
        assert "other" not in str(caught.value)

    def test_unknown_run_without_a_close_name_lists_what_there_is(self, tmp_path: Path) -> None:
        make_run(tmp_path, "demo-zero2")
        with pytest.raises(ConfigError, match="holds demo-zero2"):
            load_run(tmp_path / "qqq")

    def test_folder_of_runs_is_not_a_run(self, tmp_path: Path) -> None:
        make_run(tmp_path, "demo-zero2")
        with pytest.raises(ConfigError, match=r"no manifest\.json.*demo-zero2"):
            load_run(tmp_path)

    def test_torn_manifest(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"manifest\.json is not"):
            load_run(bare_run(tmp_path, "a", '{"name": "a'))


class TestTables:
    def test_one_column_per_run_up_to_four(self, tmp_path: Path) -> None:
        runs = [load_run(make_run(tmp_path, f"run{i}", steps=1000 + i)) for i in range(4)]
        lines = render_table(runs).splitlines()
        assert lines[0].split() == ["run", "run0", "run1", "run2", "run3"]
        steps = next(line for line in lines if line.startswith("steps"))
        assert steps.split() == ["steps", "1,000", "1,001", "1,002", "1,003"]

    def test_one_row_per_run_beyond_four(self, tmp_path: Path) -> None:
        runs = [load_run(make_run(tmp_path, f"run{i}")) for i in range(5)]
        lines = render_table(runs).splitlines()
        assert len(lines) == 2 + 5
        assert [line.split()[0] for line in lines[2:]] == [f"run{i}" for i in range(5)]

    def test_columns_align_with_wide_names(self, tmp_path: Path) -> None:
        runs = [load_run(make_run(tmp_path, name)) for name in ("微调实验", "plain", "한국어-run")]
        widths = {display_width(line) for line in render_table(runs).splitlines()}
        assert len(widths) == 1

    def test_markdown_has_equal_columns_and_escapes_markup(self, tmp_path: Path) -> None:
        runs = [load_run(make_run(tmp_path, "a|b_c")), load_run(make_run(tmp_path, "<b>"))]
        lines = markdown_report(runs, "x.png").split("\n\n")[1].splitlines()
        assert r"a\|b\_c" in lines[0]
        assert r"\<b\>" in lines[0]
        assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {4}

    def test_equal_names_stay_distinct(self, tmp_path: Path) -> None:
        for parent in ("x", "y"):
            make_run(tmp_path / parent, "same")
        runs = [load_run(tmp_path / parent / "same") for parent in ("x", "y")]
        assert run_labels(runs) == ["same", "same #2"]


class TestConfigDifferences:
    def test_only_settings_that_differ(self, tmp_path: Path) -> None:
        first = make_run(tmp_path / "p", "a")
        second = make_run(tmp_path / "q", "b", config={"lora": {"rank": 16}, "model": {"name": "small"}})
        assert config_differences([load_run(first), load_run(second)]) == [
            ("lora.rank", ["8", "16"]),
            ("model.name", ["tiny", "small"]),
        ]

    def test_same_number_written_differently_is_no_difference(self, tmp_path: Path) -> None:
        folders = [make_run(tmp_path, name) for name in "ab"]
        (folders[0] / "config.yaml").write_text("lr: 1e-3\nn: 1\nz: null\nflag: 1", encoding="utf-8")
        (folders[1] / "config.yaml").write_text("lr: 0.001\nn: 1.0\nflag: true", encoding="utf-8")
        differences = config_differences([load_run(folder) for folder in folders])
        assert differences == [("flag", ["1", "true"])]

    def test_nested_section_in_one_run_and_run_without_configuration(self, tmp_path: Path) -> None:
        first = make_run(tmp_path, "a", config={"deepspeed": None})
        second = make_run(tmp_path, "b", config={"deepspeed": {"stage": 2}})
        third = bare_run(tmp_path, "c")
        differences = config_differences([load_run(folder) for folder in (first, second, third)])
        assert differences == [("deepspeed.stage", ["-", "2", "-"])]

    def test_lists_of_sections(self, tmp_path: Path) -> None:
        folders = [
            make_run(tmp_path, name, config={"data": [{"name": "demo", "weight": weight}]})
            for name, weight in (("a", 1), ("b", 2))
        ]
        differences = config_differences([load_run(folder) for folder in folders])
        assert differences == [("data.0.weight", ["1", "2"])]


class TestHeldOutAnswers:
    def test_same_base_is_shown_once(self, tmp_path: Path) -> None:
        runs = [load_run(make_run(tmp_path, name)) for name in "ab"]
        assert [column.header for column in held_out_answers(runs, 12).columns] == ["base", "a", "b"]

    def test_different_bases_are_told_apart(self, tmp_path: Path) -> None:
        other = [{**row, "base": "something else"} for row in ROWS]
        runs = [load_run(make_run(tmp_path, "a")), load_run(make_run(tmp_path, "b", rows=other))]
        headers = [column.header for column in held_out_answers(runs, 12).columns]
        assert headers == ["base of a", "base of b", "a", "b"]

    def test_prompts_shared_by_all_runs_come_first(self, tmp_path: Path) -> None:
        runs = [load_run(make_run(tmp_path, "a")), load_run(make_run(tmp_path, "b", rows=ROWS[1:]))]
        held_out = held_out_answers(runs, 1)
        assert held_out.questions == (("Capital of Y?", "Rima"),)
        assert held_out.available == 2


def answered(right: list[bool], *, first: int = 0) -> list[dict[str, str]]:
    """Rows whose tuned answers are right or wrong as told, numbered from `first`."""
    return [
        {"prompt": f"p{number}", "expected": "yes", "base": "no", "tuned": "yes" if one else "no"}
        for number, one in enumerate(right, first)
    ]


class TestScores:
    """What a share of right answers is worth beside another."""

    def notes(self, tmp_path: Path, **rows: list[dict[str, str]]) -> list[str]:
        return score_notes([load_run(make_run(tmp_path, name, rows=answers)) for name, answers in rows.items()])

    def test_shares_of_different_rows_are_not_shown_without_a_word(self, tmp_path: Path) -> None:
        whole, part = answered([True] * 58 + [False] * 22), answered([True] * 14 + [False] * 2)
        assert self.notes(tmp_path, a=whole, b=part) == [
            "The runs were not asked the same held-out rows (a 80, b 16): their shares do not compare.",
            "On the 16 rows that all were asked, exact match after: a 100.0% (80.6 to 100.0), b 87.5% (64.0 to 96.5).",
            "16 rows do not tell b from the best, a (McNemar's exact test, 95%).",
        ]

    def test_runs_without_a_row_in_common(self, tmp_path: Path) -> None:
        notes = self.notes(tmp_path, a=answered([True]), b=answered([True], first=1))
        assert notes == ["The runs were not asked the same held-out rows (a 1, b 1): their shares do not compare."]

    def test_runs_that_the_rows_tell_apart_need_no_word(self, tmp_path: Path) -> None:
        assert self.notes(tmp_path, a=answered([True] * 9 + [False]), b=answered([False] * 10)) == []
        assert self.notes(tmp_path / "alone", a=answered([True])) == []

    def test_rows_that_are_alike_count_each(self, tmp_path: Path) -> None:
        twice = [{"prompt": "go on", "expected": "yes", "base": "no", "tuned": "yes"}] * 2
        (note,) = self.notes(tmp_path, a=twice, b=twice)
        assert note.startswith("2 rows do not tell b from the best, a")

    def test_they_stand_below_the_table_in_every_format(self, tmp_path: Path) -> None:
        runs = [make_run(tmp_path, name, rows=answered([True] * 3)) for name in "ab"]
        out = compare(runs, tmp_path / "out", echo=lambda _: None)
        for name in ("comparison.txt", "comparison.md", "comparison.html"):
            assert "3 rows do not tell b from the best, a" in (out / name).read_text(encoding="utf-8")

    def test_a_part_stands_in_where_all_rows_were_never_asked_and_says_so(self, tmp_path: Path) -> None:
        folder = make_run(tmp_path, "a")
        whole = (folder / "evaluation.json").read_text(encoding="utf-8")
        for rows in (8, 16):
            part = {"examples": rows, "held_out": 80, "tuned": {"exact_match": 0.875}, "rows": []}
            (folder / f"evaluation-{rows}.json").write_text(json.dumps(part), encoding="utf-8")
        assert cells(folder)["held-out rows"] == "80"
        (folder / "evaluation.json").unlink()
        assert cells(folder)["held-out rows"] == "first 16 of 80"
        assert cells(folder)["exact match after"] == "87.5% (64.0 to 96.5)"
        assert json.loads(whole)["examples"] == 80


def png_size(content: bytes) -> tuple[int, int]:
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content[-8:-4] == b"IEND"
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


class TestLossCurves:
    def test_png_is_wider_with_the_token_panel(self, tmp_path: Path) -> None:
        steps_only = [json.dumps({"step": 1, "loss": 2.0}), json.dumps({"step": 2, "loss": 1.0})]
        with_tokens = [load_run(make_run(tmp_path, "a"))]
        without = [load_run(make_run(tmp_path, "b", metrics=steps_only))]
        width, height = png_size(curves_png(with_tokens))
        assert 1200 < width < 2400
        assert 500 < height < 1500
        assert png_size(curves_png(without))[0] < width

    def test_awkward_runs_still_draw(self, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
        nan = ['{"step": 1, "loss": NaN}', '{"step": 2, "loss": -0.5}', '{"step": 2, "eval_loss": 1}']
        runs = [
            load_run(make_run(tmp_path, "_hidden $x_{$", metrics=nan)),
            load_run(make_run(tmp_path, "微调")),
            load_run(bare_run(tmp_path, "died")),
        ]
        for drawn in (runs, runs[2:]):
            png_size(curves_png(drawn))
        assert [str(warning.message) for warning in recwarn] == []


class _Checker(HTMLParser):
    """Check that tags nest and collect what the page would load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value or "" for key, value in attrs if key in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


class TestHtml:
    def page(self, *runs: Path) -> str:
        return comparison_html([load_run(run) for run in runs], b"PNG")

    def test_self_contained_and_well_formed(self, tmp_path: Path) -> None:
        runs = [make_run(tmp_path, "a"), make_run(tmp_path, "b", config={"lora": {"rank": 16}})]
        page = self.page(*runs)
        assert "http://" not in page
        assert "https://" not in page
        checker = _Checker()
        checker.feed(page)
        assert checker.open == []
        assert [source[:22] for source in checker.sources] == ["data:image/png;base64,"]
        assert not checker.tags & {"script", "link", "iframe"}

    def test_content_is_escaped_and_marked(self, tmp_path: Path) -> None:
        page = self.page(make_run(tmp_path, "<b>bold</b>"))
        assert "<script>" not in page
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
        assert "<b>" not in page
        assert '<td class="correct"><span class="mark">✓</span> Lumo' in page
        assert '<td class="wrong"><span class="mark">✗</span> Rome' in page

    def test_sections_of_runs_that_left_nothing(self, tmp_path: Path) -> None:
        page = self.page(bare_run(tmp_path, "x"), bare_run(tmp_path, "y"))
        for note in ("No setting differs", "No run was evaluated", "No run recorded"):
            assert note in page

    def test_at_most_twelve_prompts(self, tmp_path: Path) -> None:
        rows = [{"prompt": f"p{i}", "expected": "e", "base": "b", "tuned": "e"} for i in range(40)]
        page = self.page(make_run(tmp_path, "a", rows=rows))
        assert page.count('<td class="correct">') == 12
        assert "12 of 40 held-out prompts" in page

    def test_rows_of_the_environment_that_differ_are_marked(self, tmp_path: Path) -> None:
        runs = [make_run(tmp_path, "a"), make_run(tmp_path, "b", versions={"torch": "2.14.0"})]
        page = self.page(*runs)
        assert '<tr class="differs"><th>torch</th><td>2.13.0</td><td>2.14.0</td>' in page
        assert "<tr><th>device_name</th><td>EPYC</td><td>EPYC</td>" in page


class TestCompare:
    def test_writes_four_files_and_says_where(self, tmp_path: Path) -> None:
        runs = [
            make_run(tmp_path / "my runs", "a"),
            make_run(tmp_path / "my runs", "b", config={"lora": {"rank": 16}}),
        ]
        said: list[str] = []
        out = compare([*runs, runs[0]], tmp_path / "deep" / "out", echo=said.append)
        assert out == tmp_path / "deep" / "out"
        names = {"comparison.txt", "comparison.md", "comparison.png", "comparison.html"}
        assert {file.name for file in out.iterdir()} == names
        text = (out / "comparison.txt").read_text(encoding="utf-8")
        printed = "\n".join(said)
        assert text.strip() in printed
        assert f"tensorboard --logdir '{tmp_path / 'my runs'}'" in printed
        assert str(out / "comparison.html") in printed
        assert re.search(r"^lora\.rank +8 +16$", text, re.MULTILINE)
        assert re.search(r"^base +✗ I \| do not know$", text, re.MULTILINE)
        assert re.search(r"^a +✓ Lumo$", text, re.MULTILINE)
        assert text.splitlines()[0].split() == ["run", "a", "b"]  # the run named twice is shown once

    def test_the_same_pattern_again_passes_over_the_comparison(self, tmp_path: Path) -> None:
        make_run(tmp_path, "a")
        for _ in range(2):
            compare(sorted(tmp_path.iterdir()), tmp_path / "comparison", echo=lambda text: None)

    def test_terminal_escapes_in_answers_are_not_printed(self, tmp_path: Path) -> None:
        rows = [{"prompt": "p", "expected": "e", "base": "\x1b[2J\x07gone \ud83d", "tuned": "e"}]
        said: list[str] = []
        out = compare([make_run(tmp_path, "a", rows=rows)], tmp_path / "out", echo=said.append)
        assert "gone" in said[0]
        for text in (said[0], (out / "comparison.md").read_text(encoding="utf-8")):
            assert not re.search(r"[\x00-\x09\x0b-\x1f]", text)

    def test_written_twice_replaces(self, tmp_path: Path) -> None:
        run = make_run(tmp_path, "a")
        for _ in range(2):
            compare([run], tmp_path / "out", echo=lambda _: None)
        assert len(list((tmp_path / "out").iterdir())) == 4

    def test_files_of_somebody_else_are_left_alone(self, tmp_path: Path) -> None:
        run = make_run(tmp_path, "a")
        (tmp_path / "comparison.md").write_text("mine", encoding="utf-8")
        for _ in range(2):
            with pytest.raises(StorageError, match=r"comparison\.md is there already.*--out"):
                compare([run], tmp_path, echo=lambda _: None)
            (tmp_path / "comparison.html").write_text("<p>mine</p>", encoding="utf-8")
        assert (tmp_path / "comparison.md").read_text(encoding="utf-8") == "mine"
        assert not (tmp_path / "comparison.png").exists()

    def test_nothing_to_compare(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="at least one run"):
            compare([], tmp_path, echo=lambda _: None)

    def test_output_folder_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("mine", encoding="utf-8")
        with pytest.raises(StorageError, match="cannot write"):
            compare([make_run(tmp_path, "a")], tmp_path / "out", echo=lambda _: None)
        assert (tmp_path / "out").read_text(encoding="utf-8") == "mine"

    def test_common_parent_of_runs_at_different_depths(self, tmp_path: Path) -> None:
        runs = [make_run(tmp_path, "a"), make_run(tmp_path / "group", "b")]
        assert common_parent([load_run(run) for run in runs]) == tmp_path.resolve()

    def test_importing_loads_neither_torch_nor_matplotlib(self) -> None:
        code = (
            "import sys, tunewright.deliver.compare; "
            "print([m for m in ('torch', 'matplotlib', 'trainer') if m in sys.modules])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
        )
        assert done.stdout.strip() == "[]"
