"""A small shop with known tastes, and bundles fitted on it: users and items fall into four groups, users only meet their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from maple.artifacts import Place
from maple.data.dataset import Dataset
from maple.data.splits import boundaries
from maple.models.base import FitContext
from maple.recommend.bundle import Bundle
from maple.recommend.settings import PipelineSettings
from maple.schema import EVENT_CODES, EVENTS, TIMESTAMP
from maple.train.fit import fit_pipeline, fit_sources

GROUPS = 4
END_US = 1_760_000_000 * 1_000_000


def group(name: str) -> int:
    """The taste of a user or item id such as u12 or i7."""
    return int(name[1:]) % GROUPS


def dataset(users: int = 120, items: int = 80, per_user: int = 15) -> Dataset:
    """Events of 90 days before END_US."""
    rng = np.random.default_rng(7)
    count = users * per_user
    user = rng.integers(0, users, count)
    item = rng.integers(0, items // GROUPS, count) * GROUPS + user % GROUPS
    time = END_US - rng.integers(1, 90 * 86_400 * 1_000_000, count)
    events = pa.table(
        {
            "event_id": [f"e{n}" for n in range(count)],
            "user_id": [f"u{n}" for n in user],
            "item_id": [f"i{n}" for n in item],
            "event": rng.choice(["view", "purchase"], count, p=[0.6, 0.4]).tolist(),
            "timestamp": pa.array(time, pa.int64()).cast(TIMESTAMP),
            "value": pa.array(np.ones(count, np.float32)),
            "price": pa.array(rng.uniform(1, 9, count).astype(np.float32)),
            "session_id": [f"s{n}" for n in range(count)],
            "request_id": pa.nulls(count, pa.string()),
        },
        schema=EVENTS,
    )
    table = pa.table(
        {
            "item_id": [f"i{n}" for n in range(items)],
            "title": [f"Thing {n}" for n in range(items)],
            "category": [f"c{n % GROUPS}" for n in range(items)],
            "price": pa.array(rng.uniform(1, 9, items).astype(np.float32)),
        }
    )
    return Dataset.from_tables(events, table)


def publish(home: str | Path, *models: str) -> str:
    """Fit sources of these models, publish a bundle without a ranker, return its digest. A second."""
    data = dataset()
    settings = PipelineSettings.parse({"sources": [{"name": name, "model": name, "quota": 40} for name in models]}, "test")
    sources, _ = fit_sources(data, settings, FitContext(), lambda text: None)
    return Bundle.assemble(settings, data, sources, fingerprint="f" * 64).save(Place.at(home))


def publish_ranked(home: str | Path, *models: str) -> str:
    """The same with features and a ranker. Some seconds, and it imports torch."""
    data = dataset()
    page = {"sources": [{"name": name, "model": name, "quota": 40} for name in models], "ranker": {"model": "dcn"}}
    cut = boundaries(data.log.time[data.log.event == EVENT_CODES["purchase"]])
    settings = PipelineSettings.parse(page, "test")
    return fit_pipeline(data, settings, cut, fingerprint="f" * 64, say=lambda text: None).bundle.save(Place.at(home))
