"""MLflow as an index: runs with their settings and figures, bundles by digest, aliases that mirror the release ledger.

MLflow never holds or loads a model here. A model version is a URI and a digest; what it points to is read by ``recommend.bundle``,
which checks every byte. The ledger is the truth and the aliases ``champion``, ``previous`` and ``shadow`` follow it, so a lost
tracking database costs its plots and nothing else.

MLflow takes seconds to import and 160 MB; it is imported where it is used, and never in a serving process.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from maple.artifacts import Place
from maple.errors import ArtifactError, ConfigError
from maple.train.release import Ledger, Release

MODEL = "maple"
ALIASES = ("champion", "previous", "shadow")
Status: TypeAlias = Literal["FINISHED", "FAILED", "KILLED"]

_MAX_VALUE = 500  # characters of a parameter or tag that every MLflow backend accepts
_BATCH = 90  # parameters per request; the limit is 100


@dataclass(frozen=True)
class Tracking:
    """Where runs and versions are recorded: a tracking URI, and the folder or URI for artifacts of new experiments."""

    uri: str
    artifacts: str | None = None

    def __post_init__(self) -> None:
        # MLflow reads these when it is imported, and nothing imports it here before there is a Tracking.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")

    @staticmethod
    def open(home: Place | str | Path, uri: str | None = None) -> Tracking:
        """``uri``, else ``MLFLOW_TRACKING_URI``, else a SQLite file in the home; ``ConfigError`` where the home cannot hold one."""
        place = Place.at(home)
        chosen = uri or os.environ.get("MLFLOW_TRACKING_URI")
        if chosen:
            return Tracking(chosen, (place / "mlartifacts").uri if place.local and chosen.startswith("sqlite:") else None)
        if place.local is None:
            raise ConfigError(
                f"{place.uri} cannot hold MLflow's SQLite file. Set MLFLOW_TRACKING_URI to a tracking server (http://...) or a database."
            )
        return Tracking(f"sqlite:///{place.local / 'mlflow.db'}", str(place.local / "mlartifacts"))

    @property
    def database(self) -> Path | None:
        """The SQLite file, if it is one."""
        return Path(self.uri.removeprefix("sqlite:///")) if self.uri.startswith("sqlite:///") else None

    def start(self, experiment: str, name: str, *, tags: Mapping[str, str] | None = None, parent: Run | None = None) -> Run:
        """Begin a run; ``parent`` makes it a child. End it with ``Run.end``, or use ``run``."""
        with _explained(self.uri):
            client = _client(self)
            found = client.get_experiment_by_name(experiment)
            experiment_id = found.experiment_id if found else _create_experiment(client, experiment, self.artifacts)
            labels = {"mlflow.runName": name, **(tags or {})} | ({"mlflow.parentRunId": parent.id} if parent else {})
            run = client.create_run(experiment_id, run_name=name, tags=labels)
        return Run(self, str(run.info.run_id))

    @contextlib.contextmanager
    def run(self, experiment: str, name: str, *, tags: Mapping[str, str] | None = None, parent: Run | None = None) -> Iterator[Run]:
        """A run that ends with the block: FINISHED, FAILED on an error, KILLED on an interrupt."""
        run = self.start(experiment, name, tags=tags, parent=parent)
        try:
            yield run
        except Exception:
            run.end("FAILED")
            raise
        except BaseException:
            run.end("KILLED")
            raise
        run.end("FINISHED")

    def exists(self, run_id: str) -> bool:
        """Whether a run is recorded here."""
        if not run_id:
            return False
        import mlflow.exceptions

        with _explained(self.uri):
            try:
                _client(self).get_run(run_id)
            except mlflow.exceptions.MlflowException as error:
                if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    return False
                raise
        return True


@dataclass(frozen=True)
class Run:
    """One recorded run."""

    tracking: Tracking = field(repr=False)
    id: str

    def params(self, values: Mapping[str, Any]) -> None:
        """Record settings; a value is kept as text of at most 500 characters."""
        from mlflow.entities import Param

        entries = [Param(metric_name(name), str(value)[:_MAX_VALUE]) for name, value in values.items()]
        with _explained(self.tracking.uri):
            for start in range(0, len(entries), _BATCH):
                _client(self.tracking).log_batch(self.id, params=entries[start : start + _BATCH])

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Record figures at a step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        entries = [Metric(metric_name(name), float(value), now, step) for name, value in values.items()]
        with _explained(self.tracking.uri):
            _client(self.tracking).log_batch(self.id, metrics=entries)

    def tag(self, name: str, value: str) -> None:
        """Label the run."""
        with _explained(self.tracking.uri):
            _client(self.tracking).set_tag(self.id, name, value[:_MAX_VALUE])

    def end(self, status: Status = "FINISHED") -> None:
        """Close the run."""
        with _explained(self.tracking.uri):
            _client(self.tracking).set_terminated(self.id, status)


def metric_name(name: str) -> str:
    """A name that MLflow accepts: ``ndcg@20`` becomes ``ndcg_at_20``, other illegal characters become ``_``."""
    return re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_"))


def register(
    tracking: Tracking,
    digest: str,
    uri: str,
    *,
    metrics: Mapping[str, float] | None = None,
    params: Mapping[str, Any] | None = None,
    model: str = MODEL,
) -> str:
    """Record a bundle as a version of ``model`` and return the version; a digest that is recorded already keeps its version."""
    import mlflow.exceptions

    with _explained(tracking.uri):
        client = _client(tracking)
        try:
            client.create_registered_model(model, description="Release bundles of Maple; each version is a digest, not a loadable model.")
        except mlflow.exceptions.MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        known = find(tracking, digest, model)
        if known is not None:
            return known
        with tracking.run("publish", digest[:12], tags={"digest": digest}) as run:
            run.params(params or {})
            run.metrics(metrics or {})
        version = client.create_model_version(model, source=uri, run_id=run.id, tags={"digest": digest})
        return str(version.version)


def find(tracking: Tracking, digest: str, model: str = MODEL) -> str | None:
    """The latest version that records a digest, or None."""
    with _explained(tracking.uri):
        found = _client(tracking).search_model_versions(f"name = '{model}' and tags.digest = '{digest}'")
    return max((str(version.version) for version in found), key=int, default=None)


def aliases(tracking: Tracking, model: str = MODEL) -> dict[str, str]:
    """The digest behind each of Maple's aliases that is set."""
    out: dict[str, str] = {}
    with _explained(tracking.uri):
        client = _client(tracking)
        current = client.get_registered_model(model).aliases
        for alias in ALIASES:
            if alias in current:
                out[alias] = str(client.get_model_version(model, str(current[alias])).tags.get("digest", ""))
    return out


