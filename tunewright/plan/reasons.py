"""Why a way to run is taken, or none, in a sentence."""

from __future__ import annotations

from collections.abc import Sequence

from tunewright.config.schema import STRATEGIES
from tunewright.plan.choose import ALIKE, best_of
from tunewright.plan.option import Option
from tunewright.text import listed, size

WORTH = 1.1  # times as fast: from here on a faster way is worth a word


def settings(way: Option) -> str:
    """Return the settings that make a way."""
    recompute = str(way.recompute).lower() if way.layers is None else "auto"
    return f"strategy={way.strategy} train.micro_batch_size={way.micro_batch} train.gradient_checkpointing={recompute}"


def described(way: Option) -> str:
    """Return a way in words."""
    ranks = "1 rank" if way.ranks == 1 else f"{way.ranks} ranks"
    rows = "1 row" if way.micro_batch == 1 else f"{way.micro_batch} rows"
    recompute = f", {way.layers or 'all'} layers recompute" if way.recompute else ""
    return f"{way.method} under {way.strategy} on {ranks}, {rows} at a time{recompute}"


def reason(ways: Sequence[Option], best: Option, *, alone: str = "as configured") -> str:
    """Say why a way is taken; `alone`: where the settings leave no other."""
    own = [way for way in ways if way.method == best.method]
    open_ways = [way for way in own if way.configured and way.refusal is None]
    fitting = [way for way in open_ways if way.fits]
    if len(open_ways) == 1:
        return f"{alone}{_faster(own, best)}."
    told = [f"the fastest of {len(fitting)} ways that fit" if len(fitting) > 1 else "the only way that fits"]
    told += _too_large(open_ways, best)
    if best.memory and best.memory.host and best.host_room is None:
        told.append(f"each rank needs {size(best.memory.host)} of host memory beside, if the host has that")
    others = [way for way in fitting if way.strategy != best.strategy]
    if others:
        other = min(others, key=lambda way: (way.seconds, STRATEGIES.index(way.strategy)))
        times = other.seconds / best.seconds
        if times > ALIKE:
            told.append(f"the next, {other.strategy}, takes {times:.3g} times as long")
        elif STRATEGIES.index(best.strategy) < STRATEGIES.index(other.strategy):
            told.append(f"{other.strategy} is as fast and does more than is needed")
    return f"{'; '.join(told)}{_faster(own, best)}."


def _too_large(ways: Sequence[Option], best: Option) -> list[str]:
    """Say what would be simpler, or need no recomputation, and does not fit."""
    said = []
    earlier = [name for name in STRATEGIES[: STRATEGIES.index(best.strategy)] if any(w.strategy == name for w in ways)]
    large = [way for way in ways if way.strategy in earlier]
    tight = [name for name in earlier if not any(way.fits for way in large if way.strategy == name)]
    least = min((way.memory.needed for way in large if way.strategy in tight and way.memory), default=0)
    if tight:
        said.append(f"{listed(tight)} would need {size(least)} or more of {size(best.room)}")
    if best.recompute:
        same = [w.memory.needed for w in ways if w.strategy == best.strategy and not w.recompute and w.memory]
        if same and min(same) > best.room:
            said.append(f"without recomputation it would need {size(min(same))} or more")
    return said


def _faster(own: Sequence[Option], best: Option) -> str:
    """Point at a way that settings rule out and that is faster."""
    way = best_of(own) or best
    if way.configured or best.seconds < WORTH * way.seconds:
        return ""
    return f"; {settings(way)} would take {way.seconds / best.seconds:.0%} of the time"


def shortage(ways: Sequence[Option]) -> str:
    """Say that none of the ways that the settings leave open fits, what the least is, and what does fit."""
    own = [way for way in ways if way.configured and way.refusal is None and way.memory]
    if not own:
        return next((way.refusal for way in ways if way.configured and way.refusal), "There is no way to run this.")
    least = min(own, key=lambda way: way.share)
    assert least.memory is not None
    other = nearest(ways, least)
    if other is None:
        advice = "Nothing else that was looked at fits either"
    else:
        method = f"method={other.method} " if other.method != least.method else ""
        assert other.memory is not None
        advice = f"What is nearest and fits: {method}{settings(other)}, with {size(other.memory.needed)}"
    return f"{described(least)} needs {size(least.memory.needed)} a rank, of {size(least.room)}. {advice}."


def nearest(ways: Sequence[Option], asked: Option) -> Option | None:
    """Return what fits and changes the least: rather the micro-batch than recomputation, than strategy, than method."""

    def changes(way: Option) -> tuple[bool, bool, bool, int, float]:
        rows = abs(way.micro_batch - asked.micro_batch)
        return (
            way.method != asked.method,
            way.strategy != asked.strategy,
            way.recompute != asked.recompute,
            rows,
            way.seconds,
        )

    return min((way for way in ways if way.fits), key=changes, default=None)
