"""What people write about a pipeline is checked when it is read, with a hint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from maple.errors import ConfigError
from maple.recommend.settings import PipelineSettings, default_settings

EASE: dict[str, Any] = {"name": "ease", "model": "ease"}


def parse(**page: Any) -> PipelineSettings:
    return PipelineSettings.parse({"sources": [EASE], **page}, "pipeline.yaml")


def test_defaults_are_six_sources_and_a_ranker() -> None:
    settings = default_settings()
    assert [source.name for source in settings.sources] == ["frequency", "item-knn", "ease", "als", "two-tower", "popular"]
    assert settings.ranker is not None
    assert settings.ranker.model == "dcn"
    assert PipelineSettings.parse(settings.plain(), "again") == settings


def test_without_repeats_there_is_no_use_for_what_was_bought_before() -> None:
    settings = default_settings(repeats=False)
    assert not settings.repeats
    assert "frequency" not in [source.model for source in settings.sources]


@pytest.mark.parametrize(
    ("page", "complaint"),
    [
        ({"max_candidate": 5}, "Did you mean 'max_candidates'"),
        ({"sources": []}, "sources"),
        ({"sources": [EASE, EASE]}, "distinct"),
        ({"sources": [{"name": "a", "model": "eas"}]}, "Did you mean 'ease'"),
        ({"sources": [{"name": "A b", "model": "ease"}]}, "sources.0.name"),
        ({"sources": [{**EASE, "config": {"regularisatio": 1}}]}, r"sources\.0.*ease\.config"),
        ({"sources": [{**EASE, "quota": 0}]}, "sources.0.quota"),
        ({"ranker": {"model": "dnc"}}, "Did you mean 'dcn'"),
        ({"ranker": {"model": "dcn", "config": {"cross_layers": -1}}}, r"ranker.*config: cross_layers"),
        ({"rerank": {"rules": [{"name": "r", "match": {}, "action": "pin"}]}}, "match needs"),
        ({"rerank": {"freshness": {"half_life_days": 0}}}, "half_life_days"),
        ({"bought": ["purchas"]}, "bought.*Did you mean 'purchase'"),
        ({"deadline_ms": float("nan")}, "deadline_ms"),
    ],
)
def test_what_is_wrong_is_named(page: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse(**page)


def test_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "pipeline.yaml"
    path.write_text("sources:\n- {name: ease, model: ease}\nrerank:\n  caps: [{column: brand, limit: 2}]\n")
    assert PipelineSettings.read(path).rerank.caps[0].limit == 2
    path.write_text("sources:\n- {name: ease, model: ease, quta: 3}\n")
    with pytest.raises(ConfigError, match=r"pipeline\.yaml"):
        PipelineSettings.read(path)
