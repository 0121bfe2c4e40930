"""Speed is tokens by the clock, and MFU a share of what the machine is known to compute."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from tests.conftest import read_metrics
from tunewright.trainer.peak import Peak, certain
from tunewright.trainer.throughput import Meter

PAUSE = 0.4  # seconds


def test_queued_work_counts_where_it_was_asked_for(small_model: Path, tmp_path: Path) -> None:
    """A thread plays the device: it gets work and goes on with it while nobody waits."""
    queued: list[Future[None]] = []
    model = AutoModelForCausalLM.from_pretrained(small_model)
    meter = Meter(model, torch.device("cpu"), torch.float32, tmp_path, wait=lambda: bool(wait(queued)))
    with ThreadPoolExecutor(1) as device:
        queued.append(device.submit(time.sleep, PAUSE))  # before the first step, as loading is
        meter.fetch()
        started = time.perf_counter()
        for _ in range(3):
            queued.append(device.submit(time.sleep, PAUSE))
            meter.on_step_end()
        trained = meter.take()["step_seconds"]
        assert 3 * PAUSE <= trained <= time.perf_counter() - started
        queued.append(device.submit(time.sleep, PAUSE))  # an evaluation
        meter.start()
        started = time.perf_counter()
        assert meter.take()["step_seconds"] <= time.perf_counter() - started


class OwnClock(TrainerCallback):
    """Times steps from outside, and makes evaluating and saving slow."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.since: float | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.since = self.since or time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs and self.since is not None:
            now = time.perf_counter()
            self.seconds += now - self.since
            self.since = None if control.should_evaluate or control.should_save else now

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        time.sleep(PAUSE)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        time.sleep(PAUSE)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        time.sleep(0.05)  # a step long enough to be timed


def test_tokens_by_the_clock(small_model: Path, train_here: Callable[..., Path]) -> None:
    clock = OwnClock()
    often = ["train.eval_steps=4", "train.save_steps=6", "train.logging_steps=3"]
    few = ["train.max_steps=12", "data.max_samples=24", "train.global_batch_size=2"]
    run = train_here("by-the-clock", "model=folder", f"model.path={small_model}", *often, *few, callbacks=[clock])
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    lines = [line for line in read_metrics(run) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 3, 4, 6, 8, 9, 12]
    assert manifest["step_seconds"] == pytest.approx(clock.seconds, rel=0.1)
    assert manifest["tokens_per_second"] == pytest.approx(manifest["tokens_seen"] / clock.seconds, rel=0.1)

    peak = manifest["peak_flops_per_second"]
    assert peak["best"] >= max(peak["start"], peak["end"]) > 0
    share = certain(peak) and manifest["flops_per_second"] / peak["best"]
    assert manifest["mfu"] == pytest.approx(share)
    assert 0 < manifest["flops_per_second"] < peak["best"]


def test_a_peak_is_certain_where_start_and_end_agree() -> None:
    assert certain({"start": 100.0, "end": 90.0, "best": 110.0}) == 110.0
    assert certain({"start": 90.0, "end": 100.0, "best": 250.0}) == 250.0
    assert certain({"start": 30.0, "end": 100.0, "best": 250.0}) is None
    assert certain({"start": None, "end": None, "best": None}) is None


def test_a_busy_moment_does_not_make_a_run_fast(tmp_path: Path) -> None:
    """The best rate of this machine stays, and while a measurement is far below it nothing is certain."""
    first = Peak(torch.device("cpu"), torch.float32, tmp_path)
    assert first.now is None  # measured once
    (file,) = (tmp_path / "peaks").iterdir()
    told = json.loads(file.read_text())
    assert told["flops_per_second"] == first.start
    file.write_text(json.dumps({**told, "flops_per_second": 1e16}))
    second = Peak(torch.device("cpu"), torch.float32, tmp_path)
    assert second.now is None
    assert second.at_end()["best"] == 1e16
    for unusable in ("{", json.dumps({"flops_per_second": 1e16})):  # the second of an older version
        file.write_text(unusable)
        assert Peak(torch.device("cpu"), torch.float32, tmp_path).now is None
        assert json.loads(file.read_text()).keys() == told.keys()
