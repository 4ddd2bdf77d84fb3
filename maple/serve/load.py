"""A load generator: many keep-alive clients on one event loop, closed loop (each asks again at once) or open loop (at a fixed rate).

In the open loop a request's latency counts from when it was due, not from when it could be sent, so that a stalled server
cannot hide its queue (coordinated omission). Every answer is recorded; what is not a 200 is counted by status.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import aiohttp
import numpy as np

Body = Callable[[int], dict[str, object]]
"""The JSON body of the n-th request."""


@dataclass(frozen=True)
class Answered:
    """One request: when it was due and how long it took (seconds), its status (0 = no answer), and what the answer says of itself."""

    at: float
    seconds: float
    status: int
    bundle: str = ""
    degraded: tuple[str, ...] = ()
    latency_ms: Mapping[str, float] = field(default_factory=dict)  # what the answer says of its stages


@dataclass(frozen=True)
class Load:
    """What a run measured. ``wall`` in seconds from the first request to the last answer."""

    wall: float
    answers: list[Answered] = field(repr=False)

    @property
    def throughput(self) -> float:
        """Answers with status 200 per second."""
        return sum(one.status == 200 for one in self.answers) / self.wall

    def percentile(self, q: float) -> float:
        """Latency in milliseconds of the answers with status 200."""
        good = [one.seconds for one in self.answers if one.status == 200]
        return float(np.percentile(good, q) * 1e3) if good else float("nan")

    @property
    def statuses(self) -> Counter[int]:
        return Counter(one.status for one in self.answers)

    @property
    def degraded(self) -> int:
        return sum(bool(one.degraded) for one in self.answers)


async def _ask(session: aiohttp.ClientSession, url: str, body: bytes, due: float) -> Answered:
    try:
        async with session.post(url, data=body, headers={"content-type": "application/json"}) as answer:
            raw = await answer.read()
            seconds = time.perf_counter() - due
            if answer.status != 200:
                return Answered(due, seconds, answer.status)
            plain = json.loads(raw)
            return Answered(due, seconds, 200, plain["bundle"], tuple(plain["degraded"]), plain["latency_ms"])
    except (aiohttp.ClientError, TimeoutError):
        return Answered(due, time.perf_counter() - due, 0)


def _session(limit: int) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=limit), timeout=aiohttp.ClientTimeout(total=30))


async def closed(url: str, body: Body, *, clients: int, requests: int, stop: asyncio.Event | None = None) -> Load:
    """``clients`` that each ask, wait for the answer and ask again, until ``requests`` are sent or ``stop`` is set."""
    answers: list[Answered] = []
    numbers = iter(range(requests))

    async def client(session: aiohttp.ClientSession) -> None:
        for number in numbers:
            if stop is not None and stop.is_set():
                return
            answers.append(await _ask(session, url, json.dumps(body(number)).encode(), time.perf_counter()))

    async with _session(clients) as session:
        start = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(clients)))
        return Load(time.perf_counter() - start, answers)


async def paced(url: str, body: Body, *, rate: float, seconds: float, connections: int = 256) -> Load:
    """Requests at a fixed rate per second, whether or not earlier ones were answered."""
    answers: list[Answered] = []

    async with _session(connections) as session:
        start = time.perf_counter()

        async def one(number: int) -> None:
            answers.append(await _ask(session, url, json.dumps(body(number)).encode(), start + number / rate))

        tasks = []
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, start + number / rate - time.perf_counter()))
            tasks.append(asyncio.create_task(one(number)))
        await asyncio.gather(*tasks)
        return Load(time.perf_counter() - start, answers)
