"""`plan --measure`: a real run of the largest micro-batch, of which nothing stays but what was seen."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from omegaconf import DictConfig

from tests.conftest import TIMEOUT
from tunewright.config.compose import compose_config
from tunewright.launch.trial import measure
from tunewright.plan.batch_plan import batch_plan
from tunewright.plan.devices import find_devices
from tunewright.plan.footprint import Batch, Footprint, Pass, Weights
from tunewright.plan.held import Memory
from tunewright.plan.machine import machine_here
from tunewright.plan.pace import pace_of
from tunewright.plan.reached import known_here

CUTOFF, MICRO = 160, 2
FOOTPRINT = Footprint(
    "cpu",
    Weights(100_000, 5_000_000, 20_000_000, 4, [1_000_000] * 4, 1_000_000, 0, 256, []),
    [Pass(Batch(MICRO, CUTOFF, False, False), [], 6e9)],
)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def configured(model: Path, folder: Path) -> DictConfig:
    overrides = [f"train.micro_batch_size={MICRO}", f"data.cutoff_len={CUTOFF}", f"output_root={folder}/runs"]
    overrides += ["strategy=single", "train.gradient_checkpointing=false"]
    overrides += ["model=folder", f"model.path={model}", f"data.cache_dir={folder}/cache", "data.eval_size=0.2"]
    return compose_config([*overrides, "train.global_batch_size=8"], None)


def test_steps_are_measured_and_kept(
    tiny_model: Path, tmp_path: Path, temporary: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config, devices = configured(tiny_model, tmp_path), find_devices()
    machine, found = machine_here(devices, config), FOOTPRINT.passes[0]
    planned = Memory(weights=20_000_000, context=600_000_000)
    before = config.copy()
    seen = measure(config, FOOTPRINT, found, planned, machine, devices, mean=60.0)

    assert config == before
    largest, average = seen.points
    assert largest.tokens == MICRO * CUTOFF
    assert 0.2 * largest.tokens < average.tokens < 0.9 * largest.tokens
    assert 0 < average.seconds < largest.seconds
    assert largest.flops > average.flops > 0
    assert seen.memory is not None
    assert 0.5 < seen.memory < 5
    assert known_here(config, machine).of(seen.way) == seen
    plan = batch_plan(config.train, 1)
    pace = pace_of(config, FOOTPRINT, found, plan, machine, rows=100, tokens=100 * CUTOFF)
    assert pace.reason == "measured here"
    assert pace.seconds == pytest.approx(4 * largest.seconds)
    assert not (tmp_path / "runs").exists()
    assert list(temporary.iterdir()) == []
    assert capfd.readouterr().out == ""


def test_a_measurement_that_is_stopped_leaves_nothing(tiny_model: Path, tmp_path: Path, temporary: Path) -> None:
    config, devices = configured(tiny_model, tmp_path), find_devices()

    def stop() -> None:
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline and not any(temporary.glob("*/runs/measuring/metrics.jsonl")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=stop)
    thread.start()
    machine = machine_here(devices, config)
    with pytest.raises(KeyboardInterrupt):
        measure(config, FOOTPRINT, FOOTPRINT.passes[0], Memory(weights=20_000_000), machine, devices, mean=60.0)
    thread.join()
    assert list(temporary.iterdir()) == []
    assert known_here(config, machine).records == []
