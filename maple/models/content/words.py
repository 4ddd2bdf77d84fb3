"""Word2Vec and FastText: a text as the mean of its words' vectors, trained on the catalogue's own texts or read from a file.

Words are weighted down by how frequent they are and the catalogue's mean is taken off (Arora et al. 2017, SIF, with the mean
for the first axis). FastText (Bojanowski et al. 2017) makes vectors of character n-grams too, so unseen words have one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from maple.config import Section
from maple.data.dataset import Float32
from maple.errors import ConfigError, DataError, NotFittedError
from maple.hashing import torch_seed
from maple.models.base import FitContext, State
from maple.models.content.base import Input, library, pack, scatter, unpack
from maple.models.content.texts import tokens
from maple.models.families import take_array

MAX_FILE_DIM = 4096


class WordsConfig(Section):
    """How word vectors are learned (Mikolov et al. 2013, skip-gram with negative samples), and how words become a text."""

    dim: int = Field(default=64, ge=1, le=1024)
    window: int = Field(default=8, ge=1)
    """Words of a text this near to each other are alike; item texts are short and their order says little."""
    epochs: int | None = Field(default=None, ge=1)
    """None: 5 to 100, so that about a million words are read; a small catalogue must be read often."""
    negative: int = Field(default=5, ge=1)
    min_count: int = Field(default=2, ge=1)
    """Rarer words are not learned."""
    smoothing: float = Field(default=1e-3, gt=0)
    """a of the weight a / (a + share of the word among all words)."""


class Word2VecConfig(WordsConfig):
    """As for words, or vectors from a local file."""

    vectors: str | None = None
    """A file of word vectors in the word2vec format (text; binary where the name ends in .bin) instead of training."""
    keep: int = Field(default=50_000, ge=1)
    """Of a file: its first words (the most frequent, as such files go), beside those that the catalogue has."""


class FastTextConfig(WordsConfig):
    """As for words, and the n-grams."""

    shortest: int = Field(default=3, ge=1, le=8)
    longest: int = Field(default=6, ge=1, le=8)
    buckets: int = Field(default=20_000, ge=1)
    """n-grams share this many vectors by hash."""


class Word2Vec:
    """Mean of word vectors. A text without a known word is missing."""

    Config: ClassVar[type[Section]] = Word2VecConfig
    name: ClassVar[str] = "word2vec"
    kind: ClassVar[Literal["text", "image", "id"]] = "text"
    config: WordsConfig

    def __init__(self, config: WordsConfig | None = None) -> None:
        self.config = config or self.Config()  # type: ignore[assignment]
        self._state: State | None = None

    def fit(self, inputs: Sequence[Input], ctx: FitContext) -> None:
        sentences = [words for words in (tokens(text) for text in inputs if text) if words]
        if not sentences:
            raise DataError("content: the item texts hold no words to learn from; check `columns`")
        counts = Counter(word for words in sentences for word in words)
        known, vectors, more = self._learn(sentences, counts, ctx)
        total = sum(counts.values())
        share = np.array([counts[word] / total for word in known])
        weights = (self.config.smoothing / (self.config.smoothing + share)).astype(np.float32)
        packed = pack(known)
        self._enter({"words": packed["bytes"], "word_ends": packed["ends"], "vectors": vectors, "weights": weights} | more)
        rows = [row for row in self._means(sentences) if row is not None]
        if not rows:
            raise DataError("content: none of the item texts' words has a vector; lower `min_count`, or choose another vectors file")
        self._enter(self.state() | {"common": np.mean(rows, axis=0).astype(np.float32) if len(rows) > 1 else np.zeros_like(vectors[0])})

    @property
    def dim(self) -> int:
        return int(self.state()["vectors"].shape[1])

    def encode(self, inputs: Sequence[Input]) -> Float32:
        common = self.state()["common"]
        rows = self._means([tokens(text) if text else [] for text in inputs])
        places = [place for place, row in enumerate(rows) if row is not None]
        return scatter(places, np.array([rows[place] - common for place in places]), len(inputs), len(common))

    def state(self) -> State:
        if self._state is None:
            raise NotFittedError(f"the {self.name} encoder has not been fitted; call fit(inputs, ctx) or load it first")
        return dict(self._state)

    @classmethod
    def from_state(cls, config: Section, state: State) -> Self:
        encoder = cls(config)  # type: ignore[arg-type]
        ends = take_array(state, "word_ends", np.int64, (None,))
        take_array(state, "words", np.uint8, (int(ends[-1]) if len(ends) else 0,))
        dim = take_array(state, "common", np.float32, (None,)).shape[0]
        take_array(state, "vectors", np.float32, (len(ends), dim))
        take_array(state, "weights", np.float32, (len(ends),))
        encoder._enter(dict(state))
        return encoder

    def _learn(self, sentences: list[list[str]], counts: Counter[str], ctx: FitContext) -> tuple[list[str], Float32, State]:
        """The known words, their vectors, and what else the state holds."""
        assert isinstance(self.config, Word2VecConfig)
        if self.config.vectors is not None:
            return *self._from_file(Path(self.config.vectors), counts), {}
        library("gensim", self.name)
        from gensim.models import Word2Vec as Trained

        trained = Trained(sg=1, **self._terms(sentences, ctx))
        return list(trained.wv.index_to_key), np.ascontiguousarray(trained.wv.vectors, np.float32), {}

    def _terms(self, sentences: list[list[str]], ctx: FitContext) -> dict[str, Any]:
        """What both libraries' models take; one worker, because only then the same seed gives the same vectors."""
        c = self.config
        epochs = c.epochs or min(max(round(1e6 / sum(map(len, sentences))), 5), 100)
        if max(Counter(word for words in sentences for word in words).values()) < c.min_count:
            raise DataError(f"content: no word of the item texts comes {c.min_count} times; lower `min_count`")
        return {
            "sentences": sentences, "vector_size": c.dim, "window": c.window, "epochs": epochs, "negative": c.negative,
            "min_count": c.min_count, "workers": 1, "seed": torch_seed(ctx.seed, f"content/{self.name}") % 2**31,
        }  # fmt: skip

    def _from_file(self, path: Path, counts: Counter[str]) -> tuple[list[str], Float32]:
        assert isinstance(self.config, Word2VecConfig)
        library("gensim", self.name)
        from gensim.models import KeyedVectors

        try:
            with open(path, "rb") as handle:
                dim = int(handle.readline(200).split()[1])
            if not 1 <= dim <= MAX_FILE_DIM:
                raise ValueError(f"its vectors have {dim} dimensions, of at most {MAX_FILE_DIM}")
            found = KeyedVectors.load_word2vec_format(str(path), binary=path.suffix == ".bin", unicode_errors="replace")
        except OSError as error:
            raise ConfigError(f"content: cannot read the vectors file {path}: {error.strerror or error}. Check the path.") from None
        except (ValueError, IndexError, EOFError, MemoryError, OverflowError) as error:
            raise DataError(f"content: {path} is not a file of word vectors in the word2vec format: {error}") from None
        places = [place for place, word in enumerate(found.index_to_key) if place < self.config.keep or word in counts]
        vectors = np.ascontiguousarray(found.vectors[places], np.float32)
        if not np.isfinite(vectors).all():
            raise DataError(f"content: {path} holds vectors that are not finite")
        return [found.index_to_key[place] for place in places], vectors

    def _enter(self, state: State) -> None:
        self._state = state
        vars(self).pop("_places", None)

    @cached_property
    def _places(self) -> dict[str, int]:
        state = self.state()
        return {word: place for place, word in enumerate(unpack(state["words"], state["word_ends"]))}

    def _means(self, sentences: Sequence[list[str]]) -> list[Float32 | None]:
        """The weighted mean of each text's known words, None where there is none."""
        state, places = self.state(), self._places
        rarest = state["weights"].max()  # an unseen word is at least as rare
        out: list[Float32 | None] = []
        for words in sentences:
            known = [places[word] for word in words if word in places]
            unseen = [vector for word in words if word not in places and (vector := self._unseen(word)) is not None]
            total: Any = (state["weights"][known, None] * state["vectors"][known]).sum(axis=0) + rarest * sum(unseen)
            out.append(total / (len(known) + len(unseen)) if known or unseen else None)
        return out

    def _unseen(self, word: str) -> Float32 | None:
        """The vector of a word that was not learned; Word2Vec knows none."""
        return None


