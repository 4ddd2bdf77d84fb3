"""The contract of a retriever, as tests that every model inherits.

A subclass names the model and, where they do not hold for it, switches single promises off::

    class TestAls(RetrieverSuite):
        model = Als
        config = AlsConfig(factors=4, regularization=5)
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest

from maple.artifacts import load_tensors, tensor_bytes
from maple.config import Section
from maple.data.dataset import Dataset, Histories
from maple.errors import ArtifactError, ConfigError, NotFittedError
from maple.models.base import FitContext, Mask, QueryBatch, Retriever, Space
from maple.schema import EVENT_CODES, TIMESTAMP

DAY = 86_400_000_000
START = 1_600_000_000_000_000
PURCHASE, VIEW, IMPRESSION = EVENT_CODES["purchase"], EVENT_CODES["view"], EVENT_CODES["impression"]


def dataset(pairs: list[tuple[int, int]], num_users: int, num_items: int, event: str = "purchase") -> Dataset:
    """A data set of (user, item) pairs, a minute apart in the order given; codes are the numbers."""
    events = pa.table(
        {
            "event_id": [f"e{n:06d}" for n in range(len(pairs))],
            "user_id": [f"u{user:04d}" for user, _ in pairs],
            "item_id": [f"i{item:04d}" for _, item in pairs],
            "event": [event] * len(pairs),
            "timestamp": pa.array([START + n * 60_000_000 for n in range(len(pairs))], TIMESTAMP),
            "value": pa.nulls(len(pairs), pa.float32()),
            "price": pa.nulls(len(pairs), pa.float32()),
        }
    )
    items = pa.table(
        {
            "item_id": [f"i{item:04d}" for item in range(num_items)],
            "title": [f"thing {item}" for item in range(num_items)],
            "category": [f"c{item % 2}" for item in range(num_items)],
            "brand": [f"b{item % 5}" for item in range(num_items)],
            "price": pa.array([1.0 + item for item in range(num_items)], pa.float32()),
        }
    )
    users = pa.table({"user_id": [f"u{user:04d}" for user in range(num_users)]})
    return Dataset.from_tables(events, items, users)


def checkerboard(size: int = 40) -> Dataset:
    """Even users like even items, odd users odd items, but for the diagonal: each user's only right answer is their own number."""
    rng = np.random.default_rng(0)
    pairs = [(user, item) for user in range(size) for item in range(user % 2, size, 2) if item != user]
    return dataset([pairs[place] for place in rng.permutation(len(pairs))], size, size)


def two_tastes(num_users: int = 80, num_items: int = 41) -> Dataset:
    """Users of two tastes buy 6 to 14 items, nine in ten of their taste (the item's parity); the last item was never bought."""
    rng = np.random.default_rng(1)
    pairs = []
    for user in range(num_users):
        taste = np.arange(user % 2, num_items - 1, 2)
        other = np.arange(1 - user % 2, num_items - 1, 2)
        weight = 1 / np.arange(1, len(taste) + 1) ** 0.5
        for _ in range(int(rng.integers(6, 15))):
            pool = taste if rng.random() < 0.9 else other
            pairs.append((user, int(rng.choice(pool, p=weight / weight.sum()))))
    return dataset([pairs[place] for place in rng.permutation(len(pairs))], num_users, num_items)


def queries_of(*histories: list[int]) -> QueryBatch:
    """Queries whose users bought these items, a day apart, the last one a day ago."""
    now = START + 1000 * DAY
    parts = [(items, [PURCHASE] * len(items), [now - (len(items) - place) * DAY for place in range(len(items))]) for items in histories]
    return QueryBatch(Histories.of(parts), np.full(len(histories), now, np.int64))


def everything(num_queries: int, num_items: int) -> tuple[np.ndarray, np.ndarray]:
    """All items as candidates of every query: (items, offsets)."""
    return np.tile(np.arange(num_items, dtype=np.int32), num_queries), np.arange(num_queries + 1, dtype=np.int64) * num_items


