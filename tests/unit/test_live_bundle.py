"""A bundle over a live catalogue: nothing changes without live items, today's values count with them, new items find their users."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from taste_shop import END_US, dataset, group

from maple.data.dataset import Float32
from maple.features.content import ItemContent
from maple.features.extras import Extras
from maple.features.live_items import LiveItem
from maple.features.spec import FeatureSpec
from maple.models.base import FitContext
from maple.recommend import live as live_module
from maple.recommend.bundle import Bundle, ItemFeatures, Recommendation
from maple.recommend.filters import FilterError
from maple.recommend.live import LiveBundle, LiveView, live_bundle, next_change, promoted
from maple.recommend.settings import PipelineSettings
from maple.schema import TIMESTAMP
from maple.train.fit import fit_sources

NOW = END_US
HOUR = 3_600_000_000
KNOWN = 80
TASTE = [("i5", "purchase", NOW - 3 * HOUR), ("i9", "purchase", NOW - 2 * HOUR)]  # group 1


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    data = dataset()
    page = {
        "sources": [{"name": name, "model": name, "quota": 40} for name in ("popularity", "item-knn", "als")],
        "rerank": {"mmr": {"relevance": 0.95}, "rules": [{"name": "sale", "match": {"promotion": [True]}, "action": "pin"}]},
    }
    table = data.item_table.append_column("promotion", pa.array([False] * KNOWN)).append_column("colour", pa.array(["red"] * KNOWN))
    data = replace(data, item_table=table)
    settings = PipelineSettings.parse(page, "test")
    sources, _ = fit_sources(data, settings, FitContext(), lambda text: None)
    spec = FeatureSpec(views=("user.recency", "user_item.price", "item.price"), history_limit=settings.history_limit)
    names = [name for name in spec.columns if name.startswith("item.")]
    features = ItemFeatures(spec, {name: np.arange(KNOWN, dtype=np.float32) for name in names})
    return replace(Bundle.assemble(settings, data, sources, fingerprint="f", features=features), digest="d" * 64)


def live(bundle: Bundle, *items: LiveItem, now: int = NOW) -> LiveBundle:
    return live_bundle(bundle, LiveView().after(len(items), items), now)


def item(item_id: str, number: int = 0, **said: Any) -> LiveItem:
    return LiveItem(item_id, number, number + 1, **said)


def ask(bundle: Bundle, history: list[tuple[str, str, int]] = TASTE, k: int = 20, **more: Any) -> list[Recommendation]:
    query = bundle.query("u", now=NOW, k=k, history=history, **more)
    (answer,) = bundle.decode(bundle.pipeline().run([query], explain=True))
    return answer


def ids(answer: list[Recommendation]) -> list[str]:
    return [one.item_id for one in answer]


def test_without_live_items_every_answer_is_the_same_to_the_bit(bundle: Bundle) -> None:
    over = live(bundle)
    for history in (TASTE, [], [("i2", "view", NOW - HOUR)]):
        queries = [(each.query("u", now=NOW, k=30, history=history), each) for each in (bundle, over)]
        (before, after) = (each.pipeline().run([query], explain=True) for query, each in queries)
        assert before.items.tolist() == after.items.tolist()
        assert before.scores.tolist() == after.scores.tolist()
        assert bundle.decode(before) == over.decode(after)
    assert over.num_new == 0


@pytest.mark.parametrize("said", [{"available": False}, {"stock": 0.0}, {"deleted": True}, {"available": True, "stock": 0.0}])
def test_what_cannot_be_sold_is_not_recommended(bundle: Bundle, said: dict[str, Any]) -> None:
    first = ids(ask(bundle))[0]
    over = live(bundle, item(first, **said))
    assert first not in ids(ask(over, k=80))
    assert first not in dict(over.similar("i5", 80))
    assert ids(ask(live(bundle, item(first, available=True, stock=3.0)))) == ids(ask(bundle))


def test_what_the_bundle_says_holds_where_nothing_is_said(bundle: Bundle) -> None:
    table = bundle.space.item_table.append_column("stock", pa.array([0.0] + [None] * (KNOWN - 1), pa.float32()))
    gone = replace(bundle, parts=replace(bundle.parts, space=replace(bundle.space, item_table=table)))
    (first,) = gone.space.items.decode(np.array([0]))
    assert first not in ids(ask(live(gone, item(first, price=3.0)), history=[], k=80))
    assert first in ids(ask(live(gone, item(first, stock=1.0)), history=[], k=80))


def test_a_new_item_reaches_those_whose_taste_it_is(bundle: Bundle) -> None:
    new = item("novelty", category="c1", price=5.0, title="The new thing")
    over = live(bundle, new)
    answer = ask(over, k=10)
    found = next(one for one in answer if one.item_id == "novelty")
    assert (found.item_id, found.title, found.source, found.reason.kind) == ("novelty", "The new thing", "new items", "new")
    assert found.reason.text == "new in c1"
    assert 3 <= ids(answer).index("novelty") <= 6, "the fifth place, give or take what diversity moves"
    assert ids(answer)[:3] == ids(ask(bundle, k=10))[:3]
    assert "novelty" not in ids(ask(over, history=[("i2", "purchase", NOW - HOUR)], k=80)), "another taste"
    assert "novelty" in ids(ask(over, history=[], k=10)), "nobody's taste is known, nothing speaks against it"
    for gone in (replace(new, available=False), replace(new, stock=0.0), replace(new, deleted=True, category=None)):
        assert "novelty" not in ids(ask(live(bundle, gone), k=80))


def test_new_items_in_every_part_of_a_request(bundle: Bundle) -> None:
    over = live(bundle, item("n0", 0, category="c1"), item("n1", 1, category="c1", brand="b"), item("n2", 2))
    assert over.num_new == 3
    assert "n1" not in ids(ask(over, k=80, exclude=["n1"]))
    bought = [*TASTE, ("n1", "purchase", NOW - HOUR)]
    again = next(one for one in ask(over, history=bought, k=40) if one.item_id == "n1")
    assert again.reason.kind == "again"
    only = ask(over, k=10, filters={"brand": ["b"]})
    assert ids(only) == ["n1"]
    assert {group(one) for one in dict(over.similar("n0", 5))} == {1}
    assert over.similar("n2", 5) == []
    query = over.query("u", now=NOW, k=5, history=bought)
    assert query.items[-1] == KNOWN + 1
    fallback = replace(over.pipeline(), retrieve=()).run([query]).items
    assert len(fallback) == 5
    assert (fallback < KNOWN).all()


def test_live_values_count_in_filters_and_rules(bundle: Bundle) -> None:
    last = ids(ask(bundle, history=[], k=80))[-1]
    over = live(bundle, item(last, price=1234.5, attributes={"colour": "blue", "weight": 3.0}))
    assert ids(ask(over, history=[], filters={"price": {"min": 1000}})) == [last]
    assert ids(ask(over, history=[], filters={"colour": ["blue"]})) == [last]
    with pytest.raises(FilterError, match="weight"):
        ask(over, history=[], filters={"weight": [3.0]})
    some = ids(ask(bundle, history=[], k=30))[-1]
    offered = live(bundle, item(some, promotion=(None, NOW + HOUR)))
    assert ids(ask(offered, history=[], k=10))[0] == some, "the rule of the page pins what is promoted"
    ends = offered.parts.item_columns.times("promotion_end")
    assert np.flatnonzero(ends == NOW + HOUR).tolist() == offered.space.items.encode([some]).tolist()


def test_a_value_of_another_type_is_unknown(bundle: Bundle) -> None:
    odd = live(bundle, item("i3", attributes={"colour": 4.0}), item("i4", 1, attributes={"colour": "green", "promotion": "yes"}))
    assert ids(ask(odd, history=[], filters={"colour": ["green"]})) == ["i4"]
    assert "i3" not in ids(ask(odd, history=[], k=80, filters={"colour": ["red"]}))


def test_promotions_start_and_end_by_themselves(bundle: Bundle) -> None:
    offer = item("i3", promotion=(NOW + HOUR, NOW + 2 * HOUR))
    assert [promoted(offer, NOW + hours * HOUR) for hours in (0, 1, 2)] == [False, True, False]
    assert promoted(item("i3", promotion=(None, None)), 0)
    assert not promoted(item("i3"), NOW)
    changes = [next_change([offer, item("i4")], NOW + hours * HOUR) for hours in (0, 1, 2)]
    assert changes == [NOW + HOUR, NOW + 2 * HOUR, None]
    for hours, on in ((0, []), (1, ["i3"]), (2, [])):
        over = live(bundle, offer, now=NOW + hours * HOUR)
        assert ids(ask(over, history=[], filters={"promotion": [True]})) == on
        assert over.until == changes[hours]


def test_codes_of_new_items_mean_the_same_in_every_later_view(bundle: Bundle) -> None:
    views = [
        live(bundle, item("b", 0)),
        live(bundle, item("i3", 1, price=3.0), item("b", 0), item("a", 2)),
        live(bundle, item("a", 2, deleted=True), item("c", 7), item("i3", 1), item("b", 0)),
    ]
    assert [view.space.items.encode(["b", "a", "c"]).tolist() for view in views] == [[80, -1, -1], [80, 81, -1], [80, 81, 82]]


def test_features_read_live_prices_and_know_nothing_of_new_items(bundle: Bundle) -> None:
    over = live(bundle, item("i3", price=500.0), item("n", 1, price=2.0, category="c1"))
    assert bundle.hydrator is not None
    assert over.hydrator is not None
    codes = over.space.items.encode(["i3", "i4", "n"])
    offsets = np.array([0, 3])
    before = bundle.hydrator.columns([bundle.query("u", now=NOW, history=TASTE)], np.array([0, 2]), codes[:2])
    after = over.hydrator.columns([over.query("u", now=NOW, history=TASTE)], offsets, codes)
    assert before.keys() == after.keys()
    price = "user_item.price.difference"
    assert before[price][1] == after[price][1]
    assert before[price][0] != after[price][0]
    assert np.isfinite(after[price][2])
    assert np.isnan(after["item.price.paid"]).tolist() == [False, False, True]
    assert over.folder is not None
    assert bundle.folder is not None
    assert over.folder.digest == bundle.folder.digest


def test_content_vectors_of_new_items_are_made_once(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def vectors_of(contents: Mapping[str, ItemContent], items: pa.Table) -> dict[str, Float32]:
        asked.append(items["item_id"].to_pylist())
        return {name: np.array([[len(title)] * 2 for title in items["title"].to_pylist()], np.float32) for name in contents}

    monkeypatch.setattr(live_module, "vectors_of", vectors_of)
    content = {"text": ItemContent(np.ones((KNOWN, 2), np.float32), {}, {})}
    assert bundle.features is not None
    rich = replace(bundle, features=replace(bundle.features, extras=Extras(content=content)))
    first = live(rich, item("n", title="one"), item("m", 1, title="three"))
    view = LiveView().after(9, [item("n", title="one"), replace(item("m", 1, title="fourteen"), version=5), item("o", 7, title="x")])
    second = live_bundle(rich, view, NOW, first)
    assert asked == [["n", "m"], ["m", "o"]]
    assert [vector.tolist() for vector in second.content["text"]] == [[3, 3], [8, 8], [1, 1]]
    assert second.extras.newer_vectors["text"].tolist() == second.content["text"].tolist()
    assert live_bundle(rich, LiveView(), NOW, second).content == {}


def test_created_at_of_a_new_item_counts_as_fresh(bundle: Bundle) -> None:
    over = live(bundle, item("n", created_at=NOW - HOUR))
    times = over.parts.item_columns.times("created_at")
    assert over.parts.item_columns.kind("created_at") == TIMESTAMP
    assert times[-1] == NOW - HOUR
    assert (times[:-1] == np.iinfo(np.int64).min).all()
