"""Which features there are: the settings people write, the views they name, and the digest that states are kept under."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from maple.config import Section
from maple.errors import unknown_name
from maple.features.catalogue import Catalogue
from maple.features.fold import DAY
from maple.features.view import Entity, Key, View
from maple.features.views import VIEW_IDS
from maple.hashing import combine

#: Raise when the meaning of a contribution or of the fold changes: stored states are then folded again from the log.
FOLD_VERSION = 2

#: Numbers of the moment of a request, for every candidate.
CONTEXT_FEATURES: tuple[str, ...] = ("context.hour_cos", "context.hour_sin", "context.weekday_cos", "context.weekday_sin")


class AttributeSettings(Section):
    """Which columns of the USERS and ITEMS tables are features: their names, or "*" for all that are fit to be."""

    user: Literal["*"] | tuple[str, ...] = "*"
    item: Literal["*"] | tuple[str, ...] = "*"
    max_values: int = Field(256, ge=1, description="values of a text column that get a code; with '*' a text column with more is left out")
    max_tags: int = Field(12, ge=1, description="values of a list column that get a column")


class TogetherSettings(Section):
    """What users take together: items of one user within some hours, counted over all users."""

    last: int = Field(10, ge=1, description="the user's last distinct items that a candidate is held against")
    window_hours: float = Field(24.0, gt=0, description="how far apart two events of a user may be")
    partners: int = Field(8, ge=1, description="events before an event that it is paired with at most: bounds the cost of large baskets")
    neighbours: int = Field(20, ge=1, description="items kept per item, the most frequent ones")
    tick_days: float = Field(7.0, gt=0, description="counts change once per tick")

    @property
    def tick(self) -> int:
        """Length of a tick in microseconds."""
        return int(self.tick_days * DAY)


class ContentRef(Section):
    """The vectors behind a content feature: their dimensions, and the digest of vectors and encoder."""

    dim: int = Field(ge=1)
    digest: str


class FeatureSpec(Section):
    """The features of a bundle, offline and online alike."""

    views: tuple[str, ...] = Field(tuple(VIEW_IDS), description="names of the views, e.g. user.activity; all by default")
    half_lives: tuple[float, ...] = Field((1.0, 7.0, 30.0), description="memory of decayed counts in days, ascending")
    tick_hours: float = Field(24.0, gt=0, description="item features change once per tick")
    history_limit: int = Field(500, ge=1, description="events of a user that a request sees one by one; folds see them all")
    context: tuple[str, ...] = Field(("device", "location", "surface"), description="what requests and events say of their circumstances")
    attributes: AttributeSettings = AttributeSettings()
    together: TogetherSettings | None = TogetherSettings()
    content: dict[str, ContentRef] = Field({}, description="item vectors by name; the feature build fills it in")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in self.views:
            if name not in VIEW_IDS:
                raise ValueError(unknown_name("view", name, VIEW_IDS))
        if len(set(self.views)) != len(self.views):
            raise ValueError("a view is named twice")
        if not self.half_lives or any(h <= 0 for h in self.half_lives) or list(self.half_lives) != sorted(set(self.half_lives)):
            raise ValueError("half_lives must be positive, distinct and ascending")
        return self

    @property
    def tick(self) -> int:
        """Length of a tick in microseconds."""
        return int(self.tick_hours * DAY / 24)

    @cached_property
    def all_views(self) -> tuple[View, ...]:
        """The views, built."""
        return tuple(VIEW_IDS[name](self.half_lives) for name in self.views)

    def of(self, entity: Entity) -> tuple[View, ...]:
        """The views whose features belong to an entity."""
        return tuple(view for view in self.all_views if view.entity == entity)

    def keyed(self, key: Key) -> tuple[View, ...]:
        """The views that keep their states by a key."""
        return tuple(view for view in self.all_views if view.key == key)

    def feature_names(self, entity: Entity) -> tuple[str, ...]:
        """Names of an entity's features, in column order."""
        return tuple(name for view in self.of(entity) for name in view.names)

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that ``states.hydrate`` gives, in order; those of ``extras`` come after them."""
        return CONTEXT_FEATURES + tuple(name for entity in Entity for name in self.feature_names(entity))

    @cached_property
    def digest(self) -> str:
        """Identifies everything about the features."""
        return combine([self.fold_digest, json.dumps([_slots(self.all_views), self.plain()], sort_keys=True)])

    @cached_property
    def fold_digest(self) -> str:
        """Identifies what user events are folded into: views, slots, memory; not what is read beside them."""
        folded = [view for view in self.all_views if view.key != Key.ITEM]
        return combine([str(FOLD_VERSION), json.dumps([_slots(folded), self.half_lives, self.history_limit])])

    def state_digest(self, catalogue: Catalogue) -> str:
        """What online states are kept under: they depend on the folds and on the catalogue's categories, brands and prices."""
        return combine([self.fold_digest, catalogue.digest])[:24]


def _slots(views: Sequence[View]) -> list[Any]:
    return [[str(view.key), view.name, [[int(slot.op), slot.half_life, slot.gap] for slot in view.slots]] for view in views]
