"""Attention over a flat row is attention over each of its rows alone, and refuses what it would leave out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import current_flash_attention_impl
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from tunewright.config.schema import AttentionKernel
from tunewright.errors import ConfigError
from tunewright.plan.kernel_rules import FLASH3
from tunewright.trainer.model import attention
from tunewright.trainer.model.attention import choose_kernel, dropout_of, varlen_attention
from tunewright.trainer.model.padding_free import padded_implementation, padding_free_problem

LENGTHS = [5, 1, 33, 12]
WINDOW = 6


def tensors(device: str, dtype: torch.dtype, heads: int = 4, kv_heads: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, count, sum(LENGTHS), 64) for count in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def alone(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """The reference: a dense mask, by transformers' own rule, that lets each token see earlier ones of its own row."""
    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    rule = sliding_window_causal_mask_function(window) if window else causal_mask_function
    place = torch.arange(len(document))
    mask = (document[:, None] == document[None]) & rule(0, 0, place[:, None], place[None])
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask.to(query.device), enable_gqa=True)
    return out.transpose(1, 2)


def flat(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32, device=query.device)
    kwargs = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": max(LENGTHS), **options}
    mask, module = kwargs.pop("attention_mask", None), kwargs.pop("module", torch.nn.Module())
    return varlen_attention(module, query, key, value, mask, **kwargs)[0]


