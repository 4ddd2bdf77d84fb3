"""The ``maple`` command: each subcommand is one call into ``maple.steps``; errors are printed without a traceback."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import click

from maple import __version__
from maple.cli.console import console, errors
from maple.cli.console import table as show_table
from maple.cli.events import events
from maple.cli.items import items
from maple.cli.snapshots import snapshots
from maple.cli.users import users
from maple.cli.validate import check, validate
from maple.errors import MapleError

if TYPE_CHECKING:
    from maple.run import RunConfig, StepResult


class Group(click.Group):
    """A group whose commands keep the order in which they were written and never show a traceback for a user's mistake."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}

data_option = click.option("--data", default=None, help="A preset name, a folder of data, or a source YAML. Default: the simulated shop.")
config_option = click.option("--config", "config_path", type=click.Path(dir_okay=False), default=None, help="Run settings (YAML).")
set_option = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="One setting, dotted: --set tune.random_trials=8")


@click.group(cls=Group, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="maple")
@click.option("--home", default=None, help="Where Maple keeps everything: a folder or URI. Default: $MAPLE_HOME, or .maple here.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def cli(home: str | None, debug: bool) -> None:
    """From raw shop events to a watched, versioned, served recommender.

    The whole loop at once: maple demo. Step by step: ingest, features build, tune, train, evaluate, publish, promote, serve.
    """
    if home:
        os.environ["MAPLE_HOME"] = home
    if debug:
        os.environ["MAPLE_DEBUG"] = "1"


@cli.command()
@data_option
@config_option
@set_option
@click.option("--keep", is_flag=True, help="Leave the service, Ray and MLflow up afterwards and say where they are.")
@click.option("--report", type=click.Path(dir_okay=False), default="maple-report.html", show_default=True, help="Where the report goes.")
def demo(data: str | None, config_path: str | None, overrides: tuple[str, ...], keep: bool, report: str) -> None:
    """The main job end to end: data, features, models, tuning, evaluation, release, serving, a report."""
    from maple import demo as demo_

    demo_.run(_config(config_path, data, overrides), keep=keep, report=Path(report))


@cli.command()
@data_option
@config_option
@set_option
@click.option("--append", is_flag=True, help="Read only files that the latest snapshot has not, and lay what they bring over it.")
@click.option(
    "--compact", "when", type=click.Choice(["background", "now", "never"]), default=None, help="When an append left too many layers."
)
def ingest(data: str | None, config_path: str | None, overrides: tuple[str, ...], append: bool, when: str | None) -> None:
    """Read a source, validate it, and publish an immutable snapshot."""
    extra = [*(["ingest.append=true"] if append else []), *([f"ingest.compact={when}"] if when else [])]
    _step("ingest", _config(config_path, data, (*overrides, *extra)))


@cli.group(cls=Group)
def features() -> None:
    """Feature views: build them, or list what there is."""


@features.command("build")
@config_option
@set_option
def features_build(config_path: str | None, overrides: tuple[str, ...]) -> None:
    """Build the point-in-time features of the latest snapshot with Ray Data."""
    _step("features", _config(config_path, None, overrides))


@features.command("list")
@click.option("--format", "form", type=click.Choice(["markdown", "json"]), default="markdown", show_default=True)
def features_list(form: str) -> None:
    """All features: name, meaning, shape, unit, half-life, key and clock."""
    from maple.features.page import listing, markdown, plain
    from maple.features.spec import FeatureSpec

    groups = listing(FeatureSpec())
    click.echo(json.dumps(plain(groups), indent=1) if form == "json" else markdown(groups))


@cli.command()
@config_option
@set_option
@click.option("--fresh", is_flag=True, help="Start a new search instead of resuming an unfinished one.")
def tune(config_path: str | None, overrides: tuple[str, ...], fresh: bool) -> None:
    """Search hyper-parameters with Ray Tune on the validation part; an unfinished search goes on where it was."""
    _step("tune", _config(config_path, None, (*overrides, *(["tune.resume=false"] if fresh else []))))


@cli.command()
@config_option
@set_option
def train(config_path: str | None, overrides: tuple[str, ...]) -> None:
    """Fit the sources and the ranker on what lies before the test part."""
    _step("train", _config(config_path, None, overrides))


@cli.command()
@config_option
@set_option
def evaluate(config_path: str | None, overrides: tuple[str, ...]) -> None:
    """Measure the trained pipeline and its sources on the test part."""
    _step("evaluate", _config(config_path, None, overrides))


@cli.command()
@config_option
@set_option
@click.option("--promote/--no-promote", default=True, help="Make it champion at once.", show_default=True)
def publish(config_path: str | None, overrides: tuple[str, ...], promote: bool) -> None:
    """Refit on everything up to now, and register the result as one immutable bundle."""
    _step("publish", _config(config_path, None, (*overrides, f"publish.promote={str(promote).lower()}")))


@cli.command()
@click.argument("digest")
@click.option("--expect", type=int, default=None, help="Only if the ledger is at this generation.")
@click.option("--note", default="", help="Why; kept in the audit log.")
def promote(digest: str, expect: int | None, note: str) -> None:
    """Make a bundle (its digest, or the beginning of it) the champion."""
    from maple import operate

    _show(operate.promote(digest, expect=expect, note=note))


@cli.command()
@click.option("--note", default="", help="Why; kept in the audit log.")
def rollback(note: str) -> None:
    """Make the previous champion the champion again."""
    from maple import operate

    _show(operate.rollback(note=note))


@cli.command()
def releases() -> None:
    """The release ledger: every promotion and rollback."""
    from maple import operate

    header, rows = operate.releases()
    show_table("Releases", header, rows)


@cli.command()
@config_option
@set_option
@click.option(
    "--placement", type=click.Choice(["fused", "split"]), default=None, help="Stages in one replica, or in deployments of their own."
)
@click.option("--port", type=click.IntRange(0, 65535), default=None, help="HTTP port on 127.0.0.1; 0 chooses a free one.")
def serve(config_path: str | None, overrides: tuple[str, ...], placement: str | None, port: int | None) -> None:
    """Serve the champion on Ray Serve until Ctrl-C."""
    extra = [f"serve.placement={placement}"] if placement else []
    extra += [f"serve.port={port}"] if port is not None else []
    from maple import operate

    operate.serve_until_interrupted(_config(config_path, None, (*overrides, *extra)), console.print)


@cli.command()
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="On 127.0.0.1 only; 0 chooses a free one.")
def admin(port: int) -> None:
    """The operator's HTTP interface, a process of its own: status, promote, roll back. A running service follows."""
    from maple.cluster_ray import free_ports
    from maple.config import maple_home
    from maple.serve import admin as admin_

    chosen = port or free_ports(1)[0]
    console.print(f"admin at http://127.0.0.1:{chosen}/status, Ctrl-C ends it")
    admin_.run(maple_home(), chosen)


