"""All views, and the page that lists their features. A new view is a class in ``user_views`` or ``item_views`` and a line here."""

from __future__ import annotations

from collections.abc import Sequence

from maple.features import item_views as item
from maple.features import user_views as user
from maple.features.view import View

VIEWS: tuple[type[View], ...] = (
    user.Activity,
    user.Recency,
    user.Baskets,
    user.Spend,
    user.PriceLevel,
    user.Rhythm,
    user.Returns,
    user.Ratings,
    user.Bought,
    user.ItemRecency,
    user.Interest,
    user.CategoryAffinity,
    user.BrandAffinity,
    user.PriceDistance,
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


def catalogue(views: Sequence[View]) -> str:
    """The feature catalogue as Markdown: every view with its key, and every feature with its meaning and unit."""
    lines = ["# Features", "", f"{sum(len(view.names) for view in views)} features of {len(views)} views. Missing values are NaN.", ""]
    for entity in ("user", "user_item", "item"):
        lines += [f"## Features of {entity.replace('_', ' and ')}", ""]
        for view in views:
            if view.entity != entity:
                continue
            clock = "by tick" if view.key == "item" else "by event"
            lines += [f"### {view_id(type(view))}", "", f"{view.doc} One state per {view.key.replace('_', ' and ')}, {clock}.", ""]
            lines += ["| feature | meaning |", "|---|---|"]
            lines += [f"| `{name}` | {view.features[name.rsplit('.', 1)[1]]} |" for name in view.names]
            lines += [""]
    return "\n".join(lines)