HISTORIES: tuple[list[int], ...] = ([0, 2, 4, 8], [1, 3], [5, 7, 5, 9, 11, 1], [6], [10, 11, 12], [3, 3, 3], list(range(0, 40, 2)))


class RetrieverSuite:
    """Inherit, name the model and a configuration that is fast and accurate on some hundred events."""

    model: ClassVar[type[Any]]
    config: ClassVar[Section | None] = None  # None = the defaults
    personal: ClassVar[bool] = True  # an empty history gets no answer
    discovers: ClassVar[bool] = True  # finds items that are not in the history
    relates: ClassVar[bool] = True  # knows similar items
    explains: ClassVar[bool] = True  # names history items as reasons
    tolerance: ClassVar[float] = 2e-5  # of float32 sums in another order

    @classmethod
    def make(cls) -> Retriever:
        made: Retriever = cls.model(cls.config)
        return made

    @pytest.fixture(scope="class")
    def data(self) -> Dataset:
        return two_tastes()

    @pytest.fixture(scope="class")
    def fitted(self, data: Dataset) -> Retriever:
        model = type(self).make()
        metrics = model.fit(data, FitContext(seed=7))
        assert all(isinstance(value, float) for value in metrics.values())
        return model

    @pytest.fixture(scope="class")
    def queries(self) -> QueryBatch:
        return queries_of(*HISTORIES)

    # -- settings

    def test_is_a_retriever_with_typed_settings(self) -> None:
        model = self.make()
        assert isinstance(model, Retriever)
        assert issubclass(self.model.Config, Section)
        assert self.model.Config.parse(model.config.plain(), "test") == model.config
        with pytest.raises(ConfigError, match="unknown setting"):
            self.model.Config.parse({"no_such_setting": 1}, "test")

    def test_every_setting_says_what_it_is(self) -> None:
        import ast
        import inspect
        import textwrap

        body = ast.parse(textwrap.dedent(inspect.getsource(self.model.Config))).body[0].body
        fields = [place for place, node in enumerate(body) if isinstance(node, ast.AnnAssign)]
        silent = [body[place].target.id for place in fields if not _is_text(body, place + 1)]
        assert not silent, f"settings without a docstring: {silent}"

    def test_the_search_space_proposes_legal_settings(self) -> None:
        config, space = self.make().config, getattr(self.model.Config, "search_space", dict)()
        for name, (kind, *choices) in space.items():
            assert kind in ("log", "uniform", "int", "choice"), name
            for value in choices[0] if kind == "choice" else choices:
                config.with_(**{name: value})

    def test_unfitted_it_says_so(self, queries: QueryBatch) -> None:
        model = self.make()
        asks = [lambda: model.topk(queries, 3), lambda: model.score(queries, *everything(len(queries), 3)), model.state]
        for ask in [*asks, lambda: model.similar(np.zeros(1, np.int32), 2)] if self.relates else asks:
            with pytest.raises(NotFittedError, match="fit"):
                ask()

    # -- what it answers

    def test_checkerboard(self) -> None:
        if not self.discovers or not self.personal:
            pytest.skip("the right answer is outside what this model can know")
        data = checkerboard()
        model = self.make()
        model.fit(data, FitContext(seed=3))
        users = np.arange(len(data.users), dtype=np.int32)
        queries = QueryBatch.at(data, users, np.full(len(users), data.span[1] + 1), 1000)
        found, _ = model.topk(queries, 1, Mask.seen(queries))
        np.testing.assert_array_equal(found[:, 0], users)

    def test_shapes_and_types(self, fitted: Retriever, queries: QueryBatch) -> None:
        found, scores = fitted.topk(queries, 5)
        assert found.dtype == np.int32
        assert scores.dtype == np.float32
        assert found.shape == scores.shape == (len(queries), 5)
        assert fitted.topk(queries, 0)[0].shape == (len(queries), 0)
        assert fitted.topk(queries_of(), 5)[0].shape == (0, 5)
        items, offsets = everything(len(queries), 41)
        flat = fitted.score(queries, items, offsets)
        assert flat.dtype == np.float32
        assert flat.shape == items.shape
        assert fitted.score(queries_of(), items[:0], offsets[:1]).shape == (0,)

    def test_lists_are_ordered_distinct_padded_and_never_nan(self, fitted: Retriever, queries: QueryBatch) -> None:
        found, scores = fitted.topk(queries, 100)  # more than there are items
        assert not np.isnan(scores).any()
        assert (np.diff(np.nan_to_num(scores, neginf=-1e30), axis=1) <= 0).all()
        np.testing.assert_array_equal(found == -1, scores == -np.inf)
        assert (found < 41).all()
        for row in found:
            real = row[row >= 0]
            assert len(set(real.tolist())) == len(real)
        np.testing.assert_array_equal(fitted.topk(queries, 4)[0], found[:, :4])

    def test_topk_is_the_order_of_score(self, fitted: Retriever, queries: QueryBatch) -> None:
        items, offsets = everything(len(queries), 41)
        flat = fitted.score(queries, items, offsets).reshape(len(queries), 41)
        assert not np.isnan(flat).any()
        found, scores = fitted.topk(queries, 10)
        for row in range(len(queries)):
            real = found[row] >= 0
            assert real.sum() == min(10, np.isfinite(flat[row]).sum())
            np.testing.assert_allclose(flat[row, found[row, real]], scores[row, real], rtol=self.tolerance, atol=self.tolerance)
            rest = np.delete(flat[row], found[row, real])
            if real.any() and len(rest):
                assert rest.max() <= scores[row, real].min() + self.tolerance * max(1.0, abs(float(scores[row, real].min())))

    def test_a_batch_is_its_rows(self, fitted: Retriever, queries: QueryBatch) -> None:
        items, offsets = everything(1, 41)
        every, ends = everything(len(queries), 41)
        flat = fitted.score(queries, every, ends).reshape(len(queries), 41)
        found, scores = fitted.topk(queries, 6)
        for row in range(len(queries)):
            alone = queries.take(np.array([row]))
            np.testing.assert_allclose(fitted.score(alone, items, offsets), flat[row], rtol=self.tolerance, atol=self.tolerance)
            found_alone, scores_alone = fitted.topk(alone, 6)
            np.testing.assert_allclose(scores_alone[0], scores[row], rtol=self.tolerance, atol=self.tolerance)
            clear = np.abs(np.diff(np.nan_to_num(scores[row], neginf=-1e30))).min(initial=1.0) > 10 * self.tolerance
            if clear:
                np.testing.assert_array_equal(found_alone[0], found[row])

    def test_unknown_items_in_a_history_change_nothing(self, fitted: Retriever) -> None:
        plain = queries_of([0, 2, 4])
        now, times = int(plain.now[0]), plain.histories.times.tolist()
        with_unknown = QueryBatch(
            Histories.of([([-1, 0, -1, 2, 4, -1], [PURCHASE] * 6, [times[0] - DAY, times[0], times[1], times[1], times[2], times[2]])]),
            np.array([now], np.int64),
        )
        for got, want in zip(fitted.topk(with_unknown, 8), fitted.topk(plain, 8), strict=True):
            np.testing.assert_array_equal(got, want)

    def test_events_without_a_signal_change_nothing(self, fitted: Retriever) -> None:
        plain = queries_of([0, 2, 4])
        history = plain.histories
        shown = Histories(
            np.array([0, 4]), np.append(history.items, np.int32(7)), np.append(history.events, np.int8(IMPRESSION)),
            np.append(history.times, history.times[-1]),
        )  # fmt: skip
        for got, want in zip(fitted.topk(QueryBatch(shown, plain.now), 8), fitted.topk(plain, 8), strict=True):
            np.testing.assert_array_equal(got, want)

    def test_a_history_of_nothing(self, fitted: Retriever) -> None:
        for history in ([], [-1, -1]):
            queries = queries_of([0, 2], history)
            found, scores = fitted.topk(queries, 3)
            flat = fitted.score(queries, *everything(2, 41)).reshape(2, 41)
            if self.personal:
                assert (found[1] == -1).all()
                assert (flat[1] == -np.inf).all()
            else:
                assert (found[1] >= 0).all()
                assert np.isfinite(scores[1]).all()
            assert (found[0] >= 0).any()

    def test_a_new_user_is_folded_in(self, fitted: Retriever) -> None:
        if not self.personal or not self.discovers:
            pytest.skip("this model does not generalise from a history")
        for taste in (0, 1):
            queries = queries_of([taste, taste + 4, taste + 6])
            found, _ = fitted.topk(queries, 5, Mask.seen(queries))
            assert (found[0] >= 0).all()
            assert (found[0] % 2 == taste).sum() >= 4, f"taste {taste} got {found[0]}"

    def test_masks(self, fitted: Retriever, queries: QueryBatch) -> None:
        allowed = np.zeros(41, bool)
        allowed[::3] = True
        barred = [[0, 3, -1], [], [6], [9, 12], [0], [], [36, 39]]
        exclude = (
            np.concatenate([[0], np.cumsum([len(row) for row in barred])]).astype(np.int64),
            np.array([i for row in barred for i in row], np.int32),
        )
        found, scores = fitted.topk(queries, 41, Mask(allowed, exclude))
        free, free_scores = fitted.topk(queries, 41)
        for row in range(len(queries)):
            keep = [place for place, item in enumerate(free[row]) if item >= 0 and item % 3 == 0 and item not in barred[row]]
            np.testing.assert_allclose(scores[row, : len(keep)], free_scores[row, keep], rtol=self.tolerance, atol=self.tolerance)
            assert set(found[row, : len(keep)].tolist()) == set(free[row, keep].tolist())
            assert (found[row, len(keep) :] == -1).all()

    def test_candidates_may_be_unknown_repeated_and_ragged(self, fitted: Retriever, queries: QueryBatch) -> None:
        some = queries.take(np.array([0, 1, 2]))
        items, offsets = np.array([2, -1, 2, 4, 9], np.int32), np.array([0, 4, 4, 5], np.int64)
        got = fitted.score(some, items, offsets)
        flat = fitted.score(some, *everything(3, 41)).reshape(3, 41)
        np.testing.assert_allclose(got[[0, 2, 3, 4]], flat[[0, 0, 0, 2], [2, 2, 4, 9]], rtol=self.tolerance, atol=self.tolerance)
        assert got[1] == -np.inf

    def test_an_item_nobody_touched_never_leads(self, fitted: Retriever, queries: QueryBatch) -> None:
        flat = fitted.score(queries, *everything(len(queries), 41)).reshape(len(queries), 41)
        assert (flat[:, 40] <= np.where(np.isfinite(flat[:, :40]), flat[:, :40], np.inf).min(axis=1)).all()
        assert not np.isnan(flat).any()

    def test_similar(self, fitted: Retriever) -> None:
        asked = np.array([0, 1, 5, -1, 40], np.int32)
        found, scores = fitted.similar(asked, 6)
        assert found.shape == scores.shape == (5, 6)
        assert not np.isnan(scores).any()
        assert not (found == asked[:, None])[asked >= 0].any(), "an item is not similar to itself"
        np.testing.assert_array_equal(found == -1, scores == -np.inf)
        assert (found[3] == -1).all()
        if self.relates:
            assert (np.diff(np.nan_to_num(scores, neginf=-1e30), axis=1) <= 0).all()
            assert (found[:3, 0] % 2 == asked[:3] % 2).all(), "the nearest item shares the taste"
            assert fitted.similar(asked, 60)[0].shape == (5, 60)

    def test_explain(self, fitted: Retriever, queries: QueryBatch) -> None:
        found, _ = fitted.topk(queries, 5)
        rows, places = np.nonzero(found >= 0)
        items, offsets = found[rows, places], np.concatenate([[0], np.cumsum((found >= 0).sum(axis=1))]).astype(np.int64)
        reasons = fitted.explain(queries, items, offsets)
        assert reasons.dtype == np.int32
        assert reasons.shape == items.shape
        for row, reason in zip(rows, reasons, strict=True):
            assert reason == -1 or reason in HISTORIES[row]
        if self.explains:
            assert (reasons >= 0).mean() > 0.8
        nothing = fitted.explain(queries_of([]), np.array([1, -1], np.int32), np.array([0, 2], np.int64))
        np.testing.assert_array_equal(nothing, [-1, -1])

    def test_a_catalogue_larger_than_its_audience(self) -> None:
        rng = np.random.default_rng(5)
        data = dataset(
            [(int(user), int(item)) for user, item in zip(rng.integers(0, 6, 150), rng.integers(0, 90, 150), strict=True)], 6, 91
        )
        model = self.make()
        model.fit(data, FitContext(seed=1))
        found, scores = model.topk(queries_of([0, 1, 2, 3], [88]), 91)
        assert found.max() < 91
        assert not np.isnan(scores).any()
        assert model.similar(np.arange(91, dtype=np.int32), 7)[0].max() < 91

    # -- fitting and keeping

    def test_the_same_seed_gives_the_same_bits_and_refit_equals_fresh_fit(self, data: Dataset) -> None:
        fresh, again, refitted = self.make(), self.make(), self.make()
        refitted.fit(checkerboard(16), FitContext(seed=9))
        refitted.topk(queries_of([0, 2]), 3)  # whatever it may have derived and kept
        for model in (fresh, again, refitted):
            model.fit(data, FitContext(seed=7))
        want = tensor_bytes(fresh.state())
        assert tensor_bytes(again.state()) == want
        assert tensor_bytes(refitted.state()) == want
        queries = queries_of(*HISTORIES)
        for got, expected in zip(refitted.topk(queries, 7), fresh.topk(queries, 7), strict=True):
            np.testing.assert_array_equal(got, expected)

    def test_fitting_leaves_the_data_alone(self, data: Dataset) -> None:
        before = [column.tobytes() for column in (data.log.user, data.log.item, data.log.time, data.signals)]
        self.make().fit(data, FitContext(seed=7))
        assert [column.tobytes() for column in (data.log.user, data.log.item, data.log.time, data.signals)] == before

    def test_state_round_trip(self, fitted: Retriever, data: Dataset, queries: QueryBatch, tmp_path: Any) -> None:
        path = tmp_path / "model.safetensors"
        path.write_bytes(tensor_bytes(fitted.state()))
        config = self.model.Config.parse(fitted.config.plain(), "test")
        loaded = self.model.from_state(config, Space.of(data), load_tensors(path))
        items, offsets = everything(len(queries), 41)
        pairs = [
            (loaded.topk(queries, 9), fitted.topk(queries, 9)),
            ((loaded.score(queries, items, offsets),), (fitted.score(queries, items, offsets),)),
            (loaded.similar(items[:41], 5), fitted.similar(items[:41], 5)),
            ((loaded.explain(queries, items, offsets),), (fitted.explain(queries, items, offsets),)),
        ]
        for got, want in pairs:
            for one, other in zip(got, want, strict=True):
                np.testing.assert_array_equal(one, other)
        assert tensor_bytes(loaded.state()) == path.read_bytes()

    def test_a_state_that_does_not_fit_is_refused(self, fitted: Retriever, data: Dataset) -> None:
        other = Space.of(two_tastes(20, 31))
        with pytest.raises(ArtifactError):
            self.model.from_state(fitted.config, other, fitted.state())
        with pytest.raises(ArtifactError):
            self.model.from_state(fitted.config, Space.of(data), {})


def _is_text(body: list[Any], place: int) -> bool:
    import ast

    return (
        place < len(body)
        and isinstance(body[place], ast.Expr)
        and isinstance(body[place].value, ast.Constant)
        and isinstance(body[place].value.value, str)
    )
