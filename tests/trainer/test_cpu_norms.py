"""RMSNorm in one node gives what the model's own gives, and stands in for that kind of norm only."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from tunewright.trainer.model.cpu_norms import fuse_norms


def outcome(norm: Any, hidden: torch.Tensor) -> list[torch.Tensor]:
    """The output and both gradients."""
    given = hidden.clone().requires_grad_()
    out = norm(given)
    out.square().sum().backward()
    return [out.detach(), given.grad, norm.weight.grad]


@pytest.mark.parametrize("block", [1, 64 * 5, 2**17])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_output_and_gradients_are_the_models_own(
    dtype: torch.dtype, tolerance: float, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the rows of a block: one, five, all."""
    monkeypatch.setattr("tunewright.trainer.model.cpu_norms.BLOCK", block)
    torch.manual_seed(0)
    plain, hidden = Qwen2RMSNorm(64).to(dtype), torch.randn(2, 11, 64).to(dtype) * 3
    torch.nn.init.normal_(plain.weight, 1.0, 0.3)
    fused = copy.deepcopy(plain)
    assert fuse_norms(fused) == 1
    mine, theirs = outcome(fused, hidden), outcome(plain, hidden)
    assert torch.equal(mine[0], theirs[0])
    for my, their in zip(mine[1:], theirs[1:], strict=True):
        torch.testing.assert_close(my, their, rtol=tolerance, atol=20 * tolerance)


def test_in_half_precision_its_gradients_are_nearer_to_the_truth() -> None:
    torch.manual_seed(0)
    plain, hidden = Qwen2RMSNorm(64).to(torch.bfloat16), torch.randn(1, 200, 64).to(torch.bfloat16)
    fused, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    fuse_norms(fused)
    truth = outcome(exact, hidden.double())
    for mine, theirs, right in zip(outcome(fused, hidden), outcome(plain, hidden), truth, strict=True):
        assert (mine - right).norm() <= 1.01 * (theirs - right).norm()


@pytest.mark.parametrize(
    ("kind", "count"), [(Qwen2RMSNorm, 1), (LlamaRMSNorm, 1), (Gemma2RMSNorm, 0), (Olmo2RMSNorm, 0)]
)
def test_a_norm_of_another_kind_stays_as_it_is(kind: type[torch.nn.Module], count: int) -> None:
    """Gemma's multiplies by one plus the weight, OLMo's rounds after it."""
    norm = kind(64).to(torch.bfloat16)
    before = copy.deepcopy(norm.state_dict())
    assert fuse_norms(norm) == count
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
