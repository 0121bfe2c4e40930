"""A global batch is the same rows, each of them once, for any number of ranks and any micro-batch."""

from __future__ import annotations

import pytest

from launch.batching import batch_plan
from launch.schema import TrainConfig


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("micro", [1, 3, 4, 16])
@pytest.mark.parametrize("rows", [16, 15, 9, 1])
def test_ranks_share_a_global_batch_without_loss_or_repetition(world: int, micro: int, rows: int) -> None:
    plan = batch_plan(TrainConfig(global_batch_size=16, micro_batch_size=micro), world)
    shares = [plan.share(list(range(rows)), rank) for rank in range(world)]
    dealt = [row for share in shares for batch in share for row in batch]
    assert sorted(dealt) == list(range(rows))
    # The same number of micro-batches on every rank keeps collective operations in step.
    assert {len(share) for share in shares} == {plan.accumulation}
    assert max(len(batch) for share in shares for batch in share) <= micro


def test_published_step_counts_come_out() -> None:
    """2,030 rows, batch 4 x accumulation 4, 30 epochs: 480 steps on 8 GPUs, 3,810 on one."""
    train = TrainConfig(global_batch_size=None, gradient_accumulation_steps=4, micro_batch_size=4)
    assert batch_plan(train, 8).steps_per_epoch(2030) * 30 == 480
    assert batch_plan(train, 1).steps_per_epoch(2030) * 30 == 3810
