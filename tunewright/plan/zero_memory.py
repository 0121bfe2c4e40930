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
# DeepSpeed's own numbers, where a file says none.
USUAL = {
    "reduce_bucket_size": 500_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
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
    def flat(self) -> list[tuple[list[int], int]]:
        """The shape of what the optimiser steps."""
        return [([self.part], 1)]


def _stage_1_and_2(job: Job, zero: Settings) -> Iterator[Memory]:
    size, part, name = job.itemsize, zero.part, job.config.train.optimizer
    offload = zero.offloads("optimizer")
    bucket = zero.number("reduce_bucket_size")
    sent = min(bucket, job.trained)
    # Two buffers while gradients come (`ipg_buckets`), and one bucket flattened for the others (`allreduce_bucket`).
    buffers = (1 + zero.says("overlap_comm", False)) * bucket * size + sent * size
    on_host = paged(name, zero.flat) if job.gpu else 0
    kept = {"masters": 4 * part, "optimizer": states(name, zero.flat)}
    if offload:
        largest = max((math.prod(shape) for shape, _ in job.footprint.weights.shapes), default=0)
        # The masters' `.grad` lasts; so do what goes back to the device, and a buffer for a gradient on both sides.
        lasting = 4 * part + size * (part + largest) + (size * part if job.accumulates else 0)
        placed, rest = _placed(job, {**kept, "gradients": lasting}), job.at_rest()
        always = replace(placed, weights=rest.weights, trained=rest.trained, buckets=size * largest)
        yield from job.passing(replace(always, buckets=always.buckets + buffers))
        stepping = while_stepping(name, zero.flat, gpu=False)
        yield replace(always, host=always.host + stepping) if job.gpu else replace(always, scratch=stepping)
        return
    always = replace(job.at_rest(), **kept, host=on_host)
    always = replace(always, optimizer=always.optimizer - on_host)
    stepping = while_stepping(name, zero.flat, gpu=job.gpu)
    if job.sums:  # `_build_compact_grad_partition_buffer`, which the step takes as it is
        always = replace(always, gradients=4 * part)
        yield from job.passing(replace(always, buckets=buffers))
        yield replace(always, scratch=stepping)
        return
    # `grads_in_partition`, and of the micro-batches before `all_grad_tensors`; stage 1 keeps those of all weights.
    before = (size * job.trained if zero.stage == 1 else size * part) if job.accumulates else 0
    yield from job.passing(replace(always, buckets=buffers, gradients=size * part + before))
    # Flattened, and then turned to float32.
    yield replace(always, gradients=size * part * 2 + (4 * part if job.half else 0))
    yield replace(always, gradients=size * part + 4 * part, scratch=stepping)


def _stage_3(job: Job, zero: Settings) -> Iterator[Memory]:
    weights, size, part, name = job.footprint.weights, job.itemsize, zero.part, job.config.train.optimizer
    bucket = zero.number("reduce_bucket_size")
    summed = 4 if job.sums else size
    share = math.ceil(weights.frozen_bytes / job.ranks)
    # Small tensors stay whole on the device, beside each rank's part of them; those trained are all of an adapter.
    small = size * weights.small
    copies = min(zero.number("zero_hpz_partition_size"), job.ranks)
    secondary = size * (weights.trained + weights.frozen) // copies if copies > 1 else 0  # ZeRO++: a whole in each node
    masters = 4 * part if job.half or zero.offloads("optimizer") else 0  # of float32 weights they are the weights
    kept = {"masters": masters, "optimizer": states(name, zero.flat), "gradients": summed * part}
    if zero.offloads("optimizer"):
        kept["gradients"] += 4 * part  # the masters' `.grad` lasts
        always = _placed(job, kept)
    else:
        on_host = paged(name, zero.flat) if job.gpu else 0
        always = Memory(**{**kept, "optimizer": kept["optimizer"] - on_host}, host=on_host)
    base = {"weights": share + secondary, "trained": size * part}
    if zero.offloads("param") and job.gpu:
        always = replace(always, host=always.host + sum(base.values()))
    else:
        always = replace(always, **base)
    always = replace(always, weights=always.weights + small, buckets=always.buckets + size * bucket)
    sent = size * min(bucket, weights.trained)  # `reduce_scatter_coalesced` puts a bucket together once more
    yield from job.passing(replace(always, gathered=size * gathered(job, zero), buckets=always.buckets + sent))
    on_gpu = job.gpu and not zero.offloads("optimizer")
    stepping = while_stepping(name, zero.flat, gpu=on_gpu)
    if zero.offloads("optimizer"):
        yield replace(always, host=always.host + stepping) if job.gpu else replace(always, scratch=stepping)
        return
    flattened = always.gradients + summed * part  # `_prepare_fp32_grad_for_sub_group`
    yield replace(always, gradients=flattened + (4 * part if summed == 2 else 0))
    yield replace(always, gradients=always.gradients + 4 * part, scratch=stepping)


def gathered(job: Job, zero: Settings) -> int:
    """Return how many weights are whole on a rank at most: those that will be used again soon are not given up.

    `__params_to_release` looks through what comes in the order of use for `stage3_max_reuse_distance` weights, and
    keeps those that it meets. At the end of the forward pass these are the last layers and the head. Beside them is
    what is being used, and what is fetched before it is needed: once in a buffer, and once taken apart.
    """
    weights = job.footprint.weights
    far = zero.number("stage3_max_reuse_distance")
    head = weights.outside // 2 if weights.outside else 0
    times = 3 if job.found.batch.recompute else 2  # a layer is met again in the backward pass, or when made again
    kept, distance = (head if head < far else 0), 2 * head
    for layer in reversed(weights.layers):
        if distance >= far:
            break
        kept += layer
        distance += times * layer
    fetched = zero.number("stage3_prefetch_bucket_size")
    whole = weights.trained + weights.frozen
    return min(max(kept, max(weights.layers, default=0), head) + 2 * fetched, whole)


def _placed(job: Job, kept: dict[str, int]) -> Memory:
    """What is offloaded: beside a GPU, and in the same memory of a CPU."""
    return Memory(host=sum(kept.values())) if job.gpu else Memory(**kept)
