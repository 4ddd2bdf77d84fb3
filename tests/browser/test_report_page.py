"""The report in a real browser: it draws without a script error or a request to anywhere, its tables and plots are there to be seen."""

from __future__ import annotations

import http.server
import io
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from needs import require

from maple.evaluate.figures import Trial
from maple.evaluate.harness import CatalogueStats, Evaluation, Relevant, evaluate
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
from maple.hashing import rng
from maple.page import Card, render

HOSTILE = "<img src=x onerror=console.error('owned')><script>console.error('owned')</script> & \"quoted\""
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-default-apps", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--enable-logging=stderr", "--v=0",
    "--virtual-time-budget=3000", "--window-size=1200,1600",
)  # fmt: skip

Browse = Callable[..., "Seen"]


class Seen:
    """What one run of the browser printed: the document after its scripts (if it has any), and the console and log."""

    def __init__(self, dom: str, log: str) -> None:
        self.dom, self.log = dom, log

    @property
    def console(self) -> list[str]:
        """Lines that the page itself caused: messages, script errors, refused and failed requests."""
        return [line for line in self.log.splitlines() if "CONSOLE" in line]


class Tables(HTMLParser):
    """The texts of all table cells, row by row, and how many of each tag there are."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.rows: list[list[str]] = []
        self.tags: dict[str, int] = {}
        self._cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def browse(tmp_path_factory: pytest.TempPathFactory) -> Browse:
    """Runs headless Chromium with a profile of its own and no proxy."""
    program = shutil.which("chromium")
    require("browser", program is not None, "there is no chromium on the PATH")
    folder = tmp_path_factory.mktemp("chromium")

    def run(url: str, *flags: str) -> Seen:
        command = [str(program), *FLAGS, f"--user-data-dir={folder / 'profile'}", "--no-proxy-server", *flags, url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=folder)
        assert done.returncode == 0, done.stderr[-2000:]
        return Seen(done.stdout, done.stderr)

    return run


def models(names: tuple[str, ...]) -> dict[str, Evaluation]:
    users, items = 40, 25
    wanted = rng(0, "wanted").integers(0, items, users).astype(np.int32)
    relevant = Relevant(np.arange(users, dtype=np.int32), np.arange(users + 1), wanted, 1_600_000_000_000_000, 1_700_000_000_000_000)
    stats = CatalogueStats(np.arange(items), items, categories=np.arange(items, dtype=np.int32) % 3)
    out = {}
    for place, name in enumerate(names):
        scores = rng(place, "scores").random((users, items))
        scores[np.arange(users) % 3 < place, wanted[np.arange(users) % 3 < place]] = 2.0
        lists = np.argsort(-scores, axis=1)[:, :5].astype(np.int32)
        out[name] = evaluate(lambda rows, lists=lists: lists[rows], relevant, catalogue=stats, ks=(5,), bootstrap=50)  # type: ignore[misc]
    return out


def page(found: dict[str, Evaluation]) -> str:
    trials = [Trial(0, 0.1, "random"), Trial(1, 0.3, "tpe"), Trial(2, None, "tpe")]
    sections = [
        *evaluation_sections(found, "popular"),
        examples_section(
            [Card(HOSTILE, "5 events", ((HOSTILE, "because"), ("Oak Lamp", "popular")), ("Copper Mug",))], note="asked over HTTP"
        ),
        latency_section([("retrieve", 1.0, 2.0), ("rank", 2.0, 4.0), ("total", 4.0, 8.0)]),
        ingest_section(100, 90, {"missing_customer": 10}),
        features_section([("recency", "user", "seconds since the last event")]),
        tuning_section([TuningRun("als", "ndcg@20", trials, {"factors": "64"})]),
        timeline_section([("Ingest", 0.0, 3.0), ("Train", 3.0, 9.0)]),
    ]
    return render("A report in a browser", sections, subtitle="with everything in it", facts=(("data", HOSTILE),))


@pytest.fixture(scope="module")
def found() -> dict[str, Evaluation]:
    return models(("popular", "pipeline"))


@pytest.fixture(scope="module")
def site(found: dict[str, Evaluation]) -> Iterator[tuple[str, list[str]]]:
    """The report behind a server on loopback that notes every request, so that a page that fetches anything is found out."""
    content, asked = page(found).encode(), list[str]()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            here = self.path == "/report.html"
            self.send_response(200 if here else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(content if here else b"")

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/report.html", asked
        finally:
            server.shutdown()
            thread.join()


def requests_of(netlog: Path) -> set[str]:
    """The URLs that a page asked for, by Chromium's network log; what the browser asks for on its own has no origin."""
    events = [event.get("params") or {} for event in json.loads(netlog.read_text(errors="replace"))["events"]]
    return {str(one["url"]) for one in events if "url" in one and one.get("initiator", "not an origin") != "not an origin"}