@cli.command()
@click.argument("user")
@click.option("-k", type=click.IntRange(1, 1000), default=10, show_default=True, help="How many.")
def recommend(user: str, k: int) -> None:
    """Recommendations for one user straight from the champion bundle, without a server."""
    from maple import operate

    header, rows, note = operate.recommend(user, k)
    show_table(f"For {user}", header, rows, note)


@cli.command()
def doctor() -> None:
    """Versions, Ray flags, ports and stores: what is here and what is wrong."""
    from maple import doctor as doctor_

    header, rows, healthy = doctor_.examine()
    show_table("Maple doctor", header, rows)
    if not healthy:
        sys.exit(1)


for group in (users, items, events, snapshots):
    cli.add_command(group)
cli.add_command(validate)
features.add_command(check)


def _config(path: str | None, data: str | None, overrides: tuple[str, ...]) -> RunConfig:
    from maple.run import run_config

    return run_config(path, data, overrides)


def _show(result: StepResult) -> None:
    for line in (result.summary, *result.details):
        console.print(line, markup=False, soft_wrap=True)


def _step(name: str, config: RunConfig) -> None:
    from maple import steps
    from maple.cli.console import step

    function, title = steps.STEPS[name]
    with step(title) as line:
        result = function(config, line.say)
        line.done(result.summary, *result.details)
    for header_title, header, rows in result.tables:
        show_table(header_title, header, rows)


def main() -> None:
    """Entry point: runs a command; a user's error is one message and exit code 1 (2 for wrong usage), a bug keeps its traceback."""
    try:
        cli(standalone_mode=False)
    except click.exceptions.Abort:
        errors.print("stopped")
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except MapleError as error:
        if os.environ.get("MAPLE_DEBUG"):
            traceback.print_exc()
        errors.print(f"[red]{type(error).__name__}[/red]: ", end="")
        errors.print(str(error), markup=False, soft_wrap=True)  # messages hold paths and pages to copy
        sys.exit(1)
    except KeyboardInterrupt:
        errors.print("stopped")
        sys.exit(130)
    finally:
        _end_cluster()


def _end_cluster() -> None:
    """End the local Ray of this command, if it started one."""
    if "maple.cluster_ray" in sys.modules:
        sys.modules["maple.cluster_ray"].stop_local()
