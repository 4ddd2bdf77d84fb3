"""The command line: every command has help, a mistake gets one message with what, where and what to do, and leaves nothing behind."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from maple import cli, doctor, operate, steps
from maple.artifacts import Place
from maple.cluster_ray import _short_temp, ray_flags
from maple.data.ingest import ingest_local
from maple.data.presets import load_source
from maple.data.simulate import simulate, write
from maple.data.snapshot import Snapshot
from maple.data.sources import SourceConfig
from maple.data.splits import Boundaries
from maple.errors import ServeError
from maple.features.build import build_local
from maple.features.spec import FeatureSpec
from maple.features.store import events_of
from maple.recommend.settings import PipelineSettings
from maple.train.fit import fit_pipeline
from maple.train.release import Ledger


@dataclass(frozen=True)
class Said:
    """What a command said, and its exit code."""

    code: int
    out: str
    err: str

    def refusal(self, kind: str = "") -> str:
        """The one message of a refused command, without its kind."""
        assert self.code in (1, 2)
        assert "Traceback" not in self.out + self.err
        messages = re.findall(r"^(?:\w+Error|Error): ", self.err, re.MULTILINE)
        assert len(messages) == 1, self.err
        assert not re.search(r"^\w+Error: ", self.out, re.MULTILINE)
        text = self.err[self.err.index(messages[0]) :]
        assert text.startswith(kind)
        assert len(text) > len(messages[0]) + 20, "a message that helps has some length"
        return " ".join(text.removeprefix(messages[0]).split())


Maple = Callable[..., Said]


@pytest.fixture
def maple(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], home: Path) -> Maple:
    """Runs the command in this process. It must not end the Ray that other tests share, and needs none."""
    monkeypatch.setenv("MAPLE_DEBUG", "")
    monkeypatch.delenv("MAPLE_LEDGER", raising=False)
    monkeypatch.setattr(cli, "_end_cluster", lambda: None)
    monkeypatch.setattr(steps, "connect", lambda say: None)

    def ingest(source: SourceConfig, root: Place, home: Place, *, rows_per_bucket: int, progress: Callable[[str], None]) -> Snapshot:
        return ingest_local(source, root, home, rows_per_bucket=rows_per_bucket)

    # What the cluster maps is what this runs; tests/integration maps it.
    monkeypatch.setitem(sys.modules, "maple.data.ingest_ray", types.SimpleNamespace(ingest=ingest))  # type: ignore[arg-type]

    def run(*arguments: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["maple", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Said(code, *capsys.readouterr())

    return run


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) if folder.exists() else []


# -- help --------------------------------------------------------------------------------------------------------------


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        yield (*path, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


COMMANDS = [(), *commands(cli.cli)]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: " ".join(path) or "maple")
def test_every_command_explains_itself(path: tuple[str, ...]) -> None:
    for flag in ("--help", "-h"):
        said = CliRunner().invoke(cli.cli, [*path, flag])
        assert said.exit_code == 0
        assert said.output.startswith("Usage: ")
    words = said.output.split("Options:")[0].split("\n", 1)[1]
    assert len(words.split()) >= 5, "the help says what the command does"


def test_there_is_a_command_for_every_step() -> None:
    assert {"ingest", "tune", "train", "evaluate", "publish", "serve", "demo", "doctor", "recommend", "promote", "rollback"} <= set(
        cli.cli.commands
    )
    assert set(steps.STEPS) - {path[0] for path in COMMANDS if path} == set()


def test_version_and_feature_list(maple: Maple) -> None:
    assert maple("--version").out.startswith("maple, version ")
    listed = maple("features", "list")
    assert listed.code == 0
    for view in FeatureSpec().all_views:
        assert view.name in listed.out
    rows = json.loads(maple("features", "list", "--format", "json").out)
    assert {"name", "meaning", "dtype", "shape", "unit", "half_life_days", "key", "clock", "view"} == set(rows[0])


# -- wrong usage and wrong settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "kind", "parts"),
    [
        (("trian",), "Error", ("No such command 'trian'", "Did you mean 'train'?")),
        (("recommend",), "Error", ("Missing argument 'USER'",)),
        (("recommend", "u1", "-k", "0"), "Error", ("'-k'", "1<=x<=1000")),
        (("admin", "--port", "99999999"), "Error", ("'--port'", "0<=x<=65535")),
        (("serve", "--placement", "both"), "Error", ("'--placement'", "'fused', 'split'")),
        (("train", "--config", "."), "Error", ("'--config'", "is a directory")),
        (("train", "--config", "nowhere.yaml"), "ConfigError", ("cannot read the settings file nowhere.yaml", "Check the path")),
        (
            ("train", "--set", "tune.randm_trials=1"),
            "ConfigError",
            ("unknown setting 'tune.randm_trials'", "Did you mean 'random_trials'?"),
        ),
        (("train", "--set", "seed"), "ConfigError", ("--set 'seed'", "write key=value")),
        (("train", "--set", "seed=[1"), "ConfigError", ("--set 'seed=[1'", "not YAML")),
        (("ingest", "--data", "onlin-retail"), "ConfigError", ("unknown source preset 'onlin-retail'", "Did you mean 'online-retail'?")),
        (("ingest", "--data", "no/such/folder"), "ConfigError", ("no/such/folder does not exist", "check the path")),
        (("demo", "--data", "onlin-retail"), "ConfigError", ("unknown source preset 'onlin-retail'", "Did you mean 'online-retail'?")),
    ],
)
def test_a_mistake_gets_one_message(
    maple: Maple, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], kind: str, parts: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    said = maple(*arguments)
    text = said.refusal(kind)
    for part in parts:
        assert part in text
    assert said.code == (2 if kind == "Error" else 1)
    assert files_of(tmp_path) == [], "nothing is left behind"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("features", "build"), ("no snapshot yet", "`maple ingest`")),
        (("tune",), ("no snapshot yet", "`maple ingest`")),
        (("train",), ("no snapshot yet", "`maple ingest`")),
        (("evaluate",), ("no run yet", "`maple train`")),
        (("publish",), ("no snapshot yet", "`maple ingest`")),
        (("serve",), ("has no champion", "`maple publish`", "`maple promote <digest>`")),
        (("recommend", "u1"), ("has no champion", "`maple publish`")),
        (("promote", "deadbeef"), ("no bundle begins with 'deadbeef'", "`maple publish`")),
        (("promote", "dead"), ("no bundle begins with 'dead'", "at least 6 characters")),
        (("rollback",), ("no earlier release", "`maple promote`")),
    ],
)
def test_a_step_before_its_time_says_which_comes_first(
    maple: Maple, home: Path, arguments: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    text = maple(*arguments).refusal()
    for part in parts:
        assert part in text
    assert files_of(home) == []


def test_releases_of_an_empty_home(maple: Maple, home: Path) -> None:
    said = maple("releases")
    assert (said.code, said.err) == (0, "")
    assert not home.exists()


@pytest.mark.parametrize("arguments", [("ingest",), ("ingest", "--data", "{shop}"), ("promote", "deadbeef"), ("recommend", "u1")])
def test_a_home_that_cannot_be_written(maple: Maple, tmp_path: Path, raw_shop: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / "file").write_text("in the way")
    text = maple("--home", str(tmp_path / "file"), *(part.format(shop=raw_shop) for part in arguments)).refusal()
    assert str(tmp_path / "file") in text
    assert files_of(tmp_path) == ["file"]


def test_debug_shows_where_it_came_from(maple: Maple) -> None:
    said = maple("--debug", "evaluate")
    assert said.code == 1
    assert "Traceback" in said.err


def test_a_bug_keeps_its_traceback(maple: Maple, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: object, say: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setitem(steps.STEPS, "train", (broken, "Train"))  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        maple("train")


def test_an_interrupt_is_no_error(maple: Maple, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(config: object, say: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(steps.STEPS, "train", (interrupted, "Train"))  # type: ignore[arg-type]
    said = maple("train")
    assert said.code == 130
    assert said.err.split() == ["stopped"]


@pytest.mark.parametrize(
    ("arguments", "kind", "part"),
    [
        (("ingest", "--data", "onlin-retail"), "ConfigError", "Did you mean 'online-retail'?"),
        (("trian",), "Error", "Did you mean 'train'?"),
    ],
)
def test_the_installed_command_says_the_same(tmp_path: Path, arguments: tuple[str, ...], kind: str, part: str) -> None:
    program = [sys.executable, "-c", "from maple.cli import main; main()", "--home", str(tmp_path / "home"), *arguments]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert part in Said(done.returncode, done.stdout, done.stderr).refusal(kind)
    assert files_of(tmp_path) == []


# -- bad data ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def raw_shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(simulate(3, num_users=60, num_items=50, days=40, dirty_share=0), tmp_path_factory.mktemp("raw") / "shop")


SOURCE = """
name: mine
events:
  path: orders.csv
  columns: {user_id: customer, item_id: sku, timestamp: at, value: quantity}
  constants: {event: purchase}
  clock: {unit: s}
