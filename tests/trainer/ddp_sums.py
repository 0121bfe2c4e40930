"""What tests/trainer/test_master_weights.py runs: ranks of DDP that accumulate, and one process with all of their rows.

python -m tests.trainer.ddp_sums FOLDER, which prints {"float32", "bfloat16"}: the gradients' distance from those of one
process that sums in float32, in each format, over its length; and "weights", the distance of what two steps made.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from tunewright.trainer.master_weights import attach_master_weights

RANKS, MICRO_BATCHES, STEPS = 2, 32, 2


def train(rank: int | None, *, float32: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of the first step and the masters after the last; without a rank, of all ranks' rows."""
    torch.manual_seed(0)
    inner = torch.nn.Sequential(torch.nn.Linear(48, 32), torch.nn.Tanh(), torch.nn.Linear(32, 8)).bfloat16()
    rows = torch.randn(STEPS, RANKS, MICRO_BATCHES, 4, 48).bfloat16()
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    masters = attach_master_weights(optimizer)
    options = {"gradient_as_bucket_view": True, "broadcast_buffers": False}
    model = inner if rank is None else DistributedDataParallel(inner, **options)
    if float32:
        masters.sum_in_float32(model)
    first = None
    for step in rows:
        mine = step.flatten(0, 1) if rank is None else step[rank]
        for number, row in enumerate(mine):
            last = number == len(mine) - 1
            with nullcontext() if rank is None or last else model.no_sync():
                loss = model(row).square().mean() / MICRO_BATCHES
                (loss / RANKS if rank is None else loss).backward()
        masters.take_gradients()
        if first is None:
            first = torch.cat([master.grad.flatten() for _, master in masters.pairs])
        optimizer.step()
    assert first is not None
    assert all(parameter.grad is None for parameter, _ in masters.pairs)
    return first, torch.cat([master.detach().flatten() for _, master in masters.pairs])


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    children = []
    for rank in range(RANKS):
        child = os.fork()
        if child == 0:
            torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
            found = {name: train(rank, float32=name == "float32") for name in ("float32", "bfloat16")}
            torch.save(found, folder / f"{rank}.pt")
            os._exit(0)
        children.append(child)
    expected = train(None, float32=True)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * RANKS
    ranks = [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]
    assert all(torch.equal(mine, other) for mine, other in zip(*(rank["float32"] for rank in ranks), strict=True))
    told = {name: float((one[0] - expected[0]).norm() / expected[0].norm()) for name, one in ranks[0].items()}
    told["weights"] = float((ranks[0]["float32"][1] - expected[1]).norm() / expected[1].norm())
    print(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
