"""The sections of a report that evaluations fill: results, who it works for, beyond accuracy, protocol. ``maple.page`` renders them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from maple.errors import DataError
from maple.evaluate import figures
from maple.evaluate.compare import SummaryCell, default_metrics, format_difference, format_value, summary
from maple.evaluate.harness import Evaluation, EvaluationProtocol
from maple.evaluate.metrics import LIST_LEVEL, gini
from maple.page import Block, Cell, FigureBlock, Section, TableBlock, TextBlock

DEFINITIONS = (
    "Means over users with at least one relevant item. Recall: hits / relevant items. Precision: hits / k. "
    "NDCG: binary gain, 1 / log2(rank + 1), ideal over min(k, relevant). MAP divides by min(relevant, k). MRR: 1 / rank of the first hit. "
    "Hit: users with a hit. Coverage: distinct recommended items / catalogue. Diversity: mean pairwise distance within a list. "
    "Novelty: mean -log2 of the share of users who have the item, in bits. Popularity rank: mean place by popularity, 1 = most popular. "
    "Intervals: 95 % percentile bootstrap over users. Change: paired, over the same users, against the baseline; * where its 95 % interval "
    "leaves out 0. Nothing is corrected for many comparisons."
)


def evaluation_sections(evaluations: Mapping[str, Evaluation], baseline: str, metrics: Sequence[str] | None = None) -> list[Section]:
    """Results, segments, beyond accuracy and protocol of some models on the same users. ``DataError`` where they cannot be compared."""
    if baseline not in evaluations:
        raise DataError(f"the baseline {baseline!r} is not among the evaluated models: {', '.join(evaluations)}")
    base = evaluations[baseline]
    names = [name for name in (metrics or default_metrics(base)) if name.split("@")[0] not in LIST_LEVEL]
    if not names:
        raise DataError(f"the report needs at least one accuracy metric, got {', '.join(metrics or ())}")
    colour = figures.colours(list(evaluations), baseline)
    rows = summary(evaluations, baseline, names)
    body = tuple(
        (Cell(row.model, "baseline" if row.baseline else ""), *(_metric_cell(cell, len(rows)) for cell in row.cells)) for row in rows
    )
    panels = {
        name: {model: (evaluation.means[name], evaluation.intervals.get(name)) for model, evaluation in evaluations.items()}
        for name in names[:4]
    }
    results: list[Block] = [
        TextBlock(_verdict(evaluations, baseline, names[0]), "lead"),
        TableBlock("Models by metric; bold = best of its column", ("model", *names), body, tuple(range(1, len(names) + 1))),
        FigureBlock("Bars: means. Lines: 95 % bootstrap intervals over users.", figures.metric_bars(panels, colour)),
        TextBlock(DEFINITIONS, "note"),
    ]
    sections = [Section("Results", tuple(results))]
    segments = _segment_figures(evaluations, base, names[0], colour)
    if segments:
        sections.append(Section("Who it works for", segments))
    sections.append(Section("Beyond accuracy", _beyond(evaluations, base, colour)))
    sections.append(Section("Protocol", (_protocol_table(base.protocol),)))
    return sections


def _metric_cell(cell: SummaryCell, models: int) -> Cell:
    change = format_difference(cell.difference)
    note = f"{format_value(cell.metric, cell.interval[0])}–{format_value(cell.metric, cell.interval[1])}" if cell.interval else ""
    tone = "best" if cell.best and models > 1 else ""
    if cell.difference is not None and change.endswith("*"):
        tone += " good" if cell.difference.difference > 0 else " bad"
    return Cell(format_value(cell.metric, cell.mean), note, change, tone.strip())


def _verdict(evaluations: Mapping[str, Evaluation], baseline: str, metric: str) -> str:
    """One sentence: who leads by the first metric, and whether the lead over the baseline is more than chance."""
    base = evaluations[baseline].protocol
    leader = max(evaluations, key=lambda model: evaluations[model].means[metric])
    text = f"Over {base.users:,} test users, {leader} has the highest {metric}: {format_value(metric, evaluations[leader].means[metric])}"
    if leader == baseline:
        return text + (". It is the baseline itself." if len(evaluations) > 1 else ".")
    row = next(
        row for row in summary({baseline: evaluations[baseline], leader: evaluations[leader]}, baseline, [metric]) if not row.baseline
    )
    difference = row.cells[0].difference
    if difference is None:
        return text + "."
    size = f"{difference.lift:+.1%}" if difference.lift is not None else f"{difference.difference:+.4f}"
    sure = "the interval of the paired difference leaves out 0" if difference.low > 0 else "which the test part cannot tell from chance"
    return (
        f"{text}, {size} against {baseline} (difference {difference.difference:+.4f}, 95 % interval {difference.low:+.4f} to "
        f"{difference.high:+.4f}, p {_p_text(difference.p_value)}; {sure}). "
        f"Better for {difference.wins:,} users, worse for {difference.losses:,}, alike for {difference.ties:,}."
    )


def _p_text(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def _segment_figures(evaluations: Mapping[str, Evaluation], base: Evaluation, metric: str, colour: Mapping[str, str]) -> tuple[Block, ...]:
    """A grouped bar plot per segmentation that all models have."""
    blocks: list[Block] = []
    for name in dict.fromkeys(part.name for part in base.segments):
        groups = [(part.label, part.users) for part in base.segments if part.name == name]
        values = {}
        for model, evaluation in evaluations.items():
            own = {part.label: part for part in evaluation.segments if part.name == name}
            if own.keys() >= {text for text, _ in groups}:
                values[model] = [(own[text].means[metric], own[text].intervals.get(metric)) for text, _ in groups]
        svg = figures.segment_bars(metric, groups, values, colour, f"segment-{name}")
        blocks.append(FigureBlock(f"{metric} by {name}, with 95 % intervals.", svg))
    return tuple(blocks)


def _beyond(evaluations: Mapping[str, Evaluation], base: Evaluation, colour: Mapping[str, str]) -> tuple[Block, ...]:
    k = 10 if 10 in base.protocol.ks else max(base.protocol.ks)
    points = {model: (found.means[f"coverage@{k}"], found.means[f"novelty@{k}"]) for model, found in evaluations.items()}
    exposures = {model: found.exposure(k) for model, found in evaluations.items()}
    columns = [f"{name}@{k}" for name in LIST_LEVEL if f"{name}@{k}" in base.means]
    rows = tuple((model, *(format_value(name, found.means[name]) for name in columns)) for model, found in evaluations.items())
    even = ", ".join(f"{model} {gini(counts):.2f}" for model, counts in exposures.items())
    spread = figures.scatter(f"coverage@{k}", f"novelty@{k}, bits", points, colour, "coverage-novelty")
    curve = figures.concentration(exposures, colour)
    caption = f"Properties of the lists (diversity by {base.protocol.diversity} distance)"
    return (
        FigureBlock("Right: more of the catalogue is shown. Up: less obvious items.", spread, half=True),
        FigureBlock(f"The higher the curve, the fewer items take the slots. Gini coefficient: {even}.", curve, half=True),
        TableBlock(caption, ("model", *columns), rows, tuple(range(1, len(columns) + 1))),
    )


_COUNT_LABELS = {
    "pairs_in_window": "pairs in the window",
    "pairs_unknown_user": "left out: pairs of unknown users",
    "pairs_unknown_item": "left out: pairs with unknown items",
    "pairs_bought_before": "left out: pairs bought before",
    "users_in_window": "users in the window",
    "users_unknown": "left out: unknown users",
    "users_left_empty": "left out: users with no relevant item left",
    "cold_items": "distinct unknown items in the window",
}


def _protocol_table(protocol: EvaluationProtocol) -> TableBlock:
    def date(time: int | None) -> str:
        return "as the data set gives it" if time is None else datetime.fromtimestamp(time / 1e6, UTC).strftime("%Y-%m-%d %H:%M UTC")

    facts = [
        ("test users", f"{protocol.users:,}"),
        ("relevant (user, item) pairs", f"{protocol.pairs:,}"),
        (
            "test window",
            date(protocol.start) if protocol.start is None else f"{date(protocol.start)} to {date(protocol.end)} (not included)",
        ),
        ("users and items known before", date(protocol.known_before)),
        ("relevant items", "only those the user did not have before" if protocol.new_only else "repeats included"),
        ("lists", "leave out what the user already has" if protocol.masked else "may repeat what the user already has"),
        ("catalogue", f"{protocol.catalogue:,} items, full ranking"),
        ("bootstrap", f"{protocol.bootstrap:,} draws, seed {protocol.seed}"),
        ("fingerprint of users and relevant items", protocol.relevant[:16]),
        *((text, f"{protocol.counts[name]:,}") for name, text in _COUNT_LABELS.items() if name in protocol.counts),
        *protocol.notes.items(),
    ]
    return TableBlock("What was asked; a number means nothing without it", ("what", "value"), tuple(facts))