"""
ORDERS = "customer,sku,at,quantity\n" + "".join(f"c{n % 5},s{n % 7},{1_700_000_000 + n * 60},{1 + n % 3}\n" for n in range(40))


def folder_with(folder: Path, orders: str | bytes | None, source: str | None = SOURCE) -> str:
    folder.mkdir()
    if source is not None:
        (folder / "source.yaml").write_text(source)
    if orders is not None:
        (folder / "orders.csv").write_bytes(orders if isinstance(orders, bytes) else orders.encode())
    return str(folder)


def test_good_data_is_ingested(maple: Maple, home: Path, tmp_path: Path) -> None:
    said = maple("ingest", "--data", folder_with(tmp_path / "shop", ORDERS))
    assert said.code == 0, said.err
    assert "40 rows in = 40 clean + 0 quarantined; 5 users, 7 items" in said.out
    assert Snapshot.open(Place.at(home)).num_events == 40


@pytest.mark.parametrize(
    ("orders", "source", "parts"),
    [
        (ORDERS, SOURCE.replace("item_id: sku", "item_id: skuu"), ("orders.csv", "unknown column 'skuu'", "Did you mean 'sku'?")),
        (ORDERS, SOURCE.replace("columns:", "colums:"), ("source.yaml", "unknown setting 'events.colums'", "Did you mean 'columns'?")),
        (ORDERS, SOURCE.replace("item_id: sku, ", ""), ("source.yaml", "map a column to 'item_id'")),
        (ORDERS, SOURCE.replace("purchase", "purchse"), ("known_event", "row 1 of orders.csv", "event=purchse")),
        (ORDERS, SOURCE.replace("unit: s", "unit: fortnight"), ("source.yaml", "events.clock.unit")),
        (ORDERS, SOURCE + "targets: [buy]\n", ("source.yaml", "unknown event type 'buy'")),
        (ORDERS, SOURCE.replace("orders.csv", "../orders.csv"), ("source.yaml", "inside the data folder")),
        (ORDERS, "name: [", ("source.yaml", "not valid YAML")),
        (ORDERS.replace("17", "once upon a time 17"), SOURCE, ("row 1 of orders.csv", "timestamp=once upon a time")),
        ("", SOURCE, ("orders.csv", "empty")),
        (ORDERS.split("\n")[0] + "\n", SOURCE, ("no events", "the files hold no rows")),
        (None, SOURCE, ("orders.csv",)),
        (ORDERS.replace("c1", "\xff").encode("latin-1"), SOURCE, ("orders.csv", "utf-8", "`encoding:`")),
        (ORDERS, None, ("no source.yaml", "orders.csv: customer, sku, at, quantity", "Write source.yaml there")),
    ],
    ids=["unknown column", "unknown key", "unmapped", "unknown event", "unknown unit", "unknown target", "outside", "not YAML",
         "wrong type", "empty file", "header only", "no file", "wrong encoding", "no source.yaml"],
)  # fmt: skip
def test_data_that_cannot_be_used_is_refused(
    maple: Maple, home: Path, tmp_path: Path, orders: str | bytes | None, source: str | None, parts: tuple[str, ...]
) -> None:
    text = maple("ingest", "--data", folder_with(tmp_path / "shop", orders, source)).refusal()
    for part in parts:
        assert part.lower() in text.lower()
    assert files_of(home) == [], "nothing is half-written"


def test_data_that_nothing_is_left_of(maple: Maple, home: Path, tmp_path: Path) -> None:
    rule = SOURCE + "  rules: [{name: too_small, kind: range, column: value, min: 100}]\nmax_quarantined_share: 1.0\n"
    text = maple("ingest", "--data", folder_with(tmp_path / "shop", ORDERS, rule)).refusal()
    assert "too_small" in text
    assert files_of(home) == []


def test_too_much_set_aside_names_the_reason_and_the_limit(maple: Maple, home: Path, tmp_path: Path) -> None:
    rule = SOURCE + "  rules: [{name: too_small, kind: range, column: value, min: 3}]\n"
    text = maple("ingest", "--data", folder_with(tmp_path / "shop", ORDERS, rule)).refusal("DataError")
    assert "too_small" in text
    assert "max_quarantined_share" in text
    assert files_of(home) == []


@pytest.mark.parametrize("damage", ["cut", "overwritten", "text"])
def test_a_damaged_parquet_file(maple: Maple, home: Path, tmp_path: Path, raw_shop: Path, damage: str) -> None:
    folder = shutil.copytree(raw_shop, tmp_path / "shop")
    path = folder / "events.parquet"
    good = path.read_bytes()
    half = len(good) // 2
    path.write_bytes({"cut": good[:half], "overwritten": b"\xff" * half + good[half:], "text": b"customer,sku\n1,2\n"}[damage])
    text = maple("ingest", "--data", str(folder)).refusal("DataError")
    assert "events.parquet" in text
    assert files_of(home) == []


def test_times_that_no_clock_shows_are_set_aside(maple: Maple, home: Path, tmp_path: Path) -> None:
    """Typed times are as wild as typed numbers: before 1970, after the year 9999, or the bits of something else."""
    (tmp_path / "shop").mkdir()
    times = [0, 1_700_000_000_000_000, -1, -(1 << 62), 300_000_000_000_000_000]
    rows = pa.table(
        {
            "customer": [f"c{n}" for n in range(5)],
            "sku": ["s"] * 5,
            "at": pa.array(times, pa.int64()).cast(pa.timestamp("us", tz="UTC")),
        }
    )
    pq.write_table(rows, tmp_path / "shop" / "orders.parquet")
    source = SOURCE.replace("csv", "parquet").replace(", value: quantity", "").replace("  clock: {unit: s}\n", "")
    (tmp_path / "shop" / "source.yaml").write_text(source + "max_quarantined_share: 0.6\n")
    said = maple("ingest", "--data", str(tmp_path / "shop"))
    assert said.code == 0, said.err
    snapshot = Snapshot.open(Place.at(home))
    assert snapshot.events()["user_id"].to_pylist() == ["c0", "c1"]
    assert snapshot.report().events.reasons == {"unreadable": 3}
    for chunk in events_of(snapshot.events()):
        assert all(event.check() for event in chunk), "the online store takes what ingestion lets through"


def test_a_failed_ingest_leaves_the_snapshot_before_it(maple: Maple, home: Path, tmp_path: Path) -> None:
    good = folder_with(tmp_path / "good", ORDERS)
    assert maple("ingest", "--data", good).code == 0
    before = files_of(home)
    maple("ingest", "--data", folder_with(tmp_path / "bad", ORDERS.replace("17", "x"))).refusal()
    assert files_of(home) == before
    assert Snapshot.open(Place.at(home)).num_events == 40


# -- releases ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shop_home(tmp_path_factory: pytest.TempPathFactory, raw_shop: Path) -> Path:
    """A home with a snapshot, features, and two bundles; the first is champion."""
    folder = tmp_path_factory.mktemp("home")
    home = Place.at(folder)
    source, root = load_source(str(raw_shop))
    snapshot = ingest_local(source, root, home)
    build_local(snapshot, FeatureSpec(history_limit=500), home)
    data = snapshot.dataset()
    cut = Boundaries(data.span[0] + 1, data.span[1] + 1)
    for models in (("frequency", "popularity"), ("ease",)):
        settings = PipelineSettings.parse({"sources": [{"name": name, "model": name} for name in models]}, "test")
        digest = fit_pipeline(data, settings, cut, fingerprint=snapshot.digest, say=lambda text: None).bundle.save(home)
        if "popularity" in models:
            Ledger.open(home).promote(digest)
    return folder


@pytest.fixture
def shop(shop_home: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as MAPLE_HOME; the registry's mirror (MLflow) has tests of its own."""
    monkeypatch.setattr(operate, "mirror", lambda tracking, ledger: None)
    return shutil.copytree(shop_home, home)


