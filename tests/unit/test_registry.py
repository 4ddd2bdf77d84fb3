"""MLflow as an index of digests: runs, versions by digest, aliases that follow the ledger. All tests share one file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from maple.artifacts import Place, seal, write_file
from maple.errors import ArtifactError, ConfigError
from maple.train.registry import Tracking, aliases, find, metric_name, mirror, register
from maple.train.release import Ledger


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Tracking:
    folder = tmp_path_factory.mktemp("mlflow")
    return Tracking(f"sqlite:///{folder / 'mlflow.db'}", str(folder / "mlartifacts"))


def publish(home: Path, content: str) -> str:
    draft = Place.at(home / "draft" / content)
    digest = seal(draft, "bundle", {}, [write_file(draft, "a.txt", content.encode())]).digest
    (home / "bundles").mkdir(parents=True, exist_ok=True)
    os.replace(draft.path, home / "bundles" / digest)
    return digest


def client(tracking: Tracking):  # type: ignore[no-untyped-def]
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=tracking.uri, registry_uri=tracking.uri)


def test_the_default_store_is_a_file_in_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert Tracking.open(tmp_path) == Tracking(f"sqlite:///{tmp_path}/mlflow.db", f"{tmp_path}/mlartifacts")
    assert Tracking.open(tmp_path.as_uri()) == Tracking.open(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert Tracking.open(tmp_path) == Tracking("http://127.0.0.1:5000", None)


def test_a_home_in_a_bucket_needs_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.fs as pafs

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI"):
        Tracking.open(Place(pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()), "home"))


def test_metric_names() -> None:
    assert metric_name("ndcg@20") == "ndcg_at_20"
    assert metric_name("a(b)?c d/e:f-g.h") == "a_b__c d/e:f-g.h"


def test_runs_keep_settings_figures_parents_and_how_they_ended(tracking: Tracking) -> None:
    with tracking.run("search", "parent", tags={"kind": "tune"}) as parent:
        parent.params({f"p{n}": n for n in range(150)} | {"long": "x" * 5000})
        child = tracking.start("search", "child", parent=parent)
        child.metrics({"ndcg@20": 0.25}, step=1)
        child.metrics({"ndcg@20": 0.5}, step=2)
        child.end("KILLED")
    with pytest.raises(ZeroDivisionError), tracking.run("search", "broken") as broken:
        _ = 1 / 0
    look = client(tracking)
    found = look.get_run(parent.id)
    assert (found.info.status, found.data.tags["kind"], found.data.params["p149"]) == ("FINISHED", "tune", "149")
    assert len(found.data.params["long"]) == 500
    found = look.get_run(child.id)
    assert (found.info.status, found.data.tags["mlflow.parentRunId"]) == ("KILLED", parent.id)
    assert [(m.step, m.value) for m in look.get_metric_history(child.id, "ndcg_at_20")] == [(1, 0.25), (2, 0.5)]
    assert look.get_run(broken.id).info.status == "FAILED"
    assert look.get_experiment_by_name("search").artifact_location == tracking.artifacts
    assert tracking.exists(child.id)
    assert not tracking.exists("0" * 32)
    assert not tracking.exists("")


def test_a_digest_is_registered_once_and_never_as_a_loadable_model(tracking: Tracking, tmp_path: Path) -> None:
    digest, uri = "a" * 64, (tmp_path / "bundles" / "a").as_uri()
    version = register(tracking, digest, uri, metrics={"ndcg@20": 0.4}, params={"als.factors": 64}, model="once")
    assert register(tracking, digest, uri, model="once") == version == find(tracking, digest, "once")
    assert register(tracking, "b" * 64, uri, model="once") != version
    assert find(tracking, "c" * 64, "once") is None
    found = client(tracking).get_model_version("once", version)
    assert (found.source, found.tags["digest"]) == (uri, digest)
    run = client(tracking).get_run(found.run_id)
    assert (run.data.metrics, run.data.params) == ({"ndcg_at_20": 0.4}, {"als.factors": "64"})
    assert client(tracking).list_artifacts(found.run_id) == []


def test_aliases_follow_the_ledger(tracking: Tracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAPLE_LEDGER", raising=False)
    ledger = Ledger.open(tmp_path)
    assert mirror(tracking, ledger, "followed").generation == 0
    a, b = publish(tmp_path, "a"), publish(tmp_path, "b")
    ledger.promote(a)
    with pytest.raises(ArtifactError, match="maple publish"):
        mirror(tracking, ledger, "followed")
    for digest in (a, b):
        register(tracking, digest, (tmp_path / "bundles" / digest).as_uri(), model="followed")
    mirror(tracking, ledger, "followed")
    assert aliases(tracking, "followed") == {"champion": a}
    ledger.promote(b)
    ledger.set_shadow(a)
    assert mirror(tracking, ledger, "followed").generation == 3
    assert aliases(tracking, "followed") == {"champion": b, "previous": a, "shadow": a}
    ledger.rollback()
    ledger.set_shadow(None)
    mirror(tracking, ledger, "followed")
    assert aliases(tracking, "followed") == {"champion": a}


def test_mirror_sees_a_change_made_while_it_writes(tracking: Tracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAPLE_LEDGER", raising=False)
    ledger = Ledger.open(tmp_path)
    a, b = publish(tmp_path, "a"), publish(tmp_path, "b")
    for digest in (a, b):
        register(tracking, digest, digest, model="raced")
    ledger.promote(a)
    from maple.train import registry

    write = registry._set_aliases

    def slow(*args: object) -> None:
        write(*args)  # type: ignore[arg-type]
        if ledger.read().generation == 1:
            ledger.promote(b)

    monkeypatch.setattr(registry, "_set_aliases", slow)
    assert mirror(tracking, ledger, "raced").generation == 2
    assert aliases(tracking, "raced") == {"champion": b, "previous": a}


def test_a_database_that_is_none_says_so(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("this is not a database, it is a text file of some length")
    with pytest.raises(ArtifactError, match=r"mlflow\.db"):
        Tracking.open(tmp_path, f"sqlite:///{tmp_path}/mlflow.db").start("e", "r")
    with pytest.raises(ConfigError, match="cannot write"):
        Tracking(f"sqlite:///{tmp_path}/mlflow.db/inside/mlflow.db").start("e", "r")
