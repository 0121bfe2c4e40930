"""The same data, seed and global batch give the same loss curve, however the work is shared out."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from trl import SFTTrainer

from tests.conftest import losses, manifest

STEPS = 20
# 33 rows in steps of 16: the last step of an epoch leaves a rank without a row.
ODD = ["data.max_samples=33"]
SAME_RUN = ["train.logging_steps=1", f"train.max_steps={STEPS}", "data.eval_names=[]", "model.dtype=float32"]
METHODS = {"lora": ["method=lora", "train.learning_rate=3e-3"], "full": ["method=full", "train.learning_rate=2e-4"]}
STRATEGIES = {"ddp": ("MULTI_CPU", None), "zero2": ("DEEPSPEED", 2), "zero3": ("DEEPSPEED", 3)}


@pytest.fixture(scope="module", params=METHODS)
def one_process(request: pytest.FixtureRequest, train: Callable[..., Path]) -> tuple[str, Path]:
    method = request.param
    return method, train(f"single-{method}", "strategy=single", *METHODS[method], *SAME_RUN, *ODD)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ranks_train_as_one_process_does(
    strategy: str, one_process: tuple[str, Path], train: Callable[..., Path]
) -> None:
    """Also that they are ranks: two processes, the asked-for engine and stage, and partitioned weights under ZeRO-3."""
    method, alone = one_process
    expected = losses(alone)
    run = train(f"{strategy}-{method}", f"strategy={strategy}", *METHODS[method], *SAME_RUN, *ODD)
    assert len(expected) == STEPS
    assert losses(run) == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < 0.8 * expected[0]

    for key in ("train_loss", "mean_train_loss"):
        assert manifest(run)["final"][key] == pytest.approx(manifest(alone)["final"][key], rel=1e-5)
    assert manifest(run)["tokens_seen"] == manifest(alone)["tokens_seen"]

    facts, total = manifest(run)["distributed"], manifest(run)["parameters"]["total"]
    kind, stage = STRATEGIES[strategy]
    assert (facts["type"], facts["zero_stage"], facts["world_size"], facts["backend"]) == (kind, stage, 2, "gloo")
    assert len(set(facts["process_ids"])) == 2
    if stage is not None:
        assert facts["engine"] == "DeepSpeedEngine"
    if stage == 3:
        assert facts["parameters_partitioned"] > 0
        assert facts["parameters_held_by_rank_0"] < 0.6 * total
    else:
        assert facts["parameters_held_by_rank_0"] == total


@pytest.fixture(scope="module")
def uneven_rows(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that select rows of very different lengths: 2 to 200 words."""
    folder = tmp_path_factory.mktemp("uneven")
    words = ["parcel", "order", "refund", "快递", "账户", "late", "today", "please", "thanks"]
    chooser = random.Random(0)
    rows = [
        {
            "instruction": " ".join(chooser.choices(words, k=chooser.choice([1, 3, 100]))),
            "output": " ".join(chooser.choices(words, k=chooser.choice([1, 5, 100]))),
        }
        for _ in range(40)
    ]
    (folder / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    (folder / "dataset_info.json").write_text(json.dumps({"uneven": {"file_name": "rows.json"}}))
    return ["data=registry", "data.names=[uneven]", f"data.dir={folder}", "train.global_batch_size=4"]


@pytest.fixture(scope="module")
def uneven_losses(train_here: Callable[..., Path], uneven_rows: list[str]) -> list[float]:
    return losses(train_here("flat", *uneven_rows, *SAME_RUN, "train.micro_batch_size=4"))


def test_accumulation_is_one_batch_in_parts(
    train_here: Callable[..., Path], uneven_rows: list[str], uneven_losses: list[float]
) -> None:
    parts = train_here("parts", *uneven_rows, *SAME_RUN, "train.micro_batch_size=1")
    assert losses(parts) == pytest.approx(uneven_losses, rel=1e-5)


def test_padding_free_training_is_padded_training(
    train_here: Callable[..., Path], uneven_rows: list[str], uneven_losses: list[float]
) -> None:
    """The padded side is TRL's head over transformers' own attention, which has nothing of ours."""
    theirs = ["train.padding_free=false", "train.cross_entropy=trl"]
    padded = train_here("padded", *uneven_rows, *SAME_RUN, "train.micro_batch_size=4", *theirs)
    assert manifest(padded)["cross_entropy"] == "trl"
    assert losses(padded) == pytest.approx(uneven_losses, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_and_its_gradients_are_those_of_trl_and_of_a_plain_cross_entropy(
    method: str, train_here: Callable[..., Path], trainers: list[Any], uneven_rows: list[str]
) -> None:
    """TRL's own `compute_loss`, run on the same batch of the same model, and the cross-entropy of its logits."""
    one_step = ["train.max_steps=1", "train.padding_free=false", "train.micro_batch_size=4", "model.dtype=float32"]
    train_here(f"against-trl-{method}", *uneven_rows, *METHODS[method], *one_step)
    trainer = trainers[0]
    model, batch = trainer.model.train(), next(iter(trainer.get_train_dataloader()))
    batch.pop("step_scored")
    assert trainer.head == "tunewright"
    labels = batch["labels"][:, 1:]
    count = (labels != -100).sum()

    def plain() -> torch.Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100)

    def with_gradients(compute: Callable[[], torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        loss = compute()
        loss.backward()
        trained = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
        return loss.item(), trained

    mine = with_gradients(lambda: trainer.compute_loss(model, dict(batch), num_items_in_batch=count))
    theirs = with_gradients(lambda: SFTTrainer.compute_loss(trainer, model, dict(batch), num_items_in_batch=count))
    for loss, gradients in (theirs, with_gradients(plain)):
        assert mine[0] == pytest.approx(loss, rel=1e-5)
        assert mine[1].keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert (mine[1][name] - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_bfloat16_with_float32_masters_follows_float32(train_here: Callable[..., Path]) -> None:
    """bfloat16 keeps 8 bits, so single losses differ by its rounding; the curve must not drift away."""
    same = [item for item in SAME_RUN if not item.startswith("model.dtype")]
    exact = losses(train_here("float32", *same, "train.learning_rate=3e-3"))
    rounded = losses(train_here("bfloat16", *same, "train.learning_rate=3e-3", "model.dtype=bfloat16"))
    assert rounded == pytest.approx(exact, rel=0.02)
    assert rounded != exact


def test_zero_in_bfloat16_follows_one_process_in_bfloat16(train: Callable[..., Path]) -> None:
    """DeepSpeed's float32 masters and ours: the same learning, also where the format is half precision."""
    same = [item for item in SAME_RUN if not item.startswith("model.dtype")]
    run = train("zero2-bfloat16", "strategy=zero2", "model.dtype=bfloat16", "train.learning_rate=3e-3", *same)
    one = train("single-bfloat16", "strategy=single", "model.dtype=bfloat16", "train.learning_rate=3e-3", *same)
    assert manifest(run)["dtype"] == "bfloat16"
    assert {manifest(each)["distributed"]["gradients_summed_in"] for each in (run, one)} == {"float32"}
    assert losses(run) == pytest.approx(losses(one), rel=0.01)


def test_evaluation_is_the_mean_over_scored_tokens(train_here: Callable[..., Path]) -> None:
    """However the held-out rows fall into batches."""
    short = ["train.max_steps=1", "train.learning_rate=1e-9"]
    runs = [train_here(f"eval-{micro}", *short, f"train.micro_batch_size={micro}") for micro in (1, 16)]
    assert manifest(runs[0])["final"]["eval_loss"] == pytest.approx(manifest(runs[1])["final"]["eval_loss"], rel=1e-5)