def test_the_report_draws_without_errors_or_requests(
    browse: Browse, site: tuple[str, list[str]], found: dict[str, Evaluation], tmp_path: Path
) -> None:
    url, asked = site
    seen = browse(url, "--dump-dom", f"--log-net-log={tmp_path / 'net.json'}")
    assert seen.console == []
    assert set(asked) <= {"/report.html", "/favicon.ico"}, "a browser may ask for an icon on its own"
    assert requests_of(tmp_path / "net.json") <= {url.replace("report.html", "favicon.ico")}
    shown = Tables(seen.dom)
    flat = [cell.strip() for row in shown.rows for cell in row]
    assert shown.tags["table"] >= 2
    for name in found:
        assert any(cell.startswith(name) for cell in flat), name
    value = f"{found['pipeline'].means['ndcg@5']:.4f}"
    assert any(value in cell for cell in flat), value
    assert "<svg" in seen.dom or "<img" in seen.dom
    assert "script" not in shown.tags
    assert "<img src=x" not in seen.dom.lower(), "names are text"
    assert "owned" not in seen.log


def test_the_probe_sees_what_it_is_for(browse: Browse, site: tuple[str, list[str]], tmp_path: Path) -> None:
    """A page with a script error and a request is caught, or the test above would prove nothing."""
    own = site[0].rsplit("/", 1)[0]
    bad = tmp_path / "bad.html"
    bad.write_text(f"<script>console.error('owned')</script><img src='{own}/probe.png'><img src='https://example.invalid/x.png'>")
    seen = browse(bad.as_uri(), "--dump-dom", f"--log-net-log={tmp_path / 'net.json'}")
    assert any("owned" in line for line in seen.console)
    assert "/probe.png" in site[1]
    assert requests_of(tmp_path / "net.json") == {f"{own}/probe.png", "https://example.invalid/x.png"}
    site[1].clear()


@pytest.mark.parametrize("width", [1200, 400])
def test_there_is_something_to_see(browse: Browse, site: tuple[str, list[str]], tmp_path: Path, width: int) -> None:
    from PIL import Image

    shot = tmp_path / "shot.png"
    browse(site[0], f"--screenshot={shot}", f"--window-size={width},1600")
    image = Image.open(io.BytesIO(shot.read_bytes())).convert("RGB")
    assert image.size == (width, 1600)
    pixels = np.asarray(image, np.int32)
    paper = np.bincount(pixels.reshape(-1, 3) @ [65536, 256, 1]).argmax()
    ink = (pixels @ [65536, 256, 1]) != paper
    assert 0.02 < ink.mean() < 0.9, "neither blank nor flooded"
    lit = ink.reshape(16, 100, -1).any(axis=(1, 2))
    assert lit[:10].all(), "from top to bottom"
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20, "plots have colours"


def test_the_report_is_no_wider_than_a_phone(browse: Browse, found: dict[str, Evaluation], tmp_path: Path) -> None:
    probe = "<script>document.title = document.documentElement.scrollWidth + ' of ' + window.innerWidth</script></body>"
    path = tmp_path / "report.html"
    # The page forbids scripts; this copy allows the probe's.
    text = re.sub(r"<meta[^>]*Content-Security-Policy[^>]*>", "", page(found)).replace("</body>", probe)
    path.write_text(text, encoding="utf-8")
    seen = browse(path.as_uri(), "--dump-dom", "--window-size=500,1000")
    match = re.search(r"<title>(\d+) of (\d+)</title>", seen.dom)
    assert match, "the probe ran"
    assert int(match[1]) <= int(match[2])
