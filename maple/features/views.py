"""All views that are folds over events. A new view is a class in a file of its own or beside its like, and a line here."""

from __future__ import annotations

from maple.features import item_views as item
from maple.features import user_item_views as user_item
from maple.features import user_views as user
from maple.features.view import View

VIEWS: tuple[type[View], ...] = (
    user.Activity,
    user.Recency,
    user.Sessions,
    user.Baskets,
    user.Repeats,
    user.Spend,
    user.PriceLevel,
    user.Rhythm,
    user.Returns,
    user.Ratings,
    user.CategoryTaste,
    user.BrandTaste,
    user_item.Bought,
    user_item.ItemRecency,
    user_item.Interest,
    user_item.CategoryAffinity,
    user_item.BrandAffinity,
    user_item.PriceDistance,
    item.ItemActivity,
    item.Conversion,
    item.ItemPrice,
    item.ItemAge,
    item.ItemReturns,
    item.Trend,
    item.Buyers,
    item.ItemRatings,
)


def view_id(view: type[View]) -> str:
    """The name of a view in settings, e.g. ``user.activity``."""
    return f"{view.entity}.{view.name}"


VIEW_IDS: dict[str, type[View]] = {view_id(view): view for view in VIEWS}