def compare(device: str, dtype: torch.dtype, tolerance: float, window: int | None = None) -> None:
    mine, theirs = tensors(device, dtype), tensors(device, dtype)
    out, expected = flat(*mine, sliding_window=window), alone(*theirs, window)
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    out.square().sum().backward()
    expected.square().sum().backward()
    for my, their in zip(mine, theirs, strict=True):
        torch.testing.assert_close(my.grad, their.grad, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("window", [None, 1, WINDOW, 33, 100])
def test_each_row_sees_itself_only(window: int | None) -> None:
    compare("cpu", torch.float32, 1e-5, window)


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("kept", [0, 20, 1000])
@pytest.mark.parametrize("block", [1, 7, 1000])
def test_it_does_not_matter_how_a_row_is_cut_into_blocks(
    block: int, kept: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor whether probabilities are kept for the backward pass or computed again."""
    monkeypatch.setattr("tunewright.trainer.model.cpu_varlen_attention.BLOCK", block)
    monkeypatch.setattr("tunewright.trainer.model.cpu_varlen_attention.KEPT", kept)
    compare("cpu", torch.float32, 1e-5, window)
    compare("cpu", torch.bfloat16, 0.02, window)


def test_scores_in_the_hundreds_keep_their_fraction() -> None:
    """bfloat16 has no halves from 256 on: scores rounded to it would give both keys the same weight or all to one."""
    query = torch.full((1, 1, 2, 1), 32.0, dtype=torch.bfloat16)
    key = torch.tensor([16.0, 15.9375], dtype=torch.bfloat16).view(1, 1, 2, 1)  # scores 512 and 510
    value = torch.tensor([0.0, 1.0], dtype=torch.bfloat16).view(1, 1, 2, 1)
    bounds = torch.tensor([0, 2], dtype=torch.int32)
    before = torch.backends.mkldnn.matmul.fp32_precision
    out = varlen_attention(torch.nn.Module(), query, key, value, None, scaling=1.0, cu_seq_lens_q=bounds)[0]
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    assert out[0, 1, 0, 0].item() == pytest.approx(torch.tensor(-2.0).sigmoid().item(), rel=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, WINDOW, 33, 100])
def test_each_row_sees_itself_only_in_the_kernel_of_a_gpu(window: int | None) -> None:
    compare("cuda", torch.bfloat16, 2e-2, window)


def test_flash_attention_3_is_taken_on_hopper_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package is a stand-in with its two operators; the switch is PyTorch's own, which needs no GPU."""
    gpu, auto, chosen = torch.device("cuda"), AttentionKernel.auto, current_flash_attention_impl
    capability = [9, 0]
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: tuple(capability))
    assert not choose_kernel(auto, gpu, 0.0)
    assert dropout_of(transformers.GPT2Config()) == 0.1
    assert dropout_of(transformers.LlamaConfig()) == 0
    code = "import torch\nlibrary = torch.library.Library('flash_attn_3', 'DEF')\n"
    code += "for name in ('fwd', 'bwd'):\n    library.define(f'{name}(Tensor value) -> Tensor')\n"
    (tmp_path / f"{FLASH3}.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        assert choose_kernel(auto, gpu, 0.0)
        assert (chosen(), torch.backends.cuda.cudnn_sdp_enabled()) == ("FA3", False)  # cuDNN's would be preferred
        assert not choose_kernel(AttentionKernel.torch, gpu, 0.0)
        assert (chosen(), torch.backends.cuda.cudnn_sdp_enabled()) == (None, True)
        assert choose_kernel(AttentionKernel.flash3, gpu, 0.0)
        assert not choose_kernel(auto, gpu, 0.1)
        with pytest.raises(ConfigError, match=r"the model drops attention weights \(0.1\): write"):
            choose_kernel(AttentionKernel.flash3, gpu, 0.1)
        capability[0] = 8
        assert not choose_kernel(auto, gpu, 0.0)
        with pytest.raises(ConfigError, match="this GPU is not of that kind"):
            choose_kernel(AttentionKernel.flash3, gpu, 0.0)
        assert not choose_kernel(auto, torch.device("cpu"), 0.0)
    finally:
        choose_kernel(AttentionKernel.torch, gpu, 0.0)
        sys.modules.pop(FLASH3, None)


@pytest.mark.parametrize(("kv_heads", "window"), [(4, None), (2, None), (2, WINDOW)])
def test_the_kernel_of_a_gpu_takes_what_it_is_called_with(kv_heads: int, window: int | None) -> None:
    """Its arguments differ between versions of PyTorch. On tensors of the meta device it runs without a GPU."""
    inputs = [tensor.detach().requires_grad_() for tensor in tensors("meta", torch.bfloat16, kv_heads=kv_heads)]
    bounds = torch.empty(len(LENGTHS) + 1, dtype=torch.int32, device="meta")
    out = attention._varlen_kernel(*inputs, bounds, max(LENGTHS), 0.1, window)
    assert out.shape == (1, sum(LENGTHS), 4, 64)
    out.sum().backward()
    assert [tensor.grad.shape for tensor in inputs] == [tensor.shape for tensor in inputs]


def test_heads_of_one_projection_go_to_the_kernel_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[torch.Tensor] = []
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda *args, **_: given.extend(args[:3]) or args[0])
    together = torch.randn(1, sum(LENGTHS), 8, 64)  # as Phi's qkv_proj makes them
    parts = [part.transpose(1, 2) for part in together.split((4, 2, 2), dim=2)]
    attention._varlen_kernel(*parts, torch.empty(2, dtype=torch.int32), max(LENGTHS), None, None)
    assert [tensor.untyped_storage().data_ptr() for tensor in given] == [together.untyped_storage().data_ptr()] * 3
    assert [tensor.shape for tensor in given] == [(sum(LENGTHS), heads, 64) for heads in (4, 2, 2)]


@pytest.mark.parametrize(
    ("size", "dtype", "dropout", "has_flash", "expected"),
    [
        (64, torch.bfloat16, 0.0, True, True),
        (256, torch.float16, 0.0, True, True),
        (64, torch.bfloat16, 0.0, False, False),  # as a T4 or V100
        (100, torch.bfloat16, 0.0, True, False),
        (264, torch.bfloat16, 0.0, True, False),
        (64, torch.float32, 0.0, True, False),
        (64, torch.bfloat16, 0.1, True, False),
    ],
)
def test_the_kernel_of_a_gpu_is_called_for_what_it_has(
    size: int, dtype: torch.dtype, dropout: float, has_flash: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "flash_attention_runs_on", lambda device: has_flash)
    with FakeTensorMode():
        query = torch.empty(1, 2, 4, size, dtype=dtype, device="cuda")
        assert attention.kernel_can(query, query, dropout) is expected


def test_dropout_drops_and_keeps_the_mean() -> None:
    """With values of one, what comes out is the weight that was kept, scaled up by what was dropped."""
    query, key, value = tensors("cpu", torch.float32)
    torch.manual_seed(0)
    out = torch.stack([flat(query, key, torch.ones_like(value), dropout=0.5) for _ in range(50)])
    assert not torch.allclose(out[0], torch.ones_like(out[0]), atol=0.1)
    assert out.mean().item() == pytest.approx(1, abs=0.05)
    torch.testing.assert_close(flat(query, key, value, dropout=0.0), alone(query, key, value))


class TwoWay(torch.nn.Module):
    is_causal = False


class Sliding(torch.nn.Module):
    """A layer with a window that it keeps to itself."""

    layer_idx = 0
    config = transformers.Qwen2Config(use_sliding_window=True, max_window_layers=0)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"softcap": 50.0}, "softcap"),
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"position_bias": torch.zeros(1, 4, 51, 51)}, "position_bias"),
        ({"attention_mask": torch.zeros(1, 1, 51, 51)}, "attention_mask"),
        ({"is_causal": False}, "is_causal"),
        ({"module": TwoWay()}, "is_causal"),
        ({"module": Sliding()}, "sliding_window"),
    ],
)
def test_what_it_would_leave_out_is_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"{named}.*train\.padding_free=false"):
        flat(*tensors("cpu", torch.float32), **options)


