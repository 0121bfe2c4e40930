"""`import tunewright`: what the commands do, as functions; in this process where there is one device."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pandas import DataFrame
from transformers import TrainerCallback

import tunewright
from tests.conftest import losses, read_metrics
from tunewright.api import override_list
from tunewright.config.compose import compose_config
from tunewright.metrics import step_losses
from tunewright.stop_signals import STOP_SIGNALS

ROWS = [
    {"messages": [{"role": "user", "content": f"{n} + 1"}, {"role": "assistant", "content": f"It is {n + 1}."}]}
    for n in range(24)
]


@pytest.fixture(scope="module")
def quick(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three steps on a small model, in a folder of their own."""
    root = tmp_path_factory.mktemp("api")
    few = ["train.max_steps=3", "train.logging_steps=1", "train.global_batch_size=8", "data.workers=1"]
    return ["model=folder", f"model.path={small_model}", f"output_root={root}", *few]


class Steps(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(state.global_step)


@pytest.fixture(scope="module")
def trained(quick: list[str]) -> tuple[tunewright.Run, Steps, list[str]]:
    steps, told = Steps(), []
    run = tunewright.train(
        *quick,
        {"train": {"learning_rate": 1e-3}, "name": "listed"},
        dataset=ROWS[:16],
        eval_dataset=ROWS[16:],
        callbacks=[steps],
        say=told.append,
    )
    return run, steps, told


def test_a_list_of_messages_trains_in_this_process_with_a_callback(trained: Any) -> None:
    run, steps, told = trained
    assert steps.seen == [1, 2, 3]
    assert run.manifest["status"] == "done"
    assert run.manifest["data"]["train"]["examples"] == 16
    assert run.manifest["data"]["eval"]["examples"] == 8
    assert run.config.train.learning_rate == 1e-3
    assert any("step 3/3" in line for line in told)
    assert any("Saved to" in line for line in told)
    assert (run.final / "adapter_config.json").is_file()


class Ask(TrainerCallback):
    def __init__(self, number: int) -> None:
        self.number = number

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGTERM, tunewright.Preempted), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_stops_a_training_in_this_process_and_is_its_own_again(
    number: signal.Signals, raised: type[BaseException], quick: list[str]
) -> None:
    before, name = [signal.getsignal(one) for one in STOP_SIGNALS], f"asked-{number.name}"
    settings = [*quick, f"name={name}"]
    with pytest.raises(raised):
        tunewright.train(*settings, dataset=ROWS, callbacks=[Ask(number)], say=lambda line: None)
    assert [signal.getsignal(one) for one in STOP_SIGNALS] == before
    run = tunewright.train(*settings, "resume=auto", dataset=ROWS, say=lambda line: None)
    assert run.manifest["status"] == "done"
    assert run.metrics()["step"] == [1, 2, 3]


class Greedy(TrainerCallback):
    """Asks for more memory than there is where a micro-batch has more rows than fit."""

    def __init__(self, fit: int = 2) -> None:
        self.fit = fit

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1 and args.per_device_train_batch_size > self.fit:
            torch.empty(1 << 50)


def test_a_micro_batch_that_is_too_large_is_halved_once(quick: list[str]) -> None:
    told: list[str] = []
    settings = [*quick, "train.save_steps=1"]
    run = tunewright.train(*settings, "name=halved", dataset=ROWS, callbacks=[Greedy()], say=told.append)
    assert (run.manifest["status"], run.config.train.micro_batch_size) == ("done", 2)
    (again,) = (line for line in told if line.startswith("Once more"))
    assert "train.micro_batch_size=2, which was auto" in again
    assert "8 rows a step = 1 rank x 4 micro-batches of at most 2, from checkpoint-1." in again
    assert any("Step 2, a micro-batch of " in line and "Held: weights " in line for line in told)
    whole = tunewright.train(*settings, "name=unhalved", dataset=ROWS, say=told.append)
    assert whole.config.train.micro_batch_size == 4
    assert losses(run.path) == pytest.approx(losses(whole.path), rel=1e-5)
    with pytest.raises(tunewright.MemoryShortage, match=r"(?s)Change one of: .*\nPlanned for rows of up to "):
        tunewright.train(*settings, "name=once", dataset=ROWS, callbacks=[Greedy(fit=1)], say=told.append)
    settings += ["name=written", "train.micro_batch_size=4"]
    with pytest.raises(tunewright.MemoryShortage, match=r"Change one of: train\.micro_batch_size=2 "):
        tunewright.train(*settings, dataset=ROWS, callbacks=[Greedy()], say=told.append)