def champion(home: Path) -> str:
    return str(Ledger.open(Place.at(home)).champion().champion)


def other(home: Path) -> str:
    (found,) = (path.name for path in (home / "bundles").iterdir() if path.name != champion(home))
    return found


def test_recommendations_of_a_known_and_an_unknown_user(maple: Maple, shop: Path) -> None:
    data = Snapshot.open(Place.at(shop)).dataset()
    counts = [int((data.log.user == code).sum()) for code in range(len(data.users))]
    heavy = data.users.decode(pa.array([counts.index(max(counts))]))[0]  # type: ignore[arg-type]
    known, unknown = maple("recommend", heavy, "-k", "4"), maple("recommend", "someone new", "-k", "4")
    assert (known.code, unknown.code) == (0, 0), known.err + unknown.err
    ids = set(data.items.ids.to_pylist())
    for said in (known, unknown):
        assert len(set(re.findall(r"sku-\d{5}", said.out)) & ids) == 4
    assert f"{max(counts):,} events known" in known.out
    assert "buy this often" in known.out
    assert "no events known of this user" in unknown.out
    assert "buy this often" not in unknown.out


def test_promotion_and_rollback(maple: Maple, shop: Path) -> None:
    first, second = champion(shop), other(shop)
    assert f"generation 2: champion {second[:12]}" in maple("promote", second[:8], "--note", "better").out
    assert champion(shop) == second
    refused = maple("promote", first, "--expect", "1").refusal("ServeError")
    assert "generation 2" in refused
    assert "`maple releases`" in refused
    assert f"generation 3: champion {first[:12]}" in maple("rollback", "--note", "worse").out
    listed = maple("releases").out
    assert listed.index("rollback") < listed.index("promote")
    for word in ("better", "worse", first[:12], second[:12]):
        assert word in listed
    assert "no earlier release" in maple("rollback").refusal("ServeError")
    assert champion(shop) == first


