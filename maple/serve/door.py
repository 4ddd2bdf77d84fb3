"""Who may come in: requests in flight are counted, one too many is refused at once, refusals are metered, blocking calls get a thread."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar

from maple.errors import DataError, MapleError
from maple.recommend.engine import Observer
from maple.serve.api import RequestError
from maple.serve.http import Call

log = logging.getLogger("maple.serve")
T = TypeVar("T")


class Meter(Observer, Protocol):
    """Counts what the service does. Called from several threads; must be quick and never raise."""

    def on_answer(self, endpoint: str, seconds: float, path: Sequence[str], degraded: Sequence[str]) -> None: ...
    def on_refusal(self, endpoint: str, kind: str) -> None: ...
    def on_cache(self, outcome: str) -> None: ...
    def on_events(self, accepted: int, duplicates: int, deleted: int) -> None: ...
    def on_live(self, outcome: str) -> None: ...


class NoMeter:
    """Counts nothing."""

    def on_stage(self, name: str, seconds: float, n_in: int, n_out: int, error: str | None) -> None: ...
    def on_answer(self, endpoint: str, seconds: float, path: Sequence[str], degraded: Sequence[str]) -> None: ...
    def on_refusal(self, endpoint: str, kind: str) -> None: ...
    def on_cache(self, outcome: str) -> None: ...
    def on_events(self, accepted: int, duplicates: int, deleted: int) -> None: ...
    def on_live(self, outcome: str) -> None: ...


class Door:
    """The way in to one process, for all endpoints together. For one event loop."""

    def __init__(self, max_in_flight: int, meter: Meter) -> None:
        self.meter = meter
        self._max, self._in_flight = max_in_flight, 0
        self._io = ThreadPoolExecutor(8, "maple-io")

    @contextmanager
    def admitted(self, endpoint: str) -> Iterator[None]:
        """Inside, a request counts as in flight; one too many is refused at once."""
        if self._in_flight >= self._max:
            self.meter.on_refusal(endpoint, "overloaded")
            raise RequestError(503, "overloaded", "too many requests at once", "", "try again after the time in `Retry-After`", 1)
        self._in_flight += 1
        try:
            yield
        except RequestError as refusal:
            self.meter.on_refusal(endpoint, refusal.kind)
            raise
        finally:
            self._in_flight -= 1

    async def run(self, function: Callable[[], T]) -> T:
        """A blocking call in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._io, function)

    async def write(self, endpoint: str, call: Call, change: Callable[[], T], where: str) -> T:
        """A change that is durable when this returns. ``RequestError`` 422 where the content cannot be kept, 503 where it was not."""
        with self.admitted(endpoint):
            try:
                out = await self.run(change)
            except RequestError:
                raise
            except DataError as error:
                log.info("request %s: %s", call.request_id, error)
                raise RequestError(
                    422, "invalid_request", "this cannot be stored as it is", where, "see /openapi.json for the limits"
                ) from None
            except (MapleError, OSError) as error:
                log.error("request %s: nothing was stored: %s", call.request_id, error)
                hint = "send it again; repeating it is harmless"
                raise RequestError(503, "not_stored", "the change could not be made durable", where, hint, 1) from None
            self.meter.on_answer(endpoint, time.monotonic() - call.arrived, (), ())
            return out

    def later(self, function: Callable[[], object]) -> None:
        """A blocking call that nobody waits for; that it failed is logged."""

        def logged() -> None:
            try:
                function()
            except (MapleError, OSError) as error:
                log.warning("%s: %s", type(error).__name__, error)

        self._io.submit(logged)

    def close(self) -> None:
        """Wait for running calls."""
        self._io.shutdown()
