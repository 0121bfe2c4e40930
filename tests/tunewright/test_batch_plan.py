"""A global batch is the same rows, each of them once, for any number of ranks and any micro-batch."""

from __future__ import annotations

import math
import random
import re
from typing import Any

import pytest

from tunewright.config.schema import TrainConfig
from tunewright.errors import ConfigError
from tunewright.plan.batch_plan import batch_plan, deal


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("micro", [1, 3, 4, 16])
@pytest.mark.parametrize("rows", [16, 15, 9, 1])
def test_ranks_share_a_global_batch_without_loss_or_repetition(world: int, micro: int, rows: int) -> None:
    plan = batch_plan(TrainConfig(global_batch_size=16, micro_batch_size=micro), world)
    tokens = [7 * row % 11 + 1 for row in range(rows)]
    shares = [plan.share(tokens, rank) for rank in range(world)]
    dealt = [row for share in shares for batch in share for row in batch]
    assert sorted(dealt) == list(range(rows))
    # The same number of micro-batches on every rank keeps collective operations in step.
    assert {len(share) for share in shares} == {plan.accumulation}
    assert max(len(batch) for share in shares for batch in share) <= micro


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_parts_get_like_much_and_no_more_than_they_have_room_for(parts: int) -> None:
    """Graham's bound for the dearest first: at most 4/3 of the best there is, which is at least the mean."""
    chooser = random.Random(parts)
    for _ in range(50):
        costs = [chooser.randint(1, 1000) for _ in range(chooser.randint(0, 40))]
        dealt = deal(costs, parts, len(costs))
        assert sorted(position for part in dealt for position in part) == list(range(len(costs)))
        best = max(sum(costs) / parts, max(costs, default=0))
        assert max(sum(costs[position] for position in part) for part in dealt) <= 4 / 3 * best + max(costs, default=0)
        most = math.ceil(len(costs) / parts)
        assert max(len(part) for part in deal(costs, parts, most)) <= most


def test_ranks_have_like_much_to_do() -> None:
    """One long row weighs as much as all the short ones: it is alone on its rank."""
    plan = batch_plan(TrainConfig(global_batch_size=8, micro_batch_size=8), 2)
    shares = [plan.share([10, 10, 10, 70, 10, 10, 10, 10], rank) for rank in range(2)]
    assert shares == [[[3]], [[0, 1, 2, 4, 5, 6, 7]]]


def test_a_step_of_tokens_has_no_larger_micro_batches_than_rows_could_make() -> None:
    train = TrainConfig(global_batch_size=None, tokens_per_batch=40_000, micro_batch_size=4)
    plan = batch_plan(train, 2, cutoff_len=1000)
    assert (plan.tokens, plan.accumulation) == (40_000, 5)
    assert plan.steps_per_epoch(units=99, tokens=100_001) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens_per_batch": 40_000}, "`train.global_batch_size` is 16 and `train.tokens_per_batch` is 40000"),
        ({"tokens_per_batch": 3999, "global_batch_size": None}, "Write 4000 or more"),
        ({"tokens_per_batch": 0, "global_batch_size": None}, "whole number from 1"),
        ({"global_batch_size": None}, "`train.tokens_per_batch`"),
    ],
)
def test_batches_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        batch_plan(TrainConfig(micro_batch_size=4, **settings), 2, cutoff_len=1000)


def test_published_step_counts_come_out() -> None:
    """2,030 rows, batch 4 x accumulation 4, 30 epochs: 480 steps on 8 GPUs, 3,810 on one."""
    train = TrainConfig(global_batch_size=None, gradient_accumulation_steps=4, micro_batch_size=4)
    assert batch_plan(train, 8).steps_per_epoch(2030) * 30 == 480
    assert batch_plan(train, 1).steps_per_epoch(2030) * 30 == 3810
