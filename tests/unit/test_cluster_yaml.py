"""cluster.yaml against Ray's own schema, and its environment against the one file of flags."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from maple.cluster_ray import ENV_FILE, ray_flags

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    found = importlib.util.find_spec("ray")
    assert found is not None
    assert found.origin is not None
    return json.loads((Path(found.origin).parent / "autoscaler" / "ray-schema.json").read_text())


def starts(cluster: dict[str, Any]) -> list[str]:
    return [command for role in ("head", "worker") for command in cluster[f"{role}_start_ray_commands"] if "ray start" in command]


def test_it_obeys_rays_schema(cluster: dict[str, Any], schema: dict[str, Any]) -> None:
    jsonschema.validate(cluster, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**cluster, "max_wokers": 4}, schema)


def test_rays_launcher_accepts_it(cluster: dict[str, Any]) -> None:
    """The launcher's own filling of defaults and checks, in a process of its own (it imports Ray)."""
    code = (
        "import sys, yaml; from ray.autoscaler._private.util import prepare_config, validate_config;"
        "validate_config(prepare_config(yaml.safe_load(open(sys.argv[1]))))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(ROOT / "cluster.yaml")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1000:]


def test_its_node_types_fit_together(cluster: dict[str, Any]) -> None:
    kinds = cluster["available_node_types"]
    assert cluster["head_node_type"] in kinds
    assert sum(kind.get("min_workers", 0) for kind in kinds.values()) <= cluster["max_workers"]


def test_every_ray_process_gets_the_flags_of_ray_env_and_no_others(cluster: dict[str, Any], tmp_path: Path) -> None:
    """Run the start commands with a `ray` that prints its environment, in a home laid out by `file_mounts`."""
    mounts = cluster["file_mounts"]
    target = next(remote for remote, local in mounts.items() if (ROOT / local).resolve() == ENV_FILE.resolve())
    (tmp_path / Path(target).relative_to("/home/ray")).parent.mkdir(parents=True)
    (tmp_path / Path(target).relative_to("/home/ray")).write_bytes(ENV_FILE.read_bytes())
    fake = tmp_path / "bin" / "ray"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\nenv\n")
    fake.chmod(0o755)
    assert len(starts(cluster)) == 2
    for command in starts(cluster):
        clean = {"HOME": str(tmp_path), "PATH": f"{fake.parent}:{os.defpath}", "RAY_HEAD_IP": "10.0.0.1"}
        out = subprocess.run(["bash", "-c", command.replace("ulimit -n 65536;", "")], env=clean, capture_output=True, text=True, check=True)
        seen = dict(line.split("=", 1) for line in out.stdout.splitlines() if "=" in line)
        ours = r"RAY_|GRPC_|MLFLOW_(?!TRACKING)|OPENBLAS_"
        flags = {name: value for name, value in seen.items() if re.match(ours, name) and name != "RAY_HEAD_IP"}
        assert flags == ray_flags()
        assert seen["MAPLE_HOME"].startswith("s3://")


def test_it_installs_the_versions_that_are_tested(cluster: dict[str, Any]) -> None:
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line and not line.startswith("#")
    )
    assert cluster["docker"]["image"] == f"rayproject/ray:{pins['ray']}-py311-cpu"
    name = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"].replace("-", "_")
    assert any(f"dist/{name}-*.whl" in command for command in cluster["setup_commands"])


def test_nothing_listens_for_the_outside(cluster: dict[str, Any]) -> None:
    head = next(command for command in starts(cluster) if "--head" in command)
    assert "--dashboard-host=127.0.0.1" in head
    assert ray_flags()["RAY_AUTH_MODE"] == "token"
    assert "/home/ray/.ray/auth_token" in cluster["file_mounts"]
