"""What a run says about its speed: real tokens per second and MFU.

MFU = FLOPs that the method needs per token x tokens per second / the device's peak. A matmul weight costs 2 FLOPs per
token forward, 2 for the gradient of its input and 2 for its own gradient; a frozen weight has no gradient of its own:
6P per token for full fine-tuning, 4P (plus 6 for each adapter weight) for LoRA. Recomputation is not credited.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback

from tunewright.trainer.hardware import device_peak_flops, peak_memory
from tunewright.trainer.process_group import all_gather


@dataclass(frozen=True)
class MatmulParameters:
    """Weights that a token is multiplied by, frozen and trained; the head is met by scored tokens only."""

    body_frozen: int
    body_trained: int
    head_frozen: int
    head_trained: int

    def flops(self, tokens: int, scored: int) -> float:
        """Return the FLOPs of a forward and backward pass over `tokens`, `scored` of which reach the head."""
        body = 4 * self.body_frozen + 6 * self.body_trained
        head = 4 * self.head_frozen + 6 * self.head_trained
        return float(body * tokens + head * scored)


def matmul_parameters(model: torch.nn.Module) -> MatmulParameters:
    """Count a model's matmul weights: every 2-D weight but the input embedding, which is looked up.

    An output head that shares the embedding's weight is a matmul and counts.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    embedding, head = base.get_input_embeddings().weight, base.get_output_embeddings().weight
    body = {True: 0, False: 0}
    for parameter in model.parameters():
        shape = _shape(parameter)
        if parameter is not embedding and parameter is not head and len(shape) >= 2:
            body[parameter.requires_grad] += math.prod(shape)
    heads = {True: 0, False: 0}
    heads[head.requires_grad] = math.prod(_shape(head))
    return MatmulParameters(body[False], body[True], heads[False], heads[True])


def _shape(parameter: Any) -> torch.Size:
    """Return a weight's own shape, also of one in 4 bits (two in a byte) or split by ZeRO-3."""
    quant_state = getattr(parameter, "quant_state", None)
    return torch.Size(quant_state.shape if quant_state is not None else getattr(parameter, "ds_shape", parameter.shape))


class Meter(TrainerCallback):
    """Tokens, seconds and losses of this rank's training steps, without the time that evaluation and saving take.

    The trainer says when a step begins, and calls back when it ends.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.matmuls = matmul_parameters(model)
        peaks = all_gather([device_peak_flops(device, dtype) or math.nan], device)
        self.peak_flops = sum(peak for (peak,) in peaks)  # of all ranks together; not a number when one is unknown
        self.tokens, self.scored, self.seconds = 0, 0, 0.0  # since the last log line
        self.step_losses: list[float] = []  # of each step of the last log line, over all ranks
        self._losses: list[torch.Tensor] = []  # of each step since then, this rank's
        self._loss: torch.Tensor | None = None
        self._started: float | None = None

    def start_step(self) -> None:
        self._started = time.perf_counter()

    def add_tokens(self, tokens: int, scored: int) -> None:
        self.tokens += tokens
        self.scored += scored

    def add_loss(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's loss to that of its step; nothing waits for the device."""
        self._loss = loss.clone() if self._loss is None else self._loss + loss

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self._started is not None:
            self.seconds += time.perf_counter() - self._started
            self._started = None
        if self._loss is not None:
            self._losses.append(self._loss)
            self._loss = None

    def take(self) -> dict[str, float]:
        """Return speed and memory of all ranks since the last log line. Every rank has to call it."""
        losses = torch.stack(self._losses).double().tolist() if self._losses else []
        self.step_losses = [sum(step) / len(step) for step in zip(*all_gather(losses, self.device), strict=True)]
        mine = [self.tokens, self.scored, self.seconds, peak_memory(self.device)]
        tokens, scored, seconds, memory = zip(*all_gather(mine, self.device), strict=True)
        self.tokens, self.scored, self.seconds, self._losses = 0, 0, 0.0, []
        elapsed = max(seconds) or math.inf
        figures = {
            "tokens_per_second": sum(tokens) / elapsed,
            "peak_memory_bytes": max(memory),
            "step_seconds": elapsed,
            "step_tokens": sum(tokens),
        }
        if math.isfinite(self.peak_flops):
            figures["mfu"] = self.matmuls.flops(int(sum(tokens)), int(sum(scored))) / elapsed / self.peak_flops
        return figures
