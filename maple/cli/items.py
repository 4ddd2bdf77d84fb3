"""``maple items``: single items of the live catalogue, as ``PUT /v1/items`` changes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click
import yaml

from maple.cli.console import console
from maple.cli.users import config_option
from maple.config import maple_home, yaml_value
from maple.errors import ConfigError, DataError

if TYPE_CHECKING:
    from maple.features.live_items import LiveItem, LiveItems


@click.group()
def items() -> None:
    """Single items, live: price, stock, availability, promotions, new items. A running service takes them up within a second."""


@items.command("put")
@click.argument("item")
@click.argument("changes", nargs=-1, metavar="NAME=VALUE...")
@config_option
def put(item: str, changes: tuple[str, ...], config_path: str | None) -> None:
    """Change an item or add one: available, stock, price, title, category, brand, created_at, promotion, or an attribute.

    Values are YAML, an empty one takes back what was said: maple items put sku-1 price=9.5 stock=0 'promotion={end: 2026-12-24T00:00:00Z}'
    """
    from maple.serve.api import ItemChanges, RequestError

    given: dict[str, object] = {}
    attributes: dict[str, object] = {}
    for text in changes:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ConfigError(f"{text!r}: write NAME=VALUE, for example price=9.5")
        try:
            (given if name in ItemChanges.model_fields else attributes)[name] = yaml_value(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"{text!r}: the value is not YAML: {' '.join(str(error).split())}") from None
    try:
        wanted = ItemChanges.read(json.dumps(given | ({"attributes": attributes} if attributes else {}), default=str).encode())
    except RequestError as error:
        raise DataError(f"{error.message} ({error.hint})") from None
    with _opened(config_path) as live:
        _show(live.put(item, wanted.given()))


@items.command("withdraw")
@click.argument("item")
@config_option
def withdraw(item: str, config_path: str | None) -> None:
    """Recommend an item no more; `put` brings it back."""
    with _opened(config_path) as live:
        _show(live.delete(item))


@items.command("show")
@click.argument("item")
@config_option
def show(item: str, config_path: str | None) -> None:
    """What was put live of an item."""
    with _opened(config_path) as live:
        found = live.get(item)
    if found is None:
        console.print("nothing was put live of it; the bundle's catalogue holds", markup=False)
    else:
        _show(found)


def _show(item: LiveItem) -> None:
    from maple.serve.live import told

    console.print(json.dumps(told(item), ensure_ascii=False), markup=False, soft_wrap=True)


@contextmanager
def _opened(config_path: str | None) -> Iterator[LiveItems]:
    from maple.artifacts import Place
    from maple.run import run_config
    from maple.serve.settings import ServeSettings
    from maple.serve.stores import open_live

    store = run_config(config_path).serve.store.plain()
    live = open_live(ServeSettings.parse({"home": Place.at(maple_home()).uri, "store": store}, "serve"))
    try:
        yield live
    finally:
        live.close()
