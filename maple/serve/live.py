"""The live catalogue of one process: read by polling, laid over the bundles that are held, changed through the API.

Every process of a service has one. A change is durable before it is answered, and counts everywhere within a poll: mostly within
milliseconds where it was made. What is read is kept when the store cannot be reached; nobody is refused for that.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from maple.errors import MapleError
from maple.features.live_items import LiveItem, LiveItems
from maple.recommend.bundle import Bundle
from maple.recommend.live import LiveBundle, LiveView, live_bundle, next_change
from maple.serve.api import ItemChanges, RequestError, iso
from maple.serve.door import Door
from maple.serve.http import Call

log = logging.getLogger("maple.serve")

#: Of a process's time, at most this share goes into laying changes over bundles, however fast they come.
SHARE = 0.2


@dataclass(frozen=True, eq=False)
class Seen:
    """What was read last. ``stamp`` grows whenever a bundle over it would be another one; ``until``: when it changes by itself."""

    view: LiveView
    stamp: int
    until: int | None


class LiveCatalogue:
    """The live items as this process knows them. Thread-safe; readers never wait."""

    def __init__(self, items: LiveItems, now: Callable[[], int]) -> None:
        self.items, self.now = items, now
        self.seen = Seen(LiveView(), 0, None)
        self.read_at = time.monotonic()
        self._lock = threading.Lock()

    def poll(self) -> bool:
        """Read what has changed; whether bundles must be laid under it anew."""
        with self._lock:
            view, now = self.seen.view, self.now()
            version, changes = self.items.since(view.version)
            self.read_at = time.monotonic()
            if changes or version < view.version:  # an older version: another store is in its place, and this is all of it
                view = (LiveView() if version < view.version else view).after(version, changes)
            elif self.seen.until is None or now < self.seen.until:
                return False
            self.seen = Seen(view, self.seen.stamp + 1, next_change(view.items.values(), now))
            return True

    def over(self, bundle: Bundle, before: LiveBundle | None = None) -> tuple[LiveBundle, int]:
        """A bundle over the live items, and the stamp of what it was laid under. ``before``: the same over earlier ones."""
        seen = self.seen
        return live_bundle(bundle, seen.view, self.now(), before), seen.stamp

    def close(self) -> None:
        self.items.close()


class Poller:
    """Calls a function in a thread of its own, every so many seconds and when woken, however often, with pauses that bound its share of
    the process's time. An error is logged once in a row."""

    def __init__(self, function: Callable[[], object], seconds: float) -> None:
        self._function, self._seconds = function, seconds
        self._stop, self._wake = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._loop, name="maple-live", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Call it soon."""
        self._wake.set()

    def _loop(self) -> None:
        pause, failing = 0.0, False
        while True:
            self._wake.wait(max(self._seconds - pause, 0.0))
            if self._stop.is_set():
                return
            self._wake.clear()
            started = time.monotonic()
            try:
                self._function()
                failing = False
            except Exception as error:
                if not failing:
                    log.warning("the live catalogue could not be read, going on with what is known: %s: %s", type(error).__name__, error)
                failing = True
            pause = (time.monotonic() - started) * (1 / SHARE - 1)
            self._stop.wait(pause)

    def close(self) -> None:
        """Stop; returns when a call that runs has ended."""
        self._stop.set()
        self._wake.set()
        self._thread.join()


class Items:
    """The endpoints of single items. ``bundle``: the one that answers now; ``changed``: called after a change."""

    def __init__(self, door: Door, items: Callable[[], LiveItems], bundle: Callable[[], LiveBundle], changed: Callable[[], object]) -> None:
        self.door, self.items, self.bundle, self.changed = door, items, bundle, changed

    async def put(self, item_id: str, changes: ItemChanges, call: Call) -> dict[str, Any]:
        """Change what is known of an item, or add one."""
        self.bundle()
        return self._told(await self.door.write("items", call, partial(self._put, item_id, changes), "item"), call)

    async def withdraw(self, item_id: str, call: Call) -> dict[str, Any]:
        """Recommend it no more."""
        self.bundle()
        return self._told(await self.door.write("items", call, partial(self._withdraw, item_id), "item_id"), call)

    async def get(self, item_id: str, call: Call) -> dict[str, Any]:
        """What is known of an item now."""
        with self.door.admitted("items"):
            try:
                item = await self.door.run(lambda: self.items().get(item_id))
            except MapleError as error:
                log.error("request %s: %s", call.request_id, error)
                raise RequestError(503, "unavailable", "the live items cannot be read now", "", "try again", 1) from None
            code = int(self.bundle().base.space.items.encode([item_id])[0])
            if code < 0 and (item is None or item.deleted):
                raise _unknown()
            self.door.meter.on_answer("items", time.monotonic() - call.arrived, (), ())
            return self._told(item, call, item_id)

    def _put(self, item_id: str, changes: ItemChanges) -> LiveItem:
        item = self.items().put(item_id, changes.given())
        self.changed()
        return item

    def _withdraw(self, item_id: str) -> LiveItem:
        items = self.items()
        if self.bundle().base.space.items.encode([item_id])[0] < 0 and items.get(item_id) is None:
            raise _unknown()
        item = items.delete(item_id)
        self.changed()
        return item

    def _told(self, item: LiveItem | None, call: Call, item_id: str = "") -> dict[str, Any]:
        return {"request_id": call.request_id, **described(self.bundle().base, item, item.item_id if item is not None else item_id)}


_FIELDS = ("available", "stock", "price", "title", "category", "brand")


def described(bundle: Bundle, item: LiveItem | None, item_id: str) -> dict[str, Any]:
    """An item as the API tells it: what the bundle knows, with the live values over it."""
    code = int(bundle.space.items.encode([item_id])[0])
    row: dict[str, Any] = bundle.space.item_table.slice(code, 1).to_pylist()[0] if code >= 0 else {}
    known = {**{name: row.get(name) for name in _FIELDS}, "created_at": iso(row.get("created_at"))}
    blank: dict[str, Any] = {"withdrawn": False, "version": 0, "promotion": None, "attributes": {}}
    live = {} if item is None else {name: value for name, value in told(item).items() if value is not None}
    return {**known, **blank, **live, "item_id": item_id, "in_bundle": code >= 0}


def told(item: LiveItem) -> dict[str, Any]:
    """What was said of an item live, JSON-ready; null where nothing was."""
    promotion = None if item.promotion is None else {"start": iso(item.promotion[0]), "end": iso(item.promotion[1])}
    return {
        "item_id": item.item_id, "version": item.version, "withdrawn": item.deleted,
        **{name: getattr(item, name) for name in _FIELDS}, "created_at": iso(item.created_at), "promotion": promotion,
        "attributes": dict(item.attributes),
    }  # fmt: skip


def _unknown() -> RequestError:
    hint = "use an id of the catalogue, or PUT it first"
    return RequestError(404, "unknown_item", "neither the bundle nor the live items know this item", "item_id", hint)
