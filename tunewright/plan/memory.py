"""How many bytes one rank needs on its device: the fullest moment of a step, from the second one on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from omegaconf import DictConfig

from tunewright.config.schema import Launcher
from tunewright.plan import zero_memory
from tunewright.plan.batch_plan import BatchPlan
from tunewright.plan.footprint import Footprint, Pass
from tunewright.plan.held import Job, Memory
from tunewright.plan.machine import Machine
from tunewright.plan.optimizer_memory import paged, states, while_stepping

MIB = 2**20
# The device's own, before the first tensor: CUDA's context with PyTorch's kernels (426 MiB on an RTX 6000 Ada with
# PyTorch 2.10, unsloth-zoo pull request 1053) and cuBLAS's workspace; of a CPU rank the interpreter and libraries.
CONTEXT = {"cuda": 600 * MIB, "rocm": 700 * MIB, "cpu": 650 * MIB}
# Buffers of NCCL's channels: 1.06 GB with the context, on each of eight H100 (NVIDIA/nccl issue 1685).
COMMUNICATOR = 400 * MIB
SLACK = 0.05  # of what comes and goes, that PyTorch's allocator on a GPU cannot use: it keeps blocks of several sizes
DDP_BUCKET = 25 * MIB  # of gradients that DDP sends at once (PyTorch's `bucket_cap_mb`)


def memory_of(config: DictConfig, footprint: Footprint, found: Pass, plan: BatchPlan, machine: Machine) -> Memory:
    """Return what a rank needs at its fullest moment, once the optimiser has its states: from the second step on.

    Args:
        found: the largest micro-batch, one of `footprint.passes`.
        plan: of the same micro-batch size.
    """
    job = Job(config, footprint, found, plan.world_size, plan.accumulation > 1, machine.kind != "cpu")
    launcher = config.strategy.launcher
    if launcher is Launcher.deepspeed:
        held = zero_memory.moments(job)
    else:
        held = _replicated(job, ddp=launcher is Launcher.ddp and job.ranks > 1)
    fullest = max(held, key=lambda memory: memory.needed)
    passing = fullest.activations + fullest.head + fullest.scratch + fullest.gathered + fullest.gradients
    context = CONTEXT[machine.kind] + (COMMUNICATOR if job.gpu and job.ranks > 1 else 0)
    return replace(fullest, slack=int(SLACK * passing) if job.gpu else 0, context=context)


def _replicated(job: Job, *, ddp: bool) -> Iterator[Memory]:
    """One device, or DDP: every rank has all of it. See `trainer/master_weights.py`."""
    shapes, name = job.footprint.weights.shapes, job.config.train.optimizer
    on_host = paged(name, shapes) if job.gpu else 0
    always = replace(
        job.at_rest(),
        masters=4 * job.trained if job.half else 0,
        optimizer=states(name, shapes) - on_host,
        buckets=job.itemsize * job.trained if ddp else 0,  # DDP's gradients are views of its buckets
        host=on_host,
    )
    if job.sums:
        # The masters hold the sums of the micro-batches before. DDP's last micro-batch turns a bucket to float32.
        wide = min(DDP_BUCKET, job.itemsize * job.trained) * 4 // job.itemsize if ddp else 0
        summed = replace(always, gradients=4 * job.trained)
        yield from job.passing(summed, once=replace(summed, gradients=summed.gradients + wide))
    elif job.accumulates:
        # In the weights' `.grad`, from where DDP's last micro-batch moves them to its buckets.
        yield from job.passing(replace(always, gradients=job.itemsize * job.trained))
    else:
        yield from job.passing(always, bytes_of_gradient=0 if ddp else job.itemsize)
    stepping = while_stepping(name, shapes, gpu=job.gpu)
    if job.half:
        handed_over = 0 if ddp or job.sums else job.itemsize * job.trained  # until the masters have them
        yield replace(always, gradients=4 * job.trained + handed_over)
    yield replace(always, gradients=0 if ddp and not job.half else 4 * job.trained, scratch=stepping)
