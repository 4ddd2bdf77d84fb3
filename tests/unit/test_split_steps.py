"""Splits in a run: a gap between a cut and what is asked for, and the sources measured alone under splits that train no pipeline."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from shop import ITEMS, Happening, snapshot
from taste_shop import dataset

from maple.artifacts import Place, open_manifest
from maple.config import yaml_value
from maple.data.splits import TimeSplit, split_of
from maple.evaluate.relevant import relevant_of
from maple.features.fold import DAY
from maple.features.spec import FeatureSpec
from maple.hashing import rng
from maple.learn import evaluate_step
from maple.models.base import FitContext
from maple.models.content.items import ENCODERS
from maple.recommend.settings import PipelineSettings
from maple.run import RunConfig
from maple.train.fit import fit_sources, ranker_rows
from maple.train.objectives import problem_of
from maple.train.rows import RowSettings, targets_after

SOURCES = ("popularity", "item-knn")


def test_nothing_of_the_gap_is_a_label() -> None:
    data = dataset()
    cut, plain = (split_of(data, TimeSplit(gap_days=days)) for days in (4, 0))
    assert (cut.t1, cut.t2, cut.gap) == (plain.t1, plain.t2, 4 * DAY)
    settings = PipelineSettings.parse(
        {"sources": [{"name": name, "model": name} for name in SOURCES], "rerank": {"mmr": None}, "repeats": True}, "test"
    )  # fmt: skip
    late = relevant_of(data, cut.valid_start, cut.t2, new_only=False, known_before=cut.t1)
    found = targets_after(
        data, cut.t1, cut.t2, new_only=False, settings=RowSettings(), rng=rng(0, "x"), gap=cut.gap
    )  # fmt: skip
    assert found.digest == late.digest
    problem = problem_of("item-knn", data, cut, settings, 1, FitContext())
    assert problem.data.relevant.digest == late.digest
    sources, _ = fit_sources(data.before(cut.t1), settings, FitContext(), lambda text: None)
    spec = FeatureSpec(views=("user.recency",), history_limit=settings.history_limit)
    rows = {
        name: ranker_rows(data, sources, settings, spec, one, RowSettings(), say=lambda text: None)
        for name, one in (("gap", cut), ("no", plain))
    }
    assert 0 < rows["gap"].labels.sum() < rows["no"].labels.sum()
    assert rows["gap"].labels.sum() <= len(late.items)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A home with a small snapshot, and settings of a pipeline of two sources."""
    draw, names = rng(1, "steps"), ITEMS["item_id"].to_pylist()
    users, items, times = (draw.integers(bound, size=400).tolist() for bound in (30, 5, 90))
    snapshot(tmp_path, [Happening(f"u{u}", names[i], "purchase", t * DAY) for u, i, t in zip(users, items, times, strict=True)], 1000)
    monkeypatch.setenv("MAPLE_HOME", str(tmp_path / "home"))
    pipeline = {"sources": [{"name": name, "model": name} for name in SOURCES], "rerank": {"mmr": None}, "repeats": True}
    return RunConfig.parse({"pipeline": pipeline, "evaluate": {"ks": [1, 3], "bootstrap": 100}}, "test")


@pytest.mark.parametrize(
    ("split", "folds"),
    [
        ({"kind": "leave_one_out"}, 1), ({"kind": "kfold", "folds": 3}, 3), ({"kind": "user", "train": 0.6}, 1),
        ({"kind": "session", "minutes": 60 * 24 * 5, "train": 0.5}, 1),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else "",
)  # fmt: skip
def test_sources_are_measured_alone_under_other_splits(config: RunConfig, tmp_path: Path, split: dict[str, object], folds: int) -> None:
    asked = config.with_(split=split)
    result = evaluate_step(asked, lambda line: None)
    assert result.summary == f"2 sources on {folds} fold(s)"
    ((title, _, body),) = result.tables
    assert str(split["kind"]) in title
    assert [row[0] for row in body] == ["popularity", "item-knn"]
    assert all(0 < result.facts[row[0]]["hit@3"] <= 1 for row in body)
    (folder,) = (child for child in (Place.at(tmp_path / "home") / "evaluations").children())
    assert open_manifest(folder, "evaluation").meta["split"] == asked.split.plain()
    kept = json.loads((folder / "item-knn-0.json").read())["protocol"]
    assert kept["split"]["settings"] == asked.split.plain()
    values = [json.loads((folder / f"item-knn-{fold}.json").read())["means"]["ndcg@3"] for fold in range(folds)]
    assert result.facts["item-knn"]["ndcg@3"] == pytest.approx(np.mean(values))
    if split["kind"] != "session":
        assert "what other users did" in result.details[0] or "see the future" in result.details[0]


@pytest.mark.parametrize("name", ["content", "splits"])
def test_settings_of_the_pages_are_settings(name: str) -> None:
    text = (Path(__file__).parents[2] / "docs" / f"{name}.md").read_text()
    blocks = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        parsed = RunConfig.parse(yaml_value(block), f"docs/{name}.md")
        assert RunConfig.parse(parsed.plain(), "again") == parsed
    known = ENCODERS if name == "content" else ("time", "leave_one_out", "user", "kfold", "session")
    assert re.findall(r"^\| `([\w-]+)`", text, re.MULTILINE) == list(known)
