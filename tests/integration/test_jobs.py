"""Every step as a Ray job, Maple installed from its wheel, MAPLE_HOME a URI: from raw files to a service that answers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from maple.artifacts import Place
from maple.cluster_ray import dashboard
from maple.data.simulate import simulate, write
from maple.train.release import Ledger

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
#: Small enough for a test; everything else is as in jobs/configs.
PIPELINE = """{sources: [
  {name: frequency, model: frequency}, {name: als, model: als, config: {factors: 16, iterations: 5}}, {name: popular, model: popularity}],
  ranker: {model: dcn, config: {training: {epochs: 2}}}}"""
SMALL: dict[str, tuple[str, ...]] = {
    "ingest": (),
    "features": (),
    "tune": ("tune.models=[als]", "tune.random_trials=2", "tune.tpe_trials=1"),
    "train": (f"pipeline={PIPELINE}",),
    "evaluate": ("evaluate.bootstrap=100", "evaluate.ks=[10]"),
    "publish": (),
    "serve": ("serve.placement=fused", "serve.port=0", "serve.clock=data"),
}


@dataclass(frozen=True)
class Ended:
    """How a job ended: its state, its log, and its last line."""

    submission: str
    status: str
    log: str

    @property
    def last(self) -> dict[str, Any]:
        return dict(json.loads(self.log.strip().splitlines()[-1]))


class Office:
    """Submits jobs from a folder with the scripts and the deployment shapes, and none of Maple's sources."""

    def __init__(self, folder: Path, site: Path, home: str) -> None:
        from ray.job_submission import JobSubmissionClient

        address = dashboard()
        assert address is not None
        self.address, self.folder = address, folder
        self.client = JobSubmissionClient(address)
        self.environment = {"MAPLE_HOME": home, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

    def submit(self, entrypoint: str, name: str) -> Ended:
        submission = self.client.submit_job(
            entrypoint=entrypoint,
            submission_id=f"maple-{name}-{uuid.uuid4().hex[:6]}",
            runtime_env={"working_dir": str(self.folder), "env_vars": self.environment},
        )
        limit = time.monotonic() + 200
        while not (status := self.client.get_job_status(submission)).is_terminal():
            assert time.monotonic() < limit, self.client.get_job_logs(submission)[-3000:]
            time.sleep(0.3)
        return Ended(submission, str(status.value), self.client.get_job_logs(submission))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Maple installed from a wheel that was built from a clean copy of its sources."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "maple", source / "maple", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source / name)
    run = [sys.executable, "-m"]
    subprocess.run([*run, "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)], check=True, capture_output=True)
    (wheel,) = folder.glob("maple_rec-*.whl")
    subprocess.run([*run, "pip", "install", "--quiet", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)
    return folder / "site"


@pytest.fixture(scope="module")
def office(ray_local: str, site: Path, tmp_path_factory: pytest.TempPathFactory) -> Office:
    folder = tmp_path_factory.mktemp("submit")
    for name in ("jobs", "serve_configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return Office(folder, site, (tmp_path_factory.mktemp("jobs") / "home").as_uri())


def test_the_jobs_use_the_wheel(office: Office, site: Path) -> None:
    ended = office.submit("python -c 'import maple; print(maple.__file__)'", "where")
    assert ended.status == "SUCCEEDED", ended.log
    assert str(site) in ended.log


def test_every_step_as_a_job_from_raw_files_to_a_service_that_answers(office: Office, tmp_path: Path) -> None:
    source = write(simulate(seed=1, num_users=300, num_items=150, days=40), tmp_path / "raw")
    submitted = []
    results: dict[str, dict[str, Any]] = {}
    try:
        for step, settings in SMALL.items():
            given = (f"data={source}", *settings) if step == "ingest" else settings
            options = " ".join(f"--set '{' '.join(setting.split())}'" for setting in given)
            ended = office.submit(f"python jobs/{step}.py --config jobs/configs/{step}.yaml {options}", step)
            assert ended.status == "SUCCEEDED", f"{step}: {ended.log[-3000:]}"
            assert ended.last["step"] == step
            assert ended.last["summary"]
            assert "Traceback" not in ended.log
            results[step] = ended.last["facts"]
            submitted.append(ended.submission)

        home = Place.at(office.environment["MAPLE_HOME"])
        champion = Ledger.open(home).champion().champion
        assert champion == results["publish"]["bundle"] == results["serve"]["bundle"]
        assert results["train"]["snapshot_digest"] == results["ingest"]["digest"]
        assert results["tune"]["als"]["value"] >= results["tune"]["als"]["default"]
        assert 0 < results["evaluate"]["pipeline"]["ndcg@10"] < 1
        # They show in the dashboard, by name.
        shown = {job.submission_id: job.entrypoint for job in office.client.list_jobs()}
        assert set(submitted) <= set(shown)
        assert all(f"jobs/{step}.py" in shown[submission] for step, submission in zip(SMALL, submitted, strict=True))
        # The service outlives its job.
        asked = urllib.request.Request(
            f"{results['serve']['url']}/v1/recommendations",
            data=json.dumps({"user_id": "somebody new", "k": 5}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(asked, timeout=20) as answer:
            said = json.load(answer)
        assert said["bundle"] == champion
        assert len(said["items"]) == 5
    finally:
        from maple.serve import deploy

        deploy.shutdown()


def test_a_refused_job_says_why_without_a_traceback(office: Office) -> None:
    ended = office.submit("python jobs/train.py --config jobs/configs/train.yaml --set tune.randm_trials=3", "wrong")
    assert ended.status == "FAILED"
    assert ended.last["error"] == "ConfigError"
    assert re.search(r"tune\.randm_trials.*Did you mean", ended.last["message"])
    assert "Traceback" not in ended.log


def test_the_command_line_submits_and_hands_on_the_exit_code(office: Office) -> None:
    ray = Path(sys.executable).parent / "ray"
    environment = {**os.environ, "RAY_ADDRESS": office.address}
    wanted = json.dumps({"env_vars": {**office.environment, "MAPLE_HOME": f"{office.environment['MAPLE_HOME']}-empty"}})
    command = [str(ray), "job", "submit", "--working-dir", str(office.folder), "--runtime-env-json", wanted, "--"]
    done = subprocess.run(
        [*command, "python", "jobs/features.py", "--config", "jobs/configs/features.yaml"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "maple ingest" in done.stdout
    assert "Traceback" not in done.stdout
