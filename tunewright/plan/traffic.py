"""What ranks send each other, and to the host's memory, in an optimiser step: bytes and seconds, by strategy.

A collective of B bytes over n ranks in a ring takes, at s bytes/s of each rank (NVIDIA/nccl-tests, PERFORMANCE.md),

    all-gather, reduce-scatter   (n - 1) / n x B / s
    all-reduce                   both of them, 2 (n - 1) / n x B / s

Over several hosts each of these bytes also crosses the network between hosts once: the slower of the two counts.

What is sent when is read from the libraries: DDP in accelerate 1.15 (gradients once a step), DeepSpeed 0.19.8's
`stage_1_and_2.py` (an all-reduce of each bucket, `use_multi_rank_bucket_allreduce`; at stage 2 for each micro-batch,
then an all-gather of what was updated) and `partitioned_param_coordinator.py` (stage 3: which weights are let go of
after use and gathered again). The paper (Rajbhandari et al. 2020, arXiv 1910.02054, section 7) has the same volumes.
"""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import DictConfig

from tunewright.config.deepspeed_file import DeepSpeedFile, deepspeed_file
from tunewright.config.schema import Launcher
from tunewright.plan.device_table import GB
from tunewright.plan.footprint import Weights
from tunewright.plan.machine import Machine
from tunewright.plan.support import PARTITIONED, known_strategy

BUCKET = 25 * 2**20  # bytes of gradients that DDP sends at once (torch's `bucket_cap_mb`)
REUSE = 1e9  # weights: DeepSpeed's default for `stage3_max_reuse_distance`
# Bytes that a step of AdamW reads and writes for a weight: float32 weight, gradient and two moments, the weight's copy.
UPDATE_BYTES = 30
HOST_UPDATE = 20 * GB  # bytes/s of a rank that does so in host memory


@dataclass(frozen=True)
class Traffic:
    """Seconds of one rank; what can hide does so behind the computation of a micro-batch."""

    micro_hidden: float  # of each micro-batch, beside its computation: what ZeRO-3 gathers, what ZeRO-2 reduces
    step_hidden: float  # once a step, beside the last micro-batch's backward pass: DDP's and ZeRO-1's gradients
    exposed: float  # once a step, when nothing else runs: updated weights, the last bucket, what lies in host memory
    update: float  # of the optimiser; no communication

    def total(self, micro_batches: int) -> float:
        """Return the communication of a step."""
        return self.micro_hidden * micro_batches + self.step_hidden + self.exposed


def traffic_of(config: DictConfig, weights: Weights, machine: Machine, recompute: bool) -> Traffic:
    """Return what each rank of a machine sends under a configuration's strategy."""
    strategy, ranks = known_strategy(config), machine.count
    trained = weights.trained * weights.itemsize  # bytes: gradients have the format of the weights
    reduce = _seconds(trained, machine) * 2
    file = deepspeed_file(config) if config.strategy.launcher is Launcher.deepspeed else None
    stage = file.stage if file else 0
    share = weights.trained / (ranks if file else 1)  # of the optimiser's states
    update = share * UPDATE_BYTES / (machine.bandwidth or HOST_UPDATE)
    exposed = _seconds(trained, machine) if 0 < stage < 3 else 0.0
    to_host = 0.0
    if file and file.offloads:
        to_host = share * weights.itemsize / (machine.host_link or HOST_UPDATE)
        update = share * UPDATE_BYTES / HOST_UPDATE
        exposed += to_host
    if ranks == 1 and not to_host:
        return Traffic(0.0, 0.0, 0.0, update)
    if strategy in PARTITIONED:
        assert file is not None
        return Traffic(_gathers(weights, machine, recompute, file) + reduce / 2 + to_host, 0.0, exposed, update)
    if stage == 2:
        return Traffic(reduce + to_host, 0.0, exposed, update)
    last = reduce * min(BUCKET / max(trained, 1), 1.0)  # what is known when the backward pass ends hides behind nothing
    return Traffic(0.0, reduce - last, exposed + last, update)


def gathered(weights: Weights, *, recompute: bool, reuse: float = REUSE) -> float:
    """Return how many weights ZeRO-3 gathers for the forward and backward pass of a micro-batch.

    DeepSpeed keeps a weight after its use if it comes again within `reuse` weights of other modules. So the last ones
    of the forward pass are still there in the backward pass, which runs the other way; and what a layer gathers to
    recompute is still there for its backward pass, as far as the layer is not too large for it.
    """
    whole = weights.trained + weights.frozen - weights.small
    kept = min(whole, reuse / (3 if recompute else 2))  # between two uses at the turn lie twice, or thrice, as many
    again = sum(max(layer - reuse / 2, 0.0) for layer in weights.layers) if recompute else 0.0
    return 2 * whole - kept + again


def _gathers(weights: Weights, machine: Machine, recompute: bool, file: DeepSpeedFile) -> float:
    """Return the seconds of a micro-batch's gathers under ZeRO-3."""
    reuse = float(file.get("zero_optimization.stage3_max_reuse_distance") or REUSE)
    count = gathered(weights, recompute=recompute, reuse=reuse)
    size = weights.frozen_bytes / weights.frozen if weights.frozen else float(weights.itemsize)  # bytes of a weight
    from_host = 0.0
    if file.get("zero_optimization.offload_param.device") == "cpu":
        from_host = count * size / machine.count / (machine.host_link or HOST_UPDATE)
    if file.strategy == "zeropp":
        # Weights travel in 8 bits, and between hosts for the forward pass alone: each host has a copy for the backward
        # pass (Wang et al. 2023, arXiv 2306.10209, section 3).
        node = machine.of(min(machine.node, machine.count))
        return _seconds(count / 2, machine) + _seconds(count / 2 * size, node) + from_host
    return _seconds(count * size, machine) + from_host


def _seconds(size: float, machine: Machine) -> float:
    """Return the seconds of an all-gather or a reduce-scatter of so many bytes over all ranks."""
    ranks, hosts = machine.count, machine.hosts
    inside = (ranks - 1) / ranks * size / machine.link if machine.link else 0.0
    between = (hosts - 1) / hosts * size / machine.network if hosts > 1 and machine.network else 0.0
    return max(inside, between)
