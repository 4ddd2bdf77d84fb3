"""The models that torch trains under the contract of all retrievers and, for DCN-v2, of rankers."""

from __future__ import annotations

import numpy as np
from model_suite import RetrieverSuite

from maple.artifacts import Place
from maple.models.base import FitContext, QueryBatch, Ranker, Retriever
from maple.models.catalog import model_class, ranker_class
from maple.models.ctr import DCNv2, DCNv2Config
from maple.models.two_tower import TwoTower, TwoTowerConfig
from maple.train.search import SearchSpace, configured

TRAINING = {"epochs": 10, "batch_size": 32, "learning_rate": 0.02, "warmup_steps": 0, "patience": 15, "device": "cpu"}


def tower(**changes: object) -> TwoTowerConfig:
    plain = {"embedding": 8, "hidden": 8, "item_fields": [], "item_numbers": [], "training": TRAINING}
    return TwoTowerConfig.parse(plain | changes, "test")


def check_search_space(config: TwoTowerConfig | DCNv2Config) -> None:
    """Every proposal is legal and the defaults are one of them."""
    space = SearchSpace.parse(config.search_space(), "test")
    assert space.holds(space.current(type(config)()))
    for seed in range(20):
        configured(config, space.sample(np.random.default_rng(seed)))


class TestTwoTower(RetrieverSuite):
    model = TwoTower
    config = tower()

    def test_the_search_space_proposes_legal_settings(self) -> None:
        check_search_space(tower())


class TestTwoTowerOfHiddenItems(TestTwoTower):
    config = tower(examples="hidden", softmax="sampled", negatives=10, training=TRAINING | {"epochs": 40})


class TestTwoTowerWithContent(TestTwoTower):
    config = tower(item_fields=["category", "brand"], item_numbers=["price"], horizon=3)

    def test_an_item_nobody_touched_never_leads(self, fitted: Retriever, queries: QueryBatch) -> None:
        """It may: its category and price are known. What it may not is be silent or NaN."""
        flat = fitted.score(queries, np.full(len(queries), 40, np.int32), np.arange(len(queries) + 1))
        assert np.isfinite(flat).all()


class TestDCNv2:
    def test_it_is_a_ranker_in_the_catalogue(self) -> None:
        assert ranker_class("dcn") is DCNv2
        assert model_class("two-tower") is TwoTower
        assert isinstance(DCNv2(), Ranker)
        assert DCNv2Config.parse(DCNv2Config().plain(), "test") == DCNv2Config()
        check_search_space(DCNv2Config())

    def test_a_fit_that_was_killed_goes_on_to_the_same_bits(self, tmp_path: object) -> None:
        rng = np.random.default_rng(0)
        columns = {"x": rng.normal(size=600).astype(np.float32), "code": rng.integers(0, 5, 600).astype(np.int32)}
        labels = (columns["x"] + columns["code"] > 3).astype(np.float32)[:, None]
        groups = np.repeat(np.arange(60), 10)
        config = DCNv2Config.parse({"ensemble": 2, "training": {"epochs": 4, "device": "cpu"}}, "test")

        class Killed(Exception):
            pass

        def kill(epoch: int, metrics: dict[str, float]) -> None:
            if epoch == 6:  # the second epoch of the second member
                raise Killed

        whole, resumed, place = DCNv2(config), DCNv2(config), Place.at(str(tmp_path))
        whole.fit(columns, labels, groups, FitContext(seed=1))
        try:
            resumed.fit(columns, labels, groups, FitContext(seed=1, report=kill), checkpoint=place)
            raise AssertionError("the fit was not killed")
        except Killed:
            pass
        resumed.fit(columns, labels, groups, FitContext(seed=1), checkpoint=place)
        for name, array in whole.state().items():
            np.testing.assert_array_equal(resumed.state()[name], array)
