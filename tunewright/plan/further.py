"""What a larger model would need, by the footprint of a smaller one."""

from __future__ import annotations

from dataclasses import replace

from tunewright.plan.footprint import Footprint, Pass


def deeper(footprint: Footprint, times: int) -> Footprint:
    """Return the footprint of a model with `times` as many layers of the same kind.

    What a moment holds of a single layer is multiplied too, so that activations are an upper bound.
    """
    weights = footprint.weights
    inside, outside = sum(weights.layers), weights.outside
    grown = (times * inside + outside) / (inside + outside)
    larger = replace(
        weights,
        trained=times * weights.trained if weights.frozen else round(grown * weights.trained),
        frozen=round(grown * weights.frozen),
        frozen_bytes=round(grown * weights.frozen_bytes),
        layers=weights.layers * times,
        small=times * weights.small,
        shapes=[(shape, times * number) for shape, number in weights.shapes],
    )
    return replace(footprint, weights=larger, passes=[_deeper(one, times) for one in footprint.passes])


def _deeper(found: Pass, times: int) -> Pass:
    moments = []
    for one in found.moments:
        once = one.head + one.scratch
        activations = times * (one.activations - once) + once
        moments.append(replace(one, activations=activations, gradients=times * one.gradients))
    return replace(found, moments=moments, flops=found.flops * times)
