"""A shop with known truth: users with tastes, items with qualities, seasons, repeat purchases, returns, new arrivals and some dirt.

What a test or the demo can check against is in ``Truth``: the factors, and for any user the probability of each item. The
files it writes go through the ordinary ingestion.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from maple.hashing import rng
from maple.schema import EVENTS, TIMESTAMP, conform

Float64: TypeAlias = npt.NDArray[np.float64]
Int64: TypeAlias = npt.NDArray[np.int64]

DAY, HOUR, MINUTE, SECOND = 86_400_000_000, 3_600_000_000, 60_000_000, 1_000_000
NOUNS = (
    "Lamp",
    "Mug",
    "Chair",
    "Blanket",
    "Clock",
    "Basket",
    "Candle",
    "Kettle",
    "Planter",
    "Notebook",
    "Mirror",
    "Cushion",
    "Puzzle",
    "Backpack",
)
STYLES = ("Oak", "Linen", "Copper", "Striped", "Vintage", "Ceramic", "Woven", "Matte", "Pastel", "Folding", "Quilted", "Glass")
MAKERS = ("Alder", "Birchway", "Calla", "Dunmore", "Elmfield", "Fennick", "Garrow", "Hollis", "Ivor", "Juniper", "Kestrel", "Larkin")
COUNTRIES = ("GB", "DE", "FR", "NL", "ES", "PL")
DEVICES = ("phone", "desktop", "tablet")
BLOCK = 256  # users drawn at once


@dataclass(frozen=True, eq=False)
class Truth:
    """What made the events. U users, I items, D dimensions; codes are places in ``user_ids`` and ``item_ids``."""

    user_ids: list[str]
    item_ids: list[str]
    user_factors: Float64  # [U, D]
    item_factors: Float64  # [I, D]
    item_bias: Float64  # [I]: quality, what everybody likes
    price_taste: Float64  # [U]: the log price a user is at ease with
    log_price: Float64  # [I]
    created: Int64  # [I] microseconds
    category: Int64  # [I]
    staples: Int64  # [U, S]: the items a user buys again and again
    repeat: Float64  # [U]: how much of a user's attention goes to staples
    season: Float64  # [days, categories]: relative demand, at most 1
    sharpness: float
    dirt: Mapping[str, int]  # dirty rows by what is wrong with them

    def affinity(self, users: npt.NDArray[Any]) -> Float64:
        """Utility of every item for some users, float64[len(users), I]: taste match, quality, and distance to the price they like."""
        taste = self.user_factors[users] @ self.item_factors.T
        price = np.abs(self.log_price[None, :] - self.price_taste[users][:, None])
        return np.asarray(taste + self.item_bias - 0.6 * price)

    def probabilities(self, users: npt.NDArray[Any], now: int | None = None) -> Float64:
        """Probability of each item at a user's next look, float64[len(users), I], rows sum to 1; at ``now``, items not yet there have none.

        The season is left out: it moves whole categories a little, alike for all users.
        """
        utility = self.sharpness * self.affinity(users)
        if now is not None:
            utility = np.where(self.created[None, :] <= now, utility, -np.inf)
        explore = np.exp(utility - utility.max(axis=1, keepdims=True))
        explore /= explore.sum(axis=1, keepdims=True)
        again = np.zeros_like(explore)
        np.put_along_axis(again, self.staples[users], 1.0 / self.staples.shape[1], axis=1)
        if now is not None:
            again *= self.created[None, :] <= now
        mixed = (1 - self.repeat[users][:, None]) * explore + self.repeat[users][:, None] * again
        return np.asarray(mixed / mixed.sum(axis=1, keepdims=True))

    def buys(self, users: npt.NDArray[Any], items: npt.NDArray[Any]) -> Float64:
        """Probability that a user who looks at an item buys it, aligned arrays; a staple is bought more readily."""
        taste = np.einsum("nd,nd->n", self.user_factors[users], self.item_factors[items])
        price = np.abs(self.log_price[items] - self.price_taste[users])
        known = (self.staples[users] == items[:, None]).any(axis=1)
        return np.asarray(1.0 / (1.0 + np.exp(-(-2.1 + 0.5 * taste + 0.3 * self.item_bias[items] - 0.5 * price + 1.2 * known))))


@dataclass(frozen=True, eq=False)
class Shop:
    """Raw tables as a shop would export them (with their dirt), and the truth behind them."""

    events: pa.Table
    items: pa.Table
    users: pa.Table
    truth: Truth


def simulate(
    seed: int = 0,
    *,
    num_users: int = 2_000,
    num_items: int = 1_200,
    days: int = 60,
    sessions_per_week: float = 1.6,
    dimensions: int = 8,
    dirty_share: float = 0.01,
    start: datetime = datetime(2026, 1, 5, tzinfo=UTC),
) -> Shop:
    """A shop's life over ``days`` from ``start``. The same arguments give the same tables, bit for bit.

    The defaults give about 200,000 events. ``dirty_share`` of rows are made wrong in known ways (``truth.dirt`` counts them).
    """
    first = int(start.timestamp()) * SECOND
    truth, items = _catalogue(seed, num_users, num_items, days, dimensions, first)
    users = _user_table(seed, truth)
    looks = _looks(seed, truth, days, sessions_per_week, first)
    clean = _funnel(seed, truth, looks, first + days * DAY)
    events, dirt = _soil(seed, clean, dirty_share)
    return Shop(events, items, users, replace(truth, dirt=dirt))


def write(shop: Shop, folder: str | Path) -> Path:
    """Write the shop's files (events, items, users as Parquet, and ``source.yaml``) into a folder; returns the folder."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for name in ("events", "items", "users"):
        pq.write_table(getattr(shop, name), target / f"{name}.parquet", compression="zstd")
    source: dict[str, Any] = {
        "name": "simulated-shop",
        "about": "A simulated shop with known truth",
        "events": {
            "path": "events.parquet",
            "columns": {
                "event_id": "id", "user_id": "customer", "item_id": "sku", "event": "action", "timestamp": "at", "value": "quantity",
                "price": "unit_price", "session_id": "visit",
            },
            "values": {"event": {"look": "view", "basket": "add_to_cart", "order": "purchase", "refund": "return"}},
            "keep": ["device"],
            "rules": [
                {"name": "missing_customer", "kind": "required", "column": "user_id"},
                {"name": "unknown_sku", "kind": "in_catalogue"},
                {"name": "unknown_action", "kind": "known_event"},
                {"name": "negative_price", "kind": "range", "column": "price", "min": 0},
            ],
        },
        "items": {
            "path": "items.parquet",
            "columns": {name: name for name in shop.items.column_names},
        },
        "users": {"path": "users.parquet", "columns": {"user_id": "user_id"}, "keep": ["country", "age_band", "favourite"]},
        "targets": ["purchase"],
    }  # fmt: skip
    (target / "source.yaml").write_text(
        "# The mapping of a simulated shop's files, and its cleaning rules.\n" + yaml.safe_dump(source, sort_keys=False)
    )
    return target


