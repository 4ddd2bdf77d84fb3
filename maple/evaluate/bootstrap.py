"""Resampling over users: bootstrap means (and so intervals), and the sign-flip randomisation test of a paired difference.

Both run in blocks, as one matrix product per block, so that 30,000 users times 1,000 draws take a second and little memory.
"""

from __future__ import annotations

import numpy as np

from maple.evaluate.metrics import Float64
from maple.hashing import rng

_BLOCK_CELLS = 1 << 21  # draws x users held at once


def bootstrap_means(values: Float64, draws: int, seed: int, name: str) -> Float64:
    """Means of ``draws`` resamples of the rows (users) of values[U, M], float64[draws, M]; the same resample for all columns.

    A resample is U users drawn with replacement: multinomial counts, used as weights.
    """
    users = len(values)
    generator = rng(seed, name)
    out = np.empty((draws, values.shape[1]))
    block = max(1, _BLOCK_CELLS // max(users, 1))
    for start in range(0, draws, block):
        size = min(block, draws - start)
        picks = generator.integers(0, users, size=(size, users)) + np.arange(size)[:, None] * users
        weights = np.bincount(picks.ravel(), minlength=size * users).reshape(size, users)
        out[start : start + size] = weights.astype(np.float64) @ values / users
    return out


def interval(means: Float64, level: float = 0.95) -> tuple[Float64, Float64]:
    """Percentile interval of bootstrap means[draws, M]: (low float64[M], high float64[M])."""
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail], axis=0)
    return low, high


def sign_flip_p(differences: Float64, draws: int, seed: int, name: str) -> Float64:
    """Two-sided p-values of mean difference = 0 for paired differences[U, M], float64[M], by flipping each user's sign at random.

    (1 + draws at least as extreme) / (draws + 1): never 0, and 1 where nothing differs (Phipson and Smyth 2010).
    """
    users = len(differences)
    generator = rng(seed, name)
    observed = np.abs(differences.sum(axis=0))
    slack = 1e-9 * np.abs(differences).sum(axis=0)  # equal sums in another order must count as equal
    extreme = np.zeros(differences.shape[1], dtype=np.int64)
    block = max(1, _BLOCK_CELLS // max(users, 1))
    for start in range(0, draws, block):
        size = min(block, draws - start)
        bits = np.unpackbits(np.frombuffer(generator.bytes(size * ((users + 7) // 8)), np.uint8).reshape(size, -1), axis=1)[:, :users]
        flipped = np.abs((bits.astype(np.float64) * 2.0 - 1.0) @ differences)
        extreme += (flipped >= observed - slack).sum(axis=0)
    return np.asarray((1.0 + extreme) / (draws + 1.0), dtype=np.float64)
