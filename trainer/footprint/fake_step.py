"""One micro-batch's forward and backward pass on a device without memory, and what of it is the most."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from tunewright.plan.footprint import Batch, Moment, Pass
from tunewright.trainer.flops import FlopCounter
from tunewright.trainer.footprint.allocations import (
    ACTIVATIONS,
    CUDA_BLOCK,
    GRADIENTS,
    HEAD,
    SCRATCH,
    Allocations,
    State,
)
from tunewright.trainer.footprint.gpu_kernels import GpuKernels
from tunewright.trainer.footprint.repetition import Repeated, written_out
from tunewright.trainer.loss import Loss, loss_sums
from tunewright.trainer.model.planned_device import PlannedDevice
from tunewright.trainer.model.ready import Ready

OWN_LOSS: Loss = partial(cross_entropy, reduction="sum")  # in the place of a loss of the user's


class FakeStep:
    """Runs passes of a model that has fake tensors, `weights`; `repeated` of its `layers` stand for others."""

    def __init__(
        self,
        mode: PlannedDevice,
        model: Any,
        weights: list[torch.Tensor],
        ready: Ready,
        layers: nn.ModuleList,
        repeated: list[Repeated],
        *,
        own_loss: bool,
    ) -> None:
        self.mode, self.model, self.weights, self.ready = mode, model, weights, ready
        self.layers, self.repeated, self.loss = layers, repeated, OWN_LOSS if own_loss else None
        self.total = len(layers) + sum(group.more * (group.end - group.first) for group in repeated)
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.times: Mapping[nn.Module, int] = {
            module: 1 + group.more
            for group in repeated
            for layer in layers[group.first : group.end]
            for module in layer.modules()
        }

    def run(self, batch: Batch) -> Pass:
        """Run one batch; those that recompute come last, because models keep hooks of theirs for it."""
        _recompute(self.model, self.base, batch.recompute, self._kernels)
        scored = batch.rows * (batch.length - 1) if batch.scored is None else batch.scored
        block = 1 if self.mode.type == "cpu" else CUDA_BLOCK
        allocations, flops = Allocations(block=block, masked=scored), FlopCounter(self.model, self.times)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        with contextlib.ExitStack() as stack:
            for parameter in trained:
                hook = parameter.register_post_accumulate_grad_hook(allocations.became_gradient)
                stack.callback(hook.remove)
            for tensor in self.weights:
                allocations.leave_out(tensor)
            marks = stack.enter_context(_Marks(allocations, self.base, self.layers, self.total))
            stack.enter_context(self._kernels())
            stack.enter_context(self.mode)
            stack.enter_context(allocations)
            inputs = _batch(batch, scored)
            with flops.watching():
                loss = self._loss(inputs, scored)
            marks.forward = False
            loss.backward()
            del loss
        for parameter in trained:
            parameter.grad = None
        assert flops.flops is not None
        virtual = batch.rows * flops.virtual_tokens
        states = written_out(torch.tensor(allocations.states), marks.segments(self.repeated))
        return Pass(batch, most(states), flops.flops.of(batch.rows * batch.length, scored, virtual))

    def _kernels(self) -> AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.mode.type == "cpu" else GpuKernels()

    def _loss(self, inputs: dict[str, Any], scored: int) -> torch.Tensor:
        if self.ready.neftune is not None:
            self.ready.neftune.see(inputs)
        router = self.ready.router_loss
        sums = loss_sums(self.model, inputs, self.ready.head, loss=self.loss, router=router is not None)
        share = 1.0 / max(scored, 1)
        loss = sums.loss * share
        if router is None or sums.router is None:
            return loss
        return router.add(loss, sums.router, torch.ones(()) * share)


class _Marks:
    """Notes what is held where layers begin: in the forward pass before each, in the backward pass behind each."""

    def __init__(self, allocations: Allocations, base: Any, layers: nn.ModuleList, total: int) -> None:
        """`total` is how many layers there are with those that are not run."""
        self.allocations, self.base, self.layers, self.total = allocations, base, layers, total
        self.forward = True
        self._before: dict[int, tuple[int, State]] = {}  # a layer's number: how many states there were, and the last
        self._behind: dict[int, tuple[int, State]] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> _Marks:
        for number, layer in enumerate(self.layers):
            self._hooks += [
                layer.register_forward_pre_hook(partial(self._begin, number)),
                layer.register_forward_hook(partial(self._end, number)),
            ]
        stack = self.base.base_model
        if stack is not self.base:
            self._hooks.append(stack.register_forward_hook(self._left_layers))
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def segments(self, repeated: list[Repeated]) -> list[tuple[int, int, torch.Tensor, int]]:
        """Return the stretches of states of layers that stand for others, in their order: see `written_out`."""
        found = []
        for group in repeated:
            found.append((self._before[group.first], self._before[group.end], group.more))
        for group in reversed(repeated):
            if group.first - 1 in self._behind and group.end - 1 in self._behind:
                found.append((self._behind[group.end - 1], self._behind[group.first - 1], group.more))
        return [
            (first, end, torch.tensor(after) - torch.tensor(before), more)
            for (first, before), (end, after), more in found
        ]

    def _begin(self, number: int, *_: Any) -> None:
        if self.forward:
            self._before[number] = self._mark()

    def _end(self, number: int, layer: Any, args: Any, output: Any) -> None:
        if self.forward:
            self._when_differentiated(output, partial(self._behind_layer, number))

    def _behind_layer(self, number: int, _: Any) -> None:
        self._behind[number] = self._mark()

    def _left_layers(self, stack: Any, args: Any, output: Any) -> Any:
        if self.forward:
            self.allocations.enter_head()
            self._when_differentiated(output, self.allocations.leave_head)
            if logits := getattr(output, "router_logits", None):  # the router's loss is of all layers at once
                wanted = round(len(logits) * self.total / len(self.layers))
                output.router_logits = tuple(logits[number % len(logits)] for number in range(wanted))
        return output

    def _mark(self) -> tuple[int, State]:
        return len(self.allocations.states), self.allocations.now

    @staticmethod
    def _when_differentiated(output: Any, call: Any) -> None:
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        if hidden.requires_grad:
            hidden.register_hook(call)


def most(states: torch.Tensor) -> list[Moment]:
    """Return the states that are the most for some size of a gradient: the upper right of their convex hull."""
    # Of states with the same gradients the largest, then those that have more than any with more gradients.
    order = sorted(states.tolist(), key=lambda state: (-state[GRADIENTS], -state[ACTIVATIONS]))
    hull: list[list[int]] = []
    for state in order:
        if hull and state[ACTIVATIONS] <= hull[-1][ACTIVATIONS]:
            continue
        while len(hull) > 1 and not _bends(hull[-2], hull[-1], state):
            hull.pop()
        hull.append(state)
    return [Moment(state[ACTIVATIONS], state[GRADIENTS], state[HEAD], state[SCRATCH]) for state in hull]


def _bends(before: list[int], middle: list[int], after: list[int]) -> bool:
    """Whether the middle of three states lies outside of the line between the others."""
    (a, g), (b, h), (c, i) = ((state[ACTIVATIONS], state[GRADIENTS]) for state in (before, middle, after))
    return (b - a) * (h - i) > (c - b) * (g - h)


def _batch(batch: Batch, scored: int) -> dict[str, Any]:
    """Return a batch as the collators make it, without values."""
    if batch.padded:
        shape = batch.rows, batch.length
        return {name: torch.zeros(shape, dtype=torch.long) for name in ("input_ids", "attention_mask", "labels")}
    tokens = batch.rows * batch.length
    bounds = torch.zeros(batch.rows + 1, dtype=torch.int32)
    return {
        "input_ids": torch.zeros(1, tokens, dtype=torch.long),
        "labels": torch.zeros(1, tokens, dtype=torch.long),
        "position_ids": torch.zeros(1, tokens, dtype=torch.long),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": batch.length,
        "max_length_k": batch.length,
        "scored": torch.zeros(scored, dtype=torch.long),
        "targets": torch.zeros(scored, dtype=torch.long),
    }


def _recompute(model: Any, base: Any, wanted: bool, kernels: Callable[[], AbstractContextManager[Any]]) -> None:
    """Have the layers recompute as transformers' Trainer and TRL have them.

    A backward pass leaves the contexts that it is called in, so each recomputation is told which `kernels` there are.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers 5.23 has a new name for it, 5.17 has not
        if not wanted:
            if getattr(base, "is_gradient_checkpointing", False):
                base.gradient_checkpointing_disable()
            return
        if model is not base:
            model.enable_input_require_grads()
        contexts = {"context_fn": lambda: (contextlib.nullcontext(), kernels())}
        base.gradient_checkpointing_enable({"use_reentrant": False, **contexts})
