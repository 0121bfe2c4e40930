"""What is not finite: refused before the first step, seen at its step, in no checkpoint, and told with a way out."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback

from tests.conftest import losses, manifest, read_metrics
from tunewright.checkpoints import listed
from tunewright.config.compose import compose_config
from tunewright.errors import NumericError, StorageError
from tunewright.trainer.console import Printer
from tunewright.trainer.finiteness import LATEST, Finiteness, _Copy

TrainHere = Callable[..., Path]


def quick(model: Path, *more: str) -> list[str]:
    few = ["data.max_samples=24", "train.global_batch_size=4", "train.micro_batch_size=2", "train.logging_steps=50"]
    return ["model=folder", f"model.path={model}", "data.eval_names=[]", "train.warmup_ratio=0", *few, *more]


def damaged(model: Path, folder: Path, value: float, name: str, where: tuple[int, int] = (3, 5)) -> Path:
    """A copy of a model with one value of a weight that is not finite."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    weights[name][where] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("value", "name", "method"),
    [
        (float("nan"), "model.embed_tokens.weight", ["method=lora"]),
        (float("-inf"), "model.layers.1.mlp.up_proj.weight", ["method=full", "model.dtype=bfloat16"]),
        (float("nan"), "model.layers.0.self_attn.q_proj.weight", ["method=qlora"]),
        (float("nan"), "model.layers.0.self_attn.q_proj.weight", ["method=qlora", "method.double_quant=false"]),
        (float("inf"), "model.layers.0.self_attn.q_proj.weight", ["method=qlora", "method.bits=8"]),
    ],
    ids=["embedding", "bfloat16", "4 bits", "4 bits, single", "8 bits"],
)
def test_a_base_that_is_not_finite_is_refused_before_the_first_step(
    value: float, name: str, method: list[str], train_here: TrainHere, small_model: Path, tmp_path: Path
) -> None:
    folder = damaged(small_model, tmp_path / "damaged", value, name)
    with pytest.raises(StorageError, match=rf"damaged/model\.safetensors: the weight {name} holds values that are not"):
        train_here(f"refused-{len(list(tmp_path.parent.iterdir()))}", *quick(folder, *method, "train.max_steps=1"))


def test_an_adapter_that_is_not_finite_is_refused_before_the_first_step(
    train_here: TrainHere, small_model: Path, tmp_path: Path
) -> None:
    run = train_here("adapter", *quick(small_model, "train.max_steps=1"))
    weights = load_file(run / "final" / "adapter_model.safetensors")
    next(iter(weights.values())).view(-1)[-1] = math.nan
    save_file(weights, run / "final" / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StorageError, match=r"adapter/final: the weight .*lora_A.* holds values that are not finite"):
        train_here("goes-on", *quick(small_model, "train.max_steps=1", f"method.adapter={run / 'final'}"))


class OddOnce:
    """The cross-entropy, but times `value` in one of its calls."""

    def __init__(self, call: int, value: float) -> None:
        self.calls, self.call, self.value = 0, call, value

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        loss = cross_entropy(logits, labels, reduction="sum")
        return loss * self.value if self.calls == self.call else loss


def test_a_loss_that_is_not_finite_ends_the_run_at_its_step_and_names_the_rows(
    train_here: TrainHere, small_model: Path, trainers: list[Any]
) -> None:
    """In the second epoch, in a dataset of which some rows are held out: the names are those of the file."""
    settings = quick(small_model, "train.max_steps=20", "train.save_steps=2", "data.eval_size=0.25")
    with pytest.raises(NumericError) as stopped:
        train_here("odd", *settings, loss=OddOnce(16, float("nan")))  # step 8: 2 micro-batches each
    text = str(stopped.value)
    (trainer,) = trainers
    assert trainer.state.global_step == 8
    rows = sorted(row for _, row in trainer.finiteness.cache.places("train", trainer.rows_of(8, 1)))
    assert text.startswith(f"The loss of step 8 is nan, for demo rows {rows[0]}, {rows[1]}. That of the step's other")
    assert "tunewright data show NAME --row N" in text
    assert "what the given loss returns" in text
    assert "lower `train.learning_rate` (it is 0.0002)" in text
    assert "max_grad_norm" not in text  # clipping is on already
    assert "model.dtype" not in text  # float32 already
    allow = "`resume=auto resume_allow=[data,train.learning_rate]` goes on from it with the change"
    assert f"checkpoint-6 is the last good one: {allow}." in text
    run = Path(trainer.args.output_dir).parent
    assert [path.name for path in listed(run / "checkpoints")] == ["checkpoint-6", "checkpoint-4"]
    assert losses(run) == pytest.approx([line["loss"] for line in read_metrics(run)])
    assert "NaN" not in (run / "metrics.jsonl").read_text()
    # What was named is what was trained on.
    data = [json.loads(line) for line in tokens_of(trainer, rows)]
    seen = [trainer.train_dataset[row]["input_ids"] for row in trainer.rows_of(8, 1)]
    assert sorted(data) == sorted(seen)


