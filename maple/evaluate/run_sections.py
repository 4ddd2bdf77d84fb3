"""The report's sections about the run itself: ingest counts, features, tuning, latency, examples, timeline. All from plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from maple.evaluate import figures
from maple.evaluate.figures import Trial
from maple.page import Block, Card, CardsBlock, Cell, FactsBlock, FigureBlock, Section, TableBlock, TextBlock


def ingest_section(rows_in: int, clean: int, quarantined: Mapping[str, int], *, converted: Mapping[str, int] | None = None) -> Section:
    """What validation did: rows in = clean + quarantined, with a row per reason; ``converted`` are clean rows that a rule changed."""
    lost = sum(quarantined.values())
    facts = FactsBlock(
        (
            ("rows in", f"{rows_in:,}", ""),
            ("clean", f"{clean:,}", _share(clean, rows_in)),
            ("quarantined", f"{lost:,}", _share(lost, rows_in)),
        )
    )
    blocks: list[Block] = [facts]
    rows = [(reason, "quarantined", f"{count:,}", _share(count, rows_in)) for reason, count in _most_first(quarantined)]
    rows += [(reason, "converted", f"{count:,}", _share(count, rows_in)) for reason, count in _most_first(converted or {})]
    if rows:
        blocks.append(
            TableBlock(
                "Rules that fired; the first that matches a row names its reason", ("rule", "action", "rows", "share"), tuple(rows), (2, 3)
            )
        )
    return Section("Data", tuple(blocks))


def _most_first(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))


def _share(count: int, total: int) -> str:
    return f"{count / total:.1%}" if total else ""


def features_section(features: Sequence[tuple[str, str, str]]) -> Section:
    """The feature views: (name, of what: user, item, user-item ..., what it is)."""
    return Section("Features", (TableBlock(f"{len(features)} feature views", ("feature", "of", "what it is"), tuple(features)),))


@dataclass(frozen=True)
class TuningRun:
    """One search: what was tuned, by which metric, its trials, and the best settings as text."""

    model: str
    metric: str
    trials: Sequence[Trial]
    best: Mapping[str, str]
    more_is_better: bool = True


def tuning_section(runs: Sequence[TuningRun]) -> Section:
    """A history plot and the best settings of each search."""
    blocks: list[Block] = []
    for place, run in enumerate(runs):
        svg = figures.tuning_history(run.metric, run.trials, run.more_is_better, f"tuning-{place}-{run.model}")
        failed = sum(1 for trial in run.trials if trial.value is None)
        caption = f"{run.model}: {len(run.trials)} trials" + (f", {failed} failed" if failed else "")
        blocks.append(FigureBlock(caption, svg))
        blocks.append(TableBlock(f"{run.model}: best settings", ("setting", "value"), tuple(run.best.items())))
    return Section("Tuning", tuple(blocks))


def latency_section(stages: Sequence[tuple[str, float, float]], *, note: str = "") -> Section:
    """(stage, p50, p99) in milliseconds, in the order of the request's way."""
    rows = tuple((stage, f"{p50:.2f}", f"{p99:.2f}") for stage, p50, p99 in stages)
    blocks: list[Block] = [
        FigureBlock("Milliseconds by stage, p50 / p99.", figures.latency_bars(stages)),
        TableBlock("Latency by stage, milliseconds", ("stage", "p50", "p99"), rows, (1, 2)),
    ]
    return Section("Latency", ((TextBlock(note), *blocks) if note else tuple(blocks)))


def examples_section(cards: Sequence[Card], *, note: str = "") -> Section:
    """What some users are shown, and why."""
    blocks: tuple[Block, ...] = (CardsBlock(tuple(cards)),)
    return Section("Examples", ((TextBlock(note), *blocks) if note else blocks))


def timeline_section(steps: Sequence[tuple[str, float, float]]) -> Section:
    """When each step ran: (step, start second, seconds)."""
    total = max((start + seconds for _, start, seconds in steps), default=0.0)
    rows = tuple((Cell(step), f"{start:.1f}", f"{seconds:.1f}") for step, start, seconds in steps)
    return Section(
        "Timeline",
        (
            FigureBlock(f"The whole run: {total:.0f} s.", figures.timeline(steps)),
            TableBlock("Steps, seconds", ("step", "start", "took"), rows, (1, 2)),
        ),
    )
