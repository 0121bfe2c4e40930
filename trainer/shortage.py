"""What is said when memory is not enough: what was planned, what was seen, and what to change."""

from __future__ import annotations

import errno
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
from omegaconf import DictConfig

from tunewright.errors import MemoryShortage, TunewrightError, first_line
from tunewright.plan.batch_plan import batch_plan
from tunewright.ranks import world_size
from tunewright.text import size

# Of PyTorch on a CPU, the C++ library, CUDA, cuBLAS and bitsandbytes; PyTorch's own class has no text in common.
SIGNS = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "CUBLAS_STATUS_ALLOC_FAILED")
RUST_SIGN = f"(os error {errno.ENOMEM})"


def is_shortage(error: BaseException) -> bool:
    """Tell whether memory could not be had."""
    if isinstance(error, MemoryError) or type(error).__name__ in ("OutOfMemoryError", "AcceleratorError"):
        return isinstance(error, MemoryError) or any(sign in str(error) for sign in SIGNS)
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    told = str(error)
    return RUST_SIGN in told or (isinstance(error, RuntimeError) and any(sign in told for sign in SIGNS))


@contextmanager
def told_shortage(config: DictConfig, doing: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Say what to change where memory is not enough, and with `doing` what was being done.

    Raises:
        MemoryShortage: in place of what the library raised.
    """
    try:
        yield
    except TunewrightError:
        raise
    except Exception as error:
        if not is_shortage(error):
            raise
        told = [first_line(error), doing(), _seen(), _planned(config), _advice(config)]
        raise MemoryShortage("\n".join(filter(None, told))) from error


def held(trainer: Any) -> str:
    """Return where a training is, with which micro-batch, and what this rank holds of each part.

    Activations are not among the parts: they were let go of while the error came here.
    """
    step, (rows, tokens) = trainer.state.global_step, trainer.batch_size
    where = f"Step {step + 1}" if trainer.model.training else f"An evaluation after step {step}"
    return f"{where}, a micro-batch of {rows} rows, {tokens:,} tokens. Held: {_parts(trainer)}."


def _parts(trainer: Any) -> str:
    # A parameter that ZeRO-3 has split is empty, and `ds_tensor` this rank's share.
    weights = {id(weight): weight for weight in trainer.model.parameters()}
    shares = {key: getattr(weight, "ds_tensor", weight).nbytes for key, weight in weights.items()}
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):  # accelerate's and DeepSpeed's wrap it
        optimizer = optimizer.optimizer
    groups = optimizer.param_groups if optimizer is not None else []
    copies = {id(weight): weight for group in groups for weight in group["params"] if id(weight) not in weights}
    states = [value for state in optimizer.state.values() for value in state.values()] if groups else []
    parts = {
        "weights": sum(shares[key] for key, weight in weights.items() if not weight.requires_grad),
        "what is trained": sum(shares[key] for key, weight in weights.items() if weight.requires_grad),
        "float32 copies": sum(weight.nbytes for weight in copies.values()),
        "optimiser": sum(getattr(value, "nbytes", 0) for value in states),
        "gradients": sum(one.grad.nbytes for one in (*weights.values(), *copies.values()) if one.grad is not None),
    }
    return ", ".join(f"{name} {size(number)}" for name, number in parts.items() if number)


def _seen() -> str:
    """Return what this process has held, and what it could have had."""
    torch = sys.modules.get("torch")
    told = []
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        free, total = torch.cuda.mem_get_info()
        most = torch.cuda.max_memory_reserved()
        told.append(f"this rank held up to {size(most)} of its GPU's {size(total)}, of which {size(free)} are free")
    host = psutil.virtual_memory()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    told.append(f"this rank held up to {size(most)} of host memory, of {size(host.total)}; {size(host.available)} free")
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        told.append(f"the limit on its address space is {size(limit)} (ulimit -v)")
    return f"Seen: {'; '.join(told)}."


def _planned(config: DictConfig) -> str:
    train, data = config.train, config.data
    plan = batch_plan(train, world_size(), cutoff_len=data.cutoff_len, packing=data.packing)
    return f"Planned: {plan.describe()}, each of up to {data.cutoff_len:,} tokens."


def _advice(config: DictConfig) -> str:
    """Return settings that need less memory and are not chosen yet, those that change the least first."""
    train, method, strategy = config.train, config.method.name, config.strategy
    less = []
    if train.micro_batch_size > 1 and not train.tokens_per_batch:
        less.append(f"train.micro_batch_size={max(train.micro_batch_size // 2, 1)} (the same steps, more slowly)")
    if train.gradient_checkpointing is False:
        less.append("train.gradient_checkpointing=true (likewise)")
    if strategy.name != "zero3" and method != "qlora":  # which cannot be split
        less.append("strategy=zero3 (weights, gradients and optimiser split over the ranks)")
    if method == "full":
        less.append("method=lora (trains adapters alone)")
    if method in ("full", "lora"):
        less.append("method=qlora (the base in 4 bits)")
    less.append(f"data.cutoff_len={max(config.data.cutoff_len // 2, 1)} (shorter rows)")
    return f"Change one of: {', '.join(less)}."
