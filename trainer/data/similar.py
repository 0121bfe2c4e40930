"""Texts that are nearly the same: MinHash sketches (Broder 1997), compared by locality-sensitive hashing.

The sketches are made by `rensa` from hashes of five characters in a row.
"""

from __future__ import annotations

import numpy as np

SHINGLE = 5  # characters
PERMUTATIONS = 64  # of a sketch; two sketches agree in a share of them that estimates the Jaccard similarity
ROWS_PER_BAND = 4
LONG = 256  # characters: of longer texts a sample of the shingles is compared
SIMILAR = 0.8  # estimated Jaccard similarity from which two texts are called nearly the same
SEED = 1
# Odd numbers that spread neighbouring code points: powers of 2^64 / golden ratio.
FACTORS = [np.uint64(pow(0x9E3779B97F4A7C15, power, 2**64)) for power in range(1, SHINGLE + 1)]


def sketches(texts: list[str]) -> np.ndarray:
    """Return (texts, PERMUTATIONS) uint32; case and runs of spaces do not count."""
    from rensa import RMinHash

    if not texts:
        return np.zeros((0, PERMUTATIONS), np.uint32)
    normal = [" ".join(text.casefold().split()).ljust(SHINGLE) for text in texts]
    codes = np.frombuffer("".join(normal).encode("utf-32-le", "replace"), np.uint32).astype(np.uint64)
    count = len(codes) - SHINGLE + 1
    hashes = np.zeros(count, np.uint64)
    for offset, factor in enumerate(FACTORS):
        hashes += codes[offset : offset + count] * factor
    hashes ^= hashes >> np.uint64(32)
    hashes *= FACTORS[0]
    hashes ^= hashes >> np.uint64(29)
    # Of a long text every fourth shingle is enough, chosen by its hash and so alike in every text.
    lengths = np.array([len(text) for text in normal])
    chosen = (hashes & np.uint64(3) == 0) | np.repeat(lengths < LONG, lengths)[: len(hashes)]
    # The last SHINGLE - 1 hashes of a text reach into the next one and are left out.
    ends = np.cumsum(lengths)
    for back in range(1, SHINGLE):
        reaching = ends - back
        chosen[reaching[reaching < len(chosen)]] = False
    offsets = np.concatenate([[0], np.cumsum(chosen)])[np.concatenate([[0], np.minimum(ends, len(chosen))])]
    flat = hashes[chosen]
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets.astype(np.uint64), PERMUTATIONS, SEED)
    return np.array(matrix.to_rows(), np.uint32)


def similar_pairs(matrix: np.ndarray) -> list[tuple[int, int]]:
    """Return pairs (earlier, later) of rows of a (rows, PERMUTATIONS) matrix of sketches that are nearly the same.

    Each later row is paired with one earlier row at most, so that a group of n has n - 1 pairs.
    """
    found: dict[int, int] = {}
    for start in range(0, PERMUTATIONS, ROWS_PER_BAND):
        band = np.ascontiguousarray(matrix[:, start : start + ROWS_PER_BAND]).view(f"V{4 * ROWS_PER_BAND}").ravel()
        _, first, group = np.unique(band, return_index=True, return_inverse=True)
        earlier = first[group]
        candidates = np.flatnonzero(earlier != np.arange(len(matrix)))
        agree = (matrix[candidates] == matrix[earlier[candidates]]).mean(axis=1) >= SIMILAR
        for later in candidates[agree]:
            found.setdefault(int(later), int(earlier[later]))
    return sorted((earlier, later) for later, earlier in found.items())
