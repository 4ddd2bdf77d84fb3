"""The report's plots, as inline SVG that follows the page: text inherits its font, colours are the page's CSS variables.

Drawn with matplotlib's object interface (no pyplot, no global figure). Colours are drawn as sentinel values and then replaced, so
one SVG fits light and dark; ids get the figure's name, so many fit one page.
"""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from maple.hashing import stable_hash

INK, MUTED, GRID, SURFACE, BASE = "#b00001", "#b00002", "#b00003", "#b00004", "#b00005"
SERIES = tuple(f"#a0000{number}" for number in range(1, 8))
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "line", SURFACE: "surface", BASE: "s0"} | {
    colour: f"s{number}" for number, colour in enumerate(SERIES, 1)
}
_STYLE = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 11.0, "axes.edgecolor": GRID, "axes.linewidth": 0.8,
    "axes.labelcolor": MUTED, "text.color": INK, "xtick.color": GRID, "ytick.color": GRID, "xtick.labelcolor": MUTED,
    "ytick.labelcolor": INK, "xtick.labelsize": 10.0, "ytick.labelsize": 10.5, "axes.titlesize": 11.5, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.titlecolor": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": GRID, "grid.linewidth": 0.7, "axes.axisbelow": True, "ytick.major.size": 0.0, "xtick.major.size": 0.0,
}  # fmt: skip
_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
_LONGEST_LABEL = 34


