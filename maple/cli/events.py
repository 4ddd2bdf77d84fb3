"""``maple events``: the events that the online store holds, as a file that an ingestion can read."""

from __future__ import annotations

import time
from pathlib import Path

import click

from maple.cli.console import console
from maple.cli.users import config_option, opened


@click.group()
def events() -> None:
    """Events of the online store."""


@events.command("export")
@click.argument("file", type=click.Path(dir_okay=False))
@config_option
def export(file: str, config_path: str | None) -> None:
    """Write all events of the online store to one Parquet file in the EVENTS layout; deleted users are not in it.

    Events that were ingested before are known by their ids: appending the file adds only what is new.
    """
    from maple.serve.people import export_events

    with opened(config_path) as (home, store):
        count = export_events(store, home, Path(file))
    console.print(f"{count:,} events in {file}", markup=False, soft_wrap=True)
    console.print(
        "To learn from them: name the file as one more table under `events:` of your source.yaml\n"
        "  - path: online.parquet\n"
        "    columns: {event_id: event_id, user_id: user_id, item_id: item_id, event: event, timestamp: timestamp, value: value,\n"
        "              price: price, session_id: session_id, request_id: request_id}\n"
        "and run `maple ingest --append` with that source.",
        markup=False,
        soft_wrap=True,
    )


@events.command("expire")
@click.argument("days", type=click.FloatRange(min=0, min_open=True))
@config_option
def expire(days: float, config_path: str | None) -> None:
    """Forget the events of the online store that are older than so many DAYS: the retention of a shop. Run it daily."""
    with opened(config_path) as (_, store):
        count = store.expire(time.time_ns() // 1000 - int(days * 86_400 * 1_000_000))
    console.print(f"{count:,} events older than {days:g} days are gone from the online store", markup=False, soft_wrap=True)
