"""The router's loss of mixtures of experts: transformers' own figure, TRL's gradient, told apart from the loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl import SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from tests.conftest import losses, manifest, read_metrics
from tunewright.config.compose import compose_config
from tunewright.config.schema import CrossEntropy
from tunewright.errors import ConfigError
from tunewright.launch.train import check_all
from tunewright.plan.devices import find_devices
from tunewright.trainer.data.batches import FlatCollator, PaddedCollator
from tunewright.trainer.loss import choose_head, loss_sums
from tunewright.trainer.model import attention
from tunewright.trainer.model.router_loss import own_coefficient

SHAPE: dict[str, Any] = {"vocab_size": 4096, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5}
MIXTURES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8},
    "Olmoe": {"num_experts": 4},
}
FEW = ["model=folder", "train.global_batch_size=4", "data.max_samples=6", "data.eval_names=[]", "train.save_steps=0"]
FEW += ["train.learning_rate=1e-2", "train.max_steps=3", "train.logging_steps=1", "data.cutoff_len=96"]


def mixture(kind: str, implementation: str = "sdpa") -> Any:
    """A random model whose router is far from treating experts alike."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SHAPE | MIXTURES[kind])
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=torch.float32)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    return model


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Mixtral with the embedded model's tokenizer, as the override that names it."""
    path = tmp_path_factory.mktemp("mixture")
    mixture("Mixtral").save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(path)
    return f"model.path={path}"


@pytest.mark.parametrize("kind", MIXTURES)
def test_every_head_gives_transformers_own_figure_without_padding(kind: str) -> None:
    generator = np.random.default_rng(0)
    rows = [{"input_ids": ids, "labels": ids} for ids in (generator.integers(5, 4096, size) for size in (3, 20, 9))]
    batch = PaddedCollator(0)(rows)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = mixture(kind)(**inputs, output_router_logits=True).router_logits
    expected = load_balancing_loss_func(logits, 4, 2, batch["attention_mask"])
    assert expected.item() != pytest.approx(load_balancing_loss_func(logits, 4, 2, None).item(), rel=1e-3)
    for head in ("tunewright", "trl", "own"):
        for collated, implementation in ((batch, "sdpa"), (FlatCollator(0)(rows), attention.register())):
            model = mixture(kind, implementation)
            add_fused_lm_head(model)
            if head != "own":
                choose_head(model, CrossEntropy(head), gpu=False, padded=True)
            sums = loss_sums(model, collated, head, router=True)
            torch.testing.assert_close(sums.router, expected, rtol=1e-4, atol=1e-5)
            assert loss_sums(model, collated, head).router is None


def test_it_is_trained_as_trl_trains_it(folder: str, train_here: Callable[..., Path], trainers: list[Any]) -> None:
    """TRL's own loss, run on the same batch: the same gradient; its value has the router's loss in it, ours has not."""
    train_here("mixture-trl", folder, *FEW, "method=full", "train.padding_free=false", "train.max_steps=1")
    trainer = trainers[0]
    model, batch = trainer.model.train(), trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    batch.pop("step_scored")
    assert len(batch["input_ids"]) == 4
    assert not batch["attention_mask"].all()
    count = (batch["labels"][:, 1:] != -100).sum()
    trainer.current_gradient_accumulation_steps = 1
    found = []
    for compute_loss in (type(trainer).compute_loss, SFTTrainer.compute_loss):
        model.zero_grad()
        loss = compute_loss(trainer, model, dict(batch), num_items_in_batch=count)
        loss.backward()
        found.append((loss.item(), {name: one.grad.clone() for name, one in model.named_parameters()}))
    (mine, gradients), (theirs, expected) = found
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    with torch.no_grad():
        router = loss_sums(model, batch, router=True).router.item()
    assert theirs - mine == pytest.approx(0.5 * router, rel=1e-4)
    # What TRL turns on in the configuration would be saved, and have every forward pass work it out.
    assert not model.config.output_router_logits
    assert own_coefficient(model) == 0.5


