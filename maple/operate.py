"""What operators do with finished bundles: publish, promote, roll back, serve, and ask for one user's list without a server."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from maple.artifacts import MANIFEST, Place, check_writable, open_manifest, read_file
from maple.cluster_ray import connect, dashboard
from maple.config import maple_home
from maple.data.etl import bucket_of
from maple.data.snapshot import Snapshot
from maple.data.splits import Boundaries
from maple.errors import ConfigError, MapleError
from maple.features.attributes import plain_rows
from maple.features.folder import Folder
from maple.features.store import events_of, rows_of
from maple.learn import Material, TrainedRun
from maple.recommend.bundle import load
from maple.recommend.settings import PipelineSettings
from maple.run import RunConfig, StepResult
from maple.train.fit import Say, fit_pipeline
from maple.train.registry import Tracking, mirror, register
from maple.train.release import Ledger, Release

if TYPE_CHECKING:
    from maple.serve.rollout import Replicas


def publish(config: RunConfig, say: Say) -> StepResult:
    """Refit up to now, save the bundle, register it, and (unless told otherwise) promote it.

    The sources of the evaluated run are the ones fitted before the new T1, so only rows, ranker and the final sources are made.
    """
    material = Material.open(config, say)
    run = TrainedRun.open(material.home)
    metrics = _evaluated(material.home, run.name)
    end = material.data.span[1] + 1
    cut = Boundaries(run.cut.t2, end, run.cut.gap)
    fitted = fit_pipeline(
        material.data, _published_settings(config, run.bundle.settings), cut, fingerprint=material.snapshot.digest, spec=material.spec,
        timeline=material.built.timeline(), extras=material.extras(cut), row_settings=config.rows, early=run.bundle.parts.sources,
        metrics=metrics, ctx=material.ctx, say=say,
    )  # fmt: skip
    digest = fitted.bundle.save(material.home)
    tracking = Tracking.open(material.home)
    version = register(tracking, digest, (material.home / "bundles" / digest).uri, metrics=metrics, params={"run": run.name})
    summary = f"bundle {digest[:12]}, version {version} in the registry"
    if config.publish.promote:
        ledger = Ledger.open(material.home)
        release = promote(digest, note=f"published from {run.name}").facts
        mirror(tracking, ledger)
        summary += f"; champion, generation {release['generation']}"
    return StepResult(summary, facts={"bundle": digest, "version": version})


def _published_settings(config: RunConfig, ran: PipelineSettings) -> PipelineSettings:
    """What is not learned from the page that was given, what is learned from the run that was evaluated.

    ``ConfigError`` where the page asks for other models or other settings of them than the run has: those must be trained first.
    """
    if config.pipeline is None:
        return ran
    page, fitted = config.pipeline.plain(), ran.plain()
    differs = [name for name in ("history_limit", "repeats", "bought") if page[name] != fitted[name]]
    asked = {source["name"]: source for source in page["sources"]}
    known = {source["name"]: source for source in fitted["sources"]}
    if {name: one["model"] for name, one in asked.items()} != {name: one["model"] for name, one in known.items()}:
        differs.append("sources")
    else:
        differs += [f"sources.{name}.config" for name in asked if not _within(asked[name]["config"], known[name]["config"])]
    given, ranker = page["ranker"] or {"model": None, "config": {}}, fitted["ranker"] or {"model": None, "config": {}}
    if given["model"] != ranker["model"] or not _within(given["config"], ranker["config"]):
        differs.append("ranker")
    if differs:
        raise ConfigError(
            f"the page's pipeline differs from the latest run in {', '.join(differs)}, which only training can change. "
            "Run `maple train` and `maple evaluate` with the same --config first, then publish."
        )
    sources = [{**one, "config": known[name]["config"]} for name, one in asked.items()]
    return PipelineSettings.parse({**page, "sources": sources, "ranker": fitted["ranker"]}, "published pipeline settings")


def _within(asked: Mapping[str, Any], fitted: Mapping[str, Any]) -> bool:
    """Whether every setting asked for is the one that was fitted; sections are compared setting by setting."""
    return all(
        _within(value, fitted[name]) if isinstance(value, Mapping) and isinstance(fitted.get(name), Mapping) else fitted.get(name) == value
        for name, value in asked.items()
    )


def _evaluated(home: Place, name: str) -> dict[str, float]:
    """The pipeline's measured quality, for the bundle; empty where the run was not evaluated."""
    folder = home / "evaluations" / name
    if not (folder / MANIFEST).exists():
        return {}
    plain = json.loads(read_file(folder, open_manifest(folder, "evaluation"), "pipeline.json"))
    return {str(metric): float(value) for metric, value in plain["means"].items()}


