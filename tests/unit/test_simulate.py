"""The simulated shop: seeded, dirty in known numbers, ingestible, and its truth really is what made the events."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest

from maple.artifacts import Place
from maple.data.dataset import Dataset
from maple.data.ingest import ingest_local
from maple.data.presets import load_source
from maple.data.simulate import Shop, clean_events, simulate, write
from maple.schema import EVENT_CODES


@pytest.fixture(scope="module")
def shop() -> Shop:
    return simulate(3, num_users=300, num_items=200, days=40)


def test_the_same_seed_gives_the_same_shop_and_another_seed_another(shop: Shop) -> None:
    again = simulate(3, num_users=300, num_items=200, days=40)
    assert again.events.equals(shop.events)
    assert again.items.equals(shop.items)
    assert again.users.equals(shop.users)
    assert not simulate(4, num_users=300, num_items=200, days=40).events.equals(shop.events)


def test_ingestion_sets_aside_exactly_the_dirt(shop: Shop, tmp_path: Path) -> None:
    source, root = load_source(str(write(shop, tmp_path / "shop")))
    snapshot = ingest_local(source, root, Place.at(tmp_path / "home"), rows_per_bucket=5_000)
    assert snapshot.report().events.reasons == dict(shop.truth.dirt)
    assert sum(shop.truth.dirt.values()) > 50
    ours, theirs = snapshot.events().sort_by("event_id"), clean_events(shop).sort_by("event_id")
    for name in ("event_id", "user_id", "item_id", "event", "timestamp", "value", "price"):
        assert ours[name].equals(theirs[name]), name


def test_nothing_happens_to_an_item_before_it_exists_or_outside_the_days(shop: Shop) -> None:
    data = Dataset.from_tables(clean_events(shop), shop.items, shop.users)
    created = shop.truth.created[[int(text.split("-")[1]) for text in data.items.decode(data.log.item)]]
    assert (created <= data.log.time).all()
    first, last = data.span
    assert last - first < 40 * 86_400_000_000


def test_a_funnel_has_carts_before_orders_and_refunds_after_them(shop: Shop) -> None:
    data = Dataset.from_tables(clean_events(shop), shop.items, shop.users)
    log, pair = data.log, data.log.user.astype(np.int64) * len(data.items) + data.log.item
    counts = np.bincount(log.event, minlength=len(EVENT_CODES))
    assert (
        counts[EVENT_CODES["view"]]
        > counts[EVENT_CODES["add_to_cart"]]
        > counts[EVENT_CODES["purchase"]]
        > counts[EVENT_CODES["return"]]
        > 0
    )

    def first_time(event: str) -> dict[int, int]:
        keep = log.event == EVENT_CODES[event]
        order = np.argsort(log.time[keep], kind="stable")[::-1]
        return dict(zip(pair[keep][order].tolist(), log.time[keep][order].tolist(), strict=True))

    views, carts, orders, refunds = (first_time(event) for event in ("view", "add_to_cart", "purchase", "return"))
    assert all(views[key] < carts[key] for key in carts)
    assert all(carts[key] < orders[key] for key in orders)
    assert all(orders[key] < refunds[key] for key in refunds)


def test_probabilities_are_probabilities_and_hide_items_to_come(shop: Shop) -> None:
    truth = shop.truth
    users = np.arange(20)
    start = int(truth.created[truth.created > 0].min())
    for now in (None, int(np.median(truth.created)) + 1):
        chance = truth.probabilities(users, now)
        np.testing.assert_allclose(chance.sum(axis=1), 1.0)
        assert (chance >= 0).all()
        if now is not None:
            assert now > start
            assert (chance[:, truth.created > now] == 0).all()


def test_the_truth_ranks_what_users_look_at_far_above_popularity(shop: Shop) -> None:
    """Mean percentile of viewed items under the truth and under popularity; 0.5 is chance."""
    truth, table = shop.truth, clean_events(shop)
    views = table.filter(pc.equal(table["event"], "view"))
    user = np.array([int(text[1:]) for text in views["user_id"].to_pylist()])
    item = np.array([int(text.split("-")[1]) for text in views["item_id"].to_pylist()])
    chance = truth.probabilities(np.arange(len(truth.user_ids)))
    popular = np.bincount(item, minlength=len(truth.item_ids)).astype(float)
    by_truth = (chance[user] < chance[user, item][:, None]).mean()
    by_popularity = (popular[None, :] < popular[item][:, None]).mean()
    assert by_truth > by_popularity + 0.1
    assert by_truth > 0.85


def test_purchases_follow_their_stated_probability(shop: Shop) -> None:
    """Looks in the upper half of ``buys`` lead to clearly more orders than those in the lower half."""
    truth, table = shop.truth, clean_events(shop)

    def codes(event: str) -> tuple[np.ndarray, np.ndarray]:
        part = table.filter(pc.equal(table["event"], event))
        return (
            np.array([int(text[1:]) for text in part["user_id"].to_pylist()]),
            np.array([int(text.split("-")[1]) for text in part["item_id"].to_pylist()]),
        )

    (view_user, view_item), (buy_user, buy_item) = codes("view"), codes("purchase")
    chance = truth.buys(view_user, view_item)
    assert ((chance > 0) & (chance < 1)).all()
    middle = np.median(chance)
    bought = truth.buys(buy_user, buy_item)
    high, low = (bought > middle).sum() / (chance > middle).sum(), (bought <= middle).sum() / (chance <= middle).sum()
    assert high > 2 * low
    assert abs(len(bought) / chance.sum() - 1) < 0.1


def test_no_dirt_when_none_is_asked_for() -> None:
    clean = simulate(0, num_users=30, num_items=40, days=7, dirty_share=0.0)
    assert dict(clean.truth.dirt) == {}
    assert clean.events.num_rows == clean_events(clean).num_rows
