"""The features of every view in one polars process: the opponent of the feature build, and an independent reference of the views.

Written as polars is at its best: ids as integers, one sort per key, running sums as window expressions (per user) or as differences
of one global running sum (per user and item, category or brand: windows of millions of groups are slower), decay as weights
2^((t - start) / half-life), last and first times as filled row numbers, and everything gathered at the target events alone. Point in
time: a target event at t sees the rows before the first row of its moment.

``python polars_features.py EVENTS ITEMS OUT`` reads Parquet, writes ``user_events.parquet`` and ``item_ticks.parquet``, prints seconds.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import polars as pl

#: The views that are computed here, all their columns.
COVERED: tuple[str, ...] = (
    "user.activity", "user.recency", "user.sessions", "user.baskets", "user.repeats", "user.spend", "user.price_level", "user.rhythm",
    "user.returns", "user.ratings", "user.category", "user.brand", "user_item.bought", "user_item.recency", "user_item.interest",
    "user_item.category", "user_item.brand", "user_item.price", "item.activity", "item.conversion", "item.price", "item.age",
    "item.returns", "item.trend", "item.buyers", "item.ratings",
)  # fmt: skip
DAY = 86_400_000_000
WEEK, MONDAY, SESSION = 7 * DAY, 4 * DAY, 1800 * 1_000_000
KINDS = ("view", "click", "add_to_cart", "purchase", "rating", "return")
ROW = pl.int_range(pl.len(), dtype=pl.Int64)
T = pl.col("t")
SHORT, LONG = 7.0, 30.0
SPAN = 1 << 32  # keys of two integers are one: the first times this, plus the second


def is_(*kinds: str) -> pl.Expr:
    """Which rows are of one of these kinds."""
    return pl.any_horizontal([pl.col("kind") == kind for kind in kinds])


def per(total: pl.Expr, count: pl.Expr) -> pl.Expr:
    """total / count, missing where there is nothing to divide by."""
    return pl.when(count > 1e-9).then(total / count)


def spread(count: pl.Expr, total: pl.Expr, squares: pl.Expr) -> pl.Expr:
    """Standard deviation from sums."""
    mean = per(total, count)
    return (per(squares, count) - mean * mean).clip(lower_bound=0.0).sqrt()


def since(time: pl.Expr, now: pl.Expr = T) -> pl.Expr:
    """Days from a time to now, never negative."""
    return (now - time).clip(lower_bound=0) / DAY


def angle(time: pl.Expr, period: int, origin: int = 0) -> pl.Expr:
    """Place in a period, radians."""
    return ((time - origin) % period) * (2 * math.pi / period)


def fade(span: pl.Expr, half_life: float) -> pl.Expr:
    """2^(-span / half-life), microseconds and days."""
    return (span * (-math.log(2) / (half_life * DAY))).exp()


def load(events: str, items: str) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Events by (user, time) with integer ids, and items by code."""
    table = pl.read_parquet(items)
    raw = pl.scan_parquet(events).select("user_id", "item_id", "event", "timestamp", "value", "price")
    names = pl.concat([table["item_id"], raw.select(pl.col("item_id").unique()).collect()["item_id"]]).unique().sort()
    table = pl.DataFrame({"item_id": names}).join(table, on="item_id", how="left", maintain_order="left")
    price = pl.col("price").cast(pl.Float64)
    log_price = pl.when(price >= 0).then(price.log1p())
    created = pl.col("created_at") if "created_at" in table.columns else pl.lit(None)
    table = table.with_columns(
        log_price=log_price, percentile=(log_price.rank("average").over("category") - 0.5) / log_price.count().over("category"),
        created=created.cast(pl.Datetime("us", "UTC")).to_physical(),
        category=pl.col("category").cast(pl.Categorical).to_physical(), brand=pl.col("brand").cast(pl.Categorical).to_physical(),
    )  # fmt: skip
    found = raw.select(
        "user_id", user=pl.col("user_id").cast(pl.Categorical).to_physical(),
        item=pl.col("item_id").cast(pl.Enum(names)).to_physical().cast(pl.Int64),
        kind=pl.col("event").cast(pl.String).cast(pl.Enum(KINDS), strict=False),
        t=pl.col("timestamp").cast(pl.Datetime("us", "UTC")).to_physical(),
        value=pl.col("value").cast(pl.Float64), price=pl.col("price").cast(pl.Float64),
    )  # fmt: skip
    listed = pl.lit(table["log_price"].exp() - 1).gather(pl.col("item"))
    frame = found.sort("user", "t", maintain_order=True).with_columns(price=pl.coalesce("price", listed))
    return frame.collect(), table


