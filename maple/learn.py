"""The learning steps of a run: tune, train, evaluate. Each opens the latest snapshot and features and leaves its result in the home.

``tune`` leaves what it found per snapshot, ``train`` a run with its bundle, ``evaluate`` the measured lists of that run.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from maple.artifacts import (
    MANIFEST,
    Place,
    check_writable,
    latest,
    open_manifest,
    point,
    read_file,
    seal,
    tensor_bytes,
    tensors_of,
    write_file,
)
from maple.cluster_ray import connect
from maple.config import maple_home
from maple.data.dataset import Dataset
from maple.data.folds import cut_of, folds_of
from maple.data.kcore import KCore
from maple.data.snapshot import Snapshot
from maple.data.splits import Boundaries, TimeSplit
from maple.errors import ArtifactError, ConfigError, unknown_name
from maple.evaluate.compare import default_metrics, format_difference, format_value, summary
from maple.evaluate.harness import CatalogueStats, Evaluation, Relevant, evaluate, item_strata, relevant_of, user_segments
from maple.evaluate.metrics import LIST_LEVEL
from maple.evaluate.splitting import SplitWarning, evaluate_split
from maple.features.build import FeatureArtifact
from maple.features.extras import Extras
from maple.features.spec import FeatureSpec
from maple.hashing import combine, rng
from maple.models.base import FitContext
from maple.models.catalog import model_class
from maple.recommend.bundle import Bundle, load
from maple.recommend.settings import PipelineSettings
from maple.run import RunConfig, StepResult, Tables, merged
from maple.train import objectives
from maple.train.fit import Say, fit_pipeline, fit_sources, lists_of_pipeline, lists_of_source, ranker_rows
from maple.train.registry import Tracking
from maple.train.rows import Rows


@dataclass(frozen=True, eq=False)
class Material:
    """What learning steps share: the snapshot in memory, its cut, its features, the settings with what was tuned."""

    home: Place
    snapshot: Snapshot
    data: Dataset
    cut: Boundaries
    built: FeatureArtifact
    settings: PipelineSettings
    ctx: FitContext

    @staticmethod
    def open(config: RunConfig, say: Say) -> Material:
        home = Place.at(maple_home())
        snapshot = Snapshot.open(home)
        built = FeatureArtifact.open(home)
        if built.snapshot_digest != snapshot.digest:
            raise ArtifactError("the latest features were built from another snapshot; run `maple features build`")
        check_writable(home)
        say(f"loading snapshot {snapshot.name}")
        data = config.k_core.of(snapshot.dataset())
        settings = merged(config.pipeline_for(snapshot.targets), chosen(tunings(home, snapshot)))
        return Material(home, snapshot, data, cut_of(data, config.split), built, settings, FitContext(config.seed, config.threads))

    @property
    def spec(self) -> FeatureSpec:
        return self.built.spec

    def extras(self, cut: Boundaries) -> Extras:
        """What the features beside the folds are made from, for a fit on the events before ``cut.t2``."""
        return Extras.fit(self.data.before(cut.t2), self.spec, until=cut.t1, content=self.built.content())


def tune(config: RunConfig, say: Say) -> StepResult:
    """Search hyper-parameters on the validation part; what is found is used by the steps after it."""
    material = Material.open(config, say)
    connect(say)
    from maple.train import tune_ray

    home, asked = material.home, config.tune
    untuned = config.pipeline_for(material.snapshot.targets)  # not what an earlier search found: that would ask another question
    asks = {  # what a trial's value depends on: another answer to any of it is another search
        "snapshot": material.snapshot.digest, "cut": material.cut.plain(), "pipeline": untuned.plain(),
        "rows": config.rows.plain(), "epochs": asked.epochs, "k_core": config.k_core.plain(),
    }  # fmt: skip
    found: dict[str, dict[str, Any]] = {}
    tables: list[tuple[str, list[str], list[list[str]]]] = []
    for name in asked.models:
        problem = objectives.problem_of(name, material.data, material.cut, untuned, asked.epochs, material.ctx)
        if isinstance(problem, objectives.RankerProblem):
            settings = merged(untuned, chosen(found))
            problem = problem.with_rows(_rows(config, material, settings, say))
        best: list[float] = []

        def progress(trial: Any, name: str = name, best: list[float] = best) -> None:
            if trial.state == "complete" and trial.value is not None:  # a pruned one has only what it reported on its way
                best.append(trial.value)
            say(f"{name}: trial {trial.number + 1} {trial.phase} {trial.state}" + (f", best {max(best):.4f}" if best else ""))

        result = tune_ray.tune(
            problem.objective, problem.data, problem.space, name=name, home=home, metric=problem.metric, given=[problem.default],
            random_trials=asked.random_trials, tpe_trials=asked.tpe_trials, halving=problem.halving,
            max_concurrent=asked.max_concurrent, seed=config.seed, resume=asked.resume, progress=progress,
            fingerprint=combine([json.dumps(asks | {"problem": problem.plain(), "before": chosen(found)}, sort_keys=True)]),
            tracking=Tracking.open(home),
        )  # fmt: skip
        first = result.trials["value"][0].as_py()
        found[name] = {
            "config": result.best_config,
            "value": result.best_value,
            "default": first,
            "folder": result.folder,
            "metric": result.metric,
        }
        rows = [[str(key), _short(value)] for key, value in result.best_config.items()]
        tables.append(
            (
                f"{name}: best of {result.trials.num_rows} trials, {result.metric} {result.best_value:.4f} (defaults {first or 0:.4f})",
                ["setting", "value"],
                rows,
            )
        )
    (home / "tunings" / f"{material.snapshot.digest}.json").write(json.dumps(found, indent=1).encode())
    summary = "; ".join(f"{name}: {known['metric']} {known['default'] or 0:.4f} -> {known['value']:.4f}" for name, known in found.items())
    return StepResult(summary, tables=tuple(tables), facts=found)


def tunings(home: Place, snapshot: Snapshot) -> dict[str, Any]:
    """What tuning found for a snapshot, by model; empty where nothing was tuned."""
    place = home / "tunings" / f"{snapshot.digest}.json"
    return dict(json.loads(place.read())) if place.exists() else {}


def chosen(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The settings that tuning chose, by model."""
    return {name: known["config"] for name, known in found.items()}


