"""Models measured under any split: a planted truth, strata of items, the kept boundaries, and figures on ML-100K."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pytest

from maple.artifacts import tensor_bytes, tensors_of
from maple.data.dataset import Dataset
from maple.data.folds import KFold, LeaveOneOut, SessionSplit, Split, UserSplit, folds_of
from maple.data.splits import TimeSplit
from maple.errors import DataError
from maple.evaluate.compare import compare
from maple.evaluate.harness import CatalogueStats, Evaluation, Segmentation, evaluate, item_strata, relevant_of
from maple.evaluate.splitting import SplitWarning, evaluate_split, relevant_to
from maple.models.knn import ItemKnn, ItemKnnConfig
from maple.models.popularity import Popularity, PopularityConfig
from maple.schema import TIMESTAMP

DAY = 86_400_000_000


def dataset(user: Sequence[str], item: Sequence[str], time: Sequence[int], event: str = "purchase") -> Dataset:
    count = len(user)
    events = {
        "event_id": [f"{place:07d}" for place in range(count)], "user_id": list(user), "item_id": list(item), "event": [event] * count,
        "timestamp": pa.array(np.asarray(time)).cast(TIMESTAMP),
        "value": pa.nulls(count, pa.float32()), "price": pa.nulls(count, pa.float32()),
    }  # fmt: skip
    return Dataset.from_tables(pa.table(events), targets=[event])


def circles(users: int = 30, things: int = 6, *, apart: bool = False) -> Dataset:
    """Two circles of users; each takes everything of their circle, a thing each 40 days, or (``apart``) all of it before the next comes."""
    draw, rows = np.random.default_rng(0), []
    for user in range(users):
        order = draw.permutation(things)
        days = [user * 10 + place if apart else place * 40 + user for place in range(things)]
        rows += [(f"u{user:02d}", f"{'ab'[user % 2]}{thing}", day * DAY) for day, thing in zip(days, order, strict=True)]
    return dataset(*zip(*rows, strict=True))  # type: ignore[arg-type]


SPLITS: list[Split] = [
    TimeSplit(train=0.6, valid=0.2), LeaveOneOut(kind="leave_one_out"), UserSplit(kind="user", train=0.5, valid=0.2),
    KFold(kind="kfold", folds=3), KFold(kind="kfold", folds=3, unit="users"), SessionSplit(kind="session", minutes=60 * 24 * 3),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::maple.evaluate.splitting.SplitWarning")
@pytest.mark.parametrize("split", SPLITS, ids=lambda split: f"{split.kind}-{getattr(split, 'unit', '')}")
def test_a_planted_truth_is_found_under_every_split(split: Split) -> None:
    data = circles(apart=split.kind == "session")
    for found in evaluate_split(lambda: ItemKnn(ItemKnnConfig(similarity="cosine")), data, split, ks=[6], bootstrap=20):
        assert found.means["recall@6"] == 1.0, "what is left of the user's own circle fits in six places"
        kept = json.loads(found.to_json())["protocol"]["split"]
        assert kept["settings"] == split.plain()
        assert kept["part"] == "test"
        assert kept["rows"]["test"] > 0
        again = Evaluation.from_json(found.to_json(), tensors_of(tensor_bytes(found.tensors())))
        assert again.protocol == found.protocol


def test_leave_one_out_asks_each_user_for_the_one_thing_left_out() -> None:
    data = circles()
    with pytest.warns(SplitWarning, match="what other users did after"):
        (found,) = evaluate_split(lambda: ItemKnn(ItemKnnConfig(similarity="cosine")), data, SPLITS[1], ks=[1], bootstrap=20)
    assert found.means["hit@1"] == 1.0  # all others of the circle are taken already
    assert len(found) == 30
    assert found.protocol.counts["pairs"] == found.protocol.counts["pairs_in_window"] == 30


def test_users_without_a_past_and_items_without_one_are_counted_not_asked() -> None:
    data = dataset(["a", "a", "a", "b", "b", "b", "c"], ["x", "y", "new", "x", "y", "x", "x"], [1, 2, 9, 1, 2, 9, 9])
    question = folds_of(data, TimeSplit(t1="1970-01-01T00:00:00.000002", t2="1970-01-01T00:00:00.000003"))[0].question()
    with pytest.raises(DataError, match="no test user is left"):
        relevant_to(question, new_only=True)
    found = relevant_to(question, new_only=False)
    assert data.users.decode(found.users) == ["b"]
    assert data.items.decode(found.items) == ["x"]
    counts = found.counts
    assert (counts["pairs_in_window"], counts["pairs"], counts["pairs_unknown_item"], counts["pairs_unknown_user"]) == (3, 1, 1, 1)


def test_item_strata_count_their_items_alone() -> None:
    data = circles()
    cut = 150 * DAY
    relevant = relevant_of(data, cut, data.span[1] + 1, new_only=True, known_before=cut)
    warm = np.zeros(len(data.items), np.int32)
    warm[::2] = 1
    strata = {"items": Segmentation(("cold", "warm"), warm)}
    lists = np.stack([relevant.items[relevant.offsets[:-1]]], axis=1)  # one right item each
    stats = CatalogueStats.of(data, cut)
    found = evaluate(lambda rows: lists[rows], relevant, catalogue=stats, ks=[1], strata=strata, bootstrap=20)
    for part in found.segments:
        wanted, hits = [], []
        for user in range(len(relevant)):
            own = [int(item) for item in relevant.items[relevant.offsets[user] : relevant.offsets[user + 1]]]
            own = [item for item in own if warm[item] == (part.label == "warm")]
            if own:
                wanted.append(len(own))
                hits.append(float(lists[user, 0] in own))
        assert part.name == "items"
        assert part.users == len(wanted)
        assert part.means["recall@1"] == pytest.approx(np.mean([hit / size for hit, size in zip(hits, wanted, strict=True)]))
    assert [part.label for part in found.segments] == ["cold", "warm"]
    with pytest.raises(DataError, match="labels 3 items"):
        evaluate(lambda rows: lists[rows], relevant, catalogue=stats, ks=[1], strata={"x": Segmentation(("a",), np.zeros(3, np.int32))})


def test_items_are_cold_by_how_many_knew_them_before() -> None:
    data = dataset([f"u{place}" for place in range(12)] + ["u0"], ["x"] * 10 + ["y"] * 2 + ["x"], [*range(12), 0])
    assert item_strata(data, 100)["items"].codes.tolist() == [1, 0]
    assert item_strata(data, 9)["items"].codes.tolist() == [0, 0]


def movies(folder: Path) -> Dataset:
    """ML-100K in the codes of its own file."""
    table = csv.read_csv(folder / "ml-100k" / "ml-100k.inter", parse_options=csv.ParseOptions(delimiter="\t"))
    user, item, _, time = (table[name] for name in table.column_names)
    return dataset(
        [f"{one:04d}" for one in user.to_pylist()], [f"{one:04d}" for one in item.to_pylist()],
        np.asarray(time.cast(pa.float64())).astype(np.int64) * 1_000_000, "rating",
    )  # fmt: skip


def test_figures_on_ml_100k_are_plausible(data_dir: Path) -> None:
    data = movies(data_dir)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SplitWarning)

        def measured(split: Split) -> list[tuple[Evaluation, Evaluation]]:
            popular = evaluate_split(lambda: Popularity(PopularityConfig(window_days=None)), data, split, ks=[10], bootstrap=50)
            neighbours = evaluate_split(
                lambda: ItemKnn(ItemKnnConfig(similarity="cosine", neighbours=100)), data, split, ks=[10], bootstrap=50
            )  # fmt: skip
            return list(zip(popular, neighbours, strict=True))

        ((popular, knn),) = measured(LeaveOneOut(kind="leave_one_out"))
        assert (len(popular), popular.protocol.counts["pairs_unknown_item"]) == (940, 3)  # 943 users; three rated what nobody had
        assert 0.05 < popular.means["hit@10"] < 0.11
        assert 0.1 < knn.means["hit@10"] < 0.2
        assert compare(knn, popular, metrics=["ndcg@10"])["ndcg@10"].low > 0
        folds = measured(KFold(kind="kfold", folds=5))
        assert sum(popular.protocol.pairs for popular, _ in folds) > 0.99 * 100_000
        assert all(knn.means["ndcg@10"] > 1.3 * popular.means["ndcg@10"] for popular, knn in folds)
        ((_, in_time),) = measured(TimeSplit())
        assert np.mean([knn.means["ndcg@10"] for _, knn in folds]) > 1.2 * in_time.means["ndcg@10"]  # the warning is true
    with pytest.warns(SplitWarning, match="see the future"):
        evaluate_split(
            lambda: Popularity(PopularityConfig()), data.where(data.log.user < 100), KFold(kind="kfold", folds=2), ks=[5], bootstrap=0
        )
