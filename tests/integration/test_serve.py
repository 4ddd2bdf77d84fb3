"""The service on Ray Serve behind HAProxy: both placements, real bundles with a ranker, events, garbage, promotion, the end."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pyarrow as pa
import pytest
from taste_shop import group, publish, publish_ranked

from maple.artifacts import Place
from maple.data.tombstones import Tombstones
from maple.errors import ConfigError, ServeError
from maple.recommend.bundle import load
from maple.recommend.engine import Candidates
from maple.recommend.live import LiveView, live_bundle
from maple.serve import deploy, rollout
from maple.serve.client import ApiError, Client
from maple.serve.door import NoMeter
from maple.serve.settings import ServeSettings
from maple.serve.stores import open_live
from maple.train.release import Ledger

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

GARBAGE = [
    b"", b"{", b"NaN", b'{"user_id":"u","k":1e400}', b'{"user_id":"\\ud800"}', b'{"user_id":"u","k":true}', b'{"user_id":"u","k":1000000}',
    b"\xff\xfe", b"[" * 50_000, b'{"user_id":"u","user_id":"v"}', b'{"user_id":"u","history":[{}]}', b" " * (300 << 10),
]  # fmt: skip


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A home with a ranked bundle, released, and a plain one."""
    home = tmp_path_factory.mktemp("home")
    first, second = publish_ranked(home, "popularity", "item-knn"), publish(home, "popularity", "ease")
    Ledger.open(Place.at(home)).promote(first)
    return home, first, second


@pytest.fixture(scope="module", params=["fused", "split"])
def service(request: pytest.FixtureRequest, shop: tuple[Path, str, str], ray_local: str) -> Iterator[tuple[deploy.Address, Path, str, str]]:
    """The service in one placement, ended afterwards."""
    home, first, second = shop
    store = home / f"{request.param}.sqlite"
    # Generous, because a test machine may be busy: what is late here is not what this test is about.
    settings = {"home": str(home), "store": {"path": str(store)}, "deadline_ms": 5000.0, "live_poll_s": 0.2}
    address = deploy.deploy(request.param, settings, deploy.Pointer(first, 1))
    yield address, home, first, second
    deploy.shutdown()
    assert deploy.where() is None


def soon(holds: Callable[[], bool]) -> None:
    limit = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < limit
        time.sleep(0.05)


def bought(user: str, item: str) -> dict[str, Any]:
    return {"user_id": user, "item_id": item, "event": "purchase", "event_id": f"{user}/{item}"}


def test_answers_and_events(service: tuple[deploy.Address, Path, str, str]) -> None:
    address, _, first, _ = service
    with Client(address.url) as client:
        info = client.info()
        assert (info["bundle"], info["generation"]) == (first, 1)
        cold = client.recommend("anna", 10)
        assert (cold["bundle"], cold["degraded"], cold["path"][0], len(cold["items"])) == (first, [], "cold", 10)
        assert client.events([bought("anna", "i5"), bought("anna", "i9"), bought("anna", "i9")]) | {"request_id": ""} == {
            "request_id": "", "accepted": 2, "duplicates": 1,
        }  # fmt: skip
        warm = client.recommend("anna", 10)
        assert warm["degraded"] == []
        assert warm["path"] == ["retrieve", "rank", "finish"]
        assert [item["item_id"] for item in warm["items"]] != [item["item_id"] for item in cold["items"]]
        because = [item for item in warm["items"] if item["reason"]["kind"] == "because"]
        assert because
        assert all(group(item["item_id"]) == 1 for item in because)
        assert {"retrieve", "rank", "finish", "total"} <= warm["latency_ms"].keys()
        assert client.recommend("anna", 10)["path"][0] == "cache"
        assert all(group(item["item_id"]) == 1 for item in client.similar("i5", 3)["items"])
        with pytest.raises(ApiError) as caught:
            client.similar("no such item")
        assert (caught.value.status, caught.value.kind) == (404, "unknown_item")