class Places:
    """Where the target rows of a frame sorted by (key, time) look: the last row strictly before their moment, if it is of their key."""

    def __init__(self, frame: pl.DataFrame, key: str) -> None:
        new = (pl.col(key) != pl.col(key).shift()).fill_null(True)
        moment = new | (T.shift() != T)
        spots = frame.select(
            first=pl.when(new).then(ROW).forward_fill(), before=pl.when(moment).then(ROW).forward_fill() - 1, keep=pl.col("target")
        ).filter("keep")
        self.first = spots["first"]
        self.before = spots.select(pl.when(pl.col("before") >= pl.col("first")).then("before")).to_series()

    def at(self, running: pl.Expr) -> pl.Expr:
        """A running value of the key as targets see it."""
        return running.gather(self.before)

    def sums(self, x: pl.Expr) -> pl.Expr:
        """The sum over the key, as a difference of the running sum over all rows; 0 where nothing is before."""
        running = x.fill_null(0.0).cum_sum()
        return (running.gather(self.before) - running.gather(self.first) + x.fill_null(0.0).gather(self.first)).fill_null(0.0)

    def last(self, rows: pl.Expr, what: pl.Expr) -> pl.Expr:
        """``what`` in the last of some rows of the key."""
        place = pl.when(rows).then(ROW).forward_fill().gather(self.before)
        return what.gather(pl.when(place >= self.first).then(place))

    def opening(self, rows: pl.Expr, what: pl.Expr) -> pl.Expr:
        """``what`` in the first of some rows of the key."""
        place = pl.when(rows).then(ROW).backward_fill().gather(self.first)
        return what.gather(pl.when(place <= self.before).then(place))


