"""The harness: ask any callable for lists, measure them against what users did next, and keep the result with its protocol.

What is evaluated is a function from test rows to lists, so a single model, the served pipeline or a constant list all go
through the same code. An evaluation holds every user's values; intervals and comparisons come from those.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from maple.data.dataset import Int32, Int64
from maple.errors import ArtifactError, DataError
from maple.evaluate import metrics
from maple.evaluate.bootstrap import bootstrap_means, interval
from maple.evaluate.metrics import Float64
from maple.evaluate.relevant import CatalogueStats, Relevant, Segmentation, item_strata, relevant_of, user_segments

__all__ = [
    "CatalogueStats", "Evaluation", "EvaluationProtocol", "Recommend", "Relevant", "Segment", "Segmentation",
    "evaluate", "item_strata", "relevant_of", "user_segments",
]  # fmt: skip

#: Given rows of the test users (positions in ``Relevant.users``, int32[B]), their lists: int32[B, K], best first, -1 pads.
Recommend: TypeAlias = Callable[[Int32], Int32]

FORMAT = 1


@dataclass(frozen=True)
class EvaluationProtocol:
    """Everything a number needs beside it to mean something. Times are microseconds since 1970."""

    users: int
    pairs: int
    ks: tuple[int, ...]
    masked: bool  # whether the lists leave out what the user already has
    new_only: bool  # whether the relevant items leave it out
    start: int | None
    end: int | None
    known_before: int | None
    catalogue: int
    diversity: str  # the distance of ``diversity@k``: cosine, category or none
    relevant: str  # digest of users and relevant items
    seed: int
    bootstrap: int
    counts: Mapping[str, int] = field(default_factory=dict)  # what the window held and what was left out of it
    notes: Mapping[str, str] = field(default_factory=dict)
    split: Mapping[str, Any] = field(default_factory=dict)  # settings and boundaries of the split, where one was made

    def same_question(self, other: EvaluationProtocol) -> list[str]:
        """The fields in which two protocols ask differently; empty means that their users can be paired."""
        fields = ("relevant", "users", "pairs", "masked", "new_only", "start", "end", "known_before", "catalogue", "diversity")
        return [name for name in fields if getattr(self, name) != getattr(other, name)]


@dataclass(frozen=True)
class Segment:
    """Means and 95 % intervals over the users of one segment; of a stratum of items: over the users who want one, those alone relevant."""

    name: str
    label: str
    users: int
    means: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One recommender's measured lists: per-user values float64[U], their means and 95 % bootstrap intervals, and segments.

    ``means`` also holds what only exists for all lists together (``coverage@k``, ``gini@k``); those have no interval.
    """

    protocol: EvaluationProtocol
    users: Int32
    lists: Int32
    per_user: Mapping[str, Float64]
    means: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    segments: tuple[Segment, ...] = ()

    def __len__(self) -> int:
        return len(self.users)

    def exposure(self, k: int | None = None) -> Int64:
        """How often each item of the catalogue is in the first k positions (default: all), int64[I]."""
        return metrics.exposure(self.lists[:, :k], self.protocol.catalogue)

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays, named for a safetensors file; ``from_json`` takes them back."""
        return {"users": self.users, "lists": self.lists} | {f"user/{name}": values for name, values in self.per_user.items()}

    def to_json(self) -> str:
        """Everything but the arrays, as JSON with sorted keys."""
        plain = {
            "format": FORMAT, "protocol": asdict(self.protocol), "means": dict(self.means), "intervals": dict(self.intervals),
            "segments": [asdict(segment) for segment in self.segments],
        }  # fmt: skip
        return json.dumps(plain, sort_keys=True, indent=1, allow_nan=False)

    @staticmethod
    def from_json(text: str | bytes, tensors: Mapping[str, npt.NDArray[Any]]) -> Evaluation:
        """The evaluation again; ``ArtifactError`` where text and arrays are torn, of another format, or do not fit each other."""
        try:
            plain = json.loads(text)
            if plain["format"] != FORMAT:
                raise ArtifactError(f"this evaluation has format {plain['format']}, this version of Maple reads format {FORMAT}")
            terms = plain["protocol"]
            protocol = EvaluationProtocol(**{**terms, "ks": tuple(terms["ks"])})
            segments = tuple(Segment(**{**part, "intervals": _pairs(part["intervals"])}) for part in plain["segments"])
            per_user = {name.removeprefix("user/"): array for name, array in tensors.items() if name.startswith("user/")}
            lengths = {name: len(array) for name, array in tensors.items() if len(array) != protocol.users}
            if lengths or not per_user.keys() <= plain["means"].keys():
                raise ArtifactError(f"the arrays of this evaluation are not of its {protocol.users} users: {lengths or sorted(per_user)}")
            return Evaluation(
                protocol, tensors["users"], tensors["lists"], per_user, plain["means"], _pairs(plain["intervals"]), segments
            )  # fmt: skip
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"this evaluation cannot be read ({type(error).__name__}: {error}). Evaluate again.") from None


def _pairs(plain: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, float]]:
    return {name: (float(low), float(high)) for name, (low, high) in plain.items()}


def evaluate(
    recommend: Recommend,
    relevant: Relevant,
    *,
    catalogue: CatalogueStats,
    ks: Sequence[int] = (5, 10, 20),
    masked: bool | None = None,
    segments: Mapping[str, Segmentation | Sequence[str] | npt.NDArray[np.str_]] | None = None,
    strata: Mapping[str, Segmentation] | None = None,
    seed: int = 0,
    bootstrap: int = 1000,
    batch: int = 1024,
    notes: Mapping[str, str] | None = None,
    split: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Ask for every test user's list in batches of rows and measure: accuracy at every k, diversity, novelty, coverage.

    ``recommend`` gives int32[B, K >= max(ks)]. ``masked`` says whether its lists leave out what the user already has (by
    default: as the relevant items do). ``segments`` has a label per test user, ``strata`` one per item of the catalogue: a
    stratum's accuracy counts its items alone as relevant. ``split``: how the data was parted, kept with the result.
    ``progress(done, users)`` is called after each batch. ``DataError`` for lists that are not valid (wrong shape, duplicates,
    codes outside the catalogue).
    """
    if len(relevant) == 0:
        raise DataError("there is no test user to evaluate on")
    lists = _ask(recommend, len(relevant), max(ks, default=0), len(catalogue), batch, progress)
    per_user = metrics.ranking_metrics(lists, relevant.offsets, relevant.items, ks)
    whole: dict[str, float] = {}
    information = metrics.self_information(catalogue.users_per_item, catalogue.num_users)
    place = metrics.popularity_rank(catalogue.users_per_item)
    for k in ks:
        top = lists[:, :k]
        if catalogue.vectors is not None:
            per_user[f"diversity@{k}"] = metrics.diversity_by_vector(top, catalogue.vectors)
        elif catalogue.categories is not None:
            per_user[f"diversity@{k}"] = metrics.diversity_by_category(top, catalogue.categories)
        per_user[f"novelty@{k}"] = metrics.mean_over_list(top, information)
        per_user[f"popularity_rank@{k}"] = metrics.mean_over_list(top, place)
        per_user[f"fill@{k}"] = metrics.fill(top)
        whole[f"coverage@{k}"] = metrics.coverage(top, len(catalogue))
        whole[f"gini@{k}"] = metrics.gini(metrics.exposure(top, len(catalogue)))
    names = list(per_user)
    values = np.stack([per_user[name] for name in names], axis=1)
    means, intervals = _summary(names, values, bootstrap, seed, "evaluate")
    parts: list[Segment] = []
    for name, given in (segments or {}).items():
        labelled = Segmentation.of(given)
        if len(labelled.codes) != len(relevant):
            raise DataError(f"segmentation {name!r} labels {len(labelled.codes)} users, there are {len(relevant)} test users")
        for code, label in enumerate(labelled.labels):
            rows = labelled.codes == code
            if rows.any():
                part = _summary(names, values[rows], bootstrap, seed, f"evaluate/{name}/{label}")
                parts.append(Segment(name, label, int(rows.sum()), *part))
    for name, stratum in (strata or {}).items():
        if len(stratum.codes) != len(catalogue):
            raise DataError(f"stratification {name!r} labels {len(stratum.codes)} items, the catalogue has {len(catalogue)}")
        for code, label in enumerate(stratum.labels):
            keep = stratum.codes[relevant.items] == code
            sizes = np.add.reduceat(np.append(keep, False), relevant.offsets[:-1]) * (np.diff(relevant.offsets) > 0)
            rows = sizes > 0
            if rows.any():
                offsets = np.concatenate([[0], np.cumsum(sizes[rows])]).astype(np.int64)
                own = metrics.ranking_metrics(lists[rows], offsets, relevant.items[keep], ks)
                columns = np.stack(list(own.values()), axis=1)
                parts.append(Segment(name, label, int(rows.sum()), *_summary(list(own), columns, bootstrap, seed, f"{name}/{label}")))
    distance = "cosine" if catalogue.vectors is not None else "category" if catalogue.categories is not None else "none"
    protocol = EvaluationProtocol(
        users=len(relevant), pairs=len(relevant.items), ks=tuple(int(k) for k in ks),
        masked=relevant.new_only if masked is None else masked, new_only=relevant.new_only,
        start=relevant.start, end=relevant.end, known_before=relevant.known_before,
        catalogue=len(catalogue), diversity=distance, relevant=relevant.digest,
        seed=seed, bootstrap=bootstrap, counts=dict(relevant.counts), notes=dict(notes or {}),
        split=dict(split or {}),
    )  # fmt: skip
    return Evaluation(protocol, relevant.users, lists, per_user, means | whole, intervals, tuple(parts))


