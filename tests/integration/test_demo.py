"""The demo as a newcomer starts it: a process of its own, from raw files to a report, and nothing of it left running afterwards."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from maple.artifacts import Place
from maple.data.simulate import simulate, write
from maple.data.snapshot import Snapshot
from maple.train.release import Ledger

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

#: Small budgets; every step is the demo's own.
PAGE = """
pipeline:
  sources:
    - {name: frequency, model: frequency}
    - {name: als, model: als, config: {factors: 16, iterations: 5}}
    - {name: popular, model: popularity}
  ranker: {model: dcn, config: {ensemble: 1, training: {epochs: 1}}}
tune: {models: [als], random_trials: 1, tpe_trials: 0}
rows: {negatives: 30}
evaluate: {bootstrap: 100, max_users: 100}
"""


@dataclass(frozen=True)
class Site:
    """Raw data, a home, and a short folder for temporary files (Ray's socket paths are limited)."""

    raw: Path
    home: Path
    temporary: Path

    def maple(self, *arguments: str, address: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command, on the cluster at ``address`` or, without one, in an environment that knows of no cluster."""
        environment = {name: value for name, value in os.environ.items() if name != "MAPLE_LEDGER" and (address or name[:4] != "RAY_")}
        environment |= {"MAPLE_HOME": str(self.home), "TMPDIR": str(self.temporary)} | ({"RAY_ADDRESS": address} if address else {})
        command = [sys.executable, "-c", "from maple.cli import main; main()", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=self.raw.parent, env=environment)

    def demo(self, *more: str) -> tuple[str, str]:
        """Run the demo; what it printed, and its report."""
        report = self.raw.parent / "report.html"
        report.unlink(missing_ok=True)
        (self.raw.parent / "run.yaml").write_text(PAGE)
        done = self.maple("demo", "--data", str(self.raw), "--config", "run.yaml", "--report", str(report), *more)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert "Traceback" not in done.stdout
        assert done.stderr == "", "what Ray remarks in passing is not for people"
        return done.stdout, report.read_text(encoding="utf-8")

    def left_running(self) -> list[str]:
        """Processes with this site's folders on their command line or as their working folder, and the folders of clusters."""
        marks = (f"{self.temporary}/", f"{self.home}/")
        found = []
        for process in psutil.process_iter(["cmdline"]):
            command = " ".join(process.info["cmdline"] or ())
            if any(mark in command for mark in marks):
                found.append(command)
        return found + [path.name for path in self.temporary.glob("maple-*")]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("demo")
    raw = write(simulate(5, num_users=200, num_items=120, days=40), folder / "shop")
    temporary = Path(tempfile.mkdtemp(prefix="md", dir="/tmp"))
    yield Site(raw, folder / "home", temporary)
    shutil.rmtree(temporary, ignore_errors=True)


def test_the_whole_loop_ends_with_answers_and_a_report(site: Site) -> None:
    said, report = site.demo()
    for title in ("Ingest", "Features", "Tune", "Train", "Evaluate", "Publish", "Serve", "Ask", "Measure", "Report", "Shut down"):
        assert f"✓ {title} " in said, title
    # What it printed of the data is what the files hold.
    counts = set(re.findall(r"([\d,]+) rows in = ", said))
    assert counts == {f"{pq.read_metadata(site.raw / 'events.parquet').num_rows:,}"}
    snapshot = Snapshot.open(Place.at(site.home))
    titles = set(snapshot.items()["title"].to_pylist())
    # Three users and the new one again, five items each, by their titles and with a source.
    for who in ("The heavy user u", "The light user u", "The brand new user visitor-", "The brand-new user, one event later"):
        table = said[said.index(who) :].split("\n", 1)[1]
        lines = [line.strip("│ ").split("│")[0].strip() for line in table.splitlines()[3:8]]
        assert len(lines) == 5
        assert {line for line in lines if line} <= titles, lines
    assert "the very next answer is another" in said
    # The evaluation names each model, the latency each stage; nothing failed under load.
    accuracy = said[said.index("Accuracy on the test part") :]
    for name in ("pipeline", "frequency", "als", "popular"):
        assert re.search(rf"│ {name} +│ +0\.\d{{4}} │", accuracy), name
    latency = said[said.index("Latency, milliseconds") :]
    for stage in ("retrieve", "rank", "finish", "client"):
        assert re.search(rf"│ {stage} +│ +[\d.]+ │ +[\d.]+ │", latency), stage
    assert re.search(r"p99 [\d.]+ ms, 0 failed, ", said)
    _check_report(report)
    (reached,) = re.findall(r"reaches ndcg@10 (0\.\d{4}) on events after", report)
    assert re.search(rf"│ pipeline +│ +{reached} │", accuracy), "the report says what the table says"
    for who in ("The heavy user", "The brand-new user, one event later"):
        assert who in report
    champion = Ledger.open(Place.at(site.home)).champion()
    assert champion.champion is not None
    assert champion.champion[:12] in report
    assert site.left_running() == []


def test_again_in_the_same_home_with_other_questions(site: Site) -> None:
    before = Ledger.open(Place.at(site.home)).read()
    said, report = site.demo("--set", "evaluate.ks=[5]", "--set", "evaluate.sources=false")
    assert "reaches ndcg@5 0." in report
    assert "ndcg@5" in report
    assert "ndcg@10" not in report
    _check_report(report)
    after = Ledger.open(Place.at(site.home)).read()
    assert after.generation >= before.generation
    assert "the very next answer is another" in said
    assert site.left_running() == []
    # What the demo left can be asked without a server.
    asked = site.maple("recommend", "u00003", "-k", "3")
    assert asked.returncode == 0, asked.stderr
    assert len(re.findall(r"│ sku-\d{5}", asked.stdout)) == 3


def test_a_step_that_fails_on_the_cluster_says_why_and_leaves_nothing(site: Site, ray_local: str, tmp_path: Path) -> None:
    """A file whose damage only shows while a task of the cluster reads it; the cluster is one that runs already."""
    folder = shutil.copytree(site.raw, tmp_path / "shop")
    good = (folder / "events.parquet").read_bytes()
    half = len(good) // 2
    (folder / "events.parquet").write_bytes(b"\xff" * half + good[half:])
    fresh = Site(site.raw, tmp_path / "home", site.temporary)
    done = fresh.maple("ingest", "--data", str(folder), address=ray_local)
    assert done.returncode == 1
    assert "starting a local Ray" not in done.stdout
    assert re.fullmatch(r"DataError: events\.parquet cannot be read: .*\n", done.stderr)
    assert "Traceback" not in done.stdout
    assert [path for path in fresh.home.rglob("*") if path.is_file()] == []


def _check_report(report: str) -> None:
    """One page, with plots in it, that needs nothing from elsewhere."""
    assert report.startswith("<!DOCTYPE html>") or report.startswith("<!doctype html>")
    for target in re.findall(r"""(?:src|href|action|srcset|data)=["']?([^"'\s>]+)""", report):
        assert target.startswith(("#", "data:")), target
    assert not re.search(r"url\(['\"]?(?!#|data:)", report)
    assert "@import" not in report
    assert "<script" not in report
    assert report.count("<svg") + report.count("data:image/") >= 4