def promote(digest: str, *, expect: int | None = None, note: str = "") -> StepResult:
    """Move the champion to a bundle; a service on the cluster that ``RAY_ADDRESS`` names prepares it first, everywhere."""
    home = Place.at(maple_home())
    ledger = Ledger.open(home)
    found = ledger.resolve(digest)
    replicas = _replicas()
    if replicas is None:
        return _released(home, ledger.promote(found, expected_generation=expect, note=note))
    from maple.serve import rollout

    return _released(home, rollout.promote(ledger, replicas, found, expected_generation=expect, note=note))


def rollback(*, note: str = "") -> StepResult:
    """Move the champion back to the bundle before it; the service is moved as by ``promote``."""
    home = Place.at(maple_home())
    ledger = Ledger.open(home)
    replicas = _replicas()
    if replicas is None:
        return _released(home, ledger.rollback(note=note))
    from maple.serve import rollout

    return _released(home, rollout.rollback(ledger, replicas, note=note))


def _replicas() -> Replicas | None:
    """The service of the cluster that ``RAY_ADDRESS`` names (in a job: the job's own); None without one.

    A local ``maple serve`` follows the ledger by itself.
    """
    if not os.environ.get("RAY_ADDRESS"):
        return None
    connect()
    from maple.serve.deploy import deployed

    return deployed()


def _released(home: Place, release: Release) -> StepResult:
    try:
        mirror(Tracking.open(home), Ledger.open(home))
        aside: tuple[str, ...] = ()
    except MapleError as error:  # the ledger is the truth; its mirror may lag
        aside = (f"the registry's aliases were not updated: {error}",)
    champion = (release.champion or "none")[:12]
    return StepResult(f"generation {release.generation}: champion {champion}", aside, facts=release.plain())


def releases() -> tuple[list[str], list[list[str]]]:
    """The ledger as a table, newest first."""
    ledger = Ledger.open(Place.at(maple_home()))
    header = ["generation", "action", "champion", "previous", "at", "by", "note"]
    rows = [
        [str(r.generation), r.action, (r.champion or "-")[:12], (r.previous or "-")[:12], r.at[:19], r.by, r.note]
        for r in reversed(ledger.history())
    ]
    return header, rows


# -- answering ---------------------------------------------------------------------------------------------------------


def recommend(user: str, k: int) -> tuple[list[str], list[list[str]], str]:
    """One user's list from the champion bundle and the latest snapshot, without a server: (header, rows, note)."""
    home = Place.at(maple_home())
    bundle = load(home, Ledger.open(home).champion().champion or "")
    snapshot = Snapshot.open(home)
    (bucket,) = bucket_of(pa.array([user]), snapshot.num_buckets).tolist()
    own = snapshot.events([bucket])
    own = own.filter(pc.equal(own["user_id"], user))
    events = [event for chunk in events_of(own) for event in chunk]
    state = None
    if bundle.features is not None:
        folder = Folder(bundle.features.spec, bundle.catalogue)
        (state,) = folder.advance([folder.empty(user)], rows_of([events]))
    now = (events[-1].timestamp if events else int(time.time() * 1e6)) + 1
    history = [(event.item_id, event.event, event.timestamp) for event in events]
    query = bundle.query(user, now=now, k=k, history=history, state=state, attributes=_attributes(snapshot, user))
    (answer,) = bundle.decode(bundle.pipeline().run([query], explain=True))
    rows = [[each.item_id, each.title or "", f"{each.score:.3f}", each.source or "", each.reason.text] for each in answer]
    note = f"{len(events):,} events known" if events else "no events known of this user: what is popular"
    return ["item", "title", "score", "source", "why"], rows, note


