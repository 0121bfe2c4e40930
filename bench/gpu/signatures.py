"""Do the installed versions take the calls that only a GPU reaches? python bench/gpu/signatures.py

Each is bound to the signature it will meet, or run where it runs without a GPU: on the meta device, or on the CPU.
"""

from __future__ import annotations

import inspect
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


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
    """trainer/loss.py: TRL's head and cross-entropy in one, which the GPU path calls; here on the CPU."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from trl import SFTConfig, SFTTrainer

    shape: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    model = Qwen2ForCausalLM(Qwen2Config(**shape, num_attention_heads=2, num_key_value_heads=1))
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
    quantised_layers,
    process_group,
    compiled_layers,
)


def main() -> int:
    failed = 0
    for check in CHECKS:
        where = (check.__doc__ or "").strip()
        try:
            check()
            print(f"ok    {check.__name__}: {where}")
        except Exception as error:  # all of them are to be told at once
            failed += 1
            print(f"WRONG {check.__name__}: {where}\n      {type(error).__name__}: {str(error)[:400]}")
    print(f"{len(CHECKS) - failed} of {len(CHECKS)} calls fit torch {torch.__version__}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
