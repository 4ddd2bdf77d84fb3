"""The views of a user and of a user with an item: folds over the user's own events, exact to the event."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from maple.data.dataset import Bool, Int64
from maple.features.catalogue import EventColumns
from maple.features.fold import DAY, Float64, Op, Slot
from maple.features.view import Entity, Key, ReadContext, View, days, per, put, spread

COUNTED = ("view", "click", "add_to_cart", "purchase", "rating", "return")
WEEK = 7 * DAY
MONDAY = 4 * DAY  # 1970-01-05 was a Monday


def all_of(events: EventColumns) -> Bool:
    """Every event."""
    return np.ones(len(events), bool)


def angle(time: Int64, period: int, origin: int = 0) -> Float64:
    """Place in a period as an angle, radians."""
    return np.asarray(((time - origin) % period) * (2 * np.pi / period))


class UserView(View):
    """A view with one state per user and features per user."""

    key = Key.USER
    entity = Entity.USER


class Activity(UserView):
    name = "activity"
    doc = "How many events of each kind the user made lately."

    @property
    def slots(self) -> tuple[Slot, ...]:
        return tuple(Slot(Op.SUM, half_life) for half_life in self.half_lives for _ in COUNTED)

    @property
    def features(self) -> Mapping[str, str]:
        return {f"{kind}_{days(h)}": f"log(1 + {kind} events, half-life {days(h)})" for h in self.half_lives for kind in COUNTED}

    def contribute(self, events: EventColumns) -> Float64:
        kinds = [events.is_(kind) for kind in COUNTED]
        return put(events, *((rows, 1.0) for _ in self.half_lives for rows in kinds))

    def read(self, ctx: ReadContext) -> tuple[Float64, ...]:
        return tuple(np.log1p(ctx.now_value(slot)) for slot in range(len(ctx.half_lives)))


class Recency(UserView):
    name = "recency"
    doc = "How long ago the user was here, looked and bought, and how long they are a customer."
    slots = (Slot(Op.FIRST), Slot(Op.LAST), Slot(Op.LAST), Slot(Op.LAST))
    features = {  # noqa: RUF012  # a constant
        "tenure": "log(1 + days since the first event)",
        "any": "log(1 + days since the last event)",
        "look": "log(1 + days since the last view or click)",
        "purchase": "log(1 + days since the last purchase)",
    }

    def contribute(self, events: EventColumns) -> Float64:
        everything = all_of(events)
        looks, purchases = events.is_("view", "click"), events.is_("purchase")
        return put(events, (everything, events.time), (everything, events.time), (looks, events.time), (purchases, events.time))

    def read(self, ctx: ReadContext) -> tuple[Float64, ...]:
        return tuple(np.log1p(ctx.days_since(slot)) for slot in range(4))


class Baskets(UserView):
    name = "baskets"
    doc = "The rhythm of purchases; a basket is the purchases of one timestamp."
    slots = (Slot(Op.DISTINCT), Slot(Op.LAST), Slot(Op.FIRST), Slot(Op.SUM))
    features = {  # noqa: RUF012
        "count": "log(1 + baskets)",
        "size": "log(1 + lines per basket)",
        "gap": "log(1 + mean days between baskets); missing below two",
        "due": "log(1 + days since the last basket / mean days between baskets); missing below two",
    }

    def contribute(self, events: EventColumns) -> Float64:
        bought = events.is_("purchase")
        return put(events, (bought, events.time), (bought, events.time), (bought, events.time), (bought, 1.0))

    def read(self, ctx: ReadContext) -> tuple[Float64, ...]:
        count = ctx.value(0)
        gap = per((ctx.value(1) - ctx.value(2)) / DAY, count - 1)
        return np.log1p(count), np.log1p(per(ctx.value(3), count)), np.log1p(gap), np.log1p(per(ctx.days_since(1), gap))


class Spend(UserView):
    name = "spend"
    doc = "What purchase lines cost the user (price times quantity)."

    @property
    def slots(self) -> tuple[Slot, ...]:
        return (Slot(Op.SUM), Slot(Op.SUM), Slot(Op.SUM), Slot(Op.SUM), Slot(Op.SUM, self.long))

    @property
    def features(self) -> Mapping[str, str]:
        return {
            "mean": "mean log(1 + amount) of a purchase line",
            "std": "standard deviation of log(1 + amount)",
            "total": "log(1 + amount of all purchases)",
            "recent": f"log(1 + amount, half-life {days(self.long)})",
        }

    def contribute(self, events: EventColumns) -> Float64:
        amount = np.maximum(events.price * events.quantity, 0.0)
        priced = events.is_("purchase") & ~np.isnan(amount)
        logged = np.log1p(amount)
        return put(events, (priced, 1.0), (priced, logged), (priced, logged**2), (priced, amount), (priced, amount))

    def read(self, ctx: ReadContext) -> tuple[Float64, ...]:
        count, total = ctx.value(0), ctx.value(1)
        return per(total, count), spread(count, total, ctx.value(2)), np.log1p(ctx.value(3)), np.log1p(ctx.now_value(4))


class PriceLevel(UserView):
    name = "price_level"
    doc = "How expensive the things are that the user buys and looks at."

    @property
    def slots(self) -> tuple[Slot, ...]:
        return tuple(Slot(Op.SUM, self.long) for _ in range(5))

    features = {  # noqa: RUF012
        "bought": "mean log(1 + unit price) of purchases, recent ones more",
        "bought_std": "standard deviation of log(1 + unit price) of purchases",
        "seen": "mean log(1 + unit price) of views, clicks and carts, recent ones more",
    }

    def contribute(self, events: EventColumns) -> Float64:
        price = np.log1p(np.maximum(events.price, 0.0))
        bought = events.is_("purchase") & ~np.isnan(price)
        seen = events.is_("view", "click", "add_to_cart") & ~np.isnan(price)
        return put(events, (bought, 1.0), (bought, price), (bought, price**2), (seen, 1.0), (seen, price))

    def read(self, ctx: ReadContext) -> tuple[Float64, ...]:
        # means do not depend on the decay to now: both sums shrink alike
        count, total = ctx.value(0), ctx.value(1)
        return per(total, count), spread(count, total, ctx.value(2)), per(ctx.value(4), ctx.value(3))


class Rhythm(UserView):
    name = "rhythm"
    doc = "At which hour and day the user is active, and whether now is such a moment (UTC)."
    slots = tuple(Slot(Op.SUM) for _ in range(6))
    features = {  # noqa: RUF012
        "hour_cos": "mean cosine of the hour of day",
        "hour_sin": "mean sine of the hour of day",
        "hour_match": "agreement of the hour now with the user's hours, -1 to 1",
        "weekday_match": "agreement of the weekday now with the user's weekdays, -1 to 1",
        "weekend": "share of events on Saturday and Sunday",
    }

    def contribute(self, events: EventColumns) -> Float64:
        every = all_of(events)
        hour, weekday = angle(events.time, DAY), angle(events.time, WEEK, MONDAY)
        weekend = ((events.time - MONDAY) % WEEK >= 5 * DAY).astype(np.float64)
        what = (1.0, np.cos(hour), np.sin(hour), np.cos(weekday), np.sin(weekday), weekend)
        return put(events, *((every, part) for part in what))

    def read(self, ctx: ReadContext) -> tuple[Float64, ...]:
        cos, sin, week_cos, week_sin, weekend = (per(ctx.value(slot), ctx.value(0)) for slot in range(1, 6))
        hour, week = angle(ctx.now, DAY), angle(ctx.now, WEEK, MONDAY)
        return cos, sin, cos * np.cos(hour) + sin * np.sin(hour), week_cos * np.cos(week) + week_sin * np.sin(week), weekend


class Returns(UserView):
    name = "returns"
    doc = "How often the user sends things back."
    slots = (Slot(Op.SUM), Slot(Op.SUM))
    features = {"rate": "returned lines / (bought + returned lines + 5)"}  # noqa: RUF012

    def contribute(self, events: EventColumns) -> Float64:
        return put(events, (events.is_("purchase"), 1.0), (events.is_("return"), 1.0))

    def read(self, ctx: ReadContext) -> tuple[Float64, ...]:
        return (ctx.value(1) / (ctx.value(0) + ctx.value(1) + 5.0),)


class Ratings(UserView):
    name = "ratings"
    doc = "How the user rates."
    slots = (Slot(Op.SUM), Slot(Op.SUM), Slot(Op.SUM))
    features = {  # noqa: RUF012
        "count": "log(1 + ratings)",
        "mean": "mean rating, in the units of the data",
        "std": "standard deviation of the ratings",
    }

    def contribute(self, events: EventColumns) -> Float64:
        rated = events.is_("rating") & ~np.isnan(events.value)
        return put(events, (rated, 1.0), (rated, events.value), (rated, events.value**2))

    def read(self, ctx: ReadContext) -> tuple[Float64, ...]:
        count, total = ctx.value(0), ctx.value(1)
        return np.log1p(count), per(total, count), spread(count, total, ctx.value(2))


# -- a user with an item -----------------------------------------------------------------------------------------------


class UserItemView(View):
    """A view with one state per user and item, and features per user and item."""

    key = Key.USER_ITEM
    entity = Entity.USER_ITEM


class Bought(UserItemView):
    name = "bought"
    doc = "How often the user bought the item, and whether it is due again."
    uses_total = True

    @property
    def slots(self) -> tuple[Slot, ...]:
        return (Slot(Op.DISTINCT), Slot(Op.LAST), Slot(Op.FIRST), Slot(Op.SUM, self.long), Slot(Op.SUM))

    @property
    def features(self) -> Mapping[str, str]:
        return {
            "times": "log(1 + baskets with the item)",
            "share": "share of the user's baskets that have the item, 0 to 1",
            "recent": f"log(1 + purchases of the item, half-life {days(self.long)})",
            "quantity": "log(1 + units bought)",
            "due": "log(1 + days since the last purchase / mean days between purchases of the item); missing below two",
        }

    def contribute(self, events: EventColumns) -> Float64:
        bought = events.is_("purchase")
        return put(events, (bought, events.time), (bought, events.time), (bought, events.time), (bought, 1.0), (bought, events.quantity))

    def read(self, ctx: ReadContext) -> tuple[Float64, ...]:
        times = ctx.value(0)
        gap = per((ctx.value(1) - ctx.value(2)) / DAY, times - 1)
        share = np.nan_to_num(per(times, ctx.now_total(0)))
        return np.log1p(times), share, np.log1p(ctx.now_value(3)), np.log1p(ctx.value(4)), np.log1p(per(ctx.days_since(1), gap))


class ItemRecency(UserItemView):
    name = "recency"
    doc = "How long ago the user met the item."
    slots = (Slot(Op.LAST), Slot(Op.LAST), Slot(Op.LAST), Slot(Op.LAST), Slot(Op.FIRST))
    features = {  # noqa: RUF012
        "any": "log(1 + days since the last event with the item)",
        "look": "log(1 + days since the last view or click)",
        "cart": "log(1 + days since it was last put in the cart)",
        "purchase": "log(1 + days since the last purchase)",
        "first": "log(1 + days since the first event with the item)",
    }

    def contribute(self, events: EventColumns) -> Float64:
        t, every = events.time, all_of(events)
        looks, carts, bought = events.is_("view", "click"), events.is_("add_to_cart"), events.is_("purchase")
        return put(events, (every, t), (looks, t), (carts, t), (bought, t), (every, t))

    def read(self, ctx: ReadContext) -> tuple[Float64, ...]:
        return tuple(np.log1p(ctx.days_since(slot)) for slot in range(5))


class Interest(UserItemView):
    name = "interest"
    doc = "How much the user looked at the item and what they said of it."

    @property
    def slots(self) -> tuple[Slot, ...]:
        return (Slot(Op.SUM, self.short), Slot(Op.SUM, self.long), Slot(Op.SUM, self.long), Slot(Op.SUM), Slot(Op.LAST))

    @property
    def features(self) -> Mapping[str, str]:
        return {
            f"looks_{days(self.short)}": f"log(1 + views and clicks, half-life {days(self.short)})",
            f"looks_{days(self.long)}": f"log(1 + views and clicks, half-life {days(self.long)})",
            "carts": f"log(1 + times put in the cart, half-life {days(self.long)})",
            "returned": "log(1 + times sent back)",
            "rating": "the user's last rating of the item",
        }

    def contribute(self, events: EventColumns) -> Float64:
        looks, rated = events.is_("view", "click"), events.is_("rating") & ~np.isnan(events.value)
        return put(events, (looks, 1.0), (looks, 1.0), (events.is_("add_to_cart"), 1.0), (events.is_("return"), 1.0), (rated, events.value))

    def read(self, ctx: ReadContext) -> tuple[Float64, ...]:
        return np.log1p(ctx.now_value(0)), np.log1p(ctx.now_value(1)), np.log1p(ctx.now_value(2)), np.log1p(ctx.value(3)), ctx.value(4)


class CategoryAffinity(View):
    name = "category"
    doc = "How much of what the user does is in the item's category."
    key = Key.USER_CATEGORY
    entity = Entity.USER_ITEM
    uses_total = True

    @property
    def slots(self) -> tuple[Slot, ...]:
        return (Slot(Op.SUM, self.long), Slot(Op.SUM, self.long), Slot(Op.LAST))

    @property
    def features(self) -> Mapping[str, str]:
        group, half_life = self.name, days(self.long)
        return {
            "share": f"share of the user's events that are in the item's {group}, half-life {half_life}",
            "bought_share": f"share of the user's purchases that are in the item's {group}, half-life {half_life}",
            "bought": f"log(1 + purchases in the item's {group}, half-life {half_life})",
            "recency": f"log(1 + days since the last event in the item's {group})",
        }

    def contribute(self, events: EventColumns) -> Float64:
        every = all_of(events)
        return put(events, (every, 1.0), (events.is_("purchase"), 1.0), (every, events.time))

    def read(self, ctx: ReadContext) -> tuple[Float64, ...]:
        events, bought = ctx.now_value(0), ctx.now_value(1)
        return per(events, ctx.now_total(0)), per(bought, ctx.now_total(1)), np.log1p(bought), np.log1p(ctx.days_since(2))


class BrandAffinity(CategoryAffinity):
    name = "brand"
    doc = "How much of what the user does is with the item's brand."
    key = Key.USER_BRAND


class PriceDistance(View):
    name = "price"
    doc = "How far the item's price is from what the user usually pays."
    key = Key.USER
    entity = Entity.USER_ITEM

    @property
    def slots(self) -> tuple[Slot, ...]:
        return (Slot(Op.SUM, self.long), Slot(Op.SUM, self.long))

    features = {  # noqa: RUF012
        "difference": "log(1 + price) of the item minus the user's mean of it over purchases, recent ones more",
        "distance": "absolute difference",
    }

    def contribute(self, events: EventColumns) -> Float64:
        price = np.log1p(np.maximum(events.price, 0.0))
        bought = events.is_("purchase") & ~np.isnan(price)
        return put(events, (bought, 1.0), (bought, price))

    def read(self, ctx: ReadContext) -> tuple[Float64, ...]:
        assert ctx.item is not None, "a view of user and item reads the catalogue"
        difference = ctx.item.log_price - per(ctx.value(1), ctx.value(0))
        return difference, np.abs(difference)
