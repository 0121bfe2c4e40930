"""The token cache: the renderer's ids, made once under a key of all that matters, and refused when it is bad."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import DictConfig

from tunewright.config.compose import compose_config
from tunewright.errors import DataError
from tunewright.launch.prepare import ensure_prepared
from tunewright.trainer.data.build_cache import build_cache, find_cache, open_rows
from tunewright.trainer.data.cache_key import cache_key
from tunewright.trainer.data.formats import to_conversation
from tunewright.trainer.data.process_pool import started_workers
from tunewright.trainer.data.render import IGNORED, Renderer
from tunewright.trainer.data.sampling import held_out_rows
from tunewright.trainer.data.token_cache import TokenCache, as_json, describe
from tunewright.trainer.data.tokenization import tokenize, warm_up
from tunewright.trainer.model.tokenizer import load_tokenizer

ROWS = [{"instruction": f"Say {number}.", "input": "", "output": f"{number} it is"} for number in range(40)]


def configured(folder: Path, *overrides: str, rows: list[dict[str, Any]] | None = None) -> DictConfig:
    if rows is not None or not (folder / "rows.json").exists():
        (folder / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "rows.json"}}))
        (folder / "rows.json").write_text(json.dumps(ROWS if rows is None else rows))
    return compose_config(["data=registry", "data.names=[mine]", f"data.dir={folder}", *overrides])


@pytest.fixture
def build(tmp_path: Path, tiny_model: Path) -> Any:
    """Build the cache of some rows under overrides."""

    def made(*overrides: str, rows: list[dict[str, Any]] | None = None) -> TokenCache:
        config = configured(tmp_path, *overrides, rows=rows)
        config.data.cache_dir = str(tmp_path / "cache")
        return build_cache(config, tiny_model, _renderer(config, tiny_model))

    return made


def _renderer(config: DictConfig, tiny_model: Path) -> Renderer:
    return Renderer.of(config, load_tokenizer(tiny_model, config.model))


def test_a_cached_row_is_the_rendered_row(build: Any, tiny_model: Path) -> None:
    cache = build()
    renderer = _renderer(compose_config(), tiny_model)
    (examples,) = renderer.render([to_conversation(ROWS[7], cache.train[0].rows.entry)])
    row = cache.open("train")[7]
    assert row["input_ids"] == examples[0].input_ids.tolist()
    assert row["labels"] == examples[0].labels.tolist()
    assert cache.open("eval") is None


def test_the_scored_tokens_of_a_row_are_its_labels_but_for_the_first(build: Any) -> None:
    """As the rows' table has them, and counted anew, as where a row has several examples."""
    cache = build("data.train_on_prompt=true", "data.eval_size=0.2")
    for split in ("train", "eval"):
        labels = cache.open(split)["labels"]
        expected = [sum(label != IGNORED for label in row[1:]) for row in labels]
        assert cache.scored(split).tolist() == expected
    counted = cache.train[0].scored()
    cache.train[0].__dict__["part"] = replace(cache.train[0].part, rows=np.zeros(len(counted), np.int64))
    assert cache.train[0].scored().tolist() == counted.tolist()


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_several_workers_write_what_one_writes(
    tmp_path: Path, tiny_model: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{**row, "output": row["output"] * (number % 7)} for number, row in enumerate(ROWS * 60)]
    configured(tmp_path, rows=rows)

    def made(folder: str, workers: int, processes: Any = None) -> TokenCache:
        config = configured(tmp_path, "data.max_dropped=1", "data.cutoff_len=40", f"data.workers={workers}")
        config.data.cache_dir = str(tmp_path / folder)
        return build_cache(config, tiny_model, _renderer(config, tiny_model), processes=processes)

    one = made("one", 1)
    if kind == "threads":
        several = made("several", 3)
    else:
        monkeypatch.setattr("tunewright.trainer.data.build_cache.PROCESSES_FROM", 1000)
        with started_workers(2, warm_up) as pool:
            several = made("several", 2, pool)
    assert several.open("train")[:] == one.open("train")[:]
    assert several.train[0].outcome == one.train[0].outcome
    assert several.train[0].table() == one.train[0].table()
    assert one.train[0].outcome.read == 2400


def test_a_tokenizer_that_cannot_be_sent_is_used_in_threads(tmp_path: Path, tiny_model: Path) -> None:
    config = configured(tmp_path, rows=ROWS * 30)
    renderer = _renderer(config, tiny_model)
    renderer.tokenizer.from_elsewhere = lambda text: text  # has no name that another process could import
    rows = replace(open_rows(config)[0][0], expected=None)
    with started_workers(2, warm_up) as pool:
        outcome = tokenize(rows, renderer, tmp_path / "tokens", threads=2, processes=pool)
    assert outcome.kept == 1200


