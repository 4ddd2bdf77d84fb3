"""Content from the item table to a request: into the features' folder, the bundle, and the columns of an item newer than the bundle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from taste_shop import END_US, dataset, group

from maple.artifacts import Place
from maple.data.dataset import Histories
from maple.features.content import ItemContent
from maple.features.extras import Extras, Requests
from maple.features.live_items import LiveItem
from maple.features.spec import FeatureSpec
from maple.models.base import FitContext
from maple.models.content.items import ContentSettings, content_vectors
from maple.recommend.bundle import Bundle, ItemFeatures, load
from maple.recommend.live import LiveView, live_bundle
from maple.recommend.settings import PipelineSettings
from maple.train.fit import fit_sources

NAMES = ("linen shirt", "garden spade", "coffee mug", "candle holder")


def made() -> Bundle:
    """A bundle whose items have titles that tell their group."""
    data = dataset()
    titles = [f"{NAMES[group(item) % len(NAMES)]} {item}" for item in data.items.ids.to_pylist()]
    at = data.item_table.column_names.index("title")
    table = data.item_table.set_column(at, "title", pa.array(titles))
    data = replace(data, item_table=table)
    content = content_vectors(table, {"text": ContentSettings(dim=6)}, FitContext(), lambda line: None)
    refs = {name: {"dim": one.dim, "digest": one.digest} for name, one in content.items()}
    settings = PipelineSettings.parse(
        {"sources": [{"name": "popularity", "model": "popularity"}], "rerank": {"mmr": None}, "ranker": None}, "test"
    )  # fmt: skip
    spec = FeatureSpec(views=("user.recency",), history_limit=settings.history_limit).with_(content=refs)
    features = ItemFeatures(spec, {}, Extras.fit(data, spec, content=content).at(END_US))
    sources, _ = fit_sources(data, settings, FitContext(), lambda line: None)
    return Bundle.assemble(settings, data, sources, fingerprint="f", features=features)


def test_a_new_item_has_the_content_of_its_words(tmp_path: Path) -> None:
    home = Place.at(tmp_path)
    bundle = load(home, made().save(home))
    assert bundle.features is not None
    kept: ItemContent = bundle.features.extras.content["text"]
    known = len(bundle.space.items)
    assert kept.vectors.shape == (known, 6)
    new = [LiveItem("new-shirt", 0, 1, title="a linen shirt for summer"), LiveItem("new-thing", 1, 2)]
    live = live_bundle(bundle, LiveView().after(2, new), END_US)
    codes = live.space.items.encode(["new-shirt", "new-thing"])
    assert codes.tolist() == [known, known + 1]
    of = [name.rsplit(" ", 1)[0] for name in bundle.space.item_table["title"].to_pylist()]
    shirts, spades = (np.flatnonzero(np.array(of) == name).astype(np.int32)[:3] for name in ("linen shirt", "garden spade"))
    times = [END_US - 3, END_US - 2, END_US - 1]
    histories = Histories.of([(shirts, [3] * 3, times), (spades, [3] * 3, times)])
    asked = Requests(np.full(2, END_US), histories, [{}, {}], [{}, {}])
    columns = live.extras.columns(asked, np.array([0, 2, 4]), np.tile(codes, 2))
    row = np.array([columns[f"item.content.text.{k}"][0] for k in range(6)])
    assert np.linalg.norm(row) > 0.99
    assert set(np.argsort(-(kept.vectors @ row))[:3].tolist()) <= set(np.flatnonzero(np.array(of) == "linen shirt").tolist())
    assert np.isnan(columns["item.content.text.0"][[1, 3]]).all()
    likeness = columns["user_item.content.text"]
    assert likeness[0] > 0.7 > likeness[2]
    assert np.isnan(likeness[[1, 3]]).all()
