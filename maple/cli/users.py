"""``maple users``: what is stored about people, forgetting them, and the ids that are one person.

The commands work on the home and the online store themselves, whether or not a service runs; a running one sees it with the next request.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
import yaml

from maple.cli.console import console
from maple.config import maple_home, yaml_value
from maple.errors import ConfigError

if TYPE_CHECKING:
    from maple.artifacts import Place
    from maple.features.store import OnlineStore

config_option = click.option(
    "--config",
    "config_path",
    type=click.Path(dir_okay=False),
    default=None,
    help="Run settings (YAML); serve.store says which online store.",
)


@click.group()
def users() -> None:
    """People: export what is stored, delete for good, attributes, and ids that are one person."""


@users.command("export")
@click.argument("user")
@config_option
@click.option("-o", "--output", type=click.Path(dir_okay=False), default=None, help="A file to write instead of the terminal.")
def export_user(user: str, config_path: str | None, output: str | None) -> None:
    """Everything that is stored about a user, as JSON."""
    from maple.serve.people import stored

    with opened(config_path) as (home, store):
        text = json.dumps(stored(store, home, user), indent=2, ensure_ascii=False)
    if output is None:
        click.echo(text)
    else:
        Path(output).write_text(text + "\n", encoding="utf-8")
        console.print(f"written to {output}", markup=False)


@users.command("delete")
@click.argument("user")
@config_option
@click.option("--yes", is_flag=True, help="Do not ask.")
def delete_user(user: str, config_path: str | None, yes: bool) -> None:
    """Forget a user and every id joined with it: gone online at once, kept out of every snapshot, training and export."""
    from maple.serve.people import forget, ids_of, rows_of

    with opened(config_path) as (home, store):
        ids = ids_of(store, home, user)
        if not yes:
            others = f" and {', '.join(each for each in ids if each != user)}, joined with it," if len(ids) > 1 else ""
            click.confirm(f"Forget {user}{others} for good?", abort=True)
        rows = rows_of(home, ids)
        removed = forget(store, home, user)
    whom = f"{len(removed.ids)} id{'s' * (len(removed.ids) != 1)}"
    gone = f"{removed.events} online events, {rows} rows of the latest snapshot and {removed.attributes} attributes of {whom}"
    console.print(f"gone: {gone}. What is still sent of them is dropped, and no snapshot shows them.", markup=False, soft_wrap=True)
    console.print("The rows themselves leave the files with `maple snapshots purge`.", markup=False)


@users.command("set")
@click.argument("user")
@click.argument("attributes", nargs=-1, required=True, metavar="NAME=VALUE...")
@config_option
def set_attributes(user: str, attributes: tuple[str, ...], config_path: str | None) -> None:
    """Attributes of a user; values are YAML, an empty one takes the attribute away."""
    given = {}
    for text in attributes:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ConfigError(f"{text!r}: write NAME=VALUE, for example age=42")
        try:
            given[name] = yaml_value(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"{text!r}: the value is not YAML: {' '.join(str(error).split())}") from None
    with opened(config_path) as (_, store):
        store.describe(user, given)
        console.print(json.dumps(store.attributes(user), ensure_ascii=False), markup=False, soft_wrap=True)


@users.command("merge")
@click.argument("alias")
@click.argument("user")
@config_option
def merge(alias: str, user: str, config_path: str | None) -> None:
    """Make ALIAS (a device, a guest) and USER one person online; `unmerge` takes it back exactly."""
    with opened(config_path) as (_, store):
        store.merge([alias], user)
        console.print(f"one person: {', '.join(store.aliases(user))}", markup=False, soft_wrap=True)


@users.command("unmerge")
@click.argument("alias")
@config_option
def unmerge(alias: str, config_path: str | None) -> None:
    """Take back that ALIAS is somebody else: both histories are as if they had never been one."""
    with opened(config_path) as (_, store):
        changed = store.unmerge(alias)
    console.print(f"{alias} is on its own again" if changed else f"{alias} was not an alias of anybody", markup=False, soft_wrap=True)


@contextmanager
def opened(config_path: str | None) -> Iterator[tuple[Place, OnlineStore]]:
    """The home and its online store. Folding is left to whoever serves: states are made there when they are next read."""
    from maple.artifacts import Place
    from maple.run import run_config
    from maple.serve.people import folds_nothing
    from maple.serve.settings import ServeSettings
    from maple.serve.stores import open_store

    home = Place.at(maple_home())
    page = run_config(config_path)
    store = open_store(ServeSettings.parse({"home": home.uri, "store": page.serve.store.plain()}, "serve"), folds_nothing())
    try:
        yield home, store
    finally:
        store.close()