def test_an_error_in_a_process_is_told_as_it_is(tmp_path: Path, tiny_model: Path) -> None:
    config = configured(tmp_path, rows=ROWS * 30)
    renderer = _renderer(config, tiny_model)
    renderer.tokenizer.chat_template = None
    with started_workers(2, warm_up) as pool, pytest.raises(DataError, match="has no chat template"):
        tokenize(open_rows(config)[0][0], renderer, tmp_path / "tokens", threads=2, processes=pool)


def test_dropped_rows_are_counted_by_reason_with_number_and_excerpt(build: Any) -> None:
    rows = [*ROWS, {"instruction": "x", "output": ""}, {"instruction": "long " * 200, "output": "y"}]
    cache = build("data.cutoff_len=64", rows=rows)
    text = "\n".join(describe(cache))
    assert "mine: 40 of 42 rows" in text
    assert "dropped 1: `output` is empty (row 40)" in text
    assert "dropped 1: the question leaves no room for an answer in data.cutoff_len = 64 (row 41)" in text
    assert '{"instruction": "x", "output": ""}' in text


def test_cut_rows_are_counted_and_still_learnt(build: Any) -> None:
    cache = build("data.cutoff_len=64", rows=[*ROWS, {"instruction": "x", "output": "long " * 200}])
    assert cache.train[0].outcome.truncated == 1
    last = cache.open("train")[40]
    assert len(last["input_ids"]) == 64
    assert any(label != IGNORED for label in last["labels"])


def test_nothing_left_to_train_on_is_an_error_with_the_reasons(build: Any) -> None:
    with pytest.raises(DataError, match=r"No row of mine can be trained on. 40 x the question leaves no room"):
        build("data.cutoff_len=16")


def test_too_many_unusable_rows_are_an_error_that_shows_them(build: Any) -> None:
    rows = [*ROWS[:8], {"instruction": "a", "output": ""}, {"instruction": "b", "output": ""}]
    with pytest.raises(
        DataError, match=r"2 of 10 rows of mine cannot be used, more than data.max_dropped = 10%"
    ) as caught:
        build(rows=rows)
    assert "`output` is empty (rows 8, 9)" in str(caught.value)
    assert build("data.max_dropped=0.2").train[0].outcome.kept == 8