def test_live_items_count_within_a_poll_in_every_deployment(service: tuple[deploy.Address, Path, str, str]) -> None:
    address, _, first, _ = service
    with Client(address.url) as client:

        def slate(user: str, **fields: Any) -> list[dict[str, Any]]:
            answer = client.recommend(user, 10, **fields)
            assert (answer["bundle"], answer["degraded"], answer["path"][-3:]) == (first, [], ["retrieve", "rank", "finish"])
            return list(answer["items"])

        client.events([bought("livia", "i6"), bought("livia", "i10")])
        best = slate("livia")[0]["item_id"]
        new = f"new {address.port}"
        assert client.put_item(new, {"category": "c2", "price": 5, "title": "Brand new"})["in_bundle"] is False
        assert client.put_item(best, {"stock": 0})["stock"] == 0
        soon(lambda: best not in {item["item_id"] for item in slate("livia")})
        now = slate("livia")  # whoever works for the ingress has read what the ingress has
        (found,) = [item for item in now if item["item_id"] == new]
        assert (found["title"], found["source"], found["reason"]["text"]) == ("Brand new", "new items", "new in c2")
        assert [item["item_id"] for item in slate("somebody", filters={"price": {"min": 4.999, "max": 5.001}})] == [new]
        client.events([bought("livia", new)])
        assert [item["reason"]["kind"] for item in slate("livia") if item["item_id"] == new] == ["again"]
        client.withdraw_item(new)
        client.put_item(best, {"stock": None})
        soon(lambda: slate("livia")[0]["item_id"] == best)
        assert new not in {item["item_id"] for item in slate("livia")}
        live = client.info()["live"]
        assert live["version"] >= 4
        assert live["read_s"] < 60


def test_people_are_described_joined_and_forgotten(service: tuple[deploy.Address, Path, str, str]) -> None:
    address, home, _, _ = service
    with Client(address.url) as client:
        user, device = f"user {address.port}", f"device/{address.port}"
        client.events([bought(user, "i6"), bought(device, "i10")])
        assert client.describe_user(user, {"age": 30})["user_id"] == user
        assert client.join(device, user)["changed"] >= 1
        both = {item["reason"]["item_id"] for item in client.recommend(device, 20)["items"]}
        assert {"i6", "i10"} <= both
        assert client.part(device)["changed"] == 1
        assert client.delete_user(user)["events"] == 1
        assert client.recommend(user, 10)["path"][0] == "cold"
        assert client.events([bought(user, "i14")])["accepted"] == 1
        assert client.recommend(user, 10)["path"][:2] in (["cold", "retrieve"], ["cache", "cold"])
        assert client.recommend(device, 10)["path"][0] != "cold"
    assert Tombstones.of(Place.at(home)).covers(pa.array([user, device])).tolist() == [True, False]


def test_garbage_is_refused_and_harms_nothing(service: tuple[deploy.Address, Path, str, str]) -> None:
    address = service[0]

    async def send() -> list[tuple[int, Any]]:
        out = []
        async with aiohttp.ClientSession(headers={"content-type": "application/json"}) as session:
            for path in ("/v1/recommendations", "/v1/events"):
                for body in GARBAGE:
                    async with session.post(address.url + path, data=body) as answer:
                        out.append((answer.status, await answer.json()))
        return out

    for status, body in asyncio.run(send()):
        assert 400 <= status < 500
        assert body["error"]["message"]
        assert body["request_id"]
    request = urllib.request.Request(f"{address.url}/v1/info", headers={"x-request-id": "mine-1"})
    with urllib.request.urlopen(request) as answer:
        assert answer.headers.get_all("x-request-id") == ["mine-1"]
        assert json.load(answer)["generation"] == 1


