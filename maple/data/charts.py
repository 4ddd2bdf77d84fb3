"""Bars of a data report as inline SVG, straight from a profile's histograms; the parent's are drawn over them as a line.

Drawn by hand: every ingestion writes such a page, and a plotting library would take longer than reading a small batch. Colours are the
page's CSS variables, so one drawing fits light and dark.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta

from markupsafe import Markup, escape

from maple.data.profile import ColumnProfile, bin_edges

MAX_BARS = 48
HALF, WHOLE = 520.0, 1060.0  # widths
HEIGHT, LEFT, BOTTOM, TOP = 220.0, 56.0, 26.0, 10.0


def bars(
    title: str,
    labels: Sequence[str],
    values: Sequence[float],
    over: Sequence[float] | None,
    tell: Callable[[float], str],
    width: float = HALF,
) -> Markup:
    """One ``<svg>``: a bar per value, ``over`` as a stepped line, labels below and at the side, a text for screen readers."""
    top = max([*values, *(over or ()), 0.0]) or 1.0
    step = (width - LEFT) / max(len(values), 1)
    floor, tall = HEIGHT - BOTTOM, HEIGHT - BOTTOM - TOP
    parts = [
        f'<line x1="{LEFT}" x2="{width}" y1="{floor - tall * share:.1f}" y2="{floor - tall * share:.1f}" stroke="var(--line)"/>'
        f'<text x="{LEFT - 6}" y="{floor - tall * share + 4:.1f}" text-anchor="end" fill="var(--muted)">{escape(tell(top * share))}</text>'
        for share in (0.0, 0.5, 1.0)
    ]
    for place, value in enumerate(values):
        high = tall * value / top
        hint = escape(f"{labels[place]}: {tell(value)}" + (f" (parent {tell(over[place])})" if over else ""))
        box = f'x="{LEFT + place * step + step * 0.08:.1f}" y="{floor - high:.1f}" width="{step * 0.84:.1f}" height="{high:.1f}"'
        parts.append(f'<rect {box} fill="var(--s1)"><title>{hint}</title></rect>')
    if over:
        points = [
            f"{LEFT + (place + side) * step:.1f},{floor - tall * value / top:.1f}" for place, value in enumerate(over) for side in (0, 1)
        ]
        parts.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="var(--s2)" stroke-width="1.6"/>')
    every = max(1, -(-len(labels) // round(width / 80)))
    for place in range(0, len(labels), every):
        at = LEFT + (place + 0.5) * step
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - 8}" text-anchor="middle" fill="var(--muted)">{escape(labels[place])}</text>')
    told = escape(title + ": " + ", ".join(f"{label} {tell(value)}" for label, value in zip(labels, values, strict=True)))
    head = f'<svg viewBox="0 0 {width:g} {HEIGHT:g}" role="img" aria-label="{told}" font-size="11">'
    return Markup(head + "".join(parts) + "</svg>")  # noqa: S704  every text in it is escaped above


def number_bars(title: str, column: ColumnProfile, parent: ColumnProfile | None) -> Markup:
    """The histogram of a number column, as shares of its rows with a value, on the logarithmic scale of its bins."""
    both = {*column.bins, *(parent.bins if parent is not None else ())}
    negative, positive = ([code for code in both if code * sign > 0] for sign in (-1, 1))
    codes = [*_span(negative), *([0] if 0 in both else []), *_span(positive)]
    joined = -(-len(codes) // MAX_BARS)
    groups = [codes[start : start + joined] for start in range(0, len(codes), joined)]
    labels = [short(bin_edges(group[0])[0]) for group in groups]
    return bars(title, labels, _shares(column, groups), None if parent is None else _shares(parent, groups), "{:.1%}".format)


def day_bars(title: str, column: ColumnProfile, parent: ColumnProfile | None) -> Markup:
    """Rows per day, or per as many days as fit."""
    width = max(column.width, parent.width if parent is not None else 1)
    days = {code * column.width for code in column.bins} | {code * parent.width for code in (parent.bins if parent is not None else ())}  # type: ignore[union-attr]
    first, last = min(days, default=0), max(days, default=0)
    width *= -(-((last - first) // width + 1) // (2 * MAX_BARS))
    places = range(first // width, last // width + 1)
    labels = [f"{datetime(1970, 1, 1, tzinfo=UTC) + timedelta(days=place * width):%Y-%m-%d}" for place in places]

    def rows(of: ColumnProfile) -> list[float]:
        out = [0.0] * len(places)
        for code, count in of.bins.items():
            out[code * of.width // width - places.start] += count
        return out

    return bars(title, labels, rows(column), None if parent is None else rows(parent), "{:,.0f}".format, WHOLE)


def short(value: float) -> str:
    """A number of few characters."""
    return f"{value:,.0f}" if 100 <= abs(value) < 1e6 else f"{value:.3g}"


def _span(codes: Sequence[int]) -> range:
    return range(min(codes), max(codes) + 1) if codes else range(0)


def _shares(column: ColumnProfile, groups: Sequence[Sequence[int]]) -> list[float]:
    total = max(sum(column.bins.values()), 1)
    return [sum(column.bins.get(code, 0) for code in group) / total for group in groups]
