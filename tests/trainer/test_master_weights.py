"""Half-precision parameters learn in float32, from gradients that are summed in float32."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
import torch

from tests.conftest import REPOSITORY, TIMEOUT, losses
from tunewright.trainer.master_weights import attach_master_weights


def small_steps(dtype: torch.dtype, masters: bool, steps: int = 200) -> torch.Tensor:
    """Walk a weight of 1 by 1e-5 a step: far below what bfloat16 can add to it."""
    weight = torch.nn.Parameter(torch.ones(4, dtype=dtype))
    optimizer = torch.optim.SGD([weight], lr=1e-5)
    if masters:
        attach_master_weights(optimizer)
    for _ in range(steps):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    return weight.detach().float()


def test_updates_below_the_formats_precision_are_not_lost() -> None:
    assert torch.equal(small_steps(torch.bfloat16, masters=False), torch.ones(4))
    exact = small_steps(torch.float32, masters=False)
    assert torch.equal(small_steps(torch.bfloat16, masters=True), exact.bfloat16().float())


def test_a_saved_optimizer_continues_from_the_exact_masters() -> None:
    """It hands out the masters themselves, as PyTorch does the moments: whoever keeps them longer writes them down."""
    gradients = torch.randn(10, 3, generator=torch.Generator().manual_seed(0)).bfloat16()

    def fresh() -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        weight = torch.nn.Parameter(torch.full((3,), 1.2345).bfloat16())
        optimizer = torch.optim.AdamW([weight], lr=1e-4)
        attach_master_weights(optimizer)
        return weight, optimizer

    def walk(weight: torch.nn.Parameter, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            weight.grad = gradients[step].clone()
            optimizer.step()

    weight, optimizer = fresh()
    walk(weight, optimizer, range(5))
    master = optimizer.param_groups[0]["params"][0]
    (handed,) = optimizer.state_dict()["master_weights"]
    assert handed.data_ptr() == master.data_ptr()
    file = BytesIO()
    torch.save(optimizer.state_dict(), file)
    walk(weight, optimizer, range(5, 10))
    again, resumed = fresh()
    file.seek(0)
    resumed.load_state_dict(torch.load(file))
    walk(again, resumed, range(5, 10))
    assert torch.equal(resumed.param_groups[0]["params"][0], master)
    assert torch.equal(again, weight)


def test_float32_parameters_are_left_alone() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    assert not attach_master_weights(optimizer).pairs
    assert optimizer.param_groups[0]["params"][0] is weight


# Sums over micro-batches


@pytest.mark.parametrize("count", [4, 256])
def test_gradients_of_micro_batches_lose_nothing_in_their_sum(count: int) -> None:
    """Beside bfloat16 sums, which are what PyTorch makes of bfloat16 weights."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(count, 8, 64, generator=generator).bfloat16()
    exact, sums = None, {}
    for way in ("float32", "bfloat16"):
        torch.manual_seed(0)
        layer = torch.nn.Linear(64, 32).bfloat16()
        masters = attach_master_weights(torch.optim.SGD(layer.parameters(), lr=0.1))
        seen: list[torch.Tensor] = []
        if way == "float32":
            layer.weight.register_post_accumulate_grad_hook(lambda one, seen=seen: seen.append(one.grad.double()))
            masters.sum_in_float32(layer)
        for row in rows:
            (layer(row).float().square().mean() / count).backward()
        masters.take_gradients()
        assert layer.weight.grad is None
        gradient = masters.pairs[0][1].grad
        assert gradient is not None
        assert gradient.dtype == torch.float32
        exact = sum(seen) if exact is None else exact
        sums[way] = float((gradient - exact).norm() / exact.norm())
    assert sums["float32"] < 1e-6
    assert sums["bfloat16"] > (0.002 if count == 4 else 0.01)


def test_ranks_sum_as_one_process_does(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.trainer.ddp_sums", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["float32"] < 1e-6
    assert told["weights"] < 1e-6
    assert told["bfloat16"] > 0.002


def test_64_micro_batches_train_as_one_batch_does(train_here: Callable[..., Path], small_model: Path) -> None:
    """Measured: the curves are 0.003 apart at most, and 0.13 where `.grad` adds up in bfloat16."""
    same = ["model=folder", f"model.path={small_model}", "model.dtype=bfloat16", "data.eval_names=[]"]
    same += ["train.max_steps=6", "train.logging_steps=1", "train.save_steps=0", "train.warmup_ratio=0"]
    same += ["train.learning_rate=1e-2", "train.global_batch_size=64"]
    whole = losses(train_here("sums-whole", *same, "train.micro_batch_size=64"))

    def drift(name: str, *overrides: str) -> float:
        parts = losses(train_here(name, *same, "train.micro_batch_size=1", *overrides))
        return max(abs(mine - one) for mine, one in zip(parts, whole, strict=True))

    in_float32 = drift("sums-float32")
    assert in_float32 < 0.01
    assert drift("sums-bfloat16", "train.grad_accum_dtype=bfloat16") > 5 * in_float32
