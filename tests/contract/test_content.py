"""The encoders that learn from the catalogue's own texts, or read vectors from a file, under the one contract."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from encoder_suite import CTX, EncoderSuite

from maple.errors import ConfigError, DataError, MapleError
from maple.models.content.base import Encoder, Input
from maple.models.content.tfidf import Tfidf, TfidfConfig
from maple.models.content.vectors import Vectors, VectorsConfig
from maple.models.content.words import FastText, FastTextConfig, Word2Vec, Word2VecConfig

WARDROBE = ["shirt", "blouse", "jacket", "trousers", "cotton", "linen", "sleeve", "collar", "button", "wool"]
GARDEN = ["spade", "soil", "seed", "shovel", "rake", "hose", "flower", "pot", "tulip", "hedge"]


def planted(count: int = 200) -> list[Input]:
    """Texts of two topics that share no word, and one that is missing."""
    draw = np.random.default_rng(0)
    return [None, *(" ".join(draw.choice(WARDROBE if row % 2 else GARDEN, 5, replace=False)) for row in range(count))]


class TextSuite(EncoderSuite):
    near = ("linen shirt with button", "wool collar blouse")  # not a word in common: only the catalogue says that they are alike
    far = ("linen shirt with button", "tulip pot and soil")
    strange: ClassVar[Sequence[Input]] = (None, "", "  ", "!!! --")

    @pytest.fixture
    def catalogue(self) -> Sequence[Input]:
        return planted()

    def test_every_text_is_nearest_to_its_own_topic(self, fitted: Encoder, catalogue: Sequence[Input]) -> None:
        rows = fitted.encode(catalogue)[1:]
        alike = rows @ rows.T
        np.fill_diagonal(alike, -2)
        topic = np.arange(len(rows)) % 2
        assert (topic[alike.argmax(axis=1)] == topic).mean() > 0.95

    def test_texts_without_a_word_are_a_data_error(self, unfitted: Encoder) -> None:
        for nothing in ([], [None, ""], ["!!", "--"]):
            with pytest.raises(DataError, match="words"):
                unfitted.fit(nothing, CTX)


class TestTfidf(TextSuite):
    vital = "axes"

    @pytest.fixture
    def unfitted(self) -> Encoder:
        return Tfidf(TfidfConfig(dim=6))

    def test_dimensions_stop_at_the_rank(self) -> None:
        encoder = Tfidf(TfidfConfig(dim=50))
        encoder.fit(["red shirt", "blue shirt", "red shirt"], CTX)
        assert encoder.dim == 2

    def test_words_of_any_script(self) -> None:
        texts = ["Größe Käse", "ΣΊΣΥΦΟΣ λόγος", "чай зелёный", "红色棉布衬衫", "สีแดง ผ้า", "شاي أخضر"]
        encoder = Tfidf(TfidfConfig(dim=6))
        encoder.fit(texts, CTX)
        for known, asked in zip(texts, ["GRÖSSE käse", "σίσυφος ΛΌΓΟΣ", "Зелёный ЧАЙ", "棉布", "แดง", "أخضر"], strict=True):
            rows = encoder.encode([known, asked])
            assert rows[0] @ rows[1] > 0.5, asked

    def test_only_the_most_frequent_terms_are_kept(self) -> None:
        encoder = Tfidf(TfidfConfig(dim=4, max_terms=5))
        encoder.fit(planted(), CTX)
        assert len(encoder.state()["idf"]) == 5


class TestTfidfOfCharacters(TestTfidf):
    strange: ClassVar[Sequence[Input]] = (None, "", "qqqq")

    @pytest.fixture
    def unfitted(self) -> Encoder:
        return Tfidf(TfidfConfig(dim=10, terms="characters"))

    def test_texts_without_a_word_are_a_data_error(self, unfitted: Encoder) -> None:
        with pytest.raises(DataError, match="words"):
            unfitted.fit([None, ""], CTX)

    def test_misspelt_words_are_near(self, fitted: Encoder) -> None:
        right, wrong, other = fitted.encode(["trousers jacket", "trouserss jackett", "tulip hedge"])
        assert right @ wrong > 0.8 > right @ other


class TestWord2Vec(TextSuite):
    vital = "vectors"

    @pytest.fixture
    def unfitted(self) -> Encoder:
        return Word2Vec(Word2VecConfig(dim=12))


class TestFastText(TextSuite):
    vital = "ngrams"

    @pytest.fixture
    def unfitted(self) -> Encoder:
        return FastText(FastTextConfig(dim=12, buckets=2000))

    def test_unseen_words_have_vectors(self, fitted: Encoder) -> None:
        unseen, known, other = fitted.encode(["trousersy", "trousers", "flower"])
        assert unseen.any()
        assert unseen @ known > unseen @ other


class TestWord2VecFromAFile(TextSuite):
    vital = "vectors"

    @pytest.fixture
    def unfitted(self, tmp_path: Path) -> Encoder:
        draw = np.random.default_rng(1)
        lines = [
            f"{word} " + " ".join(f"{number:.6f}" for number in topic + 0.3 * draw.normal(size=4))
            for words, topic in ((WARDROBE, [1, 0, 0, 0]), (GARDEN, [0, 1, 0, 0]))
            for word in words
        ]
        (tmp_path / "words.vec").write_text(f"{len(lines)} 4\n" + "\n".join(lines) + "\n")
        return Word2Vec(Word2VecConfig(vectors=str(tmp_path / "words.vec"), keep=3))

    @pytest.mark.parametrize("content", ["", "nonsense", "2 4\nshirt 1 2\n", "1 99999999999\nshirt 1\n", "2 2\nshirt 1 nan\nsoil 1 1\n"])
    def test_files_that_are_none_are_refused(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "bad.vec").write_text(content)
        with pytest.raises(DataError, match=r"bad\.vec"):
            Word2Vec(Word2VecConfig(vectors=str(tmp_path / "bad.vec"))).fit(planted(), CTX)
        with pytest.raises(ConfigError, match="Check the path"):
            Word2Vec(Word2VecConfig(vectors=str(tmp_path / "none.vec"))).fit(planted(), CTX)


IDS = ["a", "b", "c", "d"]
MATRIX = np.array([[3.0, 0.1], [9.0, 0.0], [0.0, 5.0], [0.0, 0.0]], np.float32)


class TestVectorsOfParquet(EncoderSuite):
    near, far, vital = ("a", "b"), ("a", "c"), "vectors"
    strange: ClassVar[Sequence[Input]] = (None, "", "d", "unknown")  # d has a vector without length

    @pytest.fixture
    def catalogue(self) -> Sequence[Input]:
        return IDS

    @pytest.fixture
    def unfitted(self, tmp_path: Path) -> Encoder:
        pq.write_table(pa.table({"item_id": IDS, "vector": MATRIX.tolist()}), tmp_path / "vectors.parquet")
        return Vectors(VectorsConfig(path=str(tmp_path / "vectors.parquet")))

    def test_fixed_size_lists_too(self, tmp_path: Path) -> None:
        fixed = pa.FixedSizeListArray.from_arrays(pa.array(MATRIX.ravel()), 2)
        pq.write_table(pa.table({"id": IDS, "v": fixed}), tmp_path / "fixed.parquet")
        encoder = Vectors(VectorsConfig(path=str(tmp_path / "fixed.parquet"), key="id", column="v"))
        encoder.fit(IDS, CTX)
        assert encoder.encode(["c"]).tolist() == [[0.0, 1.0]]

    @pytest.mark.parametrize(
        ("table", "says"),
        [
            ({"item_id": ["a", "b"], "vector": [[1.0], [1.0, 2.0]]}, "one length"),
            ({"item_id": ["a", "b"], "vector": [[1.0], None]}, "without nulls"),
            ({"item_id": ["a", "a"], "vector": [[1.0], [2.0]]}, "two vectors"),
            ({"item_id": ["a", None], "vector": [[1.0], [2.0]]}, "without an id"),
            ({"item_id": ["a"], "vector": ["text"]}, "lists"),
            ({"item_id": ["a"], "vectr": [[1.0]]}, "Did you mean 'vectr'"),
        ],
    )
    def test_files_that_do_not_fit_are_refused(self, tmp_path: Path, table: dict[str, list[object]], says: str) -> None:
        pq.write_table(pa.table(table), tmp_path / "bad.parquet")
        with pytest.raises(DataError, match=says):
            Vectors(VectorsConfig(path=str(tmp_path / "bad.parquet"))).fit([], CTX)


class TestVectorsOfNumpy(TestVectorsOfParquet):
    @pytest.fixture
    def unfitted(self, tmp_path: Path) -> Encoder:
        np.save(tmp_path / "vectors.npy", MATRIX)
        (tmp_path / "ids.txt").write_text("\n".join(IDS) + "\n")
        return Vectors(VectorsConfig(path=str(tmp_path / "vectors.npy"), ids=str(tmp_path / "ids.txt")))

    def test_pickles_and_wrong_shapes_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "ids.txt").write_text("a\nb\n")
        path = tmp_path / "bad.npy"
        for array in (np.array([{}, {}], object), np.zeros(2), np.zeros((3, 2)), np.array([["a"], ["b"]])):
            np.save(path, array, allow_pickle=True)
            with pytest.raises(DataError, match=r"bad\.npy"):
                Vectors(VectorsConfig(path=str(path), ids=str(tmp_path / "ids.txt"))).fit([], CTX)
        with pytest.raises(ConfigError, match="`ids`"):
            Vectors(VectorsConfig(path=str(path))).fit([], CTX)


@pytest.mark.parametrize(
    ("encoder", "package"), [(Word2Vec(Word2VecConfig()), "gensim"), (FastText(FastTextConfig()), "gensim")], ids=["word2vec", "fasttext"]
)
def test_without_the_extra_the_error_says_how_to_install_it(encoder: Encoder, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MapleError, match=rf"{package}.*pip install 'maple-rec\[content\]'"):
        encoder.fit(planted(), CTX)
