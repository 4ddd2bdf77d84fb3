"""Tuning on a real Ray: phases, early stopping, lost workers, failing trials, and a driver that is killed and started again."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maple.artifacts import Place
from maple.data.dataset import Dataset
from maple.data.simulate import clean_events, simulate
from maple.data.splits import split_of
from maple.errors import ArtifactError, DataError
from maple.evaluate.metrics import ranking_metrics
from maple.evaluate.relevant import relevant_of
from maple.models.base import FitContext, QueryBatch
from maple.models.factorization import Als, AlsConfig
from maple.train.board import TuneResult
from maple.train.registry import Tracking
from maple.train.search import Halving, SearchSpace, Trial, configured
from maple.train.tune_ray import tune

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]

SPACE = SearchSpace.parse({"rate": ("log", 1e-5, 1.0), "layers": ("choice", [[8], [8, 8]])}, "toy")


Objective = Callable[[dict[str, Any], Any, Callable[[int, float], None]], float]


def make_curve() -> Objective:
    """A learning curve that rises to what the configuration is worth; the data scale it. (Local: workers do not have this file.)"""

    def curve(config: dict[str, Any], data: Any, report: Callable[[int, float], None]) -> float:
        value = 0.0
        for step in range(1, 10):
            value = float(data.mean()) * (1 - 0.5**step) * (1 - abs(math.log10(config["rate"]) + 2) / 4 + 0.1 * len(config["layers"]))
            report(step, value)
        return value

    return curve


def of_this_file(config: dict[str, Any], data: Any, report: Callable[[int, float], None]) -> float:
    """An objective that no worker can import."""
    return 1.0


def without_times(result: TuneResult) -> list[dict[str, Any]]:
    return result.trials.drop_columns(["seconds", "started"]).to_pylist()


def test_random_then_tpe_with_early_stopping_and_every_trial_in_mlflow(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    tracking = Tracking.open(tmp_path, f"sqlite:///{tmp_path}/mlflow.db")
    given = {"rate": 1.0, "layers": [8]}
    seen: list[Trial] = []
    terminal = threading.Lock()  # Ray pickles its search algorithm; what shows progress cannot be pickled
    curve = make_curve()

    def show(trial: Trial) -> None:
        with terminal:
            seen.append(trial)

    def ask(data: np.ndarray | None) -> TuneResult:
        return tune(
            curve, data, SPACE, name="toy", home=Place.at(tmp_path), metric="ndcg@20", random_trials=6, tpe_trials=6, given=[given],
            halving=Halving(steps=9), cpus=0.5, tracking=tracking, progress=show,
        )  # fmt: skip

    result = ask(np.full(1 << 16, 2.0))
    rows = result.trials.to_pylist()
    assert [row["phase"] for row in rows] == ["given"] + ["random"] * 6 + ["tpe"] * 6
    assert {row["state"] for row in rows} == {"complete", "pruned"}
    assert all((row["steps"] == 9) == (row["state"] == "complete") for row in rows)
    assert rows[0]["config.rate"] == 1.0
    # The value is what the objective says of the configuration, with the data that was passed.
    assert result.best_value == curve(result.best_config, np.full(4, 2.0), lambda step, value: None)
    assert result.best_value > rows[0]["value"]
    assert [trial.number for trial in seen if trial.state != "running"] == list(range(13))
    client = MlflowClient(tracking_uri=tracking.uri)
    runs = client.search_runs([client.get_experiment_by_name("tuning").experiment_id])
    assert len(runs) == 14
    assert sorted(run.info.status for run in runs) == sorted(
        ["FINISHED"] + ["FINISHED" if row["state"] == "complete" else "KILLED" for row in rows]
    )
    # Nothing of Ray's, and no pickle, is left in the home.
    assert {path.suffix for path in (tmp_path / "tunings").rglob("*") if path.is_file()} == {".json", ".parquet"}
    # The same question again is the same answer, at once.
    again = ask(None)
    assert again.trials == result.trials


def test_trials_run_at_once_and_a_failing_one_is_only_recorded(tmp_path: Path) -> None:
    def objective(config: dict[str, Any], data: Path, report: Callable[[int, float], None]) -> float:
        if config["n"] == 3:
            raise DataError("no events")
        if config["n"] == 5:
            return float("nan")
        if config["n"] == 7:
            return [][0]
        (data / f"begin{config['n']}").touch()
        limit = time.monotonic() + 30
        while len(list(data.glob("begin*"))) < 2 and time.monotonic() < limit:
            time.sleep(0.02)  # the first waits for a second: they must overlap
        return float(config["n"] if len(list(data.glob("begin*"))) >= 2 else -1)

    marks = tmp_path / "marks"
    marks.mkdir()
    space = SearchSpace.parse({"n": ("choice", list(range(10)))}, "toy")
    result = tune(
        objective, marks, space, name="fails", home=Place.at(tmp_path), metric="n", mode="min", random_trials=24, tpe_trials=0,
        max_concurrent=2, cpus=0.5,
    )  # fmt: skip
    said = {row["config.n"]: (row["state"], row["error"]) for row in result.trials.to_pylist()}
    assert {3, 5, 7} <= set(said)
    assert said[3] == ("failed", "no events")
    assert said[5][0] == "failed"
    assert "finite number" in said[5][1]
    assert said[7] == ("failed", "IndexError: list index out of range")
    assert result.best_value == min(n for n, (state, _) in said.items() if state == "complete")


def test_where_all_trials_fail_the_error_says_why(tmp_path: Path) -> None:
    def objective(config: dict[str, Any], data: None, report: Callable[[int, float], None]) -> float:
        raise DataError("no events of value in the window")

    with pytest.raises(ArtifactError, match=r"none of the 3 trials .*no events of value"):
        tune(objective, None, SPACE, name="none", home=Place.at(tmp_path), metric="n", random_trials=9, tpe_trials=0, cpus=0.5)


def test_an_objective_that_workers_cannot_load_ends_the_search_at_once(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"none of the 3 trials .*No module named"):
        tune(of_this_file, None, SPACE, name="none", home=Place.at(tmp_path), metric="n", random_trials=9, tpe_trials=0, cpus=0.5)


def test_a_worker_that_is_lost_every_time_fails_its_trial(tmp_path: Path) -> None:
    def objective(config: dict[str, Any], data: None, report: Callable[[int, float], None]) -> float:
        if config["n"] == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return 1.0

    space = SearchSpace.parse({"n": ("choice", [1, 2])}, "toy")
    result = tune(
        objective,
        None,
        space,
        name="lost",
        home=Place.at(tmp_path),
        metric="n",
        random_trials=0,
        tpe_trials=0,
        given=[{"n": 2}, {"n": 1}],
        cpus=0.5,
    )
    assert [row["state"] for row in result.trials.to_pylist()] == ["complete", "failed"]
    assert "lost 3 times" in result.trials["error"].to_pylist()[1]


def test_a_lost_worker_is_tried_again_from_its_first_step(tmp_path: Path) -> None:
    def objective(config: dict[str, Any], data: str, report: Callable[[int, float], None]) -> float:
        report(1, 0.1)
        report(2, 0.2)
        mark = Path(data) / "killed"
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        report(3, 0.3)
        return 0.3

    result = tune(
        objective, str(tmp_path), SPACE, name="lost", home=Place.at(tmp_path), metric="v", random_trials=2, tpe_trials=0, cpus=0.5
    )
    assert (tmp_path / "killed").exists()
    assert [(row["state"], row["steps"], row["value"]) for row in result.trials.to_pylist()] == [("complete", 3, 0.3)] * 2
    recorded = json.loads((Path(result.folder) / "trials" / "00000.json").read_text())
    assert recorded["values"] == [[1, 0.1], [2, 0.2], [3, 0.3]]


def test_als_tuned_on_the_validation_window_beats_a_poor_start_and_its_value_can_be_had_again(tmp_path: Path) -> None:
    shop = simulate(seed=3, num_users=400, num_items=300, days=40)
    data = Dataset.from_tables(clean_events(shop))
    space = SearchSpace.parse(AlsConfig.search_space(), "als").only(["factors", "regularization", "alpha"])
    poor = AlsConfig(factors=32, regularization=300.0, alpha=0.5)

    def objective(config: dict[str, Any], data: Dataset, report: Callable[[int, float], None]) -> float:
        cut = split_of(data)
        model = Als(configured(AlsConfig(iterations=5), config))
        model.fit(cut.train(data), FitContext(seed=1))
        relevant = relevant_of(data, cut.t1, cut.t2, new_only=False, known_before=cut.t1)
        queries = QueryBatch.at(data, relevant.users, np.full(len(relevant), cut.t1, np.int64), 100)
        lists, _ = model.topk(queries, 10)
        return float(ranking_metrics(lists, relevant.offsets, relevant.items, ks=(10,))["ndcg@10"].mean())

    result = tune(
        objective, data, space, name="als", home=Place.at(tmp_path), metric="ndcg@10", random_trials=5, tpe_trials=5,
        given=[space.current(poor)], cpus=0.5, max_concurrent=2,
    )  # fmt: skip
    assert result.trials["state"].to_pylist() == ["complete"] * 11
    values = result.trials["value"].to_pylist()
    assert result.best_value == max(values) > 1.2 * values[0] > 0
    assert objective(result.best_config, data, lambda step, value: None) == pytest.approx(result.best_value, rel=1e-6)


DRIVER = """
import sys, time
from maple.artifacts import Place
from maple.cluster_ray import attach
from maple.train.search import Halving, SearchSpace
from maple.train.tune_ray import tune
import math