class FastText(Word2Vec):
    """Mean of word vectors, those of unseen words made of their n-grams."""

    Config: ClassVar[type[Section]] = FastTextConfig
    name: ClassVar[str] = "fasttext"

    def _learn(self, sentences: list[list[str]], counts: Counter[str], ctx: FitContext) -> tuple[list[str], Float32, State]:
        assert isinstance(self.config, FastTextConfig)
        library("gensim", self.name)
        from gensim.models import FastText as Trained

        c = self.config
        trained = Trained(
            sg=1, min_n=c.shortest, max_n=max(c.shortest, c.longest), bucket=c.buckets, **self._terms(sentences, ctx)
        )  # fmt: skip
        met = np.unique(np.concatenate(trained.wv.buckets_word))  # the others are as they were drawn: noise
        grams = np.zeros_like(trained.wv.vectors_ngrams, np.float32)
        grams[met] = trained.wv.vectors_ngrams[met]
        return list(trained.wv.index_to_key), np.ascontiguousarray(trained.wv.vectors, np.float32), {"ngrams": grams}

    @classmethod
    def from_state(cls, config: Section, state: State) -> Self:
        assert isinstance(config, FastTextConfig)
        take_array(state, "ngrams", np.float32, (config.buckets, None))
        return super().from_state(config, state)

    def _unseen(self, word: str) -> Float32 | None:
        assert isinstance(self.config, FastTextConfig)
        library("gensim", self.name)
        from gensim.models.fasttext import ft_ngram_hashes

        found = ft_ngram_hashes(word, self.config.shortest, max(self.config.shortest, self.config.longest), self.config.buckets)
        rows = self.state()["ngrams"][np.asarray(found, np.int64)]
        rows = rows[rows.any(axis=1)]
        return None if len(rows) == 0 else np.asarray(rows.mean(axis=0), np.float32)