def user_states(frame: pl.DataFrame, half_lives: Sequence[float]) -> pl.DataFrame:
    """What targets see of their user, one row per target in the order of the frame."""
    start = frame["t"].min()
    hour, week = angle(T, DAY), angle(T, WEEK, MONDAY)
    paid_amount = (pl.col("price") * pl.col("value").abs().fill_null(1.0)).clip(lower_bound=0.0)
    # what several sums share is a column first; windows over a key that is known to be sorted, run eagerly, are the fastest
    frame = frame.with_columns(
        pl.col("user").set_sorted(), log_price=pl.col("price").clip(lower_bound=0.0).log1p(), amount=paid_amount,
        log_amount=paid_amount.log1p(), cos=hour.cos(), sin=hour.sin(), week_cos=week.cos(), week_sin=week.sin(),
        weekend=((T - MONDAY) % WEEK >= 5 * DAY).cast(pl.Float64), pause=T - T.shift().over("user"),
        **{f"w{h}": ((T - start) * (math.log(2) / (h * DAY))).exp() for h in (*half_lives, LONG / 2)},
    )  # fmt: skip
    spot = Places(frame, "user")
    weight = {h: pl.col(f"w{h}") for h in (*half_lives, LONG / 2)}
    now = T.filter("target")
    known = pl.col("price").is_not_null()
    log_price, amount, log_amount, pause = (pl.col(name) for name in ("log_price", "amount", "log_amount", "pause"))
    buys, looks, every = is_("purchase"), is_("view", "click"), T.is_not_null()
    seen = is_("view", "click", "add_to_cart") & known
    paid, rated = buys & known, is_("rating") & pl.col("value").is_not_null()

    def total(rows: pl.Expr, what: pl.Expr | float = 1.0, h: float = 0.0) -> pl.Expr:
        x = pl.lit(what) if isinstance(what, float) else what
        x = pl.when(rows).then(x * weight[h] if h else x).otherwise(0.0)
        running = spot.sums(x) if h != 1.0 else spot.at(x.cum_sum().over("user")).fill_null(0.0)
        return running * fade(now - start, h) if h else running

    begins = pause.is_null() | (pause > SESSION)
    bought_at = pl.when(buys).then(T).forward_fill().over("user").shift().over("user")
    basket = buys & (bought_at.is_null() | (bought_at != T))
    columns = {f"{kind}{h}": total(is_(kind), 1.0, h) for h in half_lives for kind in KINDS}
    columns |= {
        "first": spot.opening(every, T), "last": spot.last(every, T), "looked": spot.last(looks, T), "bought": spot.last(buys, T),
        "first_bought": spot.opening(buys, T), "sessions": total(begins), "session": spot.last(begins, T),
        "inside": total(~begins, pause / DAY), "events": total(every), "baskets": total(basket), "lines": total(buys),
        "again": total(buys & pl.col("again")), "lines_l": total(buys, 1.0, LONG), "again_l": total(buys & pl.col("again"), 1.0, LONG),
        "priced": total(paid), "log_amount": total(paid, log_amount), "log_amount2": total(paid, log_amount**2),
        "amount": total(paid, amount), "amount_l": total(paid, amount, LONG), "paid_n": total(paid, 1.0, LONG),
        "paid": total(paid, log_price, LONG), "paid2": total(paid, log_price**2, LONG), "seen_n": total(seen, 1.0, LONG),
        "seen": total(seen, log_price, LONG),
        **{each: total(every, pl.col(each)) for each in ("cos", "sin", "week_cos", "week_sin", "weekend")},
        "returns": total(is_("return")), "rated": total(rated), "rating": total(rated, pl.col("value")),
        "rating2": total(rated, pl.col("value") ** 2),
    }  # fmt: skip
    for name in ("category", "brand"):
        count, there = pl.col(f"in_{name}"), pl.col(name).is_not_null()
        top = pl.when(there).then(count * weight[LONG]).otherwise(0.0).cum_max().over("user")
        columns |= {
            f"{name}_n": total(there, 1.0, LONG), f"{name}_squares": total(there, 2 * count - 1, LONG / 2),
            f"{name}_top": spot.at(top).fill_null(0.0) * fade(now - start, LONG), f"{name}_bought": total(there & buys, 1.0, LONG),
        }  # fmt: skip
    return frame.select(**columns)


def keyed_states(frame: pl.DataFrame, name: str) -> tuple[pl.DataFrame, pl.DataFrame]:
    """What targets see of their user's events with their item's category or brand; and the count after every event. Both by row."""
    code = pl.col(name).cast(pl.Int64).fill_null(-1)  # rows without one stay, so that results lie beside the frame's own
    part = frame.lazy().select("row", "t", "target", key=pl.col("user").cast(pl.Int64) * SPAN + code, there=code >= 0, buys=is_("purchase"))
    table = part.sort("key", maintain_order=True).with_columns(start=_start("key")).collect()
    spot = Places(table, "key")
    weight = ((T - pl.col("start")) * (math.log(2) / (LONG * DAY))).exp()
    fading = fade((T - pl.col("start")).filter("target"), LONG)
    found = {"count": spot.sums(weight) * fading, "bought": spot.sums(pl.when("buys").then(weight)) * fading}
    found |= {"last": spot.last(T.is_not_null(), T)}
    there = pl.col("there").filter("target")
    seen = table.select(row=pl.col("row").filter("target"), **{f"{name}_{each}_k": pl.when(there).then(x) for each, x in found.items()})
    running = weight.cum_sum()
    base = pl.when((pl.col("key") != pl.col("key").shift()).fill_null(True)).then(running - weight).forward_fill()
    after = pl.when("there").then((running - base) * fade(T - pl.col("start"), LONG)).alias(f"in_{name}")
    return seen.sort("row").drop("row"), table.select("row", after).sort("row").drop("row")


