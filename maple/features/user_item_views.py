"""The views of a user with an item: folds over the user's own events with the item, its category or its brand, exact to the event."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from maple.features.catalogue import EventColumns
from maple.features.fold import DAY, Float64, Op, Slot
from maple.features.user_views import all_of
from maple.features.view import Entity, Feature, Key, ReadContext, View, days, per, put


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
    def features(self) -> Mapping[str, Feature]:
        return {
            "times": Feature("baskets with the item", "log(1 + baskets)"),
            "share": Feature("share of the user's baskets that have the item", "share, 0 to 1"),
            "recent": Feature("purchases of the item", "log(1 + purchases)", self.long),
            "quantity": Feature("units bought", "log(1 + units)"),
            "due": Feature("time since its last purchase as a multiple of the mean time between them; missing below two", "log(1 + ratio)"),
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
        "any": Feature("time since the last event with the item", "log(1 + days)"),
        "look": Feature("time since the last view or click", "log(1 + days)"),
        "cart": Feature("time since it was last put in the cart", "log(1 + days)"),
        "purchase": Feature("time since the last purchase", "log(1 + days)"),
        "first": Feature("time since the first event with the item", "log(1 + days)"),
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
    def features(self) -> Mapping[str, Feature]:
        return {
            f"looks_{days(self.short)}": Feature("views and clicks", "log(1 + events)", self.short),
            f"looks_{days(self.long)}": Feature("views and clicks", "log(1 + events)", self.long),
            "carts": Feature("times put in the cart", "log(1 + events)", self.long),
            "returned": Feature("times sent back", "log(1 + events)"),
            "rating": Feature("the user's last rating of the item", "as in the data"),
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
    def features(self) -> Mapping[str, Feature]:
        group = self.name
        return {
            "share": Feature(f"share of the user's events that have the item's {group}", "share, 0 to 1", self.long),
            "bought_share": Feature(f"share of the user's purchases that have the item's {group}", "share, 0 to 1", self.long),
            "bought": Feature(f"purchases that have the item's {group}", "log(1 + purchases)", self.long),
            "recency": Feature(f"time since the last event that has the item's {group}", "log(1 + days)"),
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

    @property
    def features(self) -> Mapping[str, Feature]:
        return {
            "difference": Feature("price of the item minus the mean the user paid, recent purchases more", "log(1 + money)", self.long),
            "distance": Feature("absolute difference", "log(1 + money)", self.long),
        }

    def contribute(self, events: EventColumns) -> Float64:
        price = np.log1p(np.maximum(events.price, 0.0))
        bought = events.is_("purchase") & ~np.isnan(price)
        return put(events, (bought, 1.0), (bought, price))

    def read(self, ctx: ReadContext) -> tuple[Float64, ...]:
        assert ctx.item is not None, "a view of user and item reads the catalogue"
        difference = ctx.item.log_price - per(ctx.value(1), ctx.value(0))
        return difference, np.abs(difference)
