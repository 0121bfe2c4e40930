"""The scored head gives the loss and the gradients of the model's own head and PyTorch's cross-entropy."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, Cohere2Config, Cohere2ForCausalLM, Gemma2Config, Gemma2ForCausalLM

from tunewright.trainer.model.linear_cross_entropy import add_linear_cross_entropy


@pytest.fixture
def model(small_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    ids = torch.randint(0, 4096, (3, 11))
    labels = torch.where(torch.rand(3, 11) < 0.5, ids, -100)
    return ids, labels


def own_loss(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


@pytest.mark.parametrize("chunk", [1, 4096 * 5, 2**22])
@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_every_gradient_are_the_plain_ones(
    chunk: int, bias: bool, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the rows of a chunk: one, five, all."""
    monkeypatch.setattr("tunewright.trainer.model.linear_cross_entropy.CHUNK", chunk)
    if bias:
        model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, 4096))
    expected_model = copy.deepcopy(model)
    ids, labels = batch()
    assert add_linear_cross_entropy(model)
    loss = model(input_ids=ids, labels=labels, loss_sum=True).loss_sum
    expected = own_loss(expected_model, ids, labels)
    torch.testing.assert_close(loss, expected)
    (loss / 7).backward()
    (expected / 7).backward()
    for (name, mine), theirs in zip(model.named_parameters(), expected_model.parameters(), strict=True):
        assert mine.grad is not None, name
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_a_batch_in_which_nothing_is_scored_has_a_gradient_of_zero(model: Any) -> None:
    ids, _ = batch()
    assert add_linear_cross_entropy(model)
    loss = model(input_ids=ids, labels=torch.full_like(ids, -100), loss_sum=True).loss_sum
    loss.backward()
    assert loss.item() == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_the_logits_of_all_scored_positions_never_exist(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor that is made has the rows of a chunk, in the forward pass and in the backward pass."""
    monkeypatch.setattr("tunewright.trainer.model.linear_cross_entropy.CHUNK", 4096 * 2)
    add_linear_cross_entropy(model)
    ids = torch.randint(0, 4096, (1, 60))
    largest, weight = 0, model.lm_head.weight.data_ptr()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            found = function(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and found.size()[1:] == (4096,) and found.data_ptr() != weight:
                largest = max(largest, found.size(0))
            return found

    model.lm_head.requires_grad_(False)
    with Watch():
        model(input_ids=ids, labels=ids, loss_sum=True).loss_sum.backward()
    assert largest == 2


def test_without_the_flag_the_model_gives_logits_as_before(model: Any) -> None:
    ids, _ = batch()
    before = model(input_ids=ids).logits
    add_linear_cross_entropy(model)
    torch.testing.assert_close(model(input_ids=ids).logits, before)


def test_heads_whose_logits_are_changed_afterwards_are_left_alone() -> None:
    shape: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    for changed in (
        Gemma2ForCausalLM(Gemma2Config(**shape, final_logit_softcapping=1.0)),
        Cohere2ForCausalLM(Cohere2Config(**shape, logit_scale=0.25)),
    ):
        assert not add_linear_cross_entropy(changed)
