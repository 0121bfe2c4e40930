"""float32 master copies for half-precision parameters: adapters compute in bfloat16 and learn in float32.

A bfloat16 weight cannot take an update smaller than 1/256 of itself. DeepSpeed keeps such copies by itself; this is
the same for one device and for DDP, as hooks on an ordinary torch optimiser.
"""

from __future__ import annotations

from typing import Any

import torch


def attach_master_weights(optimizer: torch.optim.Optimizer) -> int:
    """Let `optimizer` step float32 copies of its half-precision parameters; return how many it copied.

    Before a step the gradients are copied to the masters, after it the masters to the parameters. `state_dict` carries
    the masters, so that a resumed run continues from the exact values.
    """
    pairs: list[tuple[torch.nn.Parameter, torch.nn.Parameter]] = []
    for group in optimizer.param_groups:
        for index, parameter in enumerate(group["params"]):
            if parameter.dtype in (torch.bfloat16, torch.float16):
                master = torch.nn.Parameter(parameter.detach().float())
                group["params"][index] = master
                _hand_over(optimizer, parameter, master)
                pairs.append((parameter, master))
    if not pairs:
        return 0

    def before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for parameter, master in pairs:
            master.grad = None if parameter.grad is None else parameter.grad.float()

    @torch.no_grad()
    def after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for parameter, master in pairs:
            parameter.copy_(master)
            master.grad = None

    def add_masters(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "master_weights": [master.detach().clone() for _, master in pairs]}

    @torch.no_grad()
    def take_masters(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        for (parameter, master), saved in zip(pairs, state["master_weights"], strict=True):
            master.copy_(saved)
            parameter.copy_(master)
        return {key: value for key, value in state.items() if key != "master_weights"}

    optimizer.register_step_pre_hook(before_step)
    optimizer.register_step_post_hook(after_step)
    optimizer.register_state_dict_post_hook(add_masters)
    optimizer.register_load_state_dict_pre_hook(take_masters)
    return len(pairs)


def _hand_over(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, master: torch.nn.Parameter) -> None:
    """Give a master what the optimiser keeps for its parameter before the first step already, as Adagrad does."""
    for key, value in optimizer.state.pop(parameter, {}).items():
        half = isinstance(value, torch.Tensor) and value.dtype == parameter.dtype
        optimizer.state[master][key] = value.float() if half else value
