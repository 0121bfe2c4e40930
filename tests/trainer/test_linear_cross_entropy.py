"""Each head that can compute the loss gives that of the model's own head and PyTorch's cross-entropy."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from tunewright.config.schema import CrossEntropy
from tunewright.errors import ConfigError
from tunewright.trainer.data.batches import FlatCollator, PaddedCollator
from tunewright.trainer.loss import choose_head, loss_sums
from tunewright.trainer.model import attention, linear_cross_entropy
from tunewright.trainer.model.linear_cross_entropy import add_linear_cross_entropy, fitting

VOCABULARY = 4096


@pytest.fixture
def model(small_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32)


@pytest.fixture
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Logits of so many elements at a time."""
    for sizes in (linear_cross_entropy.CHUNK, linear_cross_entropy.CHUNK_TRAINED):
        monkeypatch.setitem(sizes, "cpu", request.param)
    return int(request.param)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    ids = torch.randint(0, VOCABULARY, (3, 11))
    labels = torch.where(torch.rand(3, 11) < 0.5, ids, -100)
    return ids, labels


def own_loss(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


@pytest.mark.parametrize("chunk", [1, VOCABULARY * 5, 2**22], indirect=True)
@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_every_gradient_are_the_plain_ones(chunk: int, bias: bool, model: Any) -> None:
    """Whatever the rows of a chunk: one, five, all."""
    if bias:
        model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, 4096))
    expected_model = copy.deepcopy(model)
    ids, labels = batch()
    add_linear_cross_entropy(model)
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
    add_linear_cross_entropy(model)
    loss = model(input_ids=ids, labels=torch.full_like(ids, -100), loss_sum=True).loss_sum
    loss.backward()
    assert loss.item() == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("head", ["tunewright", "trl", "own"])
def test_every_head_gives_the_plain_loss_and_gradients(head: str, padded: bool, small_model: Path) -> None:
    """With a frozen head, a trained one, and one that is a copy of PEFT's; on flat rows and on padded ones."""
    rows = [{"input_ids": ids.numpy(), "labels": labels.numpy()} for ids, labels in zip(*batch(), strict=True)]
    rows[1] = {name: values[:6] for name, values in rows[1].items()}
    collated = (PaddedCollator if padded else FlatCollator)(0)(rows)
    implementation = "sdpa" if padded else attention.register()
    for change in ("trained", "frozen", "copied"):
        model = AutoModelForCausalLM.from_pretrained(
            small_model, dtype=torch.float32, attn_implementation=implementation
        )
        plain_model = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32)
        base = model
        add_fused_lm_head(base)  # as TRL's trainer does
        if change == "copied":
            model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
        if head != "own":
            assert choose_head(base, CrossEntropy(head), gpu=False, padded=padded) == head
        if change == "frozen":
            base.get_output_embeddings().requires_grad_(False)
        loss, plain = loss_sums(model, collated, head).loss, sum(plain_loss(plain_model, row) for row in rows)
        torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-5)
        loss.backward()
        plain.backward()
        wanted = {name: one.grad for name, one in plain_model.named_parameters()}
        compared = 0
        for name, one in model.named_parameters():
            own = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
            if one.requires_grad and own in wanted:
                torch.testing.assert_close(one.grad, wanted[own], rtol=1e-4, atol=1e-5, msg=name)
                compared += 1
        assert compared == {"trained": len(wanted), "frozen": len(wanted) - 1, "copied": 1}[change]


def plain_loss(model: Any, row: dict[str, np.ndarray]) -> torch.Tensor:
    logits = model(input_ids=torch.tensor(row["input_ids"])[None]).logits[0, :-1]
    return cross_entropy(logits, torch.tensor(row["labels"][1:]), reduction="sum")


HeadLoss = linear_cross_entropy.HeadLoss


def check_against_float32(loss: HeadLoss, device: str, dtype: torch.dtype, tolerance: float) -> None:
    """Also where the model is sure of the target: softmax - 1 is small there, and nothing else is left to learn."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 64).to(dtype), torch.randn(VOCABULARY, 64).to(dtype)
    targets = torch.randint(0, VOCABULARY, (300,))
    hidden[:250] = weight[targets[:250]] * 0.25
    exact = [one.float().requires_grad_() for one in (hidden, weight)]
    plain = cross_entropy(exact[0] @ exact[1].t(), targets, reduction="sum")
    found = [one.to(device).requires_grad_() for one in (hidden, weight)]
    total = loss(*found, None, targets.to(device))
    torch.testing.assert_close(total.cpu().float(), plain, rtol=1e-3, atol=0)
    total.backward()
    plain.backward()
    for mine, theirs in zip(found, exact, strict=True):
        assert (mine.grad.cpu() - theirs.grad).norm() < tolerance * theirs.grad.norm()


def test_bfloat16_gradients_are_those_of_float32_rounded() -> None:
    check_against_float32(linear_cross_entropy.linear_cross_entropy, "cpu", torch.bfloat16, 0.01)


def test_what_a_gpu_calls_takes_its_arguments() -> None:
    """Products with a float32 result have no CPU kernel. On tensors of the meta device they run without a GPU.

    The sum that a trained head's gradient is made by does not before PyTorch 2.15: it has a kernel for CUDA.
    """
    hidden, weight = (torch.empty(rows, 64, device="meta", dtype=torch.bfloat16) for rows in (300, VOCABULARY))
    targets = torch.empty(300, device="meta", dtype=torch.long)
    total = linear_cross_entropy.linear_cross_entropy(hidden.requires_grad_(), weight, None, targets)
    total.backward()
    assert total.dtype is torch.float32
    assert (hidden.grad.shape, hidden.grad.dtype) == (hidden.shape, torch.bfloat16)
    assert "out_dtype" in str(torch.ops.aten.addmm.dtype_out._schema)
    if torch.version.cuda is not None:
        assert torch._C._dispatch_has_kernel_for_dispatch_key("aten::addmm.dtype_out", "CUDA")


@pytest.mark.gpu
def test_gradients_of_a_gpu_are_those_of_float32_rounded() -> None:
    check_against_float32(linear_cross_entropy.linear_cross_entropy, "cuda", torch.bfloat16, 0.01)
    check_against_float32(linear_cross_entropy.linear_cross_entropy, "cuda", torch.float32, 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("exact", [True, False])
def test_cut_cross_entropy_is_held_to_float32_on_a_gpu(exact: bool) -> None:
    """It adds gradients up in bfloat16 (25.1), which costs some of their precision."""
    pytest.importorskip("cut_cross_entropy")
    loss = linear_cross_entropy.cut_cross_entropy(exact)
    check_against_float32(loss, "cuda", torch.bfloat16, 0.03 if exact else 0.1)
    assert loss(torch.zeros(0, 64), torch.zeros(VOCABULARY, 64), None, torch.zeros(0, dtype=torch.long)) == 0


class Watch(TorchDispatchMode):
    """Notes the rows of each matrix of so many columns that is made."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns = columns
        self.rows: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        given = {one.data_ptr() for one in args if isinstance(one, torch.Tensor)}
        if isinstance(found, torch.Tensor) and found.size()[1:] == (self.columns,) and found.data_ptr() not in given:
            self.rows.append(found.size(0))
        return found


