"""What every split promises, however it parts the log."""

from __future__ import annotations

import json
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pytest

from maple.data.dataset import Dataset
from maple.data.folds import CONTEXT, PARTS, TEST, TRAIN, UNUSED, VALID, Fold, Split, folds_of
from maple.schema import TIMESTAMP

DAY = 86_400_000_000


def shop(users: int = 40, count: int = 1500, seed: int = 0, per_day: int = 8) -> Dataset:
    """Views and purchases over 200 days, on a coarse clock, so that many events share an instant; some users do almost nothing."""
    draw = np.random.default_rng(seed)
    user = np.minimum(draw.geometric(2.5 / users, count) - 1, users - 1)
    events = pa.table(
        {
            "event_id": [f"{number:05d}" for number in draw.permutation(count)],
            "user_id": [f"u{number:02d}" for number in user],
            "item_id": [f"i{number:02d}" for number in draw.integers(30, size=count)],
            "event": pa.array(np.where(draw.random(count) < 0.4, "view", "purchase")),
            "timestamp": pa.array(draw.integers(200 * per_day, size=count) * (DAY // per_day)).cast(TIMESTAMP),
            "value": pa.nulls(count, pa.float32()),
            "price": pa.array(np.arange(count), pa.float32()),  # numbers the rows
        }
    )
    return Dataset.from_tables(events)


class SplitSuite:
    """Subclasses give ``split`` and say what it promises of time."""

    split: ClassVar[Split]
    num_folds: ClassVar[int] = 1
    validates: ClassVar[bool] = True
    #: Nothing that is learned from happens after anything that is asked for, whoever did it.
    global_time: ClassVar[bool] = False
    #: Nothing that is shown of a user happens after what is asked of them.
    own_time: ClassVar[bool] = True

    @pytest.fixture
    def data(self) -> Dataset:
        return shop()

    @pytest.fixture
    def folds(self, data: Dataset) -> list[Fold]:
        return folds_of(data, self.split)

    def questions(self) -> list[str]:
        return ["valid", "test"] if self.validates else ["test"]

    def test_every_row_has_one_label(self, folds: list[Fold]) -> None:
        assert len(folds) == self.num_folds
        for fold in folds:
            assert fold.parts.shape == (len(fold.data.log),)
            assert np.isin(fold.parts, range(len(PARTS))).all()
            counts = [int((fold.parts == code).sum()) for code in range(len(PARTS))]
            assert dict(zip(PARTS, counts, strict=True)) == fold.facts["rows"]
            assert sum(counts) == len(fold.data.log)
            assert counts[TRAIN] > 0
            assert counts[TEST] > 0

    def test_the_log_stays_whole(self, data: Dataset, folds: list[Fold]) -> None:
        for fold in folds:
            assert np.array_equal(fold.data.log.item, data.log.item)
            assert np.array_equal(fold.data.log.time, data.log.time)

    def test_a_question_shows_and_learns_nothing_of_what_it_asks_for(self, folds: list[Fold]) -> None:
        for fold in folds:
            for part in self.questions():
                asked = fold.question(part)  # type: ignore[arg-type]
                assert len(asked.users) == len(asked.now) == len(np.unique(asked.users)) > 0
                assert set(asked.users.tolist()) <= set(asked.wanted.log.user.tolist())
                keys = [_keys(one) for one in (asked.fit, asked.visible, asked.wanted)]
                assert not keys[0] & keys[2]
                assert not keys[1] & keys[2]
                held = np.isin(asked.visible.log.user, asked.users)
                now = np.full(len(fold.data.users), -1)
                now[asked.users] = asked.now
                assert (asked.visible.log.time[held] < now[asked.visible.log.user[held]]).all()

    def test_time_is_respected_where_promised(self, folds: list[Fold]) -> None:
        for fold in folds:
            for part in self.questions():
                asked = fold.question(part)  # type: ignore[arg-type]
                if self.global_time:
                    assert asked.fit.log.time.max() < asked.wanted.log.time.min()
                if self.own_time:
                    for user in asked.users:
                        seen, wanted = (one.log.time[one.log.user == user] for one in (asked.visible, asked.wanted))
                        assert seen.max(initial=np.iinfo(np.int64).min) <= wanted.min()

    def test_context_is_of_those_who_are_asked(self, folds: list[Fold]) -> None:
        for fold in folds:
            user = fold.data.log.user
            assert set(user[fold.parts == CONTEXT]) <= set(user[np.isin(fold.parts, (VALID, TEST))])

    def test_the_same_again_and_its_facts_are_json(self, data: Dataset, folds: list[Fold]) -> None:
        for fold, again in zip(folds, folds_of(data, self.split), strict=True):
            assert np.array_equal(fold.parts, again.parts)
            assert json.loads(json.dumps(dict(fold.facts))) == dict(again.facts)
            assert fold.facts["settings"]["kind"] == self.split.kind

    def test_another_log_has_another_digest(self, folds: list[Fold]) -> None:
        others = folds_of(shop(seed=1), self.split)
        assert {fold.facts["digest"] for fold in folds}.isdisjoint(fold.facts["digest"] for fold in others)

    def test_unused_rows_are_neither_learned_nor_asked(self, folds: list[Fold]) -> None:
        for fold in folds:
            if fold.cuts is None:
                asked = fold.question()
                total = len(asked.fit.log) + len(asked.wanted.log) + int((fold.parts == UNUSED).sum())
                context = int(np.isin(fold.data.log.user[fold.parts == CONTEXT], asked.users).sum())
                assert total + context == len(fold.data.log)


def _keys(data: Dataset) -> set[int]:
    """The rows by their prices, which number them."""
    return set(data.log.price.astype(int).tolist())
