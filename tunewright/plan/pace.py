"""How long a step takes: what is computed by the rate that a device reaches, beside what ranks send each other.

    compute = FLOPs of a micro-batch x (1 + what is recomputed) / (rate of the best product x share of it reached)
    a step  = micro-batches x (compute, with what hides behind it) + what nothing hides + the optimiser

The share is that of runs on this machine, of the way to train that is nearest to the one in question; else that of
`docs/benchmarks.md` and of published runs. What was seen of the very same way to train stands in place of all of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import DictConfig

from tunewright.config.method_schema import PROMPT_LEARNING
from tunewright.plan.batch_plan import BatchPlan, planned_steps
from tunewright.plan.footprint import Footprint, Pass, Weights
from tunewright.plan.machine import Machine
from tunewright.plan.option import Pace
from tunewright.plan.reached import Known, Reached, Way, known_here, way_of
from tunewright.plan.support import PARTITIONED
from tunewright.plan.traffic import Traffic, traffic_of

# Shares of the best matrix product, of FLOPs that a method needs. On a CPU those of bench/results/train.json (39 M
# weights, bfloat16, short rows). On a GPU: full fine-tuning as published for large models (Grattafiori et al. 2024,
# arXiv 2407.21783, table 4: 38 to 43 % on H100); adapters and 4 bits by how much less they reach on a CPU.
SHARES = {
    "cpu": {"lora": 0.36, "ia3": 0.36, "qlora": 0.36, "full": 0.42, "freeze": 0.42, "prompt": 0.17},
    "gpu": {"lora": 0.35, "ia3": 0.35, "qlora": 0.28, "full": 0.4, "freeze": 0.4, "prompt": 0.2},
}
OTHER = 0.3  # a plug-in's method
# FLOP/s of a rank where nothing has run yet and no table helps: a core with AVX2, and a GPU of 2022.
GUESSED = {"cpu": 50e9, "gpu": 100e12}
# On a GPU each pass over a layer starts some fifty kernels, by Python, at about ten microseconds each.
LAYER_START = 5e-4
# Of the shorter of computing and gathering, what hides behind the longer under ZeRO-3: DeepSpeed prefetches so few
# weights with transformers' `stage3_prefetch_bucket_size` (0.9 x width squared) that it is about one matrix ahead.
HIDDEN = 0.5
# Seconds of DeepSpeed's hooks before and after a module in one pass, and how many modules a layer has: with nothing
# split, 600 modules of 10 layers with LoRA cost 0.33 s of a step of one micro-batch (docs/benchmarks.md, ZeRO-3).
HOOK, MODULES, MODULES_LORA = 2.7e-4, 20, 60


@dataclass(frozen=True)
class Speed:
    """The rate that a rank reaches."""

    rate: float  # FLOP/s of the best product
    share: float  # of it
    reason: str
    nearest: Reached | None = None  # the run that the share is of


def pace_of(
    config: DictConfig,
    footprint: Footprint,
    found: Pass,
    plan: BatchPlan,
    machine: Machine,
    *,
    rows: int | None = None,
    tokens: int | None = None,
    price: float | None = None,
    known: Known | None = None,
) -> Pace:
    """Return how fast a configuration is expected to be on a machine's `plan.world_size` ranks.

    Args:
        found: one micro-batch that was looked at; others are taken for as costly a token.
        rows: rows (or packs) of an epoch, and the tokens of all of them; without these every row is as long as those of
            `found`, and a run has as many steps as `train.max_steps` says.
        price: of one device for an hour.
        known: what was seen on this machine, where it has been read already (`reached.known_here`).
    """
    machine = machine.of(plan.world_size)
    known = known_here(config, machine) if known is None else known
    weights, batch = footprint.weights, found.batch
    row = tokens / rows if rows and tokens else float(batch.length)
    step = float(plan.tokens) if plan.tokens else (plan.global_batch or 1) * row
    micro = step / plan.world_size / plan.accumulation  # tokens of a rank's micro-batch
    token_flops = found.flops / (batch.rows * batch.length)
    way = way_of(config, machine, weights.trained, weights.trained + weights.frozen, recompute=batch.recompute)
    traffic = traffic_of(config, weights, machine, batch.recompute)
    seen = known.of(way)
    if seen:
        seconds = seen.seconds(micro) * plan.accumulation
        compute = max(seconds - traffic.total(plan.accumulation), 0.0)
        reason = "measured here" if seen.measured else "as fast as a run here was"
    else:
        speed = _speed(way, machine, known)
        compute = _compute(token_flops * micro, weights, machine, speed, batch.recompute)
        if speed.nearest and speed.nearest.way.ranks == way.ranks and speed.nearest.way.strategy == way.strategy:
            seconds = compute * plan.accumulation  # what was sent is in the share already
        else:
            seconds = _step(compute, plan.accumulation, traffic, weights, way, on_cpu=machine.kind == "cpu")
        compute, reason = compute * plan.accumulation, speed.reason
    known_steps = rows is not None or bool(config.train.max_steps)
    return Pace(
        steps=planned_steps(config, plan, rows or 0, tokens or 0).total if known_steps else None,
        tokens_per_step=step,
        flops_per_step=token_flops * step,
        compute_seconds=compute,
        communication_seconds=traffic.total(plan.accumulation),
        seconds=seconds,
        reason=reason,
        price=price * machine.count if price is not None else None,
    )


def _speed(way: Way, machine: Machine, known: Known) -> Speed:
    rate, whose, kind = machine.rate, "listed", "cpu" if machine.kind == "cpu" else "gpu"
    if kind == "cpu":
        rate, whose = known.rate(way.dtype, machine.count), "measured here"
    nearest = known.nearest(way)
    if rate is None and nearest and nearest.rate:
        # However many ranks a CPU has, all of them share its cores.
        share = nearest.way.ranks / way.ranks if kind == "cpu" else 1.0
        rate, whose = nearest.rate * share, "of a run here"
    elif rate is None:
        rate, whose = GUESSED[kind], "guessed"
    told = f"{rate / 1e12:.3g} TFLOP/s a rank ({whose})"
    if nearest and nearest.share:
        run = nearest.way
        as_run = f"{nearest.share:.0%} of {told}, as {run.method} under {run.strategy} reached here"
        return Speed(rate, nearest.share, as_run, nearest)
    shares = SHARES[kind]
    share = shares.get("prompt" if way.method in PROMPT_LEARNING else way.method, OTHER)
    return Speed(rate, share, f"{share:.0%} of {told}, which docs/planning.md takes where nothing has run")


def _compute(flops: float, weights: Weights, machine: Machine, speed: Speed, recompute: bool) -> float:
    """Return the seconds that a rank computes for a micro-batch of so many FLOPs.

    A forward pass is 2 of the 4 FLOPs of a frozen weight, or of the 6 of a trained one; what recomputes are layers.
    """
    whole = weights.trained + weights.frozen
    again = 0.0
    if recompute and not (speed.nearest and speed.nearest.way.recompute):
        again = sum(weights.layers) / whole * 2 / (4 + 2 * weights.trained / whole)
    seconds = flops * (1 + again) / (speed.rate * speed.share)
    if machine.kind == "cpu" or not machine.bandwidth:
        return seconds
    passes = 3 if recompute else 2
    read = passes * (weights.frozen_bytes + weights.trained * weights.itemsize) / machine.bandwidth
    return max(seconds, read, passes * len(weights.layers) * LAYER_START)


def _step(compute: float, micro_batches: int, traffic: Traffic, weights: Weights, way: Way, *, on_cpu: bool) -> float:
    """Return the seconds of a step whose micro-batches compute for so long."""
    if way.strategy in PARTITIONED:
        modules = MODULES_LORA if way.method in ("lora", "qlora") else MODULES
        hooks = HOOK * modules * len(weights.layers) * (3 if way.recompute else 2)
        busy = compute + hooks if on_cpu else max(compute, hooks)  # a GPU computes while Python goes on
        longer, shorter = max(busy, traffic.micro_hidden), min(busy, traffic.micro_hidden)
        return micro_batches * (longer + (1 - HIDDEN) * shorter) + traffic.exposed + traffic.update
    backward = compute / 2
    each = compute + max(traffic.micro_hidden - backward, 0.0)
    return micro_batches * each + max(traffic.step_hidden - backward, 0.0) + traffic.exposed + traffic.update
