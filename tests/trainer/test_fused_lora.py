"""LoRA's fused sum gives what PEFT's four operations give."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from tunewright.trainer.model.fused_lora import FusedSum, fuse


def adapted(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A model whose adapters do something already."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    chosen = {"target_modules": "all-linear", **settings}
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=12, **chosen)
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def outcome(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logits = model(input_ids=_ids().to(model.device)).logits
    logits.float().logsumexp(-1).sum().backward()
    return logits, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"target_modules": ["q_proj", "down_proj"]}])
def test_the_fused_sum_is_pefts(settings: dict[str, Any], small_model: Path) -> None:
    plain = adapted(small_model, **settings)
    fused = copy.deepcopy(plain)
    layers = 14 if "target_modules" not in settings else 4
    assert fuse(fused) == layers
    (expected, gradients), (logits, others) = outcome(plain), outcome(fused)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == others.keys()
    assert len(gradients) == 2 * layers
    for name, gradient in gradients.items():
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_the_fused_sum_is_pefts_on_a_gpu(small_model: Path) -> None:
    plain = adapted(small_model).cuda()
    fused = copy.deepcopy(plain)
    fuse(fused)
    (expected, gradients), (logits, others) = outcome(plain), outcome(fused)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-2, atol=1e-4)


def test_in_half_precision_the_fused_sum_is_nearer_to_the_truth(small_model: Path) -> None:
    plain = adapted(small_model, torch.bfloat16)
    fused, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    fuse(fused)
    truth = outcome(exact)[1]

    def error(model: Any) -> float:
        gradients = outcome(model)[1]
        return sum(float((gradients[name] - truth[name]).norm() / truth[name].norm()) for name in truth)

    assert error(fused) < 1.02 * error(plain)


def test_dropout_drops_the_same_inputs(small_model: Path) -> None:
    plain = adapted(small_model, lora_dropout=0.5).train()
    fused = copy.deepcopy(plain)
    fuse(fused)
    torch.testing.assert_close(outcome(fused)[0], outcome(plain)[0], rtol=1e-4, atol=1e-5)


def test_adapters_can_be_switched_off(small_model: Path) -> None:
    model = adapted(small_model)
    fuse(model)
    ids = torch.arange(9)[None]
    with model.disable_adapter():
        off = model(input_ids=ids).logits
    base = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32)
    torch.testing.assert_close(off, base(input_ids=ids).logits)
    assert not torch.allclose(model(input_ids=ids).logits, off, atol=1e-3)


def test_what_is_saved_is_pefts_own(small_model: Path, tmp_path: Path) -> None:
    model = adapted(small_model)
    fuse(model)
    model.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    assert not any(isinstance(v, FusedSum) for m in loaded.modules() for v in getattr(m, "lora_variant", {}).values())
    torch.testing.assert_close(outcome(model)[0], loaded(input_ids=_ids()).logits, rtol=1e-4, atol=1e-5)


def _ids() -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randint(0, 4096, (2, 9))


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}])
def test_other_kinds_of_lora_stay_pefts(settings: dict[str, Any], small_model: Path) -> None:
    assert fuse(adapted(small_model, **settings)) == 0
