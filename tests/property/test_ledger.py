"""The release ledger under random changes (against a list-based reference) and under two processes that change it at once."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maple.artifacts import Place, seal, write_file
from maple.errors import ServeError
from maple.train.release import Ledger, stack


def make_bundles(home: Path, count: int) -> list[str]:
    digests = []
    for number in range(count):
        draft = Place.at(home / f"draft{number}")
        digest = seal(draft, "bundle", {"number": number}, [write_file(draft, "a", b"x")]).digest
        (home / "bundles").mkdir(parents=True, exist_ok=True)
        os.replace(draft.path, home / "bundles" / digest)
        digests.append(digest)
    return digests


CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("promote"), st.integers(0, 2)),
        st.tuples(st.just("rollback"), st.just(0)),
        st.tuples(st.just("shadow"), st.one_of(st.none(), st.integers(0, 2))),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(CHANGES)
def test_the_ledger_is_a_stack_of_champions_and_a_shadow(changes: list[tuple[str, int | None]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        digests = make_bundles(Path(folder), 3)
        ledger = Ledger.open(folder, f"{folder}/releases")
        champions: list[str] = []
        shadow: str | None = None
        written = 0
        for action, which in changes:
            digest = None if which is None else digests[which]
            before = (list(champions), shadow)
            legal = True
            if action == "promote":
                assert digest is not None
                if champions[-1:] != [digest]:
                    champions.append(digest)
                    shadow = None if shadow == digest else shadow
            elif action == "rollback":
                legal = len(champions) > 1
                champions = champions[:-1] if legal else champions
            else:
                legal = digest is None or champions[-1:] != [digest]
                shadow = digest if legal else shadow
            try:
                if action == "promote":
                    ledger.promote(digest or "")
                elif action == "rollback":
                    ledger.rollback()
                else:
                    ledger.set_shadow(digest)
                assert legal
            except ServeError:
                assert not legal
            written += (champions, shadow) != before
            now = ledger.read()
            assert now.generation == written
            assert now.champion == (champions[-1] if champions else None)
            assert now.previous == (champions[-2] if len(champions) > 1 else None)
            assert now.shadow == shadow
            assert stack(ledger.history()) == champions
        assert [record.generation for record in ledger.history()] == list(range(1, written + 1))


def _promote_many(home: str, digests: list[str], who: str, start: object, out: object) -> None:
    """Each round: look, then promote upon what was seen. Reports (generation won, or None) per attempt."""
    ledger = Ledger.open(home, f"{home}/releases")
    start.wait()  # type: ignore[attr-defined]
    won: list[int] = []
    lost = 0
    while len(won) < 100:
        seen = ledger.read()
        digest = digests[0] if seen.champion != digests[0] else digests[1]
        try:
            won.append(ledger.promote(digest, expected_generation=seen.generation, by=who).generation)
        except ServeError:
            lost += 1
    out.put((who, won, lost))  # type: ignore[attr-defined]


def test_of_two_concurrent_promotions_exactly_one_wins(tmp_path: Path) -> None:
    digests = make_bundles(tmp_path, 4)
    context = multiprocessing.get_context("spawn")
    start, out = context.Barrier(2), context.Queue()
    workers = [
        context.Process(target=_promote_many, args=(str(tmp_path), digests[2 * who : 2 * who + 2], f"p{who}", start, out))
        for who in range(2)
    ]
    for worker in workers:
        worker.start()
    results = [out.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    won = {who: generations for who, generations, _ in results}
    # No update is lost and none is won twice: the generations are 1..200, each with the winner that believes it won.
    assert sorted(won["p0"] + won["p1"]) == list(range(1, 201))
    history = Ledger.open(tmp_path, tmp_path / "releases").history()
    assert [record.generation for record in history] == list(range(1, 201))
    for record in history:
        assert record.generation in won[record.by]
    for before, after in itertools.pairwise(history):
        assert after.previous == before.champion
    assert not list((tmp_path / "releases").glob("*.tmp"))


def _race(home: str, digests: list[str], who: int, start: object, out: object) -> None:
    ledger = Ledger.open(home, f"{home}/releases")
    for expected in range(50):
        start.wait()  # type: ignore[attr-defined]
        digest = digests[2 * who + expected % 2]
        try:
            ledger.promote(digest, expected_generation=expected)
            out.put((expected, True))  # type: ignore[attr-defined]
        except ServeError:
            out.put((expected, False))  # type: ignore[attr-defined]


def test_both_race_for_each_generation_and_one_gets_it(tmp_path: Path) -> None:
    digests = make_bundles(tmp_path, 4)
    context = multiprocessing.get_context("spawn")
    start, out = context.Barrier(2), context.Queue()
    workers = [context.Process(target=_race, args=(str(tmp_path), digests, who, start, out)) for who in range(2)]
    for worker in workers:
        worker.start()
    tried = [out.get(timeout=120) for _ in range(100)]
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    assert sorted(expected for expected, won in tried if won) == list(range(50))
    assert sorted(expected for expected, won in tried if not won) == list(range(50))
