"""The gate around a home: a batch that drifted is refused or told of, a dry run leaves nothing, features are checked from the shell."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import shop
from click.testing import CliRunner

from maple.artifacts import Place, latest
from maple.cli import cli
from maple.data.ingest import ingest_local
from maple.data.snapshot import Snapshot
from maple.data.sources import SourceConfig
from maple.errors import DataError
from maple.features.build import build_local
from maple.features.fold import DAY
from maple.features.spec import FeatureSpec
from maple.hashing import rng

SOURCE = """
name: tiny
events:
  path: events.csv
  columns: {user_id: customer, item_id: sku, timestamp: at, event: kind, price: price}
  clock: {unit: s}
  rules:
    - {name: too_dear, kind: range, column: price, max: 1000, severity: error, max_share: 0.01}
behaviour:
  - {kind: rate, events: 20, minutes: 1, severity: warn}
  - {kind: out_of_order}
checks: {min_users: 5, min_items: 2, min_events: 10, volume: "off"}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    out = tmp_path / "tiny"
    out.mkdir()
    (out / "source.yaml").write_text(SOURCE)
    export(out)
    return out


def export(folder: Path, seed: int = 0, rows: int = 200, dear: int = 0, price: bool = True, bot: bool = False) -> None:
    draw = rng(seed, "export")
    lines = ["customer,sku,at,kind,price"]
    for row in range(rows):
        cost = 5000 + row if row < dear else round(float(np.exp(draw.normal(2, 0.5))), 2)
        lines.append(
            f"c{draw.integers(20)},s{draw.integers(8)},{1_700_000_000 + draw.integers(30 * 86_400)},purchase,{cost if price else ''}"
        )
    lines += [f"bot,s{row % 8},{1_700_000_000 + row},view,1" for row in range(30 * bot)]
    (folder / "events.csv").write_text("\n".join(lines) + "\n")


def ingest(folder: Path) -> Snapshot:
    from maple.data.presets import load_source

    source, root = load_source(str(folder))
    return ingest_local(source, root, Place.at(folder.parent / "home"))


def test_a_batch_that_lost_a_column_is_refused_and_the_latest_stays(folder: Path) -> None:
    first = ingest(folder)
    assert [finding.check for finding in first.report().findings] == ["parent"]
    html = (first.folder / "report.html").read().decode()
    assert "Data report: tiny" in html
    export(folder, seed=1)
    second = ingest(folder)
    assert second.report().findings == ()
    assert second.report().parent == first.name
    export(folder, seed=2, price=False)
    with pytest.raises(DataError, match=r"\[all_null\] column 'price' of events has no value in any of 200 rows"):
        ingest(folder)
    home = Place.at(folder.parent / "home")
    assert latest(home, "snapshot") == second.name
    assert {place.name for place in (home / "snapshots").children() if "." not in place.name} == {first.name, second.name}


def test_a_rule_with_a_severity_is_a_gate_and_says_which_rows(folder: Path) -> None:
    export(folder, dear=1)
    assert [finding.check for finding in ingest(folder).report().findings] == ["parent"]  # half a percent is allowed
    export(folder, dear=4, bot=True)
    with pytest.raises(DataError, match=r"'too_dear' fired on 4 of 230 rows.*too_dear in row 1 of events\.csv.*also row 2 .*row 3 "):
        ingest(folder)
    export(folder, bot=True)
    found = ingest(folder).report()
    assert found.events.reasons == {"rate": 30}
    assert found.events.rules["out_of_order"] > 100
    assert [(finding.check, finding.severity) for finding in found.findings] == [("rate", "warn")]


def test_a_dry_run_shows_it_and_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("MAPLE_HOME", str(home))
    page = tmp_path / "page.html"
    done = CliRunner().invoke(cli, ["validate", str(folder), "--page", str(page)])
    assert done.exit_code == 0, done.output
    assert "200 rows in = 200 clean" in done.output
    assert "Data report: tiny" in page.read_text()
    ingest(folder)
    before = sorted(path for path in home.rglob("*") if path.is_file())
    export(folder, dear=50)
    done = CliRunner().invoke(cli, ["validate", str(folder), "--page", str(page)])
    assert isinstance(done.exception, DataError)
    assert "too_dear" in str(done.exception)
    assert "nothing was published" in page.read_text()
    assert sorted(path for path in home.rglob("*") if path.is_file()) == before


def test_features_are_checked_from_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAPLE_HOME", str(tmp_path / "home"))
    draw = rng(0, "events")
    happenings = [
        shop.Happening(f"u{draw.integers(9)}", str(shop.ITEMS["item_id"][int(draw.integers(5))]), "purchase", int(time), 1.0, 2.0)
        for time in np.sort(draw.integers(0, 20 * DAY, 120))
    ]
    snapshot = shop.snapshot(tmp_path, happenings, rows_per_bucket=1000)
    build_local(snapshot, FeatureSpec(), Place.at(tmp_path / "home"))
    done = CliRunner().invoke(cli, ["features", "check", "--rows", "50"])
    assert done.exit_code == 0, done.output
    assert "0 findings" in done.output


def test_settings_of_checks_and_behaviour_survive_the_manifest(folder: Path) -> None:
    stored = ingest(folder).manifest.meta["source"]
    again = SourceConfig.parse(json.loads(json.dumps(stored)), "manifest")
    assert again.checks.min_users == 5
    assert [rule.kind for rule in again.behaviour] == ["rate", "out_of_order"]
