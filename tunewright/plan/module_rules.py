"""The modules that a method's settings name, held against those that the model has.

A wrong name is answered before any weight is fetched or loaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from tunewright.config.schema import CrossEntropy
from tunewright.errors import ConfigError, closest
from tunewright.plan.architecture import Architecture
from tunewright.plan.kernel_rules import check_fused
from tunewright.plan.support import PARTITIONED, known_strategy
from tunewright.safetensors_header import shapes
from tunewright.text import listed

# Names that different architectures give to the same thing; people carry them from one model to another.
ROLES = (
    ("q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value", "Wqkv", "W_pack", "query", "key", "value"),
    ("o_proj", "out_proj", "c_proj", "dense", "wo", "attn.c_proj", "self_attention.dense"),
    ("gate_proj", "up_proj", "gate_up_proj", "c_fc", "dense_h_to_4h", "fc1", "w1", "w3", "fc_in"),
    ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "w2", "fc_out"),
    ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings"),
    ("lm_head", "embed_out", "output"),
)  # fmt: skip
SHOWN = 24


def check_modules(config: DictConfig, architecture: Architecture) -> None:
    """Compare the names in the method's settings with the modules that exist.

    Raises:
        ConfigError: a name that means nothing or too much, with the names that exist and the likely meant ones; rows
            longer than the model has positions; or `train.fused_layers` for an architecture that it cannot do.
    """
    method = config.method
    if method.name in ("lora", "qlora"):
        _check_lora(method, architecture)
        if method.adapter:
            _check_adapter(Path(method.adapter), architecture)
    elif method.name == "ia3":
        _check_ia3(method, architecture)
    elif method.name == "freeze":
        _check_freeze(method, architecture)
    check_fused(config, architecture.model_type)
    if config.train.gradient_checkpointing and not architecture.recomputes:
        raise ConfigError(
            f"`train.gradient_checkpointing` is {config.train.gradient_checkpointing}, which transformers cannot do "
            f"for {architecture.model_type}: leave it out."
        )
    wanted = config.train.cross_entropy
    if wanted is not CrossEntropy.auto and wanted.value not in architecture.heads:
        raise ConfigError(does_not_fit(wanted.value, architecture.heads))
    _check_router(config, architecture)
    if architecture.positions is not None and config.data.cutoff_len > architecture.positions:
        raise ConfigError(
            f"`data.cutoff_len` is {config.data.cutoff_len}, but {config.model.name} has learnt "
            f"{architecture.positions} positions. Write {architecture.positions} or less."
        )


def _check_router(config: DictConfig, architecture: Architecture) -> None:
    wanted, own = config.train.router_aux_loss, architecture.router_loss
    if wanted and own is None:
        raise ConfigError(
            f"`train.router_aux_loss` is {wanted:g}, and {architecture.model_type} is no mixture of experts that tells "
            f"what its router does: leave it out."
        )
    if wanted and not router_learns(config):
        raise ConfigError(
            f"`train.gradient_checkpointing` with adapters under `strategy={config.strategy.name}` recomputes layers "
            f"in a way (PyTorch's re-entrant one, TRL 1.16) in which the router's loss has no gradient. Turn it off, "
            f"or write train.router_aux_loss=0."
        )


def router_learns(config: DictConfig) -> bool:
    """Tell whether the router's loss has a gradient: not where adapters recompute layers under ZeRO-3 (TRL 1.16)."""
    adapts = config.method.name not in ("full", "freeze")
    return not (adapts and config.train.gradient_checkpointing and known_strategy(config) in PARTITIONED)


def does_not_fit(wanted: str, heads: list[str]) -> str:
    """Return why `train.cross_entropy` cannot be what is wanted, for a model that `heads` are for."""
    others = f" or {' or '.join(heads)}" if heads else ""
    return (
        f"`train.cross_entropy` is {wanted}, which multiplies by the head's weight and nothing else, and this model "
        f"does more to its logits or has an adapted head: write auto{others}."
    )


def _check_lora(method: Any, architecture: Architecture) -> None:
    adapted: dict[str, str] = {}  # module -> the name in target_modules that means it
    if not isinstance(method.target_modules, str):
        # LoRA adapts embeddings too; the head is left to modules_to_save.
        for name in method.target_modules:
            found = _must_match("method.target_modules", name, architecture, ("linear", "embedding"))
            adapted |= dict.fromkeys(found, name)
            _refuse_head(name, found, architecture, instead="method.modules_to_save")
    for name in method.modules_to_save:
        found = _must_match("method.modules_to_save", name, architecture, ("linear", "embedding", ""))
        both = [other for module, other in adapted.items() if _inside(module, found)]
        matrices = [module for module in architecture.sizes if module != architecture.head]
        if method.name == "qlora" and any(_inside(module, found) for module in matrices):
            raise ConfigError(
                f"`method.modules_to_save` has '{name}', whose weights `method=qlora` quantises to {method.bits} bits: "
                f"they cannot be trained whole. Leave it out, or use method=lora."
            )
        if both:
            raise ConfigError(
                f"`method.modules_to_save` has '{name}', which trains whole what `method.target_modules` adapts with "
                f"'{both[0]}': leave one of them out."
            )
        if architecture.tied and {architecture.head, architecture.embedding} & set(found):
            raise ConfigError(
                f"`method.modules_to_save` has '{name}', but the head of this model is its input embedding "
                f"({architecture.embedding}), one weight for both: a copy of one of them would part them. Leave it "
                f"out, or use method=freeze method.extra_modules=[{architecture.embedding.rpartition('.')[2]}]."
            )


