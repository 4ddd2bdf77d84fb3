"""Stitching: components against a slow reference in any order; twice is once; an edge taken back is undone; strangers stay apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from maple.artifacts import Place
from maple.data.identity import Stitching, read_identities
from maple.data.sources import TableSource

Edge = tuple[str, str]
EDGES = st.lists(st.tuples(st.sampled_from(["d1", "d2", "d3", "d4", "u2"]), st.sampled_from(["u1", "u2", "u3", "u4", "a9"])), max_size=9)


def table(edges: list[Edge]) -> pa.Table:
    return pa.table(
        {"device_id": pa.array([one for one, _ in edges], pa.string()), "user_id": pa.array([two for _, two in edges], pa.string())}
    )


def slow(edges: list[Edge], max_component: int, max_users: int) -> dict[str, str]:
    """Grow components one id at a time."""
    users = {user for _, user in edges}
    crowded = {device for device, _ in edges if len({user for other, user in edges if other == device}) > max_users}
    links = [edge for edge in edges if edge[0] not in crowded]
    out = {}
    for start in {name for edge in edges for name in edge}:
        part = {start}
        while True:
            more = part | {name for edge in links if part & set(edge) for name in edge}
            if more == part:
                break
            part = more
        real = part & users
        whole = len(part) <= max_component and len(real) <= max_users and real
        out[start] = min(real) if whole else start
    return out


@settings(max_examples=60)
@given(edges=EDGES, seed=st.integers(0, 99), max_component=st.integers(2, 6), max_users=st.integers(1, 4))
def test_components_equal_a_slow_reference_in_any_order(edges: list[Edge], seed: int, max_component: int, max_users: int) -> None:
    expected = slow(edges, max_component, max_users)
    order = np.random.default_rng(seed).permutation(len(edges))
    names = pa.array([*expected, "stranger", None], pa.string())
    for arranged in (edges, [edges[place] for place in order] + edges[:2]):
        made = Stitching.of(table(arranged), max_component=max_component, max_users=max_users)
        found = made.apply(names)
        assert found.to_pylist() == [*expected.values(), "stranger", None]
        assert made.apply(found).equals(found)  # who was renamed is not renamed again
        assert made.ids.to_pylist() == sorted(name for name, target in expected.items() if target != name)


@settings(max_examples=40)
@given(before=EDGES, more=EDGES)
def test_an_edge_taken_back_undoes_what_it_did(before: list[Edge], more: list[Edge]) -> None:
    old, new, again = (Stitching.of(table(edges)) for edges in (before, before + more, before))
    everyone = pa.array(sorted({name for edge in before + more for name in edge}), pa.string())
    moved = set(new.changes(old).to_pylist())
    assert moved == {
        name
        for name, one, two in zip(everyone.to_pylist(), *(s.apply(everyone).to_pylist() for s in (old, new)), strict=True)
        if one != two
    }
    assert again.changes(old).to_pylist() == []
    assert again.apply(everyone).equals(old.apply(everyone))


def test_a_kiosk_merges_nobody_and_breaks_no_telephone() -> None:
    edges = [("phone", "ann"), ("laptop", "ann"), ("phone2", "bob"), *(("kiosk", name) for name in ("ann", "bob", "cyd", "dan"))]
    made = Stitching.of(table(edges), max_users=3)
    ids = pa.array(["phone", "laptop", "phone2", "kiosk", "ann", "bob"])
    assert made.apply(ids).to_pylist() == ["ann", "ann", "bob", "kiosk", "ann", "bob"]
    assert made.shared.to_pylist() == ["kiosk"]
    assert made.members(pa.array(["ann", "cyd"])).to_pylist() == ["ann", "cyd", "laptop", "phone"]
    chain = [(f"d{n}", f"u{n}") for n in range(5)] + [(f"d{n}", f"u{n + 1}") for n in range(4)]
    long = Stitching.of(table(chain), max_users=3)
    assert len(long.ids) == 0
    assert len(long.unmerged) == 10
    assert any("10 id(s) hang together" in line for line in long.lines())
    assert Stitching.of(table(chain), max_users=5).apply(pa.array(["u4", "d3"])).to_pylist() == ["u0", "u0"]


def test_edges_are_read_and_judged(tmp_path: Path) -> None:
    (tmp_path / "ids.csv").write_text("cookie,client\nc1,7\nc1,7\nc2,\nc3,8\n,9\nc1,8\n")
    source = TableSource.parse({"path": "ids.csv", "columns": {"device_id": "cookie", "user_id": "client"}}, "test")
    found = read_identities(source, Place.at(tmp_path))
    assert found.clean.select(["device_id", "user_id"]).to_pylist() == [
        {"device_id": one, "user_id": two} for one, two in (("c1", "7"), ("c1", "7"), ("c3", "8"), ("c1", "8"))
    ]
    assert found.reasons == {"required:device_id": 1, "required:user_id": 1}
    assert Stitching.of(found.clean).apply(pa.array(["c1", "c3", "8"])).to_pylist() == ["7", "7", "7"]