def _start(key: str) -> pl.Expr:
    """The time of the first row of each key, in a frame sorted by it."""
    return pl.when((pl.col(key) != pl.col(key).shift()).fill_null(True)).then(T).forward_fill()


def item_states(frame: pl.DataFrame) -> pl.DataFrame:
    """What targets see of their user's events with their item, in the order of the frame."""
    part = frame.lazy().select("row", "user", "t", "target", "item", "kind", "value")
    part = part.with_columns(key=pl.col("user").cast(pl.Int64) * SPAN + pl.col("item"), buys=is_("purchase"))
    part = part.join(part.filter("target").select("key").unique(), on="key", how="semi")  # no other key is asked for
    table = part.sort("key", "row").with_columns(start=_start("key")).drop("user", "item").collect()
    spot = Places(table, "key")
    weight = {h: ((T - pl.col("start")) * (math.log(2) / (h * DAY))).exp() for h in (SHORT, LONG)}
    buys, looks, carts, rated = pl.col("buys"), is_("view", "click"), is_("add_to_cart"), is_("rating") & pl.col("value").is_not_null()
    held = pl.when(buys).then(ROW).forward_fill().shift()  # the purchase before, perhaps of another key
    basket = buys & (held.is_null() | (pl.col("key").gather(held) != pl.col("key")) | (T.gather(held) != T))

    def total(rows: pl.Expr, what: pl.Expr | None = None, h: float = 0.0) -> pl.Expr:
        x = pl.lit(1.0) if what is None else what
        found = spot.sums(pl.when(rows).then(x * weight[h] if h else x).otherwise(0.0))
        return found * fade((T - pl.col("start")).filter("target"), h) if h else found

    return table.select(
        row=pl.col("row").filter("target"), i_baskets=total(basket), i_bought=spot.last(buys, T), i_first_bought=spot.opening(buys, T),
        i_recent=total(buys, None, LONG), i_quantity=total(buys, pl.col("value").abs().fill_null(1.0)),
        i_last=spot.last(T.is_not_null(), T),
        i_looked=spot.last(looks, T), i_carted=spot.last(carts, T), i_first=spot.opening(T.is_not_null(), T),
        i_looks_s=total(looks, None, SHORT), i_looks_l=total(looks, None, LONG), i_carts=total(carts, None, LONG),
        i_returned=total(is_("return")), i_rating=spot.last(rated, pl.col("value")),
    ).sort("row").drop("row")  # fmt: skip


