"""Every split under the one contract, and what each promises beyond it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from split_suite import DAY, SplitSuite, shop

from maple.data.dataset import Dataset
from maple.data.folds import (
    CONTEXT,
    TEST,
    TRAIN,
    UNUSED,
    VALID,
    Fold,
    KFold,
    LeaveOneOut,
    SessionSplit,
    UserSplit,
    cut_of,
    folds_of,
    sessions_of,
)
from maple.data.splits import Boundaries, TimeSplit, split_of
from maple.errors import ConfigError, DataError


class TestByTime(SplitSuite):
    split = TimeSplit(train=0.7, valid=0.15)
    global_time = True

    def test_labels_are_those_of_the_boundaries(self, data: Dataset, folds: list[Fold]) -> None:
        cut = split_of(data, self.split)
        (fold,) = folds
        for part, code in ((cut.train, TRAIN), (cut.valid, VALID), (cut.test, TEST)):
            assert len(part(data).log) == (fold.parts == code).sum()
        assert Boundaries.of(fold.facts) == cut


class TestByTimeWithAGap(TestByTime):
    split = TimeSplit(train=0.7, valid=0.15, gap_days=3.0)

    def test_nothing_of_the_gap_is_asked_for_and_all_of_it_is_known_at_the_next_cut(self, data: Dataset, folds: list[Fold]) -> None:
        (fold,) = folds
        t1, t2 = fold.cuts or (0, 0)
        for part, at in (("valid", t1), ("test", t2)):
            asked = fold.question(part)  # type: ignore[arg-type]
            assert at <= asked.wanted.log.time.min() - 3 * DAY
            assert asked.fit.log.time.max() < at
        assert len(fold.question("test").fit.log) == (data.log.time < t2).sum()
        assert (fold.parts == UNUSED).sum() == sum(((data.log.time >= t) & (data.log.time < t + 3 * DAY)).sum() for t in (t1, t2))

    def test_a_gap_longer_than_a_part_is_an_error(self, data: Dataset) -> None:
        with pytest.raises(DataError, match=r"valid part of the time split is empty.*gap of 90 days"):
            folds_of(data, TimeSplit(gap_days=90))


class TestLeaveOneOut(SplitSuite):
    split = LeaveOneOut(kind="leave_one_out")

    def test_each_user_keeps_their_last_two_target_events_for_the_end(self, data: Dataset, folds: list[Fold]) -> None:
        (fold,), log = folds, data.log
        target = np.isin(log.event, data.targets)
        for user in range(len(data.users)):
            own = np.flatnonzero((log.user == user) & target)
            found = [row for code in (VALID, TEST) for row in own[fold.parts[own] == code]]
            assert found == (own[-2:].tolist() if len(own) >= 3 else [])


class TestLeaveOneOutWithoutValidation(SplitSuite):
    split = LeaveOneOut(kind="leave_one_out", valid=False, min_events=2)
    validates = False

    def test_there_is_no_validation_question(self, folds: list[Fold]) -> None:
        with pytest.raises(DataError, match="valid part"):
            folds[0].question("valid")


class TestByUser(SplitSuite):
    split = UserSplit(kind="user", train=0.6, valid=0.2)

    def test_a_user_is_learned_from_or_asked_and_an_instant_is_not_parted(self, data: Dataset, folds: list[Fold]) -> None:
        (fold,), log = folds, data.log
        for user in range(len(data.users)):
            own = fold.parts[log.user == user]
            assert len({TRAIN, VALID, TEST} & set(own.tolist())) <= 1
            shown, asked = (log.time[(log.user == user) & np.isin(fold.parts, codes)] for codes in ([CONTEXT], [VALID, TEST]))
            if len(asked):
                assert shown.max() < asked.min()

    def test_a_user_keeps_their_part_whoever_else_there_is(self, data: Dataset, folds: list[Fold]) -> None:
        some = data.where(data.log.user < 20)
        (fold,) = folds_of(some, self.split)
        assert np.array_equal(fold.parts, folds[0].parts[data.log.user < 20])


class TestKFoldOfRows(SplitSuite):
    split = KFold(kind="kfold", folds=4)
    num_folds = 4
    validates = own_time = False

    def test_every_pair_is_tested_once_and_stays_together(self, data: Dataset, folds: list[Fold]) -> None:
        tested = np.stack([fold.parts == TEST for fold in folds])
        assert (tested.sum(axis=0) == 1).all()
        pair = data.log.user.astype(np.int64) * 1000 + data.log.item
        for one in np.unique(pair)[:100]:
            assert len(np.unique(tested.argmax(axis=0)[pair == one])) == 1
        sizes = [len(np.unique(pair[row])) for row in tested]
        assert max(sizes) - min(sizes) <= 1

    def test_it_says_that_it_sees_the_future(self, folds: list[Fold]) -> None:
        assert "see the future" in folds[0].warnings[0]
        asked = folds[0].question()
        assert asked.fit.log.time.max() > asked.wanted.log.time.min()


class TestKFoldOfUsers(SplitSuite):
    split = KFold(kind="kfold", folds=3, unit="users")
    num_folds = 3
    validates = False

    def test_every_user_who_can_be_asked_is_tested_once(self, data: Dataset, folds: list[Fold]) -> None:
        tested = [set(data.log.user[fold.parts != TRAIN].tolist()) for fold in folds]
        assert set.union(*tested) == set(data.log.user.tolist())
        assert sum(map(len, tested)) == len(set.union(*tested))


class TestSessions(SplitSuite):
    split = SessionSplit(kind="session", train=0.7, valid=0.15, minutes=36 * 60)
    global_time = True

    def test_held_out_sessions_ask_for_their_last_target_event(self, folds: list[Fold]) -> None:
        (fold,) = folds
        log, asked = fold.data.log, fold.question()
        for session in asked.users:
            own = np.flatnonzero((log.user == session) & np.isin(log.event, fold.data.targets))
            assert fold.parts[own].tolist() == [CONTEXT] * (len(own) - 1) + [TEST]

    def test_sessions_are_runs_without_a_long_pause(self, data: Dataset) -> None:
        made = sessions_of(data, 36 * 60)
        slow, last = [], None
        for user, time in zip(data.log.user.tolist(), data.log.time.tolist(), strict=True):
            fresh = last is None or last[0] != user or time - last[1] > 1.5 * DAY
            slow.append((slow[-1] if slow else -1) + fresh)
            last = (user, time)
        assert made.log.user.tolist() == slow
        assert len(made.users) == len(made.user_table) == slow[-1] + 1
        assert made.users.ids[0].as_py() == "u00#0"
        assert (np.diff(made.offsets) > 0).all()


class TestSessionsThatAreUsers(SplitSuite):
    split = SessionSplit(kind="session", minutes=None, valid=0.0)
    global_time = True
    validates = False

    @pytest.fixture
    def data(self) -> Dataset:
        return sessions_of(shop(), 36 * 60)


@given(st.integers(0, 10_000), st.integers(3, 12), st.integers(1, 60))
@settings(max_examples=25, deadline=None)
def test_any_log_is_parted_or_refused(seed: int, users: int, count: int) -> None:
    data = shop(users, count, seed)
    for split in (
        LeaveOneOut(kind="leave_one_out"), UserSplit(kind="user"), KFold(kind="kfold", folds=2),
        KFold(kind="kfold", folds=2, unit="users"), SessionSplit(kind="session"),
    ):  # fmt: skip
        try:
            folds = folds_of(data, split)
            questions = [fold.question() for fold in folds]
        except DataError:
            continue
        for fold, asked in zip(folds, questions, strict=True):
            assert sum(fold.facts["rows"].values()) == count
            assert not set(asked.visible.log.price.tolist()) & set(asked.wanted.log.price.tolist())


def test_only_a_split_by_time_trains_a_pipeline() -> None:
    data = shop()
    assert cut_of(data, TimeSplit()) == split_of(data)
    with pytest.raises(ConfigError, match=r"split\.kind is 'kfold'"):
        cut_of(data, KFold(kind="kfold"))


def test_boundaries_are_json_and_come_back() -> None:
    cut = Boundaries(5, 9, 2)
    assert Boundaries.of(cut.plain() | {"bundle": "x"}) == cut
    assert Boundaries.of({"t1": 5, "t2": 9}) == Boundaries(5, 9)
    assert [low < high for low, high in pairwise((cut.t1, cut.valid_start, cut.t2, cut.test_start))] == [True] * 3
