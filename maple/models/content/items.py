"""Item vectors from an item table: which encoders read which columns, their fusion into one vector, and the settings for it.

Fusion: each encoder gives a unit vector; these are put side by side, scaled by the square roots of their weights (so that
the weights are those of the cosines), and where that is wider than asked for, projected on the catalogue's principal axes.
A missing part is zeros: an item with a text and no image is placed by its text.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from maple.config import Section
from maple.data.dataset import Float32
from maple.errors import ArtifactError, ConfigError, MapleError, unknown_name
from maple.features.content import ItemContent
from maple.models.base import FitContext, State
from maple.models.content.base import Encoder, Input, principal_axes, unit

#: Encoders by name, as "module:class"; resolved on use, so that nobody needs a library that is not asked for.
ENCODERS: dict[str, str] = {
    "tfidf": "maple.models.content.tfidf:Tfidf",
    "word2vec": "maple.models.content.words:Word2Vec",
    "fasttext": "maple.models.content.words:FastText",
    "sentence": "maple.models.content.sentence:Sentence",
    "clip-text": "maple.models.content.clip:ClipText",
    "clip-image": "maple.models.content.clip:ClipImage",
    "vectors": "maple.models.content.vectors:Vectors",
}
COLUMNS: Mapping[str, tuple[str, ...]] = {"text": ("title", "description", "category", "brand"), "image": ("image",), "id": ("item_id",)}

Say = Callable[[str], None]


class PartSettings(Section):
    """One encoder and what it reads."""

    encoder: str = "tfidf"
    """tfidf, word2vec, fasttext, sentence, clip-text (texts); clip-image (addresses of images); vectors (a file)."""
    columns: tuple[str, ...] = ()
    """Columns of the item table; by default title, description, category and brand, or ``image``, or the item id."""
    weight: float = Field(default=1.0, gt=0)
    """Of its cosine in the fused vector."""
    config: dict[str, Any] = Field(default_factory=dict)
    """The encoder's own settings."""

    @model_validator(mode="after")
    def _check(self) -> PartSettings:
        if self.encoder not in ENCODERS:
            raise ValueError(unknown_name("content encoder", self.encoder, ENCODERS))
        kind = encoder_class(self.encoder).kind
        if kind != "text" and len(self.columns) > 1:
            raise ValueError(f"the encoder {self.encoder!r} reads one column, not {len(self.columns)}")
        return self


class ContentSettings(Section):
    """One content feature: ``{encoder: ..., columns: ..., dim: 16}``, or several encoders under ``parts`` whose vectors are fused."""

    parts: tuple[PartSettings, ...] = Field(default_factory=lambda: (PartSettings(),), min_length=1)
    dim: int = Field(default=16, ge=1, le=1024)
    """Columns of the feature, at most; wider vectors are projected on their principal axes."""

    @model_validator(mode="before")
    @classmethod
    def _single(cls, values: Any) -> Any:
        """A page that names one encoder is a page of one part."""
        own = {"encoder", "columns", "weight", "config"}
        if isinstance(values, Mapping) and own & values.keys():
            if "parts" in values:
                raise ValueError(f"give either `parts`, or {', '.join(sorted(own & values.keys()))} of a single encoder")
            rest = {name: value for name, value in values.items() if name not in own}
            return {**rest, "parts": [{name: value for name, value in values.items() if name in own}]}
        return values


def encoder_class(name: str) -> type[Encoder]:
    """The encoder of a known name."""
    module, _, kind = ENCODERS[name].partition(":")
    found: type[Encoder] = getattr(import_module(module), kind)
    return found


def inputs_of(items: pa.Table, columns: Sequence[str]) -> list[Input]:
    """What an encoder reads of each row: the texts of the columns joined by spaces, None where all are missing or blank.

    Lists are joined, numbers written out; a column that the table lacks is missing.
    """
    parts: list[list[Any]] = [items[name].to_pylist() for name in columns if name in items.column_names]
    rows = zip(*parts, strict=True) if parts else [()] * items.num_rows
    return [" ".join(words) if (words := [text for cell in row if (text := _text(cell))]) else None for row in rows]


def _text(cell: Any) -> str:
    if isinstance(cell, list | tuple):
        return " ".join(filter(None, (_text(one) for one in cell)))
    return "" if cell is None else str(cell).strip()


