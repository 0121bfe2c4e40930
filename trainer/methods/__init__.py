"""What each tuning method trains: a module for each, named as in `configs/hydra/method`, with a function `build`.

Their settings are data classes in `tunewright/config/method_schema.py`, and `tunewright/plan/method_rules.py` refuses
what cannot work before anything starts: both without torch. A plug-in brings all three (docs/extending.md).
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunewright.plugins import PLUGINS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def adapt(model: PreTrainedModel, method: Any, model_path: Path | None = None) -> Any:
    """Return the model with what `method` trains ready to train, everything else frozen.

    Args:
        model_path: the model's folder; its tokenizer is needed for prompts that begin as a text.
    """
    added = PLUGINS.methods.get(method.name)
    if added:
        return added.build(model, method)
    return import_module(f"{__name__}.{method.name}").build(model, method, model_path)


def parameter_counts(model: Any) -> tuple[int, int]:
    """Return (trainable, total) parameters, right under ZeRO-3 (sharded) and for 4-bit weights (two in a byte)."""
    import peft

    if isinstance(model, peft.PeftModel):
        trainable, total = model.get_nb_trainable_parameters()
        return int(trainable), int(total)
    sizes = [(getattr(p, "ds_numel", None) or p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)
