"""Whatever is done to a store in whatever order, its states are those of one clean fold: a Hypothesis state machine over any backend.

The model keeps what was told in plain sets and folds it from the beginning each time.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule
from shop import T0
from store_suite import FOLDER, OTHER, check_same, folded

from maple.data.identity import MAX_USERS
from maple.errors import DataError
from maple.features.fold import DAY
from maple.features.folder import Folder
from maple.features.store import Ack, Event, OnlineStore

MACHINE = settings(max_examples=15, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))
USERS = ("u0", "u1", "phone", "tablet")

users = st.sampled_from(USERS)
# few ids, so that many are repeated; up to a week late and a day ahead, many at the same moment
sent = st.builds(
    Event,
    event_id=st.sampled_from([f"e{number}" for number in range(30)]),
    user_id=users,
    item_id=st.sampled_from(["apple", "cup", "dish", "unknown"]),
    event=st.sampled_from(["view", "purchase", "return"]),
    timestamp=st.sampled_from([T0 - 7 * DAY, T0 - 1, T0, T0 + 1, T0 + DAY // 2, T0 + DAY]),
    value=st.sampled_from([None, 2.0]),
)


class StoreMachine(RuleBasedStateMachine):
    """``open_store`` connects to one place that was empty at first."""

    def __init__(self, open_store: Callable[[Folder], OnlineStore]) -> None:
        super().__init__()
        self.open_store = open_store
        self.store = open_store(FOLDER)
        self.log: dict[tuple[str, str], Event] = {}
        self.links: set[tuple[str, str]] = set()
        self.blocked: set[str] = set()

    @rule(events=st.lists(sent, min_size=1, max_size=12), read=st.booleans())
    def append(self, events: list[Event], read: bool) -> None:
        expected = []
        for event in events:
            key = event.user_id, event.event_id
            dropped = event.user_id in self.blocked
            expected.append(Ack.DELETED if dropped else Ack.DUPLICATE if key in self.log else Ack.STORED)
            if not dropped:
                self.log.setdefault(key, event)
        assert self.store.append(events) == expected
        if read:
            self.read(FOLDER)

    @rule(seed=st.integers(0, 1000))
    def repeat_all_five_times_shuffled(self, seed: int) -> None:
        events = list(self.log.values()) * 5
        random.Random(seed).shuffle(events)
        assert set(self.store.append(events)) <= {Ack.DUPLICATE}

    @rule(folder=st.sampled_from([FOLDER, OTHER]))
    def read(self, folder: Folder) -> None:
        for user, state in self.store.get(USERS, folder).items():
            check_same(state, folded(self.log.values(), self.people()[user], user, folder))

    @rule(aliases=st.lists(users, min_size=1, max_size=2), into=users)
    def merge(self, aliases: list[str], into: str) -> None:
        before, links = self.people()[into], set(self.links)
        self.links |= {(alias, into) for alias in aliases if alias != into and not {alias, into} & self.blocked}
        if len({target for _, target in self.links} & self.people()[into]) > MAX_USERS:
            self.links = links
            with pytest.raises(DataError, match="shared device"):
                self.store.merge(aliases, into)
        else:
            assert self.store.merge(aliases, into) == len(self.people()[into]) - len(before)

    @rule(alias=users)
    def unmerge(self, alias: str) -> None:
        left = {link for link in self.links if link[0] != alias}
        assert self.store.unmerge(alias) == len(self.links) - len(left)
        self.links = left

    @rule(user=users, block=st.sampled_from([False, False, False, True]))
    def delete(self, user: str, block: bool) -> None:
        ids = self.people()[user]
        gone = [key for key in self.log if key[0] in ids]
        assert self.store.delete(user, block=block) == len(gone)
        self.log = {key: event for key, event in self.log.items() if key not in gone}
        self.links = {link for link in self.links if not ids.intersection(link)}
        self.blocked |= ids if block else set()

    @rule(before=st.sampled_from([T0 - 1, T0, T0 + 1]))
    def expire(self, before: int) -> None:
        left = {key: event for key, event in self.log.items() if event.timestamp >= before}
        assert self.store.expire(before) == len(self.log) - len(left)
        self.log = left

    @rule(keep=st.sampled_from([[FOLDER], [OTHER], []]))
    def prune(self, keep: list[Folder]) -> None:
        self.store.prune(keep)

    @rule()
    def open_again(self) -> None:
        self.store.close()
        self.store = self.open_store(FOLDER)

    def people(self) -> dict[str, set[str]]:
        """All ids of each id's person, by walking the links."""
        out = {}
        for user in USERS:
            group = {user}
            for _ in USERS:
                group |= {each for link in self.links if group.intersection(link) for each in link}
            out[user] = group
        return out

    def teardown(self) -> None:
        self.read(FOLDER)
        for user, group in self.people().items():
            assert self.store.aliases(user) == sorted(group)
            history = sorted((event.user_id, event.event_id) for event in self.store.history(user))
            assert history == sorted(key for key in self.log if key[0] in group)
        self.store.close()
