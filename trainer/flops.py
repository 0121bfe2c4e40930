"""How many FLOPs a method needs for a token: what is active counts, and what is differentiated.

A weight that a token is multiplied by costs 2 FLOPs in the forward pass (Kaplan et al. 2020, arXiv 2001.08361, section
2.1), 2 more for the gradient of its input where something trained lies before it, and 2 more for its own gradient
where it is trained: 6 for each weight of full fine-tuning, 4 for most frozen weights under LoRA, 2 below the layers
that freeze-tuning trains. Of a mixture of experts a token meets those that it is routed to.

What is recomputed is not credited, nor are products of activations with each other (attention's scores), nor what is
no matrix product.

Names do not tell what lies before what, nor what is used at all, so one forward pass of the training is watched.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftType
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from tunewright.trainer.methods.prompt_learning import learns_prompt

# Modules that are never called themselves: what they hold belongs to the module around them.
CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)
# Looked up; IA3's factors; convolutions, which in language models have a few numbers for each channel.
NO_PRODUCTS = (nn.Embedding, nn.ParameterDict, nn.modules.conv._ConvNd)


@dataclass(frozen=True)
class Flops:
    """FLOPs of a forward and backward pass, for each token of a row, scored token, and virtual token before a row."""

    token: float
    scored: float
    virtual: float

    def of(self, tokens: int, scored: int, virtual: int = 0) -> float:
        return self.token * tokens + self.scored * scored + self.virtual * virtual


@dataclass
class _Call:
    """A module's calls in one forward pass."""

    experts: int  # whose weights it holds side by side; 1 for other modules
    rows: int = 0  # positions that it was given: tokens, or pairs of a token and one of its experts
    after_trained: bool = False  # its input depends on something that is trained


class FlopCounter:
    """Learns from the first forward pass that it watches what a model needs for a token.

    `times` says of modules that stand for others how many these are with themselves.
    """

    def __init__(self, model: nn.Module, times: Mapping[nn.Module, int] | None = None) -> None:
        self.model, self.times = model, times or {}
        self.virtual_tokens: int = model.active_peft_config.num_virtual_tokens if learns_prompt(model) else 0  # a row
        self.flops: Flops | None = None  # until a forward pass was watched

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the model's forward pass in here, unless one has been watched already."""
        if self.flops is not None:
            yield
            return
        seen = _ForwardPass(self.model)
        try:
            yield
        finally:
            seen.end()
        if seen.positions:
            self.flops = self._count(seen)

    def _count(self, seen: _ForwardPass) -> Flops:
        model: Any = self.model
        virtual = self.virtual_tokens * seen.rows
        through = virtual and model.active_peft_config.peft_type != PeftType.PREFIX_TUNING
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        head = base.get_output_embeddings()
        in_head = set(head.modules())
        adapted = {module.get_param() for module in model.modules() if isinstance(module, ParamWrapper)}
        body = prompt = 0.0
        for name, module in model.named_modules():
            call = seen.call_for(name)
            if call is None or module in in_head or isinstance(module, NO_PRODUCTS):
                continue
            cost = _cost(module, call, adapted) * self.times.get(module, 1)
            if name.startswith("prompt_encoder."):
                prompt += cost / max(virtual, 1)
            else:
                body += cost / (seen.positions + (virtual if through else 0))
        return Flops(body, _head_cost(model, base, head), prompt + (body if through else 0.0))