def _rows(config: RunConfig, material: Material, settings: PipelineSettings, say: Say) -> Rows:
    """The ranker's rows, made once for the same data, cut, sources and row settings."""
    asked = {
        "snapshot": material.snapshot.digest, "spec": material.spec.digest, "cut": material.cut.plain(),
        "pipeline": {**settings.plain(), "ranker": None, "rerank": None}, "rows": config.rows.plain(), "seed": config.seed,
        "k_core": config.k_core.plain(),
    }  # fmt: skip
    folder = material.home / "rows" / combine([json.dumps(asked, sort_keys=True)])[:16]
    if (folder / MANIFEST).exists():
        arrays = tensors_of(read_file(folder, open_manifest(folder, "rows"), "rows.safetensors"))
        columns = {name.removeprefix("column/"): array for name, array in arrays.items() if name.startswith("column/")}
        return Rows(columns, arrays["labels"], arrays["groups"])
    known = material.data.before(material.cut.t2)
    early, _ = fit_sources(known.before(material.cut.t1), settings, material.ctx, lambda text: say(f"before T1: {text}"))
    made = ranker_rows(
        known, early, settings, material.spec, material.cut, config.rows, timeline=material.built.timeline(),
        extras=material.extras(material.cut), seed=config.seed, say=say,
    )  # fmt: skip
    data = tensor_bytes({f"column/{name}": array for name, array in made.columns.items()} | {"labels": made.labels, "groups": made.groups})
    seal(folder, "rows", asked, [write_file(folder, "rows.safetensors", data, len(made))])
    return made


def train(config: RunConfig, say: Say) -> StepResult:
    """Fit sources and ranker on what lies before the test part; the bundle is what ``evaluate`` measures."""
    material = Material.open(config, say)
    settings, cut = material.settings, material.cut
    rows = _rows(config, material, settings, say) if settings.ranker is not None else None
    fitted = fit_pipeline(
        material.data, settings, cut, fingerprint=material.snapshot.digest, spec=material.spec, timeline=material.built.timeline(),
        extras=material.extras(cut), rows=rows, ctx=material.ctx, say=say,
    )  # fmt: skip
    digest = fitted.bundle.save(material.home)
    name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{digest[:8]}"
    meta = {
        "bundle": digest, "snapshot": material.snapshot.name, "snapshot_digest": material.snapshot.digest,
        **cut.plain(), "split": config.split.plain(),
        "seed": config.seed, "k_core": config.k_core.plain(), "metrics": {model: dict(values) for model, values in fitted.metrics.items()},
    }  # fmt: skip
    seal(material.home / "runs" / name, "run", meta, [])
    point(material.home, "run", name)
    with Tracking.open(material.home).run("train", name, tags={"bundle": digest}) as run:
        run.params({"seed": config.seed, "snapshot": material.snapshot.name, "sources": ", ".join(fitted.bundle.parts.sources)})
        run.metrics({f"{model}/{key}": value for model, values in fitted.metrics.items() for key, value in values.items()})
    summary = f"{len(settings.sources)} sources" + (f", ranker on {rows.describe()}" if rows else "") + f"; bundle {digest[:12]}"
    return StepResult(summary, facts=meta)


