"""What tuning searches for: the best settings of one source on the validation part, or of the ranker on held-out users.

A problem is a search space, the data that a trial needs, and a plain function from settings to a value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from maple.config import Section
from maple.data.dataset import Dataset, ragged_take
from maple.data.splits import Boundaries
from maple.errors import ConfigError, unknown_name
from maple.evaluate.harness import Relevant, relevant_of
from maple.evaluate.metrics import ranking_metrics
from maple.hashing import rng
from maple.models.base import FitContext, Mask, Metrics, QueryBatch
from maple.models.catalog import model_class, ranker_class
from maple.recommend.settings import PipelineSettings
from maple.train.rows import Rows
from maple.train.search import Config, Halving, SearchSpace, configured

MAX_USERS = 4000  # validation users of a source's trials
HELD_OUT = 0.25  # share of the queries that the ranker's trials are judged on
K = 20

Report = Callable[[int, float], None]


@dataclass(frozen=True, eq=False)
class Problem:
    """One search. ``default`` are the settings to beat; ``data`` is what ``objective(config, data, report)`` gets."""

    metric: str
    space: SearchSpace
    default: Config
    data: Any
    objective: Callable[[Config, Any, Report], float]
    halving: Halving | None

    def plain(self) -> dict[str, Any]:
        """What identifies the question besides the data."""
        given = {"model": self.data.model, "config": self.data.config}
        return {"metric": self.metric, "space": self.space.plain(), "default": self.default, **given}


@dataclass(frozen=True, eq=False)
class SourceData:
    """What a source's trial needs: events before T1, who is asked and what they went on to take, and the settings it starts from."""

    model: str
    config: dict[str, Any]
    train: Dataset
    queries: QueryBatch
    mask: Mask | None
    relevant: Relevant
    ctx: FitContext


@dataclass(frozen=True, eq=False)
class RankerData:
    """What a ranker's trial needs: rows to learn from and rows to be judged on."""

    model: str
    config: dict[str, Any]
    train: Rows
    held_out: Rows
    epochs: int
    ctx: FitContext


@dataclass(frozen=True, eq=False)
class RankerProblem(Problem):
    """The ranker's search; its rows are made with the tuned sources, so they come last."""

    def with_rows(self, rows: Rows) -> RankerProblem:
        """The same search over these rows, a share of whose queries is held out."""
        queries = np.unique(rows.groups)
        held = rng(self.data.ctx.seed, "tune/held out").random(len(queries)) < HELD_OUT
        judged = np.isin(rows.groups, queries[held])
        return replace(self, data=replace(self.data, train=_part(rows, ~judged), held_out=_part(rows, judged)))


def problem_of(name: str, data: Dataset, cut: Boundaries, settings: PipelineSettings, epochs: int, ctx: FitContext) -> Problem:
    """The search of one source of a pipeline, or of its ``ranker``; ``ConfigError`` names the nearest one for an unknown name."""
    if name == "ranker" and settings.ranker is not None:
        kind = ranker_class(settings.ranker.model)
        space = _free(SearchSpace.parse(kind.Config.search_space(), name), settings.ranker.config, name)  # type: ignore[attr-defined]
        empty = Rows({}, np.empty((0, 1), np.float32), np.empty(0, np.int64))
        held = RankerData(settings.ranker.model, settings.ranker.config, empty, empty, epochs, ctx)
        config = kind.Config.parse(settings.ranker.config, name)
        return RankerProblem("ndcg@10", space, space.current(config), held, ranker_objective, Halving(2, 2, steps=epochs))
    sources = {source.name: source for source in settings.sources}
    if name not in sources:
        raise ConfigError("tune.models: " + unknown_name("source", name, [*sources, *(["ranker"] if settings.ranker else [])]))
    source = sources[name]
    model = model_class(source.model)
    if not hasattr(model.Config, "search_space"):
        raise ConfigError(f"tune.models: {name!r} has nothing to tune; leave it out")
    relevant = relevant_of(data, cut.valid_start, cut.t2, new_only=not settings.repeats, known_before=cut.t1)
    if len(relevant) > MAX_USERS:
        relevant = relevant.take(np.sort(rng(ctx.seed, "tune/users").choice(len(relevant), MAX_USERS, replace=False)))
    train = data.before(cut.t1)
    queries = QueryBatch.at(train, relevant.users, np.full(len(relevant), cut.t1, np.int64), settings.history_limit)
    space = _free(SearchSpace.parse(model.Config.search_space(), name), source.config, name)
    config = model.Config.parse(source.config, name)
    given = SourceData(source.model, source.config, train, queries, None if settings.repeats else Mask.seen(queries), relevant, ctx)
    halving = Halving(1, 2, steps=2) if "iterations" in source_fields(model.Config) else None
    return Problem(f"ndcg@{K}", space, space.current(config), given, source_objective, halving)