def test_a_column_that_an_entry_names_and_no_row_has_is_an_error(tmp_path: Path, build: Any) -> None:
    configured(tmp_path)
    entry = {"file_name": "rows.json", "columns": {"system": "persona"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": entry}))
    with pytest.raises(DataError, match="no column 'persona', which it uses as `system`"):
        build()
    assert not list((tmp_path / "cache" / "tokens").glob("*.part"))


def test_a_held_out_dataset_is_not_trained_on(tmp_path: Path, build: Any) -> None:
    configured(tmp_path)
    (tmp_path / "other.jsonl").write_text(json.dumps({"instruction": "Say more.", "output": "more"}) + "\n")
    cache = build(f"data.eval_names=[{tmp_path}/other.jsonl]")
    assert len(cache.open("train")) == 40
    assert len(cache.open("eval")) == 1
    assert as_json(cache)["eval"]["examples"] == 1


def test_a_named_split_is_held_out(tmp_path: Path, build: Any) -> None:
    folder = tmp_path / "both"
    folder.mkdir()
    for name, rows in (("train.jsonl", ROWS[:30]), ("validation.jsonl", ROWS[30:])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    cache = build(f"data.names=[{folder}]", "data.eval_split=validation")
    assert [len(cache.open(split)) for split in ("train", "eval")] == [30, 10]


def test_counts_are_those_of_the_rows_that_are_chosen(build: Any) -> None:
    cache = build("data.eval_size=0.25", "data.max_samples=7")
    for split, size in (("train", 7), ("eval", 10)):
        opened = cache.open(split)
        tokens = sum(len(row["input_ids"]) for row in opened)
        scored = sum(label != IGNORED for row in opened for label in row["labels"][1:])
        assert cache.counts(split) == (size, tokens, scored)


KEYS = {
    "data.cutoff_len=512": True,
    "data.overlong=drop": True,
    "data.train_on_prompt=true": True,
    "data.mask_history=true": True,
    "data.special_tokens_in_answers=true": True,
    "model.template=chatml": True,
    "model.template_kwargs={enable_thinking: false}": True,
    # Where things are kept, who makes them, and which rows are chosen of them decide no token.
    "data.cache_dir=elsewhere": False,
    "data.workers=7": False,
    "data.max_dropped=0.5": False,
    "data.eval_size=4": False,
    "data.max_samples=3": False,
    "data.mix=interleave_over": False,
    "data.weights=[2]": False,
    "train.seed=1": False,
    "train.learning_rate=1": False,
    "method=full": False,
}


@pytest.mark.parametrize(("override", "matters"), KEYS.items())
def test_the_key_changes_with_each_setting_that_matters_and_no_other(
    tmp_path: Path, tiny_model: Path, override: str, matters: bool
) -> None:
    def key(*overrides: str) -> str:
        config = configured(tmp_path, *overrides)
        return cache_key(open_rows(config)[0][0], config, tiny_model)

    assert key() == key()
    assert (key(override) != key()) == matters


def test_the_key_changes_with_rows_columns_and_tokenizer(tmp_path: Path, tiny_model: Path) -> None:
    config = configured(tmp_path)

    def key(model: Path = tiny_model) -> str:
        return cache_key(open_rows(config)[0][0], config, model)

    keys = [key()]
    (tmp_path / "rows.json").write_text(json.dumps(ROWS[:-1]))
    keys.append(key())
    entry = {"file_name": "rows.json", "columns": {"query": None}}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": entry}))
    keys.append(key())
    model = tmp_path / "model"
    model.mkdir()
    for file in (*tiny_model.glob("*token*"), *tiny_model.glob("*template*")):
        (model / file.name).write_bytes(file.read_bytes())
    assert key(model) == key()
    (tmp_path / "rows.json").rename(tmp_path / "renamed.json")
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": {**entry, "file_name": "renamed.json"}}))
    assert key() == keys[-1]
    (tmp_path / "renamed.json").rename(tmp_path / "rows.json")
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": entry}))
    (model / "tokenizer.json").write_bytes(b"{}")
    keys.append(key(model))
    assert len(set(keys)) == 4
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": entry, "another": {"file_name": "b.json"}}))
    assert key() == keys[2]


def test_a_split_and_a_seed_of_its_own_change_the_runs_fingerprint(build: Any) -> None:
    prints = [build(*overrides).fingerprint for overrides in ((), ("data.eval_size=4",), ("train.seed=7",), ())]
    assert len(set(prints)) == 3
    assert prints[0] == prints[3]


def test_two_processes_at_once_make_one_cache(tmp_path: Path, tiny_model: Path) -> None:
    configured(tmp_path)
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tunewright.config.compose import compose_config\n"
        "from tunewright.trainer.data.build_cache import build_cache\n"
        "from tunewright.trainer.data.render import Renderer\n"
        "from tunewright.trainer.model.tokenizer import load_tokenizer\n"
        "root, model = sys.argv[1:]\n"
        "where = [f'data.dir={root}', f'data.cache_dir={root}/c']\n"
        "config = compose_config(['data=registry', 'data.names=[mine]', *where])\n"
        "renderer = Renderer.of(config, load_tokenizer(Path(model), config.model))\n"
        "print(len(build_cache(config, Path(model), renderer).open('train')))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(tiny_model)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=120)[0].strip() for process in started] == ["40", "40"]
    assert len([path for path in (tmp_path / "c" / "tokens").iterdir() if path.is_dir()]) == 1
    assert find_cache(configured(tmp_path, f"data.cache_dir={tmp_path}/c"), tiny_model) is not None


def test_what_is_broken_leaves_nothing_behind(tmp_path: Path, build: Any) -> None:
    configured(tmp_path)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS * 50)[:-1] + ', {"instruction": }]')
    with pytest.raises(DataError, match=r"rows\.json:1:[0-9]+: not JSON"):
        build()
    assert [path for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir()] == []


def test_a_second_start_repeats_what_the_first_remarked(
    tmp_path: Path, tiny_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = configured(tmp_path, "model=folder", f"model.path={tiny_model}", rows=[*ROWS, ROWS[0]])
    config.data.cache_dir = str(tmp_path / "cache")
    remark = "mine: 1 of 41 rows (2%) copied from an earlier row"
    ensure_prepared(config)
    first = capfd.readouterr().out
    assert remark in first
    assert "optimiser steps" in first
    ensure_prepared(config)
    second = capfd.readouterr().out
    assert f"{remark} (row 40 = 0)" in second
    assert "mine: 41 of 41 rows" in second


def test_nothing_to_train_on_is_refused_whatever_left_nothing(tmp_path: Path, build: Any) -> None:
    rows = [ROWS[0], {"instruction": "a", "output": ""}]
    configured(tmp_path, rows=rows)
    held = {
        seed: held_out_rows([2], compose_config(["data.eval_names=[]", "data.eval_size=1"]).data, seed)
        for seed in range(9)
    }
    seed = next(seed for seed, (mask,) in held.items() if mask[0])  # the one usable row is held out
    with pytest.raises(DataError, match="Nothing of mine is left to train on"):
        build("data.eval_size=1", "data.max_dropped=1", f"train.seed={seed}")
