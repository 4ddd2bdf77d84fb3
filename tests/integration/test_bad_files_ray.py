"""Files that carry code or are damaged, through the ingestion over Ray: refused by name, and nothing runs in any worker."""

from __future__ import annotations

from pathlib import Path

import pytest

from maple.artifacts import Place
from maple.data.snapshot import Snapshot
from maple.data.sources import SourceConfig

pytestmark = pytest.mark.ray
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_extension_types_and_damage_are_refused(ray_local: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bad_files

    from maple.data.ingest_ray import ingest

    def over_ray(source: SourceConfig, root: Place, home: Place) -> Snapshot:
        return ingest(source, root, home, now=bad_files.NOW)

    marker = tmp_path / "executed"
    wanted = ("pages-of-noise.parquet", "latin-1-as-utf-8.csv")
    damaged = [case for part in (bad_files._parquet_to_refuse, bad_files._text_to_refuse) for case in part() if case.name in wanted]
    assert len(damaged) == len(wanted)
    for number, case in enumerate([*bad_files._extensions(marker), *damaged]):
        verdict = bad_files.judge(case, tmp_path / str(number), marker, over_ray)
        assert verdict.holds, (case.name, verdict.told)
    assert not marker.exists()
    whole = next(bad_files._parquet_to_account())
    assert bad_files.judge(whole, tmp_path / "whole", marker, over_ray).holds