def curve(config, data, report):
    with open(f"{data}/ran", "a") as log:
        log.write(f"{config['rate']!r}\\n")
    value = 0.0
    for step in range(1, 10):
        time.sleep(0.03)
        value = (1 - 0.5**step) * (1 - abs(math.log10(config["rate"]) + 2) / 4)
        report(step, value)
    return value

attach(sys.argv[1])
space = SearchSpace.parse({"rate": ("log", 1e-5, 1.0)}, "toy")
result = tune(
    curve, sys.argv[2], space, name="killed", home=Place.at(sys.argv[2]), metric="v", random_trials=6, tpe_trials=10,
    halving=Halving(steps=9), cpus=0.5,
)
print(result.folder)
"""


def test_a_driver_that_is_killed_goes_on_and_ends_as_if_it_had_not_been(ray_local: str, tmp_path: Path) -> None:
    from maple.train.board import load

    homes = [tmp_path / "whole", tmp_path / "killed"]
    for each in homes:
        each.mkdir()

    def start(home: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", DRIVER, ray_local, str(home)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def ended(home: Path) -> int:
        return sum('"state": "running"' not in path.read_text() for path in home.glob("tunings/killed/*/trials/*.json"))

    whole = start(homes[0])
    victim = start(homes[1])
    limit = time.monotonic() + 120
    while ended(homes[1]) < 8 and victim.poll() is None and time.monotonic() < limit:
        time.sleep(0.02)
    assert victim.poll() is None
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    before = ended(homes[1])
    assert 8 <= before < 16
    second = start(homes[1])
    folders = []
    for process in (whole, second):
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err[-2000:]
        folders.append(Place.at(out.strip().splitlines()[-1]))
    one, two = load(folders[0]), load(folders[1])
    assert without_times(one) == without_times(two)
    assert (one.best_number, one.best_config, one.best_value) == (two.best_number, two.best_config, two.best_value)
    # Of all the work only the trial in flight was done twice.
    assert len((homes[0] / "ran").read_text().splitlines()) == 16
    assert len((homes[1] / "ran").read_text().splitlines()) in (16, 17)
