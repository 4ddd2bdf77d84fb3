"""Releases without Ray: the shapes of deployments, the order of a promotion, the admin application, the client's retry."""

from __future__ import annotations

import asyncio
import http.server
import json
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from taste_shop import publish

from maple.artifacts import Place
from maple.errors import ArtifactError, ConfigError, ServeError
from maple.serve import deploy, rollout
from maple.serve.admin import create_admin
from maple.serve.client import ApiError, Client
from maple.serve.settings import ServeSettings
from maple.train.release import Ledger

POINTER = deploy.Pointer("a" * 64, 3, "b" * 64)


# -- shapes ------------------------------------------------------------------------------------------------------------


def test_what_is_wrong_with_a_shape_is_said(tmp_path: Path) -> None:
    def shape(change: Any) -> Path:
        page = yaml.safe_load((deploy.CONFIGS / "fused.yaml").read_text())
        change(page["applications"][0])
        path = tmp_path / "shape.yaml"
        path.write_text(yaml.safe_dump(page))
        return path

    with pytest.raises(ConfigError, match="finite max_queued_requests"):
        deploy.read_shape(shape(lambda app: app["deployments"][0].pop("max_queued_requests")))
    misspelt = deploy.read_shape(shape(lambda app: app["deployments"][0].update(name="ingress")))
    with pytest.raises(ConfigError, match="Did you mean 'Ingress'"):
        deploy.render(misspelt, {"home": "x"}, POINTER, None, 1)
    with pytest.raises(ConfigError, match="home"):
        deploy.render(deploy.read_shape("fused"), {}, POINTER, None, 1)
    with pytest.raises(ConfigError, match="Did you mean 'split'"):
        deploy.read_shape("spilt")
    with pytest.raises(ConfigError, match="cannot read"):
        deploy.read_shape(tmp_path / "missing.yaml")


