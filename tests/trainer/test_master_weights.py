"""Half-precision parameters learn in float32."""

from __future__ import annotations

import torch

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
    def fresh() -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        weight = torch.nn.Parameter(torch.full((3,), 1.2345).bfloat16())
        optimizer = torch.optim.AdamW([weight], lr=1e-4)
        attach_master_weights(optimizer)
        return weight, optimizer

    def walk(weight: torch.nn.Parameter, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            weight.grad = torch.ones_like(weight)
            optimizer.step()

    weight, optimizer = fresh()
    walk(weight, optimizer, 5)
    state = optimizer.state_dict()
    walk(weight, optimizer, 5)
    again, resumed = fresh()
    resumed.load_state_dict(state)
    walk(again, resumed, 5)
    assert torch.equal(resumed.param_groups[0]["params"][0], optimizer.param_groups[0]["params"][0])
    assert torch.equal(again, weight)


def test_float32_parameters_are_left_alone() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    assert attach_master_weights(optimizer) == 0
    assert optimizer.param_groups[0]["params"][0] is weight
