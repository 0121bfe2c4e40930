"""What a run says about its speed and memory: real tokens per second, MFU, peak memory.

MFU = FLOPs that the method needs per token x tokens per second / the device's peak. A matmul weight costs 2 FLOPs per
token forward, 2 for the gradient of its input and 2 for its own gradient; a frozen weight has no gradient of its own:
6P per token for full fine-tuning, 4P (plus 6 for each adapter weight) for LoRA. Recomputation is not credited.
"""

from __future__ import annotations

import os
import platform
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


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
        if parameter is not embedding and parameter is not head and _dimensions(parameter) >= 2:
            body[parameter.requires_grad] += _count(parameter)
    heads = {True: 0, False: 0}
    heads[head.requires_grad] = _count(head)
    return MatmulParameters(body[False], body[True], heads[False], heads[True])


def _dimensions(parameter: torch.nn.Parameter) -> int:
    quant_state = getattr(parameter, "quant_state", None)
    if quant_state is not None:
        return len(quant_state.shape)
    return len(getattr(parameter, "ds_shape", parameter.shape))


def _count(parameter: torch.nn.Parameter) -> int:
    quant_state = getattr(parameter, "quant_state", None)
    if quant_state is not None:  # 4-bit: two weights in a byte
        return int(torch.Size(quant_state.shape).numel())
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def device_peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the device's peak in FLOP/s: of a GPU from TRL's table, of a CPU rank measured on a large matmul.

    None for a GPU that the table does not have.
    """
    if device.type == "cuda":
        from trl.trainer.utils import get_peak_flops

        return get_peak_flops(torch.cuda.get_device_name(device), str(dtype).removeprefix("torch."))
    size = 1024
    a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_memory(device: torch.device) -> int:
    """Return the most bytes this rank has held: reserved on its GPU, or resident in host memory for a CPU rank."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


@dataclass
class Meter:
    """Tokens, seconds and losses of training steps, without the time that evaluation and saving take."""

    tokens: int = 0
    scored: int = 0
    seconds: float = 0.0
    total_tokens: int = 0
    total_scored: int = 0
    total_seconds: float = 0.0
    losses: list[torch.Tensor] = field(default_factory=list, repr=False)  # of each step, this rank's
    logged_losses: list[float] = field(
        default_factory=list, repr=False
    )  # of each step of the last log line, all ranks'
    _loss: torch.Tensor | None = field(default=None, repr=False)
    _started: float | None = field(default=None, repr=False)

    def start_step(self) -> None:
        self._started = time.perf_counter()

    def end_step(self) -> None:
        if self._started is not None:
            self.seconds += time.perf_counter() - self._started
            self._started = None
        if self._loss is not None:
            self.losses.append(self._loss)
            self._loss = None

    def add_loss(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's loss to that of its step; nothing waits for the device."""
        self._loss = loss.clone() if self._loss is None else self._loss + loss

    def take_losses(self) -> list[float]:
        """Return this rank's loss of each step since the last call."""
        taken = torch.stack(self.losses).double().tolist() if self.losses else []
        self.losses = []
        return taken

    def add(self, tokens: int, scored: int) -> None:
        self.tokens += tokens
        self.scored += scored

    def take(self) -> tuple[int, int, float]:
        """Return (tokens, scored tokens, seconds) since the last call."""
        taken = self.tokens, self.scored, self.seconds
        self.total_tokens += self.tokens
        self.total_scored += self.scored
        self.total_seconds += self.seconds
        self.tokens, self.scored, self.seconds = 0, 0, 0.0
        return taken


def over_ranks(values: list[float], device: torch.device) -> list[list[float]]:
    """Return one list of values for each rank; every rank has to call it."""
    if not torch.distributed.is_initialized():
        return [values]
    mine = torch.tensor(values, dtype=torch.float64, device=device)
    everyone = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(everyone, mine)
    return [tensor.tolist() for tensor in everyone]


def hardware(device: torch.device) -> dict[str, Any]:
    """Return what the manifest says about the device of the first rank."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return {
        "device_name": name,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads_per_rank": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }
