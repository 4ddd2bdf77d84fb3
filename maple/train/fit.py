"""From a data set to a fitted pipeline: sources before T1, ranker rows from [T1, T2) with those sources, sources again before T2.

Evaluation, tuning, publishing and the benchmarks all train through ``fit_pipeline``, so what is measured is what is released.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from maple.data.dataset import Dataset, Int32
from maple.data.splits import Boundaries
from maple.errors import DataError
from maple.evaluate.harness import Recommend, Relevant
from maple.features.extras import NO_EXTRAS, Extras
from maple.features.leakage import label_leaks, refuse_leaks
from maple.features.log_reader import LogReader
from maple.features.spec import FeatureSpec
from maple.features.ticks import ItemReader, ItemTimeline
from maple.hashing import rng
from maple.index import tie_ranks
from maple.models.base import FitContext, Mask, Metrics, QueryBatch, Ranker, Retriever, Space
from maple.models.catalog import model_class, ranker_class
from maple.recommend.build import Parts, pipeline_of, popular_items
from maple.recommend.bundle import Bundle, ItemFeatures
from maple.recommend.engine import Candidates, Pipeline
from maple.recommend.rankers import LogFeatures
from maple.recommend.settings import PipelineSettings
from maple.train.rows import Rows, RowSettings, batches_of, contexts_of, gather, queries_at, rows_of, targets_after

BATCH = 128  # queries hydrated at once: bounds memory to about 128 x max_candidates x columns x 4 bytes

Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Fitted:
    """A pipeline fitted on the events before ``cut.t2``: its bundle, the rows its ranker learned from, and each model's own metrics."""

    bundle: Bundle
    cut: Boundaries
    rows: Rows | None
    metrics: Mapping[str, Metrics]


def fit_sources(
    data: Dataset, settings: PipelineSettings, ctx: FitContext, say: Say = print
) -> tuple[dict[str, Retriever], dict[str, Metrics]]:
    """Every source of the settings, fitted on the whole data set given, and what each says of its fit."""
    models: dict[str, Retriever] = {}
    metrics: dict[str, Metrics] = {}
    for place, source in enumerate(settings.sources, start=1):
        say(f"fitting {source.name} ({place} of {len(settings.sources)})")
        kind = model_class(source.model)
        model = kind(kind.Config.parse(source.config, f"source {source.name!r}"))  # type: ignore[call-arg]
        metrics[source.name] = model.fit(data, _telling(ctx, f"fitting {source.name}", say))
        models[source.name] = model
    return models, metrics


def ranker_rows(
    data: Dataset,
    sources: Mapping[str, Retriever],
    settings: PipelineSettings,
    spec: FeatureSpec,
    cut: Boundaries,
    rows: RowSettings,
    *,
    timeline: ItemTimeline | None = None,
    extras: Extras | None = None,
    seed: int = 0,
    say: Say = print,
) -> Rows:
    """What the ranker learns from: candidates of ``sources`` (fitted before ``cut.t1``) for the users of [t1, t2), with features at t1.

    ``DataError`` where a column gives the label away.
    """
    early = Parts(settings, Space.of(data), sources, _popular(data.before(cut.t1), settings))
    known = data.before(cut.t2)
    pipeline = offline_pipeline(early, known, spec, timeline, Extras.fit(known, spec, until=cut.t1) if extras is None else extras)
    random = rng(seed, "ranker rows")
    relevant = targets_after(data, cut.t1, cut.t2, new_only=not settings.repeats, settings=rows, rng=random, gap=cut.gap)
    parts: list[Rows] = []
    for users, offsets, items in batches_of(relevant, BATCH):
        contexts = contexts_of(known, users, cut.t1 + cut.gap, cut.t2)
        queries = queries_at(data, users, cut.t1, history_limit=settings.history_limit, contexts=contexts)
        candidates = pipeline.run_segment("retrieve", queries, Candidates.empty(len(queries))).candidates
        candidates = pipeline.run_segment("rank", queries, candidates).candidates
        parts.append(rows_of(candidates, offsets, items, rows.negatives, random))
        say(f"ranker rows: {sum(len(part) for part in parts):,}")
    parts = [part for part in parts if len(part)]
    if not parts:
        raise DataError(
            "the sources proposed none of the items that users went on to take between T1 and T2, so the ranker has nothing to learn from; "
            "use more data, a longer validation part (`split.valid`), or more candidates (`pipeline.max_candidates`)"
        )
    made = gather(parts)
    refuse_leaks(label_leaks(made.columns, made.labels[:, 0], seed=seed), say)
    return made


def fit_ranker(rows: Rows, settings: PipelineSettings, ctx: FitContext, say: Say = print) -> tuple[Ranker, Metrics]:
    """The ranker of the settings, fitted on rows."""
    assert settings.ranker is not None, "only a pipeline with a ranker fits one"
    kind = ranker_class(settings.ranker.model)
    ranker = kind(kind.Config.parse(settings.ranker.config, "ranker"))  # type: ignore[call-arg]
    return ranker, ranker.fit(rows.columns, rows.labels, rows.groups, _telling(ctx, "fitting the ranker", say))


