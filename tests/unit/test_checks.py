"""Checks of the whole: each finds what it is for, names the column, and leaves honest data alone; errors stop with everything said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from maple.data.behaviour import Rate
from maple.data.checks import Checks, run_checks, stop_on_errors
from maple.data.page import page
from maple.data.report import Finding, TableReport, ValidationReport, table_report
from maple.data.validate import Range
from maple.errors import DataError
from maple.hashing import rng
from maple.schema import TIMESTAMP

DAY = 86_400_000_000
QUIET = Checks(min_users=1, min_items=1, min_events=1)


def rows(seed: int = 0, size: int = 400, first_day: int = 0, days: int = 40, **columns: Any) -> pa.Table:
    draw = rng(seed, "rows")
    made: dict[str, Any] = {
        "event_id": [f"e{seed}-{number}" for number in range(size)],
        "user_id": [f"user-{number}" for number in draw.integers(0, 50, size)],
        "item_id": [f"item-{number}" for number in draw.integers(0, 400, size)],
        "event": draw.choice(["view", "purchase"], size, p=[0.8, 0.2]).tolist(),
        "timestamp": pa.array(first_day * DAY + draw.integers(0, days * DAY, size)).cast(TIMESTAMP),
        "price": pa.array(np.exp(draw.normal(2, 1, size)).astype(np.float32)),
        "country": draw.choice(["NL", "DE", "FR"], size).tolist(),
    }
    return pa.table({name: value for name, value in {**made, **columns}.items() if value is not None})


def report(table: pa.Table, aside: pa.Table | None = None, rules: dict[str, int] | None = None, **more: Any) -> ValidationReport:
    quarantined = aside if aside is not None else pa.table({"reason": pa.array([], pa.string())})
    return ValidationReport("shop", table_report(table, quarantined, rules or {}), 100, **more)


def found(new: ValidationReport, before: ValidationReport | None, checks: Checks = QUIET, **more: Any) -> list[tuple[str, str, str]]:
    return [(finding.check, finding.severity, finding.column) for finding in run_checks(checks, new, before, **more)]


def test_honest_data_passes_and_a_first_snapshot_says_that_it_has_no_parent() -> None:
    assert found(report(rows(1)), report(rows(2))) == []
    assert found(report(rows(1)), None) == [("parent", "info", "")]
    assert found(report(rows(1, size=40)), report(rows(2, size=4000)), replace_volume()) == []  # chance alone is no drift


def replace_volume(**more: Any) -> Checks:
    return QUIET.with_(volume="off", **more)


@pytest.mark.parametrize(
    ("columns", "wanted"),
    [
        ({"country": None}, ("missing_column", "error", "country")),
        ({"device": ["web"] * 400}, ("new_column", "info", "device")),
        ({"price": ["1.0"] * 400}, ("type_change", "error", "price")),
        ({"price": pa.nulls(400, pa.float32())}, ("all_null", "error", "price")),
        ({"price": pa.array([1.0, None] * 200, pa.float32())}, ("nulls", "warn", "price")),
        ({"country": [f"C{number % 150}" for number in range(400)]}, ("new_values", "warn", "country")),
        ({"country": [f"unique {number}" for number in range(400)]}, ("new_values", "warn", "country")),
        ({"price": pa.array(np.full(400, 100, np.float32))}, ("drift", "warn", "price")),
        ({"country": ["NL"] * 390 + ["DE"] * 10}, ("drift", "warn", "country")),
        ({"event": ["view"] * 320 + ["click"] * 80}, ("drift", "warn", "event")),
    ],
)
def test_a_mutated_column_is_named(columns: dict[str, Any], wanted: tuple[str, str, str]) -> None:
    assert wanted in found(report(rows(1, **columns)), report(rows(2)))
    assert [entry[2] for entry in found(report(rows(1, **columns)), report(rows(2)), QUIET.with_(ignore=[wanted[2]]))] == []
    off = {"missing_column", "new_column", "type_change", "all_null", "nulls", "new_values", "drift"}
    assert found(report(rows(1, **columns)), report(rows(2)), QUIET.with_(**dict.fromkeys(off, "off"))) == []


def test_columns_of_files_and_of_the_item_table_are_compared() -> None:
    before = report(rows(2), file_columns={"a": "int64", "b": "text", "c": "text"})
    now = report(rows(1), file_columns={"a": "double", "b": "text", "d": "text"})
    assert found(now, before) == [("file_columns", "warn", name) for name in "acd"]
    items = table_report(pa.table({"item_id": ["a"], "brand": ["x"]}), pa.table({"reason": pa.array([], pa.string())}), {})
    fewer = table_report(pa.table({"item_id": ["a"]}), pa.table({"reason": pa.array([], pa.string())}), {})
    assert found(replace(report(rows(1)), item_table=fewer), replace(report(rows(2)), item_table=items)) == [
        ("missing_column", "error", "brand")
    ]


def test_volume_gaps_age_and_small_data() -> None:
    parent = report(rows(2))
    assert found(report(rows(1, size=4000)), parent) == [("volume", "warn", "")]
    assert found(report(rows(1, first_day=100)), parent) == [("time_gap", "warn", "timestamp")]
    holes = report(pa.concat_tables([rows(1), rows(3, first_day=90)]))
    assert ("time_gap", "warn", "timestamp") in found(holes, None)
    aged = QUIET.with_(max_age_days=10, freshness="error")
    assert found(report(rows(1)), parent, aged, now=45 * DAY) == []
    assert found(report(rows(1)), parent, aged, now=55 * DAY) == [("freshness", "error", "timestamp")]
    assert {entry[0] for entry in found(report(rows(1, size=40)), None, Checks(min_items=200))} == {"too_few", "parent"}


def test_shares_of_quarantined_duplicate_and_ruled_rows() -> None:
    aside = pa.table({"reason": ["duplicate"] * 200 + ["bad"] * 100})
    now = report(rows(1), aside, {"bad": 100, "fast": 80})
    assert found(now, None, max_quarantined_share=0.4)[0] == ("quarantined", "error", "")
    assert found(now, None, max_quarantined_share=0.5) == [("duplicates", "warn", ""), ("parent", "info", "")]
    bad = Range(kind="range", name="bad", column="price", min=0, severity="error", max_share=0.1)
    fast = Rate(kind="rate", name="fast", events=5, severity="warn", max_share=0.2)
    assert found(now, None, QUIET.with_(duplicates="off"), rules={"bad": bad, "fast": fast}) == [
        ("bad", "error", "price"),
        ("parent", "info", ""),
    ]
    nothing = TableReport(rows_in=10, rows_quarantined=10, reasons={"bad": 10})
    assert found(ValidationReport("s", nothing, 0), None, QUIET.with_(quarantined="off"))[0][:2] == ("quarantined", "error")
    only_known = ValidationReport("s", TableReport(rows_in=10, rows_known=10), 0)
    assert found(only_known, report(rows(1))) == []


def test_errors_stop_and_say_all_of_it() -> None:
    now = report(rows(1, price=pa.nulls(400, pa.float32()), country=None), pa.table({"reason": ["bad"] * 900}), {"bad": 900})
    findings = run_checks(QUIET, now, report(rows(2)), max_quarantined_share=0.5)
    with pytest.raises(DataError, match=r"69\.2% of 1,300 rows.*bad: 900") as refused:
        stop_on_errors(findings, "source 'shop'", " For example, row 3 of a.csv.")
    for part in ("nothing was published", "[all_null] column 'price'", "[missing_column]", "'country'", "row 3 of a.csv"):
        assert part in str(refused.value)
    stop_on_errors([finding for finding in findings if finding.severity != "error"], "s")


def test_the_page_shows_findings_examples_and_the_parent_but_no_user() -> None:
    hostile = "<script>alert(1)</script>"
    now = report(rows(1, country=[hostile] * 400), pa.table({"reason": ["bad"] * 5}), {"bad": 5}, parent="20240101")
    before = report(rows(2))
    now = replace(now, findings=(*run_checks(QUIET, now, before), Finding("x", "error", "", hostile)))
    examples = pa.table(
        {
            "user_id": ["user-7"] * 5, "item_id": [f"odd-{number}" for number in range(5)], "price": [None, 1.0, 1.0, 1.0, 1.0],
            "reason": ["bad"] * 5, "file": ["shop.csv"] * 5, "row": [41, 42, 43, 44, 45],
            "unreadable": ["line: user-9,x", "price: '1..2'", None, None, None],
        }
    )  # fmt: skip
    html = page(now, before, examples).decode()
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "user-7" not in html
    assert "user-9" not in html
    assert "user-" not in html.replace("user-select", "")
    for part in ("odd-1", "odd-2", "shop.csv", ">42<", "Line: the parent.", "nothing was published", "price: &#39;1..2&#39;", "polyline"):
        assert part in html, part
    assert "odd-3" not in html  # three of a reason
    swallowed = pa.table({"reason": ["bad"], "file": ["shop.csv"], "row": [1], "unreadable": ["lines: 2 in one record: user-8"]})
    assert "user-8" not in page(now, before, swallowed).decode()
    assert "http" not in html.replace("http-equiv", "")
    alone = page(replace(report(rows(1)), findings=()), None).decode()
    assert "No check found anything" in alone
    assert "polyline" not in alone
    empty = ValidationReport("s", TableReport(), 0)
    assert b"Data report" in page(empty, None)


def test_a_batch_of_some_kinds_is_compared_with_the_same_kinds_of_the_parent() -> None:
    kinds = ["view"] * 300 + ["purchase"] * 100
    prices = pa.array([None] * 300 + [2.0] * 100, pa.float32())
    parent = report(rows(2, event=kinds, price=prices))
    clicks = report(rows(1, event=["view"] * 400, price=pa.nulls(400, pa.float32())))
    assert ("all_null", "error", "price") in found(clicks, parent)  # everything anew
    assert {level for _, level, _ in found(clicks, parent, append=True)} <= {"info"}
    assert {level for _, level, _ in found(report(rows(1, event=["view"] * 400, price=None)), parent, append=True)} <= {"info"}
    bought = report(rows(1, event=["purchase"] * 400, price=pa.nulls(400, pa.float32())))
    assert ("all_null", "error", "price") in found(bought, parent, append=True)
    assert ("missing_column", "error", "price") in found(report(rows(1, event=["purchase"] * 400, price=None)), parent, append=True)
    few = report(rows(1, size=20, event=["purchase"] * 20, price=pa.nulls(20, pa.float32())))
    assert ("all_null", "warn", "price") in found(few, parent, append=True)


def test_a_small_batch_is_not_stopped_by_shares() -> None:
    parent = report(rows(2))
    some_bad = report(rows(1, size=2), pa.table({"reason": ["bad"] * 3}), {"bad": 3})
    assert found(some_bad, parent, max_quarantined_share=0.2)[0] == ("quarantined", "error", "")
    assert ("quarantined", "warn", "") in found(some_bad, parent, max_quarantined_share=0.2, append=True)
    assert ("quarantined", "error", "") in found(some_bad, parent, QUIET.with_(min_rows=5), max_quarantined_share=0.2, append=True)
    strict = QUIET.with_(drift="error")
    moved = report(rows(1, size=90, country=["NL"] * 90))
    assert ("drift", "error", "country") in found(moved, parent, strict)
    assert ("drift", "warn", "country") in found(moved, parent, strict, append=True)


def test_what_was_bought_and_returned_is_no_bad_row() -> None:
    parent = report(rows(2))
    taken_back = ValidationReport("s", TableReport(rows_in=1, rows_quarantined=1, reasons={"netted": 1}), 0)
    assert found(taken_back, parent, append=True) == []
    half = report(rows(1), pa.table({"reason": ["netted"] * 400}))
    assert not [entry for entry in found(half, parent, max_quarantined_share=0.1) if entry[0] == "quarantined"]
    all_bad = ValidationReport("s", TableReport(rows_in=1, rows_quarantined=1, reasons={"bad": 1}), 0)
    assert found(all_bad, parent, append=True)[0][:2] == ("quarantined", "error")


def test_days_without_events_are_those_of_parent_and_batch_together() -> None:
    parent = report(rows(2, first_day=100, days=200))
    late = report(pa.concat_tables([rows(1, size=3, first_day=110, days=1), rows(3, first_day=300, days=10)]))
    assert ("time_gap", "warn", "timestamp") in found(late, parent)
    assert not [entry for entry in found(late, parent, append=True) if entry[0] == "time_gap"]
    assert ("time_gap", "warn", "timestamp") in found(report(rows(1, first_day=400)), parent, append=True)
    holes = report(pa.concat_tables([rows(4, first_day=0, days=10), rows(2, first_day=100, days=200)]))  # told when it was ingested
    assert not [entry for entry in found(report(rows(1, first_day=300)), holes, append=True) if entry[0] == "time_gap"]


def test_a_column_without_values_or_of_another_distribution_says_where_its_rows_are_from() -> None:
    files = ["a.csv"] * 300 + ["b.csv"] * 100
    aside = pa.table({"reason": pa.array([], pa.string()), "_file": pa.array([], pa.string())})
    for column in ({"price": pa.nulls(400, pa.float32())}, {"country": ["NL"] * 390 + ["DE"] * 10}):
        findings = run_checks(QUIET, report(rows(1, _file=files, **column), aside), report(rows(2)))
        assert "The rows are from a.csv (300), b.csv (100), 1970-01-01 to 1970-02-" in findings[0].message
