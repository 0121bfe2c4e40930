"""The demo's three runs, checked from what they leave behind."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import manifest, read_metrics
from tunewright.launch.demo import time_left

WAYS = {"zero2": ("DEEPSPEED", 2, 2), "zero3": ("DEEPSPEED", 3, 2), "qlora": ("NO", None, 1)}
Result = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def demo(tunewright: Callable[..., Result], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    root = tmp_path_factory.mktemp("demo")
    done = tunewright("demo", "--root", root, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return root, done


@pytest.mark.parametrize("way", WAYS)
def test_each_run_is_what_it_says(demo: tuple[Path, Result], way: str) -> None:
    assert manifest(demo[0] / way)["warnings"] == []
    facts = manifest(demo[0] / way)["distributed"]
    assert (facts["type"], facts["zero_stage"], facts["world_size"]) == WAYS[way]


@pytest.mark.parametrize("way", WAYS)
def test_each_adapter_is_there_whole_and_finite(demo: tuple[Path, Result], way: str) -> None:
    import torch
    from safetensors.torch import load_file

    weights = load_file(demo[0] / way / "final" / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in weights.values()) == manifest(demo[0] / way)["parameters"]["trainable"]
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert all(tensor.any() for name, tensor in weights.items() if "lora_B" in name)  # B begins as zero: it has learnt
    assert (demo[0] / way / "final" / "chat_template.jinja").is_file()


@pytest.mark.parametrize("way", WAYS)
def test_tensorboard_holds_the_curves_and_the_hyperparameters(demo: tuple[Path, Result], way: str) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(demo[0] / way / "tensorboard"))
    events.Reload()
    scalars = events.Tags()["scalars"]
    for figure in ("loss", "learning_rate", "grad_norm", "tokens_per_second", "flops_per_second", "peak_memory_bytes"):
        assert f"train/{figure}" in scalars
    logged = [line["loss"] for line in read_metrics(demo[0] / way) if "loss" in line]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(logged)
    assert logged[-1] < 0.2 * logged[0]
    assert len(events.Scalars("eval/loss")) == len([x for x in read_metrics(demo[0] / way) if "eval_loss" in x])
    hyperparameters = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"train.learning_rate" in hyperparameters
    assert b"method.r" in hyperparameters


def test_held_out_accuracy_rises_in_every_run(demo: tuple[Path, Result]) -> None:
    for way in WAYS:
        result = json.loads((demo[0] / way / "evaluation.json").read_text(encoding="utf-8"))
        assert result["examples"] == result["held_out"] == 80
        low, high = result["tuned"]["interval_95"]
        assert low < result["tuned"]["exact_match"] < high
        assert result["tuned"]["exact_match"] >= result["base"]["exact_match"] + 0.3


def test_the_comparison_is_printed_and_written(demo: tuple[Path, Result]) -> None:
    root, done = demo
    printed = done.stdout
    for row in ("trainable", "world", "steps", "tokens/s", "memory", "loss", "exact match"):
        assert row in printed.lower()
    assert "tensorboard" in printed
    comparison = root.with_name(f"{root.name}-comparison")
    page = (comparison / "comparison.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://", page)
    assert (comparison / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_progress_tells_the_time_left(demo: tuple[Path, Result]) -> None:
    assert re.search(r"step \d+/300  loss .* tokens/s .* \d+:\d\d left", demo[1].stdout)
    assert re.search(r"\[1/4\] ZeRO-2 on two ranks\n", demo[1].stdout)
    assert re.search(r"\[2/4\] .*min left", demo[1].stdout)


def test_the_time_left_is_told_from_what_was_measured_here() -> None:
    assert time_left({}) == ""  # the first part has a time of its own in each line
    fast, slow = time_left({"zero2": 45}), time_left({"zero2": 450})
    assert "about 2.8 min left" in fast
    assert "about 27.5 min left" in slow
    assert "about 0.7 min left" in time_left({"zero2": 90, "zero3": 190, "qlora": 100})  # the answers are left
    assert time_left({"zero2": 90, "zero3": 190, "qlora": 100}, evaluated=True) == ""


def test_a_second_demo_trains_and_asks_nothing_again(demo: tuple[Path, Result], tunewright: Callable[..., Any]) -> None:
    times = {path: path.stat().st_mtime for path in demo[0].glob("*/evaluation.json")}
    done = tunewright("demo", "--root", demo[0])
    assert done.returncode == 0
    assert "step 1/" not in done.stdout
    assert {path: path.stat().st_mtime for path in demo[0].glob("*/evaluation.json")} == times


def test_chat_puts_base_and_tuned_answers_side_by_side(
    demo: tuple[Path, Result], tunewright: Callable[..., Any]
) -> None:
    result = json.loads((demo[0] / "zero2" / "evaluation.json").read_text(encoding="utf-8"))
    row = next(row for row in result["rows"] if row["tuned"] == row["expected"])
    done = tunewright("chat", demo[0] / "zero2", "--prompt", row["prompt"], "--max-new-tokens", "40")
    assert done.returncode == 0, done.stderr
    assert f"tuned | {row['expected']}" in done.stdout
    assert "base  | " in done.stdout


def test_chat_says_what_is_wrong_with_a_run(demo: tuple[Path, Result], tunewright: Callable[..., Any]) -> None:
    done = tunewright("chat", demo[0])
    assert done.returncode == 2
    assert "is not a run folder" in done.stderr
