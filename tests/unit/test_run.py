"""The settings of a run: a page, overrides, what is refused and how, tuned values, and the pipeline that the targets suggest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maple import demo
from maple.errors import ConfigError
from maple.evaluate.harness import CatalogueStats, Evaluation, Recommend, Relevant, evaluate
from maple.features.spec import ContentRef
from maple.recommend.settings import PipelineSettings
from maple.run import RunConfig, merged, run_config

PAGE = """
data: somewhere
seed: 7
tune: {random_trials: 3, models: [als]}
split: {train: 0.7}
"""


@pytest.fixture
def page(tmp_path: Path) -> str:
    (tmp_path / "run.yaml").write_text(PAGE)
    return str(tmp_path / "run.yaml")


# -- where settings come from ------------------------------------------------------------------------------------------


def test_without_anything_everything_is_default() -> None:
    assert run_config(None) == RunConfig()
    assert RunConfig().data == "simulated"


def test_the_page_then_the_data_then_the_overrides(page: str) -> None:
    config = run_config(page)
    assert (config.data, config.seed, config.tune.random_trials, config.tune.models, config.split.train) == (
        "somewhere",
        7,
        3,
        ("als",),
        0.7,
    )
    assert config.tune.tpe_trials == RunConfig().tune.tpe_trials
    config = run_config(page, "elsewhere", ["seed=8", "tune.random_trials=4", "tune.random_trials=5"])
    assert (config.data, config.seed, config.tune.random_trials, config.tune.models) == ("elsewhere", 8, 5, ("als",))


def test_a_date_needs_no_quotes(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("split:\n  t1: 2011-10-01\n  t2: 2011-11-01T12:00:00Z\n")
    for config in (run_config(str(tmp_path / "run.yaml")), run_config(None, None, ["split={t1: 2011-10-01, t2: 2011-11-01T12:00:00Z}"])):
        assert (config.split.t1, config.split.t2) == ("2011-10-01", "2011-11-01T12:00:00Z")


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("tune.resume=false", ("tune", "resume"), False),
        ("evaluate.ks=[1, 3]", ("evaluate", "ks"), (1, 3)),
        ("split.t1=null", ("split", "t1"), None),
        ("serve.store={kind: redis, url: 'redis://h'}", ("serve", "store", "url"), "redis://h"),
        ("serve.store.path=/tmp/a=b", ("serve", "store", "path"), "/tmp/a=b"),
        ("rows.horizon_days=2.5", ("rows", "horizon_days"), 2.5),
        ("pipeline.sources=[{name: p, model: popularity}]", ("pipeline", "sources", 0, "model"), "popularity"),
    ],
)
def test_an_override_is_yaml_after_the_first_equals_sign(override: str, path: tuple[Any, ...], value: Any) -> None:
    found: Any = run_config(None, None, [override])
    for part in path:
        found = found[part] if isinstance(part, int) else getattr(found, part)
    assert found == value


def test_an_override_reaches_below_another() -> None:
    config = run_config(None, None, ["pipeline={sources: [{name: p, model: popularity}]}", "pipeline.rerank.mmr.relevance=0.5"])
    assert config.pipeline is not None
    assert config.pipeline.rerank.mmr is not None
    assert config.pipeline.rerank.mmr.relevance == 0.5
    assert len(config.pipeline.sources) == 1


@given(st.integers(0, 10**6), st.integers(1, 500), st.booleans())
def test_a_page_of_settings_reads_back(seed: int, trials: int, promote: bool) -> None:
    config = run_config(None, None, [f"seed={seed}", f"tune.random_trials={trials}", f"publish.promote={str(promote).lower()}"])
    assert (config.seed, config.tune.random_trials, config.publish.promote) == (seed, trials, promote)
    assert RunConfig.parse(config.plain(), "again") == config


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("tune.randm_trials=1", r"settings: unknown setting 'tune\.randm_trials'\. Did you mean 'random_trials'\?"),
        ("tun.random_trials=1", r"settings: unknown setting 'tun'\. Did you mean 'tune'\?"),
        ("tune.random_trials=many", r"tune\.random_trials: .*integer"),
        ("tune.random_trials=-1", r"tune\.random_trials: .*greater than or equal to 0"),
        ("tune.random_trials", r"--set 'tune\.random_trials': write key=value, for example"),
        ("=3", r"--set '=3': write key=value"),
        ("seed.x=3", r"seed: .*integer"),
        ("tune.models=[als", r"--set 'tune\.models=\[als': the value is not YAML: .*line 1"),
        ("data=!!python/object/apply:os.system [true]", r"the value is not YAML: could not determine a constructor"),
        ("split.train=1.5", r"split\.train: .*less than 1"),
        ("split.t1=2020-01-01", r"split: .*give both t1 and t2"),
        ("serve.placement=both", r"serve\.placement: .*'fused' or 'split'"),
        ("pipeline.sources=[{name: a, model: eas}]", r"pipeline\.sources\.0: .*unknown model 'eas'\. Did you mean 'ease'\?"),
        ("pipeline.sources=[{name: a, model: ease, config: {regularisation: 3}}]", r"pipeline\.sources\.0: .*a\.config: unknown setting"),
        ("pipeline.ranker.model=dnc", r"unknown ranker 'dnc'\. Did you mean 'dcn'\?"),
    ],
)
def test_a_wrong_setting_is_named(override: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        run_config(None, None, [override])


def test_an_override_below_a_value_of_the_page(page: str) -> None:
    with pytest.raises(ConfigError, match=r"--set seed\.deeper\.x: 'seed' is not a section"):
        run_config(page, None, ["seed.deeper.x=1"])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("tune: {randm_trials: 1}", r"run\.yaml: unknown setting 'tune\.randm_trials'"),
        ("tune: [", r"run\.yaml: not valid YAML: .*line 1"),
        ("- a\n- b", r"run\.yaml: expected a mapping of settings at the top, found list"),
        ("a: &x 1\nb: *x", r"run\.yaml: YAML aliases"),
        ("data: !!python/name:os.system", r"run\.yaml: not valid YAML"),
        ("\xff", r"run\.yaml: not valid YAML|run\.yaml: not UTF-8"),
    ],
)
def test_a_wrong_page_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "run.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=complaint):
        run_config(str(tmp_path / "run.yaml"))


def test_a_page_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the settings file .*nowhere\.yaml: No such file"):
        run_config(str(tmp_path / "nowhere.yaml"))


# -- tuned values ------------------------------------------------------------------------------------------------------

PIPELINE = PipelineSettings.parse(
    {
        "sources": [{"name": "collab", "model": "als", "config": {"factors": 8, "alpha": 3.0}}, {"name": "popular", "model": "popularity"}],
        "ranker": {"model": "dcn", "config": {"ensemble": 2}},
    },
    "test",
)


def test_tuned_values_go_where_they_belong() -> None:
    tuned = {"collab": {"factors": 64, "iterations": 9}, "ranker": {"training.learning_rate": 0.01, "rank": 16}, "gone": {"x": 1}}
    after = merged(PIPELINE, tuned)
    assert after.sources[0].config == {"factors": 8, "alpha": 3.0, "iterations": 9}, "what people wrote stays"
    assert after.sources[1] == PIPELINE.sources[1]
    assert after.ranker is not None
    assert after.ranker.config == {"ensemble": 2, "rank": 16, "training": {"learning_rate": 0.01}}
    assert "iterations" not in PIPELINE.sources[0].config, "the settings given are not changed"
    assert merged(PIPELINE, {}) == PIPELINE


def test_tuned_values_for_a_ranker_that_is_not_there() -> None:
    plain = PipelineSettings.parse({**PIPELINE.plain(), "ranker": None}, "test")
    assert merged(plain, {"ranker": {"rank": 16}}) == plain


def test_tuned_values_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"tuned pipeline settings: .*unknown setting 'factor'\. Did you mean 'factors'"):
        merged(PIPELINE, {"collab": {"factor": 64}})


# -- the pipeline that targets suggest ---------------------------------------------------------------------------------


def test_bought_things_may_be_bought_again_and_rated_ones_not() -> None:
    shop, films = RunConfig().pipeline_for(["purchase"]), RunConfig().pipeline_for(["rating"])
    assert (shop.repeats, shop.bought) == (True, ["purchase"])
    assert (films.repeats, films.bought) == (False, ["rating"])
    assert "frequency" in {source.model for source in shop.sources}
    assert "frequency" not in {source.model for source in films.sources}
    assert shop.ranker is not None
    assert films.ranker is not None


def test_given_settings_are_used_as_they_are() -> None:
    config = RunConfig.parse({"pipeline": PIPELINE.plain()}, "test")
    assert config.pipeline_for(["rating"]) == PIPELINE


# -- the demo's budgets ------------------------------------------------------------------------------------------------


def test_the_demo_is_small_where_nobody_asked_for_more() -> None:
    budget = demo.small(run_config(None, None, ["tune.tpe_trials=4", "evaluate.max_users=9"]))
    assert (budget.tune.random_trials, budget.tune.tpe_trials, budget.evaluate.max_users) == (2, 4, 9)
    assert budget.serve.clock == "data"
    assert budget.rows.max_queries < RunConfig().rows.max_queries


def test_the_demo_takes_people_at_their_word_where_they_ask_for_the_default() -> None:
    asked = RunConfig().tune.random_trials
    assert demo.small(run_config(None, None, [f"tune.random_trials={asked}", "serve.clock=now"])).tune.random_trials == asked
    assert demo.small(run_config(None, None, ["serve.clock=now"])).serve.clock == "now"
    assert demo.small(RunConfig()).tune.random_trials < asked


def test_the_demos_verdict_holds_for_what_was_measured() -> None:
    """Against the baseline and the best source where there are any; no claim where there are none."""
    wanted = np.arange(40, dtype=np.int32) % 8
    relevant = Relevant(np.arange(40, dtype=np.int32), np.arange(41), wanted)
    hit = {"pipeline": wanted, "good": np.where(np.arange(40) < 20, wanted, 8), "popular": np.where(np.arange(40) < 4, wanted, 8)}

    def measured(*names: str, k: int = 10) -> dict[str, Evaluation]:
        def lists(name: str) -> Recommend:
            return lambda rows: np.concatenate([hit[name][rows, None], np.full((len(rows), k - 1), -1)], axis=1).astype(np.int32)

        stats = CatalogueStats(np.ones(9, np.int64), 9)
        return {name: evaluate(lists(name), relevant, catalogue=stats, ks=(k,), bootstrap=100) for name in names}

    text = demo._verdict(measured("pipeline", "good", "popular"), "popular")
    assert "reaches ndcg@10 1.0000 on events" in text
    assert "10.00 times the popular baseline (0.1000)" in text
    assert "The best source alone, good, reaches 0.5000; the difference is more than chance." in text
    assert "reaches ndcg@3 1.0000" in demo._verdict(measured("pipeline", "popular", k=3), "popular")
    alone = demo._verdict(measured("pipeline"), "pipeline")
    assert alone == "The served pipeline reaches ndcg@10 1.0000 on events after everything it learned from."
    without = demo._verdict(measured("pipeline", "good"), "pipeline")
    assert "times" not in without
    assert "The best source alone, good," in without


def test_features_remember_what_the_pipeline_does() -> None:
    refs = {"text": ContentRef(dim=3, digest="d")}
    page = {"features": {"half_lives": [2.0], "attributes": {"user": ["age"]}, "together": None}}
    spec = RunConfig.parse(page, "run").features_for(["purchase"], refs)
    assert (spec.half_lives, spec.attributes.user, spec.together, spec.content) == ((2.0,), ("age",), None, refs)
    assert spec.history_limit == RunConfig().pipeline_for(["purchase"]).history_limit
    assert RunConfig.parse(RunConfig().plain(), "again").features_for(["purchase"], {}).content == {}
    with pytest.raises(ConfigError, match="write it in the pipeline alone"):
        RunConfig.parse({"features": {"history_limit": 7}}, "run").features_for(["purchase"], {})
    with pytest.raises(ConfigError, match="under `content:`"):
        RunConfig.parse({"features": {"content": {"x": {"dim": 1, "digest": "d"}}}}, "run").features_for(["purchase"], {})
