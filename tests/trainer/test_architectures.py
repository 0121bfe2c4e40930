"""A tiny random model of each family: flat rows where its attention allows, padded ones where not, and it learns."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import set_seed
from trl import SFTConfig

from tunewright.config.compose import compose_config
from tunewright.config.method_schema import FullConfig, LoraConfig
from tunewright.errors import ConfigError
from tunewright.plan.batch_plan import BatchPlan
from tunewright.trainer.data.batches import FlatCollator, PaddedCollator
from tunewright.trainer.data.render import IGNORED
from tunewright.trainer.loss import loss_sums
from tunewright.trainer.methods import adapt
from tunewright.trainer.model import attention
from tunewright.trainer.model.padding_free import padded_implementation, padding_free_problem
from tunewright.trainer.sft_trainer import TunewrightTrainer

VOCABULARY = 512
LENGTHS = (3, 40, 11, 2)

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
ALTERNATING = ["sliding_attention", "full_attention"]

# name: (configuration class, what differs from SIZES; None takes a size away)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("LlamaConfig", {"num_key_value_heads": 4}),
    "llama3": ("LlamaConfig", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2_sliding": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "mistral": ("MistralConfig", {"sliding_window": 8}),
    "gemma": ("GemmaConfig", {"head_dim": 16}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "sliding_window": 8, "layer_types": ALTERNATING}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 8, "layer_types": ALTERNATING}),
    "gemma3_capped": (
        "Gemma3TextConfig",
        {"head_dim": 16, "sliding_window": 8, "layer_types": ALTERNATING, "final_logit_softcapping": 1.0},
    ),
    # What a Gemma 3 of 4B and more is: the same text model, with another for images beside it.
    "gemma3_image": (
        "Gemma3Config",
        {
            "text_config": {**SIZES, "head_dim": 16, "sliding_window": 8, "layer_types": ALTERNATING},
            "vision_config": {**SIZES, "image_size": 28, "patch_size": 14},
            "mm_tokens_per_image": 4,
            "image_token_index": 4,
        },
    ),
    "phi3": ("Phi3Config", {}),
    "phi3_sliding": ("Phi3Config", {"sliding_window": 8}),
    "granite": ("GraniteConfig", {"logits_scaling": 4.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5}),
    "gpt2": (
        "GPT2Config",
        {"scale_attn_by_inverse_layer_idx": True, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "bloom": ("BloomConfig", {"hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "falcon_alibi": ("FalconConfig", {"alibi": True, "new_decoder_architecture": False, "multi_query": False}),
    "gpt_oss": (
        "GptOssConfig",
        {"head_dim": 16, "sliding_window": 8, "layer_types": ALTERNATING, "num_experts_per_tok": 1},
    ),
}
PADDED = {"gemma2": "attn_logit_softcapping", "bloom": "ALiBi", "falcon_alibi": "ALiBi", "gpt_oss": "sinks"}
FLAT = [name for name in MODELS if name not in PADDED]


def config_of(name: str) -> Any:
    config_class, changes = MODELS[name]
    return getattr(transformers, config_class)(**{**copy.deepcopy(SIZES), **copy.deepcopy(changes)})


def class_of(config: Any) -> type:
    return transformers.AutoModelForCausalLM._model_mapping[type(config)]  # type: ignore[no-any-return]


def model_of(name: str, implementation: str) -> Any:
    """A random model whose weights are large enough for a wrong attention to show in its loss."""
    set_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of(name), attn_implementation=implementation)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def padded_model(name: str) -> Any:
    config = config_of(name)
    return model_of(name, padded_implementation(config, class_of(config)))


def rows_of(*lengths: int) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(0)
    rows = []
    for length in lengths:
        ids = generator.integers(5, VOCABULARY, length)
        rows.append({"input_ids": ids, "labels": np.where(np.arange(length) >= length // 2, ids, IGNORED)})
    return rows


def loss_alone(model: Any, row: dict[str, np.ndarray]) -> torch.Tensor:
    """The cross-entropy summed over a row's scored tokens, by hand from the model's logits."""
    logits = model(input_ids=torch.tensor(row["input_ids"])[None], use_cache=False).logits[0, :-1]
    return cross_entropy(logits, torch.tensor(row["labels"])[1:], ignore_index=IGNORED, reduction="sum")


def padded_loss_sum(model: Any, rows: list[dict[str, np.ndarray]]) -> torch.Tensor:
    batch = PaddedCollator(0)(rows)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")


@pytest.mark.parametrize("name", FLAT)
def test_flat_rows_are_padded_rows_and_rows_alone(name: str) -> None:
    rows = rows_of(*LENGTHS)
    flat, padded = model_of(name, attention.register()), padded_model(name)
    assert flat.config.get_text_config()._attn_implementation == attention.NAME
    assert padding_free_problem(flat.config, type(flat)) is None
    loss, expected = loss_sums(flat, FlatCollator(0)(rows)).loss, padded_loss_sum(padded, rows)
    alone = sum(loss_alone(padded, row) for row in rows)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(loss, alone, rtol=1e-5, atol=1e-4)
    loss.backward()
    expected.backward()
    for (parameter, mine), theirs in zip(flat.named_parameters(), padded.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), parameter
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-3, msg=f"gradient of {parameter}")


@pytest.mark.parametrize("name", PADDED)
def test_what_cannot_be_flat_says_why_and_is_right_when_padded(name: str) -> None:
    config = config_of(name)
    problem = padding_free_problem(config, class_of(config))
    assert problem
    assert PADDED[name] in problem
    rows, model = rows_of(*LENGTHS), padded_model(name)
    expected = sum(loss_alone(model, row) for row in rows)
    torch.testing.assert_close(padded_loss_sum(model, rows), expected, rtol=1e-5, atol=1e-4)


def test_dropout_of_attention_is_for_training_only() -> None:
    model = model_of("gpt2", attention.register())
    for layer in model.transformer.h:
        layer.attn.attn_dropout.p = 0.5
    batch = FlatCollator(0)(rows_of(*LENGTHS))
    plain, dropped = (loss_sums(model.train(mode), batch).loss.item() for mode in (False, True))
    assert plain != pytest.approx(dropped, rel=1e-3)
    assert plain == pytest.approx(padded_loss_sum(padded_model("gpt2").eval(), rows_of(*LENGTHS)).item(), rel=1e-5)


def test_what_a_layer_asks_for_ends_training_rather_than_being_left_out() -> None:
    """Were the architecture not judged first: Gemma 2's own arguments reach the attention and are refused there."""
    model = model_of("gemma2", attention.register())
    with pytest.raises(ConfigError, match=r"softcap.*train\.padding_free=false"):
        loss_sums(model, FlatCollator(0)(rows_of(*LENGTHS)))


