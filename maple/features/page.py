"""The page of all features, generated from the code: name, meaning, shape, unit, half-life, and what each is kept by and when it moves.

``listing`` is the one list; ``markdown`` and ``plain`` show it to people and to programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from maple.features.spec import CONTEXT_FEATURES, FeatureSpec
from maple.features.view import Entity, Key, View
from maple.features.views import view_id

_HEADINGS = {
    "context": "The moment and the place of a request",
    "user": "A user",
    "user_item": "A user with an item",
    "item": "An item",
}
_SHAPES = {"context": "[queries]", "user": "[queries]", "user_item": "[candidates]", "item": "[candidates]"}


@dataclass(frozen=True)
class Row:
    """One column: its full name, what it says, how it is stored, and in what unit; ``half_life`` in days, None = nothing fades."""

    name: str
    meaning: str
    unit: str
    dtype: str = "float32"
    half_life: float | None = None


@dataclass(frozen=True)
class Group:
    """A view or another source of columns: what it is about, what its state is kept by, and the clock that moves it."""

    name: str
    about: str
    doc: str
    key: str
    clock: str
    rows: tuple[Row, ...]


def listing(spec: FeatureSpec) -> list[Group]:
    """All groups of columns of a spec, in the order of the page."""
    moment = Group(
        "context.moment", "context", "The hour and the weekday of the request (UTC) as points on a circle.", "request", "by request",
        tuple(Row(name, f"{part} of the {what}", "-1 to 1") for name, part, what in (
            (name, "cosine" if name.endswith("cos") else "sine", "hour of day" if "hour" in name else "day of the week")
            for name in CONTEXT_FEATURES
        )),
    )  # fmt: skip
    return [moment, *(_of_view(view, spec) for view in spec.all_views)]


def _of_view(view: View, spec: FeatureSpec) -> Group:
    clock = f"by tick of {spec.tick_hours:g} hours" if view.key == Key.ITEM else "by event"
    rows = tuple(
        Row(name, told.meaning, told.unit, half_life=told.half_life)
        for name, told in zip(view.names, view.features.values(), strict=True)
    )  # fmt: skip
    return Group(view_id(type(view)), view.entity.value, view.doc, view.key.value.replace("_", " and "), clock, rows)


def markdown(groups: Sequence[Group]) -> str:
    """The page."""
    count = sum(len(group.rows) for group in groups)
    lines = ["# Features", "", f"{count} columns in {len(groups)} groups. Missing numbers are NaN, unknown codes -1.", ""]
    for about in ("context", *Entity):
        lines += [f"## {_HEADINGS[about]}", ""]
        for group in (group for group in groups if group.about == about):
            lines += [f"### {group.name}", "", f"{group.doc} Kept per {group.key}, moves {group.clock}.", ""]
            lines += ["| feature | meaning | shape | unit | half-life |", "|---|---|---|---|---|"]
            for row in group.rows:
                fades = "" if row.half_life is None else f"{row.half_life:g} days"
                lines.append(f"| `{row.name}` | {row.meaning} | {row.dtype} {_SHAPES[about]} | {row.unit} | {fades} |")
            lines.append("")
    return "\n".join(lines)


def plain(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The list as JSON-ready values, one per column."""
    return [
        {
            "name": row.name, "view": group.name, "meaning": row.meaning, "dtype": row.dtype, "shape": _SHAPES[group.about],
            "unit": row.unit, "half_life_days": row.half_life, "key": group.key, "clock": group.clock,
        }
        for group in groups for row in group.rows
    ]  # fmt: skip