def test_an_evaluation_works_out_no_gradients(model: Any) -> None:
    """That of a trained head, in float32, would be the largest tensor of the evaluation."""
    add_linear_cross_entropy(model)
    ids, labels = batch()
    with Watch(64) as evaluated, torch.no_grad():
        model(input_ids=ids, labels=labels, loss_sum=True)
    with Watch(64) as trained:
        model(input_ids=ids, labels=labels, loss_sum=True)
    assert VOCABULARY in trained.rows
    assert VOCABULARY not in evaluated.rows


@pytest.mark.parametrize("chunk", [VOCABULARY * 2], indirect=True)
def test_the_logits_of_all_scored_positions_never_exist(chunk: int, model: Any) -> None:
    """The largest tensor that is made has the rows of a chunk, in the forward pass and in the backward pass."""
    add_linear_cross_entropy(model)
    ids = torch.randint(0, VOCABULARY, (1, 60))
    model.lm_head.requires_grad_(False)
    with Watch(VOCABULARY) as seen:
        model(input_ids=ids, labels=ids, loss_sum=True).loss_sum.backward()
    assert max(seen.rows) == 2


def test_without_the_flag_the_model_gives_logits_as_before(model: Any) -> None:
    ids, _ = batch()
    before = model(input_ids=ids).logits
    add_linear_cross_entropy(model)
    torch.testing.assert_close(model(input_ids=ids).logits, before)


SHAPE: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
SHAPE |= {"num_attention_heads": 2, "pad_token_id": 0}


def test_a_state_in_float32_meets_a_head_in_bfloat16() -> None:
    config = transformers.MambaConfig(**SHAPE)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    batch = PaddedCollator(0)([{"input_ids": np.arange(5, 14), "labels": np.arange(5, 14)}])
    plain = loss_sums(model, batch).loss
    assert choose_head(model, CrossEntropy.auto, gpu=False, padded=True) == "tunewright"
    torch.testing.assert_close(loss_sums(model, batch, "tunewright").loss, plain, rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("kind", "options", "heads"),
    [
        ("Llama", {}, ["tunewright", "trl", "cut", "cut_exact"]),
        ("Phi", {}, ["tunewright", "trl"]),  # its head has a bias
        ("Gemma2", {"final_logit_softcapping": 1.0, "num_key_value_heads": 1, "head_dim": 8}, ["trl"]),
        ("Cohere2", {"logit_scale": 0.25}, ["trl"]),
        ("RecurrentGemma", {"lru_width": 16, "logits_soft_cap": 1.0}, []),
        ("xLSTM", {"num_heads": 2, "output_logit_soft_cap": 1.0}, []),
        ("GraniteMoe", {"num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 4.0}, []),
        ("Bert", {"is_decoder": True}, []),
        ("ModernBertDecoder", {}, []),
    ],
)
def test_heads_whose_logits_are_changed_are_left_to_what_knows_how(
    kind: str, options: dict[str, Any], heads: list[str]
) -> None:
    """Whatever is said to fit gives the model's own loss; what was asked for and does not fit is refused."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**SHAPE | options)).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.5)
    assert fitting(model) == heads
    batch = PaddedCollator(0)([{"input_ids": np.arange(5, 14), "labels": np.arange(5, 14)}])
    plain = loss_sums(model, batch).loss
    add_fused_lm_head(model)
    for head in ("tunewright", "trl"):
        if head in heads:
            assert choose_head(model, CrossEntropy(head), gpu=False, padded=True) == head
            torch.testing.assert_close(loss_sums(model, batch, head).loss, plain, rtol=1e-5, atol=1e-5)
        else:
            with pytest.raises(ConfigError, match=f"`train.cross_entropy` is {head}.*write auto"):
                choose_head(model, CrossEntropy(head), gpu=False, padded=True)
    assert choose_head(model, CrossEntropy.auto, gpu=True, padded=False) == (heads[0] if heads else "own")
