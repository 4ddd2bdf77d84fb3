"""The settings of a serving application: what stands under ``args`` in the YAML of a deployment shape."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from maple.config import Section


class StoreSettings(Section):
    """The online store of user events. SQLite serves one node; Redis a cluster."""

    kind: Literal["sqlite", "redis"] = "sqlite"
    path: str | None = None  # of the SQLite file; default <home>/online.sqlite
    url: str | None = None  # of Redis, e.g. redis://host:6379/0
    read_timeout_s: Annotated[float, Field(gt=0, le=60)] = 0.5  # how long Redis may take over a user's state

    @model_validator(mode="after")
    def _url_where_needed(self) -> Self:
        if self.kind == "redis" and not self.url:
            raise ValueError("a Redis store needs its url, e.g. redis://127.0.0.1:6379/0")
        return self


class CacheSettings(Section):
    """The response cache of each ingress replica."""

    size: Annotated[int, Field(ge=0, le=1_000_000)] = 2000  # answers; 0 keeps none
    lifetime_s: Annotated[float, Field(gt=0, le=3600)] = 5.0


class ServeSettings(Section):
    """One serving application."""

    home: str  # the folder or URI with the bundles
    placement: Literal["fused", "split"] = "fused"
    store: StoreSettings = Field(default_factory=StoreSettings)
    cache: CacheSettings = Field(default_factory=CacheSettings)
    local_bundles: str | None = None  # per-node folder for bundles of a remote home; default: a folder below the system's temporary one
    deadline_ms: Annotated[float, Field(gt=0, le=60_000)] | None = None  # from arrival to answer; default: the bundle's
    threads: Annotated[int, Field(ge=1, le=64)] = 2  # that compute in one replica
    runs: Annotated[int, Field(ge=1, le=64)] = 1  # batches at once in one replica
    max_batch: Annotated[int, Field(ge=1, le=256)] = 8  # queries answered together while others wait
    max_in_flight: Annotated[int, Field(ge=1, le=10_000)] = 64  # requests inside one ingress replica; more are refused with 503
    live_poll_s: Annotated[float, Field(gt=0, le=3600)] = 1.0  # how often each replica looks for changes of single items
    clock_offset_s: float = 0.0  # added to the clock: a service over historical data lives in the time of its data

    @model_validator(mode="after")
    def _threads_suffice(self) -> Self:
        if self.runs > self.threads:
            raise ValueError(f"runs ({self.runs}) may not exceed threads ({self.threads})")
        return self
