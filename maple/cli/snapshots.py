"""``maple snapshots``: the versions of the data: list, show, compare, compact, remove, go back."""

from __future__ import annotations

from pathlib import Path

import click

from maple.cli.console import console, step
from maple.cli.console import table as show_table
from maple.config import maple_home
from maple.errors import ConfigError


@click.group()
def snapshots() -> None:
    """Versions of the data: list, show, diff, compact, purge, use, restitch."""


@snapshots.command("list")
def list_() -> None:
    """All snapshots, oldest first; the latest is marked."""
    from maple.artifacts import Place
    from maple.data.versions import versions

    rows = [
        [f"{'* ' if one.latest else ''}{one.name}", one.created, one.source, f"{one.events:,}", f"{one.bytes:,}", str(one.layers),
         f"cannot be read: {one.unreadable}" if one.unreadable else one.parent or ""]
        for one in versions(Place.at(maple_home()))
    ]  # fmt: skip
    show_table("Snapshots", ["name", "created (UTC)", "source", "events", "own bytes", "layers", "lies over"], rows, "* the latest")


@snapshots.command()
@click.argument("name", required=False)
def show(name: str | None) -> None:
    """What one snapshot (default: the latest) is made of, and the report of what it brought."""
    from maple.artifacts import Place
    from maple.data.snapshot import Snapshot

    snapshot = Snapshot.open(Place.at(maple_home()), name)
    facts = {
        "digest": snapshot.digest, "lies over": snapshot.parent or "nothing: a base", "layers": str(len(snapshot.stack.layers)),
        "events": f"{snapshot.num_events:,}", "buckets": str(snapshot.num_buckets), "bytes": f"{sum(snapshot.stack.num_bytes):,}",
        "deleted users": "rows of some are still in its files: maple snapshots purge" if snapshot.holds_deleted() else "none in its files",
    }  # fmt: skip
    show_table(f"Snapshot {snapshot.name}", ["", ""], [[key, value] for key, value in facts.items()])
    for line in snapshot.report().lines():
        console.print(line, markup=False, soft_wrap=True)


@snapshots.command()
@click.argument("before")
@click.argument("now", required=False)
def diff(before: str, now: str | None) -> None:
    """What differs from one snapshot to another (default: the latest): rows, users, items, kinds, days, columns."""
    from maple.artifacts import Place
    from maple.data.snapshot import Snapshot
    from maple.data.versions import diff as compare

    home = Place.at(maple_home())
    found = compare(Snapshot.open(home, before), Snapshot.open(home, now))
    rows = [
        ["events", found.added, found.removed, found.changed],
        ["users with events", found.users_added, found.users_removed, ""],
        ["items", found.items_added, found.items_removed, found.items_changed],
        *([f"  {name}", added, removed, ""] for name, (added, removed) in found.kinds.items()),
        *([f"  {name}", added, removed, ""] for name, (added, removed) in found.days.items()),
    ]
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    show_table(f"From {before} to {now or 'the latest'}", ["", "added", "removed", "changed"], cells, "\n".join(found.columns))


@snapshots.command()
@click.argument("name", required=False)
def compact(name: str | None) -> None:
    """Make one base of the layers of a snapshot (default: the latest), without the rows of deleted users."""
    from maple.artifacts import Place
    from maple.data.compact import compact as work

    with step("Compact") as line:
        made = work(Place.at(maple_home()), name, line.say)
        line.done(f"{made.name}: {made.num_events:,} events in {made.num_buckets} bucket(s)")


@snapshots.command()
@click.option(
    "--grace", type=click.FloatRange(min=0), default=60.0, show_default=True, help="Minutes that a young snapshot is kept anyway."
)
def purge(grace: float) -> None:
    """Remove snapshots and features that nothing needs, and every version that still holds deleted users."""
    from maple.artifacts import Place
    from maple.data.purge import purge as work

    with step("Purge") as line:
        removed = work(Place.at(maple_home()), grace_s=60 * grace, say=line.say)
        line.done(f"removed {len(removed)} folder(s)")


@snapshots.command()
@click.argument("name")
def use(name: str) -> None:
    """Make an older snapshot the latest again: what follows reads it."""
    from maple.artifacts import Place
    from maple.data.drafts import lead, pointing
    from maple.data.snapshot import Snapshot

    home = Place.at(maple_home())
    Snapshot.open(home, name)  # a mistyped name makes no folder
    with pointing(home):
        snapshot = Snapshot.open(home, name)
        lead(home, snapshot.name)
    console.print(f"{snapshot.name} is the latest snapshot; build its features next", markup=False, soft_wrap=True)


@snapshots.command()
@click.argument("edges", type=click.Path(exists=True, dir_okay=False))
def restitch(edges: str) -> None:
    """Stitch ids by other edges: a CSV or Parquet file with the columns device_id and user_id. The old file takes it back."""
    import pyarrow.csv as pacsv
    from pyarrow import ArrowException, string

    from maple.artifacts import Place
    from maple.data.files import open_parquet
    from maple.data.ingest import restitch as work

    try:
        types = pacsv.ConvertOptions(column_types={"device_id": string(), "user_id": string()})
        parquet = Path(edges).suffix == ".parquet"
        table = open_parquet(Place.at(edges), edges).read() if parquet else pacsv.read_csv(edges, convert_options=types)
        table = table.select(["device_id", "user_id"]).drop_null()
    except (ArrowException, KeyError) as error:
        raise ConfigError(f"{edges}: {' '.join(str(error).split())}; the file needs the columns device_id and user_id") from None
    with step("Restitch") as line:
        made = work(Place.at(maple_home()), table, line.say)
        line.done(f"{made.name}: {made.num_events:,} events")
