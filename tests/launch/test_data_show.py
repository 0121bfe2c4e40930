"""`tunewright data show` prints what the model sees: every token, and which of them are learnt."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tunewright.errors import DataError, StorageError
from tunewright.launch.data.check import Tokens, compose, make_tokens
from tunewright.launch.data.show import dump, pieces, row_lines, run
from tunewright.trainer.data.render import IGNORED

ROWS = [
    {"instruction": "Say seven.", "input": "", "output": "Seven it is."},
    {"instruction": "问候", "input": "", "output": "𰻝麵 龘 🦜 好"},
    {"instruction": "lonely question", "input": "", "output": ""},
    {"instruction": "Tell me.", "input": "", "output": "one two three four five " * 30},
    {"instruction": "obey \x1b[31m me", "input": "", "output": "two\nlines\u200b"},
]


@pytest.fixture(scope="module")
def tokens(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    file = tmp_path_factory.mktemp("show") / "rows.json"
    file.write_text(json.dumps(ROWS, ensure_ascii=False), encoding="utf-8")
    return make_tokens(compose([str(file)], ["data.cutoff_len=64", "data.max_dropped=1"], None))


def shown(tokens: Tokens, row: int, *, ids: bool = False, colour: bool = False) -> list[str]:
    return row_lines(tokens.cache.train[0], tokens.tokenizer, row, ids=ids, colour=colour)


def example(tokens: Tokens, row: int) -> dict[str, Any]:
    return next(one for one in tokens.cache.train[0].examples() if one["row"] == row)


def test_the_marks_are_around_the_trained_tokens_alone(tokens: Tokens) -> None:
    lines = shown(tokens, 0)
    one = example(tokens, 0)
    masked = [number for number, label in zip(one["input_ids"], one["labels"], strict=True) if label == IGNORED]
    trained = [label for label in one["labels"] if label != IGNORED]
    assert lines[0].endswith(
        f"rows.json row 0: {len(masked) + len(trained)} tokens, {len(trained)} trained, not truncated"
    )
    before, after = ("|".join(tokens.tokenizer.decode([number]) for number in part) for part in (masked, trained))
    assert "".join(lines[2:]) == f"{before}[[{after}]]".replace("\n", "↵")
    assert before.startswith("<|im_start|>|user|\n|")
    assert after.endswith("|<|im_end|>|\n")


def test_colours_change_with_what_is_trained_and_from_token_to_token(tokens: Tokens) -> None:
    text = "\n".join(shown(tokens, 0, colour=True)[2:])
    parts = re.findall(r"\x1b\[(\d+)m(.*?)\x1b\[0m", text, re.DOTALL)
    one = example(tokens, 0)
    assert len(parts) == len(one["input_ids"])
    assert [shade in ("32", "92") for shade, _ in parts] == [label != IGNORED for label in one["labels"]]
    assert all(before[0] != after[0] for before, after in pairwise(parts))
    assert "".join(text for _, text in parts).replace("↵\n", "\n") == tokens.tokenizer.decode(one["input_ids"])


@pytest.mark.parametrize("row", [0, 1, 3])
def test_the_pieces_together_are_the_decoded_text(tokens: Tokens, row: int) -> None:
    ids = example(tokens, row)["input_ids"]
    made = pieces(tokens.tokenizer, ids)
    assert len(made) == len(ids)
    assert "".join(piece.text for piece in made) == tokens.tokenizer.decode(ids)


def test_a_character_of_several_tokens_is_whole_and_counted(tokens: Tokens) -> None:
    made = pieces(tokens.tokenizer, example(tokens, 1)["input_ids"])
    split = [piece for piece in made if piece.parts > 1]
    assert split, "the tokenizer has a token for each of these characters: choose others"
    assert not any("\N{REPLACEMENT CHARACTER}" in piece.text for piece in made)
    assert any(line.endswith("part 2 of 2") or " part 2 of " in line for line in shown(tokens, 1, ids=True))


def test_half_a_character_at_the_end_of_a_cut_answer_does_not_swallow_the_end_token(tokens: Tokens) -> None:
    tokenizer = tokens.tokenizer
    half = tokenizer("龘", add_special_tokens=False)["input_ids"][:1]
    made = pieces(tokenizer, [*half, tokenizer.eos_token_id, *half])
    assert [piece.text for piece in made] == ["\N{REPLACEMENT CHARACTER}", "<|im_end|>", "\N{REPLACEMENT CHARACTER}"]


def test_ids_are_the_ids_and_labels_of_the_cache(tokens: Tokens) -> None:
    one = example(tokens, 0)
    table = [line.split(maxsplit=3) for line in shown(tokens, 0, ids=True)[2:]]
    assert [int(line[0]) for line in table] == list(range(len(one["input_ids"])))
    assert [int(line[1]) for line in table] == one["input_ids"]
    assert [int(line[2]) for line in table] == one["labels"]
    assert table[0][3] == "'<|im_start|>'"


def test_a_cut_row_says_so(tokens: Tokens) -> None:
    assert re.search(r"row 3: 64 tokens, \d+ trained, truncated$", shown(tokens, 3)[0])


def test_a_dropped_row_shows_the_reason_and_itself(tokens: Tokens) -> None:
    first, second = shown(tokens, 2)
    assert first.endswith("row 2: dropped, `output` is empty")
    assert json.loads(second) == ROWS[2]


@pytest.mark.parametrize("row", [-1, 5])
def test_a_row_that_is_not_there_is_told_with_the_range(tokens: Tokens, row: int) -> None:
    with pytest.raises(DataError, match=rf"has no row {row}: rows go from 0 to 4\."):
        shown(tokens, row)


def test_what_a_terminal_would_obey_or_hide_is_visible(tokens: Tokens) -> None:
    text = "\n".join(shown(tokens, 4))
    assert "\x1b" not in text
    assert "\\x1b" in text
    assert "\\u200b" in text
    assert "wo|↵|\nlin" in text


def test_the_dump_is_the_cache(tokens: Tokens, tmp_path: Path) -> None:
    file = tmp_path / "dump.jsonl"
    file.write_text("older")
    assert dump(tokens.cache.train[0], file) == 4
    assert [json.loads(line) for line in file.read_text().splitlines()] == list(tokens.cache.train[0].examples())
    assert [path.name for path in tmp_path.iterdir()] == ["dump.jsonl"]
    with pytest.raises(StorageError, match="Cannot write"):
        dump(tokens.cache.train[0], tmp_path / "missing" / "dump.jsonl")


def test_the_command_shows_a_row_of_a_file(
    tunewright: Callable[..., subprocess.CompletedProcess[str]], tokens: Tokens
) -> None:
    name = tokens.cache.train[0].name
    done = tunewright("data", "show", name, "--row", "3", "data.cutoff_len=64", "data.max_dropped=0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == shown(tokens, 3)


def test_a_dump_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("mine")
    args = argparse.Namespace(
        name="demo", overrides=[], config_dir=None, dir=None, row=None, ids=False, dump=tmp_path / "rows.json"
    )
    with pytest.raises(StorageError, match=r"rows\.json is there already"):
        run(args)
    assert (tmp_path / "rows.json").read_text() == "mine"