def draw(name: str, title: str, description: str, size: tuple[float, float], paint: Callable[[Figure], None]) -> Markup:
    """One figure as an ``<svg>`` element with a title and a description for screen readers; ``size`` in inches.

    ``name`` must be unique on the page: it prefixes every id.
    """
    prefix = f"f{stable_hash('figure', name):x}"
    with mpl.rc_context({**_STYLE, "svg.hashsalt": prefix}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser's fonts draw the text, not matplotlib's
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_visible(False)
        paint(figure)
        for axes in figure.axes:
            axes.patch.set_visible(False)
        sink = io.BytesIO()
        figure.savefig(sink, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _for_page(sink.getvalue(), prefix, title, description)


def _for_page(svg: bytes, prefix: str, title: str, description: str) -> Markup:
    root = ET.fromstring(svg)  # noqa: S314  what matplotlib has just written
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == _SVG + "style" or child.tag.endswith("}metadata") or child.tag == "metadata":
                parent.remove(child)
    for element in root.iter():
        element.tag = str(element.tag).removeprefix(_SVG)
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            element.attrib[key.removeprefix(_XLINK)] = _attribute(key, value, prefix)
    view = root.attrib["viewBox"]
    root.attrib.clear()
    root.attrib.update({"viewBox": view, "role": "img", "aria-labelledby": f"{prefix}-title {prefix}-desc"})
    for tag, text in (("desc", description), ("title", title)):
        note = ET.Element(tag, {"id": f"{prefix}-{tag}"})
        note.text = text
        root.insert(0, note)
    return Markup(ET.tostring(root, encoding="unicode"))  # noqa: S704  serialised by ElementTree, which escapes all text


def _attribute(key: str, value: str, prefix: str) -> str:
    if key == "id":
        return f"{prefix}-{value}"
    if key.endswith("href"):
        return value.replace("#", f"#{prefix}-", 1)
    value = re.sub(r"url\(#", f"url(#{prefix}-", value)
    value = re.sub(r"font(-family)?:\s*([\d.]+px)?[^;]*'[^;]*", lambda found: f"font-size: {found[2]}" if found[2] else "", value)
    for colour, variable in _VARIABLES.items():
        value = value.replace(colour, f"var(--{variable})")
    return value


def label(text: str) -> str:
    """A name short enough for an axis, on one line."""
    flat = " ".join(text.split())
    return flat if len(flat) <= _LONGEST_LABEL else flat[: _LONGEST_LABEL - 1] + "…"


def colours(models: Sequence[str], baseline: str) -> dict[str, str]:
    """A colour per model, the same in every figure of a report; the baseline is grey."""
    others = [model for model in models if model != baseline]
    return {baseline: BASE} | {model: SERIES[place % len(SERIES)] for place, model in enumerate(others)}


def _bare_rows(axes: Any, names: Sequence[str]) -> None:
    """A categorical y axis, first name on top, vertical grid only."""
    axes.set_yticks(range(len(names)), labels=[label(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)


# -- evaluations -------------------------------------------------------------------------------------------------------


def metric_bars(
    panels: Mapping[str, Mapping[str, tuple[float, tuple[float, float] | None]]], colour: Mapping[str, str], name: str = "metric-bars"
) -> Markup:
    """Bars with 95 % intervals: one panel per metric, one bar per model; ``panels[metric][model] = (mean, interval)``."""
    models = list(next(iter(panels.values())))

    def paint(figure: Figure) -> None:
        grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (metric, values) in zip(grid, panels.items(), strict=True):
            top = max(max(mean, span[1] if span else mean) for mean, span in values.values()) or 1.0
            for row, model in enumerate(models):
                mean, span = values[model]
                axes.barh(row, mean, height=0.62, color=colour[model])
                if span is not None:
                    axes.plot(span, [row, row], color=INK, linewidth=1.3, solid_capstyle="butt")
                axes.text(max(mean, span[1] if span else mean) + top * 0.03, row, f"{mean:.3f}", va="center", fontsize=10)
            axes.set_title(metric)
            axes.set_xlim(0, top * 1.24)
            axes.xaxis.set_major_locator(MaxNLocator(4))
            _bare_rows(axes, models)

    description = "; ".join(
        f"{metric}: " + ", ".join(f"{model} {mean:.4f}" for model, (mean, _) in values.items()) for metric, values in panels.items()
    )
    size = (10.0, 0.95 + 0.38 * len(models))
    return draw(name, "Metrics by model, with 95 % intervals", description, size, paint)


def segment_bars(
    metric: str,
    groups: Sequence[tuple[str, int]],
    values: Mapping[str, Sequence[tuple[float, tuple[float, float] | None]]],
    colour: Mapping[str, str],
    name: str,
) -> Markup:
    """Grouped bars of one metric: ``groups`` are (label, users); ``values[model]`` has a (mean, interval) per group."""
    width = 0.8 / max(len(values), 1)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for place, (model, bars) in enumerate(values.items()):
            at = np.arange(len(groups)) - 0.4 + width * (place + 0.5)
            axes.bar(at, [mean for mean, _ in bars], width=width * 0.88, color=colour[model], label=" " + label(model))
            for x, (_, span) in zip(at, bars, strict=True):
                if span is not None:
                    axes.plot([x, x], span, color=INK, linewidth=1.1, solid_capstyle="butt")
        axes.set_xticks(range(len(groups)), labels=[f"{label(text)}\n{users:,} users" for text, users in groups])
        axes.tick_params(axis="x", labelcolor=INK)
        axes.tick_params(axis="y", labelcolor=MUTED)
        axes.grid(visible=False, axis="x")
        axes.spines["left"].set_visible(False)
        axes.set_title(metric)
        figure.legend(loc="outside right upper", frameon=False, fontsize=10)

    parts = []
    for model, bars in values.items():
        parts.append(f"{model}: " + ", ".join(f"{text} {mean:.4f}" for (text, _), (mean, _) in zip(groups, bars, strict=True)))
    description = "; ".join(parts)
    return draw(name, f"{metric} by segment", description, (10.0, 3.5), paint)


def scatter(
    x: str, y: str, points: Mapping[str, tuple[float, float]], colour: Mapping[str, str], name: str = "scatter", percent_x: bool = True
) -> Markup:
    """One labelled point per model."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        right = max(max(across for across, _ in points.values()), 1e-12) * 1.06
        low, high = min(up for _, up in points.values()), max(up for _, up in points.values())
        pad = max(high - low, abs(high) * 0.1, 1e-9) * 0.16
        for model, (across, up), height in _spread(points, right, (high - low + 2 * pad) * 0.075):
            axes.scatter([across], [up], s=80, color=colour[model], edgecolor=SURFACE, linewidth=1.2, zorder=3)
            side = -1 if across > right * 0.6 else 1
            at = (across + side * right * 0.03, height)
            if height > up:
                axes.plot([across, at[0]], [up, height], color=colour[model], linewidth=0.9)
            axes.text(*at, label(model), ha="left" if side > 0 else "right", va="center", fontsize=10.5)
        axes.set_xlim(-right * 0.04, right)
        axes.set_ylim(low - pad, high + pad)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.tick_params(axis="y", labelcolor=MUTED)
        if percent_x:
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))

    description = ", ".join(f"{model}: {x} {across:.4f}, {y} {up:.4f}" for model, (across, up) in points.items())
    return draw(name, f"{y} against {x}", description, (5.6, 3.9), paint)


def _spread(points: Mapping[str, tuple[float, float]], right: float, gap: float) -> list[tuple[str, tuple[float, float], float]]:
    """Each point with a height for its name, moved up where names of points close by would overlap."""
    placed: list[tuple[str, tuple[float, float], float]] = []
    for model, point in sorted(points.items(), key=lambda entry: entry[1][1]):
        near = [height for _, (across, _), height in placed if abs(across - point[0]) < right * 0.45]
        placed.append((model, point, max([point[1], *(height + gap for height in near)])))
    return placed


def concentration(exposures: Mapping[str, npt.NDArray[np.int64]], colour: Mapping[str, str], name: str = "concentration") -> Markup:
    """How recommendations pile up: share of all recommended slots (y) taken by the most exposed share of the catalogue (x)."""
    shares = {}
    for model, counts in exposures.items():
        ordered = np.sort(counts)[::-1].astype(np.float64)
        total = max(float(ordered.sum()), 1.0)
        points = np.unique(np.concatenate([np.arange(min(len(ordered), 40)), np.geomspace(1, len(ordered), 160).astype(np.int64) - 1]))
        cumulative = np.cumsum(ordered) / total
        shares[model] = ((points + 1) / len(ordered), cumulative[points])

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for place, (model, (across, up)) in enumerate(shares.items()):
            dash = "-" if place <= len(SERIES) else "--"
            axes.plot([0, *across], [0, *up], dash, color=colour[model], linewidth=2.0, label=" " + label(model))
        axes.plot([0, 1], [0, 1], ":", color=MUTED, linewidth=1.0, label=" every item alike")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        axes.tick_params(axis="y", labelcolor=MUTED)
        axes.set_xlabel("most exposed items, share of the catalogue")
        axes.set_ylabel("share of recommended slots")
        axes.legend(loc="lower right", frameon=False, fontsize=10)

    tenth = ", ".join(f"{model} {np.interp(0.1, across, up):.0%}" for model, (across, up) in shares.items())
    description = f"Slots taken by the most exposed tenth of the catalogue: {tenth}"
    return draw(name, "Concentration of recommendations", description, (5.6, 3.9), paint)


# -- the rest of a run -------------------------------------------------------------------------------------------------


def latency_bars(stages: Sequence[tuple[str, float, float]], name: str = "latency") -> Markup:
    """p50 (bar) and p99 (line to a dot) by stage, milliseconds."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        top = max((p99 for _, _, p99 in stages), default=1.0) or 1.0
        for row, (_, p50, p99) in enumerate(stages):
            axes.plot([p50, p99], [row, row], color=SERIES[0], linewidth=1.6, alpha=0.55)
            axes.barh(row, p50, height=0.5, color=SERIES[0])
            axes.scatter([p99], [row], s=34, color=SERIES[1], zorder=3)
            axes.text(p99 + top * 0.02, row, f"{p50:.1f} / {p99:.1f}", va="center", fontsize=10)
        axes.set_xlim(0, top * 1.2)
        axes.set_xlabel("milliseconds: p50 (bar), p99 (dot)")
        _bare_rows(axes, [stage for stage, _, _ in stages])

    description = ", ".join(f"{stage} p50 {p50:.2f} ms, p99 {p99:.2f} ms" for stage, p50, p99 in stages)
    return draw(name, "Latency by stage", description, (10.0, 1.0 + 0.34 * len(stages)), paint)


@dataclass(frozen=True)
class Trial:
    """One tuning trial: its value (None if it failed), and the phase that proposed it (random, TPE ...)."""

    number: int
    value: float | None
    phase: str


def tuning_history(metric: str, trials: Sequence[Trial], more_is_better: bool, name: str) -> Markup:
    """Each trial's value in order, by phase, with the best so far."""
    good = [trial for trial in trials if trial.value is not None and np.isfinite(trial.value)]
    values = np.array([trial.value for trial in good], dtype=np.float64)
    best = (np.maximum if more_is_better else np.minimum).accumulate(values) if good else values
    phases = list(dict.fromkeys(trial.phase for trial in good))

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.step([trial.number for trial in good], best, where="post", color=MUTED, linewidth=1.4, label=" best so far")
        for place, phase in enumerate(phases):
            own = [row for row, trial in enumerate(good) if trial.phase == phase]
            colour = SERIES[place % len(SERIES)]
            axes.scatter([good[row].number for row in own], values[own], s=40, color=colour, label=" " + label(phase), zorder=3)
        axes.set_xlabel("trial")
        axes.set_ylabel(metric)
        axes.tick_params(axis="y", labelcolor=MUTED)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside right upper", frameon=False, fontsize=10)

    description = f"{len(good)} of {len(trials)} trials finished" + (f"; best {metric} {best[-1]:.4f}" if good else "")
    return draw(name, f"Tuning history: {metric}", description, (10.0, 3.2), paint)


def timeline(steps: Sequence[tuple[str, float, float]], name: str = "timeline") -> Markup:
    """When each step ran: (step, start second, seconds)."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        end = max((start + seconds for _, start, seconds in steps), default=1.0) or 1.0
        for row, (_, start, seconds) in enumerate(steps):
            axes.barh(row, max(seconds, end * 0.003), left=start, height=0.56, color=SERIES[0])
            axes.text(start + seconds + end * 0.01, row, f"{seconds:.1f} s", va="center", fontsize=10)
        axes.set_xlim(0, end * 1.1)
        axes.set_xlabel("seconds since the start")
        _bare_rows(axes, [step for step, _, _ in steps])

    description = ", ".join(f"{step} {seconds:.1f} s" for step, _, seconds in steps)
    return draw(name, "Timeline of the run", description, (10.0, 1.0 + 0.34 * len(steps)), paint)