def _inside(module: str, found: list[str]) -> bool:
    """Whether a module is one of those found, or in one of them."""
    return any(f"{module}.".startswith(f"{outer}.") for outer in found)


def _refuse_head(name: str, found: list[str], architecture: Architecture, instead: str) -> None:
    """Refuse to adapt the output head, which the loss multiplies by without asking its module."""
    if architecture.head in found and not architecture.tied:
        raise ConfigError(
            f"`method.target_modules` has '{name}', the output head {architecture.head}: the fused loss multiplies by "
            f"the head's own weight and would pass an adapter by. Leave it out, or train the whole head with "
            f"{instead}=[{architecture.head.rpartition('.')[2]}]."
        )
    if architecture.tied and {architecture.head, architecture.embedding} & set(found):
        raise ConfigError(
            f"`method.target_modules` has '{name}', but the head of this model is its input embedding "
            f"({architecture.embedding}), one weight for both: an adapter on one of them would not reach the other. "
            f"Leave it out."
        )


def _check_adapter(folder: Path, architecture: Architecture) -> None:
    """Compare the matrices of an adapter that training goes on with and the ones that they are for."""
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        if (folder / "adapter_model.bin").is_file():
            return  # pickled: nothing here reads it
        raise ConfigError(f"`method.adapter` is {folder}, which holds no weights: there is no {file.name}.")
    for name, shape in shapes(file).items():
        for ending, side in ((".lora_A.weight", 1), (".lora_B.weight", 0)):
            module = name.removeprefix("base_model.model.").removesuffix(ending)
            if not name.endswith(ending) or architecture.sizes.get(module, [None, None])[side] == shape[side]:
                continue
            wanted = architecture.sizes.get(module)
            found = (
                f"where {module} has {' x '.join(map(str, wanted))}" if wanted else "and the model has no such module"
            )
            raise ConfigError(
                f"`method.adapter` is {folder}, an adapter for another model: its {name} has "
                f"{' x '.join(map(str, shape))}, {found}."
            )


def _check_ia3(method: Any, architecture: Architecture) -> None:
    if isinstance(method.target_modules, str):
        if architecture.ia3 is None:
            raise ConfigError(
                f"`method.target_modules` is auto, but PEFT knows no IA3 modules for {architecture.model_type}: name "
                f"the modules of keys, values and the MLP's last matrix, the last one in method.feedforward_modules "
                f"too. It has {listed(architecture.leaves(), SHOWN)}."
            )
        return
    for name in method.target_modules:
        found = _must_match("method.target_modules", name, architecture, ("linear",))
        _refuse_head(name, found, architecture, instead="method=freeze method.extra_modules")
    for name in method.feedforward_modules:
        if name not in method.target_modules:
            raise ConfigError(
                f"`method.feedforward_modules` has '{name}', which `method.target_modules` has not: name it in both."
            )


def _check_freeze(method: Any, architecture: Architecture) -> None:
    if abs(method.layers) > architecture.num_layers:
        raise ConfigError(
            f"`method.layers` is {method.layers}, but the model has {architecture.num_layers} layers: write a number "
            f"from -{architecture.num_layers} to {architecture.num_layers}."
        )
    kinds = ("linear", "embedding", "")
    for name in method.modules:
        found = _must_match("method.modules", name, architecture, kinds)
        if not any(module.startswith(f"{architecture.layers}.") for module in found):
            raise ConfigError(
                f"`method.modules` has '{name}', which is outside the layers: name it in method.extra_modules."
            )
    for name in method.extra_modules:
        found = _must_match("method.extra_modules", name, architecture, kinds)
        if all(module.startswith(f"{architecture.layers}.") for module in found):
            raise ConfigError(
                f"`method.extra_modules` has '{name}', which is inside the layers: name it in method.modules, with "
                f"method.layers."
            )


def _must_match(key: str, name: str, architecture: Architecture, kinds: Iterable[str]) -> list[str]:
    found = architecture.matching(name, kinds)
    if found:
        return found
    known = architecture.leaves(kinds)
    block = architecture.matching(name, ("",))
    if block:
        inside = {
            module.rpartition(".")[2]
            for module, kind in architecture.modules.items()
            if kind in kinds and any(module.startswith(f"{outer}.") for outer in block)
        }
        holds = f"which is a block; it holds {listed(sorted(inside), SHOWN)}"
        what = holds if inside else "which holds no matrix to adapt"
        raise ConfigError(f"`{key}` has '{name}', {what}. Write the modules' own names.")
    meant = likely_meant(name, known)
    hint = f" Did you mean {listed(meant, SHOWN)}?" if meant else ""
    raise ConfigError(
        f"`{key}` has '{name}', but {architecture.model_type} has no such module.{hint} It has {listed(known, SHOWN)}."
    )


def likely_meant(name: str, known: list[str]) -> list[str]:
    """Return what this model calls the thing that `name` is elsewhere, or the closest spelling."""
    leaf = name.rpartition(".")[2]
    same_role = [other for role in ROLES if leaf in role for other in role if other in known]
    if same_role:
        return list(dict.fromkeys(same_role))
    near = closest(leaf, known)
    return [near] if near else []