@dataclass(frozen=True, eq=False)
class ItemEncoder:
    """Fitted encoders with the columns they read, and the axes their vectors are projected on (None = side by side as they are)."""

    settings: ContentSettings
    encoders: tuple[Encoder, ...]
    axes: Float32 | None = None

    @staticmethod
    def fit(items: pa.Table, settings: ContentSettings, ctx: FitContext) -> ItemEncoder:
        """Fitted on an item table; ``DataError`` where a part finds nothing in it, ``ConfigError`` for unknown columns."""
        encoders = []
        for place, part in enumerate(settings.parts):
            kind = encoder_class(part.encoder)
            for name in part.columns:
                if name not in items.column_names:
                    raise ConfigError("content: " + unknown_name("item column", name, items.column_names))
            given = {"dim": settings.dim} if "dim" in kind.Config.model_fields and "dim" not in part.config else {}
            encoder = kind(kind.Config.parse(given | part.config, f"content: parts.{place}.config"))  # type: ignore[call-arg]
            encoder.fit(inputs_of(items, _columns(part)), ctx)
            encoders.append(encoder)
        whole = ItemEncoder(settings, tuple(encoders))
        if sum(encoder.dim for encoder in encoders) <= settings.dim:
            return whole
        return ItemEncoder(settings, tuple(encoders), principal_axes(whole.encode(items), settings.dim, ctx, "content/fusion"))

    def encode(self, items: pa.Table) -> Float32:
        """float32[N, D] of a table's rows, known or new; zeros where no part knows anything."""
        parts = [
            np.sqrt(part.weight) * encoder.encode(inputs_of(items, _columns(part)))
            for part, encoder in zip(self.settings.parts, self.encoders, strict=True)
        ]
        if len(parts) == 1 and self.axes is None:
            return unit(parts[0])
        rows = np.concatenate(parts, axis=1)
        return unit(rows if self.axes is None else rows @ self.axes.T)

    def state(self) -> State:
        """The arrays of all parts, named ``<place>/<array>``, and the axes."""
        arrays = {f"{place}/{name}": array for place, encoder in enumerate(self.encoders) for name, array in encoder.state().items()}
        return arrays if self.axes is None else arrays | {"axes": self.axes}

    def plain(self) -> dict[str, Any]:
        """The settings, every encoder's own in full: what ``from_state`` takes."""
        parts = [
            {**part.plain(), "config": encoder.config.plain()}
            for part, encoder in zip(self.settings.parts, self.encoders, strict=True)
        ]  # fmt: skip
        return {**self.settings.plain(), "parts": parts}

    @staticmethod
    def from_state(plain: Mapping[str, Any], state: State) -> ItemEncoder:
        """The encoder again, from what ``plain`` and ``state`` gave."""
        settings = ContentSettings.parse(plain, "content settings of the artifact")
        encoders = []
        for place, part in enumerate(settings.parts):
            kind, prefix = encoder_class(part.encoder), f"{place}/"
            config = kind.Config.parse(part.config, f"content settings of the artifact: parts.{place}.config")
            own = {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}
            encoders.append(kind.from_state(config, own))
        axes, width = state.get("axes"), sum(encoder.dim for encoder in encoders)
        if axes is not None and (axes.ndim != 2 or axes.shape[1] != width or axes.dtype != np.float32):
            raise ArtifactError(f"the content encoder's axes are {axes.dtype} of shape {axes.shape}, for vectors of {width} dimensions")
        return ItemEncoder(settings, tuple(encoders), axes)


def _columns(part: PartSettings) -> tuple[str, ...]:
    return part.columns or COLUMNS[encoder_class(part.encoder).kind]


def content_vectors(items: pa.Table, settings: Mapping[str, ContentSettings], ctx: FitContext, say: Say = print) -> dict[str, ItemContent]:
    """The content features of a catalogue by name, rows in the order of ``items``. Only the item table is read.

    A part for which the whole table holds nothing is left out, and so is a feature without parts; ``say`` tells, and how many
    items have a vector, and how many have content without one (no known word, a bad image).
    """
    out: dict[str, ItemContent] = {}
    for name, asked in settings.items():
        present, given = [], np.zeros(items.num_rows, bool)
        for part in asked.parts:
            has = np.array([text is not None for text in inputs_of(items, _columns(part))], bool)
            given |= has
            if has.any():
                present.append(part)
            else:
                say(f"content {name!r}: no item has {' or '.join(_columns(part))}; {part.encoder} left out")
        if not present:
            continue
        encoder = ItemEncoder.fit(items, asked.model_copy(update={"parts": tuple(present)}), ctx)
        vectors = encoder.encode(items)
        known = (vectors != 0).any(axis=1)
        silent = f"; {int((given & ~known).sum()):,} have content that says nothing" if (given & ~known).any() else ""
        say(f"content {name!r}: {int(known.sum()):,} of {len(vectors):,} items have a vector of {vectors.shape[1]} dimensions{silent}")
        out[name] = ItemContent(vectors, encoder.plain(), encoder.state())
    return out


@lru_cache(maxsize=8)
def encoder_of(content: ItemContent) -> ItemEncoder:
    """The encoder that made a content feature, for items that came later. Those of the last few features are kept."""
    return ItemEncoder.from_state(content.plain, dict(content.state))


def vectors_of(contents: Mapping[str, ItemContent], items: pa.Table) -> dict[str, Float32]:
    """The vectors of new items by feature, float32[N, D]; zeros, and a warning, where an encoder is not at hand on this machine.

    A pretrained encoder lies in a folder outside the bundle, and serving goes on without it.
    """
    out: dict[str, Float32] = {}
    for name, content in contents.items():
        try:
            out[name] = encoder_of(content).encode(items)
        except MapleError as error:
            logging.getLogger(__name__).warning("content %r of %d new items stays unknown: %s", name, items.num_rows, error)
            out[name] = np.zeros((items.num_rows, content.dim), np.float32)
    return out