def tokens_of(trainer: Any, rows: list[int]) -> list[str]:
    (cached,) = trainer.finiteness.cache.train
    return [json.dumps(one["input_ids"]) for one in cached.examples() if one["row"] in rows]


def test_the_advice_fits_the_settings(train_here: TrainHere, small_model: Path) -> None:
    hot = quick(small_model, "train.max_steps=9", "train.learning_rate=1e30", "method=full", "train.max_grad_norm=0")
    with pytest.raises(NumericError) as stopped:
        train_here("hot", *hot, "model.dtype=bfloat16", "train.save_steps=0")
    text = str(stopped.value)
    assert text.startswith("The loss of step 2 is nan, for ")
    assert "other rows" not in text
    assert (
        "Lower `train.learning_rate` (it is 1e+30; 2e-05 is usual for full); or set `train.max_grad_norm=1.0`" in text
    )
    assert "or set `model.dtype=float32`" in text
    assert "No checkpoint was written before it" in text
    with pytest.raises(NumericError) as stopped:
        train_here("first", *quick(small_model, "train.max_steps=9"), loss=OddOnce(1, float("inf")))
    assert str(stopped.value).startswith("The loss of step 1 is inf, for demo rows ")
    assert "learning_rate" not in str(stopped.value)  # nothing had been learnt


class Poison(TrainerCallback):
    """Makes a weight, or what the optimiser keeps, infinite when a step has ended: the losses until then are fine."""

    def __init__(self, step: int, what: str) -> None:
        self.step, self.what = step, what

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            weight = next(one for one in kwargs["model"].parameters() if one.requires_grad)
            optimizer = kwargs["optimizer"]
            copy = optimizer.param_groups[0]["params"][0]
            with torch.no_grad():
                (optimizer.state[copy]["exp_avg_sq"] if self.what == "state" else weight).view(-1)[0] = math.inf


@pytest.mark.parametrize("what", ["weight", "state"])
def test_the_result_is_never_what_is_not_finite(what: str, train_here: TrainHere, small_model: Path) -> None:
    settings = quick(small_model, "train.max_steps=3", "train.save_steps=0")
    with pytest.raises(
        NumericError, match=r"After step 3 .*(lora_A|state).* is not finite\. Lower `train.learning"
    ) as e:
        train_here(f"poisoned-{what}", *settings, callbacks=[Poison(3, what)])
    assert "No checkpoint" in str(e.value)


def test_a_held_out_loss_that_is_not_finite_is_told_and_chooses_nothing(
    train_here: TrainHere, small_model: Path
) -> None:
    lines: list[str] = []
    settings = quick(small_model, "train.max_steps=2", "data.eval_size=4", "train.micro_batch_size=4")
    run = train_here("held-out", *settings, loss=OddOnce(3, float("inf")), output=Printer(lines.append))
    (warning,) = manifest(run)["warnings"]
    assert re.match(
        r"The held-out loss at step 2 is inf, for demo rows \d+, \d+, \d+, \d+; the weights are fin", warning
    )
    assert f"  Warning: {warning}" in lines
    assert lines[-1] == f"Saved to {run / 'final'}. Warning: {warning}"
    assert read_metrics(run)[-1]["eval_loss"] is None
    assert manifest(run)["final"]["eval_loss"] is None
    best = ["train.keep_best=true", "train.eval_steps=1", "train.save_steps=1"]
    with pytest.raises(NumericError, match=r"`train.keep_best` goes by it\. Look at these rows; or do without"):
        train_here("best", *settings, *best, loss=OddOnce(2, float("nan")))


