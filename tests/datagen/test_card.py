"""The dataset card."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml

from tunewright.datagen.card import card, language_code

ROWS = [
    {"instruction": f"What has keys but cannot open locks? {number}", "input": "", "output": "A piano, it has keys."}
    for number in range(3)
]


def manifest(**changed: Any) -> dict[str, Any]:
    return {
        "name": "riddles",
        "date": "2026-11-21",
        "settings": {
            "task": "Answer a riddle.",
            "model": "gpt-4.1",
            "temperature": 0.4,
            "seed": 42,
            "base_url": "http://inner.example/v1",
            "out": "/home/me/data",
        },
        "system_message": "You answer riddles.",
        "counts": {"asked_for": 50, "accepted": 50, "train": 45, "eval": 5, "requests": 61},
        "rejects": {"duplicate": 9, "cut at max_tokens": 2},
        "usage": {"prompt_tokens": 1000, "completion_tokens": 234},
        "cost": {"usd": 0.0123},
        "similarity": {"highest_train_test": 0.6996},
        "versions": {"tunewright": "0.1.0"},
        "hashes": {"riddles.json": "ab" * 32, "riddles_eval.json": "cd" * 32},
        **changed,
    }


def head(text: str) -> dict[str, Any]:
    """The front matter, as the Hub reads it."""
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert found
    return dict(yaml.safe_load(found[1]))


def test_head() -> None:
    assert head(card(manifest(), ROWS)) == {
        "pretty_name": "riddles",
        "language": ["en"],
        "size_categories": ["n<1K"],
        "task_categories": ["text-generation"],
        "tags": ["synthetic", "tunewright"],
        "configs": [
            {
                "config_name": "default",
                "data_files": [
                    {"split": "train", "path": "riddles.json"},
                    {"split": "test", "path": "riddles_eval.json"},
                ],
            }
        ],
    }


def test_body_tells_where_it_comes_from() -> None:
    text = card(manifest(), ROWS)
    for told in (
        "Answer a riddle.",
        "You answer riddles.",
        "| model | `gpt-4.1` |",
        "| date | `2026-11-21` |",
        "| temperature | `0.4` |",
        "| requests | `61` |",
        "| rejected: cut at max\\_tokens | `2` |",
        "| tokens | `1234` |",
        "| cost in US dollars | `0.0123` |",
        "nobody has checked them",
        "is 0.699.",
        "cd" * 32,
        "What has keys but cannot open locks? 0",
        "tunewright train data=registry data.dir=data 'data.names=[riddles]' 'data.eval_names=[riddles_eval]'",
    ):
        assert told in text


def test_addresses_and_folders_stay_private() -> None:
    text = card(manifest(), ROWS)
    assert "inner.example" not in text
    assert "/home/me" not in text


@pytest.mark.parametrize(
    ("rows", "size"),
    [(0, "n<1K"), (999, "n<1K"), (1_000, "1K<n<10K"), (99_999, "10K<n<100K"), (999_999, "100K<n<1M"), (10**6, "n>1M")],
)
def test_size_counts_both_parts(rows: int, size: str) -> None:
    counts = {"train": rows - rows // 10, "eval": rows // 10}
    assert head(card(manifest(counts=counts), ROWS))["size_categories"] == [size]


def test_language_is_given_or_guessed() -> None:
    chinese = [{"instruction": "什么东西越洗越脏？请解释你的答案。", "output": "水，因为洗东西的时候水会变脏。"}] * 2
    assert head(card(manifest(), chinese))["language"] == ["zh"]
    assert head(card(manifest(), [*chinese, *ROWS]))["language"] == ["en"]
    assert head(card(manifest(settings={"language": "German"}), ROWS))["language"] == ["de"]
    assert head(card(manifest(settings={"language": "the language of the user"}), ROWS))["language"] == ["en"]
    assert "language" not in head(card(manifest(), []))
    assert (language_code("pt-BR"), language_code("ZH"), language_code("")) == ("pt", "zh", "")


def test_without_held_out_rows() -> None:
    text = card(manifest(counts={"train": 3, "eval": 0}, hashes={}), ROWS)
    assert [file["split"] for file in head(text)["configs"][0]["data_files"]] == ["train"]
    assert "No rows are held out." in text
    assert "riddles_eval" not in text


def test_registry_entry_fits_the_columns() -> None:
    rows = [{**ROWS[0], "history": [["a", "b"]], "system": "s"}]
    entries = json.loads(re.findall(r"```json\n(.*?)\n```", card(manifest(), rows), re.DOTALL)[-1])
    assert entries["riddles_eval"] == {
        "file_name": "riddles_eval.json",
        "columns": {
            "prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history",
        },
    }  # fmt: skip
    given = {"riddles": {"file_name": "riddles.jsonl", "formatting": "sharegpt"}}
    entries = json.loads(re.findall(r"```json\n(.*?)\n```", card(manifest(entries=given), ROWS), re.DOTALL)[-1])
    assert entries == given


def test_registry_entry_is_read_by_the_registry(tmp_path: Any) -> None:
    from tunewright.registry import read_registry

    text = re.findall(r"```json\n(.*?)\n```", card(manifest(), ROWS), re.DOTALL)[-1]
    (tmp_path / "dataset_info.json").write_text(text)
    assert set(read_registry(tmp_path / "dataset_info.json")) == {"riddles", "riddles_eval"}


def test_text_cannot_break_out_of_its_place() -> None:
    evil = "a\n```\n---\n# heading | <b> `code` [link](x)"
    rows = [{"instruction": evil, "input": "", "output": "\ud800 half a pair"}]
    text = card(manifest(name=evil, rejects={evil: 1}, settings={"task": evil, "model": evil}), rows)
    assert head(text)["pretty_name"] == evil
    text.encode()
    # What is left outside of code holds nothing that Markdown or HTML would obey.
    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    outside = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", body, flags=re.DOTALL | re.MULTILINE)
    outside = re.sub(r"(?<!`)(`+) .*? \1(?!`)", "", outside)
    assert not re.search(r"^---|^# heading|^```$|(?<!\\)<b", outside, re.MULTILINE)


def test_of_nothing() -> None:
    text = card({}, [])
    assert head(text)["size_categories"] == ["n<1K"]
    assert "nobody has checked them" in text
    assert "None" not in text
