"""Folded states: advancing, the bytes they are packed in, and reading candidates of several users at once."""

from __future__ import annotations

import numpy as np
import pytest
from shop import ITEMS, T0, Happening, offline, online, user_columns

from maple.data.dataset import Vocab
from maple.features.catalogue import Catalogue
from maple.features.fold import DAY
from maple.features.folder import Folder
from maple.features.log_reader import LogReader
from maple.features.spec import FeatureSpec
from maple.features.states import KEYED, StateReader, UserState
from maple.features.store import Event, rows_of
from maple.features.view import Key

SPEC = FeatureSpec(history_limit=3)
CATALOGUE = Catalogue.from_table(Vocab(ITEMS["item_id"].combine_chunks()), ITEMS)
FOLDER = Folder(SPEC, CATALOGUE)
EVENTS = online(
    [
        Happening("u", "apple", "view", 0),
        Happening("u", "cup", "purchase", DAY, value=2.0),
        Happening("u", "new thing", "purchase", DAY, price=3.0),
        Happening("u", "egg", "rating", 2 * DAY, value=5.0),
    ]
)


def folded(events: list[Event] = EVENTS) -> UserState:
    return FOLDER.advance([FOLDER.empty("u")], rows_of([events]))[0]


def same(one: UserState, two: UserState) -> None:
    assert (one.user, one.items, one.size, one.tail) == (two.user, two.items, two.size, two.tail)
    for name in ("events", "times", "values", "prices"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    for key in (Key.USER, *KEYED):
        assert one.keyed[key].ids == two.keyed[key].ids
        np.testing.assert_array_equal(one.keyed[key].state, two.keyed[key].state)
        np.testing.assert_array_equal(one.keyed[key].last, two.keyed[key].last)


def test_a_state_keeps_the_last_events_and_folds_all() -> None:
    state = folded()
    assert state.items == ("cup", "new thing", "egg")
    assert state.size == 4
    assert state.tail == (T0 + 2 * DAY, "e0003")
    assert state.keyed[Key.USER_ITEM].ids == ("apple", "cup", "new thing", "egg")
    assert state.keyed[Key.USER_CATEGORY].ids == ("food", "home")  # neither the egg nor the unknown thing has one


@pytest.mark.parametrize("cut", range(5))
def test_folding_in_pieces_is_folding_at_once(cut: int) -> None:
    part = FOLDER.advance([FOLDER.empty("u")], rows_of([EVENTS[:cut]]))
    same(FOLDER.advance(part, rows_of([EVENTS[cut:]]))[0], folded())


def test_many_users_at_once_are_as_one_by_one() -> None:
    others = online([Happening("v", "dish", "purchase", 5), Happening("v", "cup", "view", 6)])
    both = FOLDER.advance([FOLDER.empty("u"), FOLDER.empty("none"), FOLDER.empty("v")], rows_of([EVENTS, [], others]))
    same(both[0], folded())
    same(both[1], FOLDER.empty("none"))
    same(both[2], FOLDER.advance([FOLDER.empty("v")], rows_of([others]))[0])


def test_packing_round_trips() -> None:
    state = folded()
    found = FOLDER.unpack(FOLDER.pack(state, "7"), "u", "7")
    assert found is not None
    same(found, state)
    empty = FOLDER.unpack(FOLDER.pack(FOLDER.empty("x"), "1"), "x", "1")
    assert empty is not None
    same(empty, FOLDER.empty("x"))


def test_what_is_not_exactly_this_state_is_a_miss() -> None:
    data = FOLDER.pack(folded(), "7")
    assert FOLDER.unpack(data, "v", "7") is None
    assert FOLDER.unpack(data, "u", "8") is None
    assert FOLDER.unpack(None, "u", "7") is None
    assert FOLDER.unpack(b"", "u", "7") is None
    assert FOLDER.unpack(b"junk", "u", "7") is None
    assert Folder(SPEC.with_(half_lives=[3.0]), CATALOGUE).unpack(data, "u", "7") is None
    moved = Catalogue.from_table(CATALOGUE.items, ITEMS.set_column(2, "brand", [["z"] * 5]))
    assert Folder(SPEC, moved).unpack(data, "u", "7") is None
    for place in range(0, len(data), 7):
        broken = bytearray(data)
        broken[place] ^= 0x20
        assert FOLDER.unpack(bytes(broken), "u", "7") is None
    for size in range(0, len(data), 97):
        assert FOLDER.unpack(data[:size], "u", "7") is None


def test_an_unknown_item_counts_as_soon_as_a_catalogue_knows_it() -> None:
    known = ITEMS.slice(0, 1).set_column(0, "item_id", [["new thing"]])
    later = Catalogue.from_table(Vocab(known["item_id"].combine_chunks()), known)
    reader = StateReader(SPEC, later)
    columns = reader.columns([folded()], np.array([T0 + 3 * DAY]), np.array([0, 2]), np.array([0, -1], np.int32))[1]
    np.testing.assert_allclose(columns["user_item.bought.times"], [np.log(2), 0.0], rtol=1e-6)


def test_a_batch_of_users_reads_as_its_parts() -> None:
    others = online([Happening("v", "dish", "purchase", 5), Happening("v", "cup", "view", 6)])
    states = [folded(), FOLDER.empty("none"), FOLDER.advance([FOLDER.empty("v")], rows_of([others]))[0]]
    reader = StateReader(SPEC, CATALOGUE)
    now = T0 + np.array([3, 4, 5]) * DAY
    offsets = np.array([0, 3, 4, 8])
    items = np.array([0, 2, -1, 1, 3, 2, 2, 4], np.int32)
    whole = reader.columns(states, now, offsets, items)[1]
    for row in range(3):
        some = slice(offsets[row], offsets[row + 1])
        part = reader.columns(states[row : row + 1], now[row : row + 1], np.array([0, some.stop - some.start]), items[some])[1]
        for name, column in part.items():
            np.testing.assert_array_equal(whole[name][some], column, err_msg=name)
    assert len(user_columns(reader, [], now[:0])["user.baskets.count"]) == 0


def test_the_log_reader_reads_batches_as_single_queries() -> None:
    events = [event for event in EVENTS if event.item_id != "new thing"] + online([Happening("v", "dish", "purchase", 5, name="z")])
    data = offline(events, ["none"])
    reader = LogReader(data, SPEC)
    users = np.array([2, 0, -1, 1, 0], np.int32)
    now = T0 + np.array([3, 1, 9, 4, 0]) * DAY
    offsets = np.array([0, 2, 5, 6, 6, 8])
    items = np.array([3, 2, 2, -1, 2, 0, 4, 0], np.int32)
    own, whole = reader.columns(users, now, offsets, items)
    for row in range(5):
        some = slice(offsets[row], offsets[row + 1])
        part = reader.columns(users[row : row + 1], now[row : row + 1], np.array([0, some.stop - some.start]), items[some])[1]
        for name, column in part.items():
            np.testing.assert_array_equal(whole[name][some], column, err_msg=name)
        for name, column in user_columns(reader, users[row : row + 1], now[row : row + 1]).items():
            np.testing.assert_array_equal(own[name][row : row + 1], column, err_msg=name)


def test_the_log_reader_reads_in_chunks_what_it_reads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    happened = [Happening(f"u{n % 7}", ITEMS["item_id"][n % 5].as_py(), "purchase", n * DAY // 4) for n in range(60)]
    reader = LogReader(offline(online(happened), ["none"]), SPEC)
    users = np.array([4, 0, 4, -1, 6, 2, 7, 0], np.int32)
    now, offsets = T0 + np.arange(8) * 2 * DAY, np.array([0, 2, 2, 5, 6, 7, 9, 10, 12])
    items = np.array([0, 1, 2, -1, 4, 3, 2, 1, 0, 0, 4, 3], np.int32)
    whole = reader.columns(users, now, offsets, items)
    for size in (1, 9, 30):
        monkeypatch.setattr("maple.features.log_reader.CHUNK", size)
        for found, expected in zip(reader.columns(users, now, offsets, items), whole, strict=True):
            for name, column in found.items():
                np.testing.assert_array_equal(column, expected[name], err_msg=name)


def test_a_clock_that_is_behind_does_not_make_sums_grow() -> None:
    reader = StateReader(SPEC, CATALOGUE)
    then = user_columns(reader, [folded()], np.array([T0 + 2 * DAY]))
    before = user_columns(reader, [folded()], np.array([T0 - 9 * DAY]))
    np.testing.assert_array_equal(before["user.activity.purchase_7d"], then["user.activity.purchase_7d"])
    assert before["user.recency.any"][0] == 0.0
