"""Item vectors that were made elsewhere: a Parquet file of ids and vectors, or a numpy matrix with a file of ids."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from maple.config import Section
from maple.data.dataset import Float32
from maple.errors import ConfigError, DataError, NotFittedError, unknown_name
from maple.models.base import FitContext, State
from maple.models.content.base import Input, pack, unit, unpack
from maple.models.families import take_array


class VectorsConfig(Section):
    """Which file, and where in it the ids and the vectors are."""

    path: str
    """``.parquet`` (a column of ids and a column of lists of numbers) or ``.npy`` (a matrix, a row per line of ``ids``)."""
    ids: str | None = None
    """For ``.npy``: a UTF-8 text file with one item id per line, in the order of the rows."""
    key: str = "item_id"
    """For Parquet: the column of ids."""
    column: str = "vector"
    """For Parquet: the column of vectors."""


class Vectors:
    """Vectors by item id; an id that the file lacks is missing."""

    Config: ClassVar[type[Section]] = VectorsConfig
    name: ClassVar[str] = "vectors"
    kind: ClassVar[Literal["text", "image", "id"]] = "id"

    def __init__(self, config: VectorsConfig) -> None:
        self.config = config
        self._state: State | None = None

    def fit(self, inputs: Sequence[Input], ctx: FitContext) -> None:
        path = Path(self.config.path)
        try:
            ids, matrix = self._parquet(path) if path.suffix != ".npy" else self._numpy(path)
        except OSError as error:
            raise ConfigError(f"content: cannot read {error.filename or path}: {error.strerror or error}. Check the path.") from None
        if matrix.ndim != 2 or matrix.shape[1] == 0 or len(ids) != len(matrix):
            raise DataError(f"content: {path} holds an array of shape {matrix.shape} for {len(ids):,} ids; one vector per id is needed")
        if len(set(ids)) != len(ids):
            raise DataError(f"content: {path} gives two vectors to one id; keep one of them")
        packed = pack(ids)
        vars(self).pop("_places", None)
        self._state = {"ids": packed["bytes"], "id_ends": packed["ends"], "vectors": unit(matrix)}

    @property
    def dim(self) -> int:
        return int(self.state()["vectors"].shape[1])

    def encode(self, inputs: Sequence[Input]) -> Float32:
        vectors, places = self.state()["vectors"], self._places
        rows = np.fromiter((-1 if one is None else places.get(one, -1) for one in inputs), np.int64, len(inputs))
        out = np.zeros((len(inputs), vectors.shape[1]), np.float32)
        out[rows >= 0] = vectors[rows[rows >= 0]]
        return out

    def state(self) -> State:
        if self._state is None:
            raise NotFittedError("the vectors have not been read; call fit(inputs, ctx) or load them first")
        return dict(self._state)

    @classmethod
    def from_state(cls, config: Section, state: State) -> Self:
        assert isinstance(config, VectorsConfig)
        encoder = cls(config)
        ends = take_array(state, "id_ends", np.int64, (None,))
        take_array(state, "ids", np.uint8, (int(ends[-1]) if len(ends) else 0,))
        take_array(state, "vectors", np.float32, (len(ends), None))
        encoder._state = dict(state)
        return encoder

    @cached_property
    def _places(self) -> dict[str, int]:
        state = self.state()
        return {one: place for place, one in enumerate(unpack(state["ids"], state["id_ends"]))}

    def _parquet(self, path: Path) -> tuple[list[str], npt.NDArray[Any]]:
        try:
            with open(path, "rb") as handle:
                file = pq.ParquetFile(handle)
                for name in (self.config.key, self.config.column):
                    if name not in file.schema_arrow.names:
                        raise DataError(f"content: {path}: {unknown_name('column', name, file.schema_arrow.names)}")
                table = file.read(columns=[self.config.key, self.config.column])
            lists = table[self.config.column].combine_chunks()
            if isinstance(lists, pa.ChunkedArray):
                lists = lists.chunk(0)
            sizes = set(lists.value_lengths().to_pylist()) if not pa.types.is_fixed_size_list(lists.type) else {lists.type.list_size}
            if len(lists) == 0 or lists.null_count or len(sizes) != 1:
                raise DataError(f"content: {path}: column {self.config.column!r} must hold lists of one length, without nulls")
            flat = np.asarray(lists.flatten().cast(pa.float32()))
            ids = table[self.config.key].cast(pa.string())
        except (pa.ArrowException, AttributeError) as error:
            raise DataError(f"content: {path} is not a Parquet file of ids and lists of numbers: {error}") from None
        if ids.null_count:
            raise DataError(f"content: {path}: column {self.config.key!r} has {ids.null_count:,} rows without an id")
        return ids.to_pylist(), flat.reshape(len(lists), -1)

    def _numpy(self, path: Path) -> tuple[list[str], npt.NDArray[Any]]:
        if self.config.ids is None:
            raise ConfigError("content: a .npy file of vectors needs `ids`, a text file with one item id per line")
        ids = Path(self.config.ids).read_text(encoding="utf-8").splitlines()
        try:
            matrix = np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise DataError(f"content: {path} is not a numpy matrix: {error}") from None
        if not np.issubdtype(matrix.dtype, np.number) or np.iscomplexobj(matrix):
            raise DataError(f"content: {path} holds {matrix.dtype}, not numbers")
        return ids, matrix
