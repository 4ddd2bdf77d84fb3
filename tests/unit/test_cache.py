"""The response cache: bounded, short-lived, one computation at a time, and nobody's cancellation is somebody else's."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from maple.serve.cache import ResponseCache


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def always(value: int) -> bool:
    return True


def constant(value: int, calls: list[int]) -> Callable[[], Awaitable[int]]:
    async def compute() -> int:
        calls.append(value)
        await asyncio.sleep(0)
        return value

    return compute


def test_second_request_hits_until_it_expires() -> None:
    async def scenario() -> None:
        clock, calls = Clock(), list[int]()
        cache = ResponseCache[int](10, 5.0, jitter=0.2, clock=clock)
        assert await cache.get("a", constant(1, calls), always) == (1, "miss")
        clock.now = 3.9
        assert await cache.get("a", constant(2, calls), always) == (1, "hit")
        clock.now = 5.1
        assert await cache.get("a", constant(3, calls), always) == (3, "miss")
        assert calls == [1, 3]

    asyncio.run(scenario())


def test_lifetimes_differ_between_keys() -> None:
    async def scenario() -> None:
        clock = Clock()
        cache = ResponseCache[int](1000, 1.0, jitter=0.5, clock=clock)
        for key in range(200):
            await cache.get(str(key), constant(key, []), always)
        clock.now = 0.75
        outcomes = [(await cache.get(str(key), constant(key, []), always))[1] for key in range(200)]
        assert 60 < outcomes.count("hit") < 140

    asyncio.run(scenario())


def test_least_recently_used_goes_first() -> None:
    async def scenario() -> None:
        cache = ResponseCache[int](2, 60.0)
        for key in ("a", "b", "a", "c"):
            await cache.get(key, constant(0, []), always)
        assert len(cache) == 2
        outcomes = {key: (await cache.get(key, constant(0, []), always))[1] for key in ("a", "c")}
        assert outcomes == {"a": "hit", "c": "hit"}
        assert (await cache.get("b", constant(0, []), always))[1] == "miss"

    asyncio.run(scenario())


def test_a_stampede_computes_once() -> None:
    async def scenario() -> None:
        calls: list[int] = []
        cache = ResponseCache[int](10, 60.0)
        outcomes = await asyncio.gather(*(cache.get("hot", constant(7, calls), always) for _ in range(500)))
        assert calls == [7]
        assert [outcome for _, outcome in outcomes].count("miss") == 1

    asyncio.run(scenario())


def test_the_first_client_leaving_does_not_take_the_answer_along() -> None:
    async def scenario() -> None:
        gate = asyncio.Event()

        async def slow() -> int:
            await gate.wait()
            return 5

        cache = ResponseCache[int](10, 60.0)
        first = asyncio.create_task(cache.get("k", slow, always))
        await asyncio.sleep(0)
        second = asyncio.create_task(cache.get("k", slow, always))
        await asyncio.sleep(0)
        first.cancel()
        gate.set()
        assert await second == (5, "shared")
        with pytest.raises(asyncio.CancelledError):
            await first

    asyncio.run(scenario())


def test_failures_and_unwanted_answers_are_not_kept() -> None:
    async def scenario() -> None:
        cache = ResponseCache[int](10, 60.0)

        async def fails() -> int:
            raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            await cache.get("k", fails, always)
        assert await cache.get("k", constant(1, []), lambda value: False) == (1, "miss")
        assert await cache.get("k", constant(2, []), always) == (2, "miss")

    asyncio.run(scenario())


def test_size_zero_keeps_nothing() -> None:
    async def scenario() -> None:
        cache = ResponseCache[int](0, 60.0)
        for _ in range(2):
            assert (await cache.get("k", constant(1, []), always))[1] == "miss"

    asyncio.run(scenario())
