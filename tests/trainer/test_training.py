"""What a program gives to a training in its own process: a loss, callbacks, a place for what is told."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback

from tests.conftest import manifest, read_metrics
from tunewright.config.method_schema import PROMPT_LEARNING
from tunewright.errors import ConfigError, Preempted
from tunewright.plugins import PLUGINS
from tunewright.trainer.callbacks import ProgressReport
from tunewright.trainer.console import Printer
from tunewright.trainer.stopping import Stopping

TrainHere = Callable[..., Path]
SUM = partial(cross_entropy, reduction="sum")
BATCHES = [("flat", "lora"), ("flat", "full"), ("padded", "lora"), ("padded", "full")]
BATCHES += [("padded", method) for method in PROMPT_LEARNING]


def quick(model: Path, method: str = "lora") -> list[str]:
    few = ["train.max_steps=3", "data.max_samples=12", "train.global_batch_size=4", "train.logging_steps=1"]
    few += ["data.eval_names=[demo_eval]", "train.micro_batch_size=3", "train.scheduler=constant"]
    return ["model=folder", f"model.path={model}", f"method={method}", "train.warmup_ratio=0", *few]


def figures(run: Path) -> list[float]:
    return [line.get("loss", line.get("eval_loss")) for line in read_metrics(run)]


@pytest.mark.parametrize(("batch", "method"), BATCHES)
def test_the_cross_entropy_given_as_a_loss_is_the_built_in_one(
    train_here: TrainHere, small_model: Path, batch: str, method: str
) -> None:
    """In flat and padded batches, with virtual tokens before the row too, in training and in evaluation."""
    settings = [*quick(small_model, method), f"train.padding_free={batch == 'flat'}"]
    built_in = train_here(f"{method}-{batch}", *settings)
    given = train_here(f"{method}-{batch}-given", *settings, loss=SUM)
    assert len(figures(given)) == 4
    assert figures(given) == pytest.approx(figures(built_in), rel=1e-5)


def test_a_loss_sees_scored_positions_alone(train_here: TrainHere, small_model: Path) -> None:
    seen = []

    def twice(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append((logits.shape, logits.dtype, labels.shape, int(labels.min())))
        return 2 * SUM(logits, labels)

    expected = figures(train_here("once", *quick(small_model)))
    assert figures(train_here("twice", *quick(small_model), loss=twice))[0] == pytest.approx(2 * expected[0], rel=1e-5)
    for logits, dtype, labels, least in seen:
        assert logits == (*labels, 4096)
        assert dtype is torch.float32
        assert least >= 0


def test_the_evaluation_at_the_end_is_left_on_request_and_made_when_the_run_goes_on(
    train_here: TrainHere, small_model: Path
) -> None:
    settings = [*quick(small_model), "train.save_steps=3", "train.grace_seconds=1e-6"]
    whole = train_here("evaluated", *settings, loss=SUM)
    stopping, batches, said = Stopping(), list[int](), list[str]()

    def asked(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            batches.append(len(labels))
            stopping.requests.hear(signal.SIGTERM)
        return SUM(logits, labels)

    with pytest.raises(Preempted, match="Stopped after step 3: resume=auto goes on from checkpoint-3"):
        train_here("left", *settings, loss=asked, stopping=stopping, output=Printer(said.append))
    assert len(batches) == 1
    assert "train.grace_seconds leaves 1e-06 s" in "".join(said)
    left = whole.with_name("left")
    assert manifest(left)["status"] == "stopped"
    assert not (left / "final").exists()
    again = train_here("left", *settings, loss=SUM, checkpoint=left / "checkpoints" / "checkpoint-3")
    assert figures(again) == figures(whole)


def test_a_loss_that_is_no_sum_is_refused(train_here: TrainHere, small_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"The loss returned \(\d+,\): it has to return a scalar"):
        train_here("each", *quick(small_model), loss=partial(cross_entropy, reduction="none"))


class Counting(TrainerCallback):
    """Counts the steps of all trainings."""

    steps = 0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        Counting.steps += 1


def test_callbacks_are_called(train_here: TrainHere, small_model: Path) -> None:
    before = Counting.steps
    train_here("counted", *quick(small_model), callbacks=[Counting(), Counting()])
    assert Counting.steps == before + 6


def test_a_loss_and_callbacks_of_a_plug_in_are_used(
    train_here: TrainHere, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PLUGINS.losses, "half", lambda logits, labels: SUM(logits, labels) / 2)
    monkeypatch.setitem(PLUGINS.callbacks, "counting", Counting)
    before = Counting.steps
    whole = figures(train_here("whole", *quick(small_model)))
    half = figures(train_here("half", *quick(small_model), "train.loss=half", "train.callbacks=[counting]"))
    assert half[0] == pytest.approx(whole[0] / 2, rel=1e-5)
    assert Counting.steps == before + 3


def test_a_program_sees_lines_and_exceptions(
    train_here: TrainHere, small_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train_here("printed", *quick(small_model), output=None)
    told = capfd.readouterr().out.splitlines()
    assert told[0].startswith("Training ")
    assert [line.partition("  loss")[0] for line in told[1:4]] == [f"  step {step}/3" for step in (1, 2, 3)]
    assert told[4].startswith("  step 3/3  eval loss ")
    assert told[5].startswith("Saved to ")

    def fails(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        train_here("failed", *quick(small_model), loss=fails)


class Terminal:
    """An output whose stream is a terminal."""

    def __init__(self) -> None:
        self.master, slave = os.openpty()
        self.stream = os.fdopen(slave, "w", encoding="utf-8")
        self.lines: list[str] = []
        self.drawn = b""
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        while True:
            try:
                self.drawn += os.read(self.master, 4096)
            except OSError:
                return

    def say(self, text: str) -> None:
        self.log(text)
        print(text, file=self.stream, flush=True)

    def log(self, text: str) -> None:
        self.lines.append(text)

    def close(self) -> str:
        self.stream.close()
        self.reader.join(5)
        os.close(self.master)
        return self.drawn.decode()


def test_a_terminal_has_a_bar_and_the_log_the_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar moves with each step; lines for the eval loss stay above it, and the log has each line as without a bar."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("tunewright.terminal.REFRESH_SECONDS", 0.0)
    terminal = Terminal()
    report = ProgressReport(terminal)
    state = SimpleNamespace(global_step=0, max_steps=4)
    report.on_train_begin(None, state, None)
    for step in (1, 2, 3, 4):
        state.global_step = step
        report.on_step_end(None, state, None)
        if step % 2 == 0:
            logs = {"loss": 1.25, "grad_norm": 0.5, "tokens_per_second": 4321.0}
            report.on_log(None, state, None, logs=logs)
    report.on_log(None, state, None, logs={"eval_loss": 0.75})
    report.progress.close()
    drawn = terminal.close()
    assert [line.split("  ")[1:4] for line in terminal.lines[:2]] == [
        [f"step {step}/4", "loss 1.2500", "grad norm 0.50"] for step in (2, 4)
    ]
    assert terminal.lines[2:] == ["  step 4/4  eval loss 0.7500"]
    for shown in ("step 0/4", "step 1/4", "step 3/4", "loss 1.2500", "4,321 tokens/s", "left", "eval loss 0.7500"):
        assert shown in drawn
