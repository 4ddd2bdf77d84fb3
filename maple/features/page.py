"""The page of all features, generated from the code: name, meaning, shape, unit, half-life, and what each is kept by and when it moves.

``listing`` is the one list; ``markdown`` and ``plain`` show it to people and to programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from maple.features import together
from maple.features.attributes import Encoding, Field, Kind
from maple.features.spec import CONTEXT_FEATURES, FeatureSpec
from maple.features.view import Entity, Key, View
from maple.features.views import view_id

_HEADINGS = {
    "context": "The moment and the place of a request",
    "user": "A user",
    "user_item": "A user with an item",
    "item": "An item",
}
#: Stands for all columns that are taken by themselves.
ALL = "<column>"
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


def listing(spec: FeatureSpec, encoding: Encoding | None = None) -> list[Group]:
    """All groups of columns of a spec, in the order of the page; with a fitted ``encoding`` the attributes it really has."""
    moment = Group(
        "context.moment", "context", "The hour and the weekday of the request (UTC) as points on a circle.", "request", "by request",
        tuple(Row(name, f"{part} of the {what}", "-1 to 1") for name, part, what in (
            (name, "cosine" if name.endswith("cos") else "sine", "hour of day" if "hour" in name else "day of the week")
            for name in CONTEXT_FEATURES
        )),
    )  # fmt: skip
    return [moment, *(_of_view(view, spec) for view in spec.all_views), *_beside(spec, encoding)]


def _beside(spec: FeatureSpec, encoding: Encoding | None) -> list[Group]:
    """The columns of ``extras``."""
    fields = encoding or _announced(spec)
    out = [
        Group(name, about, doc, key, clock, rows)
        for name, about, doc, key, clock, rows in (
            ("context", "context", "What the request says of its circumstances; offline what the event says that the request led to.",
             "request", "by request", _of_fields(fields.context, "context")),
            ("user.attribute", "user", "Columns of USERS, or what a user was described by since; what a request says goes before.",
             "user", "when it is said", _of_fields(fields.user, "user.attribute")),
            ("item.attribute", "item", "Columns of ITEMS.", "item", "with the bundle", _of_fields(fields.item, "item.attribute")),
        )
    ]  # fmt: skip
    if spec.together is not None:
        asked = spec.together
        doc = f"How often the item was taken within {asked.window_hours:g} hours of the user's last {asked.last} items, by all users."
        rows = tuple(Row(name, told.meaning, told.unit) for name, told in zip(together.NAMES, together.FEATURES.values(), strict=True))
        out.append(Group("user_item.together", "user_item", doc, "pair of items", f"by tick of {asked.tick_days:g} days", rows))
    for name, ref in spec.content.items():
        vector = tuple(Row(f"item.content.{name}.{k}", f"component {k} of the unit vector", "-1 to 1") for k in range(ref.dim))
        like = Row(f"user_item.content.{name}", "likeness to the mean vector of the user's last items", "cosine, -1 to 1")
        out.append(Group(f"item.content.{name}", "item", "The item's content as a vector.", "item", "with the bundle", vector))
        doc = "Whether the item's content is like what the user met last."
        out.append(Group(f"user_item.content.{name}", "user_item", doc, "user", "by event", (like,)))
    return [group for group in out if group.rows]


def _announced(spec: FeatureSpec) -> Encoding:
    """What the settings ask for, before anything is fitted: of "*" one row stands for all."""
    asked = spec.attributes
    user, item = (
        tuple(Field(name, Kind.NUMBER) for name in ((ALL,) if isinstance(names, str) else names)) for names in (asked.user, asked.item)
    )
    return Encoding(tuple(Field(name, Kind.CODE) for name in spec.context), user, item)


def _of_fields(fields: Sequence[Field], prefix: str) -> tuple[Row, ...]:
    return tuple(_row(field, name) for field in fields for name in field.names(prefix))


def _row(field: Field, name: str) -> Row:
    if field.name == ALL:
        return Row(name, "every column that is fit to be a feature: numbers, texts with few values, booleans, lists of texts, times",
                   "as in the data, code, or log(1 + days)", "float32 or int32")  # fmt: skip
    if field.kind == Kind.CODE:
        return Row(name, f"the column `{field.name}`", f"code of {len(field.values)} values" if field.values else "code", "int32")
    meaning = {Kind.TAGS: f"whether `{name.rsplit('.', 1)[1]}` is among `{field.name}`", Kind.TIME: f"time since `{field.name}`"}
    unit = {Kind.TAGS: "0 or 1", Kind.TIME: "log(1 + days)"}
    return Row(name, meaning.get(field.kind, f"the column `{field.name}`"), unit.get(field.kind, "as in the data"))


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
