"""TF-IDF and truncated SVD (latent semantic analysis, Deerwester et al. 1990): item texts as vectors without a pretrained model.

Terms are words or character n-grams; their weights (1 + log tf) * idf, rows of unit length; the vector of a text is its row
on the catalogue's principal axes. Texts of new items are encoded with what the catalogue taught.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from maple.config import Section
from maple.data.dataset import Float32
from maple.errors import ArtifactError, DataError, NotFittedError
from maple.models.base import FitContext, State
from maple.models.content.base import Input, pack, principal_axes, scatter, unpack
from maple.models.content.texts import normal, tokens
from maple.models.families import take_array


class TfidfConfig(Section):
    """What a term is, and how many axes are kept."""

    dim: int = Field(default=64, ge=1, le=1024)
    terms: Literal["words", "characters"] = "words"
    """characters: n-grams within words, for misspelt or inflected texts; larger and slower."""
    shortest: int = Field(default=3, ge=1, le=8)
    """characters: of an n-gram."""
    longest: int = Field(default=5, ge=1, le=8)
    """characters: of an n-gram."""
    max_terms: int = Field(default=50_000, ge=1)
    """The most frequent terms are kept."""


class Tfidf:
    """Weights of terms on principal axes. A text without a known term is missing."""

    Config: ClassVar[type[Section]] = TfidfConfig
    name: ClassVar[str] = "tfidf"
    kind: ClassVar[Literal["text", "image", "id"]] = "text"

    def __init__(self, config: TfidfConfig | None = None) -> None:
        self.config = config or TfidfConfig()
        self._state: State | None = None

    def fit(self, inputs: Sequence[Input], ctx: FitContext) -> None:
        vars(self).pop("_vectorizer", None)
        texts = [text for text in inputs if text]
        counter = self._counter(None)
        try:
            rows = counter.fit_transform(texts)
        except ValueError:  # what the library says to texts without any term
            raise DataError("content: the item texts hold no words to learn from; check `columns`") from None
        axes = principal_axes(rows, self.config.dim, ctx, "content/tfidf")
        terms = pack(counter.get_feature_names_out().tolist())
        self._state = {
            "terms": terms["bytes"], "term_ends": terms["ends"], "idf": counter.idf_.astype(np.float32), "axes": axes
        }  # fmt: skip

    @property
    def dim(self) -> int:
        return len(self.state()["axes"])

    def encode(self, inputs: Sequence[Input]) -> Float32:
        axes = self.state()["axes"]
        places = [place for place, text in enumerate(inputs) if text]
        if not places:
            return np.zeros((len(inputs), len(axes)), np.float32)
        rows = self._vectorizer.transform([inputs[place] for place in places])
        return scatter(places, rows @ axes.T.astype(np.float64), len(inputs), len(axes))

    def state(self) -> State:
        if self._state is None:
            raise NotFittedError("the tfidf encoder has not been fitted; call fit(inputs, ctx) or load it first")
        return dict(self._state)

    @classmethod
    def from_state(cls, config: Section, state: State) -> Self:
        assert isinstance(config, TfidfConfig)
        encoder = cls(config)
        ends = take_array(state, "term_ends", np.int64, (None,))
        take_array(state, "terms", np.uint8, (int(ends[-1]) if len(ends) else 0,))
        take_array(state, "idf", np.float32, (len(ends),))
        take_array(state, "axes", np.float32, (None, len(ends)))
        if len(ends) == 0:
            raise ArtifactError("the tfidf encoder's state holds no terms; build the features again")
        encoder._state = {name: state[name] for name in ("terms", "term_ends", "idf", "axes")}
        return encoder

    @cached_property
    def _vectorizer(self) -> Any:
        state = self.state()
        vectorizer = self._counter({term: place for place, term in enumerate(unpack(state["terms"], state["term_ends"]))})
        vectorizer.idf_ = state["idf"].astype(np.float64)
        return vectorizer

    def _counter(self, vocabulary: dict[str, int] | None) -> Any:
        from sklearn.feature_extraction.text import TfidfVectorizer

        words = self.config.terms == "words"
        return TfidfVectorizer(
            analyzer=tokens if words else "char_wb", preprocessor=None if words else normal, lowercase=False,
            ngram_range=(1, 1) if words else (self.config.shortest, max(self.config.shortest, self.config.longest)),
            max_features=None if vocabulary else self.config.max_terms, vocabulary=vocabulary, sublinear_tf=True,
        )  # fmt: skip
