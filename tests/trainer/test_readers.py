"""Every kind of file gives the rows that were written into it, and a broken one is told with the place."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from tunewright.errors import DataError
from tunewright.registry import Entry, Place
from tunewright.trainer.data.hub_datasets import read_snapshot
from tunewright.trainer.data.readers import CHUNK, is_saved_dataset, read_file, saved_files

ROWS = [
    {"instruction": "Say hello.", "input": "", "output": "Hello,\n“world”\t!"},
    {"instruction": "打个招呼", "input": "大声", "output": "你好"},
]


def write_separated(path: Path, separator: str) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(ROWS)


WRITERS: dict[str, Callable[[Path], Any]] = {
    ".json": lambda path: path.write_text(json.dumps(ROWS, ensure_ascii=False, indent=2), encoding="utf-8"),
    ".jsonl": lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8"),
    ".csv": lambda path: write_separated(path, ","),
    ".tsv": lambda path: write_separated(path, "\t"),
    ".parquet": lambda path: Dataset.from_list(ROWS).to_parquet(path),
    ".arrow": lambda path: write_arrow(path),
}


def write_arrow(path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(path.with_suffix(""))
    next(path.with_suffix("").glob("*.arrow")).rename(path)


def told(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        list(read_file(path))
    assert str(path) in str(caught.value)
    return str(caught.value).replace(str(path), "FILE")


@pytest.mark.parametrize("suffix", WRITERS)
def test_rows_come_back_as_written(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path)
    assert list(read_file(path)) == ROWS


def saved_rows(folder: Path, split: str | None = None) -> list[dict[str, Any]]:
    return [row for file in saved_files(folder, split) for row in read_file(file)]


def test_folders_of_save_to_disk_come_back_split_by_split(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    splits = DatasetDict({"train": Dataset.from_list(ROWS), "validation": Dataset.from_list(ROWS[:1])})
    splits.save_to_disk(tmp_path / "two")
    assert is_saved_dataset(tmp_path / "one")
    assert not is_saved_dataset(tmp_path)
    assert saved_rows(tmp_path / "one") == ROWS
    assert saved_rows(tmp_path / "two", "validation") == ROWS[:1]
    with pytest.raises(DataError, match=r"no split 'test'\. It has: train, validation"):
        saved_files(tmp_path / "two", "test")


def calling(name: str, properties: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    """A row with one call and the schema of what is called."""
    call = {"function": {"name": name, "arguments": arguments}}
    turns = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    return {"messages": turns, "tools": [{"name": name, "parameters": {"properties": properties}}]}


CALLS = [
    calling("weather", {"city": {"type": "string"}}, city="Oslo"),
    calling("clock", {"zone": {"type": "integer"}, "short": {"type": "boolean"}}, zone=2, short=True),
]


def test_objects_come_back_without_the_nulls_of_their_columns_type(tmp_path: Path) -> None:
    dataset = Dataset.from_list(CALLS)
    dataset.to_parquet(tmp_path / "rows.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    assert "zone" in str(dataset[0])  # there all rows have all keys
    assert list(read_file(tmp_path / "rows.parquet")) == CALLS
    assert saved_rows(tmp_path / "saved") == CALLS


@pytest.mark.parametrize("streaming", [False, True])
def test_objects_of_a_hubs_dataset_come_back_as_written(tmp_path: Path, streaming: bool) -> None:
    # Of arguments with a key of several types, `datasets` makes a column of JSON, whose nulls are the file's.
    mixed = [calling("f", {}, x=1, n=None), calling("f", {}, x="s")]
    for name, rows in (("calls", CALLS), ("mixed", mixed)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        entry = Entry(name, f"'{name}'", Place.modelscope, f"org/{name}")
        found = list(read_snapshot(entry, tmp_path / name, streaming=streaming))
        assert [row["messages"] for row in found] == [row["messages"] for row in rows]


def test_nulls_that_were_written_stay(tmp_path: Path) -> None:
    rows = [{"a": {"x": None}, "b": {"x": None}, "c": [1, None], "d": None}, {"a": {}, "b": {}, "c": None, "d": "e"}]
    whole = [[row["a"] for row in rows], [[*row["b"].items()] for row in rows]]
    table = pyarrow.table(
        {
            "a": pyarrow.array([json.dumps(value) for value in whole[0]]).cast(pyarrow.json_()),
            "b": pyarrow.array(whole[1], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
            "c": [row["c"] for row in rows],
            "d": [row["d"] for row in rows],
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert list(read_file(tmp_path / "rows.parquet")) == rows
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(read_file(tmp_path / "rows.jsonl")) == rows


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_json_and_jsonl_are_told_apart_by_what_they_hold(tmp_path: Path, name: str) -> None:
    for text in (json.dumps(ROWS), "\n\n".join(json.dumps(row) for row in ROWS), "\ufeff" + json.dumps(ROWS)):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert list(read_file(tmp_path / name)) == ROWS


def test_windows_line_ends_and_a_byte_order_mark_are_no_part_of_the_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b"\xef\xbb\xbfprompt,response\r\na,b\r\n\r\nc,d\r\n")
    expected = [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}]
    assert list(read_file(tmp_path / "rows.csv")) == expected


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('a"\\é中🙂[]{},: \n', max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('ab"中', max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(rows=st.lists(st.dictionaries(st.text("ab中", max_size=3), values, max_size=4), max_size=8), data=st.data())
@settings(max_examples=60, deadline=None, database=None)
def test_a_list_is_read_alike_wherever_its_parts_begin(
    rows: list[Any], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("parts") / "rows.json"
    text = json.dumps(rows, ensure_ascii=data.draw(st.booleans()), indent=data.draw(st.sampled_from([None, 0, 2])))
    # Space before the list moves the border between two parts through the whole text.
    path.write_text(" " * (CHUNK - data.draw(st.integers(0, len(text)))) + text, encoding="utf-8")
    assert list(read_file(path)) == rows


@pytest.mark.parametrize("far", [0, *range(3, 20)])
@pytest.mark.parametrize(
    "value", ["NaN", "-Infinity", "1e400", "1" * 40, "-0.0", r'"\ud83d"', r'"\ud83d\ude00"', r'"\\n"']
)
def test_a_list_holds_what_json_says(tmp_path: Path, value: str, far: int) -> None:
    text = f'[{{"a": 1}}, {{"b": {value}, "a": 1, "a": 2}}, {{"c": {value}}}]'
    # The value lies across the border of two parts.
    text = " " * (CHUNK - text.index(value) - far) + text if far else text
    (tmp_path / "rows.json").write_text(text)
    rows = list(read_file(tmp_path / "rows.json"))
    assert repr(rows) == repr(json.loads(text))


def test_a_row_larger_than_a_part_is_read(tmp_path: Path) -> None:
    rows = [{"text": "中" * CHUNK}, {"text": "b"}, {"text": "c" * 3 * CHUNK}]
    (tmp_path / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert list(read_file(tmp_path / "rows.json")) == rows


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[{"a": 1},\n {"a": }]', "FILE:2:8: not JSON: Expecting value"),
        ('[{"a": 1}\n {"a": 2}]', "FILE:2:2: not JSON: expected ',', found '{'"),
        ('[{"a": 1},\n {"a": 2}', "FILE:2:10: not JSON: expected ',', the file ends"),
        ('[{"a": 1}] x', "FILE:1:12: not JSON: something follows the list"),
        ('[{"a": 1},\n 7]', "row 1: expected an object, found int"),
        ('[{"a": "b\nc"}]', "FILE:1:10: not JSON: Invalid control character"),
        ('{\n "data": []\n}', "holds one object over several lines"),
        ('{"a": 1}\n{"a": 2\n[1]\n', "FILE:3: expected an object, found list"),
        ('{"a": 1}\n{"a": 2\n[1]\n', "FILE:2:8: not JSON"),
    ],
)
def test_broken_json_is_told_with_line_and_column(tmp_path: Path, content: str, said: str) -> None:
    assert said in told(tmp_path / "rows.json", content)


def test_the_place_is_right_far_into_a_file(tmp_path: Path) -> None:
    rows = ",\n".join(json.dumps({"text": "x" * 100}) for _ in range(3 * CHUNK // 100))
    assert f"FILE:{rows.count(chr(10)) + 2}:6: not JSON" in told(tmp_path / "rows.json", f"[{rows},\n    {{]")


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv"])
@pytest.mark.parametrize("far", [0, CHUNK])
def test_bad_utf8_is_told_with_line_and_byte(tmp_path: Path, name: str, far: int) -> None:
    opening = {"rows.json": "[\n", "rows.jsonl": '{"a": 1}\n', "rows.csv": "a\n"}[name]
    before = f'{opening}{" " * far}{{"a": "é'.encode()
    assert f"FILE:2: not UTF-8: byte {len(before)} of the file is 0xff" in told(tmp_path / name, before + b'\xff"}]')


def test_a_broken_line_ends_the_rows_at_once(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\nno\n{"a": 2}\n')
    rows = read_file(tmp_path / "rows.jsonl")
    assert next(rows) == {"a": 1}
    with pytest.raises(DataError, match=":2:1"):
        next(rows)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a": ' + "[" * 100_000])
def test_what_is_nested_too_deeply_is_told(tmp_path: Path, content: str) -> None:
    for name in ("rows.json", "rows.jsonl"):
        assert "nested too deeply" in told(tmp_path / name, content) or "not JSON" in told(tmp_path / name, content)


def test_utf16_is_named(tmp_path: Path) -> None:
    assert "looks like UTF-16" in told(tmp_path / "rows.jsonl", '{"a": "b"}'.encode("utf-16"))


def test_all_broken_lines_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    lines = told(tmp_path / "rows.jsonl", '{"a": 1}\nno\n{"a": 2}\n{"b"}\n').splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["FILE:2:1", "FILE:4:5"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.csv", "a,b\n1,2\n3\n", "FILE:3: 1 fields, but the header names 2: a, b"),
        ("rows.csv", 'a,b\n"1,2\n', "cannot be read as CSV"),
        ("rows.parquet", "no parquet", "cannot be read as parquet"),
        ("rows.arrow", "no arrow at all", "cannot be read as Arrow"),
        ("rows.xlsx", "", "files can be .json, .jsonl, .csv"),
    ],
)
def test_other_broken_files_are_told(tmp_path: Path, name: str, content: str, said: str) -> None:
    assert said in told(tmp_path / name, content)
