"""Opening the online store and the live items that the settings name."""

from __future__ import annotations

from pathlib import Path

from maple.artifacts import Place
from maple.errors import ConfigError
from maple.features.folder import Folder
from maple.features.live_items import LiveItems
from maple.features.live_items_sqlite import SqliteItems
from maple.features.store import OnlineStore
from maple.features.store_sqlite import SqliteStore
from maple.serve.settings import ServeSettings


def store_path(settings: ServeSettings) -> str:
    """The file of an SQLite store; ``ConfigError`` where the home is remote and none is named."""
    if settings.store.path is not None:
        return settings.store.path
    local = Place.at(settings.home).local
    if local is None:
        raise ConfigError(f"the home {settings.home} is remote: name the SQLite file (store.path) or use a Redis store (store.kind: redis)")
    return str(local / "online.sqlite")


def open_store(settings: ServeSettings, folder: Folder) -> OnlineStore:
    """The store, keeping the states of a bundle's features up to date."""
    if settings.store.kind == "redis":
        from maple.features.store_redis import RedisStore

        assert settings.store.url is not None, "the settings have checked it"
        return RedisStore(settings.store.url, folder, read_timeout=settings.store.read_timeout_s)
    return SqliteStore(store_path(settings), folder)


def open_live(settings: ServeSettings) -> LiveItems:
    """The live items, beside the events of the online store."""
    if settings.store.kind == "redis":
        from maple.features.live_items_redis import RedisItems

        assert settings.store.url is not None, "the settings have checked it"
        return RedisItems(settings.store.url)
    return SqliteItems(str(Path(store_path(settings)).with_name("live_items.sqlite")))