def test_the_loss_curve_is_that_of_the_command(
    trained: Any, quick: list[str], tunewright: Callable[..., Any], tmp_path: Path
) -> None:
    for name, rows in (("train", ROWS[:16]), ("held", ROWS[16:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    names = ["data=registry", f"data.names=[{tmp_path}/train.json]", f"data.eval_names=[{tmp_path}/held.json]"]
    done = tunewright("train", *quick, "name=typed", "train.learning_rate=1e-3", *names)
    assert done.returncode == 0, done.stderr
    typed = trained[0].path.parent / "typed"
    assert losses(typed) == losses(trained[0].path)
    assert step_losses(read_metrics(typed)) == step_losses(read_metrics(trained[0].path))


def test_a_run_is_opened_and_asked(trained: Any) -> None:
    run = tunewright.open_run(trained[0].path)
    columns = run.metrics()
    assert columns["step"][:3] == [1, 2, 3]
    assert {len(column) for column in columns.values()} == {len(columns["step"])}
    assert columns["eval_loss"][-1] == run.manifest["final"]["eval_loss"]
    assert "status done" in repr(run)
    assert "train loss" in run._repr_html_()
    first = run.chat("1 + 1", max_new_tokens=4)
    assert isinstance(first, str)
    assert run.chat([{"role": "user", "content": "1 + 1"}], max_new_tokens=4) == first
    assert isinstance(run.chat("1 + 1", max_new_tokens=4, base=True), str)
    with pytest.raises(tunewright.ConfigError, match="A prompt is a text or a list"):
        run.chat([{"rol": "user"}])
    evaluation = run.evaluate(metrics={"length": lambda answer, expected: float(len(expected))}, say=lambda line: None)
    assert evaluation["examples"] == 8
    assert evaluation["tuned"]["metrics"]["length"] == len("It is 17.")
    assert (run.merge(say=lambda line: None) / "config.json").is_file()


def test_runs_are_compared(trained: Any, tmp_path: Path) -> None:
    comparison = tunewright.compare(trained[0], tmp_path / "comparison")  # one alone, or a list
    assert comparison.page.is_file()
    assert "final train loss" in str(comparison)


def test_the_same_rows_are_the_same_data(trained: Any, quick: list[str]) -> None:
    given = [*quick, {"train": {"learning_rate": 1e-3}, "name": "listed", "resume": "auto"}]
    lines: list[str] = []
    run = tunewright.train(*given, dataset=ROWS[:16], eval_dataset=ROWS[16:], say=lines.append)
    assert "finished already" in lines[-1]
    assert run.path == trained[0].path
    with pytest.raises(tunewright.ConfigError, match="holds another run"):
        tunewright.train(*given, dataset=ROWS[:15], eval_dataset=ROWS[16:], say=lines.append)


def test_a_dataset_and_a_loss_and_metrics(quick: list[str]) -> None:
    from datasets import Dataset

    calls: list[tuple[int, ...]] = []

    def loss(logits: Any, labels: Any) -> Any:
        calls.append(tuple(logits.shape))
        return logits.logsumexp(-1).sum() * 1e-3

    rows = Dataset.from_list([{"instruction": f"Say {n}", "output": f"{n}!"} for n in range(16)])
    run = tunewright.train(
        *quick,
        "name=own-loss",
        "data.eval_size=4",
        dataset=rows,
        loss=loss,
        metrics={"right": lambda answer, expected: float(answer == expected)},
        say=lambda line: None,
    )
    assert calls
    evaluation = json.loads((run.path / "evaluation.json").read_text())
    assert set(evaluation["base"]["metrics"]) >= {"right"}
    with pytest.raises(tunewright.ConfigError, match="'none' is nan on average"):
        run.evaluate(metrics={"none": lambda answer, expected: float("nan")}, say=lambda line: None)


def test_what_fails_here_is_raised_here(quick: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *args, **kwargs: pytest.fail("told TRL"))

    class Break(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            raise ZeroDivisionError("as a notebook sees it")

    with pytest.raises(ZeroDivisionError, match="as a notebook sees it"):
        tunewright.train(*quick, "name=broken", dataset=ROWS, callbacks=[Break()], say=lambda line: None)
    broken = tunewright.open_run(Path(compose_config([*quick]).output_root) / "broken")
    assert broken.manifest["status"] == "failed"


@pytest.mark.parametrize(
    ("given", "options", "error", "told"),
    [
        (["strategy=zero3", "method=qlora"], {}, tunewright.ConfigError, "cannot run under `strategy=zero3`"),
        ([{"train.epoch": 3}], {}, tunewright.ConfigError, "Did you mean 'train.epochs'"),
        ([3], {}, tunewright.ConfigError, "3 is no setting"),
        (["strategy=ddp"], {"callbacks": [Steps()]}, tunewright.ConfigError, r"imports=\[my_module\] train.callbacks="),
        (["strategy=zero2"], {"loss": len}, tunewright.ConfigError, r"imports=\[my_module\] train.loss=NAME"),
        ([], {"callbacks": ["nobodys"]}, tunewright.ConfigError, "`train.callbacks` names 'nobodys'"),
        ([], {"callbacks": Steps()}, tunewright.ConfigError, "write a list"),
        ([], {"callbacks": [len]}, tunewright.ConfigError, "holds <built-in function len>: write transformers"),
        ([], {"loss": 3}, tunewright.ConfigError, "`loss` is 3: write a function"),
        ([], {"dataset": ROWS, "metrics": {"n": len}}, tunewright.ConfigError, "give `eval_dataset` too"),
        (["data.names=[demo]"], {"dataset": ROWS}, tunewright.ConfigError, "both say which data"),
        ([], {"dataset": []}, tunewright.DataError, "has no rows"),
        ([], {"dataset": [3]}, tunewright.DataError, "Row 0 is int"),
        ([], {"dataset": [{"a": object()}]}, tunewright.DataError, "Row 0 cannot be written as JSON"),
        ([], {"dataset": DataFrame({"a": ["b"]})}, tunewright.DataError, "to_dict"),
        ([], {"dataset": {"train": ROWS}}, tunewright.DataError, "choose one of its splits"),
        ([], {"dataset": "nowhere"}, tunewright.DataError, "nowhere"),
        ([], {"dataset": [{"a": "b"}]}, tunewright.DataError, "the meaning of its columns is not plain"),
    ],
)
def test_mistakes_are_the_errors_of_the_commands(
    given: list[Any], options: dict[str, Any], error: type[Exception], told: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=told):
        tunewright.train(*given, f"output_root={tmp_path}", say=lambda line: None, **options)
    assert not list(tmp_path.iterdir())


def test_what_another_process_refuses_is_its_error(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "nothing_known"}')
    path = [f"model.path={tmp_path}/model", "model.random_weights=true", f"output_root={tmp_path}/runs"]
    with pytest.raises(tunewright.ConfigError, match="nothing_known"):
        tunewright.train("model=folder", *path, dataset=ROWS)


def test_several_ranks_go_through_the_launcher(quick: list[str]) -> None:
    lines: list[str] = []
    run = tunewright.train(
        *quick, "strategy=ddp", "cluster.num_processes=2", {"name": "two"}, dataset=ROWS, say=lines.append
    )
    assert run.manifest["distributed"]["world_size"] == 2
    assert any("accelerate launch" in line for line in lines)
    with pytest.raises(tunewright.NumericError):
        tunewright.train(
            *quick,
            "strategy=ddp",
            "cluster.num_processes=2",
            {"name": "nan", "train.learning_rate": 1e30, "train.max_grad_norm": 0.0, "method": "full"},
            dataset=ROWS,
            say=lines.append,
        )


def test_data_are_checked(quick: list[str]) -> None:
    lines: list[str] = []
    report = tunewright.check_data(*quick, dataset=[*ROWS, ROWS[0]], say=lines.append)
    assert report.datasets[0].read == 25
    assert report.datasets[0].exact.count == 1
    assert "25" in lines[0]
    with pytest.raises(tunewright.DataError, match="cannot be used"):
        tunewright.check_data(*quick, dataset=[*ROWS[:2], *([{"messages": []}] * 2)], say=lines.append)


@pytest.mark.parametrize(
    "value",
    [
        "plain", "a b, c's", "\\", "x\\'y\\\\", "1e3", "null", "True", "", "日本 {x: [1]}", "a=b", 3, 1e-5, True, None,
        ["hub:org/name", "a,b", "it's"], {"enable_thinking": False},
    ],
)  # fmt: skip
def test_values_reach_the_configuration_as_they_are(value: Any) -> None:
    config = compose_config(override_list([{"model": {"template_kwargs": {"x": value}}}]))
    assert config.model.template_kwargs["x"] == value


def test_importing_is_quick_and_opening_a_run_needs_no_torch(trained: Any) -> None:
    code = f"""
import sys, tunewright
assert not {{"torch", "omegaconf", "transformers"}} & set(sys.modules)
run = tunewright.open_run({str(trained[0].path)!r})
run.metrics(), run.config, run.manifest, repr(run), tunewright.ConfigError, tunewright.datagen
assert "torch" not in sys.modules
assert "train" in dir(tunewright)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(tunewright.ConfigError, match="is not a run folder"):
        tunewright.open_run("nowhere")
    with pytest.raises(AttributeError):
        tunewright.nothing()
