"""What a rank of DeepSpeed holds: its states are flat, of all trained weights in one piece, and split over the ranks.

Read from DeepSpeed 0.19.8, `runtime/zero`: `stage_1_and_2.py`, `stage3.py`, `partition_parameters.py` and
`partitioned_param_coordinator.py`. The names in the comments are theirs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from tunewright.config.deepspeed_file import DeepSpeedFile, deepspeed_file
from tunewright.plan.held import Job, Memory
from tunewright.plan.optimizer_memory import paged, states, while_stepping

# Gradients that go to the other ranks at once. DeepSpeed reserves two buffers of so many, 80 MB in bfloat16.
LARGEST_BUCKET = 20_000_000
NORM = 8  # bytes of a number whose square goes into the gradient's norm (`get_norm_dtype`)
# DeepSpeed's own numbers, where a file says none.
USUAL = {
    "reduce_bucket_size": 500_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "sub_group_size": 1_000_000_000,
    "zero_hpz_partition_size": 1,
}


def moments(job: Job) -> Iterator[Memory]:
    """Yield what is held at those moments of a step of which one is the fullest."""
    file = deepspeed_file(job.config)
    if file.stage == 3:
        return _stage_3(job, Settings(job, file))
    return _stage_1_and_2(job, Settings(job, file))


@dataclass(frozen=True)
class Settings:
    """Numbers of a DeepSpeed JSON, "auto" filled in as `trainer/deepspeed_settings.py` and transformers do."""

    job: Job
    file: DeepSpeedFile

    @property
    def stage(self) -> int:
        return self.file.stage

    def number(self, key: str) -> int:
        said, hidden = self.file.get(f"zero_optimization.{key}"), self.job.footprint.weights.hidden
        if said != "auto":
            return int(USUAL[key] if said is None else said)
        if key == "reduce_bucket_size":
            return hidden**2 if self.stage == 3 else min(self.job.trained, LARGEST_BUCKET)
        return int(0.9 * hidden**2)

    def says(self, key: str, usual: bool) -> bool:
        said = self.file.get(f"zero_optimization.{key}")
        return usual if said is None else bool(said)

    def offloads(self, what: str) -> bool:
        device: Any = self.file.get(f"zero_optimization.offload_{what}.device")
        return device not in (None, "none", "auto")

    @property
    def part(self) -> int:
        """Trained weights of a rank."""
        return math.ceil(self.job.trained / self.job.ranks)

    @property
    def waiting(self) -> int:
        """Weights of a gradient that no bucket holds: it waits where it is for the next one."""
        return self.job.largest if self.job.largest > self.number("reduce_bucket_size") else 0

    @property
    def flat(self) -> list[tuple[list[int], int]]:
        """The shape of what the optimiser steps."""
        return [([self.part], 1)]


def _stage_1_and_2(job: Job, zero: Settings) -> Iterator[Memory]:
    size, part, name = job.itemsize, zero.part, job.config.train.optimizer
    bucket, waiting = zero.number("reduce_bucket_size"), zero.waiting
    # Two buffers while gradients come (`ipg_buckets`), and one bucket flattened for the others (`allreduce_bucket`).
    filled = size * (1 + zero.says("overlap_comm", False)) * bucket
    buffers = filled + size * max(min(bucket, job.trained), waiting)
    kept = {"masters": 4 * part, "optimizer": states(name, zero.flat)}
    rest = job.at_rest()
    if zero.offloads("optimizer"):
        # The masters' `.grad` lasts; so do what goes back to the device, and a buffer for a gradient on both sides.
        lasting = 4 * part + size * (part + job.largest) + (size * part if job.accumulates else 0)
        placed = _placed(job, {**kept, "gradients": lasting})
        always = replace(placed, weights=rest.weights, trained=rest.trained, buckets=size * job.largest)
        once = replace(always, buckets=always.buckets + buffers)
        yield from job.passing(always, once=once, bytes_of_gradient=size, most=waiting)
        yield _stepping_on_host(job, zero, always)
        return
    on_host = paged(name, zero.flat) if job.gpu else 0
    always = replace(rest, masters=4 * part, optimizer=kept["optimizer"] - on_host, host=on_host)
    stepping = while_stepping(name, zero.flat, gpu=job.gpu)
    norm = NORM * min(job.largest, part)
    if job.sums:  # `_build_compact_grad_partition_buffer`, which the step takes as it is
        always = replace(always, gradients=4 * part)
        yield from job.passing(always, once=replace(always, buckets=buffers), bytes_of_gradient=size, most=waiting)
        yield replace(always, scratch=max(stepping, norm))
        return
    # `grads_in_partition`, and of the micro-batches before `all_grad_tensors`. Stage 1 sends nothing before the last
    # micro-batch: it keeps the gradients of all weights, and the buffers.
    before = always
    if job.accumulates and zero.stage == 1:
        before = replace(always, gradients=size * job.trained, buckets=filled)
    elif job.accumulates:
        before = replace(always, gradients=size * part)
    once = replace(before, buckets=buffers, gradients=before.gradients + size * part)
    yield from job.passing(before, once=once, bytes_of_gradient=size, most=waiting)
    yield replace(always, gradients=size * part, scratch=norm)
    yield replace(always, gradients=2 * size * part + (4 * part if job.half else 0))  # flattened, then float32
    yield replace(always, gradients=4 * part, scratch=stepping)


def _stage_3(job: Job, zero: Settings) -> Iterator[Memory]:
    weights, size, part, name = job.footprint.weights, job.itemsize, zero.part, job.config.train.optimizer
    bucket, waiting, offload = zero.number("reduce_bucket_size"), zero.waiting, zero.offloads("optimizer")
    summed = 4 if job.sums else size
    copies = min(zero.number("zero_hpz_partition_size"), job.ranks)
    secondary = size * (weights.trained + weights.frozen) // copies if copies > 1 else 0  # ZeRO++: a whole in each node
    kept = {
        "masters": 4 * part if job.half or offload else 0,  # float32 weights are their own
        "optimizer": states(name, zero.flat),
        "gradients": (summed + (4 if offload else 0)) * part,  # offloaded masters' `.grad` lasts
    }
    base = {"weights": math.ceil(weights.frozen_bytes / job.ranks) + secondary, "trained": size * part}
    if offload:
        always = _placed(job, kept)
    else:
        on_host = paged(name, zero.flat) if job.gpu else 0
        always = Memory(**{**kept, "optimizer": kept["optimizer"] - on_host}, host=on_host)
    if zero.offloads("param") and job.gpu:
        always = replace(always, host=always.host + sum(base.values()))
    else:
        always = replace(always, **base)
    # Small tensors stay whole on the device, beside each rank's part of them.
    always = replace(always, weights=always.weights + size * weights.small, buckets=size * bucket)
    # `reduce_scatter_coalesced` puts a bucket together once more.
    sent = size * max(min(bucket, weights.trained), waiting)
    whole = replace(always, gathered=size * gathered(job, zero))
    once = replace(whole, buckets=whole.buckets + sent)
    yield from job.passing(whole, once=once, bytes_of_gradient=size, most=waiting)
    if offload:
        yield _stepping_on_host(job, zero, always)
        return
    yield replace(always, scratch=NORM * math.ceil(job.largest / job.ranks))
    # `_prepare_fp32_grad_for_sub_group`: flattened, and then float32. One group of weights after the other is stepped,
    # of so many on this rank, or a few more: a tensor is not taken apart (`_create_fp16_sub_groups`).
    group = min(part, zero.number("sub_group_size") + math.ceil(job.largest / job.ranks))
    yield replace(always, gradients=always.gradients + summed * group + (4 * group if summed == 2 else 0))
    stepping = while_stepping(name, [([group], 1)], gpu=job.gpu)
    yield replace(always, gradients=always.gradients + 4 * group, scratch=stepping)


def _stepping_on_host(job: Job, zero: Settings, always: Memory) -> Memory:
    stepping = while_stepping(job.config.train.optimizer, zero.flat, gpu=False)
    return replace(always, host=always.host + stepping) if job.gpu else replace(always, scratch=stepping)


def gathered(job: Job, zero: Settings) -> int:
    """Return how many weights are whole on a rank at most: those that will be used again soon are not given up.

    `__params_to_release` looks through what comes in the order of use for `stage3_max_reuse_distance` weights, and
    keeps those that it meets. At the end of the forward pass these are the last layers and the head. Beside them is
    what is being used, and what is fetched before it is needed: once in a buffer, and once taken apart.
    """
    weights = job.footprint.weights
    far = zero.number("stage3_max_reuse_distance")
    head = weights.head
    times = 3 if job.found.batch.recompute else 2  # a layer is met again in the backward pass, or when made again
    kept, distance = (head if head < far else 0), 2 * head
    for layer in reversed(weights.layers):
        if distance >= far:
            break
        kept += layer
        distance += times * layer
    fetched = zero.number("stage3_prefetch_bucket_size")
    whole = weights.trained + weights.frozen - weights.small
    return min(max(kept, max(weights.layers, default=0), head) + 2 * fetched, whole)


def _placed(job: Job, kept: dict[str, int]) -> Memory:
    """What is offloaded: beside a GPU, and in the same memory of a CPU."""
    return Memory(host=sum(kept.values())) if job.gpu else Memory(**kept)
