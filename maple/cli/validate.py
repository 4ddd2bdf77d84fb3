"""``maple validate``: what an ingestion would find, without publishing anything; ``maple features check``: leaks in finished features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from maple.cli.console import console, step
from maple.cli.console import table as show_table
from maple.config import maple_home
from maple.errors import DataError

if TYPE_CHECKING:
    from maple.data.report import Finding


@click.command()
@click.argument("source")
@click.option(
    "--page", "page_path", type=click.Path(dir_okay=False), default="maple-data.html", show_default=True, help="Where the page goes."
)
def validate(source: str, page_path: str) -> None:
    """Judge a source's rows and run its checks, and publish nothing: a preset name, a folder of data, or a source YAML.

    It compares with the latest snapshot of the same source. Exit code 1 where an ingestion would be refused.
    """
    from maple.artifacts import Place
    from maple.data.checks import stop_on_errors
    from maple.data.ingest import dry_run
    from maple.data.page import page
    from maple.data.presets import load_source

    config, root = load_source(source)
    with step("Validate") as line:
        line.say(f"judging the rows of {config.name!r}")
        found = dry_run(config, root, Place.at(maple_home()))
        Path(page_path).write_bytes(page(found.report, found.before, found.examples))
        line.done(f"page written to {page_path}")
    for text in found.report.lines()[: -len(found.report.findings) or None]:
        console.print(text, markup=False, soft_wrap=True)
    _show(found.report.findings)
    stop_on_errors(found.report.findings, f"source {config.name!r}")


@click.command()
@click.option("--rows", type=click.IntRange(1, 100_000), default=400, show_default=True, help="How many feature rows are computed again.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sample.")
def check(rows: int, seed: int) -> None:
    """Look for leaks in the latest features: rows and ticks that saw their future, columns that give away what was taken."""
    from maple.artifacts import Place
    from maple.data.snapshot import Snapshot
    from maple.features.build import FeatureArtifact
    from maple.features.leakage import check_features

    home = Place.at(maple_home())
    snapshot, built = Snapshot.open(home), FeatureArtifact.open(home)
    if built.snapshot_digest != snapshot.digest:
        raise DataError("the latest features were built from another snapshot; run `maple features build`")
    with step("Check features") as line:
        line.say(f"computing {rows:,} rows of {built.name} again")
        found = check_features(built, snapshot, rows=rows, seed=seed)
        line.done(f"{len(built.spec.columns)} columns, {len(found)} finding{'s' * (len(found) != 1)}")
    _show(found)
    if any(finding.severity == "error" for finding in found):
        raise DataError("the features leak, see above: a model that learns from them fails when it serves. Repair the view, build again.")


def _show(findings: Sequence[Finding]) -> None:
    if findings:
        rows = [[finding.severity, finding.check, finding.column or "-", finding.message] for finding in findings]
        show_table("Findings", ["severity", "check", "column", "what"], rows)