def test_it_is_reported_apart_and_the_losses_are_cross_entropy(folder: str, train_here: Callable[..., Path]) -> None:
    held = ["data.eval_names=[demo_eval]", "train.eval_steps=1"]
    on, off = (
        train_here(f"mixture-{name}", folder, *FEW, *held, *setting)
        for name, setting in (("on", []), ("off", ["train.router_aux_loss=0"]))
    )
    lines = [line for line in read_metrics(on) if "loss" in line]
    assert all(line["router_aux_loss"] > 2 for line in lines)  # two choices a token, were experts equally busy
    assert not any("router_aux_loss" in line for line in read_metrics(off))
    # Nothing was learnt before the first step: the same cross-entropy. Then the router's loss has its effect.
    assert losses(on)[0] == pytest.approx(losses(off)[0], rel=1e-6)
    assert losses(on)[2] != pytest.approx(losses(off)[2], rel=1e-6)
    events = EventAccumulator(str(on / "tensorboard")).Reload()
    shown = [event.value for event in events.Scalars("train/router_aux_loss")]
    assert shown == pytest.approx([line["router_aux_loss"] for line in lines], rel=1e-6)


def test_the_held_out_loss_is_cross_entropy(folder: str, train_here: Callable[..., Path], trainers: list[Any]) -> None:
    train_here("mixture-eval", folder, *FEW, "data.eval_names=[demo_eval]", "train.padding_free=false")
    trainer = trainers[0]
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in trainer.get_eval_dataloader():
            logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            labels = batch["labels"][:, 1:].flatten()
            total += torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="sum").item()
            count += int((labels != -100).sum())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.fixture(scope="module")
def row_by_row(folder: str, train_here: Callable[..., Path]) -> Path:
    return train_here("mixture-alone", folder, *FEW, "train.micro_batch_size=1")


@pytest.mark.parametrize(
    "strategy", ["zero3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddp", "zero2"))]
)
def test_ranks_train_it_as_one_process_does(
    strategy: str, folder: str, row_by_row: Path, train: Callable[..., Path]
) -> None:
    """With the same rows in each micro-batch, one; the second step has two rows, and a rank nothing in the third."""
    run = train(f"mixture-{strategy}", folder, *FEW, "train.micro_batch_size=1", f"strategy={strategy}")
    assert manifest(run)["distributed"]["world_size"] == 2
    assert losses(run) == pytest.approx(losses(row_by_row), rel=1e-5)
    figures = [[line["router_aux_loss"] for line in read_metrics(path) if "loss" in line] for path in (run, row_by_row)]
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)


def test_recomputation_that_would_drop_its_gradient_turns_it_off(folder: str) -> None:
    recomputed = [folder, *FEW, "train.gradient_checkpointing=true", "strategy=zero3"]
    with pytest.raises(ConfigError, match=r"`strategy=zero3`.*no gradient.*train.router_aux_loss=0"):
        check_all(compose_config([*recomputed, "train.router_aux_loss=0.1"]), find_devices())
    config = compose_config(recomputed)
    assert any("router's loss is off" in line for line in check_all(config, find_devices())[1])
    assert config.train.router_aux_loss == 0
    for kept in (["train.router_aux_loss=0"], ["method=full"], ["strategy=zero2"]):
        told = check_all(compose_config([*recomputed, *kept]), find_devices())[1]
        assert not any("router's loss" in line for line in told)


def test_a_dense_model_has_none(small_model: Path, train_here: Callable[..., Path]) -> None:
    small = [f"model.path={small_model}", *FEW, "train.max_steps=1"]
    with pytest.raises(ConfigError, match=r"`train.router_aux_loss` is 0.01, and qwen2 is no mixture.*leave it out"):
        train_here("dense-on", *small, "train.router_aux_loss=0.01")
    run = train_here("dense-off", *small, "train.router_aux_loss=0")
    assert not any("router_aux_loss" in json.loads(line) for line in (run / "metrics.jsonl").open())
