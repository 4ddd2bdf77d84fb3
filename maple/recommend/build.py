"""From settings and fitted models to a pipeline: the one place that says which stages there are and in which order.

The evaluation, the rows that the ranker learns from, batch jobs and serving all get their pipeline here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from maple.data.dataset import Dataset, Float32, Int32
from maple.errors import ConfigError
from maple.index import tie_ranks
from maple.models.base import Need, Ranker, Retriever, Space
from maple.models.families import Embedder
from maple.models.popularity import Popularity, PopularityConfig, item_popularity
from maple.recommend.engine import Observer, Pipeline, Stage
from maple.recommend.explain import Explain
from maple.recommend.filters import ItemColumns, Popular, Restrictions, available, filters
from maple.recommend.newcomers import NEW, Introduce, Known, NewItems
from maple.recommend.rankers import FeatureHydrator, Hydrate, Score, check_columns
from maple.recommend.rerank import Rerank, unit
from maple.recommend.settings import PipelineSettings
from maple.recommend.sources import RetrieverSource, Sources
from maple.schema import event_codes

#: What column ``source`` says of items that no source proposed but the popularity fallback filled in.
FALLBACK = "fallback"


@dataclass(frozen=True, eq=False)
class Parts:
    """What a pipeline is made of. ``sources``: fitted models by source name, one per source of the settings. ``popular`` int32[I]:
    all items, most popular first. ``ranker_columns``: the columns the ranker was fitted on."""

    settings: PipelineSettings
    space: Space
    sources: Mapping[str, Retriever]
    popular: Int32
    ranker: Ranker | None = None
    ranker_columns: tuple[str, ...] = ()
    newcomers: NewItems | None = None  # of a live catalogue: items that the models do not know

    def retrievers(self) -> tuple[RetrieverSource, ...]:
        """Who proposes, in the order of the settings; behind them, in a live catalogue, the source of new items."""
        own = tuple(RetrieverSource(source.name, self.sources[source.name], source.quota) for source in self.settings.sources)
        new = self.newcomers
        if new is None:
            return own
        if len(new.newest):
            own = tuple(replace(source, model=Known(source.model, new.start)) for source in own)
        return (*own, RetrieverSource(NEW, new, self.settings.new_items.quota))

    @cached_property
    def ties(self) -> Int32:
        """The order of items with equal scores, int32[I]."""
        return tie_ranks(self.space.items.ids.to_pylist())

    @cached_property
    def item_columns(self) -> ItemColumns:
        return ItemColumns(self.space.item_table)

    @cached_property
    def vectors(self) -> Float32 | None:
        """Unit item vectors of the first source that has some, float32[I, D]: what diversity measures with."""
        model = next((model for model in self.sources.values() if isinstance(model, Embedder)), None)
        return None if model is None else unit(model.embed_items())

    @property
    def new_vectors(self) -> Float32 | None:
        """The same of ``newcomers``, float32[M, D]; None where there are none."""
        return None

    @cached_property
    def restrictions(self) -> Restrictions:
        """What may not be recommended."""
        columns = self.item_columns
        return Restrictions(columns, available(columns), self.settings.repeats, event_codes(self.settings.bought))


def popular_items(data: Dataset, days: float, ties: Int32) -> Int32:
    """All items by the number of distinct users with them in the last ``days`` of the data, int32[I]."""
    counts = item_popularity(data, PopularityConfig(window_days=days))
    return np.lexsort((ties, -counts)).astype(np.int32)


def pipeline_of(parts: Parts, *, features: FeatureHydrator | None = None, observer: Observer | None = None) -> Pipeline:
    """The pipeline of some parts. Without ``parts.ranker`` the rank segment only hydrates, which is what ranker rows are made from.

    ``ConfigError`` where settings and models do not fit; ``ArtifactError`` where the ranker needs columns that are not given.
    """
    settings = parts.settings
    given = [source.name for source in settings.sources]
    if sorted(given) != sorted(parts.sources):
        raise ConfigError(f"the settings have the sources {', '.join(given)}, but the fitted models are {', '.join(parts.sources)}")
    for name, model in parts.sources.items():
        if Need.OTHER_USERS in model.needs:
            raise ConfigError(f"source {name!r}: its model needs other users' histories and can only run offline; remove it from `sources`")
    limits, sources, new = parts.restrictions, parts.retrievers(), parts.newcomers
    retrieve = Sources(sources, limits, settings.max_candidates, settings.score_union)
    rank: list[Stage] = [Hydrate(features)] if features is not None else []
    if parts.ranker is not None:
        assert settings.ranker is not None, "a ranker comes with its settings"
        check_columns(parts.ranker_columns, (*retrieve.column_names, *(features.names if features is not None else ())))
        rank.append(Score(parts.ranker, parts.ranker_columns, settings.ranker.task_weights, settings.cold))
    fallback = len(sources)
    fill = Popular(parts.popular, limits, fallback)
    rerank = Rerank.of(settings.rerank, settings.window, parts.item_columns, parts.vectors, parts.ties, parts.new_vectors)
    popularity = {place for place, name in enumerate(given) if isinstance(parts.sources[name], Popularity)}
    explain = Explain(
        {place: source.model for place, source in enumerate(sources) if place not in popularity},
        frozenset(popularity | {fallback}),
        new=None if new is None else len(given),
    )
    introduce = () if new is None else (Introduce(new.start, settings.new_items.first, settings.new_items.every),)
    return Pipeline(
        (retrieve,), tuple(rank), (*filters(limits), fill, *introduce, rerank),
        explain=explain,
        fallback=Popular(parts.popular, limits, fallback, least=settings.window, name="fallback"),
        ties=parts.ties,
        source_names=(*(source.name for source in sources), FALLBACK),
        reserve=settings.reserve_ms / 1000,
        observer=observer,
    )  # fmt: skip