class _ForwardPass:
    """What is called with what in a model's next forward pass, and not in what recomputes it."""

    def __init__(self, model: Any) -> None:
        self.positions = self.rows = 0  # of the batch
        self._experts_per_token = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
        self._modules = dict(model.named_modules())
        self._calls: dict[nn.Module, _Call] = {}
        self._entered: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # had anything trained been called by then?
        self._trained = self._running = False
        # Known before the call: PEFT's adapters of weights put others in their place while it lasts.
        self._experts = {module: count for module in self._modules.values() if (count := _experts(module)) > 1}
        self._training = {module for module in self._modules.values() if any(p.requires_grad for p in _own(module))}
        self._hooks = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            *(module.register_forward_pre_hook(self._see, with_kwargs=True) for module in self._modules.values()),
            model.register_forward_hook(self._finish, always_call=True),
        ]

    def end(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def call_for(self, name: str) -> _Call | None:
        """Return the calls in which a module's weights were used: its own, or those of the one right around it.

        A fused layer reads the weights of its parts without calling them. None for what was not used.
        """
        while (call := self._calls.get(self._modules[name])) is None and name:
            name = name.rpartition(".")[0]
            if not isinstance(self._modules[name], CONTAINERS):
                return self._calls.get(self._modules[name])
        return call

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        self.positions, self.rows, self._running = ids.numel(), ids.size(0), True

    def _finish(self, *args: Any) -> None:
        self._running = False

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._running:
            return
        given = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)]
        floats = [one for one in given if one.is_floating_point() and one.dim() >= 2]
        for one in floats:
            self._entered.setdefault(one, self._trained)
        if floats:  # an embedding's input is none: it is looked up
            entry, call = floats[0], self._calls.setdefault(module, _Call(self._experts.get(module, 1)))
            call.rows += self._pairs(entry, given) if call.experts > 1 else _rows(entry)
            # Recomputing layers have inputs need gradients that the method does not need, or tell of none at all.
            call.after_trained |= self._entered[entry] and (entry.requires_grad or not torch.is_grad_enabled())
        self._trained |= module in self._training

    def _pairs(self, entry: torch.Tensor, given: list[torch.Tensor]) -> int:
        """Return how many pairs of a token and one of its experts there are in a call.

        Most are told the choice as (tokens, experts a token). Others get the tokens once for each expert: of those that
        are chosen (JetMoe), or of all (Llama 4).
        """
        chosen = next((one.size(1) for one in given if not one.is_floating_point() and one.dim() == 2), None)
        if chosen is not None:
            return _rows(entry) * chosen
        return min(_rows(entry), self.positions * self._experts_per_token) if self._experts_per_token else _rows(entry)


def _cost(module: nn.Module, call: _Call, adapted: set[nn.Parameter]) -> float:
    """Return the FLOPs of a module's own weights in a call, each of which meets the outcome of those before it."""
    cost = 0.0
    for weight in module.parameters(recurse=False):
        shape = shape_of(weight)
        if len(shape) >= 2:
            size = math.prod(shape) / call.experts
            cost += call.rows * size * (2 + 2 * call.after_trained + 2 * weight.requires_grad)
        call.after_trained |= weight.requires_grad or weight in adapted
    return cost


def _head_cost(model: nn.Module, base: Any, head: nn.Module) -> float:
    """Return the FLOPs of the output head for a scored token; everything else lies before it."""
    weights = [weight for name, weight in head.named_parameters() if "original_module." not in name]
    others = any(p.requires_grad for p in model.parameters() if all(p is not weight for weight in weights))
    tied = any(weight is base.get_input_embeddings().weight for weight in weights)
    shapes = [(math.prod(shape), w.requires_grad) for w in weights if len(shape := shape_of(w)) >= 2]
    return float(sum(size * (2 + 2 * (others or tied) + 2 * trained) for size, trained in shapes))


def _own(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield a module's parameters, and those that it keeps in containers of single layers, as adapters do."""
    yield from module.parameters(recurse=False)
    for child in module.children():
        if isinstance(child, CONTAINERS):
            yield from child.parameters(recurse=False)
            for layer in child.children():
                if not any(True for _ in layer.children()):
                    yield from layer.parameters(recurse=False)


def _experts(module: nn.Module) -> int:
    """Return of how many experts a module holds the weights, as (experts, in, out), or the adapters of such weights."""
    if isinstance(module, ParamWrapper):
        return module.num_experts
    shapes = (shape_of(weight) for weight in module.parameters(recurse=False))
    return next((shape[0] for shape in shapes if len(shape) == 3), 1)


def _rows(tensor: torch.Tensor) -> int:
    return tensor.numel() // max(tensor.size(-1), 1)


def shape_of(parameter: Any) -> torch.Size:
    """Return a weight's own shape, also of one in 4 bits (two in a byte) or split by ZeRO-3."""
    quant_state = getattr(parameter, "quant_state", None)
    return torch.Size(quant_state.shape if quant_state is not None else getattr(parameter, "ds_shape", parameter.shape))
