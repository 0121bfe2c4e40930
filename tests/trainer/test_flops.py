"""The FLOPs that are credited are those of the products that autograd does, counted by PyTorch as it does them.

PyTorch counts every `mm`; products of activations with each other are `bmm`, which nobody credits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    JetMoeConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    TrainerCallback,
)

from tests.conftest import read_metrics
from tunewright.trainer.flops import FlopCounter
from tunewright.trainer.methods import freeze

aten = torch.ops.aten
ROWS, LENGTH, VIRTUAL = 2, 24, 5
TASK = {"task_type": TaskType.CAUSAL_LM}
SHAPE = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "tie_word_embeddings": False}
MLP = {**SHAPE, "intermediate_size": 160}
EXPERTS: dict[str, PreTrainedConfig] = {
    "mixtral": MixtralConfig(**MLP, num_local_experts=8, num_experts_per_tok=2),
    "shared": Qwen2MoeConfig(
        **MLP, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=48, shared_expert_intermediate_size=112
    ),
    "jetmoe": JetMoeConfig(**MLP, kv_channels=16, num_local_experts=6, num_experts_per_tok=2),
}


def build(config: PreTrainedConfig) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    return model.train()


def dense(**more: Any) -> Any:
    return build(Qwen2Config(**{**MLP, **more}))


def lora(model: Any, modules: str | list[str], **more: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=4, lora_dropout=0.1, target_modules=modules, **TASK, **more))


def frozen_below(layers: int) -> Any:
    method = SimpleNamespace(layers=layers, modules=[], extra_modules=[])
    return freeze.build(dense(), method, None)


KINDS: dict[str, Callable[[], Any]] = {
    "full": dense,
    "full, tied": lambda: dense(tie_word_embeddings=True),
    "freeze, the last": lambda: frozen_below(1),
    "freeze, the first two": lambda: frozen_below(-2),
    "LoRA": lambda: lora(dense(), "all-linear"),
    "LoRA on values": lambda: lora(dense(), ["v_proj"]),
    "LoRA behind everything in a layer": lambda: lora(dense(), ["down_proj"]),
    "LoRA in the last layer": lambda: lora(dense(), ["q_proj"], layers_to_transform=[3]),
    "LoRA and the head": lambda: lora(dense(), ["q_proj"], modules_to_save=["lm_head"]),
    "IA3": lambda: get_peft_model(dense(), IA3Config(**TASK)),
    "prompt tuning": lambda: get_peft_model(dense(), PromptTuningConfig(num_virtual_tokens=VIRTUAL, **TASK)),
    "P-tuning": lambda: get_peft_model(
        dense(), PromptEncoderConfig(num_virtual_tokens=VIRTUAL, encoder_hidden_size=32, **TASK)
    ),
    "prefix tuning": lambda: get_peft_model(dense(), PrefixTuningConfig(num_virtual_tokens=VIRTUAL, **TASK)),
    "prefix tuning, projected": lambda: get_peft_model(
        dense(),
        PrefixTuningConfig(num_virtual_tokens=VIRTUAL, prefix_projection=True, encoder_hidden_size=32, **TASK),
    ),
    **{f"{name}, full": partial(build, config) for name, config in EXPERTS.items()},
    "mixtral, LoRA": lambda: lora(build(EXPERTS["mixtral"]), ["q_proj", "v_proj"]),
    "shared, LoRA": lambda: lora(build(EXPERTS["shared"]), ["o_proj"]),
}


def credited_and_counted(model: Any) -> tuple[float, float]:
    """Return the FLOPs that we credit for a forward and backward pass, and those that PyTorch sees in it."""
    ids = torch.randint(0, 256, (ROWS, LENGTH))
    counter = FlopCounter(model)
    with FlopCounterMode(display=False) as seen, counter.watching():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    by_operation = seen.get_flop_counts()["Global"]
    assert counter.flops is not None
    virtual = counter.virtual_tokens * ROWS
    prefix = virtual and model.active_peft_config.peft_type == "PREFIX_TUNING"
    heads = ids.numel() + (0 if prefix else virtual)  # transformers' own loss scores all positions
    credited = counter.flops.of(ids.numel(), heads, virtual)
    return credited, sum(by_operation.get(operation, 0) for operation in (aten.mm, aten.addmm))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_credited_is_what_is_computed(kind: str) -> None:
    credited, counted = credited_and_counted(KINDS[kind]())
    assert credited == pytest.approx(counted, rel=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputing_and_what_it_forces_are_not_credited(reentrant: bool) -> None:
    plain, counted = credited_and_counted(lora(dense(), "all-linear"))
    recomputing = lora(dense(), "all-linear")
    recomputing.enable_input_require_grads()
    recomputing.gradient_checkpointing_enable({"use_reentrant": reentrant})
    credited, more = credited_and_counted(recomputing)
    assert credited == pytest.approx(plain, rel=3e-3)  # the first layer's small factors count as others' do
    assert more > 1.2 * counted


def test_a_token_meets_its_own_experts_alone() -> None:
    """Mixtral's shape: per layer two experts of three matrices each, the router, and attention."""
    model = build(EXPERTS["mixtral"])
    counter = FlopCounter(model)
    with counter.watching():
        model(input_ids=torch.zeros(1, 3, dtype=torch.long))
    layer = 2 * (3 * 64 * 160) + 64 * 8 + 2 * 64 * 64 + 2 * 64 * 32
    assert counter.flops is not None
    assert counter.flops.token == 6 * 4 * layer
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert counter.flops.of(tokens=10, scored=3) == 6 * (10 * 4 * layer + 3 * 64 * 256)


