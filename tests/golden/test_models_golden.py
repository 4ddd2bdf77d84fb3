"""Published and independently measured figures: Gowalla popularity, EASE on the UltraGCN split of ML-1M."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from maple.models.linear import Ease, EaseConfig
from maple.models.popularity import Popularity, PopularityConfig

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def measure(data_dir, monkeypatch):
    """Fit a model on a folder of ``train.txt`` and ``test.txt`` and average its metrics at 20."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import quality_gowalla

    def run(folder, model):
        return quality_gowalla.measure(model, *quality_gowalla.load(data_dir / folder), threads=1)

    yield run
    sys.modules.pop("quality_gowalla", None)


def test_gowalla_popularity_is_the_published_one(measure):
    got = measure("gowalla", Popularity(PopularityConfig(window_days=None)))
    assert round(got["recall@20"], 4) == pytest.approx(0.0416, abs=1.01e-4)  # ties are many; the order of equals is Maple's own
    assert round(got["ndcg@20"], 4) == pytest.approx(0.0317, abs=1.01e-4)


def test_ease_on_ml_1m(measure):
    got = measure("ml-1m/ultragcn-split", Ease(EaseConfig(l2=1000.0)))
    assert got["recall@20"] == pytest.approx(0.2755, abs=2e-4)
    assert got["ndcg@20"] == pytest.approx(0.2674, abs=2e-4)
