"""All ways to split a log for measuring models: by time, leave one out, by user, k folds, anonymous sessions.

A split labels every row of a log: learned from, tuned on, tested on, shown but not learned from, or left out. What is asked
follows from the labels alone, so every split is measured by the same code. Only the split by time tells what a released model
will do; the others compare with published numbers, and each says in ``warnings`` how it sees the future.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import BeforeValidator, Field, model_validator

from maple.config import Section
from maple.data.dataset import Bool, Dataset, Int8, Int32, Int64, Vocab
from maple.data.splits import Boundaries, TimeSplit, boundaries, split_of
from maple.errors import ConfigError, DataError
from maple.hashing import rng, sha256, stable_units

#: What a row of the log is for. Context: the past of users who are held out, shown when they are asked, learned from by nobody.
TRAIN, VALID, TEST, CONTEXT, UNUSED = range(5)
PARTS = ("train", "valid", "test", "context", "unused")

MINUTE = 60_000_000  # microseconds


class LeaveOneOut(Section):
    """Each user's last target event is the test, and the one before it the validation part."""

    kind: Literal["leave_one_out"]
    valid: bool = True
    """False: only the last one is held out."""
    min_events: int = Field(default=3, ge=2)
    """Users with fewer target events are learned from whole."""


class _Shares(Section):
    train: float = Field(default=0.8, gt=0, lt=1)
    valid: float = Field(default=0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _rest(self) -> Self:
        if self.train + self.valid >= 1:
            raise ValueError("train + valid must leave a share for the test part")
        return self


class UserSplit(_Shares):
    """Shares of the users, by a hash of their ids; of a held-out user the earlier events are shown and the later ones asked for."""

    kind: Literal["user"]
    observed: float = Field(default=0.8, gt=0, lt=1)
    """Share of a held-out user's target events that are shown; an instant is never parted, all of it is asked for."""
    seed: int = 0


class KFold(Section):
    """Every row, or every user, is tested once."""

    kind: Literal["kfold"]
    folds: int = Field(default=5, ge=2, le=100)
    unit: Literal["rows", "users"] = "rows"
    """rows: a user's events with one item stay together. users: as in the split by user."""
    observed: float = Field(default=0.8, gt=0, lt=1)
    """users: share of a held-out user's target events that are shown."""
    seed: int = 0


class SessionSplit(_Shares):
    """Sessions as users, in the order of their starts; of a held-out session the last target event is asked for."""

    kind: Literal["session"]
    minutes: float | None = Field(default=30.0, gt=0)
    """A pause of so long starts a new session; None: the users of the data are sessions already."""


Split: TypeAlias = TimeSplit | LeaveOneOut | UserSplit | KFold | SessionSplit

#: A split as people write it: the kind, and its settings; without a kind, by time.
SplitSettings: TypeAlias = Annotated[
    Split,
    Field(discriminator="kind"),
    BeforeValidator(lambda page: {"kind": "time", **page} if isinstance(page, Mapping) else page),
]


@dataclass(frozen=True, eq=False)
class Question:
    """What one fold asks: models learn from ``fit``, see ``visible`` of the asked ``users`` (at ``now``), and should find ``wanted``."""

    fit: Dataset
    visible: Dataset
    wanted: Dataset
    users: Int32
    now: Int64  # microseconds, one per user; later than all that is visible of them


@dataclass(frozen=True, eq=False)
class Fold:
    """A log with a label per row, int8[N]. ``facts``: settings, boundaries and counts, JSON-ready, enough to make it again."""

    data: Dataset
    parts: Int8
    facts: Mapping[str, Any]
    warnings: tuple[str, ...] = ()
    cuts: tuple[int, int] | None = None  # the two moments at which everybody is asked; None: each user before their own rows

    def rows(self, *parts: int) -> Bool:
        """Which rows have one of these labels, bool[N]."""
        return np.isin(self.parts, parts)

    def question(self, part: Literal["valid", "test"] = "test") -> Question:
        """The question of the validation or of the test part; ``DataError`` where it is empty.

        The test question lets models learn from the validation part too.
        """
        asked = self.rows(VALID if part == "valid" else TEST)
        log, data = self.data.log, self.data
        wanted = asked & np.isin(log.event, data.targets)
        users = np.unique(log.user[wanted])
        if len(users) == 0:
            raise DataError(
                f"the {part} part of this split holds no target event: {self.facts['rows']}. Choose other shares, or use more data."
            )
        held = np.isin(log.user, users)
        if self.cuts is not None:  # whatever is before a cut is known at it, also what lies in the gap of the cut before
            learned = visible = np.asarray(log.time < self.cuts[0 if part == "valid" else 1])
        else:
            learned = self.rows(TRAIN) if part == "valid" else self.rows(TRAIN, VALID) | self.rows(CONTEXT) & ~held
            visible = learned | self.rows(CONTEXT) & held
        return Question(
            data.where(learned), data.where(visible), data.where(asked), users, self._moments(part, users, wanted, visible & held)
        )

    def _moments(self, part: str, users: Int32, wanted: Bool, visible: Bool) -> Int64:
        if self.cuts is not None:
            return np.full(len(users), self.cuts[0 if part == "valid" else 1], np.int64)
        log = self.data.log
        first = np.full(len(self.data.users), np.iinfo(np.int64).max)
        np.minimum.at(first, log.user[wanted], log.time[wanted])
        last = np.full(len(self.data.users), np.iinfo(np.int64).min + 1)
        np.maximum.at(last, log.user[visible], log.time[visible])
        return np.asarray(np.maximum(first, last + 1)[users])


def cut_of(data: Dataset, split: Split) -> Boundaries:
    """The cut of a split by time; ``ConfigError`` for others, under which no pipeline can be trained."""
    if not isinstance(split, TimeSplit):
        raise ConfigError(
            f"split.kind is {split.kind!r}, and a pipeline is trained and released by time. Set split.kind to time; "
            "`maple evaluate` measures the sources alone under the other kinds."
        )
    return split_of(data, split)


def folds_of(data: Dataset, split: Split) -> list[Fold]:
    """The folds of a split: one, or ``folds`` of them."""
    if len(data.log) == 0 or not np.isin(data.log.event, data.targets).any():
        raise DataError("there are no target events to split; check `targets:` of the source")
    match split:
        case TimeSplit():
            return [_by_time(data, split)]
        case LeaveOneOut():
            return [_leave_one_out(data, split)]
        case UserSplit():
            return [_by_user(data, split)]
        case KFold():
            return _k_folds(data, split)
        case SessionSplit():
            return [_by_session(data, split)]


def _by_time(data: Dataset, split: TimeSplit) -> Fold:
    cut, time = split_of(data, split), data.log.time
    parts = np.full(len(time), UNUSED, np.int8)
    parts[time < cut.t1] = TRAIN
    parts[(time >= cut.valid_start) & (time < cut.t2)] = VALID
    parts[time >= cut.test_start] = TEST
    return Fold(data, parts, _facts(split, data, parts, cut.plain()), (), (cut.t1, cut.t2))


def _leave_one_out(data: Dataset, split: LeaveOneOut) -> Fold:
    rows, ends = _target_rows(data)
    held = np.flatnonzero(np.diff(ends, prepend=0) >= split.min_events)
    never = np.full(len(data.users), len(data.log), np.int64)
    test, valid = never.copy(), never.copy()
    test[held] = rows[ends[held] - 1]
    valid[held] = rows[ends[held] - 2] if split.valid else test[held]
    place, user = np.arange(len(data.log)), data.log.user
    parts = np.where(place >= test[user], TEST, np.where(place >= valid[user], VALID, TRAIN)).astype(np.int8)
    warning = (
        "leave-one-out: models learn from what other users did after a user's held-out event; figures are above those of a split by time"
    )
    return Fold(data, parts, _facts(split, data, parts, {"users_held_out": len(held)}), (warning,))


def _by_user(data: Dataset, split: UserSplit) -> Fold:
    unit = stable_units(f"split/user/{split.seed}", data.users.ids.to_pylist())
    role = np.where(unit < split.train, TRAIN, np.where(unit < split.train + split.valid, VALID, TEST)).astype(np.int8)
    parts = _held_out(data, role, split.observed)
    warning = (
        "split by user: models learn from what other users did after a held-out user's events; figures are above those of a split by time"
    )
    return Fold(data, parts, _facts(split, data, parts, {}), (warning,))


def _k_folds(data: Dataset, split: KFold) -> list[Fold]:
    random, log = rng(split.seed, "split/kfold"), data.log
    if split.unit == "users":
        fold = random.permutation(len(data.users)) % split.folds
    else:
        pairs, inverse = np.unique(log.user.astype(np.int64) * len(data.items) + log.item, return_inverse=True)
        fold = (random.permutation(len(pairs)) % split.folds)[inverse.reshape(-1)]
    warning = (
        f"k-fold by {split.unit}: the folds are drawn at random, so models see the future of those who are asked. "
        "The figures say which model fits the data, not what a released one will do."
    )
    out = []
    for number in range(split.folds):
        held = np.where(fold == number, TEST, TRAIN).astype(np.int8)
        parts = _held_out(data, held, split.observed) if split.unit == "users" else held
        out.append(Fold(data, parts, _facts(split, data, parts, {"fold": number}), (warning,)))
    return out


def _by_session(data: Dataset, split: SessionSplit) -> Fold:
    data = data if split.minutes is None else sessions_of(data, split.minutes)
    log, offsets = data.log, data.offsets
    some = np.flatnonzero(np.diff(offsets))
    start, end = np.zeros(len(data.users), np.int64), np.zeros(len(data.users), np.int64)
    start[some], end[some] = log.time[offsets[some]], log.time[offsets[some + 1] - 1]
    if split.valid:
        cut = boundaries(start[some], TimeSplit(train=split.train, valid=split.valid))
        t1, t2 = cut.t1, cut.t2
    else:
        ordered = np.sort(start[some])
        t1 = t2 = int(ordered[min(int(split.train * len(ordered)), len(ordered) - 1)])
    role = np.full(len(data.users), UNUSED, np.int8)  # what lies across a cut would show the future, or hide part of itself
    role[end < t1] = TRAIN
    role[(start >= t1) & (end < t2)] = VALID
    role[start >= t2] = TEST
    rows, ends = _target_rows(data)
    last = np.full(len(data.users), -1, np.int64)
    last[np.diff(ends, prepend=0) > 0] = rows[ends[np.diff(ends, prepend=0) > 0] - 1]
    parts = role[log.user]
    asked = np.isin(parts, (VALID, TEST))
    parts[asked & (np.arange(len(log)) < last[log.user])] = CONTEXT
    alone = asked & (last[log.user] <= offsets[log.user])  # nothing to show before it, or nothing to ask for
    parts[alone] = UNUSED
    return Fold(data, parts.astype(np.int8), _facts(split, data, parts, {"t1": t1, "t2": t2, "sessions": len(some)}))


def sessions_of(data: Dataset, minutes: float) -> Dataset:
    """The same log with sessions for users: a pause longer than ``minutes`` between a user's events starts the next one."""
    log = data.log
    fresh = np.r_[True, (np.diff(log.user) != 0) | (np.diff(log.time) > minutes * MINUTE)]
    session = (np.cumsum(fresh) - 1).astype(np.int32)
    owner = log.user[fresh]
    place = np.arange(len(owner)) - np.searchsorted(owner, owner)
    ids = pa.array([f"{user}#{number}" for user, number in zip(data.users.decode(owner), place.tolist(), strict=True)], pa.string())
    at = data.user_table.column_names.index("user_id")
    return replace(
        data,
        users=Vocab(ids),
        log=replace(log, user=session),
        user_table=data.user_table.take(pa.array(owner)).set_column(at, "user_id", ids),
    )


def _target_rows(data: Dataset) -> tuple[Int64, Int64]:
    """The rows of target events, and where each user's end among them, int64[users]."""
    rows = np.flatnonzero(np.isin(data.log.event, data.targets))
    return rows, np.searchsorted(data.log.user[rows], np.arange(len(data.users)), side="right")


def _held_out(data: Dataset, role: Int8, observed: float) -> Int8:
    """Labels from a role per user: of held-out users what is strictly before the first event asked for is context.

    A user who has nothing before it is left out.
    """
    log = data.log
    rows, ends = _target_rows(data)
    sizes = np.diff(ends, prepend=0)
    some = np.flatnonzero(sizes)
    cut = np.full(len(data.users), np.iinfo(np.int64).max)  # without a target event: nothing is asked for
    cut[some] = log.time[rows[(ends - sizes)[some] + np.minimum((observed * sizes[some]).astype(np.int64), sizes[some] - 1)]]
    parts = role[log.user]
    held = parts != TRAIN
    early = log.time < cut[log.user]
    parts[held & early] = CONTEXT
    shown = np.zeros(len(data.users), bool)
    shown[log.user[held & early]] = True
    parts[held & (~shown | (cut == np.iinfo(np.int64).max))[log.user]] = UNUSED
    return np.asarray(parts, np.int8)


def _facts(split: Section, data: Dataset, parts: npt.NDArray[Any], more: Mapping[str, Any]) -> dict[str, Any]:
    counts = np.bincount(parts, minlength=len(PARTS)).tolist()
    tested = len(np.unique(data.log.user[parts == TEST]))
    return {
        "settings": split.plain(), **more, "rows": dict(zip(PARTS, counts, strict=True)), "test_users": tested,
        "digest": sha256(np.asarray(parts, np.int8).tobytes())[:16],
    }  # fmt: skip
