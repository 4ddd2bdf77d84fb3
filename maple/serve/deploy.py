"""Deploying the service declaratively: a committed YAML shape, filled in and applied through Serve's REST API.

Deploying and promoting are the same call with another document. A promotion changes nothing but ``user_config``, so replicas
stay (same processes) and load the new bundle beside the old one; only when every replica holds it does the ingress flip.
"""

from __future__ import annotations

import logging
import re
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maple.cluster_ray import free_ports
from maple.config import read_yaml
from maple.errors import ConfigError, ServeError, unknown_name
from maple.serve.settings import ServeSettings

APP = "maple"
CONFIGS = Path(__file__).parent.parent.parent / "serve_configs"
_WAIT_S = 120.0
_REASON_CHARS = 1000
_ERROR = re.compile(r"[\w.()]*(Error|Exception|Timeout)[\w.()]*: \S")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")

log = logging.getLogger("maple.serve")


@dataclass(frozen=True)
class Address:
    """Where the API answers."""

    url: str
    host: str
    port: int


@dataclass(frozen=True)
class Pointer:
    """What replicas are told: the digest that answers, the generation that said so, and one more bundle to hold ready."""

    serve: str
    generation: int
    also: str | None = None

    def plain(self) -> dict[str, Any]:
        return {"serve": self.serve, "generation": self.generation, "also": self.also}


def read_shape(config: str | Path) -> dict[str, Any]:
    """The YAML document of a deployment shape: a path, or the name of one in ``serve_configs/`` (fused, split)."""
    path = Path(config)
    if path.suffix not in {".yaml", ".yml"}:
        folders = [Path("serve_configs"), CONFIGS]
        found = next((folder / f"{config}.yaml" for folder in folders if (folder / f"{config}.yaml").is_file()), None)
        if found is None:
            known = {each.stem for folder in folders for each in folder.glob("*.yaml")}
            raise ConfigError(f"{unknown_name('deployment shape', str(config), known)} A path to a Serve YAML works as well.")
        path = found
    shape = read_yaml(path)
    applications = shape.get("applications")
    if not isinstance(applications, list) or len(applications) != 1 or not isinstance(applications[0], dict):
        raise ConfigError(f"{path}: `applications` must list exactly one application; compare with serve_configs/fused.yaml")
    for deployment in applications[0].get("deployments") or []:
        if not isinstance(deployment.get("max_queued_requests"), int) or deployment["max_queued_requests"] < 1:
            name = deployment.get("name")
            raise ConfigError(f"{path}: deployment {name!r} needs a finite max_queued_requests; without one it collapses under load")
    return shape


def render(shape: Mapping[str, Any], settings: Mapping[str, Any], pointer: Pointer, host: str | None, port: int) -> dict[str, Any]:
    """The document to apply: the shape with arguments, address and the pointer filled in. Checked by ``ServeSettings``."""
    (application,) = shape["applications"]
    args = {**(application.get("args") or {}), **settings}
    checked = ServeSettings.parse(args, "serve arguments")
    known = {"Ingress", "Candidates", "Ranker"} if checked.placement == "split" else {"Ingress"}
    options = {deployment["name"]: deployment for deployment in application.get("deployments") or []}
    for name in options:
        if name not in known:
            raise ConfigError(f"deployments: {unknown_name('deployment', name, known)}")
    deployments = [{**options.get(name, {"name": name}), "user_config": pointer.plain()} for name in sorted(known)]
    http = {**(shape.get("http_options") or {}), "port": port} | ({"host": host} if host else {})
    http.setdefault("host", "127.0.0.1")
    filled = {**application, "name": APP, "args": checked.plain(), "deployments": deployments}
    return {**shape, "http_options": http, "applications": [filled]}


def deploy(
    config: str | Path,
    settings: Mapping[str, Any],
    pointer: Pointer,
    *,
    port: int | None = None,
    host: str | None = None,
    say: Callable[[str], None] | None = None,
) -> Address:
    """Deploy a shape on the Ray cluster this process is connected to and wait until it answers.

    ``settings`` are fields of ``ServeSettings`` and win over the YAML's ``args``. ``port``: default is a free one, or the one
    that Serve on this cluster has already. ``ServeError`` with the deployment's own words if it does not come up.
    """
    say = say or (lambda text: None)
    client = _client()
    from ray import serve

    bound = (_details(client).get("http_options") or {}).get("port")
    if bound and port not in (None, bound):
        raise ServeError(
            f"Serve on this cluster listens on port {bound} and cannot move to {port}: leave the port out, or shut it down first"
        )
    if not bound:
        serve.shutdown()  # nothing runs; this makes Ray forget a controller that ended, so that handles find the new one
    document = render(read_shape(config), settings, pointer, host, port or bound or free_ports(1)[0])
    (application,) = document["applications"]
    _refuse_sqlite_on_many_nodes(application["args"])
    say(f"deploying the {application['args']['placement']} placement of bundle {pointer.serve[:12]}")
    _apply(client, document)
    _await_running(client)
    _await_pointer(document, pointer, {pointer.serve})
    address = _address(document["http_options"])
    _await_answer(address)
    say(f"serving at {address.url}")
    return address


