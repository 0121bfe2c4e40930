"""Going on with what was saved: bit for bit as if training had never stopped, in half precision too."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, set_seed

from tests.conftest import losses, manifest, read_metrics, reseal
from tunewright.config.compose import compose_config
from tunewright.trainer.checkpointing import share
from tunewright.trainer.data.batches import FlatCollator
from tunewright.trainer.data.render import IGNORED
from tunewright.trainer.loss import loss_sums
from tunewright.trainer.master_weights import attach_master_weights
from tunewright.trainer.methods import adapt
from tunewright.trainer.methods.lora import peft_config
from tunewright.trainer.model import attention
from tunewright.trainer.strategy_check import VerifyStrategy

STEPS, HALF = 6, 3


def quick(model: Path) -> list[str]:
    few = [f"train.max_steps={STEPS}", "data.max_samples=12", "train.global_batch_size=4", "train.logging_steps=1"]
    return ["model=folder", f"model.path={model}", *few, f"train.save_steps={HALF}", "train.learning_rate=1e-2"]


METHODS = {
    "lora": [],
    "lora-bfloat16": ["model.dtype=bfloat16", "method.dropout=0.1"],
    "dora-bfloat16": ["method.dora=true", "model.dtype=bfloat16"],
    "pissa": ["method.init=pissa"],
    "qlora": ["method=qlora"],
    "freeze": ["method=freeze", "method.layers=1"],
    "full-bfloat16": ["method=full", "model.dtype=bfloat16", "train.micro_batch_size=2"],
    "ia3": ["method=ia3"],
    "prompt_tuning": ["method=prompt_tuning"],
    "p_tuning": ["method=p_tuning"],
    "p_tuning-lstm-bfloat16": ["method=p_tuning", "method.encoder=lstm", "model.dtype=bfloat16"],
    "prefix_tuning": ["method=prefix_tuning"],
    "prefix_tuning-projection": ["method=prefix_tuning", "method.projection=true"],
}


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_is_the_uninterrupted_one(
    name: str, train_here: Callable[..., Path], small_model: Path, trainers: list[Any]
) -> None:
    """Also the formats are the same: PEFT reads adapters as float32, whatever the base is in."""
    overrides = [*quick(small_model), *METHODS[name], "data.eval_names=[]"]
    run = train_here(f"resumed-{name}", *overrides)
    expected, saved, told = losses(run), results(run), manifest(run)
    assert len(set(expected)) == STEPS
    shutil.rmtree(run / "final")
    older = [{key: value for key, value in line.items() if key != "flops_per_second"} for line in read_metrics(run)]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in older))  # of a version before
    train_here(f"resumed-{name}", *overrides, checkpoint=run / "checkpoints" / f"checkpoint-{HALF}")
    whole, resumed = trainers
    assert [one.first for one in resumed.callback_handler.callbacks if isinstance(one, VerifyStrategy)] == [HALF]
    assert losses(run) == expected
    assert manifest(run)["final"] == told["final"]
    assert manifest(run)["tokens_seen"] == told["tokens_seen"]
    assert manifest(run)["flops_per_second"] > 0
    assert manifest(run)["wall_seconds"] > read_metrics(run)[HALF - 1]["wall_seconds"] > 0  # of both processes
    same(results(run), saved)
    for (key, before), after in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert (before.dtype, before.requires_grad) == (after.dtype, after.requires_grad), key


def results(run: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in (run / "final").glob("*.safetensors") for key, tensor in load_file(file).items()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() != set()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor), key


class Planted:
    """What a pickle holds that makes a folder when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_resumed_ranks_continue_from_their_float32_masters_and_from_nothing_that_runs_code(
    strategy: str, train: Callable[..., Path], tunewright: Callable[..., Any], small_model: Path, tmp_path: Path
) -> None:
    """DeepSpeed by itself unpickles whatever lies there."""
    overrides = [*quick(small_model), f"strategy={strategy}", "model.dtype=bfloat16", "data.eval_names=[]"]
    overrides += ["train.micro_batch_size=1"]
    run = train(f"masters-{strategy}", *overrides)
    assert manifest(run)["distributed"]["gradients_summed_in"] == "float32"
    expected, saved = losses(run), results(run)
    engines = list((run / "checkpoints").glob("*/global_step*/mp_rank_00_model_states.pt"))
    assert bool(engines) == (strategy == "zero2")
    for states in engines:  # DeepSpeed's own copy, of the adapter alone
        assert all("lora_" in name for name in torch.load(states, weights_only=False)["module"])

    def interrupted() -> None:
        for folder in (run / "final", run / "checkpoints" / f"checkpoint-{STEPS}"):
            shutil.rmtree(folder)
        (run / "manifest.json").write_text(json.dumps({**manifest(run), "status": "failed"}), encoding="utf-8")

    interrupted()
    train(f"masters-{strategy}", *overrides, "resume=auto")
    assert losses(run) == expected
    same(results(run), saved)
    if strategy == "ddp":  # whose checkpoints are of no number of ranks
        interrupted()
        train("masters-ddp", *overrides, "resume=auto", "cluster.num_processes=3")
        assert manifest(run)["distributed"]["world_size"] == 3
        assert losses(run) == pytest.approx(expected, rel=1e-3)

    interrupted()
    files = [*(run / "checkpoints").glob("*/global_step*/*_states.pt"), *(run / "checkpoints").glob("*/optimizer.pt")]
    for file in files:
        torch.save({"optimizer_state_dict": Planted(tmp_path / "canary")}, file)
    for checkpoint in (run / "checkpoints").glob("checkpoint-*"):
        reseal(checkpoint)
    done = tunewright("train", f"output_root={run.parent}", f"name={run.name}", *overrides, "resume=auto")
    assert done.returncode == 4, done.stdout + done.stderr
    assert "names posix.mkdir, and reading it would run code that it brings. Write trust=true" in done.stdout
    assert files
    assert not (tmp_path / "canary").exists()


