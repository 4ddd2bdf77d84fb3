"""Publishing: what a settings page may change about an evaluated run, and what must be trained first."""

from __future__ import annotations

from typing import Any

import pytest

from maple import operate
from maple.errors import ConfigError
from maple.recommend.settings import PipelineSettings
from maple.run import RunConfig

SOURCES = [
    {"name": "popular", "model": "popularity", "config": {"window_days": 30.0}, "quota": 50},
    {"name": "als", "model": "als", "config": {"factors": 32}, "quota": 50},
]


def ran() -> PipelineSettings:
    """As a bundle stores them: the models' whole settings, with what tuning found."""
    page = PipelineSettings.parse({"sources": SOURCES, "ranker": {"model": "dcn", "config": {"ensemble": 1}}}, "run").plain()
    page["sources"][1]["config"] = {"factors": 32, "alpha": 3.5, "iterations": 7}
    return PipelineSettings.parse(page, "run")


def page(**changes: Any) -> RunConfig:
    asked = {"sources": SOURCES, "ranker": {"model": "dcn"}, **changes}
    return RunConfig.parse({"pipeline": asked}, "page")


def test_without_a_page_the_run_is_published_as_it_was_evaluated() -> None:
    assert operate._published_settings(RunConfig(), ran()) == ran()


def test_what_is_not_learned_comes_from_the_page_and_what_is_from_the_run() -> None:
    asked = page(rerank={"caps": [{"column": "category", "limit": 2}]}, window=30, sources=[{**SOURCES[0], "quota": 7}, SOURCES[1]])
    made = operate._published_settings(asked, ran())
    assert (made.window, made.rerank.caps[0].limit, made.sources[0].quota) == (30, 2, 7)
    assert made.sources[1].config["alpha"] == 3.5
    assert made.ranker is not None
    assert made.ranker.config["ensemble"] == 1


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"sources": SOURCES[:1]}, "sources"),
        ({"sources": [SOURCES[0], {**SOURCES[1], "config": {"factors": 64}}]}, "sources.als.config"),
        ({"ranker": None}, "ranker"),
        ({"ranker": {"model": "dcn", "config": {"ensemble": 3}}}, "ranker"),
        ({"repeats": False}, "repeats"),
        ({"history_limit": 50}, "history_limit"),
    ],
)
def test_what_only_training_can_change_is_refused_by_name(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=rf"differs from the latest run in .*{what}.*maple train"):
        operate._published_settings(page(**changes), ran())
