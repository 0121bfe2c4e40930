"""Which rows train and which are held out: sampling, splitting and mixing, as numbers of examples.

All of it is arithmetic on row numbers under a seed, done when the tokens are opened: another split or mixture needs no
new tokens, and the same rows are held out whatever the tokenizer and the lengths.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from tunewright.config.schema import Compat, DataConfig, Mix
from tunewright.errors import ConfigError, DataError


@dataclass(frozen=True)
class Part:
    """The examples of one dataset: the row of each of them, and how many rows the dataset has."""

    name: str
    rows: np.ndarray  # (examples,) int64, rising
    read: int
    num_samples: int | None = None


def epoch_order(units: int, seed: int, epoch: int) -> np.ndarray:
    """Return the numbers of rows (or packs) in the order in which an epoch trains on them, (units,)."""
    order = np.arange(units)
    np.random.default_rng([seed, epoch]).shuffle(order)
    return order


def held_out_rows(sizes: list[int], data: DataConfig, seed: int) -> list[np.ndarray]:
    """Return for each dataset a mask (rows,) of the rows that `data.eval_size` holds out.

    Raises:
        DataError: no row is left for training.
    """
    total = sum(sizes)
    count = round(data.eval_size * total) if data.eval_size < 1 else int(data.eval_size)
    count = max(count, 1) if data.eval_size > 0 else 0
    if count >= total and total:
        raise DataError(
            f"`data.eval_size` is {data.eval_size:g}, which holds out {count} of {total} rows: none is left."
        )
    mask = np.zeros(total, bool)
    mask[np.random.default_rng([seed, 0]).permutation(total)[:count]] = True
    return np.split(mask, np.cumsum(sizes)[:-1])


def training_examples(parts: list[Part], data: DataConfig, seed: int) -> list[np.ndarray]:
    """Return for each dataset the numbers of the examples that train, some of them more than once.

    `num_samples` of an entry draws rows, again and again when it asks for more than there are; `data.max_samples`
    bounds them; `data.weights` and `data.mix` say how often each dataset is used.
    """
    named = data.eval_names or data.eval_split
    held = None if named else held_out_rows([part.read for part in parts], data, seed)
    chosen = []
    for number, part in enumerate(parts):
        examples = np.arange(len(part.rows))
        if held is not None:
            examples = examples[~held[number][part.rows]]
        if part.num_samples is not None:
            examples = _sampled(part, examples, part.num_samples, seed, repeat=True)
        if data.max_samples is not None:
            first = data.compat is Compat.llamafactory
            examples = _sampled(part, examples, data.max_samples, seed, first=first)
        chosen.append(examples)
    sizes = mixture([len(examples) for examples in chosen], data)
    for part, examples, size in zip(parts, chosen, sizes, strict=True):
        if len(examples) and not size:
            raise ConfigError(
                f"`data.weights` and `data.mix` leave no row of {part.name}: raise its weight or leave it out."
            )
    return [
        _resized(examples, size, _random(part, seed, 2))
        for part, examples, size in zip(parts, chosen, sizes, strict=True)
    ]


def rows_to_train(names: list[str], sizes: list[int], samples: list[int | None], data: DataConfig, seed: int) -> int:
    """Return how many rows of datasets of these sizes train when every row is one example."""
    parts = [
        Part(name, np.arange(size), size, num_samples)
        for name, size, num_samples in zip(names, sizes, samples, strict=True)
    ]
    return sum(len(examples) for examples in training_examples(parts, data, seed))


def mixture(sizes: list[int], data: DataConfig) -> list[int]:
    """Return how many examples each dataset of these sizes contributes.

    Raises:
        ConfigError: not one weight for each dataset, or one that is not positive.
    """
    weights = [float(weight) for weight in data.weights]
    if weights and (len(weights) != len(sizes) or min(weights) <= 0):
        raise ConfigError(
            f"`data.weights` is {weights}: write one positive number for each of the {len(sizes)} datasets of "
            f"`data.names`."
        )
    if data.mix is Mix.concat:
        return [round(size * weight) for size, weight in zip(sizes, weights or [1.0] * len(sizes), strict=True)]
    if data.mix is Mix.interleave_once:
        return sizes
    shares = [weight / sum(weights) for weight in weights] if weights else [1 / len(sizes)] * len(sizes)
    # Drawing by these shares, the first dataset is used up after `least` draws and the last after `most`.
    draws = [size / share for size, share in zip(sizes, shares, strict=True)]
    length = min(draws) if data.mix is Mix.interleave_under else max(draws)
    return [round(length * share) for share in shares]


def _random(part: Part, seed: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng([seed, purpose, zlib.crc32(part.name.encode())])


def _sampled(
    part: Part, examples: np.ndarray, count: int, seed: int, *, repeat: bool = False, first: bool = False
) -> np.ndarray:
    """Return the examples of `count` rows, drawn under the seed; with `repeat` rows are used again to reach it."""
    rows = np.unique(part.rows[examples])
    if first:
        wanted = rows[:count]
    elif count <= len(rows):
        wanted = _random(part, seed, 1).permutation(rows)[:count]
    else:
        wanted = _resized(rows, count, _random(part, seed, 1)) if repeat else rows
    counts = np.bincount(wanted, minlength=part.read)[part.rows[examples]]
    return np.repeat(examples, counts)


def _resized(values: np.ndarray, size: int, random: np.random.Generator) -> np.ndarray:
    """Return `size` of the values: whole copies, and for the rest a draw without repetition."""
    if not len(values):
        return values
    copies, rest = divmod(size, len(values))
    drawn = np.sort(random.permutation(len(values))[:rest])
    return np.concatenate([*[values] * copies, values[drawn]])
