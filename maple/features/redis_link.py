"""A connection to one Redis: durable or refused, scripts run by their digest, errors that say what to do.

Scripts run on the server, each as one step that nothing comes between. They touch the keys of several users, so all keys must be on one
server: a single Redis, with replicas or not. On a Redis Cluster give a prefix with a hash tag, such as ``{maple}``: then all keys
share a slot, and so a server.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from maple.errors import ConfigError, ServeError


class RedisLink:
    """``url`` as ``redis://[user:password@]host:port/db``, ``rediss://`` or ``unix://``; ``timeout`` in seconds, per answer.

    What is asked for ``quickly`` has connections of its own, is waited for ``quick_timeout`` seconds and not tried again.
    ``durable=False`` accepts a Redis that can lose what it acknowledged (no append-only file, or not written on every command).
    """

    def __init__(self, url: str, *, durable: bool = True, timeout: float = 5.0, quick_timeout: float | None = None) -> None:
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError:
            raise ConfigError("the Redis store needs the package redis: pip install 'maple-rec[redis]'") from None
        self._redis = redis
        try:
            self.client: Any = redis.Redis.from_url(url, socket_timeout=timeout, socket_connect_timeout=timeout)
            self._quick: Any = self.client
            if quick_timeout is not None:
                once = Retry(NoBackoff(), 0)
                self._quick = redis.Redis.from_url(url, socket_timeout=quick_timeout, socket_connect_timeout=quick_timeout, retry=once)
        except ValueError as error:
            raise ConfigError(f"the Redis URL is not usable: {error}. It looks like redis://host:6379/0") from None
        with self.errors():
            self.client.ping()
            if durable:
                self._check_durable()

    def run(self, script: Script, *arguments: Any) -> Any:
        """The answer of one script."""
        return self.run_all(script, [arguments])[0]

    def run_all(self, script: Script, calls: Sequence[Sequence[Any]], *, quickly: bool = False) -> list[Any]:
        """The answers of one script to several calls, in one round trip."""
        client = self._quick if quickly else self.client
        with self.errors():
            try:
                return _send(client, script, calls)
            except self._redis.exceptions.NoScriptError:
                client.script_load(script.text)
                return _send(client, script, calls)

    @contextmanager
    def errors(self) -> Iterator[None]:
        try:
            yield
        except self._redis.RedisError as error:
            raise ServeError(f"Redis failed ({type(error).__name__}: {error}). Check that it runs and is not out of memory.") from error

    def close(self) -> None:
        """Close all connections."""
        self.client.close()
        self._quick.close()

    def _check_durable(self) -> None:
        """``ConfigError`` where what was acknowledged could be lost with the machine."""
        fix = "or set `durable: false` for the online store if losing events is acceptable."
        if not self.client.info("persistence").get("aof_enabled"):
            raise ConfigError(
                "this Redis has no append-only file, so acknowledged events could be lost. Start it with "
                f"`--appendonly yes --appendfsync always`, {fix}"
            )
        try:
            policy = self.client.config_get("appendfsync").get("appendfsync")
        except self._redis.ResponseError:
            policy = None
        if policy != "always":
            raise ConfigError(
                f"this Redis writes its append-only file by policy {policy or 'unknown'}, so acknowledged events could be lost. "
                f"Set `appendfsync always`, {fix}"
            )


def _send(client: Any, script: Script, calls: Sequence[Sequence[Any]]) -> list[Any]:
    pipe = client.pipeline(transaction=False)
    for arguments in calls:
        pipe.evalsha(script.sha, 0, *arguments)
    answers: list[Any] = pipe.execute()
    return answers


class Script:
    """A Lua script and its digest."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
