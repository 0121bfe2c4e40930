"""What each tuning method trains: through PEFT where PEFT has it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunewright.config.schema import LoraInit
from tunewright.plan.architecture import ends_with, plain
from tunewright.plugins import PLUGINS

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn
    from transformers import PreTrainedModel


def adapt(model: PreTrainedModel, method: Any, tokenizer: Path | None = None) -> Any:
    """Return the model with what `method` trains ready to train, everything else frozen.

    Adapters are kept in the format of the base: the optimiser holds the float32 copy (see `master_weights.py`).
    PEFT's default, float32 adapters, casts the activations twice in every adapted layer.

    Args:
        tokenizer: its folder, for prompts that begin as a text.
    """
    if method.name in PLUGINS.methods:
        return PLUGINS.methods[method.name].build(model, method)
    if method.name == "full":
        return model
    if method.name == "freeze":
        freeze(model, method)
        return model
    import peft

    from tunewright.trainer.model import fused_lora

    if method.name == "qlora":
        _keep_differentiable(model)
    if getattr(method, "adapter", None):
        adapted = peft.PeftModel.from_pretrained(
            model, method.adapter, is_trainable=True, autocast_adapter_dtype=False, low_cpu_mem_usage=False
        )
    else:
        adapted = peft.get_peft_model(model, peft_config(method, model, tokenizer), autocast_adapter_dtype=False)
    fused_lora.fuse(adapted)
    return adapted


def peft_config(method: Any, model: PreTrainedModel, tokenizer: Path | None = None) -> PeftConfig:
    """Return PEFT's configuration of a method on this model."""
    import peft

    task = peft.TaskType.CAUSAL_LM
    if method.name in ("lora", "qlora"):
        return peft.LoraConfig(
            task_type=task,
            r=method.r,
            lora_alpha=method.alpha,
            lora_dropout=method.dropout,
            target_modules=plain(method.target_modules),
            modules_to_save=plain(method.modules_to_save) or None,
            use_rslora=method.rslora,
            use_dora=method.dora,
            init_lora_weights=True if method.init is LoraInit.default else method.init.value,
        )
    if method.name == "ia3":
        auto = method.target_modules == "auto"
        return peft.IA3Config(
            task_type=task,
            target_modules=None if auto else plain(method.target_modules),
            feedforward_modules=None if auto else plain(method.feedforward_modules),
        )
    width = model.config.get_text_config().hidden_size
    if method.name == "p_tuning":
        return peft.PromptEncoderConfig(
            task_type=task,
            num_virtual_tokens=method.virtual_tokens,
            encoder_reparameterization_type=method.encoder.value.upper(),
            encoder_hidden_size=method.hidden_size or width,
        )
    if method.name == "prefix_tuning":
        return peft.PrefixTuningConfig(
            task_type=task,
            num_virtual_tokens=method.virtual_tokens,
            prefix_projection=method.projection,
            encoder_hidden_size=method.hidden_size or width,
        )
    meta = next(model.parameters()).is_meta  # counting needs no text
    if method.init_text is None or meta:
        return peft.PromptTuningConfig(
            task_type=task, num_virtual_tokens=method.virtual_tokens, prompt_tuning_init="RANDOM"
        )
    return peft.PromptTuningConfig(
        task_type=task,
        num_virtual_tokens=method.virtual_tokens,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=method.init_text,
        tokenizer_name_or_path=str(tokenizer),
    )


def freeze(model: PreTrainedModel, method: Any) -> None:
    """Let only the chosen layers, or the named modules in them, and the named modules outside them be trained."""
    layers = decoder_layers(model)
    chosen = list(layers)[-method.layers :] if method.layers > 0 else list(layers)[: -method.layers]
    model.requires_grad_(False)
    for layer in chosen:
        if not method.modules:
            layer.requires_grad_(True)
        for name in method.modules:
            _train(layer, name)
    inside = {module for layer in layers for module in layer.modules()}
    for name in method.extra_modules:
        _train(model, name, beside=inside)


def _train(root: nn.Module, name: str, beside: set[nn.Module] | None = None) -> None:
    for path, module in root.named_modules():
        if ends_with(path, name) and module not in (beside or ()):
            module.requires_grad_(True)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the list of decoder layers: the longest list of modules in the model."""
    from torch import nn

    return max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len)


def _keep_differentiable(model: PreTrainedModel) -> None:
    """Keep 4-bit layers on a CPU in the layout that training needs.

    With AVX512-BF16, bitsandbytes 0.50.2 repacks a layer for inference at the first evaluation, for good, and the
    kernel for that layout has no backward: training would go on without gradients below it, or stop.
    """
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def parameter_counts(model: Any) -> tuple[int, int]:
    """Return (trainable, total) parameters, right under ZeRO-3 (sharded) and for 4-bit weights (two in a byte)."""
    import peft

    if isinstance(model, peft.PeftModel):
        trainable, total = model.get_nb_trainable_parameters()
        return int(trainable), int(total)
    sizes = [(getattr(p, "ds_numel", None) or p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)
