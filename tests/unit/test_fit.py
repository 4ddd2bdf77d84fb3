"""Fitting a pipeline: nothing after the cut is learned from, rows are made without the stacking leak, and what is evaluated is served."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import taste_shop

from maple import learn
from maple.artifacts import Place
from maple.config import Section
from maple.data.dataset import Dataset, Float32, Int32, Int64
from maple.data.ingest import ingest_local
from maple.data.presets import load_source
from maple.data.simulate import simulate, write
from maple.data.splits import Boundaries, split_of
from maple.errors import DataError
from maple.evaluate.harness import Relevant, relevant_of
from maple.features.build import build_local
from maple.features.extras import Extras
from maple.features.spec import FeatureSpec
from maple.features.store import Event
from maple.features.store_sqlite import SqliteStore
from maple.features.ticks import ItemTimeline
from maple.hashing import rng
from maple.models.base import Array, FitContext, Metrics, Retriever, State
from maple.models.catalog import RANKERS
from maple.recommend.bundle import Bundle, load
from maple.recommend.engine import Slates
from maple.recommend.settings import PipelineSettings
from maple.run import RunConfig
from maple.schema import EVENT_CODES, EVENT_TYPES
from maple.train import fit
from maple.train.fit import Fitted, fit_pipeline, fit_ranker, lists_of_pipeline, lists_of_source, offline_pipeline, owned_mask
from maple.train.rows import RowSettings, queries_at

LIGHT = [{"name": "popular", "model": "popularity"}, {"name": "mine", "model": "frequency"}, {"name": "ease", "model": "ease"}]
SMALL_DCN = {"model": "dcn", "config": {"ensemble": 1, "deep": [8], "rank": 4, "training": {"epochs": 1}}}
EVERYTHING = RowSettings(negatives=10_000)


class MeansForTests:
    """Scores a row by its distance to the mean of the positive rows: learns from every number it is given, in no time."""

    class Config(Section):
        pass

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or self.Config()
        self.names: list[str] = []
        self.mean: Array = np.empty(0)

    def fit(self, columns: Mapping[str, Array], labels: Float32, groups: Int64, ctx: FitContext) -> Metrics:
        self.names = sorted(columns)
        self.mean = self._table(columns)[labels[:, 0] > 0].mean(axis=0)
        return {"positives": float(labels.sum())}

    def score(self, columns: Mapping[str, Array]) -> Float32:
        distance = np.abs(self._table(columns) - self.mean) / (1 + np.abs(self.mean))
        return -distance.mean(axis=1, keepdims=True).astype(np.float32)

    def _table(self, columns: Mapping[str, Array]) -> Array:
        return np.stack([np.nan_to_num(columns[name].astype(np.float64), posinf=9.0, neginf=-9.0) for name in self.names], axis=1)

    def state(self) -> State:
        return {"mean": self.mean, "names": np.frombuffer(json.dumps(self.names).encode(), np.uint8)}

    @classmethod
    def from_state(cls, config: Config, state: State) -> MeansForTests:
        out = cls(config)
        out.mean, out.names = state["mean"], json.loads(state["names"].tobytes())
        return out


@pytest.fixture(scope="module", autouse=True)
def means() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RANKERS, "means-for-tests", f"{__name__}:MeansForTests")
        yield


@pytest.fixture(scope="module")
def data() -> Dataset:
    return taste_shop.dataset()


@pytest.fixture(scope="module")
def cut(data: Dataset) -> Boundaries:
    return split_of(data)


def settings(ranker: Mapping[str, Any] | None = None, **more: Any) -> PipelineSettings:
    page = {"history_limit": 8, "sources": LIGHT, "ranker": ranker or {"model": "means-for-tests"}, "cold": "rank", **more}
    return PipelineSettings.parse(page, "test")


def fitted(data: Dataset, cut: Boundaries, chosen: PipelineSettings | None = None, **more: Any) -> Fitted:
    return fit_pipeline(data, chosen or settings(), cut, fingerprint="f" * 64, row_settings=EVERYTHING, say=lambda text: None, **more)


def scrambled(data: Dataset, start: int, end: int = 1 << 60, seed: int = 0) -> Dataset:
    """The same users at the same times, but other items, events, prices and values in [start, end)."""
    log, random = data.log, rng(seed, "scramble")
    part = (log.time >= start) & (log.time < end)
    count = int(part.sum())
    assert count > 50
    item, event, value, price = log.item.copy(), log.event.copy(), log.value.copy(), log.price.copy()
    item[part] = random.integers(0, len(data.items), count)
    event[part] = random.choice([EVENT_CODES["purchase"], EVENT_CODES["return"], EVENT_CODES["view"]], count)
    value[part], price[part] = random.random(count) * 5, random.random(count) * 100
    return replace(data, log=replace(log, item=item, event=event, value=value, price=price))


# -- no leak -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranker", [{"model": "means-for-tests"}, SMALL_DCN], ids=["means", "dcn"])
def test_nothing_from_the_cut_on_changes_a_bit_of_the_bundle(
    data: Dataset, cut: Boundaries, tmp_path: Path, ranker: dict[str, Any]
) -> None:
    def digest(known: Dataset, timeline: ItemTimeline | None = None) -> str:
        # The digest is over the bytes of every file: models, ranker, item features, popularity, and the answers to the canaries.
        return fitted(known, cut, settings(ranker), timeline=timeline).bundle.save(Place.at(tmp_path))

    spec = FeatureSpec(history_limit=8)
    expected = digest(data)
    assert digest(data.before(cut.t2)) == expected, "the later events do not exist"
    assert digest(scrambled(data, cut.t2)) == expected, "the later events are others"
    # The steps give item features that were built from the whole log: they may only be read at ticks closed by then.
    assert digest(data, ItemTimeline.from_data(data, spec)) == expected
    assert digest(data, ItemTimeline.from_data(scrambled(data, cut.t2), spec)) == expected
    # The test can fail: what lies before the cut does matter.
    assert digest(scrambled(data, cut.t1, cut.t2)) != expected


def test_one_event_at_the_cut_is_out_and_one_just_before_it_is_in(data: Dataset, cut: Boundaries, tmp_path: Path) -> None:
    def digest(moment: int) -> str:
        row = int(np.flatnonzero(data.log.time >= cut.t2)[0])
        user = data.log.user[row]
        time, item = data.log.time.copy(), data.log.item.copy()
        time[row], item[row] = moment, (item[row] + 4) % len(data.items)
        order = np.lexsort((time, data.log.user))
        log = replace(data.log, time=time, item=item)
        assert (log.user[order] == data.log.user).all()
        assert user in log.user
        moved = replace(data, log=type(log)(*(getattr(log, name)[order] for name in ("user", "item", "event", "time", "value", "price"))))
        return fitted(moved, cut).bundle.save(Place.at(tmp_path))

    outside = fitted(data, cut).bundle.save(Place.at(tmp_path))
    assert digest(cut.t2) == outside
    assert digest(cut.t2 - 1) != outside


def test_rows_come_from_sources_and_features_before_t1_and_labels_from_after_it(
    data: Dataset, cut: Boundaries, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    real = fit.fit_sources

    def spy(known: Dataset, *rest: Any) -> tuple[dict[str, Retriever], dict[str, Metrics]]:
        seen.append(known.span)
        return real(known, *rest)

    monkeypatch.setattr(fit, "fit_sources", spy)
    before = fitted(data, cut)
    (_, first), (_, second) = seen
    assert first < cut.t1 <= second < cut.t2
    assert first == data.log.time[data.log.time < cut.t1].max(), "and on everything before T1"
    assert second == data.log.time[data.log.time < cut.t2].max()

    # Other purchases in [T1, T2), of the same users: other labels, and not another bit in any column.
    log = data.log
    inside = (log.time >= cut.t1) & (log.time < cut.t2)
    other = replace(data, log=replace(log, item=np.where(inside, (log.item + 4) % len(data.items), log.item).astype(np.int32)))
    after = fitted(other, cut)
    assert before.rows is not None
    assert after.rows is not None
    assert before.rows.columns.keys() == after.rows.columns.keys()
    assert len(before.rows) == len(after.rows), "every user's candidates are the whole catalogue"
    for name, column in before.rows.columns.items():
        np.testing.assert_array_equal(column, after.rows.columns[name], err_msg=name)
    assert before.rows.labels.tolist() != after.rows.labels.tolist()


def test_labels_are_what_the_users_went_on_to_buy(data: Dataset, cut: Boundaries) -> None:
    made = fitted(data, cut).rows
    assert made is not None
    relevant = relevant_of(data, cut.t1, cut.t2, new_only=False, known_before=cut.t1)
    assert len(np.unique(made.groups)) == len(relevant)
    assert made.labels.sum() == len(relevant.items)
    assert len(made) == len(relevant) * len(data.items)


def test_early_sources_and_given_rows_are_used_as_they_are(data: Dataset, cut: Boundaries, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fitted(data, cut)
    chosen = settings()
    early, _ = fit.fit_sources(data.before(cut.t1), chosen, FitContext(), lambda text: None)
    calls: list[int] = []
    real = fit.fit_sources

    def spy(known: Dataset, *rest: Any) -> Any:
        calls.append(known.span[1])
        return real(known, *rest)

    monkeypatch.setattr(fit, "fit_sources", spy)
    with_early = fitted(data, cut, early=early)
    with_rows = fitted(data, cut, rows=whole.rows)
    assert len(calls) == 2, "only the final sources are fitted"
    for other in (with_early, with_rows):
        assert other.bundle._files() == whole.bundle._files()


def test_sources_that_propose_nothing_of_use_are_an_error_with_advice(data: Dataset, cut: Boundaries) -> None:
    # The personal frequency source only knows what was bought before, and new purchases alone are relevant here.
    chosen = settings(sources=LIGHT[1:2], repeats=False)
    with pytest.raises(DataError, match=r"the sources proposed none .* more candidates"):
        fitted(data.where(data.log.event == EVENT_CODES["purchase"]), cut, chosen)


def test_the_seed_decides_which_rows_are_drawn(data: Dataset, cut: Boundaries) -> None:
    def columns(seed: int) -> bytes:
        few = RowSettings(negatives=5)
        ctx = FitContext(seed=seed)
        made = fit_pipeline(data, settings(), cut, fingerprint="f" * 64, row_settings=few, ctx=ctx, say=lambda text: None).rows
        assert made is not None
        return b"".join(made.columns[name].tobytes() for name in sorted(made.columns))

    assert columns(1) == columns(1)
    assert columns(1) != columns(2)


def test_kept_rows_give_the_same_ranker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step keeps its rows in the home; read back they are the same to the bit, and other settings do not find them."""
    monkeypatch.setenv("MAPLE_HOME", str(tmp_path / "home"))
    home = Place.at(tmp_path / "home")
    source, root = load_source(str(write(simulate(2, num_users=120, num_items=60, days=40), tmp_path / "raw")))
    snapshot = ingest_local(source, root, home)
    build_local(snapshot, FeatureSpec(history_limit=8), home)
    chosen = settings(SMALL_DCN)
    config = RunConfig.parse({"pipeline": chosen.plain(), "rows": {"negatives": 20}}, "test")
    material = learn.Material.open(config, lambda text: None)
    made = learn._rows(config, material, chosen, lambda text: None)
    assert made.labels.sum() > 20

    def forbidden(*arguments: object, **more: object) -> None:
        raise AssertionError("nothing is fitted or made where rows are kept")

    with monkeypatch.context() as patch:
        patch.setattr(learn, "ranker_rows", forbidden)
        patch.setattr(learn, "fit_sources", forbidden)
        kept = learn._rows(config, material, chosen, lambda text: None)
        for other in ({"rows": {"negatives": 21}}, {"seed": 1}):
            with pytest.raises(AssertionError, match="nothing is fitted"):
                learn._rows(RunConfig.parse(config.plain() | other, "test"), material, chosen, lambda text: None)
    assert kept.columns.keys() == made.columns.keys()
    for name, column in [*made.columns.items(), ("labels", made.labels), ("groups", made.groups)]:
        again = {**kept.columns, "labels": kept.labels, "groups": kept.groups}[name]
        assert again.dtype == column.dtype, name
        np.testing.assert_array_equal(again, column, err_msg=name)
    rankers = [fit_ranker(rows, chosen, material.ctx)[0].state() for rows in (made, kept)]
    assert rankers[0].keys() == rankers[1].keys()
    assert all(array.tobytes() == rankers[1][name].tobytes() for name, array in rankers[0].items())