def mirror(tracking: Tracking, ledger: Ledger, model: str = MODEL) -> Release:
    """Make the aliases say what the ledger says, and return that state.

    Two processes may mirror at once: each looks at the ledger again after writing, so the last one to write has seen the last
    change. A bundle that was never registered is an ``ArtifactError``; the ledger itself is not touched by any failure here.
    """
    release = ledger.read()
    while True:
        _set_aliases(tracking, release, model)
        latest = ledger.read()
        if latest.generation == release.generation:
            return release
        release = latest


def _set_aliases(tracking: Tracking, release: Release, model: str) -> None:
    wanted = {"champion": release.champion, "previous": release.previous, "shadow": release.shadow}
    versions = {digest: find(tracking, digest, model) for digest in wanted.values() if digest}
    missing = [digest[:12] for digest, version in versions.items() if version is None]
    if missing:
        raise ArtifactError(
            f"{tracking.uri} does not know bundle {', '.join(missing)}, so its aliases cannot follow the release ledger. "
            "Register it with `maple publish`; the release itself is in place."
        )
    if not versions:
        return
    with _explained(tracking.uri):
        client = _client(tracking)
        current = client.get_registered_model(model).aliases
        for alias, digest in wanted.items():
            if digest and str(current.get(alias)) != versions[digest]:
                client.set_registered_model_alias(model, alias, versions[digest])
            elif not digest and alias in current:
                client.delete_registered_model_alias(model, alias)


# -- the client --------------------------------------------------------------------------------------------------------

_clients: dict[str, Any] = {}


def _client(tracking: Tracking) -> Any:
    """The MLflow client of a URI, made once per process; a SQLite file is created by one process at a time."""
    client = _clients.get(tracking.uri)
    if client is None:
        from mlflow import MlflowClient

        for noisy in ("mlflow.store.db.utils", "mlflow.store.model_registry.abstract_store", "alembic"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        with _alone(tracking.database):
            client = MlflowClient(tracking_uri=tracking.uri, registry_uri=tracking.uri)
            client.search_experiments(max_results=1)
        _clients[tracking.uri] = client
    return client


@contextlib.contextmanager
def _alone(database: Path | None) -> Iterator[None]:
    """Hold the lock beside a SQLite file; without a file, nothing to do."""
    if database is None:
        yield
        return
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(database.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(
            f"cannot write MLflow's database {database}: {error.strerror}. Check MAPLE_HOME or MLFLOW_TRACKING_URI."
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _create_experiment(client: Any, name: str, artifacts: str | None) -> str:
    """The id of a new experiment, or of the one that somebody else has just created."""
    import mlflow.exceptions

    try:
        return str(client.create_experiment(name, artifact_location=artifacts))
    except mlflow.exceptions.MlflowException as error:
        found = client.get_experiment_by_name(name)
        if error.error_code != "RESOURCE_ALREADY_EXISTS" or found is None:
            raise
        return str(found.experiment_id)


@contextlib.contextmanager
def _explained(uri: str) -> Iterator[None]:
    """Errors of MLflow and its database as an ``ArtifactError`` that names the tracking store."""
    import mlflow.exceptions
    import sqlalchemy.exc

    try:
        yield
    except (mlflow.exceptions.MlflowException, sqlalchemy.exc.SQLAlchemyError) as error:
        reason = " ".join(str(error).split())[:400]
        raise ArtifactError(f"MLflow at {uri} failed: {reason}. Check MLFLOW_TRACKING_URI, or move the file away to start anew.") from None
