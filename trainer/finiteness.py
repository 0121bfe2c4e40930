"""Losses, gradients and weights that are no finite numbers: seen at their step, known to all ranks, in no checkpoint.

The losses of a step's micro-batches and the norm of its gradient lie on the device. They are copied without waiting,
and looked at once they are there: on a CPU at the end of the same step, on a GPU at the end of the next one.

There is no loss scaling here: `model.dtype` knows no float16, so no overflow is one that a scaler skips.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from omegaconf import DictConfig

from tunewright.errors import NumericError
from tunewright.run_folder import RunDir
from tunewright.text import listed
from tunewright.trainer.advice import Advice, calmer_steps, other_format
from tunewright.trainer.data.token_cache import TokenCache
from tunewright.trainer.process_group import all_gather

Place = tuple[str, int]  # a dataset and a row in it, counted from 0

LATEST = 2  # steps after which a copy is waited for: the device has those steps before it, so it does not run dry
ROWS_TOLD = 6
NOT_MEASURED = -1.0  # the norm where a DeepSpeed JSON does without (`compute_grad_norm`)


@dataclass(frozen=True)
class Fault:
    """A step whose loss or gradient is not finite, as one rank has seen it."""

    step: int
    losses: tuple[float, ...]  # this rank's, of each micro-batch, as shares of the step's
    norm: float  # the gradient's, over all ranks

    @property
    def micro_batches(self) -> list[int]:
        """Those whose loss is not finite."""
        return [number for number, loss in enumerate(self.losses) if not math.isfinite(loss)]


@dataclass(frozen=True)
class _Copy:
    """The figures of a step on their way from the device."""

    step: int
    values: (
        torch.Tensor
    )  # float64 on the CPU: a loss for each micro-batch, and the gradient's norm where that is not known
    norm: float | None  # of the gradient, where it is known: DeepSpeed has looked at it already
    arrived: torch.cuda.Event | None  # None: they are there


class Finiteness:
    """The question whether a step's figures were finite (see `agreement.Question`), and the end of a run where not.

    Args:
        trainer: is asked for its rows, weights and settings when something is wrong.
        cache: tells what the trainer's rows are called.
    """

    def __init__(self, trainer: Any, config: DictConfig, cache: TokenCache | None) -> None:
        self.trainer, self.config, self.cache = trainer, config, cache
        self.fault: Fault | None = None  # the first one that this rank has seen
        self.still = 0  # steps in a row, up to the last one that was looked at, whose gradient was 0
        self.warnings: list[str] = []  # held-out losses that are not finite
        self._losses: list[torch.Tensor] = []  # of the step under way
        self._norm: torch.Tensor | float | None = None
        self._copies: deque[_Copy] = deque()

    def add_loss(self, loss: torch.Tensor) -> None:
        """Take note of a micro-batch's loss; nothing waits for the device."""
        self._losses.append(loss)

    def see_norm(self, norm: torch.Tensor | float | None) -> None:
        """Take note of the norm of a step's gradient."""
        self._norm = norm

    def asked(self, state: Any) -> float:
        self._send(state.global_step)
        self._look(wait_for=LATEST)
        return float(self.fault is not None)

    def answered(self, value: float, args: Any, state: Any, control: Any) -> NoReturn:
        self.stop()

    def _send(self, step: int) -> None:
        if not self._losses:
            return
        device, norm = self._losses[0].device, self._norm
        figures = [*self._losses, *([norm] if isinstance(norm, torch.Tensor) else [])]
        known = None if isinstance(norm, torch.Tensor) else NOT_MEASURED if norm is None else norm
        values = torch.stack([figure.double() for figure in figures])
        self._losses, self._norm = [], None
        if device.type != "cuda":
            self._copies.append(_Copy(step, values, known, None))
            return
        there = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        there.copy_(values, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._copies.append(_Copy(step, there, known, arrived))

    def _look(self, wait_for: int) -> None:
        """Look at the copies that are there, and wait for those that `wait_for` or more others came after."""
        while self._copies:
            first = self._copies[0]
            if first.arrived is not None and not first.arrived.query():
                if len(self._copies) <= wait_for:
                    return
                first.arrived.synchronize()
            self._copies.popleft()
            losses = first.values.tolist()
            norm = losses.pop() if first.norm is None else first.norm
            self.still = self.still + 1 if norm == 0 else 0
            if self.fault is None and not all(map(math.isfinite, (*losses, norm))):
                self.fault = Fault(first.step, tuple(losses), norm)

    def check(self) -> None:
        """Look at all steps until now, at what was trained and at the optimiser's state. Every rank has to call it.

        Raises:
            NumericError: something is not finite, on whichever rank.
        """
        self._look(wait_for=0)
        mine = [tensor.detach() for _, tensor in self._trained()]
        # The largest of all magnitudes: a value that is not finite comes through.
        largest = torch.nn.utils.get_total_norm(mine, norm_type=math.inf)
        bad = self.fault is not None or not bool(torch.isfinite(largest))
        if any(row[0] for row in all_gather([float(bad)], self.trainer.args.device)):
            self.stop()

    def judge_evaluation(self, loss: float, batches: Sequence[int]) -> None:
        """Take note of a held-out loss that is not finite, or end the run. Every rank has to call it.

        Args:
            batches: the numbers of this rank's batches whose loss is not finite.

        Raises:
            NumericError: what was trained is not finite, or the run chooses its result by this loss.
        """
        self.check()
        numbers = [row for batch in batches for row in self.trainer.rows_of(batch + 1, 0, shuffle=False)]
        mine = self.cache.places("eval", numbers) if self.cache else []
        rows = _together(row for told in self.trainer.agreement.gather(mine) for row in told)
        of = f", for {rows}" if rows else ""
        text = f"The held-out loss at step {self.trainer.state.global_step} is {loss}{of}; the weights are finite."
        train = self.config.train
        chooses = "train.keep_best" if train.keep_best else "train.early_stopping" if train.early_stopping else None
        if chooses:
            advice = [Advice("look at these rows", "data"), *other_format(self.config, self.trainer.dtype)]
            advice.append(Advice(f"do without `{chooses}`", chooses))
            raise NumericError(self._text(f"{text} `{chooses}` goes by it.", advice, diverged=False))
        self.warnings.append(text)

    def _trained(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield what this rank holds of trained weights, of their float32 copies, and of the optimiser's state."""
        found = [
            (name, getattr(weight, "ds_tensor", weight))
            for name, weight in self.trainer.model.named_parameters()
            if weight.requires_grad
        ]
        optimizer = self.trainer.optimizer
        if optimizer is not None:
            copies = (weight for group in optimizer.param_groups for weight in group["params"])
            found += [("the optimiser's copy of a weight", weight) for weight in copies]
            states = (value for state in optimizer.state.values() for value in state.values())
            found += [("the optimiser's state", value) for value in states if isinstance(value, torch.Tensor)]
        yield from ((name, tensor) for name, tensor in found if tensor.numel() and tensor.is_floating_point())

    def stop(self) -> NoReturn:
        """End the run; every rank has to call it, and says the same.

        Raises:
            NumericError: always.
        """
        self._look(wait_for=0)
        fault, step = self.fault, self.trainer.state.global_step
        weight = None
        if fault is None:
            weight = next((name for name, tensor in self._trained() if not torch.isfinite(tensor).all()), None)
        told = self.trainer.agreement.gather((fault, fault and self._rows(fault), weight))
        faults = {rank: (fault, rows) for rank, (fault, rows, _) in enumerate(told) if fault}
        if not faults:
            weight = next((weight for _, _, weight in told if weight), "a weight")
            text = f"After step {step} {weight} is not finite."
            raise NumericError(self._text(text, calmer_steps(self.config)))
        raise NumericError(self._explained(faults))

    def _explained(self, faults: dict[int, tuple[Fault, list[Place]]]) -> str:
        step = min(fault.step for fault, _ in faults.values())
        faults = {rank: one for rank, one in faults.items() if one[0].step == step}
        where = [(rank, *one) for rank, one in faults.items() if one[0].micro_batches]
        first = next(iter(faults.values()))[0]
        advice: list[Advice] = []
        odd = False
        if not where:
            what = f"The gradient of step {step} has the norm {first.norm}, its loss is finite."
        else:
            values = {str(loss) for _, fault, _ in where for loss in fault.losses if not math.isfinite(loss)}
            rows = _together(row for _, _, rows in where for row in rows)
            ranks = [str(rank) for rank, _, _ in where] if self.trainer.args.world_size > 1 else []
            on = f" on rank {listed(ranks)}" if ranks else ""
            what = f"The loss of step {step} is {' and '.join(sorted(values))}{on}{f', for {rows}' if rows else ''}."
            if odd := self._is_odd(faults, where):
                what += " That of the step's other rows is finite."
                advice += [Advice("look at these rows (`tunewright data show NAME --row N`)", "data")] if rows else []
        if where and self.trainer.loss is not None:
            name = self.config.train.loss
            which = f"`train.loss={name}`" if name else "the given loss"
            advice.append(Advice(f"look at what {which} returns for them"))
        if step > 1:  # before it nothing was learnt
            advice += calmer_steps(self.config)
        return self._text(what, [*advice, *other_format(self.config, self.trainer.dtype)], diverged=not odd)

    def _is_odd(self, faults: dict[int, tuple[Fault, list[Place]]], where: Sequence[Any]) -> bool:
        """Tell whether some of a step's rows have a finite loss: then it is not the whole model that is broken."""
        if len(faults) > len(where):
            return True
        return any(math.isfinite(loss) and loss != 0 for fault, _ in faults.values() for loss in fault.losses)

    def _rows(self, fault: Fault) -> list[Place]:
        """Return the rows of this rank's micro-batches whose loss is not finite."""
        rows = [row for number in fault.micro_batches for row in self.trainer.rows_of(fault.step, number)]
        return self.cache.places("train", rows) if self.cache else []

    def _text(self, what: str, advice: Sequence[Advice], *, diverged: bool = True) -> str:
        """Say what happened, what to change, and from which checkpoint the run can go on with the change.

        No checkpoint holds what is not finite (see `check`), but one of a run that has `diverged` may be near it.
        """
        told = "; or ".join(one.text for one in advice)
        checkpoint = RunDir(Path(self.trainer.args.output_dir).parent).last_checkpoint()
        last = "No checkpoint was written before it."
        if checkpoint:
            allow = ",".join(one.allow for one in advice if one.allow)
            change = f" resume_allow=[{allow}]` goes on from it with the change" if allow else "` goes on from it"
            near = "; where the loss had risen before it, start anew" if diverged else ""
            last = f"{checkpoint.name} is the last good one: `resume=auto{change}{near}."
        return f"{what} {told[:1].upper()}{told[1:]}. {last}" if told else f"{what} {last}"


def _together(places: Iterable[Place]) -> str:
    """Return "demo rows 3, 17, my/rows.jsonl row 4"."""
    numbers: dict[str, list[str]] = {}
    for name, row in sorted(places):
        numbers.setdefault(name, []).append(str(row))
    parts = (f"{name} row{'s' * (len(rows) > 1)} {listed(rows, ROWS_TOLD)}" for name, rows in numbers.items())
    return ", ".join(parts)


def check_finite(trainer: Any) -> None:
    """Refuse to keep what is not finite: before a checkpoint is committed and before the result is saved.

    Every rank has to call it.

    Raises:
        NumericError: see `Finiteness.check`.
    """
    trainer.finiteness.check()
