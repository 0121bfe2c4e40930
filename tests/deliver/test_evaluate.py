"""Evaluation: each run is asked in its own words, alone and in company, and a full result is kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunewright.claims import Claim, prepare_folder
from tunewright.config.compose import compose_config
from tunewright.deliver.evaluate import evaluate_runs
from tunewright.errors import ConfigError
from tunewright.launch.cli import main
from tunewright.run_folder import RunDir

ROWS = 6


@pytest.fixture
def finished(tmp_path: Path, small_model: Path) -> Callable[..., RunDir]:
    """A finished run that was not trained: a random adapter on the small model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

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
        AutoTokenizer.from_pretrained(small_model).save_pretrained(run.final)
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
    from tunewright.deliver.generate import Answerer

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


CODE = """
from pathlib import Path
from transformers import Qwen2Config, Qwen2ForCausalLM
Path({canary!r}).touch()


class OwnConfig(Qwen2Config):
    model_type = "own"


class OwnModel(Qwen2ForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def with_code(tmp_path: Path, small_model: Path) -> tuple[Path, Path]:
    """A model that brings Python code, and the file that the code makes when it is run."""
    folder, canary = tmp_path / "brings_code", tmp_path / "canary"
    shutil.copytree(small_model, folder)
    (folder / "own.py").write_text(CODE.format(canary=str(canary)), encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config |= {"model_type": "own", "architectures": ["OwnModel"], "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder, canary


def ask(command: str, run: RunDir, *more: str) -> int:
    return main(
        [command, str(run.path), *(["--prompt", "Hi", "--max-new-tokens", "2"] if command == "chat" else []), *more]
    )


@pytest.mark.parametrize("command", ["evaluate", "chat", "merge"])
def test_code_of_a_runs_model_is_run_when_the_command_says_so_each_time(
    command: str,
    with_code: tuple[Path, Path],
    finished: Callable[..., RunDir],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also of a run of one's own: its configuration remembers that code was run once."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, canary = with_code
    run = finished("code", f"model.path={folder}", "model.trust_remote_code=true")
    assert ask(command, run) == 2
    assert "brings Python code" in capsys.readouterr().err
    assert not canary.exists()
    assert ask(command, run, "--trust") == 0
    assert canary.exists()


def test_somebody_elses_run_is_opened_when_the_command_says_so(
    finished: Callable[..., RunDir], capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished("theirs")
    run.update_manifest(signature="0" * 64)
    for command in ("evaluate", "chat", "merge"):
        assert ask(command, run) == 2
        assert "was not made by you" in capsys.readouterr().err
    assert ask("chat", run, "--trust") == 0
    assert "tuned | " in capsys.readouterr().out
