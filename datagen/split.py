"""Rows to train on and rows to test with: near duplicates stay together, so that a test row is new to the model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from tunewright.datagen.filtering import Row, opening, prompt_tokens
from tunewright.datagen.rouge import Coder, Index, normal

CHUNK = 64  # test rows compared with all rows for training at once


@dataclass(frozen=True)
class Split:
    """Numbers of the rows on either side, and the two of them that are most alike."""

    train: list[int]
    test: list[int]
    highest: float  # ROUGE-L F1 of the prompts of `pair`; 0 where nothing is held out
    pair: tuple[int, int] | None  # (train, test)


def split(rows: list[Row], share: float, seed: int, similarity: float) -> Split:
    """Hold out whole clusters, together at most `share` of the rows, or else the smallest cluster.

    A cluster is all rows that are connected by prompts with ROUGE-L >= similarity or by the same instruction. Which
    clusters are held out depends on the seed and on what is in the rows, not on their order.

    Raises:
        ValueError: a share outside [0, 1), or a similarity that is not above 0 and at most 1.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share is {share}, and must be at least 0 and less than 1")
    coder = Coder()
    texts = [coder.encode(prompt_tokens(opening(row))) for row in rows]
    groups = _clusters([normal(opening(row)[0]) for row in rows], texts, similarity)
    held = _held_out(rows, groups, share, seed)
    test = sorted(held)
    train = [number for number in range(len(rows)) if number not in held]
    return Split(train, test, *_highest(texts, train, test))


def _clusters(instructions: list[str], texts: list[str], similarity: float) -> list[list[int]]:
    """Return the connected components."""
    clusters = np.arange(len(texts))
    index = Index(similarity)
    first: dict[str, int] = {}
    for number, (instruction, text) in enumerate(zip(instructions, texts, strict=True)):
        joined = np.unique(clusters[np.append(index.near(text), first.setdefault(instruction, number))])
        clusters[number] = joined[0]
        if len(joined) > 1:
            clusters[:number][np.isin(clusters[:number], joined)] = joined[0]
        index.add(text)
    groups: dict[int, list[int]] = {}
    for number, cluster in enumerate(clusters.tolist()):
        groups.setdefault(cluster, []).append(number)
    return list(groups.values())


def _held_out(rows: list[Row], groups: list[list[int]], share: float, seed: int) -> set[int]:
    if not share or len(groups) < 2:
        return set()
    # A cluster is known by a prompt in it. Hashes instead of a shuffle: new rows leave the order of the others alone.
    order = sorted(groups, key=lambda group: min(_draw(rows[number], seed) for number in group))
    target = max(1, round(len(rows) * share))
    held: set[int] = set()
    for group in order:
        if len(held) + len(group) <= target:
            held.update(group)
    smallest = min(order, key=len)
    return held if 0 < len(held) < len(rows) else set(smallest)


def _draw(row: Row, seed: int) -> str:
    return hashlib.sha256("\0".join([str(seed), *map(normal, opening(row))]).encode(errors="replace")).hexdigest()


def _highest(texts: list[str], train: list[int], test: list[int]) -> tuple[float, tuple[int, int] | None]:
    """Return the highest similarity between the sides; every pair is compared, which proves that nothing leaked."""
    from rapidfuzz.distance import Indel
    from rapidfuzz.process import cdist

    if not train or not test:
        return 0.0, None
    highest, pair = -1.0, (train[0], test[0])
    known = [texts[number] for number in train]
    for start in range(0, len(test), CHUNK):
        asked = [texts[number] for number in test[start : start + CHUNK]]
        # What is below the highest so far need not be computed to the end.
        scores = cdist(
            asked,
            known,
            scorer=Indel.normalized_similarity,
            score_cutoff=max(highest, 0.0),
            dtype=np.float64,
            workers=-1,
        )
        row, column = divmod(int(scores.argmax()), len(known))
        if scores[row, column] > highest:
            highest, pair = float(scores[row, column]), (train[column], test[start + row])
    return highest, pair