# -- what is evaluated is what is served -------------------------------------------------------------------------------


def test_evaluated_lists_are_served_lists(data: Dataset, cut: Boundaries, tmp_path: Path) -> None:
    """Users of the log, and the same users folded by the online store and asked of the loaded bundle as the service asks it."""
    rerank = {"caps": [{"column": "category", "limit": 6}], "mmr": {"relevance": 0.8, "by": "category"}}
    digest = fitted(data, cut, settings(SMALL_DCN, rerank=rerank)).bundle.save(Place.at(tmp_path))
    bundle = load(Place.at(tmp_path), digest)
    relevant = relevant_of(data, cut.t2, data.span[1] + 1, new_only=False, known_before=cut.t2)
    known = data.before(cut.t2)
    evaluated = lists_of_pipeline(bundle, data, relevant, cut.t2, 10)(np.arange(len(relevant), dtype=np.int32))
    assert len(relevant) > 40

    served, scores = _served(bundle, known, relevant.users, cut.t2, tmp_path)
    np.testing.assert_array_equal(evaluated, served)
    # The same with scores, by the pipeline that also makes the ranker's rows.
    assert bundle.features is not None
    pipeline = offline_pipeline(bundle.parts, known, bundle.features.spec, extras=Extras.fit(known, bundle.features.spec, until=cut.t1))
    asked = queries_at(data, relevant.users, cut.t2, history_limit=8, k=10)
    offline = pipeline.run(asked).lists(10)
    np.testing.assert_array_equal(offline[0], served)
    np.testing.assert_allclose(offline[1], scores, atol=1e-4)
    assert len({tuple(row) for row in served.tolist()}) > 20, "lists are personal"


