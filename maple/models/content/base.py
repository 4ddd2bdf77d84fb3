"""What an encoder is: strings in, unit vectors out; and what encoders share: principal axes, text lists as arrays, optional libraries.

An encoder sees the catalogue only, never events or labels. Inputs are texts, image addresses or item ids, by ``kind``; None
is a missing one. Shapes: N inputs, D dimensions, V terms.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from importlib import import_module
from typing import Any, ClassVar, Literal, Protocol, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from threadpoolctl import threadpool_limits

from maple.config import Section
from maple.data.dataset import Float32, Int64
from maple.errors import ConfigError
from maple.hashing import torch_seed
from maple.models.base import FitContext, State

Input: TypeAlias = str | None


class Encoder(Protocol):
    """Fitted on the inputs of a catalogue, it encodes those and new ones alike: a unit vector each, zeros where nothing is known."""

    Config: ClassVar[type[Section]]
    name: ClassVar[str]
    kind: ClassVar[Literal["text", "image", "id"]]
    config: Section

    @property
    def dim(self) -> int:
        """D; ``NotFittedError`` before ``fit``."""

    def fit(self, inputs: Sequence[Input], ctx: FitContext) -> None:
        """Learn from the inputs of a catalogue. ``DataError`` where they hold nothing to learn from."""

    def encode(self, inputs: Sequence[Input]) -> Float32:
        """float32[N, D]: rows of unit length, rows of zeros for what is missing or says nothing."""

    def state(self) -> State:
        """Everything learned, as arrays."""

    @classmethod
    def from_state(cls, config: Section, state: State) -> Self:
        """The encoder again, from what ``state`` gave."""


def unit(rows: npt.NDArray[Any]) -> Float32:
    """Rows scaled to length one, float32; rows without length (below 1e-9) and rows that are not finite become zeros."""
    wide = np.asarray(rows, dtype=np.float64)
    norm = np.linalg.norm(wide, axis=1, keepdims=True)
    known = np.isfinite(norm) & (norm > 1e-9)
    return np.where(known, np.divide(wide, norm, where=known, out=np.zeros_like(wide)), 0.0).astype(np.float32)


def principal_axes(matrix: sp.csr_matrix | npt.NDArray[Any], dim: int, ctx: FitContext, name: str) -> Float32:
    """The right singular vectors of the largest singular values, float32[D, V]: at most ``dim``, none beyond the rank.

    Randomised (Halko et al. 2011) with a named seed. An axis has no direction of its own; here its first entry of nearly the
    largest size is positive, so the same catalogue gives the same vectors.
    """
    from sklearn.utils.extmath import randomized_svd

    count = min(dim, *matrix.shape)
    with threadpool_limits(ctx.threads):
        _, sizes, axes = randomized_svd(matrix, count, n_iter=7, random_state=torch_seed(ctx.seed, name) % 2**32, flip_sign=False)
    axes = axes[sizes > 1e-5 * max(float(sizes.max(initial=0.0)), 1e-12)]
    size = np.abs(axes)
    leading = np.argmax(size >= 0.99 * size.max(axis=1, keepdims=True), axis=1)
    return np.ascontiguousarray(axes * np.sign(axes[np.arange(len(axes)), leading])[:, None], np.float32)


def pack(texts: Sequence[str]) -> State:
    """Texts as two arrays: their UTF-8 bytes in a row, and where each ends."""
    raw = [text.encode("utf-8", "surrogatepass") for text in texts]
    return {"bytes": np.frombuffer(b"".join(raw), np.uint8), "ends": np.cumsum([len(part) for part in raw], dtype=np.int64)}


def unpack(data: npt.NDArray[np.uint8], ends: Int64) -> list[str]:
    """The texts that ``pack`` was given."""
    raw = data.tobytes()
    return [raw[start:end].decode("utf-8", "surrogatepass") for start, end in itertools.pairwise([0, *ends.tolist()])]


def library(module: str, what: str) -> Any:
    """A module of the ``content`` extra; ``ConfigError`` with the command that installs it."""
    try:
        return import_module(module)
    except ImportError as error:
        missing = (error.name or module).split(".")[0]
        raise ConfigError(
            f"the content encoder {what!r} needs the package {missing!r}, which is not installed. "
            "Install the extra with `pip install 'maple-rec[content]'`, or choose the encoder `tfidf`, which needs nothing."
        ) from None


def scatter(places: Sequence[int], rows: npt.NDArray[Any], count: int, dim: int) -> Float32:
    """Unit rows float32[count, dim] at some places, zeros elsewhere."""
    out = np.zeros((count, dim), np.float32)
    if len(places):
        out[np.asarray(places)] = unit(rows)
    return out
