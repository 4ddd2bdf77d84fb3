"""What every online store must do; ``test_store`` runs it on each backend."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis.stateful import run_state_machine_as_test
from shop import ITEMS, T0, table

from maple.data.dataset import Vocab
from maple.errors import DataError
from maple.features.catalogue import Catalogue
from maple.features.fold import DAY
from maple.features.folder import Folder
from maple.features.spec import FeatureSpec
from maple.features.states import KEYED, UserState
from maple.features.store import KEEP_EVENTS, Ack, Event, OnlineStore, Reconciled, events_of, rows_of, to_table
from maple.features.view import Key
from maple.schema import EVENTS

CATALOGUE = Catalogue.from_table(Vocab(ITEMS["item_id"].combine_chunks()), ITEMS)
FOLDER = Folder(FeatureSpec(), CATALOGUE)
OTHER = Folder(FeatureSpec(half_lives=(2.0,)), CATALOGUE)


def events(count: int = 40, users: int = 3, seed: int = 1) -> list[Event]:
    """Events of a few users, many at the same moment, ids in no order."""
    draw = random.Random(seed)
    kinds = ["view", "purchase", "add_to_cart", "return", "rating"]
    return [
        Event(
            f"e{draw.randrange(10**9):09d}", f"u{draw.randrange(users)}", draw.choice(["apple", "cup", "dish", "egg", "unknown"]),
            draw.choice(kinds), T0 + draw.randrange(6) * DAY, draw.choice([None, 1.0, 2.5]), draw.choice([None, 4.0]), None, None, {},
        )
        for _ in range(count)
    ]  # fmt: skip


def folded(made: Iterable[Event], ids: Collection[str], user: str, folder: Folder = FOLDER) -> UserState:
    """The state of a person with several ids, asked for by one of them: all their events folded once, in order, without a store."""
    own = sorted((event for event in made if event.user_id in ids), key=lambda e: (e.order, e.item_id, e.event, e.value or 0.0))
    first: dict[str, Event] = {}
    for event in own:
        first.setdefault(event.event_id, event)
    return folder.advance([folder.empty(user)], rows_of([list(first.values())]))[0]


def clean(made: Iterable[Event], user: str, folder: Folder = FOLDER) -> UserState:
    """The same of a user with one id."""
    return folded(made, [user], user, folder)


def check_same(one: UserState, two: UserState) -> None:
    assert (one.user, one.items, one.size, one.tail) == (two.user, two.items, two.size, two.tail)
    np.testing.assert_array_equal(one.times, two.times)
    for key in (Key.USER, *KEYED):
        order = [one.keyed[key].index[text] for text in two.keyed[key].ids]
        assert len(order) == len(one.keyed[key].ids)
        np.testing.assert_array_equal(one.keyed[key].state[order], two.keyed[key].state)
        np.testing.assert_array_equal(one.keyed[key].last[order], two.keyed[key].last)


class StoreSuite:
    """What every backend must do. Subclasses give ``new_place``: an empty place at each call, that can be connected to many times."""

    @pytest.fixture
    def again(self, new_place: Callable[[], Callable[[Folder], OnlineStore]]) -> Callable[[Folder], OnlineStore]:
        """Another connection to the data of ``store``."""
        return new_place()

    @pytest.fixture
    def store(self, again: Callable[[Folder], OnlineStore]) -> Iterator[OnlineStore]:
        store = again(FOLDER)
        yield store
        store.close()

    def test_it_is_a_store(self, store: OnlineStore) -> None:
        assert isinstance(store, OnlineStore)

    def test_the_next_read_sees_an_acknowledged_event(self, store: OnlineStore) -> None:
        for place, event in enumerate(events(10, users=1)):
            assert store.append([event]) == [Ack.STORED]
            assert store.get(["u0"])["u0"].size == place + 1

    def test_states_are_those_of_one_clean_fold(self, store: OnlineStore) -> None:
        made = events()
        store.append(made)
        states = store.get(["u0", "u1", "u2"])
        for user, state in states.items():
            check_same(state, clean(made, user))

    def test_an_unknown_user_has_an_empty_state(self, store: OnlineStore) -> None:
        assert store.get([]) == {}
        check_same(store.get(["nobody"])["nobody"], FOLDER.empty("nobody"))
        assert store.history("nobody") == []
        assert store.append([]) == []

    @pytest.mark.parametrize("seed", range(4))
    def test_repeated_shuffled_and_late_events_change_nothing(self, store: OnlineStore, seed: int) -> None:
        made = events(seed=seed)
        arriving = made * 5
        random.Random(seed).shuffle(arriving)
        acks = []
        while arriving:
            acks += store.append(arriving[:7])
            arriving = arriving[7:]
        assert acks.count(Ack.STORED) == len(made)
        for user in ("u0", "u1", "u2"):
            check_same(store.get([user])[user], clean(made, user))

    def test_the_first_of_two_events_with_one_id_counts(self, store: OnlineStore) -> None:
        first = Event("e", "u", "cup", "purchase", T0)
        assert store.append([first, replace(first, item_id="dish", timestamp=T0 + 5)]) == [Ack.STORED, Ack.DUPLICATE]
        assert store.append([replace(first, item_id="egg")]) == [Ack.DUPLICATE]
        assert store.history("u") == [first]

    def test_the_same_id_of_another_user_is_another_event(self, store: OnlineStore) -> None:
        first = Event("e", "u", "cup", "purchase", T0)
        assert store.append([first, replace(first, user_id="v")]) == [Ack.STORED, Ack.STORED]

    def test_history_keeps_everything_in_order(self, store: OnlineStore) -> None:
        full = Event("b", "ü/{x}:☃", "cup", "purchase", T0, 2.0, 8.5, "s1", "r1", {"device": "phone", "deep": [1, None, "é"]})
        made = [replace(full, event_id="a", timestamp=T0 + 1), full, replace(full, event_id="c"), replace(full, event_id="B")]
        store.append(made)
        assert store.history(full.user_id) == [made[3], made[1], made[2], made[0]]

    def test_deleting_a_user_leaves_the_others(self, store: OnlineStore) -> None:
        made = events()
        store.append(made)
        count = sum(event.user_id == "u0" for event in made)
        assert store.delete("u0") == count
        assert store.delete("u0") == 0
        assert store.history("u0") == []
        assert store.get(["u0"])["u0"].size == 0
        check_same(store.get(["u1"])["u1"], clean(made, "u1"))
        store.append(made[:9])
        check_same(store.get(["u0"])["u0"], clean(made[:9], "u0"))

    def test_backfill_is_append_and_may_be_repeated(self, store: OnlineStore) -> None:
        made = [replace(event, context={}) for event in events(60)]
        store.append(made[::7])
        assert store.backfill(table(made)) == 60 - len(made[::7])
        assert store.backfill(table(made)) == 0
        for user in ("u0", "u1", "u2"):
            check_same(store.get([user])[user], clean(made, user))
            assert sorted(store.history(user), key=lambda event: event.order) == store.history(user)

    def test_reconciling_gives_the_table_the_last_word(self, store: OnlineStore) -> None:
        made = [replace(event, context={"page": "home"}) for event in events(60)]
        store.append([*made, replace(made[0], user_id="other")])
        store.merge(["u2"], "u1")
        store.get(["u0", "u1", "u2"])
        changed = [replace(made[0], value=9.0), replace(made[1], item_id="tin"), replace(made[2], price=None, value=0.1)]
        new = replace(made[3], event_id="new")
        same = replace(made[4], value=None if made[4].value is None else float(np.float32(made[4].value)))
        gone = pa.table({"user_id": [e.user_id for e in made[5:15]] + ["other"], "event_id": [e.event_id for e in made[5:15]] + ["none"]})
        left = [*changed, *made[3:5], *made[15:], new]
        for expected in (Reconciled(1, 3, 10), Reconciled()):
            assert store.reconcile(to_table([*changed, new, same]), gone) == expected
            for user, ids in {"u0": ["u0"], "u1": ["u1", "u2"], "u2": ["u1", "u2"]}.items():
                check_same(store.get([user])[user], folded(left, ids, user))
        assert len(store.history("other")) == 1, "the same event id of somebody else"
        found = {event.event_id: event for user in ("u0", "u1") for event in store.history(user)}
        assert found[made[1].event_id].context == {"page": "home"}, "what a fold does not read stays"
        assert len(found) == len(left)

    def test_other_features_are_folded_from_the_log_when_read(self, store: OnlineStore, again: Callable[[Folder], OnlineStore]) -> None:
        made = events()
        store.append(made[:30])
        for _ in range(2):  # the second time it is found
            check_same(store.get(["u0"], OTHER)["u0"], clean(made[:30], "u0", OTHER))
        store.append(made[30:])
        check_same(store.get(["u0"], OTHER)["u0"], clean(made, "u0", OTHER))
        other = again(OTHER)
        check_same(other.get(["u1"])["u1"], clean(made, "u1", OTHER))
        other.append([replace(made[0], event_id="new", user_id="u1", timestamp=T0 + 50 * DAY)])
        assert store.get(["u1"])["u1"].size == clean(made, "u1").size + 1
        other.close()

    def test_adopting_other_features(self, store: OnlineStore) -> None:
        made = events()
        store.append(made[:20])
        store.adopt(OTHER)
        store.append(made[20:])
        check_same(store.get(["u2"])["u2"], clean(made, "u2", OTHER))

    def test_an_invalid_event_stores_nothing_of_its_call(self, store: OnlineStore) -> None:
        good = Event("e", "u", "cup", "purchase", T0)
        wrong = {
            "event_id": "", "user_id": "a\nb", "item_id": "x" * 257, "event": "buy", "timestamp": -1, "value": float("nan"), "price": 1e30,
            "context": {"much": "x" * 9000},
        }  # fmt: skip
        for name, value in wrong.items():
            with pytest.raises(DataError):
                store.append([good, replace(good, **{"event_id": "f", name: value})])
            assert store.history("u") == []

    def test_many_threads_lose_and_repeat_nothing(self, store: OnlineStore) -> None:
        made = events(160, users=4, seed=9)
        acks: list[Ack] = []
        lock = threading.Lock()

        def work(part: list[Event]) -> None:
            for event in part:
                ack = store.append([event])
                store.get([event.user_id])
                with lock:
                    acks.extend(ack)

        threads = [threading.Thread(target=work, args=(made[place::8] + made[:5],)) for place in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert acks.count(Ack.STORED) == len(made)
        assert acks.count(Ack.DUPLICATE) == 8 * 5
        for user in ("u0", "u1", "u2", "u3"):
            check_same(store.get([user])[user], clean(made, user))

    def test_two_stores_on_the_same_data(self, store: OnlineStore, again: Callable[[Folder], OnlineStore]) -> None:
        made = events(80, seed=4)
        second = again(FOLDER)
        parts = [(store, made[::2]), (second, made[1::2])]
        threads = [threading.Thread(target=lambda s=s, part=part: [s.append([event]) for event in part]) for s, part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for user in ("u0", "u1", "u2"):
            check_same(store.get([user])[user], clean(made, user))
            check_same(second.get([user])[user], clean(made, user))
        second.close()

    def test_a_read_after_any_number_of_events_is_the_clean_fold(self, store: OnlineStore, again: Callable[[Folder], OnlineStore]) -> None:
        second = again(OTHER)
        made = sorted(events(300, users=1, seed=3), key=lambda event: event.order)
        for start in range(0, 300, 50):
            store.append(made[start : start + 50 - 7])
            for event in made[start + 50 - 7 : start + 50]:  # fewer than are worth a new checkpoint, read one by one
                store.append([event])
                check_same(store.get(["u0"])["u0"], clean(made[: made.index(event) + 1], "u0"))
            check_same(second.get(["u0"])["u0"], clean(made[: start + 50], "u0", OTHER))
        second.close()

    def test_expired_events_leave_log_and_states(self, store: OnlineStore) -> None:
        made = events(200, users=3, seed=5)
        store.append(made)
        store.append([Event("old", "gone", "cup", "view", T0)])
        store.merge(["u1"], "u2")
        store.get(["u0", "u1", "gone"])
        limit = T0 + 3 * DAY
        left = [event for event in made if event.timestamp >= limit]
        assert store.expire(limit) == len(made) - len(left) + 1
        assert store.expire(limit) == 0
        check_same(store.get(["u0"])["u0"], clean(left, "u0"))
        check_same(store.get(["u1"])["u1"], folded(left, ["u1", "u2"], "u1"))
        check_same(store.get(["gone"])["gone"], FOLDER.empty("gone"))
        late = Event("late", "gone", "cup", "view", T0 + 1)
        assert store.append([late]) == [Ack.STORED]
        check_same(store.get(["gone"])["gone"], clean([late], "gone"))

    def test_pruned_states_come_back(self, store: OnlineStore) -> None:
        made = events()
        store.append(made)
        for folder in (FOLDER, OTHER):
            store.get(["u0", "u1", "u2"], folder)
        assert store.prune([OTHER]) == 3
        assert store.prune([OTHER]) == 0
        for folder in (FOLDER, OTHER):
            check_same(store.get(["u0"], folder)["u0"], clean(made, "u0", folder))

    def test_a_blocked_user_never_comes_back(self, store: OnlineStore) -> None:
        made = events(users=2)
        store.append(made)
        store.describe("u0", {"age": 30})
        store.merge(["phone"], "u0")
        assert store.delete("u0", block=True) == sum(event.user_id == "u0" for event in made)
        mixed = [replace(event, event_id=event.event_id + "x") for event in made[:6]]
        assert store.append(mixed) == [Ack.DELETED if event.user_id == "u0" else Ack.STORED for event in mixed]
        assert store.append([replace(made[0], user_id="phone")]) == [Ack.DELETED]
        assert store.describe("u0", {"age": 31}) == Ack.DELETED
        assert store.merge(["u0"], "new") == store.merge(["new"], "phone") == 0
        assert store.backfill(table([replace(made[0], user_id="u0")])) == 0
        store.backfill_users(pa.table({"user_id": ["u0"], "age": [32]}))
        for user in ("u0", "phone"):
            assert store.history(user) == []
            assert store.get([user])[user].attributes == {}
            assert store.aliases(user) == [user]
        check_same(store.get(["u1"])["u1"], clean([*made, *(event for event in mixed if event.user_id == "u1")], "u1"))

    def test_deleting_while_others_append_leaves_what_came_after_alone(self, store: OnlineStore) -> None:
        deleted = threading.Event()
        after: list[Event] = []

        def work(name: str) -> None:
            for number in range(30):
                event = Event(f"{name}{number}", "u", "cup", "purchase", T0 + number)
                late = deleted.is_set()
                store.append([event])
                store.get(["u"])
                if late:
                    after.append(event)

        threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
        for thread in threads:
            thread.start()
        time.sleep(0.02)
        store.delete("u")
        deleted.set()
        for thread in threads:
            thread.join()
        left = store.history("u")
        assert {event.event_id for event in after} <= {event.event_id for event in left}
        check_same(store.get(["u"])["u"], clean(left, "u"))

    # -- several ids of one person -------------------------------------------------------------------------------------

    def test_merging_and_taking_it_back(self, store: OnlineStore) -> None:
        made = events(60, users=4, seed=7)
        store.append(made[:40])
        store.get(["u0", "u1", "u2", "u3"])
        assert store.merge(["u1", "u3"], "u0") == 2
        assert store.merge(["u1"], "u0") == 0
        assert store.aliases("u3") == ["u0", "u1", "u3"]
        store.append(made[40:])  # what an alias sends later counts for all
        for user in ("u0", "u1", "u3"):
            check_same(store.get([user])[user], folded(made, ["u0", "u1", "u3"], user))
        assert [event.user_id for event in store.history("u1")] == [
            e.user_id for e in sorted(made, key=lambda e: e.order) if e.user_id != "u2"
        ]
        check_same(store.get(["u2"])["u2"], clean(made, "u2"))
        assert store.unmerge("u1") == 1
        assert store.unmerge("u1") == 0
        check_same(store.get(["u1"])["u1"], clean(made, "u1"))
        check_same(store.get(["u0"])["u0"], folded(made, ["u0", "u3"], "u0"))
        assert store.unmerge("u3") == 1
        for user in ("u0", "u1", "u2", "u3"):
            check_same(store.get([user])[user], clean(made, user))
            assert store.aliases(user) == [user]

    def test_ids_join_through_others(self, store: OnlineStore) -> None:
        store.append([Event("1", "phone", "cup", "view", T0), Event("2", "tablet", "dish", "view", T0 + 1)])
        store.merge(["phone"], "guest")
        store.merge(["tablet"], "u")
        assert store.merge(["guest"], "u") == 2  # the guest brings the phone
        assert store.aliases("phone") == ["guest", "phone", "tablet", "u"]
        assert store.get(["phone"])["phone"].items == ("cup", "dish")
        store.unmerge("guest")
        assert store.aliases("phone") == ["guest", "phone"]
        assert store.get(["guest", "u"])["guest"].items == ("cup",)

    def test_an_event_that_two_ids_sent_counts_once(self, store: OnlineStore) -> None:
        one, other = Event("same", "phone", "cup", "purchase", T0), Event("same", "u", "cup", "purchase", T0)
        store.append([one])
        store.merge(["phone"], "u")
        store.append([Event(f"e{n}", "u", "dish", "view", T0 - n - 1) for n in range(KEEP_EVENTS)])
        store.get(["u"])
        assert store.append([other]) == [Ack.STORED]
        assert store.get(["u"])["u"].size == KEEP_EVENTS + 1
        store.unmerge("phone")
        assert store.get(["phone"])["phone"].size == 1
        assert store.get(["u"])["u"].size == KEEP_EVENTS + 1

    def test_a_shared_device_does_not_make_strangers_one(self, store: OnlineStore) -> None:
        for user in ("a", "b", "c"):
            store.merge(["kiosk"], user)
        with pytest.raises(DataError, match="at most 50 and 3"):
            store.merge(["kiosk"], "d")
        assert store.aliases("kiosk") == ["a", "b", "c", "kiosk"]
        with pytest.raises(DataError, match="51 ids"):
            store.merge([f"device{n}" for n in range(50)], "u")
        assert store.aliases("u") == ["u"]
        with pytest.raises(DataError):
            store.merge(["x"], "a\nb")

    def test_deleting_a_person_deletes_all_their_ids(self, store: OnlineStore) -> None:
        made = events(40, users=3)
        store.append(made)
        store.describe("u1", {"age": 3})
        store.merge(["u1"], "u0")
        assert store.delete("u1") == sum(event.user_id != "u2" for event in made)
        for user in ("u0", "u1"):
            assert store.history(user) == []
            assert store.aliases(user) == [user]
            check_same(store.get([user])[user], FOLDER.empty(user))
        check_same(store.get(["u2"])["u2"], clean(made, "u2"))

    def test_merging_while_others_append_loses_nothing(self, store: OnlineStore) -> None:
        made = events(90, users=3, seed=8)

        def work(part: Sequence[Event]) -> None:
            for event in part:
                store.append([event])
                store.get([event.user_id])

        threads = [threading.Thread(target=work, args=(made[place::3],)) for place in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(3):
            store.merge(["u1"], "u0")
            store.unmerge("u1")
        store.merge(["u1"], "u0")
        for thread in threads:
            thread.join()
        check_same(store.get(["u1"])["u1"], folded(made, ["u0", "u1"], "u1"))
        check_same(store.get(["u2"])["u2"], clean(made, "u2"))

    # -- attributes ----------------------------------------------------------------------------------------------------

    def test_attributes_come_with_the_state(self, store: OnlineStore) -> None:
        assert store.describe("u", {"age": 30, "city": "Köln", "member": True, "likes": ["a", "b"]}) == Ack.STORED
        store.describe("u", {"age": None, "city": "Bonn"})
        told = {"city": "Bonn", "member": True, "likes": ["a", "b"]}
        assert store.attributes("u") == told
        state = store.get(["u"])["u"]
        assert (state.attributes, state.size) == (told, 0)
        store.append([Event("e", "u", "cup", "view", T0)])
        for _ in range(2):
            assert store.get(["u"])["u"].attributes == told
        assert store.attributes("nobody") == {}
        assert store.delete("u") == 1
        assert store.attributes("u") == {}

    def test_attributes_of_a_person_are_those_of_all_ids(self, store: OnlineStore) -> None:
        store.describe("phone", {"age": 1, "device": "phone"})
        store.describe("u", {"age": 40})
        store.merge(["phone"], "u")
        assert store.attributes("phone") == {"age": 40, "device": "phone"} == store.get(["u"])["u"].attributes
        store.describe("u", {"device": None})
        assert store.attributes("u") == {"age": 40}
        store.unmerge("phone")
        assert store.attributes("phone") == {"age": 1}

    def test_a_users_table_fills_what_nobody_said(self, store: OnlineStore) -> None:
        store.describe("u", {"age": 31})
        nan = float("nan")
        rows = pa.table({"user_id": ["u", "v"], "age": pa.array([30, None], pa.int32()), "city": ["Bonn", "Köln"], "height": [nan, nan]})
        done: list[int] = []
        assert store.backfill_users(rows, done.append) == 2
        assert done == [2]
        assert store.attributes("u") == {"age": 31, "city": "Bonn"}
        assert store.attributes("v") == {"city": "Köln"}

    def test_illegal_attributes_are_refused(self, store: OnlineStore) -> None:
        for wrong in ({"": 1}, {"a\nb": 1}, {"a": float("inf")}, {"a": {"b": 1}}, {"a": [1]}, {"a": "x" * 9000}, {"a": "\ud800"}):
            with pytest.raises(DataError):
                store.describe("u", {"fine": 1, **wrong})
        with pytest.raises(DataError, match="at most 100"):
            store.describe("u", {f"a{n}": n for n in range(101)})
        assert store.attributes("u") == {}

    # -- much at once --------------------------------------------------------------------------------------------------

    def test_export_gives_all_events_as_they_came(self, store: OnlineStore) -> None:
        made = events(50, users=5)
        store.append(made)
        store.merge(["u1"], "u0")
        store.delete("u2", block=True)
        parts = list(store.export(batch_rows=8))
        assert len(parts) > 1
        assert all(part.schema.equals(EVENTS) for part in parts)
        found = sorted((row["user_id"], row["event_id"]) for part in parts for row in part.to_pylist())
        assert found == sorted((event.user_id, event.event_id) for event in made if event.user_id != "u2")
        copy = [event for part in parts for chunk in events_of(part) for event in chunk]
        assert sorted(copy, key=lambda e: e.event_id) == sorted((e for e in made if e.user_id != "u2"), key=lambda e: e.event_id)

    def test_backfill_folds_long_pasts_and_refuses_what_is_no_event(self, store: OnlineStore) -> None:
        made = events(200, users=2, seed=2)
        done: list[int] = []
        assert store.backfill(table(made), done.append) == 200
        assert done[-1] == 200
        assert store.prune([OTHER]) == 2  # they were folded
        for user in ("u0", "u1"):
            check_same(store.get([user])[user], clean(made, user))
        rows = table(made[:3]).to_pylist()
        for column, value in {"item_id": "a\nb", "price": float("inf"), "event": "buy"}.items():
            with pytest.raises(DataError):
                store.backfill(pa.Table.from_pylist([rows[0], {**rows[1], column: value}, rows[2]], schema=EVENTS))

    def test_any_interleaving_is_the_clean_replay(self, new_place: Callable[[], Callable[[Folder], OnlineStore]]) -> None:
        from store_machine import MACHINE, StoreMachine

        run_state_machine_as_test(lambda: StoreMachine(new_place()), settings=MACHINE)
