"""The steps of a run: each takes the run's settings, does one thing through the library, and leaves its result in the home.

``maple <step>``, ``jobs/<step>.py`` and the demo all call these, by ``STEPS``. A step finds what the one before it left: the
latest snapshot, features, tuning and run. Nothing is visible before it is finished.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from maple import learn, operate
from maple.artifacts import Place, check_writable, latest
from maple.cluster_ray import connect
from maple.config import maple_home
from maple.data.compact import compact, due
from maple.data.ingest import Task, appended
from maple.data.plan import Plan
from maple.data.presets import load_source
from maple.data.simulate import simulate, write
from maple.data.snapshot import Snapshot
from maple.data.snapshot import names as snapshot_names
from maple.features.spec import ContentRef
from maple.models.base import FitContext
from maple.models.content.items import content_vectors
from maple.run import SIMULATED, RunConfig, StepResult
from maple.train.fit import Say


def ingest(config: RunConfig, say: Say) -> StepResult:
    """Source -> validated, immutable snapshot."""
    home = Place.at(maple_home())
    if config.data == SIMULATED:
        check_writable(home)
        say("simulating a shop")
        folder = (home.local or Place.at(".maple").local or home) / "simulated"  # type: ignore[operator]
        source, root = load_source(str(write(simulate(config.seed), folder)))  # type: ignore[arg-type]
    else:
        source, root = load_source(config.data)
        if source.about:
            say(source.about)
        check_writable(home)
    if config.ingest.append and snapshot_names(home):
        before = latest(home, "snapshot")
        snapshot = appended(source, root, home, _on_ray, say=say)  # Ray is only started for a batch that needs it
        _compact(home, snapshot, config.ingest.compact, say)
        if snapshot.name == before:
            return StepResult("nothing new", facts={"snapshot": snapshot.name, "digest": snapshot.digest})
    else:
        connect(say)
        from maple.data.ingest_ray import ingest as ingest_ray  # Ray reads its flags on import: only after connecting

        snapshot = ingest_ray(source, root, home, rows_per_bucket=config.ingest.rows_per_bucket, progress=say)
    events = snapshot.report().events
    summary = (
        f"{events.rows_in:,} rows in = {events.rows_clean:,} clean + {events.rows_quarantined:,} quarantined; "
        f"{events.users:,} users, {snapshot.report().items:,} items"
    )
    return StepResult(summary, tuple(snapshot.report().lines()[1:]), facts={"snapshot": snapshot.name, "digest": snapshot.digest})


def _on_ray(todo: Plan, task: Task, count: int) -> Iterator[str]:
    connect()
    from maple.data.ingest_ray import on_ray

    return on_ray(todo, task, count)


def _compact(home: Place, snapshot: Snapshot, when: str, say: Say) -> None:
    """Compact a snapshot that has grown too many layers: now, or by a process of its own that outlives this one."""
    why = due(snapshot)
    if why is None or when == "never":
        return
    if when == "now":
        say(f"compacting: {why}")
        compact(home, say=say)
        return
    if home.local is None:
        handle, name = tempfile.mkstemp(prefix="maple-compact-", suffix=".log")
        os.close(handle)
        log = Path(name)
    else:
        log = home.local / "compact.log"
    say(f"compacting in the background: {why}; its log is {log}")
    command = [sys.executable, "-c", "from maple.cli import main; main()", "--home", home.uri, "snapshots", "compact"]
    with open(log, "ab") as out:
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)  # noqa: S603 - our own program


def features(config: RunConfig, say: Say) -> StepResult:
    """Snapshot -> point-in-time features, by Ray Data over buckets."""
    home = Place.at(maple_home())
    snapshot = Snapshot.open(home)
    check_writable(home)
    connect(say)
    from maple.features.build_ray import build

    content = content_vectors(snapshot.items(), config.content, FitContext(config.seed, config.threads), say)
    refs = {name: ContentRef(dim=vectors.dim, digest=vectors.digest) for name, vectors in content.items()}
    built = build(snapshot, config.features_for(snapshot.targets, refs), home, say, content)
    spec = built.spec
    summary = f"{built.num_rows:,} point-in-time rows, {len(spec.views)} views, {len(spec.columns)} columns"
    return StepResult(summary, facts={"features": built.name, "digest": built.digest})


Step = Callable[[RunConfig, Say], StepResult]

STEPS: dict[str, tuple[Step, str]] = {
    "ingest": (ingest, "Ingest"),
    "features": (features, "Features"),
    "tune": (learn.tune, "Tune"),
    "train": (learn.train, "Train"),
    "evaluate": (learn.evaluate_step, "Evaluate"),
    "publish": (operate.publish, "Publish"),
    "serve": (operate.serve, "Serve"),
}


def names() -> Sequence[str]:
    """The steps in the order of a run."""
    return list(STEPS)
