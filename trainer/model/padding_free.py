"""Which models may train on flat rows without padding, judged by configuration and class, and what others run on."""

from __future__ import annotations

import copy
import inspect
import sys
from typing import Any

import torch
from transformers import PreTrainedConfig

from tunewright.errors import ConfigError
from tunewright.trainer.model.attention import ADVICE, register

# Layers that see a document through this attention alone. Others (linear, convolution, chunked, indexed) mix tokens in
# ways that know nothing of where a document ends.
PLAIN_LAYERS = {"full_attention", "sliding_attention"}


def padding_free_problem(config: PreTrainedConfig, model_class: type) -> str | None:
    """Return why this architecture cannot train on flat rows, in words for the user, or None where it can.

    Decided by what the configuration and the class say of themselves, so that unknown architectures are judged too, and
    last by what its layers ask of the attention.

    Args:
        config: the model's configuration, with or without text part of its own.
        model_class: the class that will be loaded, for example LlamaForCausalLM. No weights are needed.
    """
    name = model_class.__name__
    text = _text_config(config)
    if text is None or text.is_encoder_decoder:
        return f"{name} is more than one stack of layers"
    others = sorted(set(getattr(text, "layer_types", None) or []) - PLAIN_LAYERS)
    if others:
        return f"{name} has layers that do not stop at the end of a row ({', '.join(others)})"
    if getattr(model_class, "_is_stateful", False):
        return f"{name} carries a state from token to token, which does not stop at the end of a row"
    if _has_alibi(text, model_class):
        return f"{name} has ALiBi, which its own attention code adds to the scores"
    if _softcap(text) is not None:
        return f"{name} caps attention scores (attn_logit_softcapping), which variable-length attention cannot"
    if not getattr(model_class, "_supports_attention_backend", False):
        return f"{name} has attention code of its own, which cannot be exchanged"
    if not getattr(model_class, "_supports_sdpa", False):
        return f"{name} has more in its attention, for example sinks, than variable-length attention offers"
    if not getattr(text, "is_causal", True) or getattr(text, "use_bidirectional_attention", False):
        return f"{name} lets a token see those after it"
    if "position_ids" not in inspect.signature(model_class.forward).parameters:  # type: ignore[attr-defined]
        return f"{name} cannot be told that positions begin anew with each row"
    if any(hasattr(member, "create_position_ids_from_input_ids") for member in _beside(model_class).values()):
        return f"{name} counts positions in a way of its own, from its padding token on"
    return _dry_run(config, model_class)


def padded_implementation(config: PreTrainedConfig, model_class: type) -> str:
    """Return the attention implementation of transformers that is right for padded batches: "sdpa" or "eager".

    "eager" is slower and supports everything. "sdpa" stops at a soft cap and leaves out attention sinks without a word.
    """
    text = _text_config(config)
    capped = text is not None and _softcap(text) is not None
    return "sdpa" if getattr(model_class, "_supports_sdpa", False) and not capped else "eager"


def _text_config(config: PreTrainedConfig) -> PreTrainedConfig | None:
    """Return the part of a configuration that describes the text model, or None where there are several."""
    try:
        return config.get_text_config()
    except ValueError:
        return None


def _softcap(text: PreTrainedConfig) -> float | None:
    return getattr(text, "attn_logit_softcapping", None)


def _has_alibi(text: PreTrainedConfig, model_class: type) -> bool:
    """Falcon and MPT say so in their configuration. BLOOM always has it, and only its code tells."""
    for holder in (text, getattr(text, "attn_config", None)):
        said = getattr(holder, "alibi", None)
        if said is not None:
            return bool(said)
    return any("alibi" in name for name in _beside(model_class))


def _beside(model_class: type) -> dict[str, Any]:
    """Return what is defined in the module of a class, the layers of the model among it."""
    return vars(sys.modules[model_class.__module__])


def _dry_run(config: PreTrainedConfig, model_class: Any) -> str | None:
    """Return what `varlen_attention` refuses of the model, run on two rows of two tokens without weights or values."""
    config = copy.deepcopy(config)
    config._attn_implementation = register()
    bounds = torch.tensor([0, 2, 4], dtype=torch.int32, device="meta")
    try:
        with torch.device("meta"):
            model = model_class(config)
            ids = torch.zeros(1, 4, dtype=torch.long)
        with torch.no_grad():
            model(
                input_ids=ids,
                position_ids=ids,
                cu_seq_lens_q=bounds,
                cu_seq_lens_k=bounds,
                max_length_q=2,
                max_length_k=2,
                use_cache=False,
            )
    except ConfigError as error:
        return str(error).removesuffix(ADVICE)
    except Exception:  # experts, for one, need values; what is refused then shows at the first step
        return None
    return None