def _served(bundle: Bundle, known: Dataset, users: Int32, now: int, folder: Path) -> tuple[Int32, Float32]:
    assert bundle.folder is not None
    log = known.log
    ids, items = known.users.decode(log.user), known.items.decode(log.item)
    events = [
        Event(f"e{n:06d}", ids[n], items[n], EVENT_TYPES[log.event[n]], int(log.time[n]), float(log.value[n]), float(log.price[n]))
        for n in rng(0, "arrival").permutation(len(log)).tolist()
    ]
    store = SqliteStore(folder / "store.db", bundle.folder)
    try:
        # They arrive in any order and in several requests, so that states are advanced and folded anew.
        for start in range(0, len(events), 400):
            store.append(events[start : start + 400])
        names = known.users.decode(users)
        states = store.get(names)
    finally:
        store.close()
    answers: list[Slates] = []
    for name in names:
        state = states[name]
        history = [
            (item, EVENT_TYPES[event], at) for item, event, at in zip(state.items, state.events.tolist(), state.times.tolist(), strict=True)
        ]
        answers.append(bundle.pipeline().run([bundle.query(name, now=now, k=10, history=history, state=state)]))
    lists = [answer.lists(10) for answer in answers]
    return np.concatenate([items for items, _ in lists]), np.concatenate([scores for _, scores in lists])


