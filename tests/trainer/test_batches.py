"""Batches hold what they should, and attention and loss over a flat batch are those of the rows alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets

from tunewright.plan.batch_plan import BatchPlan
from tunewright.trainer.data.batches import (
    EpochDataLoader,
    FlatCollator,
    MicroBatches,
    PaddedCollator,
    TokenRows,
    on_device,
    token_counts,
)
from tunewright.trainer.data.render import IGNORED
from tunewright.trainer.loss import loss_sums
from tunewright.trainer.model import attention


def rows_of(*lengths: int, vocabulary: int = 4000) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(0)
    rows = []
    for length in lengths:
        ids = generator.integers(5, vocabulary, length)
        labels = np.where(np.arange(length) >= length // 2, ids, IGNORED)
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def test_a_flat_batch_is_the_rows_end_to_end() -> None:
    batch = FlatCollator(0)(rows_of(5, 2, 9))
    assert batch["cu_seq_lens_q"].tolist() == [0, 5, 7, 16]
    assert batch["position_ids"][0].tolist() == [*range(5), *range(2), *range(9)]
    assert batch["max_length_q"] == 9
    assert token_counts(batch)[0] == 16
    # What is scored is what Trainer counts: labels after the shift.
    assert batch["targets"].tolist() == batch["labels"][0, 1:][batch["labels"][0, 1:] != IGNORED].tolist()


def test_the_first_token_of_a_row_is_never_a_target() -> None:
    row = {"input_ids": np.array([7, 8, 9]), "labels": np.array([7, 8, 9])}
    assert FlatCollator(0)([row, row])["targets"].tolist() == [8, 9, 8, 9]
    assert PaddedCollator(0)([row, row])["labels"].tolist() == [[IGNORED, 8, 9]] * 2


def test_an_empty_micro_batch_teaches_nothing(tiny: Any) -> None:
    batch = FlatCollator(0)([])
    loss = loss_sums(tiny, batch).loss
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in tiny.parameters())


def test_rows_are_read_at_once_as_one_by_one() -> None:
    made = rows_of(5, 2, 9, 1, 2, 7)
    whole = Dataset.from_list([{name: values.tolist() for name, values in row.items()} for row in made])
    rows = TokenRows(concatenate_datasets([whole, whole]).select([11, 0, 3, 8, 8]))
    assert rows.lengths().tolist() == [7, 5, 1, 9, 9]
    for numbers in ([4, 0, 2], [1, 1], [3]):
        for row, number in zip(rows.__getitems__(numbers), numbers, strict=True):
            expected = made[[11, 0, 3, 8, 8][number] % 6]
            assert {name: values.tolist() for name, values in row.items()} == {
                name: values.tolist() for name, values in expected.items()
            }
    assert rows.__getitems__([]) == []


@pytest.mark.parametrize("pack_to", [None, 64])
def test_each_rank_knows_how_many_tokens_its_step_scores(pack_to: int | None) -> None:
    made = rows_of(*np.random.default_rng(0).integers(2, 30, 50).tolist())
    whole = Dataset.from_list([{name: values.tolist() for name, values in row.items()} for row in made])
    scored = np.array([int((row["labels"][1:] != IGNORED).sum()) for row in made])
    plan = BatchPlan(global_batch=8, world_size=2, micro_batch=2, accumulation=2)
    steps: list[list[Any]] = []
    for rank in range(2):
        rows = TokenRows(whole)
        options: dict[str, Any] = {"shuffle": True, "seed": 3, "pack_to": pack_to, "scored": scored}
        batches = MicroBatches(rows.lengths(), plan, rank, **options)
        loader = EpochDataLoader(rows, batch_sampler=batches, collate_fn=FlatCollator(0))
        steps.append(list(loader))
    assert len(steps[0]) == len(steps[1]) >= 4
    for start in range(0, len(steps[0]), 2):
        step = [batch for rank in steps for batch in rank[start : start + 2]]
        assert {batch["step_scored"] for batch in step} == {sum(len(batch["targets"]) for batch in step)}


def test_a_batch_goes_to_a_device_as_it_is() -> None:
    batch = FlatCollator(0)(rows_of(5, 2))
    there = on_device(batch, torch.device("meta"))
    assert {name for name, value in there.items() if getattr(value, "is_meta", False)} == {
        name for name, value in batch.items() if isinstance(value, torch.Tensor)
    }
    assert there["max_length_q"] == 5
    assert on_device(batch, torch.device("cpu")) is batch


@pytest.mark.parametrize("collator", [FlatCollator(0), PaddedCollator(0)])
def test_a_rank_without_rows_counts_no_tokens(collator: Any) -> None:
    assert token_counts(collator([])) == (0, 0)
    assert token_counts(collator(rows_of(5, 2))) == (7, 4)


def test_every_row_comes_once_an_epoch_and_in_another_order_each_epoch() -> None:
    plan = BatchPlan(global_batch=8, world_size=2, micro_batch=2, accumulation=2)
    ranks = [MicroBatches(np.arange(21) + 1, plan, rank, shuffle=True, seed=3) for rank in range(2)]
    orders = []
    for epoch in range(2):
        for rank in ranks:
            rank.set_epoch(epoch)
        orders.append([row for rank in ranks for batch in rank for row in batch])
        assert sorted(orders[-1]) == list(range(21))
    assert orders[0] != orders[1]
    assert len(list(ranks[0])) == len(list(ranks[1])) == len(ranks[0]) == 6


def test_a_global_batch_is_the_same_rows_for_any_world() -> None:
    def steps(world: int, micro: int, accumulation: int) -> list[set[int]]:
        plan = BatchPlan(global_batch=8, world_size=world, micro_batch=micro, accumulation=accumulation)
        ranks = [list(MicroBatches(np.arange(30) % 7 + 1, plan, rank, shuffle=True, seed=1)) for rank in range(world)]
        return [
            {row for rank in ranks for batch in rank[start : start + accumulation] for row in batch}
            for start in range(0, len(ranks[0]), accumulation)
        ]

    assert steps(1, 8, 1) == steps(1, 2, 4) == steps(2, 4, 1) == steps(4, 1, 2)


@pytest.fixture
def tiny(tiny_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation=attention.register())


def test_the_loss_of_a_flat_batch_is_the_sum_over_its_rows_alone(tiny: Any, tiny_model: Path) -> None:
    """Padding-free = padded = one row at a time, with transformers' own attention and loss as the reference."""
    from transformers import AutoModelForCausalLM

    rows = rows_of(3, 40, 11, 64, 2)
    reference = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager")
    alone = 0.0
    for row in rows:
        ids, labels = torch.tensor(row["input_ids"])[None], torch.tensor(row["labels"])[None]
        count = int((labels[:, 1:] != IGNORED).sum())
        alone += reference(input_ids=ids, labels=labels).loss.item() * count
    assert loss_sums(tiny, FlatCollator(0)(rows)).loss.item() == pytest.approx(alone, rel=1e-5)
    padded = PaddedCollator(0)(rows)
    count = int((padded["labels"][:, 1:] != IGNORED).sum())
    assert reference(**padded).loss.item() * count == pytest.approx(alone, rel=1e-5)


