"""A small client of the HTTP API, for the demo, tests and scripts: one keep-alive connection, plain answers, typed errors."""

from __future__ import annotations

import http.client
import json
import urllib.parse
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from maple.errors import ServeError


class ApiError(ServeError):
    """An answer that is an error: ``status``, the API's ``kind`` and the request's id, with the message for people."""

    def __init__(self, status: int, kind: str, message: str, request_id: str) -> None:
        super().__init__(f"{status} {kind}: {message} (request {request_id or 'unknown'})")
        self.status, self.kind, self.request_id = status, kind, request_id


def _part(text: str) -> str:
    """An id as one part of a path."""
    return urllib.parse.quote(text, safe="")


class Client:
    """Talks to one address. Not for several threads at once. A connection that the server closed is opened again, once per call:
    every call is safe to repeat, events because their ids make them count once."""

    def __init__(self, url: str, timeout_s: float = 10.0) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ServeError(f"{url!r} is not an http:// address of a Maple service")
        self._connection = http.client.HTTPConnection(parts.hostname, parts.port or 80, timeout=timeout_s)

    def recommend(self, user_id: str, k: int = 10, **fields: Any) -> dict[str, Any]:
        """A slate; ``fields`` are history, exclude, filters, context, attributes of the request."""
        return self.call("POST", "/v1/recommendations", {"user_id": user_id, "k": k, **fields})

    def similar(self, item_id: str, k: int = 10) -> dict[str, Any]:
        return self.call("GET", f"/v1/items/{_part(item_id)}/similar?k={k}")

    def events(self, events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Store events; durable when this returns. Give each an ``event_id`` or a ``timestamp``, so that a repeat counts once."""
        return self.call("POST", "/v1/events", {"events": list(events)})

    def put_item(self, item_id: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Change an item of the live catalogue, or add one; durable when this returns."""
        return self.call("PUT", f"/v1/items/{_part(item_id)}", changes)

    def item(self, item_id: str) -> dict[str, Any]:
        return self.call("GET", f"/v1/items/{_part(item_id)}")

    def withdraw_item(self, item_id: str) -> dict[str, Any]:
        return self.call("DELETE", f"/v1/items/{_part(item_id)}")

    def describe_user(self, user_id: str, attributes: Mapping[str, Any]) -> dict[str, Any]:
        return self.call("PUT", f"/v1/users/{_part(user_id)}", {"attributes": attributes})

    def delete_user(self, user_id: str) -> dict[str, Any]:
        return self.call("DELETE", f"/v1/users/{_part(user_id)}")

    def join(self, alias: str, user_id: str) -> dict[str, Any]:
        """Two ids are one person from now on; ``part`` takes it back."""
        return self.call("POST", "/v1/identities", {"alias": alias, "user_id": user_id})

    def part(self, alias: str) -> dict[str, Any]:
        return self.call("DELETE", f"/v1/identities/{_part(alias)}")

    def info(self) -> dict[str, Any]:
        return self.call("GET", "/v1/info")

    def health(self) -> dict[str, Any]:
        return self.call("GET", "/healthz")

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """One request; ``ApiError`` for an answer that is not 2xx, ``ServeError`` if there is none."""
        raw = None if body is None else json.dumps(body).encode()
        status, answer = self._send(method, path, raw)
        try:
            plain = json.loads(answer)
        except ValueError:
            plain = {}
        if 200 <= status < 300:
            return dict(plain)
        error = plain.get("error", {})
        raise ApiError(
            status, error.get("type", "error"), error.get("message", answer[:200].decode("utf-8", "replace")), plain.get("request_id", "")
        )

    def _send(self, method: str, path: str, raw: bytes | None) -> tuple[int, bytes]:
        headers = {} if raw is None else {"content-type": "application/json"}
        for attempt in (1, 2):
            try:
                self._connection.request(method, path, raw, headers)
                answer = self._connection.getresponse()
                return answer.status, answer.read()
            except (ConnectionError, http.client.RemoteDisconnected, http.client.BadStatusLine) as error:
                self._connection.close()
                if attempt == 2:
                    raise self._silent(error) from None
            except OSError as error:
                self._connection.close()
                raise self._silent(error) from None
        raise AssertionError("the second attempt returns or raises")

    def _silent(self, error: Exception) -> ServeError:
        where = f"{self._connection.host}:{self._connection.port}"
        return ServeError(f"no answer from {where} ({type(error).__name__}: {error}). Is the service up? `maple serve` starts it.")

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
