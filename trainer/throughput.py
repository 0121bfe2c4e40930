"""What a run says about its speed: real tokens per second, FLOP/s and MFU.

Seconds are wall time between two log lines, at both of which the device has finished what it was given; a step that was
only queued counts nothing. Evaluating and saving are no training and left out.

FLOP/s = FLOPs that the method needs for the tokens (`flops.py`) / seconds. MFU ("model FLOPs utilisation", Chowdhery
et al. 2022, arXiv 2204.02311, appendix B) is their share of what the devices can compute (`peak.py`).
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from tunewright.trainer.data.batches import Batch, token_counts
from tunewright.trainer.flops import FlopCounter
from tunewright.trainer.hardware import drain, peak_memory
from tunewright.trainer.peak import Peak
from tunewright.trainer.process_group import all_gather


class Meter(TrainerCallback):
    """Tokens, FLOPs, seconds and losses of this rank's training steps.

    The trainer says when it fetches batches, trains on them, and has evaluated or saved.

    Args:
        cache: the folder `data.cache_dir`.
        wait: returns when the device has done what it was given.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        cache: Path,
        *,
        compiled: bool = False,
        wait: Callable[[], None] | None = None,
    ) -> None:
        self.device, self.compiled = device, compiled
        self.wait = wait or (lambda: drain(device))
        self.counter = FlopCounter(model)
        self.peak = Peak(device, dtype, cache)
        self.tokens, self.flops = 0, 0.0  # since the last log line
        self.step_losses: list[float] = []  # of each step of the last log line, over all ranks
        self._losses: list[torch.Tensor] = []  # of each step since then, this rank's
        self._loss: torch.Tensor | None = None
        self._fetched: deque[tuple[int, int, int]] = deque()  # counts of the batches that are not trained on yet
        self._since: float | None = None  # when the clock was started; None before the first step

    def start(self) -> None:
        """Start the clock anew: what the device has been given until now was no training."""
        self.wait()
        self._since = time.perf_counter()

    def fetch(self) -> None:
        """Start the clock at the first step: fetching batches is part of one."""
        if self._since is None:
            self.start()

    def add_batches(self, batches: list[Batch]) -> None:
        """Take note of the micro-batches of a step, which are on the CPU."""
        self._fetched.clear()  # of a step that was broken off
        for batch in batches:
            tokens, scored = token_counts(batch)
            virtual = self.counter.virtual_tokens * batch["input_ids"].size(0) if tokens else 0
            self._fetched.append((tokens, scored, virtual))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Train on a micro-batch in here. In the first one, layers that are to be compiled still run as they are."""
        first = self.compiled and self.counter.flops is None
        with torch.compiler.set_stance("force_eager") if first else nullcontext(), self.counter.watching():
            yield

    def trained(self) -> float:
        """Return the FLOPs of the micro-batch that was just trained on."""
        tokens, scored, virtual = self._fetched.popleft()
        flops = self.counter.flops.of(tokens, scored, virtual) if self.counter.flops else 0.0
        self.tokens += tokens
        self.flops += flops
        return flops

    def add_loss(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's loss to that of its step; nothing waits for the device."""
        self._loss = loss.clone() if self._loss is None else self._loss + loss

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self._loss is not None:
            self._losses.append(self._loss)
            self._loss = None

    def take(self) -> dict[str, float]:
        """Return speed and memory of all ranks since the last log line. Every rank has to call it."""
        self.wait()
        now = time.perf_counter()
        seconds, self._since = now - (self._since or now), now
        losses = torch.stack(self._losses).double().tolist() if self._losses else []
        self.step_losses = [sum(step) / len(step) for step in zip(*all_gather(losses, self.device), strict=True)]
        everyone = all_gather([self.tokens, self.flops, seconds, peak_memory(self.device)], self.device)
        tokens, flops, times, memory = zip(*everyone, strict=True)
        self.tokens, self.flops, self._losses = 0, 0.0, []
        elapsed = max(times) or math.inf
        figures = {
            "tokens_per_second": sum(tokens) / elapsed,
            "flops_per_second": sum(flops) / elapsed,
            "peak_memory_bytes": max(memory),
            "step_seconds": elapsed,
            "step_tokens": sum(tokens),
        }
        if self.peak.now:
            figures["mfu"] = figures["flops_per_second"] / self.peak.now
        return figures
