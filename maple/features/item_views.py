"""The views of an item, on ticks: sums over all users' events that merge, read at the last closed tick.

Only SUM, MAX and MIN slots: partial states of different users add up. A DISTINCT of users is the ``fresh`` mark of an event.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from maple.features.catalogue import EventColumns
from maple.features.fold import DAY, NEVER, Float64, Op, Slot
from maple.features.user_views import COUNTED, all_of
from maple.features.view import Entity, Feature, Key, ReadContext, View, days, per, put, spread


class ItemView(View):
    """A view with one state per item and tick, and features per item."""

    key = Key.ITEM
    entity = Entity.ITEM


class ItemActivity(ItemView):
    name = "activity"
    doc = "How many events of each kind the item gets lately."

    @property
    def slots(self) -> tuple[Slot, ...]:
        return tuple(Slot(Op.SUM, half_life) for half_life in self.half_lives for _ in COUNTED)

    @property
    def features(self) -> Mapping[str, Feature]:
        return {f"{kind}_{days(h)}": Feature(f"{kind} events", "log(1 + events)", h) for h in self.half_lives for kind in COUNTED}

    def contribute(self, events: EventColumns) -> Float64:
        kinds = [events.is_(kind) for kind in COUNTED]
        return put(events, *((rows, 1.0) for _ in self.half_lives for rows in kinds))

    def read(self, ctx: ReadContext) -> tuple[Float64, ...]:
        return tuple(np.log1p(ctx.now_value(slot)) for slot in range(len(ctx.half_lives)))


class Conversion(ItemView):
    name = "conversion"
    doc = "How often a look becomes a cart or a purchase."

    @property
    def slots(self) -> tuple[Slot, ...]:
        return tuple(Slot(Op.SUM, self.long) for _ in range(3))

    @property
    def features(self) -> Mapping[str, Feature]:
        return {
            "purchase": Feature("(purchases + 1) / (views and clicks + 20); missing where it was never looked at", "log(ratio)", self.long),
            "cart": Feature("(carts + 1) / (views and clicks + 20); missing where it was never looked at", "log(ratio)", self.long),
        }

    def contribute(self, events: EventColumns) -> Float64:
        return put(events, (events.is_("view", "click"), 1.0), (events.is_("purchase"), 1.0), (events.is_("add_to_cart"), 1.0))

    def read(self, ctx: ReadContext) -> tuple[Float64, ...]:
        looks = np.where(ctx.value(0) > 0, ctx.now_value(0), np.nan)
        return np.log((ctx.now_value(1) + 1) / (looks + 20)), np.log((ctx.now_value(2) + 1) / (looks + 20))


class ItemPrice(ItemView):
    name = "price"
    doc = "What the item costs, among its like and against its own past."

    @property
    def slots(self) -> tuple[Slot, ...]:
        return (Slot(Op.SUM, self.long), Slot(Op.SUM, self.long))

    @property
    def features(self) -> Mapping[str, Feature]:
        return {
            "paid": Feature("mean unit price paid, recent more; the catalogue's where nothing was bought", "log(1 + money)", self.long),
            "percentile": Feature("place of the catalogue price in its category", "share, 0 to 1"),
            "relative": Feature("catalogue price minus the mean paid: below 0 is cheaper than usual", "log(1 + money)", self.long),
        }

    def contribute(self, events: EventColumns) -> Float64:
        price = np.log1p(np.maximum(events.price, 0.0))
        bought = events.is_("purchase") & ~np.isnan(price)
        return put(events, (bought, 1.0), (bought, price))

    def read(self, ctx: ReadContext) -> tuple[Float64, ...]:
        assert ctx.item is not None, "item views read the catalogue"
        paid = per(ctx.value(1), ctx.value(0))
        listed = ctx.item.log_price
        return np.where(np.isnan(paid), listed, paid), ctx.item.price_percentile, listed - paid


class ItemAge(ItemView):
    name = "age"
    doc = "How new the item is and when it last sold."
    slots = (Slot(Op.MIN), Slot(Op.MAX), Slot(Op.MAX))
    features = {  # noqa: RUF012
        "age": Feature("time since the item came into the catalogue, or was first seen where that is unknown", "log(1 + days)"),
        "seen": Feature("time since the last event", "log(1 + days)"),
        "sold": Feature("time since the last purchase", "log(1 + days)"),
    }

    def contribute(self, events: EventColumns) -> Float64:
        every = all_of(events)
        return put(events, (every, events.time), (every, events.time), (events.is_("purchase"), events.time))

    def read(self, ctx: ReadContext) -> tuple[Float64, ...]:
        assert ctx.item is not None, "item views read the catalogue"
        created = ctx.item.created
        listed = np.where((created == NEVER) | (created > ctx.now), np.nan, (ctx.now - created) / DAY)
        return np.log1p(np.where(np.isnan(listed), ctx.days_since(0), listed)), np.log1p(ctx.days_since(1)), np.log1p(ctx.days_since(2))


class ItemReturns(ItemView):
    name = "returns"
    doc = "How often the item is sent back."
    slots = (Slot(Op.SUM), Slot(Op.SUM))
    features = {"rate": Feature("returned lines / (bought + returned lines + 10)", "share, 0 to 1")}  # noqa: RUF012

    def contribute(self, events: EventColumns) -> Float64:
        return put(events, (events.is_("purchase"), 1.0), (events.is_("return"), 1.0))

    def read(self, ctx: ReadContext) -> tuple[Float64, ...]:
        return (ctx.value(1) / (ctx.value(0) + ctx.value(1) + 10.0),)


class Trend(ItemView):
    name = "trend"
    doc = "Whether the item is rising: its rate of late against its rate over a longer time."

    @property
    def slots(self) -> tuple[Slot, ...]:
        return (Slot(Op.SUM, self.short), Slot(Op.SUM, self.long), Slot(Op.SUM, self.short), Slot(Op.SUM, self.long))

    @property
    def features(self) -> Mapping[str, Feature]:
        text = f"daily rate of late over the rate over half-life {days(self.long)}, 0.1 a day added to both"
        return {kind: Feature(f"{kind}: {text}", "log(ratio)", self.short) for kind in ("purchases", "events")}

    def contribute(self, events: EventColumns) -> Float64:
        bought, every = events.is_("purchase"), all_of(events)
        return put(events, (bought, 1.0), (bought, 1.0), (every, 1.0), (every, 1.0))

    def read(self, ctx: ReadContext) -> tuple[Float64, ...]:
        def ratio(slot: int) -> Float64:
            # a steady rate of r a day makes a decayed count of r * half-life / ln 2
            late, lasting = (ctx.now_value(slot + n) * np.log(2) / h for n, h in enumerate((self.short, self.long)))
            return np.asarray(np.log((late + 0.1) / (lasting + 0.1)))

        return ratio(0), ratio(2)


class Buyers(ItemView):
    name = "buyers"
    doc = "How many different users buy the item, and how loyally."

    @property
    def slots(self) -> tuple[Slot, ...]:
        return (Slot(Op.SUM, self.long), Slot(Op.SUM), Slot(Op.SUM))

    @property
    def features(self) -> Mapping[str, Feature]:
        return {
            "recent": Feature("distinct buyers per tick, added up", "log(1 + buyers)", self.long),
            "all": Feature("distinct buyers per tick, added up", "log(1 + buyers)"),
            "lines": Feature("purchase lines per distinct buyer and tick", "log(lines)"),
        }

    def contribute(self, events: EventColumns) -> Float64:
        assert events.fresh is not None, "item views need the mark of a user's first purchase in a tick"
        bought = events.is_("purchase")
        fresh = bought & events.fresh
        return put(events, (fresh, 1.0), (fresh, 1.0), (bought, 1.0))

    def read(self, ctx: ReadContext) -> tuple[Float64, ...]:
        return np.log1p(ctx.now_value(0)), np.log1p(ctx.value(1)), np.log(per(ctx.value(2), ctx.value(1)))


class ItemRatings(ItemView):
    name = "ratings"
    doc = "How the item is rated."
    slots = (Slot(Op.SUM), Slot(Op.SUM), Slot(Op.SUM))
    features = {  # noqa: RUF012
        "count": Feature("ratings", "log(1 + ratings)"),
        "mean": Feature("mean rating", "as in the data"),
        "std": Feature("standard deviation of the ratings", "as in the data"),
    }

    def contribute(self, events: EventColumns) -> Float64:
        rated = events.is_("rating") & ~np.isnan(events.value)
        return put(events, (rated, 1.0), (rated, events.value), (rated, events.value**2))

    def read(self, ctx: ReadContext) -> tuple[Float64, ...]:
        count, total = ctx.value(0), ctx.value(1)
        return np.log1p(count), per(total, count), spread(count, total, ctx.value(2))