def _ask(recommend: Recommend, users: int, width: int, num_items: int, batch: int, progress: Callable[[int, int], None] | None) -> Int32:
    """The lists of all rows, int32[U, width]; each answer is checked, and an error names its rows."""
    lists = np.full((users, width), -1, dtype=np.int32)
    for start in range(0, users, batch):
        rows = np.arange(start, min(start + batch, users), dtype=np.int32)
        answer = np.asarray(recommend(rows))
        if answer.ndim != 2 or len(answer) != len(rows) or answer.shape[1] < width:
            raise DataError(
                f"asked for the lists of test rows {start}..{rows[-1]}: got an array of shape {answer.shape}, "
                f"expected [{len(rows)}, at least {width}] (pad with -1)"
            )
        try:
            metrics.check_lists(answer, num_items)
        except DataError as error:
            raise DataError(f"asked for the lists of test rows {start}..{rows[-1]}: {error}") from None
        lists[rows] = answer[:, :width]
        if progress is not None:
            progress(int(rows[-1]) + 1, users)
    return lists


def _summary(
    names: Sequence[str], values: Float64, draws: int, seed: int, name: str
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Means and intervals of value columns by metric name."""
    means = {metric: float(mean) for metric, mean in zip(names, values.mean(axis=0), strict=True)}
    if draws < 1:
        return means, {}
    low, high = interval(bootstrap_means(values, draws, seed, name))
    return means, {metric: (float(a), float(b)) for metric, a, b in zip(names, low, high, strict=True)}
