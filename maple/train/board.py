"""The state of a search: its trials in memory, as files, and as runs in MLflow.

A search is a folder ``<home>/tunings/<name>/<digest of what was asked>``: one JSON per trial, written when it starts and when it ends,
and ``trials.parquet`` with a manifest once all are done. Those files alone say what is left to do, so a search whose driver was killed
goes on when it is asked for again, and repeats at most the trials that were in flight. One process, the driver, writes all of it.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from maple.artifacts import MANIFEST, Place, open_manifest, parquet_bytes, read_file, seal, write_file
from maple.errors import ArtifactError, ConfigError, MapleError
from maple.hashing import combine
from maple.train.registry import Run, Tracking
from maple.train.search import Config, Halving, Mode, Plan, SearchSpace, Trial, best

#: So many failures without any success end a search.
_HOPELESS = 3


@dataclass(frozen=True)
class TuneResult:
    """What a search found. ``trials`` has a row per trial in order of number, see ``table_of``; ``folder`` is a path or URI."""

    best_config: Config
    best_value: float
    best_number: int
    metric: str
    mode: Mode
    trials: pa.Table
    folder: str


@dataclass(frozen=True)
class Question:
    """What is searched: the plan, what its values measure, when a trial is stopped, and a name for the data and code they depend on."""

    plan: Plan
    metric: str
    halving: Halving | None = None
    fingerprint: str = ""

    def plain(self) -> dict[str, Any]:
        """JSON-ready; equal questions, equal values."""
        plan, halving = self.plan, self.halving
        return {
            "space": plan.space.plain(),
            "given": list(plan.given),
            "random_trials": plan.random_trials,
            "tpe_trials": plan.tpe_trials,
            "seed": plan.seed,
            "mode": plan.mode,
            "metric": self.metric,
            "halving": [halving.grace, halving.eta, halving.steps] if halving else None,
            "fingerprint": self.fingerprint,
        }

    def folder(self, home: Place, name: str) -> Place:
        """Where the answer is kept: another question, another folder. ``ConfigError`` for a name that is no file name."""
        if not re.fullmatch(r"[\w][\w.-]{0,99}", name):
            raise ConfigError(f"{name[:120]!r} cannot name a search: use up to 100 letters, digits, '.', '-' and '_'")
        return home / "tunings" / name / combine([json.dumps(self.plain(), sort_keys=True)])[:16]


def finished(folder: Place) -> bool:
    """Whether a search has its answer."""
    return (folder / MANIFEST).exists()


def load(folder: Place) -> TuneResult:
    """A finished search; ``ArtifactError`` if it is unfinished or was altered."""
    manifest = open_manifest(folder, "tuning")
    table = pq.read_table(pa.BufferReader(read_file(folder, manifest, "trials.parquet")))
    answer, asked = manifest.meta["best"], manifest.meta["asked"]
    return TuneResult(answer["config"], float(answer["value"]), int(answer["number"]), asked["metric"], asked["mode"], table, folder.uri)


def table_of(trials: Sequence[Trial], space: SearchSpace) -> pa.Table:
    """Trials as a table in order of number; the values of a choice between lists or between types are JSON text."""
    rows = sorted(trials, key=lambda trial: trial.number)
    columns: dict[str, Any] = {
        "number": pa.array([trial.number for trial in rows], pa.int32()),
        "phase": [trial.phase for trial in rows],
        "state": [trial.state for trial in rows],
        "value": pa.array([trial.value for trial in rows], pa.float64()),
        "steps": pa.array([trial.values[-1][0] if trial.values else 0 for trial in rows], pa.int32()),
        "seconds": pa.array([trial.seconds for trial in rows], pa.float64()),
        "started": [trial.started for trial in rows],
        "error": [trial.error for trial in rows],
    }
    for dimension in space.dimensions:
        values = [trial.config[dimension.name] for trial in rows]
        kinds = {type(choice) for choice in dimension.choices}
        as_text = list in kinds or len(kinds) > 1
        columns[f"config.{dimension.name}"] = [json.dumps(value) for value in values] if as_text else values
    return pa.table(columns)


class Board:
    """The trials of one search. ``next`` starts one; ``report``, ``complete`` and ``fail`` say how it goes; ``publish`` seals the answer.

    Use it as a context: it opens and closes the search's run in MLflow.
    """

    def __getstate__(self) -> dict[str, object]:
        """Nothing: Ray Tune writes a copy of its search algorithm that nobody reads, and ``progress`` may hold a terminal."""
        return {}

    def __init__(
        self,
        folder: Place,
        question: Question,
        *,
        name: str = "search",
        tracking: Tracking | None = None,
        progress: Callable[[Trial], None] | None = None,
    ) -> None:
        self.folder, self.question, self.plan = folder, question, question.plan
        self._tracking, self._name, self._progress = tracking, name, progress
        self._parent: Run | None = None
        self._begun: dict[int, float] = {}
        self._trials = {trial.number: trial for trial in _recorded(folder)}
        #: Numbers still to run, each once; a trial that was in flight when the last driver died comes first, with its configuration.
        self.left = [n for n in range(self.plan.total) if n not in self._trials or self._trials[n].state == "running"]
        self._in_flight_before = {number: trial for number, trial in self._trials.items() if trial.state == "running"}
        for number in self._in_flight_before:
            del self._trials[number]
        self.left.sort(key=lambda number: (number not in self._in_flight_before, number))

    @property
    def trials(self) -> list[Trial]:
        return [trial for _, trial in sorted(self._trials.items())]

    def __enter__(self) -> Board:
        if self._tracking is not None:
            self._parent = self._parent_run(self._tracking)
            for trial in self._in_flight_before.values():
                if self._tracking.exists(trial.run_id):
                    Run(self._tracking, trial.run_id).end("KILLED")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._parent is None:
            return
        winner = best(self.trials, self.plan.mode)
        with contextlib.suppress(MapleError) if kind else contextlib.nullcontext():
            if winner is not None and winner.value is not None:
                self._parent.metrics({f"best/{self.question.metric}": winner.value})
                self._parent.tag("best_trial", str(winner.number))
            self._parent.end("FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED")

    def _parent_run(self, tracking: Tracking) -> Run:
        """The run of the whole search: that of the driver before, if there was one, so a search is one run however often it was killed."""
        note = self.folder / "run.json"
        if note.exists():
            run_id = str(json.loads(note.read())["run_id"])
            if tracking.exists(run_id):
                return Run(tracking, run_id)
        run = tracking.start("tuning", self._name, tags={"folder": self.folder.uri})
        run.params(
            {
                "space": json.dumps(self.plan.space.plain()),
                "seed": self.plan.seed,
                "metric": self.question.metric,
                "trials": self.plan.total,
            }
        )
        note.write(json.dumps({"run_id": run.id}).encode())
        return run

    @property
    def hopeless(self) -> bool:
        """Whether trials failed at the start and none was completed: then the fault is not in the configuration."""
        ended = [trial for trial in self.trials if trial.state != "running"]
        return len(ended) >= _HOPELESS and all(trial.state == "failed" for trial in ended)

    def next(self) -> Trial | None:
        """Start the next trial; None when all have been started, or where it is hopeless."""
        if not self.left or self.hopeless:
            return None
        number = self.left.pop(0)
        before = self._in_flight_before.get(number)
        config = before.config if before else self.plan.suggest(number, self.trials)
        trial = Trial(number, self.plan.phase(number), config, started=datetime.now(UTC).isoformat(timespec="seconds"))
        if self._tracking is not None:
            run = self._tracking.start("tuning", f"{self._name}-{number:03d}", tags={"phase": trial.phase}, parent=self._parent)
            run.params(config)
            trial = replace(trial, run_id=run.id)
        self._begun[number] = time.monotonic()
        self._keep(trial, write=True)
        return trial

    def begin(self, number: int) -> None:
        """The trial's work begins, perhaps again after its worker was lost: what it had reported is forgotten."""
        self._begun[number] = time.monotonic()
        self._keep(replace(self._trials[number], values=()))

    def report(self, number: int, step: int, value: float) -> bool:
        """Take a report; True if the trial should stop here, and then it is over."""
        trial = self._trials[number]
        if trial.state != "running" or (trial.values and step <= trial.values[-1][0]):
            return False
        if not math.isfinite(value):
            self.fail(number, f"step {step} reported {value}; a value must be a finite number")
            return True
        trial = replace(trial, values=(*trial.values, (int(step), float(value))))
        self._log(trial, {self.question.metric: value}, step)
        if self.question.halving is not None and self.question.halving.stops(trial, self.trials, self.plan.mode):
            self._end(replace(trial, state="pruned", value=value))
            return True
        self._keep(trial)
        return False

    def complete(self, number: int, value: float) -> None:
        """The trial ended with this value."""
        trial = self._trials[number]
        if trial.state != "running":
            return
        if not math.isfinite(value):
            self.fail(number, f"the objective returned {value}; a value must be a finite number")
            return
        self._log(trial, {f"final/{self.question.metric}": value}, trial.values[-1][0] if trial.values else 0)
        self._end(replace(trial, state="complete", value=float(value)))

    def fail(self, number: int, error: str) -> None:
        """The trial ended with an error."""
        if self._trials[number].state == "running":
            self._end(replace(self._trials[number], state="failed", error=error[:2000]))

    def publish(self) -> None:
        """Seal the answer; ``ArtifactError`` where no trial was completed."""
        winner = best(self.trials, self.plan.mode)
        if winner is None:
            errors = [trial.error for trial in self.trials if trial.error]
            raise ArtifactError(
                f"none of the {len(self.trials)} trials of {self.folder.uri} was completed. "
                f"The first error was: {errors[0] if errors else 'none'}. Correct that, then search again with resume off."
            )
        entry = write_file(self.folder, "trials.parquet", parquet_bytes(table_of(self.trials, self.plan.space)), len(self.trials))
        answer = {"number": winner.number, "config": winner.config, "value": winner.value}
        seal(self.folder, "tuning", {"asked": self.question.plain(), "best": answer}, [entry])

    def _end(self, trial: Trial) -> None:
        trial = replace(trial, seconds=round(time.monotonic() - self._begun[trial.number], 3))
        self._keep(trial, write=True)
        if self._tracking is not None:
            run = Run(self._tracking, trial.run_id)
            run.tag("state", trial.state)
            if trial.error:
                run.tag("error", trial.error)
            run.end("FAILED" if trial.state == "failed" else "KILLED" if trial.state == "pruned" else "FINISHED")

    def _log(self, trial: Trial, values: Mapping[str, float], step: int) -> None:
        if self._tracking is not None:
            Run(self._tracking, trial.run_id).metrics(values, step)

    def _keep(self, trial: Trial, write: bool = False) -> None:
        self._trials[trial.number] = trial
        if write:
            (self.folder / "trials" / f"{trial.number:05d}.json").write(json.dumps(trial.plain(), sort_keys=True).encode())
        if self._progress is not None:
            self._progress(trial)


def _recorded(folder: Place) -> list[Trial]:
    out = []
    for place in (folder / "trials").children():
        if place.name.endswith(".json"):
            try:
                plain = json.loads(place.read())
            except ValueError:
                plain = {}
            out.append(Trial.parse(plain, place.uri))
    return out
