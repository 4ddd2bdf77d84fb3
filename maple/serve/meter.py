"""Maple's own metrics of serving, in Ray's metrics: counters and latencies named ``maple_*``.

Recording in Ray costs tens of microseconds a time, and a request passes twenty stages; so figures gather here and one
thread hands them over every two seconds.
"""

from __future__ import annotations

import atexit
import threading
from collections import Counter
from collections.abc import Sequence

from ray.util import metrics

FLUSH_S = 2.0
MILLISECONDS = [0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000]
_MAX_PENDING = 100_000  # observations between two flushes; beyond it they are counted as lost, never kept


class RayMeter:
    """The ``Meter`` of ``serve.door`` over ``ray.util.metrics``. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self._times: list[tuple[str, tuple[str, ...], float]] = []
        self._counters = {
            "maple_requests": metrics.Counter("maple_requests", "answers given", ("endpoint", "path")),
            "maple_refused": metrics.Counter("maple_refused", "requests refused, by the type of the error", ("endpoint", "type")),
            "maple_degraded": metrics.Counter("maple_degraded", "answers that went round a failed or late part", ("part",)),
            "maple_stage_errors": metrics.Counter("maple_stage_errors", "stages that failed", ("stage", "error")),
            "maple_cache": metrics.Counter("maple_cache", "lookups of the response cache", ("outcome",)),
            "maple_events": metrics.Counter("maple_events", "events received", ("outcome",)),
            "maple_live_items": metrics.Counter("maple_live_items", "readings of the live items that brought changes", ("outcome",)),
            "maple_metrics_lost": metrics.Counter("maple_metrics_lost", "observations dropped because too many were pending", ()),
        }
        self._histograms = {
            "maple_latency_ms": metrics.Histogram("maple_latency_ms", "arrival to answer", MILLISECONDS, ("endpoint",)),
            "maple_stage_ms": metrics.Histogram("maple_stage_ms", "one stage or segment", MILLISECONDS, ("stage",)),
        }
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="maple-metrics", daemon=True)
        self._thread.start()
        atexit.register(self._stop.set)

    def on_stage(self, name: str, seconds: float, n_in: int, n_out: int, error: str | None) -> None:
        self._time("maple_stage_ms", (name,), seconds)
        if error is not None:
            self._count("maple_stage_errors", (name, error))

    def on_answer(self, endpoint: str, seconds: float, path: Sequence[str], degraded: Sequence[str]) -> None:
        self._count("maple_requests", (endpoint, ">".join(path)))
        self._time("maple_latency_ms", (endpoint,), seconds)
        for note in degraded:
            self._count("maple_degraded", (note.split(":")[0],))

    def on_refusal(self, endpoint: str, kind: str) -> None:
        self._count("maple_refused", (endpoint, kind))

    def on_cache(self, outcome: str) -> None:
        self._count("maple_cache", (outcome,))

    def on_events(self, accepted: int, duplicates: int, deleted: int) -> None:
        self._count("maple_events", ("accepted",), accepted)
        self._count("maple_events", ("duplicate",), duplicates)
        self._count("maple_events", ("deleted",), deleted)

    def on_live(self, outcome: str) -> None:
        self._count("maple_live_items", (outcome,))

    def _count(self, name: str, tags: tuple[str, ...], by: int = 1) -> None:
        with self._lock:
            self._counts[name, tags] += by

    def _time(self, name: str, tags: tuple[str, ...], seconds: float) -> None:
        with self._lock:
            if len(self._times) < _MAX_PENDING:
                self._times.append((name, tags, seconds * 1e3))
            else:
                self._counts["maple_metrics_lost", ()] += 1

    def _loop(self) -> None:
        while not self._stop.wait(FLUSH_S):
            self.flush()

    def flush(self) -> None:
        """Hand everything gathered over to Ray now."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
            times, self._times = self._times, []
        for (name, tags), by in counts.items():
            if by:
                counter = self._counters[name]
                counter.inc(by, dict(zip(counter.info["tag_keys"], tags, strict=True)))
        for name, tags, value in times:
            histogram = self._histograms[name]
            histogram.observe(value, dict(zip(histogram.info["tag_keys"], tags, strict=True)))