def test_gradients_of_a_flat_batch_are_those_of_a_padded_one(tiny: Any, tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    rows = rows_of(3, 40, 11)
    loss_sums(tiny, FlatCollator(0)(rows)).loss.backward()
    reference = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager")
    padded = PaddedCollator(0)(rows)
    (reference(**padded).loss * (padded["labels"][:, 1:] != IGNORED).sum()).backward()
    for (name, mine), theirs in zip(tiny.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("plan", "more"),
    [
        (BatchPlan(5, 2, 2, 2), {}),
        (BatchPlan(5, 2, 2, 2), {"group_by_length": True}),
        (BatchPlan(3, 2, 2, 1, unit="pack"), {"pack_to": 40}),
        (BatchPlan(None, 2, 2, 2, tokens=100), {}),
    ],
    ids=["rows", "by length", "packs", "tokens"],
)
def test_the_rows_of_a_step_are_known_afterwards(plan: BatchPlan, more: dict[str, Any]) -> None:
    """For every rank, in the second epoch too, and without a change of what is to come."""
    lengths = np.random.default_rng(0).integers(5, 40, 23)
    for rank in range(2):
        batches = MicroBatches(lengths, plan, rank, shuffle=True, seed=3, **more)
        dealt = []
        for epoch in range(2):
            batches.set_epoch(epoch)
            dealt += list(batches)
        batches.set_epoch(0)
        steps = len(dealt) // plan.accumulation
        found = [batches.rows_of(step, number) for step in range(1, steps + 1) for number in range(plan.accumulation)]
        assert found == dealt
        assert list(batches) == dealt[: len(batches)]
