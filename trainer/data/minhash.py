"""Texts that are nearly the same: MinHash sketches (Broder 1997), compared by locality-sensitive hashing.

The sketches are made by `rensa` from hashes of eight bytes in a row: eight English letters, nearly three Chinese ones.
"""

from __future__ import annotations

import numpy as np

SHINGLE = 8  # bytes
PERMUTATIONS = 64  # of a sketch; two sketches agree in a share of them that estimates the Jaccard similarity
ROWS_PER_BAND = 4
LONG = 256  # bytes: of longer texts a sample of the shingles is compared
SIMILAR = 0.8  # estimated Jaccard similarity from which two texts are called nearly the same
SEED = 1
SPREAD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio


def sketches(texts: list[str]) -> np.ndarray:
    """Return (texts, PERMUTATIONS) uint32; case and runs of spaces do not count."""
    from rensa import RMinHash

    if not texts:
        return np.zeros((0, PERMUTATIONS), np.uint32)
    normal = [" ".join(text.lower().split()).encode(errors="replace").ljust(SHINGLE) for text in texts]
    lengths = np.array([len(text) for text in normal])
    joined = b"".join(normal)
    # Every eight bytes in a row as a number, without a copy.
    shingles = np.ndarray((len(joined) - SHINGLE + 1,), np.dtype("<u8"), joined, strides=(1,))
    hashes = shingles * SPREAD
    hashes ^= hashes >> np.uint64(32)
    hashes *= SPREAD
    # Of a long text every fourth shingle is enough, chosen by its hash and so alike in every text.
    chosen = hashes >> np.uint64(62) == 0
    ends = np.cumsum(lengths)
    for index in np.flatnonzero(lengths < LONG):
        chosen[ends[index] - lengths[index] : ends[index]] = True
    for back in range(1, SHINGLE):  # these reach into the next text
        reaching = ends - back
        chosen[reaching[reaching < len(chosen)]] = False
    before = np.concatenate([[0], np.cumsum(chosen)])
    offsets = before[np.concatenate([[0], np.minimum(ends, len(chosen))])].astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes[chosen], offsets, PERMUTATIONS, SEED)
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
