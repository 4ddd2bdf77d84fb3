"""The main job, end to end: every step of a run on embedded defaults, then real requests to the running service, then a report."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from maple import steps
from maple.artifacts import Place
from maple.cli.console import StepLine, console, step, table
from maple.cluster_ray import dashboard, stop_local
from maple.config import maple_home
from maple.data.snapshot import Snapshot
from maple.evaluate.compare import compare, default_metrics
from maple.evaluate.figures import Trial
from maple.evaluate.harness import Evaluation
from maple.evaluate.report import evaluation_sections
from maple.evaluate.run_sections import (
    TuningRun,
    examples_section,
    features_section,
    ingest_section,
    latency_section,
    timeline_section,
    tuning_section,
)
from maple.features.spec import FeatureSpec
from maple.learn import TrainedRun, baseline_of, read_evaluations
from maple.operate import follow_ledger
from maple.page import Card, Section, TextBlock, render
from maple.run import RunConfig, StepResult
from maple.serve.client import Client
from maple.serve.load import Load, closed

#: What the demo searches, evaluates and asks, so that it ends within minutes on two cores; `maple tune` searches in earnest.
SMALL: dict[str, Any] = {
    "tune": {"random_trials": 2, "tpe_trials": 1, "epochs": 3, "max_concurrent": 1},
    "rows": {"max_queries": 1500, "negatives": 200},
    "evaluate": {"max_users": 2000},
    "serve": {"clock": "data"},
}
REQUESTS = 400
CLIENTS = 8
STAGES = ("sources", "features", "ranker", "retrieve", "rank", "finish", "total")


@dataclass
class Story:
    """What happened, for the report."""

    timeline: list[tuple[str, float, float]] = field(default_factory=list)
    results: dict[str, StepResult] = field(default_factory=dict)
    start: float = field(default_factory=time.perf_counter)


def small(config: RunConfig) -> RunConfig:
    """The run's settings with the demo's small budgets, where people did not set others."""
    page = config.plain()
    for section, values in SMALL.items():
        asked = getattr(config, section).model_fields_set
        page[section] |= {name: value for name, value in values.items() if name not in asked}
    if "threads" not in config.model_fields_set:
        page["threads"] = min(os.cpu_count() or 1, 4)  # one step runs at a time, so a fit may have the machine
    return RunConfig.parse(page, "demo settings")


def run(config: RunConfig, *, keep: bool, report: Path) -> None:
    """Run everything; with ``keep`` the service stays up afterwards until Ctrl-C."""
    if not os.environ.get("MAPLE_HOME"):
        os.environ["MAPLE_HOME"] = str(Path(".maple").absolute() / Path(config.data).stem)
    config = small(config)
    story = Story()
    console.print(f"[bold]Maple demo[/bold] on [bold]{config.data}[/bold], home {maple_home()}\n")
    for name, (function, title) in steps.STEPS.items():
        began = time.perf_counter()
        with step(title) as line:
            result = function(config, line.say)
            line.done(result.summary, *result.details)
        story.results[name] = result
        story.timeline.append((title, began - story.start, time.perf_counter() - began))
    url = str(story.results["serve"].facts["url"])
    began = time.perf_counter()
    with step("Ask") as line, Client(url) as client:
        cards = _ask(client, line)
    with step("Measure") as line:
        load = _measure(url, line)
    story.timeline.append(("Ask and measure", began - story.start, time.perf_counter() - began))
    for card in cards:
        table(card.title, ["item", "why"], [list(item) for item in card.items], card.subtitle)
    for title, header, rows in story.results["evaluate"].tables:
        table(title, header, rows)
    stages = _stages(load)
    table("Latency, milliseconds", ["stage", "p50", "p99"], [[name, f"{p50:.1f}", f"{p99:.1f}"] for name, p50, p99 in stages])
    with step("Report") as line:
        report.write_text(_page(config, story, cards, stages, load), encoding="utf-8")
        line.done(f"{report} ({report.stat().st_size // 1024} kB, one self-contained page)")
    console.print(f"\nDone in [bold]{time.perf_counter() - story.start:.0f} s[/bold]. Open [bold]{report.absolute()}[/bold] in a browser.")
    if keep:
        _stay(url)
    with step("Shut down") as line:
        # Nobody is connected any more: ending the cluster at once spares Serve's half-minute of draining.
        stop_local()
        line.done("Serve and the local Ray have ended")


# -- asking ------------------------------------------------------------------------------------------------------------


def _ask(client: Client, line: StepLine) -> list[Card]:
    """A heavy, a light and a brand-new user; then an event of the new one, and how the answer changes."""
    snapshot = Snapshot.open(Place.at(maple_home()))
    data = snapshot.dataset()
    counts = np.bincount(data.log.user, minlength=len(data.users))
    active = np.flatnonzero(counts > 0)
    order = active[np.argsort(counts[active], kind="stable")]
    heavy, light = data.users.decode(np.array([order[-1], order[len(order) // 10]]))
    titles = dict(zip(snapshot.items()["item_id"].to_pylist(), snapshot.items()["title"].to_pylist(), strict=True))
    new = f"visitor-{time.time_ns()}"
    cards = []
    for user, kind in ((heavy, "heavy"), (light, "light"), (new, "brand new")):
        line.say(f"asking for the {kind} user")
        answer = client.recommend(user, k=5)
        code = int(data.users.encode([user])[0])
        own = data.log.item[data.log.user == code][-3:] if code >= 0 else np.empty(0, np.int32)
        last = [titles.get(item) or item for item in data.items.decode(own)]
        known = f"{counts[code] if code >= 0 else 0:,} events; path {' > '.join(answer['path'])}; {answer['latency_ms']['total']:.1f} ms"
        cards.append(Card(f"The {kind} user {user}", known, _items(answer), tuple(last)))
    before = client.recommend(new, k=5)
    wanted = before["items"][-1]["item_id"]
    event = {"user_id": new, "item_id": wanted, "event": _event_kind(snapshot), "event_id": f"demo-{time.time_ns()}", "value": 1.0}
    line.say("sending an event of the brand-new user")
    client.events([event])
    after = client.recommend(new, k=5)
    name = titles.get(wanted) or wanted
    changed = [item["item_id"] for item in after["items"]] != [item["item_id"] for item in before["items"]]
    verdict = "the very next answer is another" if changed else "the answer stayed the same"
    cards.append(Card("The brand-new user, one event later", f"after the event on {name}: {verdict}", _items(after), (name,)))
    line.done(f"three users, one event: {verdict}")
    return cards


def _event_kind(snapshot: Snapshot) -> str:
    return "purchase" if "purchase" in snapshot.targets else snapshot.targets[0]


def _items(answer: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple(
        (f"{item['title'] or item['item_id']}", f"{(item['reason'] or {}).get('text', '')} [{item['source']}]") for item in answer["items"]
    )


def _measure(url: str, line: StepLine) -> Load:
    """Closed-loop load by 8 clients over known users, after a short warm-up."""
    data = Snapshot.open(Place.at(maple_home())).dataset()
    users = data.users.decode(np.random.default_rng(0).choice(len(data.users), min(len(data.users), REQUESTS), replace=False))
    endpoint, token = f"{url}/v1/recommendations", time.time_ns()

    def body(number: int) -> dict[str, object]:
        # The context is part of what the response cache goes by: every request is computed.
        return {"user_id": users[number % len(users)], "k": 10, "context": {"measurement": f"{token}-{number}"}}

    line.say("warming up")
    asyncio.run(closed(endpoint, body, clients=CLIENTS, requests=CLIENTS * 4))
    line.say(f"{REQUESTS} requests by {CLIENTS} clients")
    load = asyncio.run(closed(endpoint, body, clients=CLIENTS, requests=REQUESTS))
    line.done(
        f"{load.throughput:.0f} requests/s by {CLIENTS} clients, p50 {load.percentile(50):.1f} ms, p99 {load.percentile(99):.1f} ms, "
        f"{len(load.answers) - load.statuses[200]} failed, {load.degraded} degraded"
    )
    return load


def _stages(load: Load) -> list[tuple[str, float, float]]:
    """p50 and p99 in milliseconds of every stage that the answers report, then of the whole answer as the client saw it."""
    out = []
    told = [one.latency_ms for one in load.answers if one.status == 200]
    for name in STAGES:
        values = [each[name] for each in told if name in each]
        if values:
            out.append((name, float(np.percentile(values, 50)), float(np.percentile(values, 99))))
    return [*out, ("client", load.percentile(50), load.percentile(99))]


# -- the report --------------------------------------------------------------------------------------------------------


def _page(config: RunConfig, story: Story, cards: list[Card], stages: list[tuple[str, float, float]], load: Load) -> str:
    home = Place.at(maple_home())
    snapshot = Snapshot.open(home)
    run_ = TrainedRun.open(home)
    evaluations = read_evaluations(home, run_.name)
    baseline = baseline_of(config, run_.bundle)
    events = snapshot.report().events
    quarantined = {name: count for name, count in events.reasons.items() if count}
    converted = {name: count - events.reasons.get(name, 0) for name, count in events.rules.items()}
    sections: list[Section] = [
        Section("What this is", (TextBlock(_verdict(evaluations, baseline), "lead"),)),
        *evaluation_sections(evaluations, baseline),
        examples_section(cards, note="Asked of the running service over HTTP."),
        latency_section(stages, note=f"{len(load.answers)} requests by {CLIENTS} clients: {load.throughput:.0f} requests/s."),
        ingest_section(
            events.rows_in, events.rows_clean, quarantined, converted={name: count for name, count in converted.items() if count > 0}
        ),
        features_section([(view.name, view.entity.value, view.doc) for view in FeatureSpec().all_views]),
    ]
    runs = _tuning(story.results["tune"].facts)
    if runs:
        sections.append(tuning_section(runs))
    sections.append(timeline_section(story.timeline))
    facts = (
        ("data", config.data), ("snapshot", snapshot.name), ("bundle", str(story.results["publish"].facts["bundle"])[:12]),
        ("made", time.strftime("%Y-%m-%d %H:%M")),
    )  # fmt: skip
    return render(f"Maple on {Path(config.data).stem}", sections, subtitle="From raw events to a served recommender", facts=facts)


def _verdict(evaluations: Mapping[str, Evaluation], baseline: str) -> str:
    """The result in two sentences: against the baseline, and against the best source alone."""
    metric = default_metrics(evaluations["pipeline"])[0]
    means = {name: found.means[metric] for name, found in evaluations.items()}
    own, base = means["pipeline"], means[baseline]
    text = f"The served pipeline reaches {metric} {own:.4f} on events after everything it learned from"
    text += f", {own / base:.2f} times the {baseline} baseline ({base:.4f})." if base and baseline != "pipeline" else "."
    sources = [name for name in means if name != "pipeline"]
    if not sources:
        return text
    best = max(sources, key=lambda name: means[name])
    against = compare(evaluations["pipeline"], evaluations[best], metrics=[metric])[metric]
    verdict = "more than chance" if against.low > 0 or against.high < 0 else "no more than chance"
    return f"{text} The best source alone, {best}, reaches {means[best]:.4f}; the difference is {verdict}."


def _tuning(found: Mapping[str, Any]) -> list[TuningRun]:
    from maple.train.board import load

    runs = []
    for name, known in found.items():
        result = load(Place.at(known["folder"]))
        trials = [
            Trial(number, value, phase)
            for number, value, phase in zip(*(result.trials[column].to_pylist() for column in ("number", "value", "phase")), strict=True)
        ]
        runs.append(TuningRun(name, known["metric"], trials, {key: str(value) for key, value in result.best_config.items()}))
    return runs


def _stay(url: str) -> None:
    tracking = f"mlflow ui --backend-store-uri sqlite:///{maple_home()}/mlflow.db"
    console.print(f"\nAPI        {url}/docs\nDashboard  {dashboard()}\nMLflow     {tracking}\n\nCtrl-C ends it.")
    follow_ledger(console.print)
