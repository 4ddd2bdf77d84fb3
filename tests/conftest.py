"""Shared fixtures: the data sets, and one local Ray for all integration tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from needs import require


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets (``MAPLE_DATA``, default ``../shared/data``)."""
    folder = Path(os.environ.get("MAPLE_DATA", "../shared/data")).absolute()
    require("data", folder.is_dir(), f"there is no data folder {folder}; set MAPLE_DATA")
    return folder


@pytest.fixture(scope="session")
def ray_local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One local Ray with a dashboard for the whole test session; yields its GCS address."""
    from maple.cluster_ray import start_local, stop_local

    context = start_local(num_cpus=4, object_store_bytes=300 << 20, dashboard=True, test=True)
    yield context.address
    stop_local()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty MAPLE_HOME."""
    monkeypatch.setenv("MAPLE_HOME", str(tmp_path / "maple"))
    return tmp_path / "maple"
