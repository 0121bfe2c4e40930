"""Learning rate and weight decay as the settings have them, also where a run goes on.

A checkpoint's optimiser and schedule bring their own, and what `resume_allow=[train.learning_rate]` asks for would
change nothing.
"""

from __future__ import annotations

from typing import Any

import torch

Rates = list[dict[str, Any]]  # of each parameter group
KEPT = ("lr", "weight_decay")  # what an optimiser works out by itself is left alone


def rates_of(optimizer: torch.optim.Optimizer) -> Rates:
    """Return what the settings make of each parameter group, of an optimiser that no schedule has changed yet."""
    return [{key: group[key] for key in KEPT if key in group} for group in optimizer.param_groups]


def put_back(rates: Rates, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """Give an optimiser and its schedule that were read from a checkpoint the rates of a run that began with these.

    Also of its length. A schedule that goes by the loss keeps the rate that it has found.
    """
    scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate's wrapper
    factors = getattr(scheduler, "lr_lambdas", None)
    for number, (group, rate) in enumerate(zip(optimizer.param_groups, rates, strict=True)):
        group.update({key: value for key, value in rate.items() if key != "lr"})
        if factors and isinstance(rate.get("lr"), float):
            group["initial_lr"] = scheduler.base_lrs[number] = rate["lr"]
            group["lr"] = scheduler._last_lr[number] = rate["lr"] * factors[number](scheduler.last_epoch)
