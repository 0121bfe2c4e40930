"""What becomes of settings that are `auto`: the fastest way to run that fits. And what cannot fit is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from tunewright.config.schema import Launcher, Source
from tunewright.errors import MemoryShortage, TunewrightError
from tunewright.plan.architecture import Architecture
from tunewright.plan.auto import (
    AUTO,
    MICRO_BATCH,
    RECOMPUTE,
    STRATEGY,
    Choice,
    chosen_before,
    open_settings,
    plain_choice,
    write,
)
from tunewright.plan.batch_plan import BatchPlan
from tunewright.plan.devices import Devices
from tunewright.plan.machine import Machine, free_memory, machine_here
from tunewright.plan.rules import check
from tunewright.text import size

if TYPE_CHECKING:
    from tunewright.launch.planning import Plan
    from tunewright.launch.row_counts import Rows
    from tunewright.trainer.prepared import Prepared

INTERPRETER = 2**30  # bytes of a rank with its libraries, at most
STATE = 20  # bytes of a trained weight at most: itself, gradient, float32 copy, two moments
KEPT = 3  # times what linear modules take and give, logits and scores: all that is kept for the backward pass, at most
HEAD = 32  # numbers of a head of attention, at least
CHUNK = 2048  # positions of which there are logits at once, at most
ROUND = 128  # tokens: longest rows that differ by less share a footprint


def choose(
    config: DictConfig,
    devices: Devices,
    machine: Machine | None = None,
    *,
    here: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Choice:
    """Return what was chosen for the run that this configuration continues, else what is chosen for these devices.

    Args:
        config: with settings left open; it is changed.
        machine: that the devices belong to, where it is not this one.
        here: training must happen in this process.
        say: takes what was chosen by a plan, and why.

    Raises:
        ConfigError, StorageError, MemoryShortage: see `choose_anew`.
    """
    alone = here and STRATEGY in open_settings(config)
    if alone:
        config.strategy.name, config.strategy.launcher = "single", Launcher.single
    found = chosen_before(config) or choose_anew(config, devices, machine, say=say)
    return replace(found, strategy="single") if alone else found


def choose_anew(
    config: DictConfig,
    devices: Devices,
    machine: Machine | None = None,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> Choice:
    """Return the fastest way to run on these devices that fits, by `data.cutoff_len`: the rows are not known yet.

    On a CPU all ways share one memory, so that there is nothing to choose before `fit` knows the rows.

    Raises:
        ConfigError: the configuration cannot work, whatever is chosen.
        StorageError: the model's config.json cannot be had.
        MemoryShortage: nothing fits that the settings leave open.
    """
    plain = plain_choice(config)
    if not devices.gpu or _is_small(config):
        return plain
    trial = config.copy()
    write(trial, plain)
    OmegaConf.resolve(trial)
    check(trial, devices)  # at once: a plan may take seconds
    from tunewright.plan.reasons import settings

    plan = _plan_that_fits(config, devices, machine)
    best = plan.best
    if best is None:
        unknown = "the model" if plan.machine.memory else "how much the devices have"
        say(f"Memory is not planned, {unknown} is not known: {plan.footprint.problem or plan.machine.name}")
        return plain
    say(f"Chosen: {settings(best)}: {plan.verdict}")
    return Choice(best.strategy, best.micro_batch, best.recompute)


def fit(config: DictConfig, devices: Devices, plan: BatchPlan, prepared: Prepared) -> str | None:
    """Choose micro-batch and recomputation anew, where they were left open, by the rows that there are.

    A run that continues keeps what it has as long as that fits.

    Returns:
        What to say of it, where it is something else than before.

    Raises:
        MemoryShortage: the configuration cannot fit; with what is nearest and does.
    """
    from tunewright.launch.ask_torch import ensure_architecture

    if _is_small(config):
        return None
    train, longest = config.train, _longest(config, prepared)
    if not devices.gpu and most_host_memory(config, ensure_architecture(config), plan, longest) <= free_memory():
        return None
    asked = _by_rows(config, longest)
    if chosen_before(config) and _plan(asked, devices).best:
        return None
    if MICRO_BATCH in config.automatic:
        asked.train.micro_batch_size = AUTO
    if RECOMPUTE in config.automatic:
        asked.train.gradient_checkpointing = AUTO
    best = _plan_that_fits(asked, devices, rows=_rows(config, prepared)).best
    if best is None or (best.micro_batch, best.recompute) == (train.micro_batch_size, train.gradient_checkpointing):
        return None
    train.micro_batch_size, train.gradient_checkpointing = best.micro_batch, best.recompute
    rows = "1 row" if best.micro_batch == 1 else f"{best.micro_batch} rows"
    return (
        f"The longest row has {longest:,} tokens: {rows} of them at once, "
        f"{'layers recompute' if best.recompute else 'no layer recomputes'}."
    )


def planned(config: DictConfig, devices: Devices, prepared: Prepared) -> str:
    """Say what a configuration that leaves nothing open was planned to hold, by part; it may have to be asked."""
    longest = _longest(config, prepared)
    try:
        plan = _plan(_by_rows(config, longest), devices)
    except TunewrightError as error:  # what there was no memory for is to be told, whatever the plan says
        return f"What was planned is not known: {error}"
    memory = next((way.memory for way in plan.ways if way.configured and way.memory), None)
    if memory is None:
        return f"What was planned is not known: {plan.verdict}"
    return f"Planned for rows of up to {longest:,} tokens: {size(memory.needed)} a rank ({memory.by_part()})."


def head(config: DictConfig, devices: Devices, prepared: Prepared) -> list[str]:
    """Return what is told of a plan at the head of a run: a line, where its model has been looked at already."""
    from tunewright.launch.planning import headline

    return headline(_by_rows(config, _longest(config, prepared)), devices, _rows(config, prepared))


def _rows(config: DictConfig, prepared: Prepared) -> Rows:
    from tunewright.launch.row_counts import Rows
    from tunewright.trainer.data.token_cache import epoch_size

    # Nobody knows a stream, and packs of many rows take a while to make: a pack has about cutoff_len tokens.
    uncounted = config.data.streaming or config.data.packing
    return Rows() if uncounted else Rows(*epoch_size(prepared.cache, config))


def _by_rows(config: DictConfig, longest: int) -> DictConfig:
    """Return the configuration for rows that are no longer than the longest."""
    asked = config.copy()
    if longest < config.data.cutoff_len:
        asked.data.cutoff_len = min(config.data.cutoff_len, -(-longest // ROUND) * ROUND)
    return asked


def _longest(config: DictConfig, prepared: Prepared) -> int:
    """Return the tokens of the longest row; of a stream, a pack, or where tokens are counted, what they may be."""
    data = config.data
    if data.streaming or data.packing or config.train.tokens_per_batch:
        return int(data.cutoff_len)
    virtual = config.method.get("virtual_tokens") or 0  # which count towards cutoff_len
    return int(prepared.cache.lengths("train").max(initial=1)) + virtual


def _plan(
    config: DictConfig,
    devices: Devices,
    machine: Machine | None = None,
    *,
    whole: bool = False,
    rows: Rows | None = None,
) -> Plan:
    from tunewright.launch.planning import make_plan

    return make_plan(config.copy(), machine or machine_here(devices, config), devices.cores, whole=whole, rows=rows)


def _plan_that_fits(
    config: DictConfig, devices: Devices, machine: Machine | None = None, rows: Rows | None = None
) -> Plan:
    """Return the plan, whose best way is None where devices or model do not tell what there is and what is needed.

    Raises:
        MemoryShortage: nothing fits that the settings leave open.
    """
    plan = _plan(config, devices, machine, rows=rows)
    known = plan.machine.memory and any(way.memory for way in plan.ways if way.configured)
    if plan.best or not known:
        return plan
    # With what is nearest: perhaps another method.
    raise MemoryShortage(_plan(config, devices, machine, whole=True).verdict)


def _is_small(config: DictConfig) -> bool:
    """Tell whether memory is no question: the embedded model fits wherever torch does."""
    return bool(config.model.source is Source.embedded)


def most_host_memory(config: DictConfig, architecture: Architecture, plan: BatchPlan, longest: int) -> float:
    """Return more bytes than a configuration can take on a CPU, from what is known without asking torch.

    Args:
        longest: tokens of the longest row.
    """
    method, head = config.method, architecture.sizes.get(architecture.head, [architecture.vocabulary, 0])
    width = sum(rows + columns for name, (rows, columns) in architecture.sizes.items() if name != architecture.head)
    trained = architecture.parameters
    if method.name in ("lora", "qlora", "ia3") and not method.get("modules_to_save"):
        trained = method.get("r", 1) * (width + sum(head))
    tokens = plan.micro_batch * longest
    # Rows without padding have a block of scores at once.
    scores = 0 if config.train.padding_free else architecture.num_layers * tokens * longest * head[1] / HEAD
    activations = 4 * KEPT * (tokens * width + scores + min(tokens, CHUNK) * head[0])  # in float32
    return plan.world_size * (INTERPRETER + 4 * architecture.parameters + STATE * trained + activations)
