"""Live items on Redis: one hash of what is said of each item, one sorted set of when it changed last."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from maple.errors import ServeError
from maple.features.live_items import LiveItem, changed, check_changes, from_text, to_text
from maple.features.redis_link import RedisLink, Script

MAX_ATTEMPTS = 50
_PAGE = 5000

# the first four arguments of each script are the keys: what is said, order, numbers, counter

#: item, what was said or '', what is said now -> number and version, or nothing where somebody was faster
_PUT = Script("""
if (redis.call('HGET', ARGV[1], ARGV[5]) or '') ~= ARGV[6] then return {} end
local version = redis.call('INCR', ARGV[4])
redis.call('HSET', ARGV[1], ARGV[5], ARGV[7])
redis.call('ZADD', ARGV[2], version, ARGV[5])
redis.call('HSETNX', ARGV[3], ARGV[5], redis.call('HLEN', ARGV[3]))
return {tonumber(redis.call('HGET', ARGV[3], ARGV[5])), version}
""")

#: version, at most so many -> latest version, then (item, version, number, what is said) in turn
_SINCE = Script("""
local latest = tonumber(redis.call('GET', ARGV[4]) or 0)
local after = tonumber(ARGV[5])
if after > latest then after = 0 end
local out = {latest}
if after == latest then return out end
local found = redis.call('ZRANGEBYSCORE', ARGV[2], '(' .. after, '+inf', 'WITHSCORES', 'LIMIT', 0, ARGV[6])
for i = 1, #found, 2 do
  out[#out + 1] = {found[i], found[i + 1], redis.call('HGET', ARGV[3], found[i]), redis.call('HGET', ARGV[1], found[i])}
end
return out
""")

#: item -> number, version, what is said; or nothing
_GET = Script("""
local said = redis.call('HGET', ARGV[1], ARGV[5])
if not said then return {} end
return {redis.call('HGET', ARGV[3], ARGV[5]), redis.call('ZSCORE', ARGV[2], ARGV[5]), said}
""")


class RedisItems:
    """See ``LiveItems``; ``url``, ``durable`` and ``timeout`` as ``RedisLink`` takes them. Keys start with ``prefix``."""

    def __init__(self, url: str, *, prefix: str = "maple", durable: bool = True, timeout: float = 5.0) -> None:
        self._link = RedisLink(url, durable=durable, timeout=timeout)
        self._keys = tuple(f"{prefix}:v2:items:{part}" for part in ("said", "order", "numbers", "version"))

    def put(self, item_id: str, changes: Mapping[str, Any]) -> LiveItem:
        """See ``LiveItems``."""
        check_changes(item_id, changes)
        for _ in range(MAX_ATTEMPTS):
            with self._link.errors():
                said = (self._link.client.hget(self._keys[0], item_id) or b"").decode()
            text = to_text(changed(item_id, json.loads(said or "{}"), changes))
            answer = self._link.run(_PUT, *self._keys, item_id, said, text)
            if answer:
                return from_text(item_id, answer[0], answer[1], text)
        raise ServeError(f"item {item_id!r} is changed by too many at once ({MAX_ATTEMPTS} attempts failed); try again")

    def delete(self, item_id: str) -> LiveItem:
        """See ``LiveItems``."""
        return self.put(item_id, {"deleted": True})

    def get(self, item_id: str) -> LiveItem | None:
        """See ``LiveItems``."""
        answer = self._link.run(_GET, *self._keys, item_id)
        return from_text(item_id, int(answer[0]), int(answer[1]), answer[2]) if answer else None

    def since(self, version: int) -> tuple[int, list[LiveItem]]:
        """See ``LiveItems``. Many changes come in several answers; an item that changes meanwhile comes again with the rest."""
        items: dict[str, LiveItem] = {}
        while True:
            latest, *rows = self._link.run(_SINCE, *self._keys, version, _PAGE)
            for item, at, number, said in rows:
                items.pop(item.decode(), None)
                items[item.decode()] = from_text(item.decode(), int(number), int(at), said)
            if len(rows) < _PAGE:
                return latest, list(items.values())
            version = int(rows[-1][1])

    def close(self) -> None:
        """See ``LiveItems``."""
        self._link.close()
