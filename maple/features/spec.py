"""Which features there are: the settings people write, the views they name, and the digest that states are kept under."""

from __future__ import annotations

import json
from functools import cached_property
from typing import Self

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


class FeatureSpec(Section):
    """The features of a bundle, offline and online alike."""

    views: tuple[str, ...] = Field(tuple(VIEW_IDS), description="names of the views, e.g. user.activity; all by default")
    half_lives: tuple[float, ...] = Field((1.0, 7.0, 30.0), description="memory of decayed counts in days, ascending")
    tick_hours: float = Field(24.0, gt=0, description="item features change once per tick")
    history_limit: int = Field(500, ge=1, description="events of a user that a request sees one by one; folds see them all")

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
        """All columns that ``states.hydrate`` gives, in order."""
        return CONTEXT_FEATURES + tuple(name for entity in Entity for name in self.feature_names(entity))

    @cached_property
    def digest(self) -> str:
        """Identifies views, slots and settings: what is folded, not how much of it is shown."""
        slots = [[str(view.key), view.name, [[int(slot.op), slot.half_life] for slot in view.slots]] for view in self.all_views]
        return combine([str(FOLD_VERSION), json.dumps(self.plain(), sort_keys=True), json.dumps(slots)])

    def state_digest(self, catalogue: Catalogue) -> str:
        """What online states are kept under: they depend on the spec and on the catalogue's categories, brands and prices."""
        return combine([self.digest, catalogue.digest])[:24]
