"""The clock that never goes back, with the machine's clocks in the test's hand."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from maple.clock import SteadyClock
from maple.features.fold import DAY

T0 = 1_700_000_000_000_000


def test_it_follows_the_wall_clock_forward_and_the_ticks_while_it_is_behind() -> None:
    wall, ticks = T0, 0
    clock = SteadyClock(lambda: wall * 1000, lambda: ticks * 1000)
    assert clock.now() == T0
    wall, ticks = wall + DAY, 1  # set forward
    assert clock.now() == T0 + DAY
    wall, ticks = wall - DAY, 11  # set back: ten microseconds went by
    assert clock.now() == T0 + DAY + 10
    wall, ticks = T0 + DAY + 5, 12  # nearly there
    assert clock.now() == T0 + DAY + 11
    wall, ticks = T0 + 2 * DAY, 13
    assert clock.now() == T0 + 2 * DAY


@given(st.lists(st.tuples(st.integers(0, DAY), st.integers(-2 * DAY, 2 * DAY)), max_size=30))
def test_it_never_goes_back_and_never_slower_than_time(steps: list[tuple[int, int]]) -> None:
    wall, ticks = T0, 0
    clock = SteadyClock(lambda: wall * 1000, lambda: ticks * 1000)
    before = clock.now()
    for passed, jump in steps:
        wall, ticks = wall + passed + jump, ticks + passed
        now = clock.now()
        assert now >= max(before + passed, wall)
        before = now


def test_the_real_one_is_about_now() -> None:
    clock = SteadyClock()
    one, two = clock.now(), clock.now()
    assert T0 < one <= two
