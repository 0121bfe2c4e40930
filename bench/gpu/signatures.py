"""Do the installed versions take the calls that only a GPU reaches? python bench/gpu/signatures.py

Each is bound to the signature it will meet, or run where it runs without a GPU: on the meta device, or on the CPU.
"""

from __future__ import annotations

import inspect
import os
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels as loops on the CPU; read when one is defined

LITTLE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


class Absent(Exception):
    """A package that a lever needs and this environment has not."""


def attention_kernel() -> None:
    """trainer/model/attention.py: forward and backward, grouped heads, window."""
    from tunewright.trainer.model.attention import _varlen_kernel

    for kv_heads in (4, 1):
        for window in (None, 8):
            shapes = [(1, heads, 32, 64) for heads in (4, kv_heads, kv_heads)]
            inputs = [torch.empty(s, dtype=torch.bfloat16, device="meta", requires_grad=True) for s in shapes]
            bounds = torch.empty(3, dtype=torch.int32, device="meta")
            _varlen_kernel(inputs[0], inputs[1], inputs[2], bounds, 16, 0.1, window).sum().backward()


def flash_attention_by_device() -> None:
    """trainer/versions.py: PyTorch's own list of devices; a CPU is not on it."""
    from tunewright.trainer.versions import flash_attention_runs_on

    assert flash_attention_runs_on(torch.device("cpu")) is False


def attention_by_document() -> None:
    """trainer/model/attention.py: what the kernel does not take goes to scaled_dot_product_attention."""
    bind(torch.nn.functional.scaled_dot_product_attention, 3, "attn_mask dropout_p is_causal scale enable_gqa")


def memory_of_the_device() -> None:
    """trainer/hardware.py, trainer/model/gradient_checkpointing.py and the kit."""
    bind(torch.cuda.mem_get_info, 1)
    for name in ("memory_reserved", "memory_allocated", "max_memory_reserved", "max_memory_allocated"):
        bind(getattr(torch.cuda, name), 1)
    for name in ("reset_peak_memory_stats", "empty_cache", "synchronize"):
        bind(getattr(torch.cuda, name), 0)
    bind(torch.cuda.get_device_name, 1)


def peak_of_the_device() -> None:
    """trainer/hardware.py: TRL knows the FLOP/s of GPUs by name and format."""
    from trl.trainer.utils import get_peak_flops

    assert get_peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") > 5e14
    assert get_peak_flops("NVIDIA H200", "bfloat16") > 5e14


def fused_head() -> None:
    """trainer/loss.py: TRL's head and cross-entropy in one, which `train.cross_entropy=trl` calls; here on the CPU."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from trl import SFTConfig, SFTTrainer

    model = Qwen2ForCausalLM(Qwen2Config(**LITTLE))
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))
    ids = torch.arange(12)[None]
    labels = ids.clone()
    labels[:, :5] = -100
    logits = adapted(input_ids=ids).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits.float(), labels[0, 1:], ignore_index=-100, reduction="sum")
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=folder, use_cpu=True, bf16=False, report_to="none", dataset_kwargs={"skip_prepare_dataset": True}
        )
        trainer = SFTTrainer(model=adapted, args=args, processing_class=_tokenizer(), train_dataset=_one_row())
        outputs = trainer.model(input_ids=ids, labels=labels, fused_lm_head=True, use_cache=False)
    torch.testing.assert_close(-outputs.log_probs.sum(), expected, rtol=1e-4, atol=1e-4)


def cut_cross_entropy() -> None:
    """trainer/model/linear_cross_entropy.py: the head of that package, both ways, short of its kernels."""
    from tunewright.plan.kernel_rules import installed

    if not installed("cut_cross_entropy"):
        raise Absent("cut-cross-entropy")
    from tunewright.trainer.model.linear_cross_entropy import cut_cross_entropy

    for exact in (True, False):
        (compute,) = (cell.cell_contents for cell in cut_cross_entropy(exact).__closure__ or ())
        bind(compute.func, 3, " ".join(compute.keywords))


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, "a")), eos_token="</s>", pad_token="</s>"
    )


def _one_row() -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": [[1, 2, 3]], "labels": [[1, 2, 3]]})


def quantised_layers() -> None:
    """trainer/model/quantization.py: bitsandbytes has a library for this CUDA, and transformers takes the settings."""
    import bitsandbytes
    from transformers import BitsAndBytesConfig

    bind(BitsAndBytesConfig, 0, "load_in_4bit bnb_4bit_quant_type bnb_4bit_use_double_quant bnb_4bit_compute_dtype")
    cuda = torch.version.cuda
    folder = Path(bitsandbytes.__file__).parent
    if cuda is not None:
        wanted = f"libbitsandbytes_cuda{cuda.replace('.', '')}.so"
        found = sorted(path.name for path in folder.glob("libbitsandbytes_cuda*.so"))
        assert wanted in found, f"{wanted} is not among {found}"
    for name in ("quantize_4bit", "dequantize_4bit", "gemv_4bit"):
        assert hasattr(torch.ops.bitsandbytes, name), name


def process_group() -> None:
    """trainer/process_group.py: accelerate's state on a GPU, with a timeout."""
    from accelerate import PartialState

    bind(PartialState.__init__, 1, "timeout")


def compiled_layers() -> None:
    """trainer/model/regional_compile.py and gradient_checkpointing.py."""
    bind(torch.nn.Module.compile, 1, "dynamic")
    bind(torch.compiler.set_stance, 1)
    bind(torch.compiler.reset, 0)


