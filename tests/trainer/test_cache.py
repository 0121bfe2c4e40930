"""The token cache: right ids, kept by a key of everything that matters, split the same way under a seed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.compose import compose_config
from launch.errors import DataError
from trainer.data.cache import build_cache, cache_key, open_cache, split_rows
from trainer.data.render import IGNORED, render

ROWS = [{"instruction": f"Say {number}.", "input": "", "output": f"{number} it is"} for number in range(40)]


def data_in(folder: Path, *overrides: str, rows: list[dict[str, Any]] | None = None) -> Any:
    (folder / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "rows.json"}}))
    (folder / "rows.json").write_text(json.dumps(ROWS if rows is None else rows))
    base = ["data=registry", "data.names=[mine]", f"data.dir={folder}", f"data.cache_dir={folder / 'cache'}"]
    return compose_config([*base, *overrides]).data


def test_labels_are_the_answers_tokens_and_nothing_else(tiny_tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "你是客服。"},
        {"role": "user", "content": "Where is my parcel?"},
        {"role": "assistant", "content": "On its way."},
        {"role": "user", "content": "谢谢"},
        {"role": "assistant", "content": "不客气"},
    ]
    example = render(messages, tiny_tokenizer)
    assert example.input_ids == tiny_tokenizer.apply_chat_template(messages, return_dict=False)
    learnt = tiny_tokenizer.decode([label for label in example.labels if label != IGNORED])
    assert learnt == "On its way.<|im_end|>\n不客气<|im_end|>\n"


def test_the_end_of_turn_token_is_learnt(tiny_tokenizer: Any) -> None:
    example = render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], tiny_tokenizer)
    assert tiny_tokenizer.eos_token_id in example.labels


def test_a_cached_row_is_the_rendered_row(tmp_path: Path, tiny_tokenizer: Any) -> None:
    data = data_in(tmp_path)
    cache = build_cache(data, 42, "key", tiny_tokenizer)
    messages = [{"role": "user", "content": "Say 7."}, {"role": "assistant", "content": "7 it is"}]
    example = render(messages, tiny_tokenizer)
    row = cache.open("train")[7]
    assert (row["input_ids"], row["labels"]) == (example.input_ids, example.labels)
    assert cache.open("eval") is None


def test_dropped_rows_are_counted_by_reason_with_their_numbers(tmp_path: Path, tiny_tokenizer: Any) -> None:
    rows = [*ROWS, {"instruction": "x", "output": ""}, {"instruction": "long " * 200, "output": "y"}]
    report = build_cache(data_in(tmp_path, "data.cutoff_len=64", rows=rows), 42, "key", tiny_tokenizer).reports["train"]
    assert (report.read, report.kept) == (42, 40)
    assert report.dropped == {"`output` is empty": ["mine:40"], "longer than data.cutoff_len = 64 tokens": ["mine:41"]}


def test_nothing_left_to_train_on_is_an_error_with_the_reasons(tmp_path: Path, tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"40 rows: longer than data\.cutoff_len = 8"):
        build_cache(data_in(tmp_path, "data.cutoff_len=8"), 42, "key", tiny_tokenizer)
    assert not list((tmp_path / "cache" / "tokens").glob("key/*"))


def test_a_split_is_the_same_under_a_seed_and_holds_each_row_once(tmp_path: Path) -> None:
    data = data_in(tmp_path, "data.eval_size=0.25")

    def numbers(seed: int) -> tuple[list[int], list[int]]:
        splits = split_rows(data, seed)
        return [number for _, number, _ in splits["train"]], [number for _, number, _ in splits["eval"]]

    assert numbers(1) == numbers(1)
    assert numbers(1) != numbers(2)
    train, held_out = numbers(1)
    assert len(held_out) == 10
    assert sorted(train + held_out) == list(range(40))


def test_the_key_changes_with_each_input_that_matters_and_no_other(tmp_path: Path, tiny_model: Path) -> None:
    def key(*overrides: str, seed: int = 42) -> str:
        return cache_key(data_in(tmp_path, *overrides), seed, tiny_model)

    original = key()
    assert key() == original
    assert key(f"data.cache_dir={tmp_path}") == original
    changed = [key("data.cutoff_len=512"), key("data.eval_size=4"), key("data.max_samples=3"), key(seed=1)]
    data = data_in(tmp_path)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS[:-1]))
    changed.append(cache_key(data, 42, tiny_model))
    assert len({original, *changed}) == 6


def test_two_processes_at_once_make_one_cache(tmp_path: Path, tiny_model: Path) -> None:
    data_in(tmp_path)
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from transformers import AutoTokenizer\n"
        "from launch.compose import compose_config\n"
        "from trainer.data.cache import build_cache\n"
        "root, model = sys.argv[1:]\n"
        "where = [f'data.dir={root}', f'data.cache_dir={root}/c']\n"
        "data = compose_config(['data=registry', 'data.names=[mine]', *where]).data\n"
        "print(len(build_cache(data, 42, 'key', AutoTokenizer.from_pretrained(model)).open('train')))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(tiny_model)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=120)[0].strip() for process in started] == ["40", "40"]
    assert [path.name for path in (tmp_path / "c" / "tokens").iterdir() if path.is_dir()] == ["key"]
    assert open_cache(data_in(tmp_path, f"data.cache_dir={tmp_path}/c"), "key") is not None