def features(states: pl.LazyFrame, half_lives: Sequence[float]) -> pl.DataFrame:
    """The features of targets from what they see."""
    c = pl.col
    count, sessions, baskets = c("events"), c("sessions"), c("baskets")
    gap = per((c("bought") - c("first_bought")) / DAY, baskets - 1)
    i_gap = per((c("i_bought") - c("i_first_bought")) / DAY, c("i_baskets") - 1)
    cos, sin, week_cos, week_sin = (per(c(name), count) for name in ("cos", "sin", "week_cos", "week_sin"))
    hour, week = angle(T, DAY), angle(T, WEEK, MONDAY)
    difference = c("log_price") - per(c("paid"), c("paid_n"))
    out = {f"user.activity.{kind}_{h:g}d": c(f"{kind}{h}").log1p() for h in half_lives for kind in KINDS}
    out |= {
        "user.recency.tenure": since(c("first")).log1p(), "user.recency.any": since(c("last")).log1p(),
        "user.recency.look": since(c("looked")).log1p(), "user.recency.purchase": since(c("bought")).log1p(),
        "user.sessions.count": sessions.log1p(), "user.sessions.events": per(count, sessions).log1p(),
        "user.sessions.minutes": per(c("inside") * 1440.0, sessions).log1p(), "user.sessions.start": since(c("session")).log1p(),
        "user.sessions.gap": per((c("session") - c("first")) / DAY, sessions - 1).log1p(),
        "user.sessions.open": pl.when(sessions > 0).then((T - c("last") <= SESSION).cast(pl.Float64)).otherwise(0.0),
        "user.baskets.count": baskets.log1p(), "user.baskets.size": per(c("lines"), baskets).log1p(), "user.baskets.gap": gap.log1p(),
        "user.baskets.due": per(since(c("bought")), gap).log1p(),
        "user.repeats.rate": per(c("again"), c("lines")), "user.repeats.recent": per(c("again_l"), c("lines_l")),
        "user.spend.mean": per(c("log_amount"), c("priced")), "user.spend.std": spread(c("priced"), c("log_amount"), c("log_amount2")),
        "user.spend.total": c("amount").log1p(), "user.spend.recent": c("amount_l").log1p(),
        "user.price_level.bought": per(c("paid"), c("paid_n")), "user.price_level.bought_std": spread(c("paid_n"), c("paid"), c("paid2")),
        "user.price_level.seen": per(c("seen"), c("seen_n")),
        "user.rhythm.hour_cos": cos, "user.rhythm.hour_sin": sin, "user.rhythm.hour_match": cos * hour.cos() + sin * hour.sin(),
        "user.rhythm.weekday_match": week_cos * week.cos() + week_sin * week.sin(), "user.rhythm.weekend": per(c("weekend"), count),
        "user.returns.rate": c("returns") / (c("lines") + c("returns") + 5.0),
        "user.ratings.count": c("rated").log1p(), "user.ratings.mean": per(c("rating"), c("rated")),
        "user.ratings.std": spread(c("rated"), c("rating"), c("rating2")),
    }  # fmt: skip
    for name in ("category", "brand"):
        n = c(f"{name}_n")
        out |= {
            f"user.{name}.top": per(c(f"{name}_top"), n).clip(upper_bound=1.0),
            f"user.{name}.breadth": per(n * n, c(f"{name}_squares")).clip(lower_bound=1.0).log(),
        }
    out |= {
        "user_item.bought.times": c("i_baskets").log1p(), "user_item.bought.share": per(c("i_baskets"), baskets).fill_null(0.0),
        "user_item.bought.recent": c("i_recent").log1p(), "user_item.bought.quantity": c("i_quantity").log1p(),
        "user_item.bought.due": per(since(c("i_bought")), i_gap).log1p(),
        "user_item.recency.any": since(c("i_last")).log1p(), "user_item.recency.look": since(c("i_looked")).log1p(),
        "user_item.recency.cart": since(c("i_carted")).log1p(), "user_item.recency.purchase": since(c("i_bought")).log1p(),
        "user_item.recency.first": since(c("i_first")).log1p(), "user_item.interest.looks_7d": c("i_looks_s").log1p(),
        "user_item.interest.looks_30d": c("i_looks_l").log1p(), "user_item.interest.carts": c("i_carts").log1p(),
        "user_item.interest.returned": c("i_returned").log1p(), "user_item.interest.rating": c("i_rating"),
    }  # fmt: skip
    for name in ("category", "brand"):
        held, bought = c(f"{name}_count_k").fill_null(0.0), c(f"{name}_bought_k").fill_null(0.0)
        out |= {
            f"user_item.{name}.share": per(held, c(f"{name}_n")), f"user_item.{name}.bought_share": per(bought, c(f"{name}_bought")),
            f"user_item.{name}.bought": bought.log1p(), f"user_item.{name}.recency": since(c(f"{name}_last_k")).log1p(),
        }  # fmt: skip
    out |= {"user_item.price.difference": difference, "user_item.price.distance": difference.abs()}
    keys = ("user_id", "timestamp", "item_id", "event")
    return states.select(*keys, **{name: made.cast(pl.Float32) for name, made in out.items()}).collect()


