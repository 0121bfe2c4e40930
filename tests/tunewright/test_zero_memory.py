"""What DeepSpeed holds that no run on a CPU is large enough to show."""

from __future__ import annotations

import json
from pathlib import Path

from tunewright.config.compose import compose_config
from tunewright.plan.batch_plan import batch_plan
from tunewright.plan.footprint import Batch, Footprint, Moment, Pass, Weights
from tunewright.plan.machine import parse_machine
from tunewright.plan.memory import memory_of

RANKS, LAYER, LAYERS = 16, 97_664 * 8192, 80


def _held(*overrides: str) -> int:
    trained = LAYER * LAYERS
    weights = Weights(
        trained=trained,
        frozen=0,
        frozen_bytes=0,
        itemsize=2,
        layers=[LAYER] * LAYERS,
        outside=0,
        small=0,
        hidden=8192,
        shapes=[([97_664, 8192], LAYERS)],
    )
    found = Pass(Batch(1, 64, False, True), [Moment(1_000_000, 0)], 1e12)
    config = compose_config(["method=full", f"cluster.num_processes={RANKS}", *overrides])
    plan = batch_plan(config.train, RANKS)
    return memory_of(config, Footprint("cuda", weights, [found]), found, plan, parse_machine("2x8xH100")).gradients


def test_zero3_steps_one_group_of_weights_after_the_other(tmp_path: Path) -> None:
    """DeepSpeed's `sub_group_size` is a billion: the gradients of so many weights are flat, and float32, at once."""
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"zero_optimization": {"stage": 3, "sub_group_size": 10**12}}))
    whole = _held("strategy=zero3", f"strategy.deepspeed={own}")
    part = LAYER * LAYERS // RANKS
    assert whole == (2 + 2 + 4) * part
    assert _held("strategy=zero3") == 2 * part + (2 + 4) * (10**9 + LAYER // RANKS)