def flash_attention_3() -> None:
    """trainer/model/attention.py: the switch, and what it looks for; the kernels themselves are another package's."""
    from torch.nn import attention
    from torch.nn.attention._fa3 import register_flash_attention_fa3

    from tunewright.plan.kernel_rules import FLASH3

    assert "FA3" in attention.list_flash_attention_impls()
    assert inspect.signature(register_flash_attention_fa3).parameters["module_path"].default == FLASH3
    assert attention.current_flash_attention_impl() is None
    bind(attention.activate_flash_attention_impl, 1)
    bind(attention.restore_flash_attention_impl, 0)
    bind(torch.backends.cuda.enable_cudnn_sdp, 1)


def fused_layers() -> None:
    """trainer/model/fused_layers.py: what Liger replaces is there, is put back, and gives what plain layers give.

    The last of it by Triton's interpreter on the CPU, from 3.9: that of 3.6 is not for the numpy beside it.
    """
    from transformers import KernelConfig, PreTrainedModel

    from tunewright.plan.kernel_rules import installed, liger_architectures

    bind(KernelConfig, 1, "inherit_mapping")
    bind(PreTrainedModel.set_use_kernels, 3)
    if not installed("liger_kernel"):
        raise Absent("liger-kernel")
    assert {"llama", "mistral", "qwen2", "qwen3", "gemma2", "mixtral"} <= liger_architectures()
    interpreted = "TRITON_INTERPRET" in os.environ and tuple(map(int, version("triton").split(".")[:2])) >= (3, 9)
    if interpreted:
        _interpret_all()
    for kind in ("llama", "qwen3"):
        _compare_with_liger(kind, run=interpreted)


def _interpret_all() -> None:
    """Have Triton's interpreter (3.9) do what its compiler does: floats become tensors, rsqrt is computed."""
    import liger_kernel.ops.rms_norm
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    given = interpreter._implicit_cvt

    def convert(argument: Any) -> Any:
        if not isinstance(argument, float):
            return given(argument)
        return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)

    interpreter._implicit_cvt = convert
    liger_kernel.ops.rms_norm.rsqrt = lambda value: tl.math.rsqrt(value)


def _compare_with_liger(kind: str, *, run: bool) -> None:
    """LoRA on flat rows, with and without recomputation: one forward and backward pass each way."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from tunewright.config.compose import compose_config
    from tunewright.config.schema import FusedLayers
    from tunewright.trainer.data.batches import FlatCollator
    from tunewright.trainer.methods import adapt
    from tunewright.trainer.model import attention
    from tunewright.trainer.model.fused_layers import fused_layers

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **LITTLE, head_dim=16)
    base = AutoModelForCausalLM.from_config(config, attn_implementation=attention.register())
    model = adapt(base, compose_config(["method=lora", "method.dropout=0"]).method)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    rows = [{"input_ids": ids, "labels": ids} for ids in (torch.arange(5).numpy(), torch.arange(9, 20).numpy())]
    batch = FlatCollator(0)(rows)
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "scored", "targets")}
    rotary = sys.modules[type(base).__module__].apply_rotary_pos_emb

    def passes() -> list[torch.Tensor]:
        if not run:
            return []
        model.zero_grad()
        logits = model(**inputs, use_cache=False).logits[0, batch["scored"]]
        loss = torch.nn.functional.cross_entropy(logits.float(), batch["targets"])
        loss.backward()
        return [loss.detach(), *(weight.grad.clone() for weight in model.parameters() if weight.grad is not None)]

    expected = passes()
    with fused_layers(model, FusedLayers.liger):
        assert sys.modules[type(base).__module__].apply_rotary_pos_emb is not rotary
        fused = {part._get_name() for part in model.modules() if part._get_name().startswith("Liger")}
        assert len(fused) >= 2, fused  # norms and MLPs
        found = passes()
        base.gradient_checkpointing_enable()
        model.train()
        again = passes()
    assert sys.modules[type(base).__module__].apply_rotary_pos_emb is rotary
    assert len(expected) == len(found) == len(again) >= 10 * run
    for one, mine, recomputed in zip(expected, found, again, strict=True):
        torch.testing.assert_close(mine, one, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(recomputed, one, rtol=1e-4, atol=1e-5)


def bind(function: Callable[..., Any], positional: int, keywords: str = "") -> None:
    """Raise TypeError where a function does not take so many positional and these keyword arguments."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # written in C, without one
        text = function.__doc__ or ""
        missing = [name for name in keywords.split() if name not in text]
        if missing:
            raise TypeError(f"{function.__name__} does not document {', '.join(missing)}") from None
        return
    signature.bind(*[None] * positional, **dict.fromkeys(keywords.split()))


CHECKS = (
    attention_kernel,
    flash_attention_by_device,
    attention_by_document,
    memory_of_the_device,
    peak_of_the_device,
    fused_head,
    cut_cross_entropy,
    quantised_layers,
    process_group,
    compiled_layers,
    flash_attention_3,
    fused_layers,
)


def main() -> int:
    failed = absent = 0
    for check in CHECKS:
        where = (check.__doc__ or "").strip().splitlines()[0]
        try:
            check()
            print(f"ok    {check.__name__}: {where}")
        except Absent as package:
            absent += 1
            print(f"-     {check.__name__}: {package} is not installed")
        except Exception as error:  # all of them are to be told at once
            failed += 1
            print(f"WRONG {check.__name__}: {where}\n      {type(error).__name__}: {str(error)[:400]}")
    print(f"{len(CHECKS) - failed - absent} of {len(CHECKS)} calls fit torch {torch.__version__}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