def user_features(frame: pl.DataFrame, items: pl.DataFrame, half_lives: Sequence[float]) -> pl.DataFrame:
    """Point-in-time user and user-item features of every target event."""
    at = pl.col("item")
    frame = frame.with_columns(
        row=ROW, target=is_("purchase"), category=pl.lit(items["category"]).gather(at), brand=pl.lit(items["brand"]).gather(at)
    )
    firsts = frame.lazy().filter(is_("purchase")).group_by("user", "item").agg(first_bought=T.min())
    again = frame.lazy().filter(is_("purchase")).select("row", "user", "item", "t").join(firsts, on=("user", "item"))
    again = again.select("row", again=pl.col("first_bought") < T)
    seen, marks = zip(*(keyed_states(frame, name) for name in ("category", "brand")), strict=True)
    marked = frame.lazy().join(again, on="row", how="left", maintain_order="left").with_columns(pl.col("again").fill_null(False))
    states = user_states(pl.concat([marked.collect(), *marks], how="horizontal"), half_lives)
    wide = frame.lazy().filter("target").select(
        "row", "user_id", "t", timestamp=T.cast(pl.Datetime("us", "UTC")), item_id=pl.lit(items["item_id"]).gather(at),
        event=pl.col("kind").cast(pl.String), log_price=pl.lit(items["log_price"]).gather(at),
    ).collect()  # fmt: skip
    found = pl.concat([wide, states, item_states(frame), *seen], how="horizontal")
    return features(found.lazy(), half_lives)


