"""A stream trains on the same rows for any number of ranks, and begins again in another order when it ends."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from accelerate.data_loader import skip_first_batches
from torch.utils.data import DataLoader

from tunewright.config.compose import compose_config
from tunewright.errors import DataError
from tunewright.plan.batch_plan import BatchPlan
from tunewright.trainer.data.build_cache import open_rows
from tunewright.trainer.data.render import Renderer
from tunewright.trainer.data.stream import StreamedMicroBatches, TokenStream


def rows(word: str, count: int) -> str:
    lines = [{"instruction": f"{word} {number}", "output": f"{word}{number}"} for number in range(count)]
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.fixture
def stream(tmp_path: Path, tiny_tokenizer: Any) -> Callable[..., TokenStream]:
    (tmp_path / "a.jsonl").write_text(rows("a", 40) + '{"instruction": "no answer", "output": ""}\n')
    (tmp_path / "b.jsonl").write_text(rows("b", 10))

    def make(*overrides: str, names: str = "a.jsonl", seed: int = 1) -> TokenStream:
        paths = ",".join(str(tmp_path / name) for name in names.split(","))
        config = compose_config(["data=registry", f"data.names=[{paths}]", "data.streaming=true", *overrides])
        return TokenStream(open_rows(config)[0], config.data, Renderer.of(config, tiny_tokenizer), seed)

    return make


def answers(tokenizer: Any, examples: Any) -> list[str]:
    decoded = (tokenizer.decode(example["labels"][example["labels"] >= 0]) for example in examples)
    return [text.removesuffix("<|im_end|>\n") for text in decoded]


def test_ranks_share_the_global_batch_of_one_process(stream: Any, tiny_tokenizer: Any) -> None:
    def batches(world_size: int, accumulation: int) -> list[list[str]]:
        plan = BatchPlan(8, world_size, 8 // world_size // accumulation, accumulation)
        ranks = [iter(StreamedMicroBatches(stream(), plan, rank)) for rank in range(world_size)]
        steps = []
        for _ in range(4):
            parts = [list(islice(rank, accumulation)) for rank in ranks]
            steps.append(sorted(text for part in parts for micro in part for text in answers(tiny_tokenizer, micro)))
        return steps

    one = batches(1, 1)
    assert all(len(step) == 8 for step in one)
    assert batches(2, 1) == one
    assert batches(2, 2) == one


def test_every_usable_row_comes_once_in_an_order_of_the_epoch(stream: Any, tiny_tokenizer: Any) -> None:
    first = stream()
    order = answers(tiny_tokenizer, first)
    assert sorted(order) == sorted(f"a{number}" for number in range(40))
    assert order != [f"a{number}" for number in range(40)]
    assert answers(tiny_tokenizer, first) == order
    first.set_epoch(1)
    again = answers(tiny_tokenizer, first)
    assert again != order
    assert sorted(again) == sorted(order)


def test_datasets_are_interleaved_by_their_weights(stream: Any, tiny_tokenizer: Any) -> None:
    options = ("data.mix=interleave_under", "data.weights=[3,1]", "data.shuffle_buffer=1")
    mixed = answers(tiny_tokenizer, stream(*options, names="a.jsonl,b.jsonl"))
    counts = Counter(text[0] for text in mixed)
    assert counts["a"] > counts["b"] > 0
    whole = answers(tiny_tokenizer, stream("data.mix=interleave_once", names="a.jsonl,b.jsonl"))
    assert Counter(text[0] for text in whole) == {"a": 40, "b": 10}


def test_rows_after_the_sample_are_counted_too(stream: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(rows("a", 1000) + '{"instruction": "no answer", "output": ""}\n' * 500)
    with pytest.raises(DataError, match=r"more than data\.max_dropped = 10%\. The last one: `output` is empty"):
        list(stream("data.shuffle_buffer=1"))


def test_training_goes_on_past_the_end_of_a_stream(train_here: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(rows("a", 20))
    overrides = ["data=registry", f"data.names=[{tmp_path}/a.jsonl]", "data.streaming=true", "train.max_steps=4"]
    run = train_here("stream", *overrides, "train.global_batch_size=8", "train.logging_steps=1")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["data"]["datasets"][f"{tmp_path}/a.jsonl"]["read"] == 20


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.streaming=true"], "set train.max_steps"),
        (["data.streaming=true", "train.max_steps=1", "data.eval_size=3", "data.eval_names=[]"], "data.eval_names or"),
        (["data.streaming=true", "train.max_steps=1", "data.max_samples=3"], "`data.max_samples` counts rows"),
        (["data.streaming=true", "train.max_steps=1", "data.names=[demo,demo]"], "choose interleave_under"),
        (["data.train_on_prompt=true", "data.mask_history=true"], "Set one of them to false"),
        (["data.eval_size=3"], "`data.eval_names` and `data.eval_size` each say what is held out"),
        (["data.weights=[1,2]"], "one positive number for each of the 1 datasets"),
        (["data.max_dropped=2"], "a number from 0 to 1"),
        (["model.template=chatmll"], "Did you mean 'chatml'"),
        (["model.template_kwargs=3"], "write a mapping"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides: list[str], said: str) -> None:
    from tunewright.errors import ConfigError
    from tunewright.plan.devices import find_devices
    from tunewright.plan.rules import check

    with pytest.raises(ConfigError, match=said):
        check(compose_config(overrides), find_devices())


def test_a_run_goes_on_at_the_row_where_it_was_with_a_worker_too(stream: Any, tiny_tokenizer: Any) -> None:
    """On a GPU a process of its own renders. The stream of 50 rows is at its end after 13 steps of 4."""
    plan = BatchPlan(4, 1, 2, 2)

    def batches(workers: int, skipped: int = 0) -> list[list[str]]:
        made = StreamedMicroBatches(stream("data.mix=interleave_once", names="a.jsonl,b.jsonl"), plan, 0)
        loader = DataLoader(made, batch_size=None, num_workers=workers, collate_fn=list)
        loader = skip_first_batches(loader, skipped) if skipped else loader
        return [answers(tiny_tokenizer, micro) for micro in islice(loader, 60 - skipped)]

    whole = batches(1)
    for skipped in (3, 27, 52):
        assert batches(1, skipped) == whole[skipped:]
