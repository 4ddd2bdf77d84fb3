"""Fault 38: a shop's export changes under a running platform; what breaks training is refused, the rest is told, the old model stays.

A good release is made first: a snapshot of Parquet files, and a champion in the ledger. Then every mutation of the files is ingested as a
new version of the same source, by the same function as the command line's. An export that must be refused gives a typed error that names
the column; one that may pass gives a finding that names it. Afterwards the latest snapshot of a refused export and the champion are what
they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from faults import Outcome

from maple.artifacts import Place, latest
from maple.data.ingest import ingest_local
from maple.data.snapshot import Snapshot
from maple.data.sources import SourceConfig
from maple.data.splits import Boundaries
from maple.errors import MapleError
from maple.hashing import rng
from maple.recommend.bundle import load
from maple.recommend.settings import PipelineSettings
from maple.schema import TIMESTAMP
from maple.train.fit import fit_pipeline
from maple.train.release import Ledger

ROWS, USERS, ITEMS = 20_000, 500, 300
SOURCE: dict[str, Any] = {
    "name": "shop",
    "events": {
        "path": "events.parquet",
        "columns": {"user_id": "customer", "item_id": "sku", "timestamp": "at", "event": "kind", "price": "price", "value": "quantity"},
        "keep": ["country"],
    },
}
Promise = Literal["refused", "told"]


@dataclass(frozen=True)
class Mutation:
    """A change of the export: what becomes of its columns (None = dropped), the column a message must name, and what is promised."""

    name: str
    columns: Mapping[str, pa.Array | None]
    named: str
    promise: Promise


def export(seed: int, rows: int = ROWS) -> dict[str, pa.Array]:
    """The columns of a healthy day."""
    draw = rng(seed, "faults/drift")
    start = 1_700_000_000_000_000
    return {
        "customer": pa.array([f"c{number}" for number in draw.integers(0, USERS, rows)]),
        "sku": pa.array([f"s{number}" for number in np.minimum(draw.zipf(1.3, rows), ITEMS)]),
        "at": pa.array(start + draw.integers(0, 90 * 86_400_000_000, rows)).cast(TIMESTAMP),
        "kind": pa.array(draw.choice(["view", "add_to_cart", "purchase"], rows, p=[0.7, 0.1, 0.2])),
        "price": pa.array(np.round(np.exp(draw.normal(2.5, 0.8, rows)), 2)),
        "quantity": pa.array(draw.integers(1, 5, rows).astype(np.float64)),
        "country": pa.array(draw.choice(["NL", "DE", "BE", "FR"], rows)),
    }


def mutations(seed: int) -> list[Mutation]:
    """Every kind of change: of columns, types, values."""
    healthy = export(seed)
    price = np.asarray(healthy["price"])
    kinds = np.asarray(healthy["kind"].to_pylist(), dtype=object)
    odd = rng(seed, "faults/odd").choice(len(kinds), 14_000, replace=False)
    hover = kinds.copy()
    hover[odd] = [f"kind-{number}" for number in range(len(odd))]
    return [
        Mutation("a new column", {"loyalty": pa.array(["gold"] * ROWS)}, "loyalty", "told"),
        Mutation("a column that is mapped is missing", {"price": None}, "price", "refused"),
        Mutation("a kept column is missing", {"country": None}, "country", "refused"),
        Mutation("numbers became words", {"price": pa.array([f"{value:.2f} EUR" for value in price])}, "price", "refused"),
        Mutation("a kept text became a number", {"country": pa.array(np.arange(ROWS) % 4)}, "country", "refused"),
        Mutation("numbers became another width", {"price": pa.array(price, pa.float32())}, "price", "told"),
        Mutation("a column is 100 % null", {"price": pa.nulls(ROWS, pa.float64())}, "price", "refused"),
        Mutation("a kept column is 100 % null", {"country": pa.nulls(ROWS, pa.string())}, "country", "refused"),
        Mutation("a key is 100 % null", {"customer": pa.nulls(ROWS, pa.string())}, "user_id", "refused"),
        Mutation("event kinds explode", {"kind": pa.array(hover.tolist())}, "event", "refused"),
        Mutation("an enumeration explodes", {"country": pa.array([f"X{number % 190}" for number in range(ROWS)])}, "country", "told"),
        Mutation("prices in cents", {"price": pa.array(price * 100)}, "price", "told"),
        Mutation("half of a column is missing", {"price": pa.array(price, mask=np.arange(ROWS) % 2 == 0)}, "price", "told"),
        Mutation("one country only", {"country": pa.array(["NL"] * ROWS)}, "country", "told"),
    ]


def fault_38(scratch: Path) -> Outcome:
    """Schema drift: new and missing columns, types, 100 % null, an enumeration that explodes"""
    data, home = scratch / "data", Place.at(scratch / "home")
    data.mkdir(parents=True)
    healthy = export(1)
    champion = _release(home, data, healthy)
    wrong: list[str] = []
    refused = told = 0
    for mutation in mutations(2):
        before = latest(home, "snapshot")
        changed = {name: column for name, column in {**export(2), **mutation.columns}.items() if column is not None}
        _write(data, changed)
        message, kind = _ingest(home, data)
        if kind != mutation.promise or not any(sign in message for sign in _signs(mutation.named)):
            wrong.append(f"{mutation.name}: {kind}, {message[:160]!r}")
        if kind == "refused" and latest(home, "snapshot") != before:
            wrong.append(f"{mutation.name}: refused, and yet the latest snapshot is another one")
        if kind == "told":  # a passed export is taken back, so that every mutation is compared with the healthy one
            _write(data, healthy)
            _ingest(home, data)
        if _champion(home) != champion:
            wrong.append(f"{mutation.name}: the champion is another one")
        refused, told = refused + (kind == "refused"), told + (kind == "told")
    _write(data, export(3))
    message, kind = _ingest(home, data)
    if kind != "told" or any(sign in message for sign in ("drift", "missing", "all_null", "new_values", "type_change")):
        wrong.append(f"a healthy export: {kind}, {message[:160]!r}")
    expected = (
        "8 exports refused and 6 told of, each message names the column; latest snapshot and champion as they were; a healthy one passes"
    )
    return Outcome(
        not wrong and (refused, told) == (8, 6), expected, "; ".join(wrong) or f"{refused} refused, {told} told of, all as promised"
    )


def _signs(column: str) -> tuple[str, ...]:
    """How a message names a column: in quotes, in the name of a rule, or in an example row."""
    return repr(column), f":{column}", f" {column}="


def _write(data: Path, columns: Mapping[str, pa.Array]) -> None:
    pq.write_table(pa.table(dict(columns)), data / "events.parquet")


def _ingest(home: Place, data: Path) -> tuple[str, str]:
    """What the ingestion says, and whether it was refused, told something, or ended in a way that nobody promised."""
    try:
        snapshot = ingest_local(SourceConfig.parse(SOURCE, "source"), Place.at(data), home, rows_per_bucket=10_000)
    except MapleError as error:
        return str(error), "refused"
    return " ".join(finding.message for finding in snapshot.report().findings), "told"


def _release(home: Place, data: Path, columns: Mapping[str, pa.Array]) -> str:
    """A snapshot of a healthy export, a pipeline fitted on it, and its promotion; the champion's digest."""
    _write(data, columns)
    _ingest(home, data)
    known = Snapshot.open(home)
    settings = PipelineSettings.parse({"sources": [{"name": "popular", "model": "popularity"}], "ranker": None}, "pipeline")
    dataset = known.dataset()
    first, last = dataset.span
    cut = Boundaries(first + (last - first) // 2, last + 1)
    fitted = fit_pipeline(dataset, settings, cut, fingerprint=known.digest, say=lambda line: None)
    Ledger.open(home).promote(fitted.bundle.save(home), note="a good release")
    return _champion(home)


def _champion(home: Place) -> str:
    """The champion's digest, after its bundle was opened and every byte of it checked."""
    digest = Ledger.open(home).champion().champion
    assert digest is not None, "there is a champion"
    load(home, digest)
    return digest
