"""float32 master copies for half-precision parameters: adapters compute in bfloat16 and learn in float32.

A bfloat16 weight cannot take an update smaller than 1/256 of itself. DeepSpeed keeps such copies by itself; this is
the same for one device and for DDP, as hooks on an ordinary torch optimiser.

Nor can a bfloat16 sum: gradients of 4 micro-batches that are added up in the weights' `.grad` are 0.5 % off, of 256
1.7 %, and 0.4 % where the sum is float32, which is the rounding of each of them. So the masters' `.grad` takes the sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import GradBucket, all_reduce
from torch.futures import Future
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback


@dataclass
class MasterWeights:
    """Half-precision parameters, each with the float32 copy that the optimiser steps in its place."""

    pairs: list[tuple[Parameter, Parameter]]
    summing: bool = False  # gradients go to the masters while they are made: see `sum_in_float32`

    def take_gradients(self) -> None:
        """Have the masters hold the gradients, and the parameters none."""
        given = [(parameter, master) for parameter, master in self.pairs if parameter.grad is not None]
        if given and not self.summing:
            for _, master in given:
                master.grad = torch.empty_like(master)
            torch._foreach_copy_([master.grad for _, master in given], [parameter.grad for parameter, _ in given])
        for parameter, _ in given:
            parameter.grad = None

    @torch.no_grad()
    def give_weights(self) -> None:
        """Round the masters to the parameters."""
        if self.pairs:
            torch._foreach_copy_([parameter for parameter, _ in self.pairs], [master for _, master in self.pairs])

    def sum_in_float32(self, model: torch.nn.Module) -> None:
        """Have the gradients of a step's micro-batches added up in float32, also those of DDP's ranks.

        `model` is what is called in training. A parameter's gradient is freed as soon as it is made, so that there are
        4 bytes for each weight instead of 2; in the step there are 4 in any case. DDP sends float32 once a step.
        """
        if not self.pairs:
            return
        self.summing = True
        ddp = model if isinstance(model, DistributedDataParallel) else None
        for parameter, master in self.pairs:

            def add(parameter: Parameter, master: Parameter = master) -> None:
                if ddp is not None and ddp.require_backward_grad_sync:  # the last micro-batch, which DDP takes
                    return
                if master.grad is None:
                    master.grad = parameter.grad.float()  # type: ignore[union-attr]
                else:
                    master.grad.add_(parameter.grad)  # type: ignore[arg-type]
                parameter.grad = None

            parameter.register_post_accumulate_grad_hook(add)  # type: ignore[arg-type]
        if ddp is not None:
            masters, group = dict(self.pairs), ddp.process_group
            # A function without annotations, as DDP compares them and takes no text for one.
            ddp.register_comm_hook(None, lambda _, bucket: _reduce(bucket, masters, group))


def _reduce(bucket: GradBucket, masters: dict[Parameter, Parameter], group: Any) -> Future[torch.Tensor]:
    """Add the last micro-batch's gradients to the sums of those before, and average over the ranks."""
    parameters: list[Any] = bucket.parameters()
    total = bucket.buffer().float()
    parts = total.split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        master, gradient = masters[parameter], part.view_as(parameter)
        if master.grad is not None:
            gradient.add_(master.grad)
        master.grad = gradient
    total.div_(group.size())
    # DDP waits for it at the end of the backward pass; what it puts back into the parameters is not looked at.
    return all_reduce(total, group=group, async_op=True).get_future().then(lambda _: bucket.buffer())  # type: ignore


def attach_master_weights(optimizer: torch.optim.Optimizer) -> MasterWeights:
    """Let `optimizer` step float32 copies of its half-precision parameters, and return both.

    Before a step the masters take the gradients, after it the parameters their weights. `state_dict` carries the
    masters themselves, as it does the moments, so that a resumed run continues from the exact values.
    """
    found = MasterWeights([])
    for group in optimizer.param_groups:
        for index, parameter in enumerate(group["params"]):
            if parameter.dtype in (torch.bfloat16, torch.float16):
                master = Parameter(parameter.detach().float())
                group["params"][index] = master
                _hand_over(optimizer, parameter, master)
                found.pairs.append((parameter, master))
    if not found.pairs:
        return found

    def before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        found.take_gradients()

    def after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        found.give_weights()
        for _, master in found.pairs:
            master.grad = None

    def add_masters(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "master_weights": [master.detach() for _, master in found.pairs]}

    @torch.no_grad()
    def take_masters(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        for (_, master), saved in zip(found.pairs, state["master_weights"], strict=True):
            master.copy_(saved)
        found.give_weights()
        return {key: value for key, value in state.items() if key != "master_weights"}

    optimizer.register_step_pre_hook(before_step)
    optimizer.register_step_post_hook(after_step)
    optimizer.register_state_dict_post_hook(add_masters)
    optimizer.register_load_state_dict_pre_hook(take_masters)
    return found


class SumInFloat32(TrainerCallback):
    """Has a trainer's masters sum gradients, once its model is what training calls."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.masters.sum_in_float32(self.trainer.model_wrapped)


def _hand_over(optimizer: torch.optim.Optimizer, parameter: Parameter, master: Parameter) -> None:
    """Give a master what the optimiser keeps for its parameter before the first step already, as Adagrad does."""
    for key, value in optimizer.state.pop(parameter, {}).items():
        half = isinstance(value, torch.Tensor) and value.dtype == parameter.dtype
        optimizer.state[master][key] = value.float() if half else value
