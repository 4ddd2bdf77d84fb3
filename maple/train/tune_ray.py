"""Tuning on a cluster: Ray Tune runs the trials that ``search`` suggests; ``board`` keeps what is known of them.

Ray sees three thin adapters over one ``Board``: a searcher that asks it for configurations, a scheduler that asks it whether to stop, and
a callback that tells it when work begins. All three run in the driver. Ray's own experiment checkpoint is a pickle; it goes to a scratch
folder, is never read, and is removed: the board's files are what a search goes on from.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

from maple.artifacts import Place
from maple.errors import ConfigError, MapleError, ServeError
from maple.train.board import Board, Question, TuneResult, finished, load
from maple.train.registry import Tracking
from maple.train.search import Config, Halving, Mode, Plan, SearchSpace, Trial

_LOST_WORKER_RETRIES = 2

#: Called by an objective after each unit of work (epoch, iteration): (step counted from 1, value so far).
Report: TypeAlias = Callable[[int, float], None]
#: ``objective(config, data, report) -> final value``. It runs in a worker process; ``data`` is what was given to ``tune``.
Objective: TypeAlias = Callable[[Config, Any, Report], float]


def tune(
    objective: Objective,
    data: Any,
    space: SearchSpace,
    *,
    name: str,
    home: Place,
    metric: str,
    mode: Mode = "max",
    random_trials: int = 8,
    tpe_trials: int = 8,
    given: Sequence[Config] = (),
    halving: Halving | None = None,
    max_concurrent: int = 1,
    cpus: float = 1.0,
    gpus: float = 0.0,
    seed: int = 0,
    fingerprint: str = "",
    resume: bool = True,
    tracking: Tracking | None = None,
    progress: Callable[[Trial], None] | None = None,
) -> TuneResult:
    """Search ``space`` for the configuration with the best value of ``objective``; needs a running Ray.

    ``given`` configurations (say, the defaults) are tried first, then random ones, then TPE's. ``halving`` stops poor trials early.
    ``cpus`` and ``gpus`` are reserved per trial, ``max_concurrent`` trials run at once; more than one makes TPE's suggestions depend on
    which trial ends first, so only ``max_concurrent=1`` repeats bit by bit. ``fingerprint`` names the data and code that values depend on:
    with it, the space, the counts and the seed unchanged, a finished search is returned as it is and an unfinished one goes on;
    ``resume=False`` starts anew. ``progress`` sees each trial when it starts, reports and ends.

    A trial that raises is recorded as failed and the search goes on. Raises ``ServeError`` where Ray stops before all trials ran, and
    ``ArtifactError`` where not one trial was completed.
    """
    plan = Plan(space, random_trials, tpe_trials, seed, mode, tuple(given))
    question = Question(plan, metric, halving, fingerprint)
    folder = question.folder(home, name)
    if max_concurrent < 1 or cpus < 0 or gpus < 0:
        raise ConfigError(f"tuning needs max_concurrent >= 1, cpus >= 0 and gpus >= 0, found {max_concurrent}, {cpus} and {gpus}")
    if not resume:
        folder.delete()
    if not finished(folder):
        with Board(folder, question, name=name, tracking=tracking, progress=progress) as board:
            if board.left:
                _run(objective, data, board, max_concurrent=max_concurrent, cpus=cpus, gpus=gpus)
            board.publish()
    return load(folder)


def _trial(config: Config, work: list[Any]) -> None:
    """What a worker runs. Errors of the objective, and of loading it, are results, so that Ray retries lost workers only."""
    import ray
    from ray import tune as ray_tune

    number = config["number"]

    def report(step: int, value: float) -> None:
        ray_tune.report({"number": number, "step": int(step), "reported": float(value)})

    try:
        objective, data = ray.get(work[0])  # nested, so that what cannot be loaded here is an error of this trial
        value = float(objective(dict(config["config"]), data, report))
    except Exception as error:
        text = str(error) if isinstance(error, MapleError) else f"{type(error).__name__}: {error}"
        ray_tune.report({"number": number, "failed": text})
    else:
        ray_tune.report({"number": number, "final": value})


def _run(objective: Objective, data: Any, board: Board, *, max_concurrent: int, cpus: float, gpus: float) -> None:
    """Run what is left of a search. Ray's own files go to a scratch folder."""
    import ray
    from ray import tune as ray_tune
    from ray.tune.schedulers import FIFOScheduler, TrialScheduler
    from ray.tune.search import Searcher

    numbers: dict[str, int] = {}

    class Suggest(Searcher):  # type: ignore[misc]
        def suggest(self, trial_id: str) -> Config | str | None:
            trial = board.next()
            if trial is None:
                return str(Searcher.FINISHED)
            numbers[trial_id] = trial.number
            return {"number": trial.number, "config": trial.config}

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            """Nothing: ``Watch`` tells the board."""

        def save(self, checkpoint_path: str) -> None:
            """Nothing: the board's own files are the state."""

        def restore(self, checkpoint_path: str) -> None:
            raise NotImplementedError

    class Stop(FIFOScheduler):  # type: ignore[misc]
        _supports_buffered_results = False

        def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
            number = result["number"]
            if "reported" in result:
                stop = board.report(number, result["step"], result["reported"])
                return str(TrialScheduler.STOP if stop else TrialScheduler.CONTINUE)
            if "final" in result:
                board.complete(number, result["final"])
            elif "failed" in result:
                board.fail(number, result["failed"])
            return str(TrialScheduler.CONTINUE)

    class Watch(ray_tune.Callback):  # type: ignore[misc]
        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            board.begin(numbers[trial.trial_id])

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            last = str(trial.get_error() or "").strip().splitlines()[-1:]
            board.fail(numbers[trial.trial_id], f"its worker was lost {_LOST_WORKER_RETRIES + 1} times: {''.join(last)[:500]}")

    with _quiet(), _scratch() as scratch:
        tuner = ray_tune.Tuner(
            ray_tune.with_resources(ray_tune.with_parameters(_trial, work=[ray.put((objective, data))]), {"cpu": cpus, "gpu": gpus}),
            tune_config=ray_tune.TuneConfig(
                search_alg=Suggest(), scheduler=Stop(), num_samples=len(board.left), max_concurrent_trials=max_concurrent,
                reuse_actors=True,
            ),
            run_config=ray_tune.RunConfig(
                name="search", storage_path=scratch, verbose=0, callbacks=[Watch()],
                failure_config=ray_tune.FailureConfig(max_failures=_LOST_WORKER_RETRIES),
            ),
        )  # fmt: skip
        tuner.fit()
    unfinished = [trial for trial in board.trials if trial.state == "running"]
    if (board.left and not board.hopeless) or unfinished:
        raise ServeError(
            f"Ray stopped the search after {len(board.trials) - len(unfinished)} of {board.plan.total} trials. "
            "What is known is kept; search again to go on."
        )


@contextlib.contextmanager
def _scratch() -> Iterator[str]:
    path = tempfile.mkdtemp(prefix="maple-tune-")
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Ray's own result files, tables and timing warnings; the environment is as before afterwards."""
    wanted = {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0", "TUNE_WARN_THRESHOLD_S": "30"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    logger = logging.getLogger("ray.tune")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
