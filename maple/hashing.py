"""Keyed 64-bit hashing and named seeds: the only sources of pseudo-randomness by key in Maple.

Python's ``hash()`` differs between processes; everything here is a function of UTF-8 bytes alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt


def stable_hash(salt: str, *keys: str) -> int:
    """An unsigned 64-bit hash of ``keys`` under ``salt``: BLAKE2b, every part length-prefixed, so no two key lists collide by joining."""
    digest = hashlib.blake2b(digest_size=8, key=salt.encode()[:64])
    if len(salt.encode()) > 64:
        digest.update(salt.encode())
    for key in keys:
        raw = key.encode()
        digest.update(len(raw).to_bytes(4, "little"))
        digest.update(raw)
    return int.from_bytes(digest.digest(), "little")


def stable_unit(salt: str, *keys: str) -> float:
    """A number in [0, 1), uniform over keys: assignment, sampling and ties all use it."""
    return (stable_hash(salt, *keys) >> 11) * 2.0**-53


def stable_units(salt: str, keys: Iterable[str]) -> npt.NDArray[np.float64]:
    """``stable_unit`` of each key, float64[N]."""
    return np.fromiter((stable_unit(salt, key) for key in keys), dtype=np.float64)


def mix64(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): every input bit reaches every output bit, uint64[N] -> uint64[N]."""
    with np.errstate(over="ignore"):
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def seeds(root: int, name: str) -> np.random.SeedSequence:
    """The seed sequence of one named consumer of a run's root seed, independent of all other names."""
    return np.random.SeedSequence([root & 0xFFFFFFFF, stable_hash("seed", name)])


def rng(root: int, name: str) -> np.random.Generator:
    """A numpy generator for one named consumer of a run's root seed."""
    return np.random.default_rng(seeds(root, name))


def torch_seed(root: int, name: str) -> int:
    """A 63-bit seed for libraries that take one integer."""
    return int(seeds(root, name).generate_state(1, np.uint64)[0] >> np.uint64(1))


def sha256(data: bytes | memoryview) -> str:
    """Hex SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def combine(parts: Sequence[str]) -> str:
    """One hex SHA-256 over an ordered list of strings, each length-prefixed."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode()
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return digest.hexdigest()
