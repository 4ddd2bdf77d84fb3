"""What people write about a pipeline: its sources, ranker, reranking rules and limits, as one typed YAML page.

``default_settings`` is what Maple starts with; ``maple/recommend/bundle`` stores the page with every release.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from maple.config import Section, read_yaml
from maple.errors import MapleError
from maple.models.catalog import model_class, ranker_class
from maple.schema import event_codes

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
Value = str | bool | int | float


@contextmanager
def _as_value_error() -> Iterator[None]:
    """Lets the page say where a setting is wrong, around an error that says what is wrong."""
    try:
        yield
    except MapleError as error:
        raise ValueError(str(error)) from None


class SourceSettings(Section):
    """One retriever of the pipeline."""

    name: Name  # of its columns source.<name>.score and source.<name>.rank, and in answers
    model: str  # a name of the model catalogue
    config: dict[str, Any] = Field(default_factory=dict)  # settings of that model
    quota: Annotated[int, Field(ge=1, le=10_000)] = 200  # how many items it may propose per request

    @model_validator(mode="after")
    def _model_takes_its_config(self) -> Self:
        with _as_value_error():
            model_class(self.model).Config.parse(self.config, f"{self.name}.config")
        return self


class RankerSettings(Section):
    """The model that orders the candidates."""

    model: str
    config: dict[str, Any] = Field(default_factory=dict)
    task_weights: dict[str, float] = Field(default_factory=lambda: {"purchase": 1.0})  # score = weighted sum of the tasks, in this order

    @model_validator(mode="after")
    def _model_takes_its_config(self) -> Self:
        with _as_value_error():
            ranker_class(self.model).Config.parse(self.config, "config")
        return self


class MMRSettings(Section):
    """Diversity by maximal marginal relevance: relevance x score - (1 - relevance) x similarity to what is chosen already."""

    relevance: Annotated[float, Field(ge=0, le=1)] = 0.9  # 1 leaves the order as it is
    by: Literal["vectors", "category"] = "vectors"  # what similarity means; vectors come from the first source that has them


class FreshnessSettings(Section):
    """A bonus for new items: weight x 2^(-age / half_life), on scores scaled to 0..1 inside the window."""

    weight: Annotated[float, Field(ge=0, le=10)] = 0.1
    half_life_days: Annotated[float, Field(gt=0)] = 30.0
    column: str = "created_at"  # the item column with the time an item appeared


class CapSettings(Section):
    """At most ``limit`` items with the same value of an item column in one answer."""

    column: str
    limit: Annotated[int, Field(ge=1)]


class RuleSettings(Section):
    """What to do with items whose columns have given values: multiply the scaled score, pin to the top, or remove."""

    name: Name
    match: dict[str, list[Value]]  # item column -> accepted values; all columns must match
    action: Literal["boost", "bury", "pin", "remove"]
    weight: Annotated[float, Field(ge=0, le=10)] = 0.2  # added (boost) or taken off (bury), on scores scaled to 0..1 inside the window

    @model_validator(mode="after")
    def _matches_something(self) -> Self:
        if not self.match or not all(self.match.values()):
            raise ValueError("match needs at least one column with at least one value")
        return self


class RerankSettings(Section):
    """Business rules and diversity, applied to the best ``window`` ranked items; places that rules free are filled from below."""

    mmr: MMRSettings | None = None
    freshness: FreshnessSettings | None = None
    caps: list[CapSettings] = Field(default_factory=list)
    rules: list[RuleSettings] = Field(default_factory=list)


class NewItemsSettings(Section):
    """Where items that are newer than the bundle (put live, never trained on) may stand in a list."""

    quota: Annotated[int, Field(ge=0, le=1000)] = 20  # how many of them are candidates of a request; 0 = none are recommended
    first: Annotated[int, Field(ge=1, le=1000)] = 5  # the place of the best one, from 1
    every: Annotated[int, Field(ge=1, le=1000)] = 10  # places between them


class PipelineSettings(Section):
    """Everything about one pipeline that is not learned."""

    history_limit: Annotated[int, Field(ge=1, le=10_000)] = 500  # the last events that represent a user, offline and online
    repeats: bool = True  # whether items that the user has bought may be recommended again
    bought: list[str] = Field(default_factory=lambda: ["purchase"])  # event kinds that count as bought where repeats is false
    max_candidates: Annotated[int, Field(ge=1, le=100_000)] = 600  # per request, after merging the sources
    score_union: bool = True  # every source scores the candidates of all sources
    sources: Annotated[list[SourceSettings], Field(min_length=1, max_length=31)]
    ranker: RankerSettings | None = None
    cold: Literal["popular", "rank"] = "popular"  # order for users without known history: as retrieved, or ranked
    rerank: RerankSettings = Field(default_factory=RerankSettings)
    new_items: NewItemsSettings = Field(default_factory=NewItemsSettings)
    window: Annotated[int, Field(ge=1, le=1000)] = 100  # how many ranked items reranking looks at
    fallback_days: Annotated[float, Field(gt=0)] = 30.0  # popularity window of the list that answers when retrieval fails
    deadline_ms: Annotated[float, Field(gt=0)] = 150.0
    reserve_ms: Annotated[float, Field(ge=0)] = 5.0  # of the deadline, kept for filters and rules

    @field_validator("bought")
    @classmethod
    def _events_exist(cls, names: list[str]) -> list[str]:
        with _as_value_error():
            event_codes(names)
        return names

    @model_validator(mode="after")
    def _names_are_distinct(self) -> Self:
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"sources: names must be distinct, got {', '.join(names)}")
        return self

    @staticmethod
    def read(path: str | Path) -> PipelineSettings:
        """From a YAML file; a ``ConfigError`` says what is wrong with it."""
        return PipelineSettings.parse(read_yaml(path), str(path))


# Listed by how much their reason tells a user: where two sources propose an item equally high, the first one explains it.
DEFAULTS: Mapping[str, Any] = {
    "sources": [
        {"name": "frequency", "model": "frequency", "quota": 200},
        {"name": "item-knn", "model": "item-knn", "quota": 200},
        {"name": "ease", "model": "ease", "quota": 200},
        {"name": "als", "model": "als", "quota": 200},
        {"name": "two-tower", "model": "two-tower", "quota": 200},
        {"name": "popular", "model": "popularity", "config": {"window_days": 30}, "quota": 100},
    ],
    "ranker": {"model": "dcn"},
    # On the last tenth of Online Retail this costs 0.1 % of NDCG@10 and makes lists 1 % more diverse: on, but mild.
    "rerank": {"mmr": {"relevance": 0.95}},
}


def default_settings(*, repeats: bool = True) -> PipelineSettings:
    """Six sources (personal frequency, item-kNN, EASE, ALS, two-tower, 30-day popularity) and a DCN-v2 ranker.

    Without repeats the personal frequency source is left out: all it knows is what was bought before.
    """
    sources = [source for source in DEFAULTS["sources"] if repeats or source["model"] != "frequency"]
    return PipelineSettings.parse({**DEFAULTS, "sources": sources, "repeats": repeats}, "default pipeline settings")