class Deployed:
    """The service that runs on this cluster, as ``serve.rollout`` needs it. Processes stay; only what they point to moves."""

    def prepare(self, digest: str) -> None:
        """Every replica loads the bundle beside the one it serves; ``ServeError`` if one cannot: it then holds what it held before."""
        client = _client()
        document, current = _deployed(client)
        if digest == current.serve:
            return
        both = Pointer(current.serve, current.generation, digest)
        _apply(client, _pointed(document, both))
        try:
            _await_pointer(document, both, {current.serve, digest})
        except ServeError:
            _apply(client, _pointed(document, current))
            raise

    def flip(self, pointer: Pointer) -> None:
        """Answer from a bundle that is prepared; the ingress decides per request, so no answer mixes two."""
        client = _client()
        document, current = _deployed(client)
        if (pointer.serve, pointer.generation) == (current.serve, current.generation):
            return
        final = Pointer(pointer.serve, pointer.generation, pointer.also or (current.serve if current.serve != pointer.serve else None))
        _apply(client, _pointed(document, final))
        _await_pointer(document, final, {final.serve})


def deployed() -> Deployed | None:
    """The running service of this cluster, None where there is none."""
    return Deployed() if where() is not None else None


def where() -> Address | None:
    """Where the service of this cluster answers, None if it does not run."""
    details = _details(_client())
    if APP not in (details.get("applications") or {}):
        return None
    return _address(details["http_options"])


def shutdown() -> None:
    """End Serve on this cluster, with everything it runs; returns when it is gone. The Ray cluster stays."""
    client = _client()
    if not _details(client).get("applications"):
        return
    from ray import serve

    serve.shutdown()
    limit = time.monotonic() + _WAIT_S
    while _details(client).get("applications"):
        if time.monotonic() > limit:
            raise ServeError(f"Serve did not end within {_WAIT_S:.0f} s; its controller's log in the Ray dashboard says why")
        time.sleep(0.2)


# -- the REST API of Serve ---------------------------------------------------------------------------------------------


def _client() -> Any:
    """Ray's own REST client (the one of ``serve deploy``); it sends the cluster's token.

    Ray is imported inside functions here: it reads its flags and token when it is imported, and a cluster may start after this module.
    """
    import ray
    import ray.serve  # sets up its logger when it is imported, hence before the level below
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    if not ray.is_initialized():
        raise ServeError("this process is not connected to a Ray cluster; start one with maple.cluster_ray.start_local or attach() first")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # this process is a client; what replicas log is theirs
    dashboard = ray.init(ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR).dashboard_url
    if not dashboard:
        raise ServeError("this Ray cluster has no dashboard, and Serve is deployed through it; start the cluster with its dashboard")
    try:
        return ServeSubmissionClient(dashboard if "://" in dashboard else f"http://{dashboard}")
    except ConnectionError as error:
        raise ServeError(f"the Ray dashboard at {dashboard} does not answer: {error}") from None


def _refuse_sqlite_on_many_nodes(args: Mapping[str, Any]) -> None:
    """``ConfigError`` where replicas on several nodes would each have a store of their own."""
    import ray

    nodes = sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes())
    if args["store"]["kind"] == "sqlite" and nodes > 1:
        raise ConfigError(
            f"the SQLite store serves one node, and this cluster has {nodes}: replicas on different nodes would see different events. "
            "Use a Redis store (store: {kind: redis, url: redis://...})."
        )


def _details(client: Any) -> dict[str, Any]:
    try:
        return dict(client.get_serve_details())
    except RuntimeError as error:
        raise ServeError(f"Serve's REST API refused to tell its state: {_last_words(str(error))}") from None


