"""Settings that change how training goes: the best result kept, stopping early, order by length, noise, optimisers."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import losses, manifest, read_metrics
from tunewright.config.compose import compose_config
from tunewright.errors import ConfigError
from tunewright.plan.batch_plan import BatchPlan
from tunewright.plan.devices import find_devices
from tunewright.plan.rules import OPTIMIZERS, check
from tunewright.plan.substitutes import UNPAGED
from tunewright.trainer.data.batches import FlatCollator, MicroBatches, PaddedCollator
from tunewright.trainer.data.render import IGNORED
from tunewright.trainer.model.neftune import EmbeddingNoise


def quick(model: Path) -> list[str]:
    few = ["train.max_steps=6", "data.max_samples=12", "train.global_batch_size=4", "train.logging_steps=1"]
    return ["model=folder", f"model.path={model}", "train.scheduler=constant", *few]


# The best result

RATES = {"lora": 0.03, "full": 0.3, "prefix_tuning": 0.3}


@pytest.fixture(scope="module")
def rising(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides with which the eval loss rises from the first step or soon: what is held out is the opposite."""
    folder = tmp_path_factory.mktemp("rising")
    question = [{"instruction": f"What colour is number {number}?"} for number in range(16)]
    learnt = [{**row, "output": "red red red red"} for row in question]
    held = [{**row, "output": "blue sky and late parcels " * 8} for row in question[:4]]
    for name, rows in {"learnt": learnt, "held": held}.items():
        (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    registry = {name: {"file_name": f"{name}.json"} for name in ("learnt", "held")}
    (folder / "dataset_info.json").write_text(json.dumps(registry), encoding="utf-8")
    data = ["data=registry", f"data.dir={folder}", "data.names=[learnt]", "data.eval_names=[held]"]
    return [*quick(small_model), *data, "train.eval_steps=1", "train.warmup_ratio=0", "train.max_steps=4"]


def evaluations(run: Path) -> dict[int, float]:
    return {line["step"]: line["eval_loss"] for line in read_metrics(run) if "eval_loss" in line}


def check_best(run: Path, weights: str) -> None:
    """The result is the checkpoint with the lowest eval loss, which is not the last one, and the manifest says so."""
    found = evaluations(run)
    best = min(found, key=lambda step: found[step])
    assert best < max(found), found
    kept = load_file(run / "checkpoints" / f"checkpoint-{best}" / weights)
    last = load_file(run / "checkpoints" / f"checkpoint-{max(found)}" / weights)
    final = load_file(run / "final" / weights)
    assert final.keys() == kept.keys()
    assert all(torch.equal(final[name], kept[name]) for name in final)
    assert not all(torch.equal(final[name], last[name]) for name in final)
    assert {tensor.dtype for tensor in final.values()} == {tensor.dtype for tensor in kept.values()}
    assert manifest(run)["final"]["eval_loss"] == found[best]


@pytest.mark.parametrize(
    ("method", "dtype"),
    [("lora", "float32"), ("lora", "bfloat16"), ("full", "float32"), ("prefix_tuning", "float32")],
)
def test_the_best_checkpoint_is_the_result(
    method: str, dtype: str, train_here: Callable[..., Path], rising: list[str]
) -> None:
    best = ["train.keep_best=true", f"method={method}", f"model.dtype={dtype}", f"train.learning_rate={RATES[method]}"]
    best += ["method.projection=true"] if method == "prefix_tuning" else []
    run = train_here(f"best-{method}-{dtype}", *rising, *best)
    check_best(run, "model.safetensors" if method == "full" else "adapter_model.safetensors")


def test_the_best_checkpoint_is_the_result_of_ranks_that_stop_early(
    train: Callable[..., Path], rising: list[str]
) -> None:
    stop = ["train.early_stopping=2", "train.max_steps=60", f"train.learning_rate={RATES['lora']}"]
    run = train("best-zero2", *rising, "strategy=zero2", "train.keep_best=true", *stop)
    check_best(run, "adapter_model.safetensors")
    found = evaluations(run)
    assert manifest(run)["steps"] == max(found) == min(found, key=lambda step: found[step]) + 2 < 60


def test_the_last_step_is_evaluated_whatever_the_interval(train_here: Callable[..., Path], rising: list[str]) -> None:
    """So that it can be the best."""
    learning = ["train.keep_best=true", "train.learning_rate=1e-3", "train.eval_steps=3", "train.max_steps=5"]
    learning += ["data.eval_names=[learnt]"]
    run = train_here("last", *rising, *learning)
    found = evaluations(run)
    assert list(found) == [3, 5]
    assert found[5] < found[3]
    assert manifest(run)["final"]["eval_loss"] == found[5]


def test_the_best_needs_a_checkpoint_of_each_evaluation() -> None:
    """transformers keeps the best evaluation in mind, and would load nothing where it has no checkpoint."""
    best = ["train.keep_best=true", "train.eval_steps=2"]
    check(compose_config([*best, "train.save_steps=2"]), find_devices())
    with pytest.raises(ConfigError, match="needs a checkpoint of each evaluation"):
        check(compose_config([*best, "train.save_steps=4"]), find_devices())


def test_training_stops_early_and_saves_what_it_has(train_here: Callable[..., Path], rising: list[str]) -> None:
    stop = ["train.early_stopping=2", "train.max_steps=60", f"train.learning_rate={RATES['lora']}"]
    run = train_here("early", *rising, *stop)
    found = evaluations(run)
    best = min(found, key=lambda step: found[step])
    assert manifest(run)["status"] == "done"
    assert manifest(run)["steps"] == best + 2 < 60
    assert manifest(run)["final"]["eval_loss"] == found[best + 2]
    assert (run / "final" / "adapter_model.safetensors").is_file()


# What the log interval must not decide


def test_the_final_figures_do_not_depend_on_the_log_interval(
    train_here: Callable[..., Path], small_model: Path
) -> None:
    """Also of a run that is continued from a checkpoint between two log lines."""
    overrides = [*quick(small_model), "train.max_steps=14", "data.eval_names=[]", "train.save_steps=5"]
    runs = [train_here(f"interval-{step}", *overrides, f"train.logging_steps={step}") for step in (1, 100)]
    steps, last = losses(runs[0]), runs[1]
    told = [[manifest(run)[key] for key in ("final", "tokens_seen")] for run in runs]
    final = {"train_loss": sum(steps[-10:]) / 10, "mean_train_loss": sum(steps) / 14, "eval_loss": None}
    assert told[0][0] == pytest.approx(final)
    shutil.rmtree(last / "final")
    train_here(last.name, *overrides, "train.logging_steps=100", checkpoint=last / "checkpoints" / "checkpoint-10")
    told.append([manifest(last)[key] for key in ("final", "tokens_seen")])
    assert [line["step"] for line in read_metrics(last) if "loss" in line] == [1, 5, 10, 14]
    assert told[1:] == [told[0]] * 2


def test_warming_up_over_all_steps_is_not_warming_up_over_one(
    train_here: Callable[..., Path], small_model: Path
) -> None:
    """transformers reads a share of 1.0 as one step."""
    run = train_here("warm", *quick(small_model), "train.scheduler=cosine", "train.warmup_ratio=1.0")
    rates = [line["learning_rate"] for line in read_metrics(run) if "loss" in line]
    assert rates == pytest.approx([2e-4 * step / 6 for step in range(6)])


# Order by length


def steps_of(world: int, lengths: np.ndarray, epoch: int = 0, seed: int = 1, size: int = 8) -> list[list[int]]:
    """The rows of each step, sorted, however they lie on `world` ranks."""
    plan = BatchPlan(size, world, micro_batch=2, accumulation=math.ceil(size / world / 2))
    ranks = []
    for rank in range(world):
        batches = MicroBatches(lengths, plan, rank, shuffle=True, seed=seed, group_by_length=True)
        batches.set_epoch(epoch)
        ranks.append(list(batches))
    starts = range(0, len(ranks[0]), plan.accumulation)
    return [sorted(row for rank in ranks for b in rank[s : s + plan.accumulation] for row in b) for s in starts]


def test_batches_by_length_hold_every_row_once_and_like_ones_together() -> None:
    lengths = np.random.default_rng(0).integers(2, 1000, 403)
    steps = steps_of(1, lengths)
    assert sorted(row for step in steps for row in step) == list(range(403))
    spread = np.mean([np.ptp(lengths[step]) for step in steps])
    shuffled = np.random.default_rng(1).permutation(403)
    assert spread < 0.2 * np.mean([np.ptp(lengths[shuffled[i : i + 8]]) for i in range(0, 403, 8)])
    assert steps == steps_of(2, lengths) == steps_of(4, lengths)
    assert steps != steps_of(1, lengths, epoch=1)
    assert steps != steps_of(1, lengths, seed=2)


def test_a_run_by_length_sees_every_row_once(
    train_here: Callable[..., Path], small_model: Path, trainers: list[Any]
) -> None:
    train_here("by-length", *quick(small_model), "train.group_by_length=true", "data.eval_names=[]", "train.epochs=1")
    trainer = trainers[-1]
    loader = trainer.get_train_dataloader()
    rows = sorted(tuple(row) for row in trainer.train_dataset["input_ids"])
    seen = []
    for batch in loader:
        ends = batch["cu_seq_lens_q"].tolist()
        seen += [tuple(batch["input_ids"][0, a:b].tolist()) for a, b in pairwise(ends)]
    assert sorted(seen) == rows


# Noise on the embeddings


class Embedded(torch.nn.Module):
    """Just an embedding of ones, so that what is added to it can be seen."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding.from_pretrained(torch.ones(20, width))

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embedding


def noise_of_rows(collator: Any, lengths: list[int], *, training: bool = True) -> list[torch.Tensor]:
    """The noise (length, 64) that each row gets."""
    rows = [{"input_ids": np.arange(n), "labels": np.full(n, IGNORED)} for n in lengths]
    batch = collator(rows)
    model = Embedded(64).train(training)
    noise = EmbeddingNoise(model, alpha=5.0)
    noise.see(batch)
    added = model.embedding(batch["input_ids"]) - 1
    if added.shape[0] == len(lengths):
        return [added[index, :length] for index, length in enumerate(lengths)]
    return list(added[0].split(lengths))


@pytest.mark.parametrize("collator", [FlatCollator(0), PaddedCollator(0)], ids=["flat", "padded"])
def test_noise_is_bounded_by_the_length_of_each_row(collator: Any) -> None:
    lengths = [2, 16, 7]
    for length, noise in zip(lengths, noise_of_rows(collator, lengths), strict=True):
        bound = 5 / math.sqrt(length * 64)
        largest = noise.abs().max().item()
        assert 0.9 * bound < largest <= bound * (1 + 1e-6)
        assert abs(noise.mean().item()) < 0.2 * bound
        assert noise.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)  # uniform


def test_evaluation_has_no_noise() -> None:
    assert not any(noise.any() for noise in noise_of_rows(FlatCollator(0), [2, 5], training=False))


@pytest.mark.parametrize("layout", ["true", "false"])
def test_a_run_with_noise_differs_in_training_alone(
    layout: str, train_here: Callable[..., Path], small_model: Path
) -> None:
    still = [*quick(small_model), "train.learning_rate=1e-12", "train.max_steps=2", f"train.padding_free={layout}"]
    plain = train_here(f"plain-{layout}", *still)
    noisy = train_here(f"noisy-{layout}", *still, "train.neftune_alpha=5")
    assert abs(losses(noisy)[0] - losses(plain)[0]) > 1e-3
    assert manifest(noisy)["final"]["eval_loss"] == pytest.approx(manifest(plain)["final"]["eval_loss"], rel=1e-6)


# Optimisers

ON_A_CPU = [name for name in OPTIMIZERS if name not in UNPAGED]  # a paged one is replaced by one of the others


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ON_A_CPU)
def test_an_optimizer_trains(
    name: str, dtype: str, train_here: Callable[..., Path], small_model: Path, trainers: list[Any]
) -> None:
    start = [f"train.optimizer={name}", f"model.dtype={dtype}", "train.learning_rate=1e-2", "data.eval_names=[]"]
    run = train_here(f"{name}-{dtype}", *quick(small_model), *start, "train.max_steps=3", "train.warmup_ratio=0")
    assert manifest(run)["status"] == "done"
    trainer = trainers[-1]
    assert {p.dtype for p in trainer.model.parameters()} == {getattr(torch, dtype)}
    held = {p.dtype for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {torch.float32}
    moved = {key for key, p in trainer.model.named_parameters() if "lora_B" in key and p.any()}
    assert moved == {key for key, _ in trainer.model.named_parameters() if "lora_B" in key}
    assert all(math.isfinite(loss) for loss in losses(run))
