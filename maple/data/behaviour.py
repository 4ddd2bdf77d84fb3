"""Rules about whole users: bots by their rate or by the entropy of what they do, and events that come out of order.

They are judged once all rows of a user are together and in time, so the verdict does not depend on files, batches or parallelism.
A quarantined user's rows are all set aside, each counted under the rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from maple.config import Section
from maple.data.report import FILE, ROW, Severity
from maple.data.validate import MAX_RULES, Bool, Validated, quarantined_rows, rule_counts
from maple.errors import ConfigError

Int64: TypeAlias = npt.NDArray[np.int64]


class UserRuleBase(Section):
    """What every rule about users has; ``note`` only counts. See ``validate.RuleBase`` for severity and share."""

    name: str = ""
    action: Literal["quarantine", "note"] = "quarantine"
    severity: Severity | None = None
    max_share: float = Field(default=0.0, ge=0, le=1)


class Rate(UserRuleBase):
    """Fires on all rows of a user with more than ``events`` events within some ``minutes``, at distinct moments if ``moments``.

    A basket of many lines is one moment; a crawler has many.
    """

    kind: Literal["rate"]
    events: int = Field(ge=1)
    minutes: float = Field(default=1.0, gt=0)
    moments: bool = True


class Entropy(UserRuleBase):
    """Fires on all rows of a user whose behaviour is too regular or too random: entropy outside [min, max].

    ``gaps``: of the times between a user's moments, on a grid of four to an octave; 0 = a clockwork. ``items``: of the items; 0 = always
    the same one, 1 = every time another one. Both as a share of the greatest possible, log2 of the number counted, which must be
    ``at_least`` for a verdict.
    """

    kind: Literal["entropy"]
    of: Literal["gaps", "items"] = "gaps"
    min: float = Field(default=0.0, ge=0, le=1)
    max: float = Field(default=1.0, ge=0, le=1)
    at_least: int = Field(default=50, ge=2)


class OutOfOrder(UserRuleBase):
    """Fires on a row whose time is before that of an earlier row of the same user in the same file."""

    kind: Literal["out_of_order"]
    action: Literal["quarantine", "note"] = "note"


AnyUserRule: TypeAlias = Rate | Entropy | OutOfOrder
UserRule: TypeAlias = Annotated[AnyUserRule, Field(discriminator="kind")]


def names_of(rules: Sequence[AnyUserRule]) -> list[str]:
    """The name of each rule in reports; ``ConfigError`` where two share one."""
    names = [rule.name or (f"entropy:{rule.of}" if isinstance(rule, Entropy) else rule.kind) for rule in rules]
    again = sorted({name for name in names if names.count(name) > 1})
    if again or len(names) > MAX_RULES:
        raise ConfigError(f"behaviour rule {again[0]!r} is used twice; give each a `name:`" if again else "too many behaviour rules")
    return names


def judge_users(clean: pa.Table, rules: Sequence[AnyUserRule]) -> Validated:
    """Split the clean rows of whole users; the order of the rows does not matter. Columns: user_id, item_id, timestamp, _file, _row."""
    names = names_of(rules)
    reason, fired = np.full(clean.num_rows, -1, np.int16), np.zeros(clean.num_rows, np.int64)
    if clean.num_rows and rules:
        user = _codes(clean["user_id"])
        time = np.asarray(clean["timestamp"].cast(pa.int64()))
        for place, rule in enumerate(rules):
            hit = _fires(rule, clean, user, time)
            fired[hit] |= np.int64(1) << place
            if rule.action == "quarantine":
                reason[hit & (reason < 0)] = place
    return Validated(clean.filter(pa.array(reason < 0)), quarantined_rows(clean, reason, names), rule_counts(fired, names))


def _fires(rule: AnyUserRule, table: pa.Table, user: Int64, time: Int64) -> Bool:
    match rule:
        case Rate():
            guilty = _too_fast(rule, user, time)
        case Entropy():
            guilty = _odd(rule, user, time, _codes(table["item_id"]))
        case OutOfOrder():
            return _backwards(user, time, _codes(table[FILE]), np.asarray(table[ROW]))
    return np.asarray(guilty[user])


def _too_fast(rule: Rate, user: Int64, time: Int64) -> Bool:
    user, time = _moments(user, time) if rule.moments else _sorted(user, time)
    out = np.zeros(int(user.max()) + 1, np.bool_)
    start, end = np.s_[: -rule.events], np.s_[rule.events :]  # the first and the last of events + 1 in a row
    fast = (user[start] == user[end]) & (time[end] - time[start] <= rule.minutes * 60_000_000)
    out[user[start][fast]] = True
    return out


def _odd(rule: Entropy, user: Int64, time: Int64, item: Int64) -> Bool:
    users = int(user.max()) + 1
    if rule.of == "gaps":
        moment_user, moment = _moments(user, time)
        same = moment_user[1:] == moment_user[:-1]
        who, what = moment_user[1:][same], np.round(4 * np.log2(np.diff(moment)[same].astype(np.float64))).astype(np.int64)
    else:
        who, what = user, item
    total = np.bincount(who, minlength=users)
    pairs, counts = np.unique(np.stack([who, what]), axis=1, return_counts=True)
    share = counts / total[pairs[0]]
    entropy = np.bincount(pairs[0], -share * np.log2(share), users) / np.log2(np.maximum(total, 2))
    return np.asarray((total >= rule.at_least) & ((entropy < rule.min) | (entropy > rule.max + 1e-12)))


def _backwards(user: Int64, time: Int64, file: Int64, row: Int64) -> Bool:
    order = np.lexsort((row, user, file))
    group = np.cumsum((np.diff(user[order], prepend=-1) != 0) | (np.diff(file[order], prepend=-1) != 0))
    rank = np.unique(time, return_inverse=True)[1][order] + group * (len(time) + 1)  # a running maximum never reaches the next group
    out = np.zeros(len(user), np.bool_)
    out[order] = rank < np.maximum.accumulate(rank)
    return out


def _moments(user: Int64, time: Int64) -> tuple[Int64, Int64]:
    """The distinct (user, time) pairs, in order."""
    user, time = _sorted(user, time)
    new = (np.diff(user, prepend=-1) != 0) | (np.diff(time, prepend=time[:1]) != 0)
    return user[new], time[new]


def _sorted(user: Int64, time: Int64) -> tuple[Int64, Int64]:
    order = np.lexsort((time, user))
    return user[order], time[order]


def _codes(column: pa.ChunkedArray) -> Int64:
    """A number for each text, int64[N]."""
    return np.asarray(pc.fill_null(column.combine_chunks().dictionary_encode().indices, -1)).astype(np.int64)