def _apply(client: Any, document: Mapping[str, Any]) -> None:
    """Hand a document over; once more if Serve itself failed to start, which a busy machine makes it do. The call is idempotent."""
    for attempt in (1, 2):
        try:
            client.deploy_applications(dict(document))
            return
        except RuntimeError as error:
            if attempt == 2 or "status code 5" not in str(error):
                raise ServeError(f"Serve refused the deployment: {_last_words(str(error))}") from None
            log.warning("Serve did not start (%s); trying once more", _last_words(str(error)))
            time.sleep(1.0)


def _deployed(client: Any) -> tuple[dict[str, Any], Pointer]:
    """The document that runs, and where it points."""
    details = _details(client)
    application = (details.get("applications") or {}).get(APP)
    if application is None:
        raise ServeError("the service does not run on this cluster; deploy it with `maple serve`")
    config = application["deployed_app_config"]
    told = next(each["user_config"] for each in config["deployments"] if each["name"] == "Ingress")
    document = {"proxy_location": details["proxy_location"], "http_options": details["http_options"], "applications": [config]}
    return document, Pointer(told["serve"], told["generation"], told["also"])


def _pointed(document: Mapping[str, Any], pointer: Pointer) -> dict[str, Any]:
    (application,) = document["applications"]
    deployments = [{**deployment, "user_config": pointer.plain()} for deployment in application["deployments"]]
    return {**document, "applications": [{**application, "deployments": deployments}]}


def _await_running(client: Any) -> None:
    limit = time.monotonic() + _WAIT_S
    while True:
        application = _details(client)["applications"].get(APP, {})
        status = application.get("status", "NOT_STARTED")
        if status == "RUNNING":
            return
        if status in {"DEPLOY_FAILED", "UNHEALTHY"} or time.monotonic() > limit:
            raise ServeError(f"the service did not come up ({status}): {_reason(application)}")
        time.sleep(0.2)


def _reason(application: Mapping[str, Any]) -> str:
    """What the deployments say of their failure."""
    said = [
        f"{name}: {_last_words(each['message'])}" for name, each in (application.get("deployments") or {}).items() if each.get("message")
    ]
    return "; ".join(said) or _last_words(application.get("message") or "no reason given")


def _last_words(text: str) -> str:
    """The error itself: Ray puts it below the frames of several processes, in colours."""
    lines = [line.strip() for line in _COLOURS.sub("", text).splitlines() if line.strip()]
    named = [line for line in lines if _ERROR.match(line)]
    return (named or lines or ["no reason given"])[-1][-_REASON_CHARS:]


def _await_pointer(document: Mapping[str, Any], pointer: Pointer, needed: set[str]) -> None:
    """Until every replica of every deployment answers from ``pointer.serve`` and holds what is needed; ``ServeError`` if one cannot."""
    (application,) = document["applications"]
    limit = time.monotonic() + _WAIT_S
    for deployment in application["deployments"]:
        name = deployment["name"]
        while True:
            states = _states(name)
            for state in states:
                for digest in needed & state["failed"].keys():
                    raise ServeError(f"a replica of {name} cannot load bundle {digest[:12]}: {state['failed'][digest]}")
            told = (pointer.serve, pointer.generation)
            if states and all((state["serve"], state["generation"]) == told and needed <= set(state["held"]) for state in states):
                break
            if time.monotonic() > limit:
                raise ServeError(f"{name} did not take up bundle {pointer.serve[:12]} within {_WAIT_S:.0f} s")
            time.sleep(0.1)


def _states(deployment: str) -> list[dict[str, Any]]:
    """What every replica of a deployment says of itself; none while Serve is moving them."""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        return list(serve.get_deployment_handle(deployment, APP).broadcast("pointer").results(timeout_s=_WAIT_S))
    except RayServeException:
        return []


def _address(http: Mapping[str, Any]) -> Address:
    host = "127.0.0.1" if http["host"] in {"0.0.0.0", "::"} else http["host"]  # noqa: S104 - compared, not bound
    return Address(f"http://{host}:{http['port']}", host, int(http["port"]))


def _await_answer(address: Address) -> None:
    limit = time.monotonic() + _WAIT_S
    while True:
        try:
            with urllib.request.urlopen(f"{address.url}/healthz", timeout=5) as answer:  # noqa: S310 - our own http address
                if answer.status == 200:
                    return
        except OSError as error:
            if time.monotonic() > limit:
                raise ServeError(f"the service runs, but {address.url}/healthz does not answer: {error}") from None
        time.sleep(0.1)