def _attributes(snapshot: Snapshot, user: str) -> dict[str, Any]:
    users = snapshot.users()
    if users is None:
        return {}
    return dict(next((row for _, row in plain_rows(users.filter(pc.equal(users["user_id"], user)))), {}))


def serve(config: RunConfig, say: Say) -> StepResult:
    """Deploy the champion on the connected cluster, with the online store filled from the snapshot."""
    home = Place.at(maple_home())
    release = Ledger.open(home).champion()
    check_writable(home)
    connect(say)
    from maple.serve import deploy
    from maple.serve.rollout import pointer_to

    settings = serve_settings(config, home)
    if config.serve.backfill:
        _backfill(home, release, settings, say)
    shape = config.serve.shape or config.serve.placement
    address = deploy.deploy(shape, settings, pointer_to(release), port=config.serve.port or None, say=say)
    return StepResult(f"{config.serve.placement} at {address.url}", facts={"url": address.url, "bundle": release.champion})


def serve_settings(config: RunConfig, home: Place) -> dict[str, Any]:
    """The serving arguments that a run's settings determine."""
    settings: dict[str, Any] = {"home": home.uri, "placement": config.serve.placement, "store": config.serve.store.plain()}
    if config.serve.clock == "data":
        end = Snapshot.open(home).dataset().span[1]
        settings["clock_offset_s"] = end / 1e6 + 60 - time.time()
    return settings


def _backfill(home: Place, release: Release, settings: Mapping[str, Any], say: Say) -> None:
    from maple.serve.people import load_events, load_people
    from maple.serve.settings import ServeSettings
    from maple.serve.stores import open_store

    bundle = load(home, release.champion or "", canary=False)
    if bundle.features is None:
        return
    snapshot = Snapshot.open(home)
    mark = home / "backfilled.json"
    done = {"snapshot": snapshot.digest, "store": dict(settings["store"]), "digest": bundle.features.spec.state_digest(bundle.catalogue)}
    if mark.exists() and json.loads(mark.read()) == done:
        return
    patient = {**settings, "store": {**settings["store"], "read_timeout_s": 60}}  # nobody waits for an answer here
    store = open_store(ServeSettings.parse(patient, "serve"), Folder(bundle.features.spec, bundle.catalogue))
    try:
        load_events(store, snapshot, say)
        load_people(store, snapshot, say)
    finally:
        store.close()
    mark.write(json.dumps(done).encode())


def serve_until_interrupted(config: RunConfig, show: Callable[[str], None]) -> None:
    """Serve in the foreground; Ctrl-C ends the service and the local Ray that this command started."""
    result = serve(config, show)
    show(f"[bold]{result.summary}[/bold]  docs {result.facts['url']}/docs" + (f"  dashboard {dashboard()}" if dashboard() else ""))
    show("Ctrl-C stops it")
    follow_ledger(show)


def follow_ledger(show: Callable[[str], None]) -> None:
    """Until Ctrl-C: bring the running service to whatever the ledger says, within a second of a promotion or a rollback."""
    from maple.serve.deploy import Deployed
    from maple.serve.rollout import follow

    ledger = Ledger.open(Place.at(maple_home()))
    seen = ledger.read().generation
    try:
        while True:
            time.sleep(0.5)
            now = ledger.read()
            if now.generation == seen:
                continue
            seen = now.generation
            try:
                follow(ledger, Deployed())
                show(f"generation {now.generation}: serving bundle {(now.champion or '')[:12]}")
            except MapleError as error:
                show(f"generation {now.generation} cannot be served, the service goes on as before: {error}")
    except KeyboardInterrupt:
        show("stopping")
