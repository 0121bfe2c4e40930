"""A wrong registry, file or row is told with the place and what to write instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.errors import DataError
from trainer.data.registry import load_entry
from trainer.data.rows import read_rows, to_messages

ROW = {"instruction": "Say hello.", "input": "", "output": "Hello."}


def registry(folder: Path, entry: Any = None, rows: Any = None, name: str = "mine") -> Path:
    (folder / "dataset_info.json").write_text(
        json.dumps({name: {"file_name": "rows.json"} if entry is None else entry}, ensure_ascii=False), encoding="utf-8"
    )
    (folder / "rows.json").write_text(json.dumps([ROW] if rows is None else rows), encoding="utf-8")
    return folder


def test_columns_that_are_not_named_keep_their_defaults(tmp_path: Path) -> None:
    entry = load_entry("mine", registry(tmp_path, {"file_name": "rows.json", "columns": {"prompt": "instruction"}}))
    assert to_messages(read_rows(entry)[0], entry.columns) == [
        {"role": "user", "content": "Say hello."},
        {"role": "assistant", "content": "Hello."},
    ]


def test_names_outside_ascii_are_found(tmp_path: Path) -> None:
    assert load_entry("甄嬛", registry(tmp_path, name="甄嬛")).path.name == "rows.json"


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({}, "no `file_name`"),
        ({"filename": "rows.json"}, "Did you mean 'filename'"),
        ({"file_name": "missing.json"}, "there is no file"),
        ({"file_name": "rows.json", "formatting": "sharegpt"}, "`formatting` is 'sharegpt'"),
        ({"file_name": "rows.json", "ranking": True}, "preference data"),
        ({"file_name": "rows.json", "columns": {"promt": "instruction"}}, "Did you mean 'prompt'"),
        ("rows.json", "must be an object"),
    ],
)
def test_a_wrong_entry_is_told(tmp_path: Path, entry: Any, said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        load_entry("mine", registry(tmp_path, entry))
    assert str(tmp_path / "dataset_info.json") in str(caught.value)


def test_an_unknown_name_lists_the_known_ones_and_the_registry(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Did you mean 'mine'") as caught:
        load_entry("mein", registry(tmp_path))
    assert str(tmp_path / "dataset_info.json") in str(caught.value)


def test_no_registry_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no registry at .*`data\.dir`"):
        load_entry("mine", tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'[\n  {"instruction": "a", "output": }\n]', r"rows\.json:2:34: not JSON"),
        (b'[{"instruction": "\xff"}]', "not UTF-8: byte 18 is 0xff"),
        (b"", "has no rows"),
        (b"[]", "has no rows"),
        (b'{"instruction": "a"}', "must hold a list"),
        (b'["a"]', "row 0: expected an object"),
        (b'[{"instruction": "a", "answer": "b"}]', "no column 'output'.*It has: answer, instruction"),
    ],
)
def test_a_broken_file_is_told_with_the_place(tmp_path: Path, content: bytes, said: str) -> None:
    registry(tmp_path)
    (tmp_path / "rows.json").write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_rows(load_entry("mine", tmp_path))


def test_a_broken_line_of_jsonl_is_told_with_its_number(tmp_path: Path) -> None:
    registry(tmp_path, {"file_name": "rows.jsonl"})
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n\n{broken\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:3:2"):
        read_rows(load_entry("mine", tmp_path))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"output": ""}, "`output` is empty"),
        ({"output": None}, "`output` is empty"),
        ({"output": 3}, "`output` is int, not text"),
        ({"instruction": ""}, "`instruction` is empty"),
        ({"history": [["only a question"]]}, "`history` must be a list of"),
    ],
)
def test_an_unusable_row_says_why(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    entry = load_entry("mine", registry(tmp_path))
    assert reason in to_messages({**ROW, **change}, entry.columns)


def test_system_and_history_become_turns(tmp_path: Path) -> None:
    entry = load_entry("mine", registry(tmp_path))
    messages = to_messages(
        {**ROW, "system": "Be brief.", "history": [["Hi", "Hello"]], "input": "Loudly."}, entry.columns
    )
    assert [(turn["role"], turn["content"]) for turn in messages] == [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Say hello.\nLoudly."),
        ("assistant", "Hello."),
    ]
