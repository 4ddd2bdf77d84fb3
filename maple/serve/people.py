"""What people may ask of the data about them: describe, forget, join and part ids, and see what is stored.

The functions work on a home and an online store, whoever runs them (the API, the command line); ``People`` are the endpoints. A person
is all ids that are joined, online or in the latest snapshot. Forgetting is in this order: tombstones that keep the ids out of everything
read from the home, then gone and refused online, where the joined ids are known until the end; what fails in between is finished by
asking again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from maple.artifacts import Place
from maple.data.dataset import Vocab
from maple.data.etl import bucket_of
from maple.data.history import reconsidered
from maple.data.snapshot import Snapshot
from maple.data.sources import SourceConfig
from maple.data.tombstones import Tombstones
from maple.errors import ArtifactError, DataError
from maple.features.catalogue import Catalogue
from maple.features.folder import Folder
from maple.features.spec import FeatureSpec
from maple.features.store import OnlineStore, Reconciled
from maple.schema import EVENTS, conform
from maple.serve.api import IdentityRequest, UserChanges, iso
from maple.serve.door import Door
from maple.serve.http import Call


@dataclass(frozen=True)
class Removed:
    """What forgetting a person removed from the online store: events, attributes, and the ids they went by."""

    events: int
    attributes: int
    ids: tuple[str, ...]


def folds_nothing() -> Folder:
    """For who opens an online store without a bundle: states are then made by whoever serves, when they are next read."""
    return Folder(FeatureSpec(views=()), Catalogue.from_table(Vocab.of([]), pa.table({"item_id": pa.array([], pa.string())})))


def ids_of(store: OnlineStore, home: Place, user_id: str) -> tuple[str, ...]:
    """All ids of the person that an id belongs to, sorted: joined online, or stitched in the latest snapshot."""
    ids = set(store.aliases(user_id))
    snapshot = _snapshot(home)
    stitching = None if snapshot is None else snapshot.stitching()
    if stitching is not None:
        ids.update(stitching.members(stitching.apply(pa.array(sorted(ids)))).to_pylist())
        ids.update(each for known in tuple(ids) for each in store.aliases(known))
    return tuple(sorted(ids))


def forget(store: OnlineStore, home: Place, user_id: str) -> Removed:
    """Forget a person: gone online, refused from now on, and out of every snapshot of the home."""
    ids = ids_of(store, home, user_id)
    attributes = len({name for each in ids for name in store.attributes(each)})
    for each in ids:
        Tombstones.add(home, each)
    return Removed(sum(store.delete(each, block=True) for each in ids), attributes, ids)


def stored(store: OnlineStore, home: Place, user_id: str) -> dict[str, Any]:
    """Everything that is kept about a person, JSON-ready: attributes, joined ids, online events, and the rows of the latest snapshot."""
    ids = ids_of(store, home, user_id)
    persons = {store.aliases(each)[0]: each for each in ids}.values()  # one id of each group that is joined online
    online = [
        {name: getattr(event, name) for name in ("event_id", "user_id", "item_id", "event", "value", "price", "session_id", "request_id")}
        | {"timestamp": iso(event.timestamp), "context": dict(event.context)}
        for each in persons for event in store.history(each)
    ]  # fmt: skip
    attributes = {name: value for each in persons for name, value in store.attributes(each).items()}
    return {
        "user_id": user_id, "ids": list(ids), "attributes": attributes, "online_events": online,
        "snapshot": _in_snapshot(home, ids),
    }  # fmt: skip


def rows_of(home: Place, ids: Sequence[str]) -> int:
    """How many rows the latest snapshot has of these ids, clean ones and those set aside. Reads all that is set aside."""
    told = _in_snapshot(home, ids)
    return 0 if told is None else sum(map(len, told.values()))


def _snapshot(home: Place) -> Snapshot | None:
    try:
        return Snapshot.open(home)
    except ArtifactError:
        return None


def _in_snapshot(home: Place, ids: Sequence[str]) -> dict[str, Any] | None:
    """The rows of these ids in the latest snapshot; None where there is no snapshot."""
    snapshot = _snapshot(home)
    if snapshot is None:
        return None
    buckets = sorted(set(bucket_of(pa.array(ids, pa.string()), snapshot.num_buckets).tolist()))
    tables = {"events": snapshot.events(buckets), "user": snapshot.users(), "quarantined": snapshot.quarantine()}
    return {name: [] if table is None else _plain(_of(table, ids)) for name, table in tables.items()}


def _of(table: pa.Table, ids: Sequence[str]) -> pa.Table:
    wanted = pa.array(ids, pa.string())
    masks = [
        pc.is_in(table[name].cast(pa.string()), value_set=wanted) for name in ("user_id", "source_user_id") if name in table.column_names
    ]
    if not masks:
        return table.slice(0, 0)
    return table.filter(masks[0] if len(masks) == 1 else pc.or_(*masks))


def _plain(table: pa.Table) -> list[dict[str, Any]]:
    return [{name: _value(value) for name, value in row.items() if value is not None} for row in table.to_pylist()]


def _value(value: Any) -> Any:
    return (
        value if isinstance(value, str | int | float | bool | list | dict) else iso(value) if hasattr(value, "astimezone") else str(value)
    )


def load_events(store: OnlineStore, snapshot: Snapshot, say: Callable[[str], None]) -> None:
    """The events of a snapshot into the online store, so that online histories are those that models were trained on.

    What the snapshot knows of an event counts (a purchase less what came back); events that it set aside for its user's others, or
    holds no more, leave. Events that it does not know stay.
    """
    total = Reconciled()
    for bucket in range(snapshot.num_buckets):
        events = snapshot.events([bucket])
        total += store.reconcile(events, _gone(snapshot, bucket, events))
        say(f"online store: {total.added:,} events added, {total.changed:,} changed, {total.dropped:,} dropped")


def _gone(snapshot: Snapshot, bucket: int, events: pa.Table) -> pa.Table:
    """The events (user_id, event_id) that are none: set aside by a rule about users, netted, or of a lower layer and void."""
    pair = ["user_id", "event_id"]
    layers = snapshot.stack.layers[:-1]
    parts = [part for layer in layers if (part := layer.part("events", bucket, pair)) is not None]
    aside = snapshot.stack.quarantine(bucket)
    if aside is not None and set(pair) <= set(aside.column_names):
        source = SourceConfig.parse(snapshot.manifest.meta["source"], f"{snapshot.folder.uri}/manifest.json")
        reasons = pa.array(reconsidered(source), pa.string())
        parts.append(aside.filter(pc.is_in(aside["reason"].cast(pa.string()), value_set=reasons)))
    empty = pa.table({name: pa.array([], pa.string()) for name in pair})
    found = pa.concat_tables([empty, *(part.select(pair).cast(empty.schema) for part in parts)])
    return found.join(events.select(pair), pair, join_type="left anti").drop_null()


def load_people(store: OnlineStore, snapshot: Snapshot, say: Callable[[str], None]) -> None:
    """What a snapshot knows of people besides their events, into the online store: attributes, and the devices that are theirs.

    What the store was told of a user since stays; devices that are shared by too many are left on their own, as in the snapshot.
    """
    users = snapshot.users()
    if users is not None:
        say(f"online store: {store.backfill_users(users):,} users described")
    edges = snapshot.identities()
    if edges is None:
        return
    told = edges.group_by("user_id").aggregate([("device_id", "distinct")])
    joined = 0
    for user, devices in zip(told["user_id"].to_pylist(), told["device_id_distinct"].to_pylist(), strict=True):
        with contextlib.suppress(DataError):
            joined += store.merge(sorted(devices), user)
    say(f"online store: {joined:,} devices are users'")


def export_events(store: OnlineStore, home: Place, path: Path) -> int:
    """Write all events of an online store to a Parquet file in the EVENTS layout, whole or not at all; returns how many.

    Nobody with a tombstone in the home is in it, whatever the store still holds.
    """
    gone = Tombstones.of(home)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    count = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(part, EVENTS) as writer:
            for table in store.export():
                kept = gone.keep(conform(table, EVENTS, "the online store").select(EVENTS.names)).cast(EVENTS)
                writer.write_table(kept)
                count += kept.num_rows
        os.replace(part, path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error}. Choose another file, or make room.") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    return count


class People:
    """The endpoints about users. ``store``: the online store once it is open; ``changed``: called when somebody is forgotten."""

    def __init__(self, door: Door, store: Callable[[], OnlineStore], home: Place, changed: Callable[[], object]) -> None:
        self.door, self.store, self.home, self.changed = door, store, home, changed

    async def describe(self, user_id: str, changes: UserChanges, call: Call) -> dict[str, Any]:
        """Keep what a user is described by. Of somebody who is forgotten nothing is kept, and the answer is the same."""
        store = self.store()
        await self.door.write("users", call, lambda: store.describe(user_id, changes.attributes), "attributes")
        return {"request_id": call.request_id, "user_id": user_id}

    async def forget(self, user_id: str, call: Call) -> dict[str, Any]:
        """Forget a user."""
        removed = await self.door.write("users", call, partial(forget, self.store(), self.home, user_id), "user_id")
        self.changed()
        told = {"events": removed.events, "attributes": removed.attributes, "ids": len(removed.ids)}
        return {"request_id": call.request_id, "user_id": user_id, **told}

    async def join(self, request: IdentityRequest, call: Call) -> dict[str, Any]:
        """Make two ids one person, at once."""
        store = self.store()
        changed = await self.door.write("identities", call, lambda: store.merge([request.alias], request.user_id), "alias")
        return {"request_id": call.request_id, "user_id": request.user_id, "changed": changed}

    async def part(self, alias: str, call: Call) -> dict[str, Any]:
        """Take a joining back; histories are as if it had never been."""
        store = self.store()
        changed = await self.door.write("identities", call, lambda: store.unmerge(alias), "alias")
        return {"request_id": call.request_id, "user_id": alias, "changed": changed}
