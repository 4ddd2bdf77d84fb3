"""Item vectors from an item table: what is read, how parts are fused, what is kept, and that neighbours on real titles make sense."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maple.artifacts import tensors_of
from maple.data.dataset import Vocab
from maple.errors import ArtifactError, ConfigError
from maple.features.content import ItemContent
from maple.models.base import FitContext
from maple.models.content.base import pack, principal_axes, unit, unpack
from maple.models.content.items import ContentSettings, ItemEncoder, content_vectors, encoder_of, inputs_of, vectors_of
from maple.models.content.texts import normal, tokens

CTX = FitContext(seed=1)
ITEMS = pa.table(
    {
        "item_id": [f"i{place}" for place in range(8)],
        "title": ["red shirt", "blue shirt", "red sock", "garden spade", "garden rake", "rake handle", None, "  "],
        "tags": pa.array([["wear", "warm"], ["wear"], ["wear"], ["tool"], None, [], ["tool", None], None]),
        "price": [1.0, 2.0, None, 4.0, 5.0, 6.0, 7.0, 8.0],
    }
)


def parse(page: dict[str, object]) -> ContentSettings:
    return ContentSettings.parse(page, "content.test")


def test_inputs_are_the_columns_texts_in_order() -> None:
    assert inputs_of(ITEMS, ["title"]) == ["red shirt", "blue shirt", "red sock", "garden spade", "garden rake", "rake handle", None, None]
    joined = inputs_of(ITEMS, ["title", "tags", "price", "unknown"])
    assert joined[0] == "red shirt wear warm 1.0"
    assert joined[2] == "red sock wear"
    assert joined[6] == "tool 7.0"
    assert inputs_of(ITEMS, ["unknown"]) == [None] * 8


@given(st.text(max_size=40))
@settings(max_examples=60, deadline=None)
def test_tokens_are_normal_and_stable(text: str) -> None:
    found = tokens(text)
    assert tokens(" ".join(found)) == tokens(normal(" ".join(found)))
    assert all(token and not token.isspace() for token in found)
    assert unpack(*pack(found).values()) == found


def test_huge_texts_cost_no_more_than_their_beginning() -> None:
    assert len(tokens("word " * 1_000_000)) == 4_000


def test_axes_have_a_direction_and_stop_at_the_rank() -> None:
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(30, 3)) @ draw.normal(size=(3, 10))
    axes = principal_axes(rows, 8, CTX, "test")
    assert axes.shape == (3, 10)
    np.testing.assert_allclose(axes @ axes.T, np.eye(3), atol=1e-5)
    np.testing.assert_allclose(rows @ axes.T @ axes, rows, atol=1e-4)
    assert np.array_equal(axes, principal_axes(rows, 8, CTX, "test"))
    np.testing.assert_allclose(axes, principal_axes(rows, 8, FitContext(seed=9), "test"), atol=1e-4)  # whatever the seed
    np.testing.assert_allclose(axes, principal_axes(-rows, 8, CTX, "test"), atol=1e-4)


def test_unit_rows() -> None:
    rows = unit(np.array([[3.0, 4.0], [0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0], [1e-12, 0.0]]))
    assert rows.tolist() == [[np.float32(0.6), np.float32(0.8)], [0, 0], [0, 0], [0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("page", "says"),
    [
        ({"encoder": "tfdif"}, "Did you mean 'tfidf'"),
        ({"encoder": "tfidf", "parts": []}, "either `parts`"),
        ({"parts": []}, "at least 1"),
        ({"encoder": "vectors", "columns": ["item_id", "title"], "config": {"path": "x"}}, "one column"),
        ({"encoder": "tfidf", "dims": 3}, "Did you mean 'dim'"),
    ],
)
def test_wrong_settings_are_config_errors(page: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse(page)


def test_wrong_columns_and_encoder_settings_are_config_errors() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'title'"):
        ItemEncoder.fit(ITEMS, parse({"encoder": "tfidf", "columns": ["titel"]}), CTX)
    with pytest.raises(ConfigError, match=r"parts\.0\.config.*Did you mean 'terms'"):
        ItemEncoder.fit(ITEMS, parse({"encoder": "tfidf", "config": {"term": "words"}}), CTX)


def vectors_file(folder: Path, rows: dict[str, list[float]]) -> dict[str, object]:
    path = folder / "vectors.parquet"
    pq.write_table(pa.table({"item_id": list(rows), "vector": list(rows.values())}), path)
    return {"encoder": "vectors", "config": {"path": str(path)}}


def test_fused_vectors_weigh_the_cosines_and_a_missing_part_is_nothing(tmp_path: Path) -> None:
    looks = {"i0": [1.0, 0.0], "i1": [0.0, 1.0], "i2": [0.0, 1.0], "i3": [1.0, 0.0], "i6": [1.0, 0.0]}
    image = vectors_file(tmp_path, looks)
    text = {"encoder": "tfidf", "columns": ["title"], "config": {"dim": 8}}
    wide = ItemEncoder.fit(ITEMS, parse({"parts": [{**text, "weight": 3.0}, image], "dim": 64}), CTX)
    rows = wide.encode(ITEMS)
    texts = ItemEncoder.fit(ITEMS, parse(text), CTX).encode(ITEMS)
    images = ItemEncoder.fit(ITEMS, parse(image), CTX).encode(ITEMS)
    both = [0, 1, 2, 3]
    expected = (3.0 * texts[both] @ texts[both].T + images[both] @ images[both].T) / 4.0
    np.testing.assert_allclose(rows[both] @ rows[both].T, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), [1, 1, 1, 1, 1, 1, 1, 0], atol=1e-5)
    assert rows[6] @ rows[0] == pytest.approx(np.sqrt(1 / 4))  # the same look; nothing is known of its text
    narrow = ItemEncoder.fit(ITEMS, parse({"parts": [{**text, "weight": 3.0}, image], "dim": 3}), CTX)
    reduced = narrow.encode(ITEMS)
    assert reduced.shape == (8, 3)
    assert not reduced[7].any()
    assert reduced[4] @ reduced[3] > reduced[4] @ reduced[0]  # garden tools stay together


def test_fused_encoders_are_the_same_again_from_what_is_kept(tmp_path: Path) -> None:
    page = {"parts": [{"encoder": "tfidf", "columns": ["title"]}, vectors_file(tmp_path, {"i0": [1, 0], "i3": [0, 1]})], "dim": 2}
    content = content_vectors(ITEMS, {"both": parse(page)}, CTX, lambda line: None)["both"]
    (tmp_path / "vectors.parquet").unlink()  # what is kept is enough
    plain = json.loads(json.dumps(dict(content.plain)))
    loaded = ItemContent.from_tensors(plain, tensors_of(content.to_bytes()))
    assert loaded.digest == content.digest
    assert np.array_equal(encoder_of(loaded).encode(ITEMS), content.vectors)
    new = pa.table({"item_id": ["new"], "title": ["garden shovel"]})
    row = encoder_of(loaded).encode(new)[0]
    assert (content.vectors @ row).argmax() in (3, 4)


def test_new_items_have_vectors_where_the_encoder_is_at_hand(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = content_vectors(ITEMS, {"text": parse({"encoder": "tfidf", "columns": ["title"], "dim": 4})}, CTX, lambda line: None)
    gone = ItemContent(
        np.zeros((8, 5), np.float32),
        {"parts": [{"encoder": "sentence", "config": {"model": str(tmp_path / "gone")}}], "dim": 5},
        {"0/fingerprint": np.zeros(32, np.uint8), "0/dim": np.array([5])},
    )
    new = pa.table({"item_id": ["n1", "n2"], "title": ["a red shirt", None]})
    found = vectors_of({**made, "look": gone}, new)
    assert (made["text"].vectors @ found["text"][0]).argmax() == 0
    assert not found["text"][1].any()
    assert found["look"].tolist() == [[0.0] * 5] * 2
    assert "look" in caplog.text
    assert "not a folder of a pretrained model" in caplog.text


def test_the_digest_follows_settings_state_and_vectors() -> None:
    def made(page: dict[str, object], items: pa.Table = ITEMS) -> ItemContent:
        return content_vectors(items, {"x": parse(page)}, CTX, lambda line: None)["x"]

    base = made({"encoder": "tfidf", "columns": ["title"], "dim": 4})
    assert base.digest == made({"parts": [{"columns": ["title"]}], "dim": 4}).digest
    others = [
        made({"encoder": "tfidf", "columns": ["title"], "dim": 3}),
        made({"encoder": "tfidf", "columns": ["title", "price"], "dim": 4}),
        made({"encoder": "tfidf", "columns": ["title"], "dim": 4}, ITEMS.slice(0, 6)),
    ]
    assert len({one.digest for one in (base, *others)}) == 4


def test_what_the_table_lacks_is_left_out_and_told(tmp_path: Path) -> None:
    said: list[str] = []
    empty = ITEMS.set_column(1, "title", pa.nulls(8, pa.string()))
    asked = {
        "nothing": parse({"encoder": "tfidf"}),
        "some": parse({"parts": [{"encoder": "tfidf", "columns": ["title"]}, {"encoder": "tfidf", "columns": ["tags"]}]}),
        "ids": parse(vectors_file(tmp_path, {"i1": [1.0, 2.0]})),
    }
    found = content_vectors(empty, asked, CTX, said.append)
    assert list(found) == ["some", "ids"]
    assert [len(found[name].plain["parts"]) for name in found] == [1, 1]
    assert "no item has title or description or category or brand" in said[0]
    assert "5 of 8 items" in said[2]
    assert "1 of 8 items" in said[3]
    assert "7 have content that says nothing" in said[3]


def test_vectors_are_aligned_with_codes() -> None:
    content = ItemContent(np.eye(3, dtype=np.float32), {"a": 1}, {"s": np.zeros(2)})
    aligned = content.aligned(pa.array(["b", "z", "a"]), Vocab(pa.array(["a", "b", "c"])))
    assert aligned.vectors.tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 0]]
    assert aligned.plain == content.plain
    empty = ItemContent(np.zeros((0, 3), np.float32), {}, {}).aligned(pa.array([], pa.string()), Vocab(pa.array(["a"])))
    assert empty.vectors.tolist() == [[0, 0, 0]]
    with pytest.raises(ArtifactError, match="vectors"):
        ItemContent.from_tensors({}, {"state/x": np.zeros(1)})


def test_neighbours_by_title_on_real_items_are_the_same_kind_of_thing(data_dir: Path) -> None:
    sheet = pq.read_table(data_dir / "online-retail" / "online_retail.parquet")
    name = next(column for column in sheet.column_names if column.lower() == "description")
    titles = [title for title in pc.unique(sheet[name].cast(pa.string())).drop_null().to_pylist() if title.isupper()]
    items = pa.table({"item_id": [str(place) for place in range(len(titles))], "title": titles})
    content = content_vectors(items, {"text": parse({"encoder": "tfidf", "columns": ["title"], "dim": 16})}, CTX, lambda line: None)
    rows = content["text"].vectors
    assert len(rows) > 3_500
    assert rows.any(axis=1).mean() > 0.99
    last = np.array([(tokens(title) or [""])[-1] for title in titles])
    alike = rows @ rows.T
    np.fill_diagonal(alike, -2)
    nearest = np.argpartition(-alike, 5, axis=1)[:, :5]
    agree = (last[nearest] == last[:, None]).mean()
    _, counts = np.unique(last, return_counts=True)
    chance = ((counts / counts.sum()) ** 2).sum()
    assert agree > 15 * chance  # "... MUG" beside "... MUG": 5 neighbours of about 4,000
    assert agree > 0.15
