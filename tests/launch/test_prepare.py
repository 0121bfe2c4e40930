"""What only tokenizer and rows tell is told before ranks start: tokens without an embedding, evaluations of no rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tunewright.config.compose import compose_config
from tunewright.deliver.evaluate import held_out
from tunewright.errors import ConfigError, DataError, StorageError
from tunewright.trainer.data.sampling import held_out_rows
from tunewright.trainer.model.tokenizer import load_tokenizer
from tunewright.trainer.prepared import check_vocabulary, find_prepared, prepare


@pytest.fixture(scope="module")
def larger(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model, its tokenizer with a token more than the embedding has rows."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("larger") / "model"
    shutil.copytree(small_model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<extra>"])
    assert tokenizer.convert_tokens_to_ids("<extra>") == 4096
    tokenizer.save_pretrained(folder)
    return folder


def write(folder: Path, answer: str) -> Path:
    file = folder / "rows.json"
    file.write_text(json.dumps([{"instruction": f"question {n}", "output": answer} for n in range(4)]))
    return file


def overrides(model: Path, rows: Path) -> list[str]:
    return ["model=folder", f"model.path={model}", "data=registry", f"data.names=[{rows}]"]


def test_a_token_without_a_row_in_the_embedding_is_refused_before_ranks_start(
    larger: Path, small_model: Path, tmp_path: Path, tunewright: Any
) -> None:
    rows, root = write(tmp_path, "yes <extra>"), f"output_root={tmp_path / 'runs'}"
    for _ in range(2):  # also when the tokens are there already
        done = tunewright("train", *overrides(larger, rows), root, f"data.cache_dir={tmp_path}")
        assert done.returncode == 2, done.stderr
        assert "is larger than its model, which has embeddings for 4,096 tokens: " in done.stderr
        assert "has '<extra>', the id 4096" in done.stderr
        assert not list(tmp_path.glob("runs/*/logs/rank*"))


def test_a_token_that_is_not_used_is_no_harm(larger: Path, tmp_path: Path) -> None:
    config = compose_config([*overrides(larger, write(tmp_path, "yes")), f"data.cache_dir={tmp_path}"])
    prepared = prepare(config, lambda line: None)
    tokenizer = load_tokenizer(larger, config.model)
    check_vocabulary(config, prepared, tokenizer)
    tokenizer.pad_token = "<extra>"
    with pytest.raises(ConfigError, match="padding is '<extra>', the id 4096"):
        check_vocabulary(config, prepared, tokenizer)
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="has no token that ends a text"):
        check_vocabulary(config, prepared, tokenizer)


def test_an_evaluation_of_no_rows_is_refused(small_model: Path, tmp_path: Path) -> None:
    """Where the one row that is held out cannot be used; the second time from what is kept."""
    held = ["data.eval_size=0.01", "train.eval_steps=1", "data.max_dropped=0.5", f"data.cache_dir={tmp_path}"]
    file = write(tmp_path, "yes")
    config = compose_config([*overrides(small_model, file), *held])
    rows = json.loads(file.read_text())
    (mask,) = held_out_rows([len(rows)], config.data, config.train.seed)
    file.write_text(json.dumps([{**row, "output": "" if out else "yes"} for row, out in zip(rows, mask, strict=True)]))
    with pytest.raises(ConfigError, match=r"`train.eval_steps` looks at the eval loss, and `data.eval_size=0.01` of"):
        prepare(config, lambda line: None)
    with pytest.raises(ConfigError, match="hold more rows out"):
        find_prepared(config)
    config.train.eval_steps = None
    assert find_prepared(config) is not None


def test_plain_text_asks_nothing_that_could_be_evaluated(small_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    texts = [{"text": f"The parcel of customer {number} is late."} for number in range(6)]
    file.write_text("".join(json.dumps(row) + "\n" for row in texts))
    held = ["data.eval_size=2", f"data.cache_dir={tmp_path}"]
    config = compose_config([*overrides(small_model, file), *held])
    cache = prepare(config, lambda line: None).cache
    with pytest.raises(DataError, match="plain text without a question"):
        held_out(cache, None)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run `git lfs pull` there"),
        (None, "bytes where its tensors need"),
        (b"\x05\x00\x00\x00\x00\x00\x00\x00{}   not", "is damaged|bytes where"),
        (b"", "is damaged"),
    ],
)
def test_damaged_weights_are_told_before_anything_starts(
    content: bytes | None, said: str, small_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(small_model, folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)
    with pytest.raises(StorageError, match=said):
        find_prepared(compose_config(overrides(folder, write(tmp_path, "yes"))))
    find_prepared(compose_config(overrides(small_model, write(tmp_path, "yes"))))