def test_lists_do_not_depend_on_the_batch_or_on_the_future(data: Dataset, cut: Boundaries, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = fitted(data, cut).bundle
    relevant = relevant_of(data, cut.t2, data.span[1] + 1, new_only=False, known_before=cut.t2)
    rows = np.arange(len(relevant), dtype=np.int32)
    lists = lists_of_pipeline(bundle, data, relevant, cut.t2, 10)(rows)
    np.testing.assert_array_equal(lists, lists_of_pipeline(bundle, scrambled(data, cut.t2), relevant, cut.t2, 10)(rows))
    some = rows[::-3]
    np.testing.assert_array_equal(lists[some], lists_of_pipeline(bundle, data, relevant, cut.t2, 10)(some))
    monkeypatch.setattr(fit, "BATCH", 7)
    np.testing.assert_array_equal(lists, lists_of_pipeline(bundle, data, relevant, cut.t2, 10)(rows))


# -- one source alone --------------------------------------------------------------------------------------------------


def test_owned_items_are_those_with_a_target_event_ever(data: Dataset) -> None:
    users = np.array([5, 0, 60, 119], np.int32)
    mask = owned_mask(data, users)
    assert mask.exclude is not None
    offsets, items = mask.exclude
    bought = data.log.event == EVENT_CODES["purchase"]
    for row, user in enumerate(users):
        expected = np.unique(data.log.item[bought & (data.log.user == user)])
        assert items[offsets[row] : offsets[row + 1]].tolist() == expected.tolist()


@pytest.mark.parametrize("repeats", [True, False])
def test_a_source_alone_is_masked_as_the_pipeline_is(data: Dataset, cut: Boundaries, repeats: bool) -> None:
    bundle = fitted(data, cut, settings(sources=[LIGHT[0], LIGHT[2]], repeats=repeats)).bundle
    relevant = relevant_of(data, cut.t2, data.span[1] + 1, new_only=not repeats, known_before=cut.t2)
    rows = np.arange(len(relevant), dtype=np.int32)
    known = data.before(cut.t2)
    askers = {"pipeline": lists_of_pipeline(bundle, data, relevant, cut.t2, 20)}
    askers |= {name: lists_of_source(model, bundle, data, relevant, cut.t2, 20) for name, model in bundle.parts.sources.items()}
    for name, recommend in askers.items():
        again = _bought_before(known, relevant, recommend(rows))
        assert (again > 0) == repeats, name


def _bought_before(known: Dataset, relevant: Relevant, lists: Int32) -> int:
    """How many list places hold what their user had bought."""
    user, item = known.target_pairs()
    pairs = set(zip(user.tolist(), item.tolist(), strict=True))
    return sum((int(user), int(code)) in pairs for user, row in zip(relevant.users, lists, strict=True) for code in row if code >= 0)
