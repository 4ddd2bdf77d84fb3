"""Content of items as vectors: what a feature build and a bundle keep of an encoded catalogue, and of the encoder that made it.

The encoders live in ``maple.models.content``; here are only their results. Rows are of unit length; a row of zeros means
that nothing is known of the item. I items, D dimensions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from maple.artifacts import tensor_bytes
from maple.data.dataset import Float32, Vocab
from maple.errors import ArtifactError
from maple.hashing import combine, sha256

VECTORS, STATE = "vectors", "state/"


@dataclass(frozen=True, eq=False)
class ItemContent:
    """One content feature. ``vectors`` float32[I, D]; ``plain``: the encoder's settings, JSON-ready; ``state``: what it learned."""

    vectors: Float32
    plain: Mapping[str, Any]
    state: Mapping[str, npt.NDArray[Any]]

    @property
    def dim(self) -> int:
        """D."""
        return int(self.vectors.shape[1])

    @cached_property
    def digest(self) -> str:
        """Identifies vectors, settings and state."""
        arrays = self.tensors()
        parts = [f"{name} {array.dtype} {array.shape} {sha256(array.tobytes())}" for name, array in sorted(arrays.items())]
        return combine([json.dumps(dict(self.plain), sort_keys=True), *parts])

    def aligned(self, ids: pa.Array | pa.ChunkedArray, items: Vocab) -> ItemContent:
        """The vectors in the code order of ``items``, from the order of ``ids``; zeros for items that ``ids`` lacks."""
        rows = Vocab(pa.array(ids.to_pylist(), pa.string())).encode(items.ids)
        vectors = np.where(rows[:, None] >= 0, self.vectors[rows], np.float32(0)) if len(self.vectors) else np.zeros((len(items), self.dim))
        return ItemContent(np.ascontiguousarray(vectors, np.float32), self.plain, self.state)

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """Everything but ``plain``, as the arrays of one safetensors file."""
        state = {f"{STATE}{name}": np.ascontiguousarray(array) for name, array in self.state.items()}
        return {VECTORS: np.ascontiguousarray(self.vectors)} | state

    def to_bytes(self) -> bytes:
        """The bytes of that safetensors file."""
        return tensor_bytes(self.tensors())

    @staticmethod
    def from_tensors(plain: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> ItemContent:
        """What ``tensors`` and ``plain`` gave, again; ``ArtifactError`` where the vectors are missing or of another type."""
        vectors = arrays.get(VECTORS)
        if vectors is None or vectors.ndim != 2 or vectors.dtype != np.float32:
            raise ArtifactError("the content file holds no float32 matrix `vectors`; build the features again")
        return ItemContent(vectors, plain, {name.removeprefix(STATE): array for name, array in arrays.items() if name.startswith(STATE)})


#: A catalogue without content features.
NO_CONTENT: Mapping[str, ItemContent] = MappingProxyType({})