PLUG_IN = """
import os
from torch.nn.functional import cross_entropy

calls = 0

def odd(logits, labels):
    global calls
    calls += 1
    loss = cross_entropy(logits, labels, reduction="sum")
    return loss * float("inf") if calls == 9 and os.environ["RANK"] == "1" else loss

def register(plugins):
    plugins.add_loss("odd", odd)
"""


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_all_ranks_end_at_the_step_that_one_of_them_saw(
    strategy: str, tunewright: Callable[..., Any], small_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "odd_loss.py").write_text(PLUG_IN)
    settings = quick(small_model, "train.max_steps=40", "train.save_steps=2", f"strategy={strategy}")
    settings += ["imports=[odd_loss]", "train.loss=odd", f"output_root={tmp_path}", "name=odd"]
    done = tunewright("train", *settings, "cluster.num_processes=2", PYTHONPATH=str(tmp_path))
    assert done.returncode == 5, done.stdout + done.stderr
    assert re.search(r"NumericError: The loss of step 9 is inf on rank 1, for demo rows? \d+", done.stdout), done.stdout
    assert "`train.loss=odd`" in done.stdout
    assert "checkpoint-8 is the last good one" in done.stdout
    records = [json.loads((tmp_path / "odd" / "logs" / f"rank{rank}.error.json").read_text()) for rank in (0, 1)]
    assert {record["exit_code"] for record in records} == {5}
    assert len({record["message"] for record in records}) == 1
    assert [path.name for path in listed(tmp_path / "odd" / "checkpoints")] == ["checkpoint-8", "checkpoint-6"]


POISON = """
import os
from transformers import TrainerCallback

class Poison(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3 and os.environ["RANK"] == "1":
            next(one for one in kwargs["model"].parameters() if one.requires_grad).ds_tensor.data[-1] = float("nan")

def register(plugins):
    plugins.add_callback("poison", Poison)
"""


def test_a_part_that_zero3_left_with_another_rank_is_looked_at(
    tunewright: Callable[..., Any], small_model: Path, tmp_path: Path
) -> None:
    """Of the base when it is loaded, and of what is trained before it is kept."""
    (tmp_path / "poison.py").write_text(POISON)
    common = ["strategy=zero3", "cluster.num_processes=2", f"output_root={tmp_path}"]
    settings = quick(small_model, "train.max_steps=3", *common, "imports=[poison]", "train.callbacks=[poison]")
    done = tunewright("train", *settings, "name=poisoned", PYTHONPATH=str(tmp_path))
    assert done.returncode == 5, done.stdout + done.stderr
    assert re.search(r"NumericError: After step 3 .*lora_A.* is not finite", done.stdout), done.stdout
    assert not (tmp_path / "poisoned" / "final").exists()
    weight = "model.layers.1.mlp.down_proj.weight"
    folder = damaged(small_model, tmp_path / "damaged", float("nan"), weight, where=(-1, -1))
    done = tunewright("train", *quick(folder, "train.max_steps=3", *common), "name=damaged-base")
    assert done.returncode == 4, done.stdout + done.stderr
    assert f"model.safetensors: the weight {weight} holds values that are not finite" in done.stdout


class Late:
    """An event of a device that says when a copy has arrived."""

    def __init__(self) -> None:
        self.done = self.waited_for = False

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.done = self.waited_for = True


def test_a_device_is_waited_for_when_it_has_two_steps_more_to_do() -> None:
    seen = Finiteness(None, compose_config(), None)
    events = [Late() for _ in range(4)]
    for step, event in enumerate(events, 1):
        figures = torch.tensor([math.nan if step == 2 else 1.0, 0.5], dtype=torch.float64)
        seen._copies.append(_Copy(step, figures, None, event))
        seen._look(wait_for=LATEST)
        assert [one.waited_for for one in events] == [step >= number + LATEST for number in range(1, 5)]
        assert (seen.fault is not None) == (step == 4)
    assert seen.fault is not None
    assert (seen.fault.step, seen.fault.micro_batches, seen.fault.norm) == (2, [0], 0.5)
    events[2].done = True
    seen._look(wait_for=LATEST)
    assert [copy.step for copy in seen._copies] == [4]  # that one has not arrived


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [None, 0.5], ids=["on the device", "known"])
def test_no_step_waits_for_a_gpu(norm: float | None) -> None:
    """PyTorch refuses each operation that would."""
    seen = Finiteness(None, compose_config(), None)
    losses = [torch.tensor(one, device="cuda") for one in (1.0, 2.0, math.inf, 1.0, 1.0)]
    gradient = torch.tensor(0.5, device="cuda")
    try:
        for step, loss in enumerate(losses, 1):
            torch.cuda.set_sync_debug_mode("error")
            seen.add_loss(loss)
            seen.add_loss(loss)
            seen.see_norm(gradient if norm is None else norm)
            found = seen.asked(SimpleNamespace(global_step=step))
            torch.cuda.set_sync_debug_mode("default")
            assert not found or step >= 3
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert seen.fault is not None
    assert (seen.fault.step, seen.fault.micro_batches, seen.fault.norm) == (3, [0, 1], 0.5)
