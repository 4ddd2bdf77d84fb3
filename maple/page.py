"""The page of a report: typed blocks in sections, rendered to one self-contained HTML page without scripts or outside requests.

Every text is escaped by the template; the only markup that passes is SVG that Maple has drawn. Reports of data and of evaluations
share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TypeAlias

import jinja2
from markupsafe import Markup


@dataclass(frozen=True)
class Cell:
    """A table cell: its text, a change beside it, a smaller note below, and tones: any of ``best``, ``good``, ``bad``."""

    text: str
    note: str = ""
    change: str = ""
    tone: str = ""


@dataclass(frozen=True)
class TextBlock:
    """A paragraph; ``lead`` sets it larger, ``note`` smaller."""

    text: str
    style: str = ""


@dataclass(frozen=True)
class FactsBlock:
    """A row of figures: (what, value, note)."""

    facts: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class TableBlock:
    """A table. The first column heads its rows; columns in ``numeric`` are set right."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell | str, ...], ...]
    numeric: tuple[int, ...] = ()


@dataclass(frozen=True)
class FigureBlock:
    """A plot drawn by ``figures``; ``half`` sets two beside each other on wide screens. Text that is not ``Markup`` is escaped."""

    caption: str
    svg: Markup
    half: bool = False


@dataclass(frozen=True)
class Card:
    """One user's example: who, what is known of them, and the recommended items with reasons."""

    title: str
    subtitle: str
    items: tuple[tuple[str, str], ...]
    chips: tuple[str, ...] = ()  # e.g. the last things they bought


@dataclass(frozen=True)
class CardsBlock:
    """Cards beside each other."""

    cards: tuple[Card, ...]


Block: TypeAlias = TextBlock | FactsBlock | TableBlock | FigureBlock | CardsBlock


@dataclass(frozen=True)
class Section:
    """A titled part of the page."""

    title: str
    blocks: tuple[Block, ...]


def render(
    title: str, sections: Sequence[Section], *, subtitle: str = "", facts: Sequence[tuple[str, str]] = (), footer: str = "Made by Maple."
) -> str:
    """The whole page as one HTML string. ``facts`` are (what, value) pairs under the title: data set, bundle digest, date ..."""
    return _template().render(
        title=title, subtitle=subtitle, facts=list(facts), sections=list(sections), footer=footer,
        kind=lambda block: type(block).__name__, cell=lambda value: value if isinstance(value, Cell) else Cell(value),
    )  # fmt: skip


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(resources.files("maple").joinpath("page.html").read_text(encoding="utf-8"))
