"""Rules: what each kind fires on, who names the reason, what conversion changes, and the gate."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pytest
from pydantic import TypeAdapter

from maple.data.profile import Profile
from maple.data.report import Finding, TableReport, ValidationReport
from maple.data.validate import AnyRule, Rule, complete, judge, rule_name, validate_events
from maple.errors import ConfigError
from maple.schema import TIMESTAMP

NOW = int(datetime(2024, 1, 2, tzinfo=UTC).timestamp() * 1e6)
CATALOGUE = pa.table({"item_id": ["a", "free"], "price": pa.array([2.0, None], pa.float32())})


def rules(*plain: dict[str, Any]) -> list[AnyRule]:
    return TypeAdapter(list[Rule]).validate_python(list(plain))


def table(**columns: Any) -> pa.Table:
    types = {"value": pa.float32(), "price": pa.float32(), "timestamp": TIMESTAMP}
    return pa.table({name: pa.array(values, types.get(name, pa.string())) for name, values in columns.items()})


@pytest.mark.parametrize(
    ("rule", "column", "values", "fires"),
    [
        ({"kind": "pattern", "column": "x", "matches": "^C"}, "x", ["C1", "1C", "", None], [1, 0, 0, 0]),
        ({"kind": "pattern", "column": "x", "lacks": r"^\d{5}"}, "x", ["12345", "12345A", "POST", "1234", None], [0, 0, 1, 1, 0]),
        ({"kind": "range", "column": "price", "min": 0, "exclusive": True}, "price", [0.0, 0.1, -1.0, None], [1, 0, 1, 0]),
        ({"kind": "range", "column": "price", "min": 0, "max": 10}, "price", [0.0, 10.0, 10.5, -0.5], [0, 0, 1, 1]),
        ({"kind": "range", "column": "price", "max": 10, "exclusive": True}, "price", [9.9, 10.0], [0, 1]),
        ({"kind": "required", "column": "x"}, "x", ["a", "", "  ", None], [0, 1, 1, 1]),
        ({"kind": "required", "column": "price"}, "price", [0.0, float("nan"), None], [0, 1, 1]),
        ({"kind": "legal_id", "column": "x"}, "x", ["ok", "a\nb", "x" * 257, "é" * 128, "a\u2028b", None], [0, 1, 1, 0, 1, 0]),
        ({"kind": "in_catalogue"}, "item_id", ["a", "b", None], [0, 1, 0]),
        ({"kind": "known_event"}, "event", ["purchase", "hover", None], [0, 1, 0]),
        ({"kind": "future", "hours": 24}, "timestamp", [NOW, NOW + 86_400_000_000, NOW + 86_400_000_001, None], [0, 0, 1, 0]),
        ({"kind": "repeated", "column": "x"}, "x", ["a", "b", "a", None, None, "a"], [0, 0, 1, 0, 0, 1]),
    ],
)
def test_kinds_fire_where_they_should(rule: dict[str, Any], column: str, values: list[Any], fires: list[int]) -> None:
    judged = judge(table(**{column: values}), rules(rule), catalogue=CATALOGUE, now=NOW)
    assert judged.fired.tolist() == fires
    assert (judged.reason == 0).astype(int).tolist() == fires


def test_the_first_rule_names_the_reason_and_every_rule_counts() -> None:
    rows = table(item_id=["POST", "12345", "POST"], user_id=[None, None, "u"])
    found = validate_events(
        rows,
        rules(
            {"name": "code", "kind": "pattern", "column": "item_id", "lacks": r"^\d{5}"},
            {"name": "customer", "kind": "required", "column": "user_id"},
        ),
    )
    assert found.clean.num_rows == 0
    assert found.quarantined["reason"].to_pylist() == ["code", "customer", "code"]
    assert found.counts == {"code": 2, "customer": 2}
    assert found.reasons == {"code": 2, "customer": 1}


def test_conversion_relabels_clean_rows_and_later_rules_see_it() -> None:
    rows = table(session_id=["C1", "2", "3", "C4"], event=["purchase"] * 4, value=[-2.0, 3.0, -1.0, -5.0], price=[1.0, 1.0, 1.0, 0.0])
    found = validate_events(
        rows,
        rules(
            {"name": "cancelled", "kind": "pattern", "column": "session_id", "matches": "^C", "action": "convert", "to": "return"},
            {"name": "free", "kind": "range", "column": "price", "min": 0, "exclusive": True},
            {"name": "negative", "kind": "range", "column": "value", "min": 0, "exclusive": True, "events": ["purchase"]},
            {"name": "large", "kind": "range", "column": "value", "max": 2.5, "action": "note"},
        ),
    )
    assert found.clean.to_pylist() == [
        {"session_id": "C1", "event": "return", "value": 2.0, "price": 1.0},
        {"session_id": "2", "event": "purchase", "value": 3.0, "price": 1.0},
    ]
    assert found.quarantined.to_pylist() == [
        {"session_id": "3", "event": "purchase", "value": -1.0, "price": 1.0, "reason": "negative"},
        {"session_id": "C4", "event": "purchase", "value": -5.0, "price": 0.0, "reason": "free"},
    ]
    assert found.counts == {"cancelled": 2, "free": 1, "negative": 1, "large": 2}


def test_built_in_rules_frame_the_declared_ones_without_doubling_them() -> None:
    declared = rules(
        {"name": "missing_customer", "kind": "required", "column": "user_id"}, {"kind": "future", "hours": 0, "action": "note"}
    )
    done = complete([declared[0]], ("user_id", "item_id"), events=True)
    kinds = [(rule.kind, rule.column) for rule in done]
    assert kinds[:2] == [("unreadable", "_unreadable"), ("required", "user_id")]
    assert kinds.count(("required", "user_id")) == 1
    assert ("legal_id", "user_id") in kinds
    assert ("required", "timestamp") in kinds
    with pytest.raises(ConfigError, match="used twice"):
        complete(declared, ("user_id", "item_id"), events=True)  # the note and the built-in rule share a name
    with pytest.raises(ConfigError, match="reserved"):
        complete(rules({"name": "duplicate", "kind": "required", "column": "x"}), ("user_id",), events=True)


def test_a_rule_about_an_unknown_column_or_type_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"unknown column 'prise'\. Did you mean 'price'"):
        validate_events(table(price=[1.0]), rules({"kind": "range", "column": "prise", "min": 0}))
    with pytest.raises(ConfigError, match="cannot judge column 'price'"):
        validate_events(table(price=[1.0]), rules({"kind": "pattern", "column": "price", "matches": "x"}))
    with pytest.raises(ConfigError, match="needs an item table"):
        validate_events(table(item_id=["a"]), rules({"kind": "in_catalogue"}))


def test_reports_merge_by_adding_and_survive_json() -> None:
    one = TableReport(3, 2, 1, {"a": 1}, {"a": 1, "b": 0}, {"price": 2}, {"f": 3}, {"view": 2}, 1, 10, 20)
    two = TableReport(5, 5, 0, {}, {"a": 0, "b": 4}, {"price": 0}, {"f": 1, "g": 4}, {"view": 4, "click": 1}, 2, 5, 15)
    both = TableReport.merge([one, two])
    assert both == TableReport(
        8, 7, 1, {"a": 1}, {"a": 1, "b": 4}, {"price": 2}, {"f": 4, "g": 4}, {"click": 1, "view": 6}, 3, 5, 20
    )  # fmt: skip
    profile = Profile.of(table(user_id=["u", "u"], price=[1.0, None], timestamp=[NOW, NOW + 1]))
    whole = TableReport(rows_in=2, rows_clean=2, profile=profile)
    finding = Finding("drift", "warn", "price", "the price moved", 0.3, 0.25)
    report = ValidationReport("s", both, 4, item_table=one, user_table=whole, parent="p", file_columns={"a": "text"}, findings=(finding,))
    assert ValidationReport.of(json.loads(json.dumps(report.plain()))) == report
    assert report.lines()[-1] == "  warn: the price moved"
    parts = [TableReport(rows_in=7, rows_clean=1, rows_quarantined=1, rows_known=3, rows_deleted=2), TableReport(rows_known=1, rows_in=1)]
    line = ValidationReport("s", TableReport.merge(parts), 1).lines()[0]
    assert "8 rows in = 1 clean + 1 quarantined (50.0%) + 4 known already + 2 of deleted users" in line
    assert any("8 rows in = 7 clean + 1 quarantined" in line for line in report.lines())


@pytest.mark.parametrize(
    ("item", "price", "fires"),
    [("a", 2.0, False), ("a", 20.0, False), ("a", 20.1, True), ("a", 0.21, False), ("a", 0.19, True), ("a", None, False),
     ("a", -25.0, True), ("free", 1e9, False), ("unknown", 1e9, False)],
)  # fmt: skip
def test_a_price_is_an_outlier_against_the_catalogue(item: str, price: float | None, fires: bool) -> None:
    judged = judge(table(item_id=[item], price=[price]), rules({"kind": "outlier", "times": 10}), catalogue=CATALOGUE)
    assert bool(judged.fired[0]) is fires


def test_a_quantity_is_an_outlier_against_the_parent_only() -> None:
    declared = rules({"kind": "outlier", "column": "value", "against": "parent", "times": 2})
    rows = table(user_id=["u"] * 3, item_id=["a"] * 3, value=[9.0, -50.0, None])
    alone = {rule_name(rule): rule for rule in complete(declared, ("user_id",), events=False)}
    assert not judge(rows, [alone["outlier:value"]]).fired.any()
    parent = Profile.of(table(value=[1.0] * 995 + [5.0] * 5))  # the 99.9 % quantile lies in the bin of 5: 5 to 6
    known = {rule_name(rule): rule for rule in complete(declared, ("user_id",), events=False, parent=parent)}
    assert judge(rows, [known["outlier:value"]]).fired.astype(bool).tolist() == [False, True, False]
    with pytest.raises(ValueError, match="only knows prices"):
        rules({"kind": "outlier", "column": "value"})
