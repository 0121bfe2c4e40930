"""The GPU kit's own logic: a run that is cut still tells, rows are judged, and the device's gaps are counted right."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tunewright.config.compose import compose_config

REPOSITORY = Path(__file__).resolve().parents[1]
# Scripts, which find each other beside them; last, so that they hide nothing else.
sys.path += [str(REPOSITORY / "bench" / "gpu"), str(REPOSITORY / "bench")]
cells, check, timeline = map(importlib.import_module, ("cells", "check", "timeline"))


def row(number: int, name: str, losses: list[float], **more: Any) -> dict[str, Any]:
    return {
        "number": number,
        "name": name,
        "group": "8b LoRA, 4k",
        "contender": name.partition(",")[0],
        "method": "lora",
        "packed": False,
        "losses": losses,
        "grad_norms": [1.0] * len(losses),
        "tokens": [100] * len(losses),
        "tokens_per_second": 1000.0 / (number + 1),
        "tflops": 100.0,
        "mfu": 0.5,
        **more,
    }


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_every_cell_can_be_told_from_the_others() -> None:
    for part in cells.PARTS.values():
        assert len({(cell.group, cell.name) for cell in part}) == len(part)
    assert {cell.lever for cell in cells.SPEED} == {(), *cells.LEVERS}
    assert {cell.lever for cell in cells.MORE} == {(), *cells.MORE_LEVERS, *cells.FULL_LEVERS}


def test_every_lever_is_a_setting_that_exists() -> None:
    for cell in cells.SPEED + cells.OTHERS + cells.MORE:
        compose_config([one for one in cell.lever if one != cells.BLOCKING])


def test_a_lever_whose_package_is_not_there_is_told_and_is_no_failure(tmp_path: Path) -> None:
    cell = next(cell for cell in cells.MORE if cell.lever == ("train.attention_kernel=flash3",))
    assert cells.cannot(cell.lever, gpu=False) == "needs a GPU"
    assert cells.cannot(cell.lever, gpu=True) == "flash_attn_interface is not installed"
    skipped = {"number": 1, **cell.as_json(), "skipped": cells.cannot(cell.lever, gpu=True)}
    write(tmp_path / "levers.jsonl", [row(0, "tunewright", [11.8, 11.5]), skipped])
    text = check.report(tmp_path, {}, {})
    assert "| tunewright, train.attention_kernel=flash3 | | | | | | | not measured: flash_attn_interface is not" in text
    assert check.holds(tmp_path)


def test_a_run_that_was_cut_tells_what_it_had_done(tmp_path: Path) -> None:
    planned = {"planned_gib": 21.0, "peak_allocated_gib": 20.0, "planned_tokens_per_second": 900.0}
    done = row(0, "tunewright", [11.8, 11.5], **planned)
    begun = {"number": 1, "name": "TRL, defaults", "group": "8b LoRA, 4k", "contender": "TRL, defaults", "begun": True}
    write(tmp_path / "speed.jsonl", [{**done, "begun": True}, done, begun])
    write(tmp_path / "smoke.jsonl", [{"name": "kernel a", "ok": True, "error": 0.001}])
    text = check.report(tmp_path, {"gpu": "one"}, {"speed": "cut after 230 s"})
    assert "- speed: cut after 230 s" in text
    assert "| tunewright | 1,000 | 100.0 | 50.0% |" in text
    assert "| TRL, defaults | | | | | | | did not end: a crash, or its time was up |" in text
    assert "8b LoRA, 4k, tunewright: 21.0 GiB planned, 20.0 allocated, +5%; 900 tokens/s planned" in text
    assert "1 of 1 checks hold" in text
    assert check.holds(tmp_path)


def test_a_cell_that_learnt_something_else_is_void_and_the_kit_fails(tmp_path: Path) -> None:
    rows = [
        row(0, "tunewright", [11.8, 12.9]),
        row(1, "TRL, defaults", [11.8, 11.5]),
        row(2, "loop by hand", [11.8, 11.5]),
    ]
    write(tmp_path / "speed.jsonl", rows)
    write(tmp_path / "smoke.jsonl", [{"name": "kernel a", "ok": True, "error": 0.001}])
    text = check.report(tmp_path, {}, {})
    assert "void: loss 12.900 instead of 11.500 at step 2" in text
    assert not check.holds(tmp_path)


def test_a_failed_check_fails_the_kit(tmp_path: Path) -> None:
    write(tmp_path / "smoke.jsonl", [{"name": "kernel a", "ok": False, "problem": "CUDA error"}])
    assert "**kernel a**: CUDA error" in check.report(tmp_path, {}, {})
    assert not check.holds(tmp_path)


def test_the_device_waits_where_no_kernel_runs() -> None:
    worked, gaps = timeline.busy([(5.0, 7.0), (0.0, 2.0), (1.0, 3.0), (7.0, 8.0)])
    assert worked == pytest.approx(6.0)
    assert gaps == [(3.0, 2.0)]


def run_script(name: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "bench" / "gpu" / name), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})


def test_a_machine_without_a_gpu_is_told_so(tmp_path: Path) -> None:
    done = run_script("check.py", "--out", tmp_path / "out")
    assert done.returncode == 2, done.stderr
    assert "sees no GPU here" in done.stdout
    assert not (tmp_path / "out").exists()


def test_the_calls_that_only_a_gpu_reaches_fit_the_installed_versions() -> None:
    done = run_script("signatures.py")
    assert done.returncode == 0, done.stdout + done.stderr
