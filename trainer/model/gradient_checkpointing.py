"""How many layers recompute their activations in the backward pass: as few as memory allows.

`train.gradient_checkpointing=auto`, where not everything can be kept by the plan. Recomputing a layer costs its forward
pass once more, a third of its share of a step ("activation checkpointing", Chen et al. 2016, arXiv 1604.06174). What a
layer keeps otherwise is measured before the first step, in a forward pass of the largest micro-batch in which all other
layers recompute.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

from tunewright.run_folder import RunDir
from tunewright.trainer.console import Output
from tunewright.trainer.model.layers import layers_told_apart
from tunewright.trainer.process_group import all_gather

# Share of a device's memory that stays free: the allocator's gaps, workspaces of kernels, the chunk of the head.
SPARE = 0.1
# Of a trained weight: gradient, and the optimiser's float32 copy and two moments, at most.
STATE_BYTES = 16
GIB = 2**30


@dataclass(frozen=True)
class Activations:
    """What the largest micro-batch keeps for the backward pass, in bytes."""

    layers: int
    layer: int  # of one layer
    entry: int  # of a layer that recomputes: its input

    def recomputed(self, room: float) -> int:
        """Return the fewest layers that have to recompute for everything to fit into `room` bytes."""
        # In the backward pass of a layer, what it recomputed and the gradients of that are there as well.
        left = room - self.layers * self.entry - 2 * self.layer
        kept = math.floor(left / max(self.layer - self.entry, 1))
        return self.layers - min(max(kept, 0), self.layers)


def can_fit(trainer: Any) -> bool:
    """Tell whether there is something to decide: of a stream nobody knows the longest rows, and all layers recompute.

    So do they in models of an older kind, whose layers transformers does not tell apart.
    """
    return trainer.stream is None and bool(layers_told_apart(trainer.model))


class FitCheckpointing(TrainerCallback):
    """Decides before the first step, on all ranks alike."""

    def __init__(self, trainer: Any, run: RunDir, output: Output) -> None:
        self.trainer, self.run, self.output = trainer, run, output

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        layers = layers_told_apart(trainer.model)
        need = measure(trainer, layers)
        room = free_bytes(args.device) - states_to_come(trainer)
        # ZeRO-3 gathers weights for each pass over a layer, so ranks have to agree.
        found = all_gather([need.recomputed(room), need.layer, room], args.device)
        recomputed, room = int(max(row[0] for row in found)), min(row[2] for row in found)
        for number, layer in enumerate(layers):
            layer.gradient_checkpointing = number < recomputed
        if state.is_world_process_zero:
            self.run.update_manifest(recomputed_layers=recomputed)
        self.output.say(
            f"Recomputing {recomputed} of {need.layers} layers: all activations of the largest micro-batch take "
            f"{need.layers * max(row[1] for row in found) / GIB:.3g} GiB, and {max(room, 0) / GIB:.3g} GiB are free."
        )


def measure(trainer: Any, layers: list[Any]) -> Activations:
    """Measure with the last layer, in a forward pass of the largest micro-batch that changes nothing.

    The first keeps less where its input is frozen embeddings, which need no gradient.
    """
    batch, last = trainer._prepare_inputs(trainer.largest_batch()), layers[-1]
    sizes: dict[int, int] = {}
    entry = 0

    def begin(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal entry
        entry = (*args, *kwargs.values())[0].nbytes
        hooks.__enter__()

    def end(*_: Any) -> None:
        hooks.__exit__(None, None, None)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        weight = tensor if tensor._base is None else tensor._base
        if not isinstance(weight, torch.nn.Parameter):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    handles = [last.register_forward_pre_hook(begin, with_kwargs=True), last.register_forward_hook(end)]
    last.gradient_checkpointing = False
    with torch.random.fork_rng(), torch.compiler.set_stance("force_eager"), torch.enable_grad():
        loss = trainer.compute_loss(trainer.model, batch)  # its graph holds what is counted
    for handle in handles:
        handle.remove()
    del loss
    return Activations(len(layers), sum(sizes.values()), entry)


def free_bytes(device: torch.device) -> float:
    """Return what activations may take on a device now. Ranks on a CPU share its memory."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free - SPARE * total
    memory = psutil.virtual_memory()
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return float((memory.available - SPARE * memory.total) / ranks)


def states_to_come(trainer: Any) -> float:
    """Return the bytes of gradients and optimiser states, which are made during the first step."""
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters() if p.requires_grad)
    return STATE_BYTES * trained / (trainer.accelerator.num_processes if trainer.is_deepspeed_enabled else 1)