def test_memory_settings_may_change_when_a_run_goes_on(train_here: Callable[..., Path], small_model: Path) -> None:
    overrides = [*quick(small_model), "data.eval_names=[]"]
    run = train_here("less-memory", *overrides)
    expected = losses(run)
    other = ["train.micro_batch_size=1", "train.gradient_checkpointing=true"]
    train_here("less-memory", *overrides, *other, checkpoint=run / "checkpoints" / f"checkpoint-{HALF}")
    assert losses(run) == pytest.approx(expected, rel=1e-5)


def test_more_steps_may_be_asked_for_when_a_run_goes_on(train_here: Callable[..., Path], small_model: Path) -> None:
    constant = [*quick(small_model), "data.eval_names=[]", "train.scheduler=constant"]
    longer = train_here("longer", *constant, "train.max_steps=9")
    run = train_here("shorter", *constant)
    train_here("shorter", *constant, "train.max_steps=9", checkpoint=run / "checkpoints" / f"checkpoint-{STEPS}")
    assert losses(run) == losses(longer)


def test_another_run_can_go_on_with_an_adapter(train_here: Callable[..., Path], small_model: Path) -> None:
    """It begins with the loss that the adapter ended with, not with the base's."""
    first = train_here("first", *quick(small_model), "method.r=3", "method.alpha=7", "train.learning_rate=3e-2")
    still = [*quick(small_model), "train.learning_rate=1e-12", "train.max_steps=1"]
    base = manifest(train_here("base", *still))["final"]["eval_loss"]
    ended = manifest(first)["final"]["eval_loss"]
    assert ended < base - 0.1
    second = train_here("second", *still, f"method.adapter={first}")
    assert manifest(second)["final"]["eval_loss"] == pytest.approx(ended, rel=1e-6)
    config = peft.LoraConfig.from_pretrained(second / "final")
    assert (config.r, config.lora_alpha) == (3, 7)


def test_every_file_is_hashed_by_one_rank_that_sees_it() -> None:
    listings = [["a", "b", "rank0"], ["a", "rank1"], ["a", "b", "rank2"]]
    shares = [share(listings, rank) for rank in range(3)]
    assert sorted(name for names in shares for name in names) == ["a", "b", "rank0", "rank1", "rank2"]
    assert all(set(names) <= set(seen) for names, seen in zip(shares, listings, strict=True))


# Half precision with float32 masters over many steps


def curve(model: Any, *, masters: bool, steps: int = 200) -> np.ndarray:
    """The losses of training on the same few rows, four a step."""
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(16):
        ids = generator.integers(5, 100, 24)
        rows.append({"input_ids": ids, "labels": np.where(np.arange(24) >= 8, ids, IGNORED)})
    trained = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    if masters:
        attach_master_weights(optimizer)
    found = []
    for step in range(steps):
        batch = FlatCollator(0)([rows[(4 * step + index) % 16] for index in range(4)])
        loss = loss_sums(model, batch).loss / batch["targets"].numel()
        loss.backward()
        optimizer.step()
        for parameter in trained:
            parameter.grad = None
        found.append(loss.item())
    return np.array(found)


def test_bfloat16_with_masters_learns_as_float32_adapters_do(small_model: Path) -> None:
    """Beside PEFT's default, float32 adapters on the same bfloat16 base."""
    method = compose_config(["method=lora"]).method

    def base() -> Any:
        set_seed(0)
        options = {"dtype": torch.bfloat16, "attn_implementation": attention.register()}
        return AutoModelForCausalLM.from_pretrained(small_model, **options)

    def adapted(*, ours: bool) -> Any:
        model = base()
        set_seed(1)
        return adapt(model, method) if ours else peft.get_peft_model(model, peft_config(method))

    theirs = adapted(ours=False)
    assert {p.dtype for p in theirs.parameters() if p.requires_grad} == {torch.float32}
    expected = curve(theirs, masters=False)
    with_masters = curve(adapted(ours=True), masters=True)
    without = curve(adapted(ours=True), masters=False)
    assert expected[-1] < expected[0] - 0.2
    # Measured: the curves are 0.0003 apart at most, and 0.028 where the adapters' updates are rounded to bfloat16.
    assert np.abs(with_masters - expected).max() < 0.002
    assert np.abs(without - expected).max() > 0.01