def _catalogue(seed: int, num_users: int, num_items: int, days: int, dimensions: int, first: int) -> tuple[Truth, pa.Table]:
    draw = rng(seed, "simulate/catalogue")
    num_categories, num_brands = min(len(NOUNS), max(2, num_items // 20)), len(MAKERS)
    centres = draw.normal(size=(num_categories, dimensions))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    brands = 0.35 * draw.normal(size=(num_brands, dimensions)) / np.sqrt(dimensions)
    category = draw.integers(num_categories, size=num_items)
    brand = draw.integers(num_brands, size=num_items)
    item_factors = 1.4 * centres[category] + brands[brand] + 0.5 * draw.normal(size=(num_items, dimensions)) / np.sqrt(dimensions)
    log_price = np.log(draw.uniform(4, 40, size=num_categories))[category] + 0.35 * draw.normal(size=num_items)
    item_bias = 0.7 * draw.normal(size=num_items)
    new = draw.random(num_items) < 0.3
    created = np.where(
        new, first + (draw.random(num_items) * 0.95 * days * DAY).astype(np.int64), first - draw.integers(1, 400, num_items) * DAY
    )

    taste = rng(seed, "simulate/users")
    main, other = taste.integers(num_categories, size=(2, num_users))
    weight = taste.uniform(0.55, 0.9, size=(num_users, 1))
    user_factors = 2.2 * (weight * centres[main] + (1 - weight) * centres[other]) + 0.8 * taste.normal(
        size=(num_users, dimensions)
    ) / np.sqrt(dimensions)
    price_taste = np.log(15) + 0.5 * taste.normal(size=num_users)
    phase = taste.uniform(0, 2 * np.pi, size=num_categories)
    day = np.arange(days)[:, None]
    season = 0.75 + 0.25 * np.sin(2 * np.pi * day / 60 + phase[None, :])
    truth = Truth(
        [f"u{place:05d}" for place in range(num_users)], [f"sku-{place:05d}" for place in range(num_items)],
        user_factors, item_factors, item_bias, price_taste, log_price, created, category,
        np.zeros((num_users, min(4, num_items)), np.int64), taste.beta(2.0, 4.0, size=num_users), season, 1.0, {},
    )  # fmt: skip
    truth = _with_staples(seed, truth, first)
    price = np.round(np.exp(log_price), 2)
    style = draw.integers(len(STYLES), size=num_items)
    titles = [f"{MAKERS[b]} {STYLES[s]} {NOUNS[c]}" for b, s, c in zip(brand, style, category, strict=True)]
    table = pa.table(
        {
            "item_id": truth.item_ids,
            "title": titles,
            "description": [
                f"A {STYLES[s].lower()} {NOUNS[c].lower()} by {MAKERS[b]}." for b, s, c in zip(brand, style, category, strict=True)
            ],
            "category": [NOUNS[c] for c in category],
            "brand": [MAKERS[b] for b in brand],
            "price": pa.array(price, pa.float32()),
            "available": pa.array(draw.random(num_items) > 0.02),
            "stock": pa.array(draw.integers(0, 200, num_items), pa.float32()),
            "created_at": pa.array(created).cast(TIMESTAMP),
            "margin": pa.array(np.round(draw.uniform(0.05, 0.5, num_items), 3), pa.float32()),
            "promotion": pa.array(draw.random(num_items) < 0.08),
        }
    )
    return truth, table


def _with_staples(seed: int, truth: Truth, first: int) -> Truth:
    """Staples are drawn by taste among the items that were there from the start."""
    draw = rng(seed, "simulate/staples")
    staples = np.empty_like(truth.staples)
    there = np.flatnonzero(truth.created <= first)
    there = there if len(there) >= staples.shape[1] else np.arange(len(truth.item_ids))
    for start in range(0, len(staples), BLOCK):
        users = np.arange(start, min(start + BLOCK, len(staples)))
        noisy = truth.affinity(users)[:, there] + draw.gumbel(size=(len(users), len(there)))  # the top of these is a draw without repeats
        staples[users] = there[np.argpartition(-noisy, staples.shape[1] - 1, axis=1)[:, : staples.shape[1]]]
    return replace(truth, staples=staples)


def _user_table(seed: int, truth: Truth) -> pa.Table:
    draw = rng(seed, "simulate/attributes")
    size = len(truth.user_ids)
    liked = truth.category[truth.staples[:, 0]]
    told = np.where(draw.random(size) < 0.7, liked, draw.integers(truth.category.max() + 1, size=size))
    favourite = pa.array([NOUNS[place] for place in told])
    return pa.table(
        {
            "user_id": truth.user_ids,
            "country": np.array(COUNTRIES)[draw.choice(len(COUNTRIES), size=size, p=[0.4, 0.2, 0.15, 0.1, 0.1, 0.05])],
            "age_band": np.array(["18-29", "30-44", "45-59", "60+"])[draw.integers(4, size=size)],
            "favourite": pc.if_else(pa.array(draw.random(size) < 0.8), favourite, None),
        }
    )


@dataclass(frozen=True, eq=False)
class _Looks:
    """Every look at an item: user and item codes, time, and the visit it belongs to; sorted by (visit, time)."""

    user: Int64
    item: Int64
    time: Int64
    visit: Int64
    device: Int64


def _looks(seed: int, truth: Truth, days: int, per_week: float, first: int) -> _Looks:
    draw = rng(seed, "simulate/sessions")
    users = len(truth.user_ids)
    activity = draw.gamma(1.2, 1 / 1.2, size=users)  # many light users, few heavy ones
    visits = draw.poisson(activity * per_week * days / 7)
    user = np.repeat(np.arange(users), visits)
    weekday = np.array([0.9, 0.85, 0.9, 1.0, 1.1, 1.35, 1.2])[(np.arange(days) + _weekday(first)) % 7]
    day = draw.choice(days, size=len(user), p=weekday / weekday.sum())
    hour = draw.choice(24, size=len(user), p=_hours())
    begin = first + day * DAY + hour * HOUR + (draw.random(len(user)) * HOUR).astype(np.int64)
    order = np.lexsort((begin, user))
    user, begin = user[order], begin[order]
    device = draw.choice(3, size=len(user), p=[0.6, 0.32, 0.08])
    sizes = 1 + np.minimum(draw.poisson(3.2, size=len(user)), 14)
    visit = np.repeat(np.arange(len(user)), sizes)
    gaps = (draw.exponential(50, size=len(visit)) * SECOND).astype(np.int64) + 4 * SECOND
    heads = np.cumsum(sizes) - sizes
    gaps[heads] = 0
    since = np.cumsum(gaps)
    time = begin[visit] + since - since[heads][visit]
    item = _drawn_items(seed, truth, user[visit], time, first, days)
    keep = item >= 0
    return _Looks(user[visit][keep], item[keep], time[keep], visit[keep], device[visit][keep])


def _drawn_items(seed: int, truth: Truth, user: Int64, time: Int64, first: int, days: int) -> Int64:
    """An item for every look, by the user's probabilities, thinned by season and by what exists at that time; -1 where none was found."""
    draw = rng(seed, "simulate/items")
    day = np.clip((time - first) // DAY, 0, days - 1)
    item = np.full(len(user), -1, np.int64)
    edges = np.searchsorted(user, np.arange(0, len(truth.user_ids) + BLOCK, BLOCK))
    for block, (low, high) in enumerate(pairwise(edges)):
        base = block * BLOCK
        running = np.cumsum(truth.probabilities(np.arange(base, min(base + BLOCK, len(truth.user_ids)))), axis=1)
        flat = (running / running[:, -1:] + np.arange(len(running))[:, None]).ravel()  # one sorted array for all rows of the block
        todo = np.arange(low, high)
        for _ in range(12):
            found = np.searchsorted(flat, user[todo] - base + draw.random(len(todo)), side="right")
            found = np.minimum(found - (user[todo] - base) * running.shape[1], running.shape[1] - 1)
            accept = (truth.created[found] <= time[todo]) & (draw.random(len(todo)) < truth.season[day[todo], truth.category[found]])
            item[todo[accept]] = found[accept]
            todo = todo[~accept]
            if len(todo) == 0:
                break
    return item


def _funnel(seed: int, truth: Truth, looks: _Looks, end: int) -> pa.Table:
    """Views, carts, purchases (a visit's share one checkout time) and returns, before any dirt."""
    draw = rng(seed, "simulate/funnel")
    chance = truth.buys(looks.user, looks.item)
    cart = draw.random(len(chance)) < np.minimum(1.8 * chance, 0.95)
    buy = cart & (draw.random(len(chance)) < chance / np.minimum(1.8 * chance, 0.95))
    again = np.unique(looks.visit[buy].astype(np.int64) * len(truth.item_ids) + looks.item[buy], return_index=True)[1]
    bought = np.flatnonzero(buy)[again]  # an item is bought once per visit
    last = np.zeros(int(looks.visit.max(initial=-1)) + 1, np.int64)
    np.maximum.at(last, looks.visit, looks.time)
    quantity = 1 + draw.poisson(0.25, size=len(bought))
    returned = draw.random(len(bought)) < 0.04
    back = last[looks.visit[bought]] + ((3 + 11 * draw.random(len(bought))) * DAY).astype(np.int64)
    returned &= back < end
    price: Float64 = np.round(np.exp(truth.log_price), 2).astype(np.float64)
    parts = [
        _rows(truth, looks, np.arange(len(chance)), "look", looks.time),
        _rows(truth, looks, np.flatnonzero(cart), "basket", looks.time[cart] + 3 * SECOND),
        _rows(truth, looks, bought, "order", last[looks.visit[bought]] + 2 * MINUTE, quantity, price),
        _rows(truth, looks, bought[returned], "refund", back[returned], quantity[returned], price, visits=False),
    ]
    table = pa.concat_tables(parts).filter(pc.less(pc.field("at"), pa.scalar(end, TIMESTAMP)))
    table = table.sort_by([("at", "ascending"), ("customer", "ascending"), ("sku", "ascending"), ("action", "ascending")])
    return table.add_column(0, "id", pa.array([f"e{place:08d}" for place in range(table.num_rows)]))


def _rows(
    truth: Truth,
    looks: _Looks,
    rows: Int64,
    action: str,
    time: Int64,
    quantity: Int64 | None = None,
    price: Float64 | None = None,
    visits: bool = True,
) -> pa.Table:
    size = len(rows)
    visit = pc.binary_join_element_wise("v", pa.array(looks.visit[rows]).cast(pa.string()), "")
    return pa.table(
        {
            "customer": pa.array(truth.user_ids).take(pa.array(looks.user[rows])),
            "sku": pa.array(truth.item_ids).take(pa.array(looks.item[rows])),
            "action": pa.repeat(action, size),
            "at": pa.array(time).cast(TIMESTAMP),
            "quantity": pa.array(quantity, pa.int32()) if quantity is not None else pa.nulls(size, pa.int32()),
            "unit_price": pa.array(price[looks.item[rows]], pa.float64()) if price is not None else pa.nulls(size, pa.float64()),
            "visit": visit if visits else pa.nulls(size, pa.string()),
            "device": pa.array(DEVICES).take(pa.array(looks.device[rows])),
        }
    )


def _soil(seed: int, clean: pa.Table, share: float) -> tuple[pa.Table, dict[str, int]]:
    """Add wrong rows beside the clean ones, in known numbers, and shuffle nothing: files of a real shop are in time order too."""
    draw = rng(seed, "simulate/dirt")
    each = int(clean.num_rows * share / 5)
    if each == 0:
        return clean, {}
    picked = (
        draw.choice(clean.num_rows, size=(5, each), replace=False)
        if clean.num_rows >= 5 * each
        else draw.integers(clean.num_rows, size=(5, each))
    )

    def copies(place: int, prefix: str, **changes: pa.Array) -> pa.Table:
        table = clean.take(pa.array(picked[place]))
        if prefix:
            changes["id"] = pa.array([f"{prefix}{number:06d}" for number in range(each)])
        for name, column in changes.items():
            table = table.set_column(table.column_names.index(name), name, column.cast(table.schema.field(name).type))
        return table

    parts = {
        "missing_customer": copies(0, "x0", customer=pa.nulls(each, pa.string())),
        "unknown_sku": copies(1, "x1", sku=pa.array([f"gone-{number % 50}" for number in range(each)])),
        "unknown_action": copies(2, "x2", action=pa.repeat("hover", each)),
        "negative_price": copies(3, "x3", unit_price=pa.repeat(-1.0, each)),
        "duplicate": copies(4, ""),
    }
    table = pa.concat_tables([clean, *parts.values()]).sort_by([("at", "ascending"), ("id", "ascending")])
    return table, {name: part.num_rows for name, part in parts.items()}


def clean_events(shop: Shop) -> pa.Table:
    """The shop's events in Maple's columns without the dirt, sorted by (timestamp, event_id): for tests that need no files."""
    table = shop.events
    names = {
        "id": "event_id",
        "customer": "user_id",
        "sku": "item_id",
        "action": "event",
        "at": "timestamp",
        "quantity": "value",
        "unit_price": "price",
    }
    names["visit"] = "session_id"
    table = table.filter(pc.starts_with(table["id"], "e"))
    first = np.unique(np.asarray(table["id"].combine_chunks().dictionary_encode().indices), return_index=True)[1]
    table = table.take(pa.array(np.sort(first)))
    labels = {"look": "view", "basket": "add_to_cart", "order": "purchase", "refund": "return"}
    place = pc.index_in(table["action"], value_set=pa.array(list(labels)))
    table = table.set_column(table.column_names.index("action"), "action", pa.array(list(labels.values())).take(place.combine_chunks()))
    table = table.rename_columns([names.get(name, name) for name in table.column_names])
    return conform(table, EVENTS, "simulated events").sort_by([("timestamp", "ascending"), ("event_id", "ascending")])


def _weekday(first: int) -> int:
    return datetime.fromtimestamp(first // SECOND, UTC).weekday()


def _hours() -> Float64:
    hours = np.arange(24)
    weight = 0.1 + np.exp(-((hours - 13) ** 2) / 18) + 1.3 * np.exp(-((hours - 20) ** 2) / 8)
    return np.asarray(weight / weight.sum())