@dataclass(frozen=True, eq=False)
class TrainedRun:
    """The latest run: its bundle, and the data and cut that it was trained on."""

    name: str
    bundle: Bundle
    snapshot: Snapshot
    cut: Boundaries
    core: KCore

    @staticmethod
    def open(home: Place) -> TrainedRun:
        name = latest(home, "run")
        meta = open_manifest(home / "runs" / name, "run").meta
        snapshot, core = Snapshot.open(home, meta["snapshot"]), KCore.parse(meta.get("k_core", {}), f"run {name}")
        return TrainedRun(name, load(home, meta["bundle"]), snapshot, Boundaries.of(meta), core)


def baseline_of(config: RunConfig, bundle: Bundle) -> str:
    """The source that others are compared with: the one asked for, else ``popular``, else the pipeline's first."""
    name, sources = config.evaluate.baseline, bundle.parts.sources
    if name in sources:
        return name
    if "baseline" in config.evaluate.model_fields_set:
        raise ConfigError("evaluate.baseline: " + unknown_name("source", name, sources))
    return next(iter(sources))


def evaluate_run(config: RunConfig, say: Say) -> tuple[dict[str, Evaluation], TrainedRun, Relevant]:
    """The pipeline and its sources on the test part of the latest run, by name."""
    home = Place.at(maple_home())
    run = TrainedRun.open(home)
    check_writable(home)
    data = run.core.of(run.snapshot.dataset())
    bundle, now, asked = run.bundle, run.cut.t2, config.evaluate
    baseline = baseline_of(config, bundle)
    relevant = relevant_of(data, run.cut.test_start, data.span[1] + 1, new_only=not bundle.settings.repeats, known_before=now)
    if len(relevant) > asked.max_users:
        drawn = np.sort(rng(config.seed, "evaluate/users").choice(len(relevant), asked.max_users, replace=False))
        relevant = relevant.take(drawn)
    stats = CatalogueStats.of(data, now, vectors=bundle.parts.vectors)
    segments = user_segments(data, relevant.users, now)
    width = max(asked.ks)
    askers = {"pipeline": lists_of_pipeline(bundle, data, relevant, now, width)}
    for name, model in bundle.parts.sources.items():
        if asked.sources or name == baseline:
            askers[name] = lists_of_source(model, bundle, data, relevant, now, width)
    found: dict[str, Evaluation] = {}
    for name, recommend in askers.items():
        say(f"evaluating {name} on {len(relevant):,} users")
        found[name] = evaluate(
            recommend, relevant, catalogue=stats, ks=asked.ks, segments=segments, strata=item_strata(data, now), seed=config.seed,
            bootstrap=asked.bootstrap, notes={"bundle": bundle.digest or "", "snapshot": run.snapshot.digest},
            split={"kind": "time", **run.cut.plain()},
        )  # fmt: skip
    return found, run, relevant


def evaluate_step(config: RunConfig, say: Say) -> StepResult:
    """Measure the trained pipeline and its sources on the test part; the result is kept beside the run."""
    if not isinstance(config.split, TimeSplit):
        return evaluate_sources(config, say)
    found, run, relevant = evaluate_run(config, say)
    home = Place.at(maple_home())
    folder = home / "evaluations" / run.name
    files = []
    for name, result in found.items():
        files += [
            write_file(folder, f"{name}.json", result.to_json().encode()),
            write_file(folder, f"{name}.safetensors", tensor_bytes(result.tensors())),
        ]
    seal(folder, "evaluation", {"run": run.name, "models": list(found)}, files)
    baseline = baseline_of(config, run.bundle)
    tables = evaluation_tables(found, baseline)
    with Tracking.open(home).run("evaluate", run.name, tags={"bundle": run.bundle.digest or ""}) as record:
        record.metrics({f"{name}/{metric}": value for name, result in found.items() for metric, value in result.means.items()})
    best = default_metrics(found["pipeline"])[0]
    own, base = found["pipeline"].means[best], found[baseline].means[best]
    summary = (
        f"{len(relevant):,} test users; {best} {own:.4f}, {own / base:.2f} x {baseline}"
        if base
        else f"{len(relevant):,} test users; {best} {own:.4f}"
    )
    facts = {name: dict(result.means) for name, result in found.items()}
    return StepResult(summary, tables=tables, facts=facts)


