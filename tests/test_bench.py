"""The training bench's own logic: what it reads, which rows are void, which ratios fell. Nothing here is timed."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from tunewright.trainer.flops import FlopCounter

REPOSITORY = Path(__file__).resolve().parents[1]
# The files of bench/ are scripts, which find each other beside them; last, so that they hide nothing else.
sys.path.append(str(REPOSITORY / "bench"))
contenders, judge, measure, pace, report, train, workload = map(
    importlib.import_module, ("contenders", "judge", "measure", "pace", "report", "train", "workload")
)
Step = judge.Step

REFERENCE = [Step(9.70, 1.2), Step(9.40, 1.1), Step(9.00, 1.0)]


def job(tmp_path: Path, **changes: Any) -> workload.Job:
    settings = dict.fromkeys(("model", "rows", "registry"), "/nowhere") | {"out": str(tmp_path), "method": "lora"}
    settings |= {"strategy": "single", "ranks": 1, "steps": 3, "batch": 8, "pack": 1600, "learning_rate": 0.01}
    return workload.Job(**{**settings, "seed": 42, **changes})


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        (REFERENCE, None),
        ([Step(9.71, 0.4), Step(9.45, 1.1), Step(9.05, 1.0)], None),
        ([Step(9.70, 0.0), *REFERENCE[1:]], "a gradient norm is zero"),
        ([Step(9.70, float("nan")), *REFERENCE[1:]], "not finite"),
        ([Step(float("inf"), 1.0), *REFERENCE[1:]], "not finite"),
        ([Step(9.60, 1.2), *REFERENCE[1:]], "loss 9.600 instead of 9.700 at step 1"),
        ([*REFERENCE[:2], Step(9.70, 1.0)], "loss 9.700 instead of 9.000 at step 3"),
        (REFERENCE[:2], "2 steps instead of 3"),
        ([*REFERENCE[:2], Step(9.00, 1.0, tokens=4000)], "4,000 tokens instead of 5,000"),
        ([], "no step"),
    ],
)
def test_a_row_is_void_when_it_did_not_do_the_same_work(steps: list[Step], reason: str | None) -> None:
    found = judge.void_reason(steps, REFERENCE, 3, 5000, same_rows=True)
    assert (found is None) if reason is None else (found is not None and reason in found)


def test_a_packed_row_is_judged_by_its_mean_and_its_tokens() -> None:
    packed = [Step(9.70, 1.0, 1700), Step(9.50, 1.0, 3400), Step(9.2, 1.0, 4900), Step(9.0, 1.0, 5000)]
    assert judge.void_reason(packed, REFERENCE, 3, 5000, same_rows=False) is None
    asleep = [Step(9.70, 1.0, 2500), Step(9.70, 1.0, 5000)]
    assert "mean loss" in str(judge.void_reason(asleep, REFERENCE, 3, 5000, same_rows=False))


def test_a_failed_command_is_void() -> None:
    assert judge.void_reason(REFERENCE, REFERENCE, 3, 5000, same_rows=True, exit_code=1) == "exited with 1"


def test_speed_counts_tokens_after_the_warm_up() -> None:
    assert judge.speed([10.0, 11.0, 13.0, 15.0], [100, 100, 300, 500], warmup=2) == pytest.approx(200.0)


def test_a_packed_run_counts_its_own_tokens() -> None:
    load = workload.Workload(Path(), [100, 300], [50, 100], 90, 500)
    packed = [Step(9.0, 1.0, 150), Step(9.0, 1.0, 400)]
    assert train.tokens_of(packed, load, same_rows=True) == [100, 300]
    assert train.tokens_of(packed, load, same_rows=False) == [150, 250]
    assert train.tokens_of([Step(9.0, 1.0)] * 4, load, same_rows=False) == [100] * 4


def test_steps_are_read_from_what_each_contender_writes(tmp_path: Path) -> None:
    log = 'Loading\nBENCH {"step": 1, "loss": 9.7, "grad_norm": 1.5, "num_tokens": 800.0}\n{\'loss\': 9.7}\n'
    script = contenders.scripts()[0]
    assert script.steps(job(tmp_path), log) == [Step(9.7, 1.5, 800.0)]
    assert [script.is_step(line) for line in log.splitlines()] == [False, True, False]
    run = tmp_path / "run"
    run.mkdir()
    lines = [{"loss": 9.7, "grad_norm": 1.5, "tokens_seen": 800}, {"eval_loss": 9.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ours = contenders.tunewright()
    assert ours.steps(job(tmp_path), "") == [Step(9.7, 1.5, 800)]
    assert ours.is_step("  step 1/8  loss 9.7031  grad norm 1.52  1,700 tokens/s  0:04 left\n")
    history = [{"loss": 9.7, "grad_norm": 1.5}, {"train_runtime": 3.0}]
    (run / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    peer = contenders.llamafactory("/peer/bin/python")
    assert peer.steps(job(tmp_path), "") == [Step(9.7, 1.5)]
    assert peer.argv(job(tmp_path))[0] == "/peer/bin/llamafactory-cli"
    assert peer.cannot("prompt_tuning", "single")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_peers_are_credited_with_what_a_run_of_ours_says(method: str) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = workload.SMALL
    model: Any = Qwen2ForCausalLM(Qwen2Config(**shape))
    if method == "lora":
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    counter = FlopCounter(model)
    with counter.watching():
        model(input_ids=torch.zeros(1, 3, dtype=torch.long))
    assert counter.flops is not None
    assert workload.credited_flops(shape, method, 10, 4, rank=4) == pytest.approx(counter.flops.of(10, 4), rel=2e-3)


def result(rate: float, void: str | None = None) -> dict[str, Any]:
    names = {"tunewright": rate, "TRL, defaults": 100.0}
    rows = [{"name": name, "tokens_per_second": {"median": speed}, "void": None} for name, speed in names.items()]
    rows[0]["void"] = void
    return {"cells": [{"method": "lora", "rows": "short", "strategy": "single", "contenders": rows}]}


def test_what_a_contender_cannot_do_is_said_and_is_no_failure() -> None:
    refused = {"name": "tunewright", "cannot": contenders.tunewright().cannot("qlora", "zero3"), "void": None}
    assert "| cannot: each rank would hold the 4-bit weights whole |" in report.table({"contenders": [refused]})
    cell = {**result(1)["cells"][0], "contenders": [refused]}
    assert report.falls({"cells": [cell]}, result(700)) == []


def test_a_ratio_that_fell_by_more_than_a_seventh_is_told() -> None:
    assert report.falls(result(660), result(750)) == []
    assert report.falls(result(600), result(750)) == [
        "lora, short rows, single, TRL, defaults: 6.00 x now, 7.50 x before (-20%)"
    ]
    assert "own row is void" in report.falls(result(750, void="a gradient norm is zero"), result(750))[0]


@pytest.mark.parametrize(
    ("others", "steal", "yard_stick", "told"),
    [
        (1.9, 0.3, 91.0, None),
        (3.0, 0.0, 100.0, "other processes took 15% of the machine"),
        (0.0, 0.6, 100.0, "the host took 3% of the machine"),
        (0.0, 0.0, 89.0, "a matrix product beside it ran at 89% of its best rate"),
    ],
)
def test_a_run_beside_which_something_else_ran_is_told(
    others: float, steal: float, yard_stick: float, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "CORES", 2)
    watched = measure.Watched(0, wall_s=10.0, others_cpu_s=others, steal_s=steal)
    runs = train.Runs(contenders.scripts()[0], [watched], [REFERENCE], [yard_stick])
    assert runs.disturbances(100.0) == [told]


def test_a_disturbed_ratio_is_not_compared() -> None:
    new = result(600)
    new["cells"][0]["contenders"][1]["disturbed"] = "the host took 9% of the machine"
    assert report.falls(new, result(750)) == []
    assert report.marked(new) == ["lora, short rows, single, TRL, defaults: the host took 9% of the machine"]


def test_the_pages_show_the_committed_result() -> None:
    """`python bench/report.py docs` writes both."""
    found = json.loads(report.RESULT.read_text(encoding="utf-8"))
    assert report.marked(found) == []
    for page, text in ((report.PAGE, report.section(found)), (report.README, report.readme_table(found))):
        assert page.read_text(encoding="utf-8") == report.between(page, text)


def test_a_measured_plan_is_shown_beside_the_run() -> None:
    """And where a result is committed, the page on planning shows that one."""
    cell = {"cell": "39m, lora, zero3", "listed": 900.4, "planned": 1190.0, "seen": 1400.0, "when": "2026-11-28"}
    machine = {"cpu": "AMD EPYC", "cores": 2, "memory_gib": 24}
    shown = pace.section({"machine": machine, "versions": {"torch": "2.15.0"}, "cells": [cell]})
    assert shown.endswith("| 39m, lora, zero3 | 900 | 1,190 | 1,400 | 85% |")
    if pace.RESULT.is_file():
        found = json.loads(pace.RESULT.read_text(encoding="utf-8"))
        assert pace.PAGE.read_text(encoding="utf-8") == pace.page_with(found)
        assert all(0.75 <= one["planned"] / one["seen"] <= 1.25 for one in found["cells"])


def test_choices_that_do_not_exist_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.parser().parse_args(["--methods", "lora,magic"])
    assert "magic: not one of lora, qlora, full, prompt_tuning" in capsys.readouterr().err


def test_two_steps_of_tunewright_trainer_and_a_loop_by_hand_agree(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "result.json"
    settings = ["--model=small", "--steps=2", "--warmup=1", "--repeats=1", "--again=0", "--batch=2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["train.py", *settings, "--only", "tunewright,Trainer,loop"])
    assert train.main() == 0
    found = json.loads(out.read_text())
    rows = {row["name"]: row for row in found["cells"][0]["contenders"]}
    names = ["tunewright", "loop by hand", "Trainer, padding"]
    assert {name: row["void"] for name, row in rows.items()} == dict.fromkeys(names)
    ours, *theirs = (rows[name]["losses"][0][0] for name in names)
    assert theirs == pytest.approx([ours] * 2, rel=judge.FIRST_STEP)
    assert all(row["yard_stick_gflops"]["min"] > 0 for row in rows.values())
    page, readme = tmp_path / "page.md", tmp_path / "readme.md"
    for path in (page, readme):
        path.write_text(f"before\n{report.BEGIN}\nan earlier table\n{report.END}\nafter\n")
    rows["tunewright"]["disturbed"] = "other processes took 31% of the machine"
    assert not report.write_docs(found, page, readme)
    assert "an earlier table" in page.read_text()
    assert "an earlier table" in readme.read_text()
    assert report.write_docs(found, page, readme, anyway=True)
    assert "| disturbed: other processes took 31% of the machine |" in page.read_text()
    assert "| a loop by hand, without padding | " in readme.read_text()
    for path in (page, readme):
        assert "| tunewright | " in path.read_text()
        assert path.read_text().endswith("after\n")
        assert "an earlier table" not in path.read_text()
