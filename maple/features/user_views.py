"""The views of a user: folds over the user's own events, exact to the event."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from maple.data.dataset import Bool, Int64
from maple.features.catalogue import EventColumns, Mark
from maple.features.fold import DAY, Float64, Op, Slot
from maple.features.view import Entity, Feature, Key, ReadContext, View, days, per, put, spread

COUNTED = ("view", "click", "add_to_cart", "purchase", "rating", "return")
WEEK = 7 * DAY
MONDAY = 4 * DAY  # 1970-01-05 was a Monday
MINUTES = 1440  # of a day
SESSION_GAP = 30 / MINUTES  # days; a longer pause ends a session


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
    def features(self) -> Mapping[str, Feature]:
        return {f"{kind}_{days(h)}": Feature(f"{kind} events", "log(1 + events)", h) for h in self.half_lives for kind in COUNTED}

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
        "tenure": Feature("time since the first event", "log(1 + days)"),
        "any": Feature("time since the last event", "log(1 + days)"),
        "look": Feature("time since the last view or click", "log(1 + days)"),
        "purchase": Feature("time since the last purchase", "log(1 + days)"),
    }

    def contribute(self, events: EventColumns) -> Float64:
        everything = all_of(events)
        looks, purchases = events.is_("view", "click"), events.is_("purchase")
        return put(events, (everything, events.time), (everything, events.time), (looks, events.time), (purchases, events.time))

    def read(self, ctx: ReadContext) -> tuple[Float64, ...]:
        return tuple(np.log1p(ctx.days_since(slot)) for slot in range(4))


class Sessions(UserView):
    name = "sessions"
    doc = "Visits: events without a pause of more than 30 minutes between them."
    slots = (
        Slot(Op.SESSIONS, gap=SESSION_GAP), Slot(Op.LAST), Slot(Op.START, gap=SESSION_GAP), Slot(Op.LAST),
        Slot(Op.INSIDE, gap=SESSION_GAP), Slot(Op.LAST), Slot(Op.SUM), Slot(Op.FIRST),
    )  # fmt: skip
    features = {  # noqa: RUF012
        "count": Feature("sessions", "log(1 + sessions)"),
        "events": Feature("mean events of a session", "log(1 + events)"),
        "minutes": Feature("mean length of a session", "log(1 + minutes)"),
        "start": Feature("time since the last session began", "log(1 + days)"),
        "gap": Feature("mean time between the beginnings of sessions; missing below two", "log(1 + days)"),
        "open": Feature("whether a session is going on: its last event is at most 30 minutes ago", "0 or 1"),
    }

    def contribute(self, events: EventColumns) -> Float64:
        every, time = all_of(events), events.time
        return put(events, *((every, time) for _ in range(6)), (every, 1.0), (every, time))

    def read(self, ctx: ReadContext) -> tuple[Float64, ...]:
        count = ctx.value(0)
        open_ = np.where(count > 0, ctx.days_since(1) <= SESSION_GAP, 0.0)
        gap = per((ctx.value(2) - ctx.value(7)) / DAY, count - 1)
        each = (per(ctx.value(6), count), per(ctx.value(4) * MINUTES, count), ctx.days_since(2), gap)
        return (np.log1p(count), *(np.log1p(value) for value in each), open_)


class Baskets(UserView):
    name = "baskets"
    doc = "The rhythm of purchases; a basket is the purchases of one timestamp."
    slots = (Slot(Op.DISTINCT), Slot(Op.LAST), Slot(Op.FIRST), Slot(Op.SUM))
    features = {  # noqa: RUF012
        "count": Feature("baskets", "log(1 + baskets)"),
        "size": Feature("lines per basket", "log(1 + lines)"),
        "gap": Feature("mean time between baskets; missing below two", "log(1 + days)"),
        "due": Feature("time since the last basket as a multiple of the mean time between them; missing below two", "log(1 + ratio)"),
    }

    def contribute(self, events: EventColumns) -> Float64:
        bought = events.is_("purchase")
        return put(events, (bought, events.time), (bought, events.time), (bought, events.time), (bought, 1.0))

    def read(self, ctx: ReadContext) -> tuple[Float64, ...]:
        count = ctx.value(0)
        gap = per((ctx.value(1) - ctx.value(2)) / DAY, count - 1)
        return np.log1p(count), np.log1p(per(ctx.value(3), count)), np.log1p(gap), np.log1p(per(ctx.days_since(1), gap))


class Repeats(UserView):
    name = "repeats"
    doc = "How much of what the user buys they bought before, at an earlier time."
    marks = (Mark.FIRST_BOUGHT,)

    @property
    def slots(self) -> tuple[Slot, ...]:
        return (Slot(Op.SUM), Slot(Op.SUM), Slot(Op.SUM, self.long), Slot(Op.SUM, self.long))

    @property
    def features(self) -> Mapping[str, Feature]:
        return {
            "rate": Feature("share of the purchase lines whose item was bought before", "share, 0 to 1"),
            "recent": Feature("the same, recent lines more", "share, 0 to 1", self.long),
        }

    def contribute(self, events: EventColumns) -> Float64:
        bought = events.is_("purchase")
        again = bought & (events.marks[Mark.FIRST_BOUGHT] < events.time)
        return put(events, (bought, 1.0), (again, 1.0), (bought, 1.0), (again, 1.0))

    def read(self, ctx: ReadContext) -> tuple[Float64, ...]:
        # shares do not depend on the decay to now: both sums shrink alike
        return per(ctx.value(1), ctx.value(0)), per(ctx.value(3), ctx.value(2))


class Spend(UserView):
    name = "spend"
    doc = "What purchase lines cost the user (price times quantity)."

    @property
    def slots(self) -> tuple[Slot, ...]:
        return (Slot(Op.SUM), Slot(Op.SUM), Slot(Op.SUM), Slot(Op.SUM), Slot(Op.SUM, self.long))

    @property
    def features(self) -> Mapping[str, Feature]:
        return {
            "mean": Feature("mean amount of a purchase line", "log(1 + money)"),
            "std": Feature("standard deviation of the amount of a purchase line", "log(1 + money)"),
            "total": Feature("amount of all purchases", "log(1 + money)"),
            "recent": Feature("amount of the purchases", "log(1 + money)", self.long),
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

    @property
    def features(self) -> Mapping[str, Feature]:
        return {
            "bought": Feature("mean unit price of purchases, recent ones more", "log(1 + money)", self.long),
            "bought_std": Feature("standard deviation of the unit price of purchases", "log(1 + money)", self.long),
            "seen": Feature("mean unit price of views, clicks and carts, recent ones more", "log(1 + money)", self.long),
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
        "hour_cos": Feature("mean of the hour of day as a point on a circle", "cosine, -1 to 1"),
        "hour_sin": Feature("mean of the hour of day as a point on a circle", "sine, -1 to 1"),
        "hour_match": Feature("agreement of the hour now with the user's hours", "-1 to 1"),
        "weekday_match": Feature("agreement of the weekday now with the user's weekdays", "-1 to 1"),
        "weekend": Feature("share of events on Saturday and Sunday", "share, 0 to 1"),
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
    features = {"rate": Feature("returned lines / (bought + returned lines + 5)", "share, 0 to 1")}  # noqa: RUF012

    def contribute(self, events: EventColumns) -> Float64:
        return put(events, (events.is_("purchase"), 1.0), (events.is_("return"), 1.0))

    def read(self, ctx: ReadContext) -> tuple[Float64, ...]:
        return (ctx.value(1) / (ctx.value(0) + ctx.value(1) + 5.0),)


class Ratings(UserView):
    name = "ratings"
    doc = "How the user rates."
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


class CategoryTaste(UserView):
    name = "category"
    doc = "How narrow the user's interest in categories is."
    mark: ClassVar[Mark] = Mark.IN_CATEGORY
    marks = (Mark.IN_CATEGORY,)

    @property
    def slots(self) -> tuple[Slot, ...]:
        # with n the decayed count of a category, an event adds (n + 1)^2 - n^2 to the sum of squares, which fades twice as fast
        return (Slot(Op.SUM, self.long), Slot(Op.SUM, self.long / 2), Slot(Op.TOP, self.long))

    @property
    def features(self) -> Mapping[str, Feature]:
        return {
            "top": Feature(f"share of the user's events that are in their most frequent {self.name}", "share, 0 to 1", self.long),
            "breadth": Feature(f"effective number of {self.name} values: 1 / sum of squared shares", "log(number)", self.long),
        }

    def contribute(self, events: EventColumns) -> Float64:
        count = events.marks[self.mark]
        known = ~np.isnan(count)
        return put(events, (known, 1.0), (known, 2 * count - 1), (known, count))

    def read(self, ctx: ReadContext) -> tuple[Float64, ...]:
        count = ctx.value(0)
        return np.minimum(per(ctx.value(2), count), 1.0), np.log(np.maximum(per(count * count, ctx.value(1)), 1.0))


class BrandTaste(CategoryTaste):
    name = "brand"
    doc = "How narrow the user's interest in brands is."
    mark: ClassVar[Mark] = Mark.WITH_BRAND
    marks = (Mark.WITH_BRAND,)