def gives(config: Mapping[str, Any], name: str) -> bool:
    """Whether settings as people wrote them give a value for a dotted name."""
    here: Any = config
    for part in name.split("."):
        if not isinstance(here, Mapping) or part not in here:
            return False
        here = here[part]
    return True


def _free(space: SearchSpace, config: Mapping[str, Any], name: str) -> SearchSpace:
    """The part of a space that the page leaves open; what it gives is not searched. ``ConfigError`` where nothing is left."""
    names = [dimension.name for dimension in space.dimensions if not gives(config, dimension.name)]
    if not names:
        raise ConfigError(f"tune.models: the page gives every setting of {name!r} that could be tuned; leave {name!r} out of the search")
    return space.only(names)


def source_fields(config: type[Section]) -> set[str]:
    """The settings of a model by name."""
    return set(config.model_fields)


def source_objective(config: Config, data: SourceData, report: Report) -> float:
    """NDCG@20 on the validation users. A model that counts ``iterations`` is first judged after a third of them."""
    kind = model_class(data.model)
    full = configured(kind.Config.parse(data.config, data.model), config)
    iterations = getattr(full, "iterations", None)
    if iterations is not None and iterations >= 3:
        report(1, _ndcg(kind, full.with_(iterations=iterations // 3), data))
    value = _ndcg(kind, full, data)
    if iterations is not None:
        report(2, value)
    return value


def _ndcg(kind: Any, config: Section, data: SourceData) -> float:
    model = kind(config)
    model.fit(data.train, data.ctx)
    lists, _ = model.topk(data.queries, K, data.mask)
    return float(ranking_metrics(lists, data.relevant.offsets, data.relevant.items, [K])[f"ndcg@{K}"].mean())


def ranker_objective(config: Config, data: RankerData, report: Report) -> float:
    """NDCG@10 over the held-out queries' rows; each epoch reports the value on the ranker's own early-stopping part."""
    kind = ranker_class(data.model)
    full = configured(kind.Config.parse(data.config, data.model), {**config, "training.epochs": data.epochs, "ensemble": 1})

    def told(step: int, metrics: Metrics) -> None:
        value = metrics.get("ndcg_10", metrics.get("neg_log_loss"))
        if value is not None:
            report(step, value)

    ranker: Any = kind(full)  # type: ignore[call-arg]
    ranker.fit(data.train.columns, data.train.labels, data.train.groups, replace(data.ctx, report=told))
    return grouped_ndcg(ranker.score(data.held_out.columns)[:, 0], data.held_out, 10)


def grouped_ndcg(scores: Any, rows: Rows, k: int) -> float:
    """Mean NDCG@k of the rows' queries when each is ordered by ``scores`` float32[N]; only rows count, not what sources missed."""
    order = np.lexsort((-scores, rows.groups))
    queries, starts = np.unique(rows.groups, return_index=True)
    sizes = np.diff(np.append(starts, len(rows)))
    place = np.arange(len(rows)) - np.repeat(starts, sizes)
    row = np.repeat(np.arange(len(queries)), sizes)
    lists = np.full((len(queries), k), -1, np.int32)
    top = place < k
    # An item's code here is its row, which is distinct within and between queries.
    lists[row[top], place[top]] = order[top]
    positive = np.flatnonzero(rows.labels[:, 0] > 0)
    counts = np.bincount(np.searchsorted(queries, rows.groups[positive]), minlength=len(queries))
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    kept = np.flatnonzero(counts > 0)
    index, offsets = ragged_take(offsets, kept)
    return float(ranking_metrics(lists[kept], offsets, positive[index].astype(np.int32), [k])[f"ndcg@{k}"].mean())


def _part(rows: Rows, keep: Any) -> Rows:
    return Rows({name: column[keep] for name, column in rows.columns.items()}, rows.labels[keep], rows.groups[keep])