def tick_features(frame: pl.DataFrame, items: pl.DataFrame, half_lives: Sequence[float], tick: int) -> pl.DataFrame:
    """Item features at the end of every tick in which something happened to the item."""
    c = pl.col
    known = c("price").is_not_null()
    log_price = c("price").clip(lower_bound=0.0).log1p()
    buys, rated = is_("purchase"), is_("rating") & c("value").is_not_null()
    rows = frame.lazy().with_columns(tick=T // tick)
    rows = rows.with_columns(**{f"w{h}": fade((c("tick") + 1) * tick - T, h) for h in half_lives})

    def total(mask: pl.Expr, what: pl.Expr | float = 1.0) -> pl.Expr:
        return pl.when(mask).then(what).otherwise(0.0).sum()

    sums = {f"{kind}{h}": total(is_(kind), c(f"w{h}")) for h in half_lives for kind in KINDS}
    sums |= {f"all{h}": c(f"w{h}").sum() for h in (SHORT, LONG)}
    sums |= {
        "looks": total(is_("view", "click"), c(f"w{LONG}")), "paid_n": total(buys & known, c(f"w{LONG}")),
        "paid": total(buys & known, log_price * c(f"w{LONG}")), "bought": total(buys), "returned": total(is_("return")),
        "rated": total(rated), "rating": total(rated, c("value")), "rating2": total(rated, c("value") ** 2),
    }  # fmt: skip
    times = {"first": T.min(), "last": T.max(), "sold": pl.when(buys).then(T).max()}
    pairs = rows.group_by("item", "tick").agg(**sums, **times)
    fresh = rows.filter(buys).group_by("user", "item", "tick").agg(w=c(f"w{LONG}").min())  # of the first purchase, which faded longest
    fresh = fresh.group_by("item", "tick").agg(fresh=pl.len().cast(pl.Float64), fresh_l=c("w").sum())
    pairs = pairs.join(fresh, on=("item", "tick"), how="left").with_columns(c("fresh", "fresh_l").fill_null(0.0))
    table = pairs.sort("item", "tick").with_columns(c("item").set_sorted()).collect()
    start = frame["t"].min()
    span = (c("tick") + 1) * tick - start

    def decayed(name: str, h: float) -> pl.Expr:
        return (c(name) / fade(span, h)).cum_sum().over("item") * fade(span, h)

    fading = {name: decayed(name, float(name.lstrip("abcdefghijklmnopqrstuvwxyz_"))) for name in sums if name[-1].isdigit() and "." in name}
    fading |= {name: decayed(name, LONG) for name in ("looks", "paid_n", "paid")}
    fading |= {name: c(name).cum_sum().over("item") for name in ("bought", "returned", "rated", "rating", "rating2")}
    fading |= {"fresh_l": decayed("fresh_l", LONG), "fresh": c("fresh").cum_sum().over("item")}
    fading |= {"first": c("first").cum_min().over("item"), "last": c("last").cum_max().over("item")}
    fading |= {"sold": c("sold").cum_max().over("item").forward_fill().over("item")}
    at = c("item")
    states = table.select(
        "item", "tick", now=(c("tick") + 1) * tick, log_price=pl.lit(items["log_price"]).gather(at),
        percentile=pl.lit(items["percentile"]).gather(at), created=pl.lit(items["created"]).gather(at), **fading,
    )  # fmt: skip
    now, looks = c("now"), pl.when(c("looks") > 0).then(c("looks"))
    paid = per(c("paid"), c("paid_n"))
    listed = pl.when(c("created") <= now).then((now - c("created")) / DAY)

    def trend(name: str) -> pl.Expr:
        late, lasting = (c(f"{name}{h}") * math.log(2) / h for h in (SHORT, LONG))
        return ((late + 0.1) / (lasting + 0.1)).log()

    out = {f"item.activity.{kind}_{h:g}d": c(f"{kind}{h}").log1p() for h in half_lives for kind in KINDS}
    out |= {
        "item.conversion.purchase": ((c(f"purchase{LONG}") + 1) / (looks + 20)).log(),
        "item.conversion.cart": ((c(f"add_to_cart{LONG}") + 1) / (looks + 20)).log(),
        "item.price.paid": pl.coalesce(paid, "log_price"), "item.price.percentile": c("percentile"),
        "item.price.relative": c("log_price") - paid,
        "item.age.age": pl.coalesce(listed, since(c("first"), now)).log1p(), "item.age.seen": since(c("last"), now).log1p(),
        "item.age.sold": since(c("sold"), now).log1p(), "item.returns.rate": c("returned") / (c("bought") + c("returned") + 10.0),
        "item.trend.purchases": trend("purchase"), "item.trend.events": trend("all"), "item.buyers.recent": c("fresh_l").log1p(),
        "item.buyers.all": c("fresh").log1p(), "item.buyers.lines": per(c("bought"), c("fresh")).log(),
        "item.ratings.count": c("rated").log1p(), "item.ratings.mean": per(c("rating"), c("rated")),
        "item.ratings.std": spread(c("rated"), c("rating"), c("rating2")),
    }  # fmt: skip
    made = {name: value.cast(pl.Float32) for name, value in out.items()}
    return states.select("tick", item_id=pl.lit(items["item_id"]).gather(at), **made)


def run(events: str, items: str, out: Path, half_lives: Sequence[float] = (1.0, SHORT, LONG), tick: int = DAY) -> float:
    """Everything, written to a folder; the seconds it took."""
    began = time.perf_counter()
    frame, table = load(events, items)
    tick_features(frame, table, half_lives, tick).write_parquet(out / "item_ticks.parquet", compression="zstd", compression_level=1)
    rows = user_features(frame, table, half_lives)
    rows.write_parquet(out / "user_events.parquet", compression="zstd", compression_level=1)
    return time.perf_counter() - began


if __name__ == "__main__":
    print(run(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