def test_a_model_that_keeps_the_bounds_of_rows_to_itself_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rows.*train\.padding_free=false"):
        varlen_attention(torch.nn.Module(), *tensors("cpu", torch.float32), None)


def test_flags_that_change_nothing_are_let_through() -> None:
    inputs = tensors("cpu", torch.float32)
    extra = {
        "softcap": None,
        "s_aux": None,
        "output_attentions": False,
        "position_ids": torch.zeros(1, 51),
        "use_cache": 0,
    }
    torch.testing.assert_close(flat(*inputs, **extra), alone(*inputs))


JUDGED = [
    ("LlamaConfig", {}, None, "sdpa"),
    ("FalconConfig", {"alibi": True}, "ALiBi", "sdpa"),
    ("FalconConfig", {}, "attention code of its own", "sdpa"),
    ("MptConfig", {}, "ALiBi", "eager"),
    ("BloomConfig", {}, "ALiBi", "eager"),
    ("Gemma2Config", {}, "attn_logit_softcapping", "eager"),
    ("GptOssConfig", {}, "sinks", "eager"),
    ("MambaConfig", {}, "linear_attention", "eager"),
    ("RwkvConfig", {}, "carries a state", "eager"),
    ("Qwen3NextConfig", {}, "linear_attention", "sdpa"),
    ("Llama4TextConfig", {}, "chunked_attention", "sdpa"),
    ("Lfm2Config", {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}, "conv", "sdpa"),
    ("BartConfig", {}, "more than one stack", "sdpa"),
    ("RobertaConfig", {"is_decoder": True}, "padding token", "sdpa"),
    ("BertConfig", {}, "is_causal", "sdpa"),
    ("PhimoeConfig", {"sliding_window": 8}, "sliding_window", "sdpa"),
    ("DogeConfig", {}, "attention_mask", "sdpa"),
]


@pytest.mark.parametrize(("config_class", "changes", "reason", "implementation"), JUDGED)
def test_an_architecture_is_judged_without_its_weights(
    config_class: str, changes: dict[str, Any], reason: str | None, implementation: str
) -> None:
    config = getattr(transformers, config_class)(**changes)
    model_class = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    problem = padding_free_problem(config, model_class)
    assert (problem is None) if reason is None else (reason in str(problem))
    assert padded_implementation(config, model_class) == implementation
