"""Packs hold every row once and are full, steps are of like size, and neither changes what a row teaches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import losses, manifest, read_metrics
from tunewright.config.compose import compose_config
from tunewright.config.schema import TrainConfig
from tunewright.errors import ConfigError
from tunewright.plan.batch_plan import BatchPlan, batch_plan
from tunewright.plan.devices import find_devices
from tunewright.plan.rules import check
from tunewright.trainer.data.batches import MicroBatches
from tunewright.trainer.data.packing import cut, pack

CAPACITY = 64


def many_lengths() -> list[np.ndarray]:
    """Draws of all kinds: none, one, equal rows, rows as long as a pack, a long tail."""
    chooser = np.random.default_rng(0)
    drawn = [chooser.integers(1, high + 1, size) for high in (2, 20, 40, CAPACITY) for size in (0, 1, 5, 60, 300)]
    tail = np.minimum(chooser.lognormal(2.5, 1, 500).astype(int) + 1, CAPACITY)
    return [*drawn, tail, np.full(30, CAPACITY), np.full(30, CAPACITY // 2 + 1), np.full(31, CAPACITY // 2)]


@pytest.mark.parametrize("lengths", many_lengths(), ids=len)
def test_laws_of_packing(lengths: np.ndarray) -> None:
    packs = pack(lengths, CAPACITY)
    assert sorted(row for rows in packs for row in rows.tolist()) == list(range(len(lengths)))
    sizes = sorted(int(lengths[rows].sum()) for rows in packs)
    assert all(0 < size <= CAPACITY for size in sizes)
    # No two packs would fit into one, so there are fewer than twice as many as the tokens need.
    assert len(sizes) < 2 or sizes[0] + sizes[1] > CAPACITY
    assert len(packs) <= max(2 * lengths.sum() / CAPACITY, 1)


def test_packs_of_a_long_tail_are_full() -> None:
    lengths = many_lengths()[-4]
    assert lengths.sum() / (len(pack(lengths, CAPACITY)) * CAPACITY) > 0.97


def test_packs_depend_on_the_seed_alone() -> None:
    lengths = many_lengths()[-4]
    first, again, other = (pack(lengths, CAPACITY, seed) for seed in (1, 1, 2))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert {tuple(rows) for rows in first} != {tuple(rows) for rows in other}
    assert len(first) == len(other)


def test_a_row_longer_than_a_pack_is_refused() -> None:
    with pytest.raises(ValueError, match="a row of 65 tokens is longer than a pack of 64"):
        pack(np.array([3, 65]), CAPACITY)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_laws_of_cutting(steps: int) -> None:
    for lengths in many_lengths():
        if lengths.sum() < 2 * CAPACITY * steps:
            continue  # `batch_plan` asks for steps that are at least that long
        runs = cut(lengths, steps)
        assert [position for run in runs for position in run.tolist()] == list(range(len(lengths)))
        sizes = np.array([lengths[run].sum() for run in runs])
        assert len(sizes) == steps
        assert sizes.min() > 0
        assert np.abs(sizes - lengths.sum() / steps).max() <= lengths.max()


def steps_of(world: int, epoch: int, plan: BatchPlan, **options: Any) -> list[list[list[list[int]]]]:
    """Rows by step, rank and micro-batch."""
    lengths = np.random.default_rng(1).integers(1, CAPACITY, 200)
    ranks = []
    for rank in range(world):
        batches = MicroBatches(lengths, plan, rank, shuffle=True, seed=3, **options)
        batches.set_epoch(epoch)
        ranks.append(list(batches))
        assert len(ranks[-1]) == len(batches)
    starts = range(0, len(ranks[0]), plan.accumulation)
    return [[rank[start : start + plan.accumulation] for rank in ranks] for start in starts]


def rows_of(step: list[list[list[int]]]) -> list[int]:
    return sorted(row for rank in step for micro in rank for row in micro)


@pytest.mark.parametrize("kind", ["packs", "tokens"])
def test_every_row_comes_once_an_epoch_and_steps_are_the_same_for_any_number_of_ranks(kind: str) -> None:
    lengths = np.random.default_rng(1).integers(1, CAPACITY, 200)
    options = {"pack_to": CAPACITY} if kind == "packs" else {}
    size: dict[str, Any] = {"global_batch_size": 8}
    if kind == "tokens":
        size = {"global_batch_size": None, "tokens_per_batch": 8 * CAPACITY}
    found = {}
    for world in (1, 2, 4):
        for epoch in (0, 1):
            plan = batch_plan(TrainConfig(**size, micro_batch_size=2), world, cutoff_len=CAPACITY)
            steps = steps_of(world, epoch, plan, **options)
            found[world, epoch] = [rows_of(step) for step in steps]
            for step in steps:
                for rank in step:
                    assert all(lengths[micro].sum() <= 2 * CAPACITY + CAPACITY // 2 for micro in rank)
                if world > 1 and kind == "tokens":
                    work = [sum(lengths[micro].sum() for micro in rank) for rank in step]
                    assert max(work) - min(work) <= CAPACITY
    for epoch in (0, 1):
        assert sorted(row for step in found[1, epoch] for row in step) == list(range(200))
        assert found[1, epoch] == found[2, epoch] == found[4, epoch]
    assert found[1, 0] != found[1, 1]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """32 rows of 8 lengths, as overrides."""
    folder = tmp_path_factory.mktemp("rows")
    content = [{"instruction": "Say it", "output": " ".join(["parcel"] * (4 * (n % 8) + 1))} for n in range(32)]
    (folder / "rows.json").write_text(json.dumps(content))
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    size = ["data.cutoff_len=128", "model.dtype=float32", "train.logging_steps=1", "train.scheduler=constant"]
    return ["data=registry", "data.names=[rows]", f"data.dir={folder}", "train.epochs=1", "train.warmup_ratio=0", *size]


def test_a_packed_step_is_the_step_of_its_rows(train_here: Callable[..., Path], rows: list[str]) -> None:
    """All packs in one step, and all rows in one step: the same loss and the same gradient."""
    packed = train_here("packed", *rows, "data.packing=true", "train.global_batch_size=100")
    alone = train_here("alone", *rows, "train.global_batch_size=100")
    assert manifest(packed)["steps"] == manifest(alone)["steps"] == 1
    assert losses(packed) == pytest.approx(losses(alone), rel=1e-6)
    norms = [read_metrics(run)[0]["grad_norm"] for run in (packed, alone)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert norms[0] > 0


def test_packed_training_learns_and_its_steps_are_full(train_here: Callable[..., Path], rows: list[str]) -> None:
    run = train_here("learns", *rows, "data.packing=true", "train.global_batch_size=2", "train.learning_rate=1e-3")
    tokens = [line["step_tokens"] for line in read_metrics(run) if "loss" in line]
    assert manifest(run)["steps"] == len(tokens)
    assert np.median(tokens) > 0.9 * 2 * 128
    assert losses(run)[-1] < losses(run)[0]


def test_steps_of_tokens_hold_about_as_many(train_here: Callable[..., Path], rows: list[str]) -> None:
    size = ["train.global_batch_size=null", "train.tokens_per_batch=300"]
    run = train_here("tokens", *rows, *size)
    tokens = [line["step_tokens"] for line in read_metrics(run) if "loss" in line]
    assert len(tokens) == manifest(run)["steps"] == int(np.ceil(sum(tokens) / 300))
    assert np.ptp(tokens) <= 2 * 60
    assert sum(tokens) == manifest(run)["tokens_seen"]


def test_two_ranks_train_on_packs_and_on_tokens_as_one(
    train: Callable[..., Path], train_here: Callable[..., Path], rows: list[str]
) -> None:
    for name, options in (
        ("packs", ["data.packing=true", "train.global_batch_size=4"]),
        ("budget", ["train.global_batch_size=null", "train.tokens_per_batch=600"]),
    ):
        one = train_here(f"{name}-1", *rows, *options)
        two = train(f"{name}-2", *rows, *options, "strategy=ddp")
        assert losses(two) == pytest.approx(losses(one), rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.packing=true", "train.padding_free=false"],
            "`data.packing` does not go with `train.padding_free=false`",
        ),
        (["data.packing=true", "train.group_by_length=true"], "does not go with `train.group_by_length=true`"),
        (["data.packing=true", "data.streaming=true", "train.max_steps=5"], "does not go with `data.streaming=true`"),
        (["data.packing=true", "method=prompt_tuning"], "`data.packing` does not go with method=prompt_tuning"),
        (
            ["train.tokens_per_batch=9000", "train.global_batch_size=null", "data.packing=true"],
            "both fill batches with tokens",
        ),
        (
            ["train.tokens_per_batch=9000", "train.global_batch_size=null", "method=p_tuning"],
            "`train.tokens_per_batch` does not go with method=p_tuning",
        ),
    ],
)
def test_what_packing_does_not_go_with_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(compose_config(overrides), find_devices())
    assert message in str(caught.value)
