"""Evaluation: each run is asked in its own words, alone and in company, and a full result is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.compose import compose_config
from launch.errors import ConfigError
from launch.rundir import Claim, RunDir, prepare_folder
from trainer.evaluate import evaluate_runs

ROWS = 6


@pytest.fixture
def finished(tmp_path: Path, small_model: Path) -> Callable[..., RunDir]:
    """A finished run that was not trained: a random adapter on the small model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    rows = [{"prompt": f"How much is {number} + 1?", "response": str(number + 1)} for number in range(ROWS)]
    (tmp_path / "sums.json").write_text(json.dumps(rows), encoding="utf-8")
    data = ["data=registry", f"data.names=[{tmp_path / 'sums.json'}]", f"data.eval_names=[{tmp_path / 'sums.json'}]"]

    def make(name: str, *overrides: str) -> RunDir:
        model = ["model=folder", f"model.path={small_model}"]
        config = compose_config([*model, *data, f"output_root={tmp_path}", f"name={name}", *overrides])
        run = RunDir(tmp_path / name)
        prepare_folder(config, Claim(run))
        torch.manual_seed(1)
        adapter = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules="all-linear")
        get_peft_model(AutoModelForCausalLM.from_pretrained(small_model), adapter).save_pretrained(run.final)
        return run

    return make


def answers(run: RunDir) -> list[dict[str, Any]]:
    return list(json.loads(run.evaluation.read_text(encoding="utf-8"))["rows"])


def test_a_run_in_company_is_asked_as_it_is_alone(finished: Callable[..., RunDir]) -> None:
    plain = finished("plain")
    others = [
        finished("template", "model.template=alpaca"),
        finished("variables", "+model.template_kwargs={enable_thinking: false}"),
        finished("format", "model.dtype=bfloat16"),
    ]
    alone = []
    for run in others:
        evaluate_runs([run.path])
        alone.append(answers(run))
    evaluate_runs([plain.path, *(run.path for run in others)])
    assert [answers(run) for run in others] == alone
    assert [row["base"] for row in answers(plain)] != [row["base"] for row in alone[0]]  # so a mix-up would be seen
    assert [row["tuned"] for row in answers(plain)] != [row["tuned"] for row in alone[0]]


def test_runs_that_ask_the_same_share_the_base_models_answers(
    finished: Callable[..., RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.generate import Answerer

    asked: list[int] = []
    answer = Answerer.answer
    monkeypatch.setattr(
        Answerer, "answer", lambda self, prompts, most: asked.append(len(prompts)) or answer(self, prompts, most)
    )
    evaluate_runs([finished("one").path, finished("two").path])
    assert asked == [ROWS] * 3  # the base once, and each run


def test_a_part_of_the_rows_leaves_the_result_on_all_of_them(finished: Callable[..., RunDir]) -> None:
    run, said = finished("run"), []
    evaluate_runs([run.path], None, said.append)
    whole = run.evaluation.read_bytes()
    evaluate_runs([run.path], 2, said.append)
    assert run.evaluation.read_bytes() == whole
    part = json.loads((run.path / "evaluation-2.json").read_text(encoding="utf-8"))
    assert (part["examples"], part["held_out"], part["rows"]) == (2, ROWS, answers(run)[:2])
    assert f"on 2 rows, the first of {ROWS} held-out rows: evaluation-2.json" in said[-1]
    evaluate_runs([run.path], ROWS, said.append)  # as many as there are is all of them
    assert not (run.path / f"evaluation-{ROWS}.json").exists()
    assert json.loads(whole)["tuned"]["interval_95"][0] == 0.0


def test_no_rows_are_a_mistake(finished: Callable[..., RunDir]) -> None:
    with pytest.raises(ConfigError, match=r"`--examples` is 0"):
        evaluate_runs([finished("run").path], 0)