def test_adapters_of_experts_are_met_by_their_own_tokens() -> None:
    """PEFT adds those of fused weights up over all experts in every pass, which is not what a token needs."""
    options = {"r": 4, "target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"], **TASK}
    model = get_peft_model(build(EXPERTS["mixtral"]), LoraConfig(**options))
    counter = FlopCounter(model)
    with counter.watching():
        model(input_ids=torch.zeros(1, 3, dtype=torch.long))
    frozen = 2 * 3 * 64 * 160 + 64 * 8 + 2 * 64 * 64 + 2 * 64 * 32
    adapters = 2 * 4 * ((64 + 320) + (160 + 64))
    # In the first layer nothing trained lies before attention, the router and the experts' first product.
    first = 2 * frozen + 2 * (2 * 64 * 160) + 6 * adapters
    assert counter.flops is not None
    assert counter.flops.token == pytest.approx(first + 3 * (4 * frozen + 6 * adapters), rel=5e-3)


def test_large_models_need_what_arithmetic_says() -> None:
    """On the meta device, so that nothing is computed: Mixtral 8x7B with LoRA, and two of Llama 3.1 8B's 32 layers."""
    ids = torch.zeros(1, 8, dtype=torch.long, device="meta")
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(MixtralConfig(), experts_implementation="batched_mm")
        shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
        llama: Any = AutoModelForCausalLM.from_config(LlamaConfig(**shape, num_key_value_heads=8, vocab_size=128256))
        mixtral = lora(model, ["q_proj", "k_proj", "v_proj", "o_proj"])
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    freeze.build(llama, SimpleNamespace(layers=2, modules=[], extra_modules=[]), None)
    counters = FlopCounter(mixtral), FlopCounter(llama)
    for counter in counters:
        with counter.watching():
            counter.model(input_ids=ids)
    experts, frozen = (counter.flops for counter in counters)
    assert experts is not None
    assert experts.of(1, 1) == pytest.approx(51e9, rel=0.01)  # of the 188e9 that all of its experts would take
    assert frozen is not None
    assert frozen.token == 2 * 30 * layer + 6 * 2 * layer  # 4 for each of the 30 would be 1.8 times as much


class CountProducts(TrainerCallback):
    """Counts what PyTorch multiplies in the steps of a training, products of activations with each other aside."""

    def __init__(self) -> None:
        def in_place(out: Any, left: Any, right: Any, **kwargs: Any) -> int:  # as the fused LoRA sum is
            return 2 * left[0] * left[1] * right[1]

        self.mode = FlopCounterMode(display=False, custom_mapping={aten.addmm_: in_place})

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.mode.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.mode.__exit__(None, None, None)

    def total(self) -> float:
        by_operation = self.mode.get_flop_counts()["Global"]
        return sum(by_operation.get(operation, 0) for operation in (aten.mm, aten.addmm, aten.addmm_))


@pytest.mark.parametrize(
    "overrides", [["method=lora"], ["method=prompt_tuning"]], ids=["without padding", "prompt, padded"]
)
def test_the_log_has_the_flops_of_a_training(
    overrides: list[str], small_model: Path, train_here: Callable[..., Path]
) -> None:
    few = ["train.max_steps=1", "data.max_samples=12", "train.global_batch_size=1", "train.logging_steps=1"]
    products = CountProducts()
    run = train_here(
        f"flops-{overrides[0].partition('=')[2]}",
        *overrides,
        "model=folder",
        f"model.path={small_model}",
        *few,
        callbacks=[products],
    )
    line = next(line for line in read_metrics(run) if "loss" in line)
    assert line["flops_per_second"] * line["step_seconds"] == pytest.approx(products.total(), rel=0.01)