def _telling(ctx: FitContext, what: str, say: Say) -> FitContext:
    """A context whose reports are also said: a sign of life from long fits."""

    def report(step: int, metrics: Metrics) -> None:
        if ctx.report is not None:
            ctx.report(step, metrics)
        quality = next((f", {name} {value:.4f}" for name, value in metrics.items() if name.startswith("ndcg")), "")
        say(f"{what}: step {step}{quality}")

    return replace(ctx, report=report)


def fit_pipeline(
    data: Dataset,
    settings: PipelineSettings,
    cut: Boundaries,
    *,
    fingerprint: str,
    spec: FeatureSpec | None = None,
    timeline: ItemTimeline | None = None,
    extras: Extras | None = None,
    row_settings: RowSettings | None = None,
    rows: Rows | None = None,
    early: Mapping[str, Retriever] | None = None,
    metrics: Mapping[str, float] | None = None,
    ctx: FitContext | None = None,
    say: Say = print,
) -> Fitted:
    """Fit everything on the events before ``cut.t2``; later events are never read.

    ``timeline``: item features built before (they are read strictly before each moment). ``extras``: those of the events before T1, which
    ``rows`` were made with. ``rows``: ranker rows made before for the
    same data, cut and sources. ``early``: sources fitted before T1 already. ``metrics``: what the bundle says of its quality.
    """
    ctx = ctx or FitContext()
    spec = spec or FeatureSpec(history_limit=settings.history_limit)
    known = data.before(cut.t2)
    extras = Extras.fit(known, spec, until=cut.t1) if extras is None else extras
    told: dict[str, Metrics] = {}
    ranker: Ranker | None = None
    if settings.ranker is not None:
        if rows is None:
            if early is None:
                early, _ = fit_sources(known.before(cut.t1), settings, ctx, lambda text: say(f"before T1: {text}"))
            rows = ranker_rows(
                known, early, settings, spec, cut, row_settings or RowSettings(), timeline=timeline, extras=extras, seed=ctx.seed, say=say
            )  # fmt: skip
        say(f"fitting the ranker on {rows.describe()}")
        ranker, told["ranker"] = fit_ranker(rows, settings, ctx, say)
    sources, own = fit_sources(known, settings, ctx, lambda text: say(f"before T2: {text}"))
    timeline = timeline or ItemTimeline.from_data(known, spec)
    items = ItemFeatures(spec, timeline.read(int(timeline.closed(np.int64(cut.t2)))), extras.at(cut.t2))  # type: ignore[arg-type]
    bundle = Bundle.assemble(
        settings, known, sources, fingerprint=fingerprint, ranker=ranker,
        ranker_columns=tuple(sorted(rows.columns)) if rows is not None else (), features=items, metrics=metrics,
    )  # fmt: skip
    return Fitted(bundle, cut, rows, told | own)


def offline_pipeline(
    parts: Parts, data: Dataset, spec: FeatureSpec, timeline: ItemTimeline | None = None, extras: Extras = NO_EXTRAS
) -> Pipeline:
    """The served pipeline over users of a log, read strictly before each query's moment."""
    items = ItemReader(timeline or ItemTimeline.from_data(data, spec))
    return pipeline_of(parts, features=LogFeatures(LogReader(data, spec), items, extras))


def lists_of_pipeline(bundle: Bundle, data: Dataset, relevant: Relevant, now: int, k: int) -> Recommend:
    """The pipeline of a bundle as the harness asks it: lists int32[B, k] for rows of the test users, as of ``now``."""
    assert bundle.features is not None, "evaluation needs the bundle's feature spec"
    pipeline = pipeline_of(
        bundle.parts, features=LogFeatures(LogReader(data.before(now), bundle.features.spec), bundle.item_reader, bundle.extras)
    )  # fmt: skip

    def recommend(rows: Int32) -> Int32:
        out = []
        for start in range(0, len(rows), BATCH):
            users = relevant.users[rows[start : start + BATCH]]
            contexts = contexts_of(data, users, now, data.span[1] + 1)
            queries = queries_at(data, users, now, history_limit=bundle.settings.history_limit, k=k, contexts=contexts)
            out.append(pipeline.run(queries).lists(k)[0])
        return np.concatenate(out)

    return recommend


def lists_of_source(model: Retriever, bundle: Bundle, data: Dataset, relevant: Relevant, now: int, k: int) -> Recommend:
    """One source alone, under the same masking as the pipeline."""
    limit = bundle.settings.history_limit

    def recommend(rows: Int32) -> Int32:
        users = relevant.users[rows]
        batch = QueryBatch.at(data, users, np.full(len(users), now, dtype=np.int64), limit)
        return model.topk(batch, k, None if bundle.settings.repeats else owned_mask(data.before(now), users))[0]

    return recommend


def owned_mask(data: Dataset, users: Int32) -> Mask:
    """Masks what each user has a target event with anywhere in the log."""
    owner, item = data.target_pairs()
    starts = np.searchsorted(owner, users)
    sizes = np.searchsorted(owner, users, side="right") - starts
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    index = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - starts, sizes)
    return Mask(exclude=(offsets, item[index]))


def _popular(data: Dataset, settings: PipelineSettings) -> Int32:
    return popular_items(data, settings.fallback_days, tie_ranks(data.items.ids.to_pylist()))
