"""What a run reached is kept where it is certain, under the names by which plans look for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trl.trainer.utils import get_peak_flops

from tunewright.config.compose import compose_config
from tunewright.plan.batch_plan import BatchPlan
from tunewright.plan.device_table import DEVICES
from tunewright.plan.devices import Devices
from tunewright.plan.machine import machine_here
from tunewright.plan.reached import known_here, way_of
from tunewright.trainer.keeping import keep_reached

PLAN = BatchPlan(16, 2, 4, 2)
RECOMPUTE = "train.gradient_checkpointing=false"
QUIET = {"start": 2e11, "end": 1.9e11, "best": 2e11}


def _lines(steps: int, *, each: int = 5) -> list[dict[str, Any]]:
    """Lines of a run whose first step is slow, of 1,600 tokens and a second each afterwards, one line disturbed."""
    lines = [{"step": 1, "step_tokens": 1600, "step_seconds": 9.0, "flops_per_second": 1e10}]
    for step in range(1 + each, steps + 1, each):
        lines.append({"step": step, "step_tokens": 1600 * each, "step_seconds": float(each), "flops_per_second": 8e10})
    lines[-1]["step_seconds"] *= 3
    return [*lines, {"step": steps, "eval_loss": 1.0}]


def test_a_run_is_kept_for_the_next_plan(tmp_path: Path) -> None:
    config = compose_config(["strategy=zero2", RECOMPUTE, f"data.cache_dir={tmp_path}"], None)
    machine = machine_here(Devices("cpu", 0, 2), config)
    way = way_of(config, machine, 100, 1000, recompute=False)
    keep_reached(config, PLAN, (100, 1000), torch.device("cpu"), torch.float32, _lines(21), QUIET)
    found = known_here(config, machine).of(way)
    assert found is not None
    assert found.rate == 1e11
    assert found.points[0].tokens == pytest.approx(1600 / 2 / 2)  # of a rank's micro-batch
    assert found.seconds(400) == pytest.approx(0.5)  # the disturbed line decides nothing
    assert found.seconds(200) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("steps", "peak", "recompute"),
    [
        (21, {"start": 2e11, "end": 1e11, "best": 2e11}, False),  # something else ran
        (6, QUIET, False),
        (21, QUIET, True),  # which was auto: some layers
    ],
)
def test_what_is_not_certain_is_not_kept(
    tmp_path: Path, steps: int, peak: dict[str, float | None], recompute: bool
) -> None:
    config = compose_config(["strategy=zero2", f"data.cache_dir={tmp_path}"], None)
    config.train.gradient_checkpointing = recompute
    keep_reached(config, PLAN, (100, 1000), torch.device("cpu"), torch.float32, _lines(steps), peak)
    assert not (tmp_path / "reached").exists()


def test_a_cache_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "reached").write_text("in the way")
    config = compose_config(["strategy=zero2", RECOMPUTE, f"data.cache_dir={tmp_path}"], None)
    keep_reached(config, PLAN, (100, 1000), torch.device("cpu"), torch.float32, _lines(21), QUIET)


def test_plans_list_the_rates_that_a_run_takes_its_mfu_of() -> None:
    """TRL's table, which a run's MFU is a share of, cannot be asked without importing torch."""
    listed = {device.name: get_peak_flops(device.name.replace("-", " "), "bfloat16") for device in DEVICES}
    # TRL (1.16) gives the A10G an A10's.
    known = {name: rate for name, rate in listed.items() if rate is not None and name != "A10G"}
    assert len(known) >= 20
    assert {device.name: device.rate for device in DEVICES if device.name in known} == known