@pytest.mark.parametrize("page", [{"runs": 3, "threads": 2}, {"store": {"kind": "redis"}}, {"placement": "half"}, {"max_in_flight": 0}])
def test_settings_that_cannot_be_are_refused(page: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ServeSettings.parse({"home": "x", **page}, "test")


def test_the_error_itself_is_found_below_rays_frames() -> None:
    said = '\x1b[36mray::X.ready()\x1b[39m (pid=1)\n  File "a.py", line 3\nmaple.errors.ArtifactError: no such bundle\n  at end\n.'
    assert deploy._last_words(said) == "maple.errors.ArtifactError: no such bundle"
    assert deploy._last_words("") == "no reason given"


# -- the order of a release --------------------------------------------------------------------------------------------


class Fake:
    """Replicas that write down what they were told; they cannot load the digests in ``bad``."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger, self.bad = ledger, set[str]()
        self.told: list[tuple[str, str, int]] = []
        self.down = False

    def prepare(self, digest: str) -> None:
        if digest in self.bad:
            raise ServeError("a replica cannot load it")
        self.told.append(("prepare", digest, self.ledger.read().generation))

    def flip(self, pointer: deploy.Pointer) -> None:
        if self.down:
            raise ServeError("the cluster does not answer")
        assert self.ledger.read().generation == pointer.generation, "the ledger decides before the replicas flip"
        self.told.append(("flip", pointer.serve, pointer.generation))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    home = tmp_path_factory.mktemp("home")
    return home, publish(home, "popularity"), publish(home, "popularity", "item-knn")


@pytest.fixture
def ledger(bundles: tuple[Path, str, str], tmp_path: Path) -> Ledger:
    return Ledger.open(Place.at(bundles[0]), tmp_path / "releases")


def test_prepare_then_ledger_then_flip(ledger: Ledger, bundles: tuple[Path, str, str]) -> None:
    _, first, second = bundles
    fake = Fake(ledger)
    rollout.promote(ledger, fake, first)
    rollout.promote(ledger, fake, second)
    rollout.rollback(ledger, fake)
    assert fake.told == [
        ("prepare", first, 0), ("flip", first, 1), ("prepare", second, 1), ("flip", second, 2), ("prepare", first, 2), ("flip", first, 3),
    ]  # fmt: skip


def test_a_bundle_that_replicas_cannot_load_is_not_released(ledger: Ledger, bundles: tuple[Path, str, str]) -> None:
    _, first, second = bundles
    fake = Fake(ledger)
    rollout.promote(ledger, fake, first)
    fake.bad = {second}
    with pytest.raises(ServeError, match="cannot load"):
        rollout.promote(ledger, fake, second)
    assert ledger.read().champion == first


def test_after_a_crash_between_ledger_and_flip_follow_catches_up(ledger: Ledger, bundles: tuple[Path, str, str]) -> None:
    _, first, second = bundles
    fake = Fake(ledger)
    rollout.promote(ledger, fake, first)
    fake.down = True
    with pytest.raises(ServeError, match="does not answer"):
        rollout.promote(ledger, fake, second)
    fake.down = False
    assert rollout.follow(ledger, fake).champion == second
    assert fake.told[-1] == ("flip", second, 2)


def test_two_operators_with_the_same_view_cannot_both_win(ledger: Ledger, bundles: tuple[Path, str, str]) -> None:
    _, first, second = bundles
    seen = rollout.promote(ledger, None, first).generation
    rollout.promote(ledger, None, second, expected_generation=seen)
    with pytest.raises(ServeError):
        rollout.promote(ledger, None, first, expected_generation=seen)


def test_nothing_released_says_what_to_do(ledger: Ledger) -> None:
    with pytest.raises(ServeError, match="maple publish"):
        rollout.follow(ledger, Fake(ledger))
    with pytest.raises(ArtifactError):
        rollout.promote(ledger, None, "c" * 64)


def test_the_admin_application(ledger: Ledger, bundles: tuple[Path, str, str]) -> None:
    _, first, second = bundles
    fake = Fake(ledger)
    app = create_admin(ledger, lambda: fake)

    async def scenario() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            return [
                await client.post("/promote", json={"digest": first, "note": "the first"}),
                await client.post("/promote", json={"digest": second, "expected_generation": 0}),
                await client.post("/promote", json={"digest": second, "expected_generation": 1}),
                await client.post("/promote", json={"digest": "nonsense"}),
                await client.post("/rollback", json={}),
                await client.post("/rollback", json={"extra": 1}),
                await client.get("/status"),
                await client.get("/status", headers={"host": "evil.example"}),
            ]

    promoted, stale, second_, nonsense, back, extra, status, foreign = asyncio.run(scenario())
    assert (promoted.status_code, promoted.json()["champion"]) == (200, first)
    assert (stale.status_code, stale.json()["error"]["type"]) == (409, "not_changed")
    assert second_.json()["generation"] == 2
    assert nonsense.status_code == 422
    assert back.json()["champion"] == first
    assert extra.status_code == 422
    assert foreign.status_code == 400
    assert [each["action"] for each in status.json()["history"]] == ["rollback", "promote", "promote"]
    assert fake.told[-1] == ("flip", first, 3)


# -- the client --------------------------------------------------------------------------------------------------------


class Flaky(http.server.BaseHTTPRequestHandler):
    """Closes the connection without an answer as often as ``drops`` says, then answers with ``status``."""

    protocol_version = "HTTP/1.1"
    drops = 0
    seen = 0
    status = 200

    def do_POST(self) -> None:
        cls = type(self)
        cls.seen += 1
        self.rfile.read(int(self.headers["content-length"]))
        if cls.drops:
            cls.drops -= 1
            self.close_connection = True
            return
        error = {"error": {"type": "overloaded", "message": "later", "where": "", "hint": ""}, "request_id": "r1"}
        body = json.dumps({"items": []} if cls.status == 200 else error).encode()
        self.send_response(cls.status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.mark.parametrize(("drops", "status", "outcome"), [(0, 200, None), (1, 200, None), (2, 200, ServeError), (0, 503, ApiError)])
def test_the_client_asks_again_once(drops: int, status: int, outcome: type[Exception] | None) -> None:
    handler = type("Handler", (Flaky,), {"drops": drops, "status": status, "seen": 0})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with Client(f"http://127.0.0.1:{server.server_port}") as client:
            if outcome is None:
                assert client.recommend("u") == {"items": []}
            else:
                with pytest.raises(outcome):
                    client.recommend("u")
        assert handler.seen == min(drops + 1, 2)
    finally:
        server.shutdown()
        server.server_close()


def test_the_client_says_that_nobody_is_there() -> None:
    with pytest.raises(ServeError, match="Is the service up"):
        Client("http://127.0.0.1:9").recommend("u")
    with pytest.raises(ServeError, match="not an http"):
        Client("ftp://x")
