"""The state of a search without a cluster: what is recorded, what a new driver goes on from, what the answer is."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from maple.artifacts import Place
from maple.errors import ArtifactError, ConfigError
from maple.train.board import Board, Question, finished, load
from maple.train.registry import Tracking
from maple.train.search import Config, Halving, Plan, SearchSpace, Trial

SPACE = SearchSpace.parse({"rate": ("log", 1e-4, 1.0), "layers": ("choice", [[8], [8, 8]]), "size": ("choice", [8, 16])}, "toy")
QUESTION = Question(Plan(SPACE, 4, 4, seed=5, given=({"rate": 0.5, "layers": [8], "size": 8},)), "ndcg", Halving(steps=4))


def value_of(config: Config, step: int) -> float:
    return (1 - 0.5**step) * (1.0 - abs(math.log10(config["rate"]) + 2) / 4 + 0.1 * len(config["layers"]))


def drive(board: Board, steps: int = 4, stop_after_reports: int = 10**9) -> None:
    """Run trials one by one as a cluster would; give up in the middle of one after so many reports."""
    reports = 0
    while trial := board.next():
        board.begin(trial.number)
        for step in range(1, steps + 1):
            if reports == stop_after_reports:
                return
            reports += 1
            if board.report(trial.number, step, value_of(trial.config, step)):
                break
        else:
            board.complete(trial.number, value_of(trial.config, steps))


@pytest.fixture
def folder(tmp_path: Path) -> Place:
    return QUESTION.folder(Place.at(tmp_path), "toy")


def search(folder: Place, **how: int) -> Board:
    with Board(folder, QUESTION) as board:
        drive(board, **how)
        return board


def test_a_whole_search(folder: Place) -> None:
    board = search(folder)
    assert not finished(folder)
    board.publish()
    assert finished(folder)
    result = load(folder)
    assert result.trials["number"].to_pylist() == list(range(9))
    assert result.trials["phase"].to_pylist() == ["given"] + ["random"] * 4 + ["tpe"] * 4
    states = result.trials["state"].to_pylist()
    assert set(states) == {"complete", "pruned"}
    assert [s for s, steps in zip(states, result.trials["steps"].to_pylist(), strict=True) if steps == 4] == ["complete"] * states.count(
        "complete"
    )
    complete = [v for v, s in zip(result.trials["value"].to_pylist(), states, strict=True) if s == "complete"]
    assert result.best_value == max(complete) == value_of(result.best_config, 4)
    assert result.trials["value"].to_pylist()[result.best_number] == result.best_value
    assert (result.metric, result.mode) == ("ndcg", "max")
    assert result.trials["config.layers"].to_pylist()[0] == "[8]"
    assert result.trials["config.size"].to_pylist()[0] == 8


@pytest.mark.parametrize("reports", [0, 1, 4, 9, 13, 20])
def test_a_search_that_was_killed_ends_as_if_it_had_not_been(tmp_path: Path, reports: int) -> None:
    whole, killed = (QUESTION.folder(Place.at(tmp_path / side), "toy") for side in ("a", "b"))
    search(whole).publish()
    Board(killed, QUESTION)
    search(killed, stop_after_reports=reports)
    on_disk = {place.name for place in (killed / "trials").children()}
    again = Board(killed, QUESTION)
    kept = len(again.trials)
    assert kept >= len(on_disk) - 1  # at most the one trial in flight is run again
    with again:
        drive(again)
        again.publish()
    one, two = load(whole), load(killed)
    assert (one.best_number, one.best_config, one.best_value) == (two.best_number, two.best_config, two.best_value)
    drop = ["seconds", "started"]
    assert one.trials.drop_columns(drop) == two.trials.drop_columns(drop)


def test_the_trial_in_flight_is_run_again_first_and_with_its_configuration(folder: Place) -> None:
    board = Board(folder, QUESTION)
    first, second = board.next(), board.next()
    assert first is not None
    assert second is not None
    board.begin(first.number)
    board.complete(first.number, 1.0)
    again = Board(folder, QUESTION)
    assert [trial.number for trial in again.trials] == [0]
    retried = again.next()
    assert retried is not None
    assert (retried.number, retried.config) == (second.number, second.config)


def test_a_lost_worker_begins_again(folder: Place) -> None:
    board = Board(folder, QUESTION)
    trial = board.next()
    assert trial is not None
    board.begin(trial.number)
    board.report(trial.number, 1, 0.5)
    board.report(trial.number, 2, 0.6)
    assert not board.report(trial.number, 2, 0.7)  # a step is told once
    board.begin(trial.number)
    board.report(trial.number, 1, 0.55)
    assert board.trials[0].values == ((1, 0.55),)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_no_number_fails_the_trial(folder: Place, bad: float) -> None:
    board = Board(folder, QUESTION)
    for _ in range(2):
        trial = board.next()
        assert trial is not None
    board.report(0, 1, 0.5)
    assert board.report(0, 2, bad)
    board.complete(0, 1.0)  # too late
    board.complete(1, bad)
    assert [(trial.state, trial.value) for trial in board.trials] == [("failed", None)] * 2
    assert all("finite number" in trial.error for trial in board.trials)


def test_no_completed_trial_is_an_error_with_the_first_reason(folder: Place) -> None:
    board = Board(folder, QUESTION)
    while trial := board.next():
        board.fail(trial.number, f"DataError: no events {trial.number}")
    assert board.hopeless
    assert Board(folder, QUESTION).next() is None
    with pytest.raises(ArtifactError, match=r"none of the 3 trials.*no events 0.*resume off"):
        board.publish()
    assert not finished(folder)


def test_another_question_another_folder() -> None:
    home = Place.at("/x")
    folders = {
        QUESTION.folder(home, "toy").path,
        QUESTION.folder(home, "other").path,
        replace(QUESTION, fingerprint="other data").folder(home, "toy").path,
        replace(QUESTION, halving=None).folder(home, "toy").path,
        replace(QUESTION, plan=replace(QUESTION.plan, seed=6)).folder(home, "toy").path,
        replace(QUESTION, plan=replace(QUESTION.plan, space=SPACE.only(["rate"]), given=())).folder(home, "toy").path,
    }
    assert len(folders) == 6
    for name in ("", "..", "a/b", "x" * 101, ".hidden"):
        with pytest.raises(ConfigError, match="cannot name a search"):
            QUESTION.folder(home, name)
    with pytest.raises(ConfigError, match="exactly layers, rate, size; it sets rate"):
        Plan(SPACE, 1, 0, given=({"rate": 0.5},))


def test_damaged_records_say_so(folder: Place) -> None:
    search(folder).publish()
    (folder / "trials.parquet").write(b"PAR1")
    with pytest.raises(ArtifactError, match="altered"):
        load(folder)
    (folder / "trials" / "00003.json").write(b"{")
    with pytest.raises(ArtifactError, match=r"00003\.json"):
        Board(folder, QUESTION)


def test_progress_sees_every_trial_start_report_and_end(folder: Place) -> None:
    seen: list[Trial] = []
    watch: Callable[[Trial], None] = seen.append
    with Board(folder, QUESTION, progress=watch) as board:
        drive(board)
    ends = [trial.number for trial in seen if trial.state != "running"]
    assert ends == list(range(9))
    assert {trial.number for trial in seen if not trial.values} == {trial.number for trial in seen if trial.values} == set(range(9))


def test_every_trial_is_a_run_of_one_search_also_after_a_kill(folder: Place, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    tracking = Tracking(f"sqlite:///{tmp_path / 'mlflow.db'}", str(tmp_path / "mlartifacts"))
    killed = Board(folder, QUESTION, name="toy", tracking=tracking)
    killed.__enter__()
    drive(killed, stop_after_reports=6)
    with Board(folder, QUESTION, name="toy", tracking=tracking) as board:
        drive(board)
        board.publish()
    client = MlflowClient(tracking_uri=tracking.uri)
    experiment = client.get_experiment_by_name("tuning")
    runs = {run.info.run_name: run for run in reversed(client.search_runs([experiment.experiment_id]))}
    assert set(runs) == {"toy", *(f"toy-{number:03d}" for number in range(9))}
    parent = runs.pop("toy")
    result = load(folder)
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics == {"best/ndcg": result.best_value}
    assert parent.data.tags["best_trial"] == str(result.best_number)
    best = client.get_run(board.trials[result.best_number].run_id)
    assert best.data.params == {name: str(value) for name, value in result.best_config.items()}
    assert best.data.metrics["final/ndcg"] == result.best_value
    assert [m.step for m in client.get_metric_history(best.info.run_id, "ndcg")] == [1, 2, 3, 4]
    assert all(run.data.tags["mlflow.parentRunId"] == parent.info.run_id for run in runs.values())
    ended = {run.info.status for run in client.search_runs([experiment.experiment_id])}
    assert ended == {"FINISHED", "KILLED"}
    assert json.loads((folder / "run.json").read())["run_id"] == parent.info.run_id
