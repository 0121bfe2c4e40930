"""Virtual tokens: a loss that does not know of them, gradients for them alone, first values, answers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM, set_seed
from trl import SFTConfig

from tunewright.config.compose import compose_config, load_config
from tunewright.deliver.generate import Answerer, run_of
from tunewright.errors import ConfigError
from tunewright.launch.train import check_all
from tunewright.plan.batch_plan import BatchPlan
from tunewright.plan.devices import find_devices
from tunewright.trainer.data.render import IGNORED
from tunewright.trainer.methods import adapt
from tunewright.trainer.prepared import prepare
from tunewright.trainer.sft_trainer import TunewrightTrainer

VOCABULARY, TOKENS = 512, 5
LENGTHS = (3, 40, 11, 2)
METHODS = {
    "prompt_tuning": ["method=prompt_tuning"],
    "p_tuning-mlp": ["method=p_tuning"],
    "p_tuning-lstm": ["method=p_tuning", "method.encoder=lstm"],
    "prefix_tuning": ["method=prefix_tuning"],
    "prefix_tuning-projection": ["method=prefix_tuning", "method.projection=true"],
}


def qwen2() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=VOCABULARY, num_key_value_heads=2, **sizes))


def gpt2() -> Any:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes))


MODELS = {"qwen2": qwen2, "gpt2": gpt2}


def rows(learn_all: bool) -> list[dict[str, list[int]]]:
    """Rows of very different lengths; with `learn_all` every token carries a label, the first one too."""
    generator = np.random.default_rng(0)
    made = []
    for length in LENGTHS:
        ids = generator.integers(5, VOCABULARY, length)
        labels = ids if learn_all else np.where(np.arange(length) >= length // 2, ids, IGNORED)
        made.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return made


Build = Callable[..., TunewrightTrainer]


@pytest.fixture
def build(small_tokenizer: Any, tmp_path: Path) -> Build:
    """A trainer with virtual tokens on a random model, as `train` builds it."""
    tokenizer = copy.deepcopy(small_tokenizer)
    tokenizer.pad_token = tokenizer.eos_token

    def trainer(model: str, method: str, *, learn_all: bool = False, micro_batch: int = 4) -> TunewrightTrainer:
        config = compose_config([*METHODS[method], f"method.virtual_tokens={TOKENS}", "train.padding_free=false"])
        set_seed(0)
        base = MODELS[model]()
        for parameter in base.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        parts = -(-len(LENGTHS) // micro_batch)
        args = SFTConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=parts,
            max_steps=1,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            optim="sgd",  # a step of which is the gradient
            logging_steps=1,
            save_strategy="no",
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            average_tokens_across_devices=True,
            remove_unused_columns=False,
            bf16=False,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        data = Dataset.from_list(rows(learn_all))
        return TunewrightTrainer(
            model=adapt(base, config.method),
            args=args,
            train_dataset=data,
            eval_dataset=data,
            processing_class=tokenizer,
            config=config,
            plan=BatchPlan(len(LENGTHS), 1, micro_batch, parts),
            dtype=torch.float32,
        )

    return trainer


def loss_by_hand(model: Any, learn_all: bool) -> torch.Tensor:
    """The mean cross-entropy over scored tokens from the logits of each row alone.

    Virtual tokens that lie before the row have logits too, which are skipped; the last of them would predict the
    row's first token, which is never a target.
    """
    total, scored = torch.zeros(()), 0
    for row in rows(learn_all):
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])[1:]
        logits = model(input_ids=ids[None]).logits[0]
        assert len(logits) in (len(ids), len(ids) + TOKENS)
        total = total + cross_entropy(logits[-len(ids) : -1], labels, ignore_index=IGNORED, reduction="sum")
        scored += int((labels != IGNORED).sum())
    return total / scored


@pytest.mark.parametrize("learn_all", [False, True], ids=["answers", "every token"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_the_reported_losses_are_those_of_the_rows_alone(
    model: str, method: str, learn_all: bool, build: Build
) -> None:
    for micro_batch in (4, 1):
        trainer = build(model, method, learn_all=learn_all, micro_batch=micro_batch)
        trained = {key: p for key, p in trainer.model.named_parameters() if p.requires_grad}
        before = {key: p.detach().clone() for key, p in trained.items()}
        expected = loss_by_hand(trainer.model.eval(), learn_all)
        gradients = torch.autograd.grad(expected, list(trained.values()))
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
        trainer.train()
        reported = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        assert reported == [pytest.approx(expected.item(), rel=1e-5)]
        for (key, parameter), gradient in zip(trained.items(), gradients, strict=True):
            torch.testing.assert_close(
                before[key] - parameter, 1e-3 * gradient, rtol=1e-3, atol=1e-6, msg=f"{key}, {micro_batch}"
            )


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_the_virtual_tokens_alone(method: str, build: Build) -> None:
    model = build("qwen2", method).model
    loss_by_hand(model, learn_all=True).backward()
    with_gradient = {key for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {key for key, _ in model.named_parameters() if "prompt_encoder" in key}


def test_a_text_gives_the_virtual_tokens_their_first_values(
    train_here: Callable[..., Path], small_model: Path, trainers: list[Any], tiny_tokenizer: Any
) -> None:
    text = "Route this ticket as JSON."
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    text_init = ["method=prompt_tuning", f"method.virtual_tokens={len(ids)}", f"method.init_text='{text}'"]
    train_here("text", *few_steps(small_model), *text_init, "train.max_steps=1", "train.learning_rate=1e-12")
    model = trainers[-1].model
    prompt = model.prompt_encoder["default"].embedding.weight
    torch.testing.assert_close(prompt, model.get_input_embeddings().weight[ids], rtol=0, atol=1e-9)


def few_steps(model: Path) -> list[str]:
    few = ["train.max_steps=4", "data.max_samples=8", "train.global_batch_size=4", "train.logging_steps=1"]
    return ["model=folder", f"model.path={model}", "data.eval_names=[]", *few]


def test_virtual_tokens_count_towards_the_cutoff() -> None:
    """Rows are cut so that they fit behind them, and too many are refused while nothing has been loaded."""

    def longest(*overrides: str) -> int:
        rows = prepare(compose_config(overrides), lambda line: None).cache.open("train")["input_ids"]
        return max(len(row) for row in rows)

    uncut = longest()
    cut = ["method=prompt_tuning", "method.virtual_tokens=9", f"data.cutoff_len={uncut}"]
    assert longest(*cut) == longest(f"data.cutoff_len={uncut - 9}") == uncut - 9
    too_many = ["method=prompt_tuning", "method.virtual_tokens=70", "data.cutoff_len=80"]
    nowhere = ["model=folder", "model.path=/nobody/nothing"]
    with pytest.raises(ConfigError, match=r"`method\.virtual_tokens` is 70 .* 10 are left to a row"):
        check_all(compose_config([*too_many, *nowhere]), find_devices())


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning-mlp", "prefix_tuning-projection"])
def test_answers_with_virtual_tokens_and_without_them_again(
    method: str, train_here: Callable[..., Path], tiny_model: Path
) -> None:
    prompt = ["data.eval_names=[]", f"method.virtual_tokens={TOKENS}", "train.learning_rate=1.0"]
    steps = ["train.max_steps=3", "train.save_steps=1", "data.max_samples=8", "train.scheduler=constant"]
    run = train_here(f"answers-{method}", *METHODS[method], *prompt, *steps)
    answerer = Answerer(load_config(run / "config.yaml"), tiny_model)
    prompts = ["Route this ticket as JSON.\nMy parcel is missing.", "Hello"]
    before = answerer.answer(prompts, 8)
    answers = []
    for folder in (run, run / "checkpoints" / "checkpoint-2"):
        with answerer.tuned(run_of(folder, checkpoints=True)):
            answers.append(answerer.answer(prompts, 8))
            alone = [answerer.answer([text], 8)[0] for text in prompts]
        assert alone == answers[-1]  # padding on the left of a shorter prompt changes nothing
        assert answerer.answer(prompts, 8) == before
    assert before not in answers