# Training, with the trainer that runs use

METHODS = {"full": FullConfig(name="full"), "lora": LoraConfig(name="lora", r=4, alpha=8)}
TRAINED = ["llama3", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_capped", "phi3", "gpt2", "bloom"]

Build = Callable[..., TunewrightTrainer]


@pytest.fixture
def build(small_tokenizer: Any, tmp_path: Path) -> Build:
    """A trainer over rows of very different lengths, as `train` builds it, flat where the architecture allows."""
    tokenizer = copy.deepcopy(small_tokenizer)
    tokenizer.pad_token = tokenizer.eos_token

    def trainer(name: str, method: str = "full", *, micro_batch: int = 4, **options: Any) -> TunewrightTrainer:
        config = config_of(name)
        flat = padding_free_problem(config, class_of(config)) is None
        model = model_of(name, attention.register()) if flat else padded_model(name)
        # Gradients of weights this large would be those of a model far from any minimum.
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.05)
        set_seed(0)
        args = SFTConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=4 // micro_batch,
            max_steps=options.pop("max_steps", 8),
            learning_rate=options.pop("learning_rate", 0.01),
            lr_scheduler_type="constant",
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
        rows = Dataset.from_list([{key: row[key].tolist() for key in row} for row in rows_of(*LENGTHS)])
        return TunewrightTrainer(
            model=adapt(model, METHODS[method]),
            args=args,
            train_dataset=rows,
            eval_dataset=rows,
            processing_class=tokenizer,
            config=compose_config([f"train.padding_free={flat}"]),
            plan=BatchPlan(global_batch=4, world_size=1, micro_batch=micro_batch, accumulation=4 // micro_batch),
            dtype=torch.float32,
        )

    return trainer


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", TRAINED)
def test_it_learns_what_the_method_trains_and_nothing_else(name: str, method: str, build: Build) -> None:
    trainer = build(name, method)
    before = {key: value.detach().clone() for key, value in trainer.model.named_parameters()}
    trains = {key for key, value in trainer.model.named_parameters() if value.requires_grad}
    assert trains
    assert method == "full" or all("lora" in key for key in trains)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0] - 0.2
    moved = {key for key, value in trainer.model.named_parameters() if not torch.equal(value, before[key])}
    assert moved == trains


@pytest.mark.parametrize("micro_batch", [4, 1])
@pytest.mark.parametrize("name", [*TRAINED, "granite", "falcon_alibi"])
def test_the_reported_losses_are_the_mean_over_scored_tokens(name: str, micro_batch: int, build: Build) -> None:
    """In training and in evaluation, padded or flat, through a soft cap on the logits and with them scaled."""
    trainer = build(name, micro_batch=micro_batch, max_steps=1)
    reference = padded_model(name)
    reference.load_state_dict(trainer.model.state_dict())
    rows = rows_of(*LENGTHS)
    scored = sum(int((row["labels"][1:] != IGNORED).sum()) for row in rows)
    with torch.no_grad():
        expected = sum(loss_alone(reference, row).item() for row in rows) / scored
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    trainer.train()
    assert next(line["loss"] for line in trainer.state.log_history if "loss" in line) == pytest.approx(
        expected, rel=1e-4
    )
