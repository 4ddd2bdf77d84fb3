"""Feature columns beside the folds: context codes, attributes of users and items, content vectors, and what is taken together.

Everything is read from the request itself (its context, the user's attributes and last events) and from what was fitted before
and lies in the bundle, so it is one function offline and online; only the source of the pair counts differs. Names:
``context.<name>``, ``user.attribute.<name>``, ``user_item.together.<name>``, ``user_item.content.<name>``,
``item.attribute.<name>`` and ``item.content.<name>.<k>``.

Legend: B queries, N candidates, I items, D dimensions. Times are int64 microseconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from maple.data.dataset import Dataset, Float32, Histories, Int32, Int64
from maple.errors import ArtifactError
from maple.features.attributes import NOTHING, Array, Encoding, Field, Kind, passed
from maple.features.content import NO_CONTENT, ItemContent
from maple.features.fold import DAY
from maple.features.spec import FeatureSpec
from maple.features.together import NAMES as TOGETHER
from maple.features.together import LastItems, Lists, Pairs, Source, read

CONTENT_HALF_LIFE = 7.0  # days: how fast an older one of the last items fades beside the latest, for the likeness of content
LAST_ITEMS = 10  # that content is held against where nothing else says how many


@dataclass(frozen=True, eq=False)
class Requests:
    """B requests as the extras see them."""

    now: Int64
    histories: Histories  # events strictly before now, item codes
    contexts: Sequence[Mapping[str, Any]]
    attributes: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class Extras:
    """What the columns beside the folds are made from.

    ``items``: the encoded item attributes, an array [I] per column, of times float64 microseconds. ``together``: pair counts, or the lists
    of one tick; None = not wanted. ``newer`` and ``newer_vectors``: the same of items that came after the I known ones.
    """

    encoding: Encoding = NOTHING
    items: Mapping[str, Array] = field(default_factory=dict)
    content: Mapping[str, ItemContent] = field(default_factory=dict)
    together: Source | None = None
    last: int = LAST_ITEMS
    newer: Mapping[str, Array] = field(default_factory=dict)
    newer_vectors: Mapping[str, Float32] = field(default_factory=dict)

    @staticmethod
    def fit(
        data: Dataset,
        spec: FeatureSpec,
        *,
        until: int | None = None,
        content: Mapping[str, ItemContent] = NO_CONTENT,
        pairs: Source | None = None,
    ) -> Extras:
        """From a data set: vocabularies from its events before ``until``, pairs from all (every moment reads the ticks before it), unless
        ``pairs`` has them already."""
        encoding = Encoding.fit(data if until is None else data.before(until), spec)
        if spec.together is None:
            return Extras(encoding, encode_items(encoding.item, data.item_table), content)
        source = pairs or Pairs.of(data, spec.together)
        return Extras(encoding, encode_items(encoding.item, data.item_table), content, source, spec.together.last)

    def extended(self, items: pa.Table, vectors: Mapping[str, Float32] | None = None) -> Extras:
        """With brand-new items, whose codes follow the known ones: rows of an ITEMS table, and of content vectors where there are any."""
        return replace(self, newer=encode_items(self.encoding.item, items), newer_vectors=dict(vectors or {}))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All columns, in the order of ``columns``."""
        return (
            *(name for each in self.encoding.context for name in each.names("context")),
            *(name for each in self.encoding.user for name in each.names("user.attribute")),
            *(TOGETHER if self.together is not None else ()),
            *(f"user_item.content.{name}" for name in self.content),
            *(name for each in self.encoding.item for name in each.names("item.attribute")),
            *(f"item.content.{name}.{k}" for name, each in self.content.items() for k in range(each.dim)),
        )

    def columns(self, asked: Requests, offsets: Int64, items: Int32) -> dict[str, Array]:
        """The columns of ragged candidates: float32[N] with NaN, or int32[N] codes with -1, where nothing is known."""
        rows = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        of_requests = self._of_requests("context", self.encoding.context, asked.contexts, asked.now)
        of_requests |= self._of_requests("user.attribute", self.encoding.user, asked.attributes, asked.now)
        out: dict[str, Array] = {name: column[rows] for name, column in of_requests.items()}
        vectors = {name: _gathered(each.vectors, self.newer_vectors.get(name), items) for name, each in self.content.items()}
        if self.together is not None or vectors:
            last = LastItems.of(asked.histories, self._num_items, self.last)
            if self.together is not None:
                out |= read(self.together, last, asked.now, offsets, items)
            for name, found in vectors.items():
                out[f"user_item.content.{name}"] = _likeness(self.content[name].vectors, last, found, rows)
        for each in self.encoding.item:
            for name in each.names("item.attribute"):
                column = _gathered(self.items[name], self.newer.get(name), items)
                out[name] = passed(column, asked.now[rows]) if each.kind == Kind.TIME else column
        for name, found in vectors.items():
            out |= {f"item.content.{name}.{k}": column for k, column in enumerate(np.ascontiguousarray(found.T))}
        return out

    @property
    def _num_items(self) -> int:
        """Items that a last item may be; of newer ones nothing is counted."""
        sizes = [len(each.vectors) for each in self.content.values()]
        return min([np.iinfo(np.int32).max, *sizes]) if self.together is None else min([self.together.num_items, *sizes])

    @staticmethod
    def _of_requests(prefix: str, fields: Sequence[Field], said: Sequence[Mapping[str, Any]], now: Int64) -> dict[str, Array]:
        out: dict[str, Array] = {}
        for each in fields:
            encoded = each.encode([values.get(each.name) for values in said])
            if each.kind == Kind.TIME:
                encoded = [passed(encoded[0], now)]
            out |= zip(each.names(prefix), encoded, strict=True)
        return out

    # -- what a bundle keeps -------------------------------------------------------------------------------------------

    def at(self, now: int) -> Extras:
        """As a bundle made at a time keeps them: the lists of the last closed tick in place of all pairs."""
        if self.together is None:
            return self
        return replace(self, together=self.together.at(int(self.together.closed(np.array([now]))[0])))

    def plain(self) -> dict[str, Any]:
        """What is not an array, JSON-ready."""
        content = {name: dict(each.plain) for name, each in self.content.items()}
        return {"encoding": self.encoding.plain(), "content": content, "together": self.together is not None, "last": self.last}

    def tensors(self) -> dict[str, Array]:
        """The arrays but for content, which has a file of its own; ``from_tensors`` is the inverse. Only of what ``at`` gave."""
        out = {f"item/{name}": column for name, column in self.items.items()}
        if self.together is not None:
            assert isinstance(self.together, Lists), "a bundle keeps the lists of one tick"
            out |= {f"together/{name}": array for name, array in self.together.tensors().items()}
        return out

    @staticmethod
    def from_tensors(plain: Mapping[str, Any], arrays: Mapping[str, Array], num_items: int, content: Mapping[str, ItemContent]) -> Extras:
        """The extras again, from ``plain``, ``tensors`` and the content; ``ArtifactError`` if they do not fit each other."""
        encoding = Encoding.of(plain["encoding"])
        items = {name.removeprefix("item/"): array for name, array in arrays.items() if name.startswith("item/")}
        wanted = {name for each in encoding.item for name in each.names("item.attribute")}
        columns = [*items.values(), *(each.vectors for each in content.values())]
        if items.keys() != wanted or any(len(column) != num_items for column in columns):
            raise ArtifactError(f"the item attributes or vectors are not those of {num_items} items; publish the bundle again")
        lists = {name.removeprefix("together/"): array for name, array in arrays.items() if name.startswith("together/")}
        source = Lists.from_tensors(lists, num_items) if plain["together"] else None
        return Extras(encoding, items, content, source, int(plain["last"]))


