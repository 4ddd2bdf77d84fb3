"""The harness: who is asked and what is relevant, what is measured, that it survives a round trip, and the Online Retail protocol."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maple.artifacts import load_tensors, tensor_bytes
from maple.data.dataset import Dataset
from maple.errors import ArtifactError, DataError
from maple.evaluate.harness import Evaluation, evaluate
from maple.evaluate.relevant import CatalogueStats, Relevant, Segmentation, relevant_of, user_segments
from maple.schema import EVENTS, conform

Row = tuple[str, str, str, int]  # user, item, event, time


def dataset(rows: list[Row], items: pa.Table | None = None) -> Dataset:
    user, item, event, time = (list(column) for column in zip(*rows, strict=True))
    table = pa.table(
        {
            "event_id": [f"e{number:06d}" for number in range(len(rows))], "user_id": user, "item_id": item, "event": event,
            "timestamp": pa.array(time, pa.int64()).cast(pa.timestamp("us", tz="UTC")),
        }
    )  # fmt: skip
    return Dataset.from_tables(conform(table, EVENTS, "events"), items)


SHOP: list[Row] = [
    ("ann", "a", "purchase", 1), ("ann", "b", "view", 2), ("bob", "b", "purchase", 3), ("cid", "c", "return", 4), ("dan", "c", "view", 5),
    ("ann", "a", "purchase", 10), ("ann", "b", "purchase", 11), ("ann", "b", "purchase", 12), ("ann", "new", "purchase", 13),
    ("bob", "b", "purchase", 10), ("bob", "a", "view", 11), ("cid", "a", "purchase", 12),
    ("eve", "a", "purchase", 15), ("bob", "a", "purchase", 20),
]  # fmt: skip


def by_name(data: Dataset, relevant: Relevant) -> dict[str, list[str]]:
    spans = zip(relevant.offsets[:-1], relevant.offsets[1:], strict=True)
    names = data.users.decode(relevant.users)
    return {name: data.items.decode(relevant.items[a:b]) for name, (a, b) in zip(names, spans, strict=True)}


def test_relevant_items_are_distinct_targets_in_the_window_of_known_users_and_items() -> None:
    data = dataset(SHOP)
    found = relevant_of(data, 10, 20, new_only=False, known_before=10)
    assert by_name(data, found) == {"ann": ["a", "b"], "bob": ["b"]}
    assert found.counts == {
        "pairs_in_window": 6, "pairs": 3, "pairs_unknown_user": 2, "pairs_unknown_item": 1, "pairs_bought_before": 0,
        "users_in_window": 4, "users": 2, "users_unknown": 2, "users_left_empty": 0, "cold_items": 1,
    }  # fmt: skip


def test_new_only_leaves_out_what_was_bought_and_says_how_many() -> None:
    data = dataset(SHOP)
    found = relevant_of(data, 10, 20, new_only=True, known_before=10)
    assert by_name(data, found) == {"ann": ["b"]}  # a view of b before is no purchase
    assert found.counts["pairs_bought_before"] == 2
    assert found.counts["users_left_empty"] == 1


def test_cold_users_are_kept_on_request_and_known_before_may_be_earlier() -> None:
    data = dataset(SHOP)
    assert set(by_name(data, relevant_of(data, 10, 20, new_only=False, known_before=10, cold_users=True))) == {"ann", "bob", "cid", "eve"}
    assert by_name(data, relevant_of(data, 10, 20, new_only=False, known_before=3)) == {"ann": ["a", "b"]}


@pytest.mark.parametrize(
    ("start", "end", "before", "says"),
    [(10, 10, 10, "empty"), (10, 20, 11, "leak"), (16, 19, 10, "no test user is left"), (10, 20, 0, "no test user")],
)
def test_windows_that_cannot_be_right_are_refused(start: int, end: int, before: int, says: str) -> None:
    with pytest.raises(DataError, match=says):
        relevant_of(dataset(SHOP), start, end, new_only=False, known_before=before)


events = st.tuples(
    st.sampled_from("uvwxyz"), st.sampled_from("abcdef"), st.sampled_from(["purchase", "view", "return"]), st.integers(0, 40)
)


@given(st.lists(events, min_size=1, max_size=40), st.booleans(), st.booleans(), st.integers(0, 20))
@settings(max_examples=150, deadline=None)
def test_nothing_is_lost_and_a_slow_reference_agrees(rows: list[Row], new_only: bool, cold_users: bool, before: int) -> None:
    wanted: dict[str, set[str]] = {}
    users = {user for user, _, event, time in rows if event != "return" and time < before}
    items = {item for _, item, event, time in rows if event != "return" and time < before}
    bought = {(user, item) for user, item, event, time in rows if event == "purchase" and time < 20}
    for user, item, event, time in rows:
        asked = event == "purchase" and 20 <= time < 35 and (user in users or cold_users) and item in items
        if asked and not (new_only and (user, item) in bought):
            wanted.setdefault(user, set()).add(item)
    data = dataset(rows)
    if not wanted:
        with pytest.raises(DataError, match="no test user"):
            relevant_of(data, 20, 35, new_only=new_only, known_before=before, cold_users=cold_users)
        return
    found = relevant_of(data, 20, 35, new_only=new_only, known_before=before, cold_users=cold_users)
    assert {user: set(items) for user, items in by_name(data, found).items()} == wanted
    counts = found.counts
    assert counts["pairs_in_window"] == sum(counts[f"pairs{part}"] for part in ("", "_unknown_user", "_unknown_item", "_bought_before"))
    assert counts["users_in_window"] == counts["users"] + counts["users_unknown"] + counts["users_left_empty"]
    assert len(found) == counts["users"]
    assert len(found.items) == counts["pairs"]


def test_catalogue_counts_buyers_before_the_cut_and_reads_categories() -> None:
    table = pa.table({"item_id": ["a", "b", "unsold"], "category": ["x", None, "y"]})
    stats = CatalogueStats.of(dataset(SHOP, table), 12)
    assert stats.users_per_item.tolist() == [1, 2, 0, 0, 0]  # a, b, c, new, unsold
    assert stats.num_users == 2
    assert stats.categories is not None
    assert stats.categories.tolist() == [0, -1, -1, -1, 1]


def test_user_segments_split_by_activity_and_history() -> None:
    rows: list[Row] = [(f"u{user}", f"i{place}", "purchase", place) for user in range(6) for place in range(user + 1)]
    data = dataset([*rows, ("u0", "i0", "return", 1)])
    found = user_segments(data, np.arange(6, dtype=np.int32), 100)
    assert [found["activity"].labels[code] for code in found["activity"].codes] == ["light", "light", "medium", "medium", "heavy", "heavy"]
    assert [found["history"].labels[code] for code in found["history"].codes] == ["cold", "cold", "warm", "warm", "warm", "warm"]


# -- evaluate ----------------------------------------------------------------------------------------------------------

RELEVANT = Relevant(
    np.arange(4, dtype=np.int32), np.array([0, 1, 4, 12, 13]),
    np.array([12, 20, 24, 45, 30, 31, 33, 46, 47, 48, 49, 5, 1], dtype=np.int32),
)  # fmt: skip
GOLDEN = np.array([[10, 11, 12, 13, 14], [20, 21, 22, 23, 24], [30, 31, 32, 33, 34], [40, 41, 42, 43, 44]], dtype=np.int32)


def golden(relevant: Relevant | None = None, **changes: object) -> Evaluation:
    stats = CatalogueStats(np.arange(50)[::-1].copy(), 64, categories=(np.arange(50) // 2).astype(np.int32))
    options: dict[str, object] = {"catalogue": stats, "ks": (3, 5), "seed": 3, "bootstrap": 200, "batch": 3} | changes
    return evaluate(lambda rows: GOLDEN[rows], RELEVANT if relevant is None else relevant, **options)  # type: ignore[arg-type]


def test_the_golden_example_through_the_harness() -> None:
    calls: list[tuple[int, int]] = []
    found = golden(progress=lambda done, users: calls.append((done, users)), notes={"model": "golden"})
    assert found.means["recall@5"] == pytest.approx(0.510417, abs=1e-6)
    assert found.means["ndcg@5"] == pytest.approx(0.462509, abs=1e-6)
    assert found.means["coverage@5"] == 20 / 50
    assert found.means["coverage@3"] == 12 / 50
    assert found.means["gini@5"] == pytest.approx(0.6)  # 20 of 50 items, equally often
    assert found.per_user["diversity@3"].tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2 / 3])  # 10, 11 | 12: one pair of three agrees
    assert found.per_user["popularity_rank@3"].tolist() == [12.0, 22.0, 32.0, 42.0]
    assert found.per_user["fill@5"].tolist() == [1.0] * 4
    assert calls == [(3, 4), (4, 4)]
    protocol = found.protocol
    assert (protocol.users, protocol.pairs, protocol.masked, protocol.diversity) == (4, 13, False, "category")
    assert protocol.notes == {"model": "golden"}
    for name, (low, high) in found.intervals.items():
        assert low <= found.means[name] <= high, name
    assert found.intervals["recall@5"][0] < found.means["recall@5"] < found.intervals["recall@5"][1]
    assert found.exposure(3).sum() == 12


def test_segments_have_their_own_means_and_order() -> None:
    split = {"size": Segmentation(("small", "large", "none"), np.array([0, 1, 1, 0], np.int32)), "letter": ["b", "a", "a", "a"]}
    found = golden(segments=split)
    assert [(part.name, part.label, part.users) for part in found.segments] == [
        ("size", "small", 2), ("size", "large", 2), ("letter", "a", 3), ("letter", "b", 1),
    ]  # fmt: skip
    assert found.segments[0].means["hit@5"] == 0.5
    assert found.segments[1].means["recall@5"] == pytest.approx((2 / 3 + 3 / 8) / 2)
    assert found.segments[3].intervals["hit@5"] == (1.0, 1.0)
    with pytest.raises(DataError, match="'size' labels 2 users, there are 4"):
        golden(segments={"size": ["a", "b"]})


def test_the_seed_decides_the_intervals_and_nothing_else() -> None:
    first, again, other = golden(), golden(batch=1), golden(seed=4)
    assert first.to_json() == again.to_json()
    assert first.means == other.means
    assert first.intervals != other.intervals


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda rows: GOLDEN[rows][:, :4], r"rows 0\.\.2: got an array of shape \(3, 4\)"),
        (lambda rows: GOLDEN[:1], r"rows 0\.\.2: got an array of shape \(1, 5\)"),
        (lambda rows: GOLDEN[rows] * 0, r"rows 0\.\.2: list 0 holds item 0 more than once"),
        (lambda rows: GOLDEN[rows] + 10, r"row.* 3\.\.3: list 0 holds item code 54, but the catalogue has only 50"),
        (lambda rows: GOLDEN[rows].astype(float), r"must be integers"),
    ],
)
def test_a_recommender_that_answers_wrongly_is_told(answer: object, says: str) -> None:
    stats = CatalogueStats(np.zeros(50, np.int64), 1)
    with pytest.raises(DataError, match=says):
        evaluate(answer, RELEVANT, catalogue=stats, ks=(5,), batch=3)  # type: ignore[arg-type]


def test_round_trip_through_json_and_safetensors(tmp_path: Path) -> None:
    found = golden(segments={"letter": ["b", "a", "a", "a"]})
    (tmp_path / "e.safetensors").write_bytes(tensor_bytes(found.tensors()))
    again = Evaluation.from_json(found.to_json(), load_tensors(tmp_path / "e.safetensors"))
    assert again.to_json() == found.to_json()
    assert (again.protocol, again.segments) == (found.protocol, found.segments)
    assert again.per_user.keys() == found.per_user.keys()
    for name, values in found.per_user.items():
        np.testing.assert_array_equal(again.per_user[name], values)
    np.testing.assert_array_equal(again.lists, GOLDEN)


@pytest.mark.parametrize("break_it", ["torn", "format", "field", "short", "list"])
def test_a_broken_record_is_an_artifact_error(break_it: str) -> None:
    found = golden()
    text, tensors = found.to_json(), found.tensors()
    plain = json.loads(text)
    if break_it == "torn":
        text = text[:-20]
    elif break_it == "format":
        text = json.dumps(plain | {"format": 99})
    elif break_it == "field":
        text = json.dumps(plain | {"protocol": plain["protocol"] | {"surprise": 1}})
    elif break_it == "short":
        tensors["users"] = tensors["users"][:2]
    else:
        text = "[]"
    with pytest.raises(ArtifactError):
        Evaluation.from_json(text, tensors)


def test_an_empty_question_is_refused() -> None:
    with pytest.raises(DataError, match="no test user"):
        golden(RELEVANT.take(np.empty(0, np.int64)))


# -- Online Retail, by the published protocol --------------------------------------------------------------------------

CUT = int(pd.Timestamp("2011-10-10").value // 1000)
MONTH = 30 * 86_400_000_000


@pytest.fixture(scope="module")
def retail(data_dir: Path) -> pd.DataFrame:
    """Customer, positive price, product code; cancellations are negative quantities."""
    rows = pd.read_parquet(data_dir / "online-retail" / "online_retail.parquet")
    rows = rows[rows.CustomerID.notna() & (rows.UnitPrice > 0) & rows.StockCode.str.match(r"^\d{5}")]
    return rows.assign(user=rows.CustomerID.astype(int).astype(str), time=rows.InvoiceDate.astype("datetime64[us]").astype("int64"))


def retail_dataset(rows: pd.DataFrame) -> Dataset:
    event = np.where(rows.Quantity > 0, "purchase", "return")
    return dataset(list(zip(rows.user, rows.StockCode, event, rows.time, strict=True)))


@pytest.fixture(scope="module")
def shop(retail: pd.DataFrame) -> Dataset:
    return retail_dataset(retail)


def test_online_retail_has_1790_test_users_with_or_without_its_returns(retail: pd.DataFrame, shop: Dataset) -> None:
    end = shop.span[1] + 1
    sold = retail_dataset(retail[retail.Quantity > 0])
    for data in (sold, shop):
        found = relevant_of(data, CUT, end, new_only=False, known_before=CUT)
        assert len(found) == 1790
        assert relevant_of(data, CUT, end, new_only=True, known_before=CUT).counts["pairs"] < found.counts["pairs"]


def test_online_retail_published_baselines(retail: pd.DataFrame, shop: Dataset) -> None:
    """30-day popularity .069 / .125 / .694 and the user's own frequency .232 / .350 / .902: recall, NDCG, hit rate at 20."""
    relevant = relevant_of(shop, CUT, shop.span[1] + 1, new_only=False, known_before=CUT)
    train = retail[(retail.time < CUT) & (retail.Quantity > 0)]
    recent = train[train.time >= CUT - MONTH].drop_duplicates(["InvoiceNo", "StockCode"])
    popular = np.bincount(shop.items.encode(recent.StockCode.tolist()), minlength=len(shop.items))
    own = train.drop_duplicates(["InvoiceNo", "StockCode"])
    counts = np.zeros((len(shop.users), len(shop.items)), np.float32)
    np.add.at(counts, (shop.users.encode(own.user.tolist()), shop.items.encode(own.StockCode.tolist())), 1.0)
    tie = popular / (popular.max() + 1.0)
    stats = CatalogueStats.of(shop, CUT)

    def by_popularity(rows: np.ndarray) -> np.ndarray:
        return np.tile(np.argsort(-popular, kind="stable")[:20].astype(np.int32), (len(rows), 1))

    def by_frequency(rows: np.ndarray) -> np.ndarray:
        return np.argsort(-(counts[relevant.users[rows]] + tie), axis=1, kind="stable")[:, :20].astype(np.int32)

    segments = user_segments(shop, relevant.users, CUT)
    popularity = evaluate(by_popularity, relevant, catalogue=stats, ks=(20,), segments=segments, bootstrap=100)
    frequency = evaluate(by_frequency, relevant, catalogue=stats, ks=(20,), segments=segments, bootstrap=100)
    assert [popularity.means[f"{name}@20"] for name in ("recall", "ndcg", "hit")] == pytest.approx([0.069, 0.125, 0.694], abs=0.004)
    assert [frequency.means[f"{name}@20"] for name in ("recall", "ndcg", "hit")] == pytest.approx([0.232, 0.350, 0.902], abs=0.001)
    assert frequency.means["coverage@20"] > 10 * popularity.means["coverage@20"]
    heavy = {part.label: part.means["hit@20"] for part in frequency.segments}
    assert heavy["heavy"] > heavy["light"]