def test_a_registry_that_cannot_follow_is_said_and_does_not_undo_the_release(
    maple: Maple, shop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(tracking: object, ledger: object) -> None:
        raise ServeError("nobody answers at the tracking server")

    monkeypatch.setattr(operate, "mirror", unreachable)
    second = other(shop)
    said = maple("promote", second)
    assert said.code == 0
    assert "aliases were not updated: nobody answers" in said.out
    assert champion(shop) == second


def test_a_bundle_with_a_flipped_bit_is_neither_asked_nor_promoted(maple: Maple, shop: Path) -> None:
    damaged = champion(shop)
    assert maple("promote", other(shop)).code == 0
    path = shop / "bundles" / damaged / "models" / "popularity.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    ledger = files_of(shop / "releases")
    for arguments in (("promote", damaged), ("rollback",)):
        text = maple(*arguments).refusal("ArtifactError")
        assert "popularity.safetensors was altered or is torn" in text
        assert re.search(r"(Publish|Build) the bundle again", text)
    assert files_of(shop / "releases") == ledger
    assert champion(shop) != damaged


def test_a_champion_with_a_flipped_bit_is_not_asked(maple: Maple, shop: Path) -> None:
    path = shop / "bundles" / champion(shop) / "models" / "popularity.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    text = maple("recommend", "u00001").refusal("ArtifactError")
    assert str(path) in text
    assert "Publish the bundle again" in text


def test_a_champion_that_is_gone(maple: Maple, shop: Path) -> None:
    shutil.rmtree(shop / "bundles" / champion(shop))
    text = maple("recommend", "u00001").refusal("ArtifactError")
    assert champion(shop) in text
    assert "is not a finished bundle" in text


def test_features_of_another_snapshot_are_not_trained_on(maple: Maple, shop: Path, tmp_path: Path) -> None:
    assert maple("ingest", "--data", folder_with(tmp_path / "new", ORDERS)).code == 0
    assert "`maple features build`" in maple("train").refusal("ArtifactError")


def test_a_snapshot_with_a_flipped_bit(maple: Maple, shop: Path) -> None:
    (path,) = (shop / "snapshots").glob("*/events/*/*.parquet")
    table = pq.read_table(path)
    pq.write_table(table.slice(1), path)
    for arguments in (("recommend", "u00001"), ("train",)):
        text = maple(*arguments).refusal("ArtifactError")
        assert "bucket=00000/part.parquet was altered or is torn" in text
        assert "Build the snapshot again" in text


# -- the local cluster -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["/tmp", "/scratch/someone", "/var/folders/zz/zyxvpxvq6csfxvn_n0000000000000/T"])
def test_sockets_of_a_local_cluster_fit_under_any_temporary_folder(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: folder)
    cluster = f"{_short_temp()}/maple-12345678"
    assert len(f"{cluster}/h/{'0' * 56}/a") <= 97, "HAProxy's limit"
    assert len(f"{cluster}/ray/session_2026-01-01_00-00-00_000000_{2**22}/sockets/plasma_store") <= 107, "Ray's limit"
    assert cluster.startswith(folder if len(folder) < 20 else "/tmp/")


# -- the doctor --------------------------------------------------------------------------------------------------------


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with room, and an environment without opinions on Ray."""
    for name in ray_flags():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=8 << 30))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(total=16 << 30))


@pytest.mark.usefixtures("healthy")
def test_the_doctor_finds_nothing_wrong_here(maple: Maple, shop: Path) -> None:
    said = maple("doctor")
    assert said.code == 0, said.out
    assert champion(shop)[:12] in said.out
    _, rows, fine = doctor.examine()
    found = {row[0]: row[1:] for row in rows}
    assert fine
    assert set(ray_flags()) <= set(found)
    assert found["ray"][1] == "ok"
    assert "doctor.probe" not in files_of(shop)


@pytest.mark.usefixtures("healthy")
@pytest.mark.parametrize("ailment", ["flag", "memory", "shared memory", "home", "package"])
def test_the_doctor_names_what_is_wrong(maple: Maple, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ailment: str) -> None:
    name, value = next(iter(ray_flags().items()))
    if ailment == "flag":
        monkeypatch.setenv(name, "other")
    elif ailment == "memory":
        monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(total=2 << 30))
    elif ailment == "shared memory":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1 << 20))
    elif ailment == "home":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("MAPLE_HOME", str(tmp_path / "file"))
    else:
        monkeypatch.setitem(doctor.FLOORS, "numpy", (99, 0))
    _, rows, fine = doctor.examine()
    assert not fine
    (wrong,) = (row for row in rows if not row[2].startswith("ok"))
    expected = {
        "flag": f"ray.env says {value}", "memory": "the demo wants 4 GiB", "shared memory": "Ray's object store wants 0.5 GiB",
        "home": "cannot be written", "package": "needs 99.0 or newer",
    }  # fmt: skip
    assert expected[ailment] in wrong[2]
    said = maple("doctor")
    assert said.code == 1
    assert "Traceback" not in said.out + said.err
