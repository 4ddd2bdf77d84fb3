"""Every model that needs no torch under the one contract, and the catalogue that names them."""

from __future__ import annotations

import subprocess
import sys

import pytest
from model_suite import RetrieverSuite

from maple.errors import ConfigError
from maple.index import IndexConfig
from maple.models.catalog import MODELS, model_class, ranker_class
from maple.models.factorization import Als, AlsConfig
from maple.models.frequency import Frequency, FrequencyConfig
from maple.models.knn import ItemKnn, ItemKnnConfig
from maple.models.linear import Ease, EaseConfig
from maple.models.popularity import Popularity, PopularityConfig


class TestPopularity(RetrieverSuite):
    model = Popularity
    personal = relates = explains = False


class TestDecayedPopularity(TestPopularity):
    config = PopularityConfig(window_days=None, half_life_days=0.1, weighting="signals")


class TestFrequency(RetrieverSuite):
    model = Frequency
    discovers = relates = False


class TestDecayedFrequency(TestFrequency):
    config = FrequencyConfig(half_life_days=3.0)


class TestItemKnnCosine(RetrieverSuite):
    model = ItemKnn
    config = ItemKnnConfig(similarity="cosine")


class TestItemKnnTfidfWithShrink(RetrieverSuite):
    model = ItemKnn
    config = ItemKnnConfig(similarity="tfidf", shrink=2.0, binary=False)


class TestItemKnnBm25(RetrieverSuite):
    model = ItemKnn
    config = ItemKnnConfig(similarity="bm25")


class TestRp3Beta(RetrieverSuite):
    model = ItemKnn
    config = ItemKnnConfig(similarity="rp3beta", beta=0.4, recency=0.9)


class TestEase(RetrieverSuite):
    model = Ease
    config = EaseConfig(l2=20.0)


class TestSparseEase(RetrieverSuite):
    model = Ease
    config = EaseConfig(l2=20.0, keep=15, recency=0.8, max_items=40)


class TestAls(RetrieverSuite):
    model = Als
    config = AlsConfig(factors=4, regularization=5.0, iterations=10)


class TestAlsWithLongHistoriesForItsSize(RetrieverSuite):
    model = Als
    config = AlsConfig(factors=2, regularization=1.0, iterations=10, binary=False, damping=0.2)


class TestAlsSearchedByFaiss(RetrieverSuite):
    model = Als
    config = AlsConfig(factors=4, regularization=5.0, iterations=10, index=IndexConfig(kind="flat"))


def test_a_wrong_name_gets_a_hint():
    with pytest.raises(ConfigError, match="Did you mean 'popularity'"):
        model_class("populariti")
    with pytest.raises(ConfigError, match="unknown ranker 'als'"):
        ranker_class("als")


@pytest.mark.parametrize("name", ["popularity", "frequency", "item-knn", "ease", "als"])
def test_names_lead_to_models(name):
    assert MODELS[name].endswith(f":{model_class(name).__name__}")


def test_models_without_torch_do_not_import_it():
    names = [name for name in MODELS if name != "two-tower"]
    code = f"import sys; from maple.models.catalog import model_class; [model_class(n) for n in {names}]; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