def test_promotion_under_load_fails_nothing_and_mixes_nothing(service: tuple[deploy.Address, Path, str, str]) -> None:
    address, home, first, second = service
    ledger = Ledger.open(Place.at(home))
    if ledger.read().champion != first:
        rollout.rollback(ledger, deploy.deployed())
    start = ledger.read().generation
    pids = _replica_pids()
    answers: list[dict[str, Any]] = []
    faults: list[Exception] = []
    stop = threading.Event()

    def ask(number: int) -> None:
        with Client(address.url) as client:
            while not stop.is_set():
                try:
                    answers.append(client.recommend(f"load-{number}-{len(answers)}", 5))
                except ServeError as error:
                    faults.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    try:
        release = rollout.promote(ledger, deploy.deployed(), second)
        assert (release.champion, release.generation) == (second, start + 1)
        with pytest.raises(ServeError, match="cannot load bundle"):
            rollout.promote(ledger, deploy.deployed(), "0" * 64)
        assert ledger.read() == release, "a bundle that cannot be served is not released"
        back = rollout.rollback(ledger, deploy.deployed())
        assert back.champion == first
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not faults
    ranked = {first: {"popularity", "item-knn"}, second: {"popularity", "ease"}}
    assert {answer["bundle"] for answer in answers} == set(ranked)
    for answer in answers:
        assert {item["source"] for item in answer["items"]} <= ranked[answer["bundle"]] | {"fallback"}
    assert _replica_pids() == pids, "promotion restarts nothing"
    with Client(address.url) as client:
        info = client.info()
        assert (info["bundle"], info["generation"], info["failed"]) == (first, back.generation, {})


def test_the_figures_of_serving_are_among_rays_metrics(service: tuple[deploy.Address, Path, str, str]) -> None:
    import ray

    with Client(service[0].url) as client:
        client.recommend("measured", 3)
    node = ray.nodes()[0]
    limit, text = time.monotonic() + 60, ""
    wanted = ("ray_maple_requests_total", "ray_maple_latency_ms_bucket", "ray_maple_stage_ms_sum", 'stage="ranker"', 'endpoint="events"')
    while not all(name in text for name in wanted):
        assert time.monotonic() < limit, [name for name in wanted if name not in text]
        time.sleep(0.5)
        with urllib.request.urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=10) as answer:
            text = answer.read().decode()