#: Of a bundle without any.
NO_EXTRAS = Extras()


def encode_items(fields: Sequence[Field], table: pa.Table) -> dict[str, Array]:
    """The attribute columns of a table of items: float32, int32 codes, or of times float64 microseconds; unknown where it lacks one."""
    out: dict[str, Array] = {}
    for each in fields:
        values = table[each.name].to_pylist() if each.name in table.column_names else [None] * table.num_rows
        out |= zip(each.names("item.attribute"), each.encode(values), strict=True)
    return out


def _gathered(known: Array, newer: Array | None, codes: Int32) -> Array:
    """Rows of an array by item code; NaN or -1 for codes beyond it and its newer part. A vector of zeros says nothing either."""
    out = np.full((len(codes), *known.shape[1:]), np.nan if known.dtype.kind == "f" else -1, known.dtype)
    for part, start in ((known, 0), (newer, len(known))):
        if part is not None:
            rows = np.flatnonzero((codes >= start) & (codes < start + len(part)))
            out[rows] = part[codes[rows] - start]
    if out.ndim == 2:
        out[~out.any(axis=1)] = np.nan
    return out


def _likeness(vectors: Float32, last: LastItems, candidates: Float32, rows: Int64) -> Float32:
    """Cosine of each candidate's vector with the mean vector of its user's last items, older ones fading; NaN where either is unknown."""
    profile = np.zeros((len(last.offsets) - 1, vectors.shape[1]), np.float32)
    owner = np.repeat(np.arange(len(profile)), np.diff(last.offsets))
    if len(owner):
        latest = last.times[last.offsets[owner]]
        weight = np.exp2(-(latest - last.times) / (CONTENT_HALF_LIFE * DAY)).astype(np.float32)
        np.add.at(profile, owner, vectors[last.items] * weight[:, None])
    length = np.sqrt((profile * profile).sum(axis=1))
    profile /= np.where(length > 0, length, np.nan)[:, None]
    return np.asarray((candidates * profile[rows]).sum(axis=1), np.float32)