def evaluate_sources(config: RunConfig, say: Say) -> StepResult:
    """Every source of the pipeline, fitted anew and measured on each fold of a split that no pipeline can be trained under."""
    home = Place.at(maple_home())
    snapshot = Snapshot.open(home)
    check_writable(home)
    data, asked = config.k_core.of(snapshot.dataset()), config.evaluate
    settings = merged(config.pipeline_for(snapshot.targets), chosen(tunings(home, snapshot)))
    folder = home / "evaluations" / f"{snapshot.name}-{combine([json.dumps(config.split.plain(), sort_keys=True)])[:8]}"
    files, means = [], {}
    for source in settings.sources:
        say(f"evaluating {source.name}: {config.split.kind}")
        kind = model_class(source.model)
        parsed = kind.Config.parse(source.config, f"source {source.name!r}")
        with warnings.catch_warnings(action="ignore", category=SplitWarning):  # the result says it once
            results = evaluate_split(
                partial(kind, parsed),  # type: ignore[call-arg]
                data, config.split, ks=asked.ks, new_only=not settings.repeats,
                history_limit=settings.history_limit, ctx=FitContext(config.seed, config.threads), bootstrap=asked.bootstrap,
                max_users=asked.max_users,
            )  # fmt: skip
        means[source.name] = {name: float(np.mean([result.means[name] for result in results])) for name in results[0].means}
        for place, result in enumerate(results):
            files.append(write_file(folder, f"{source.name}-{place}.json", result.to_json().encode()))
            files.append(write_file(folder, f"{source.name}-{place}.safetensors", tensor_bytes(result.tensors())))
    seal(folder, "evaluation", {"snapshot": snapshot.digest, "split": config.split.plain(), "models": list(means)}, files)
    metrics = [name for name in default_metrics(results[0]) if name.split("@")[0] not in LIST_LEVEL]
    body = [[name, *(format_value(metric, values[metric]) for metric in metrics)] for name, values in means.items()]
    table = (f"Sources alone, {config.split.kind}, mean of {len(results)} fold(s)", ["model", *metrics], body)
    warning = [text for fold in folds_of(data, config.split)[:1] for text in fold.warnings]
    return StepResult(f"{len(means)} sources on {len(results)} fold(s)", tuple(warning), tables=(table,), facts=means)


def evaluation_tables(found: Mapping[str, Evaluation], baseline: str) -> Tables:
    """Accuracy with the paired difference to the baseline, and what lists are like beyond it; narrow enough for a terminal."""
    rows = summary(found, baseline)
    first, *others = [cell.metric for cell in rows[0].cells]
    accuracy = [name for name in others if name.split("@")[0] not in LIST_LEVEL]
    beyond = [name for name in others if name not in accuracy]
    out: list[tuple[str, list[str], list[list[str]]]] = []
    header = ["model", first, "95 % interval", f"vs {baseline}", *accuracy]
    body = []
    for row in rows:
        cells = {cell.metric: cell for cell in row.cells}
        lead = cells[first]
        spread = "-".join(format_value(first, bound) for bound in lead.interval) if lead.interval else ""
        lift = "" if row.baseline else format_difference(lead.difference)
        body.append([row.model, format_value(first, lead.mean), spread, lift, *(format_value(m, cells[m].mean) for m in accuracy)])
    out.append((f"Accuracy on the test part (* = the paired difference to {baseline} is more than chance)", header, body))
    if beyond:
        lists = [[row.model, *(format_value(cell.metric, cell.mean) for cell in row.cells if cell.metric in beyond)] for row in rows]
        out.append(("Beyond accuracy", ["model", *beyond], lists))
    return tuple(out)


def read_evaluations(home: Place, name: str) -> dict[str, Evaluation]:
    """The kept evaluations of a run, by model."""
    folder = home / "evaluations" / name
    manifest = open_manifest(folder, "evaluation")
    return {
        model: Evaluation.from_json(
            read_file(folder, manifest, f"{model}.json"), tensors_of(read_file(folder, manifest, f"{model}.safetensors"))
        )
        for model in manifest.meta["models"]
    }


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