def test_nothing_of_the_api_listens_beyond_this_machine(service: tuple[deploy.Address, Path, str, str]) -> None:
    import psutil

    port = service[0].port
    listening = {(c.laddr.ip, c.laddr.port) for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    low, high = (int(os.environ[f"RAY_SERVE_DIRECT_INGRESS_{end}_HTTP_PORT"]) for end in ("MIN", "MAX"))
    assert ("127.0.0.1", port) in listening
    assert {ip for ip, at in listening if at == port or low <= at <= high} == {"127.0.0.1"}
    folder = f"{Path(os.environ['RAY_SERVE_HAPROXY_CONFIG_FILE_LOC']).parent}/"
    proxies = [each for each in psutil.process_iter(["cmdline"]) if any(folder in part for part in each.info["cmdline"] or ())]
    opened = {c.laddr for each in proxies for c in each.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    stats, metrics = (int(os.environ[f"RAY_SERVE_HAPROXY_{what}_PORT"]) for what in ("STATS", "METRICS"))
    assert {at for _, at in opened} >= {port, stats, metrics}
    assert {ip for ip, _ in opened} == {"127.0.0.1"}


def test_the_benchmark_counts_the_processes_of_its_own_cluster(
    service: tuple[deploy.Address, Path, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    serving = importlib.import_module("serving")
    started = "for name in ray::ServeReplica:other haproxy; do (exec -a $name sleep 60) >&- & echo $!; done"
    others = {int(pid) for pid in subprocess.check_output(["bash", "-c", started]).split()}
    try:
        found = {process.pid: process.name() for process in serving.serving_processes()}
    finally:
        for pid in others:
            psutil.Process(pid).kill()
    assert found.keys() >= _replica_pids()
    assert "haproxy" in found.values()
    assert not found.keys() & others


@pytest.mark.parametrize(("name", "deployments"), [("fused", {"Ingress"}), ("split", {"Ingress", "Candidates", "Ranker"})])
def test_committed_shapes_render_to_what_serve_accepts(name: str, deployments: set[str], ray_local: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    document = deploy.render(deploy.read_shape(name), {"home": "/srv/maple"}, deploy.Pointer("a" * 64, 3, "b" * 64), None, 8123)
    checked = ServeDeploySchema.model_validate(document)
    (application,) = checked.applications
    assert {each.name for each in application.deployments} == deployments
    assert (checked.http_options.host, checked.http_options.port) == ("127.0.0.1", 8123)
    assert ServeSettings.parse(application.args, "args").placement == name
    for each in application.deployments:
        assert each.user_config == {"serve": "a" * 64, "generation": 3, "also": "b" * 64}
        assert 0 < each.max_queued_requests < 10_000
        assert 0 < each.max_ongoing_requests < 10_000
        assert each.autoscaling_config is not None
    assert sum(each.ray_actor_options.num_cpus for each in application.deployments) <= 1, "it fits on two cores beside other work"


def test_what_cannot_be_deployed_says_why(shop: tuple[Path, str, str], ray_local: str) -> None:
    home, first, _ = shop
    with pytest.raises(ConfigError, match="Did you mean 'threads'"):
        deploy.deploy("fused", {"home": str(home), "thread": 3}, deploy.Pointer(first, 1))
    with pytest.raises(ConfigError, match="Did you mean 'fused'"):
        deploy.deploy("fuzed", {"home": str(home)}, deploy.Pointer(first, 1))
    with pytest.raises(ServeError, match="has no manifest"):
        deploy.deploy("fused", {"home": str(home)}, deploy.Pointer("1" * 64, 1))
    deploy.shutdown()


def test_replicas_that_have_read_the_live_items_to_different_points_agree(
    shop: tuple[Path, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from maple.serve import nodes

    monkeypatch.setattr(nodes, "RayMeter", NoMeter)
    home, _, digest = shop
    page = {"home": str(home), "store": {"path": str(tmp_path / "online.sqlite")}, "live_poll_s": 1000.0}
    bundle, live = load(Place.at(home), digest), open_live(ServeSettings.parse(page, "test"))

    async def scenario() -> None:
        far = nodes.Segments(page, "retrieve")
        await far.reconfigure({"serve": digest, "generation": 1, "also": None})

        async def new_items(version: int, size: int) -> tuple[list[int], list[int]]:
            """Codes of new items that are proposed, and those that are held back."""
            asked = live_bundle(bundle, LiveView().after(version, live.since(0)[1]), 0)
            query = asked.query("u", now=1 << 53, history=[("i5", "purchase", 1 << 52)])
            got = (await far.run(nodes.Asked(digest, version, size), [query], Candidates.empty(1), None)).candidates
            return sorted(got.items[got.items >= 80].tolist()), [item for part in got.dropped for item in part.items.tolist()]

        versions = [live.put(name, {"category": "c1"}).version for name in ("one", "two")]
        assert await new_items(versions[-1], 82) == ([80, 81], []), "it reads what the asking one has read"
        live.put("three", {"category": "c1"})
        await asyncio.to_thread(far.refresh)
        assert await new_items(versions[-1], 82) == ([80, 81], [82]), "and does not propose what that one does not know"
        later = [live.put(f"more {number}", {"category": "c1"}).version for number in range(4)]
        found = await asyncio.gather(*(new_items(version, 84 + place) for place, version in enumerate(later)))
        assert [len(proposed) for proposed, _ in found] == [4, 5, 6, 7]
        with pytest.raises(ServeError, match="version 999"):
            await new_items(999, 90)
        far.poller.close()

    asyncio.run(scenario())
    live.close()


def _replica_pids() -> set[int]:
    details = deploy._details(deploy._client())
    return {replica["pid"] for each in details["applications"][deploy.APP]["deployments"].values() for replica in each["replicas"]}
