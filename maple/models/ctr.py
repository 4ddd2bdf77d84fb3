"""DCN-v2: the ranker over feature columns (Wang et al. 2021). Cross layers learn products of features, a deep tower the rest.

Torch trains it, numpy serves it. One member costs about ``2 N (K R 2 L + K h1 + h1 h2)`` multiplications and additions for N
candidates, K inputs, L cross layers of rank R and deep widths h1, h2: 1,000 candidates with 60 number columns take about half a
millisecond on one thread, and as much again for every further member of the ensemble. Members are worth it where groups are few:
with some 1,300 training groups single networks differ by 1 % in NDCG from seed to seed, means of three by half of that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import numpy as np
from pydantic import Field
from scipy.stats import rankdata

from maple.artifacts import Place
from maple.config import Section
from maple.data.dataset import Float32, Int32, Int64, ragged_take
from maple.errors import DataError, NotFittedError
from maple.hashing import rng
from maple.models.base import Array, FitContext, Metrics, SearchSpace, State
from maple.models.columns import Columns, Missing
from maple.models.nn import Batch, Tensors, Training, arrays, linear, mlp, part, sigmoid

if TYPE_CHECKING:
    import torch

CHUNK_ROWS = 65_536


class RankerTraining(Training):
    """Training of a ranker; ``batch_size`` counts rows, and small data gets smaller batches: about 50 an epoch, of 256 rows or more."""

    epochs: int = Field(default=20, ge=1)
    batch_size: int = Field(default=4096, ge=1)
    learning_rate: float = Field(default=3e-3, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    warmup_steps: int = Field(default=20, ge=0)


class DCNv2Config(Section):
    """Settings of ``DCNv2``."""

    cross_layers: int = Field(default=2, ge=0, le=6)
    """Each raises the order of the learned products by one."""
    rank: int = Field(default=32, ge=0)
    """Of the cross matrices; 0 = full."""
    deep: tuple[int, ...] = (64, 32)
    """Widths of the deep tower; empty = none."""
    structure: Literal["parallel", "stacked"] = "parallel"
    """Deep tower beside the cross layers, or on top of them."""
    wide: bool = True
    """A linear part beside them."""
    embedding: int = Field(default=8, ge=1)
    """Width of a code's embedding."""
    max_codes: int = Field(default=50_000, ge=1)
    """Rows per code column; rarer codes share the row of unknown ones."""
    min_count: int = Field(default=3, ge=1)
    """A code with fewer rows in training shares it too."""
    missing: dict[str, Missing] = Field(default_factory=dict)
    """What becomes of missing numbers, by column or pattern: ``{"user.price*": impute}``; else ``both``. See ``columns.Missing``."""
    code_dropout: float = Field(default=0.02, ge=0, lt=1)
    """Codes shown as unknown in training, so that the unknown row is trained."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """In the deep tower."""
    loss: Literal["listwise", "bce"] = "listwise"
    """Over each query's candidates, or per row."""
    blend: float = Field(default=0.0, ge=0)
    """Weight of the other loss, added."""
    ensemble: int = Field(default=3, ge=1, le=8)
    """Members that differ in seed and hold-out; their logits are averaged."""
    training: RankerTraining = RankerTraining()
    """How it is trained."""

    @classmethod
    def search_space(cls) -> SearchSpace:
        """What is worth tuning."""
        return {
            "cross_layers": ("int", 1, 3),
            "rank": ("choice", [16, 32, 64]),
            "deep": ("choice", [[32], [64, 32], [128, 64]]),
            "embedding": ("choice", [4, 8, 16]),
            "dropout": ("choice", [0.0, 0.1, 0.3]),
            "training.learning_rate": ("log", 3e-4, 1e-2),
            "training.weight_decay": ("log", 1e-3, 1.0),
        }


@dataclass(frozen=True, eq=False)
class Rows:
    """Prepared training rows; ``starts`` int64[G+1] are the bounds of the groups."""

    numbers: Float32
    codes: Int32
    labels: Float32
    starts: Int64

    def take(self, groups: Int64) -> Rows:
        """Some of the groups, in that order."""
        index, starts = ragged_take(self.starts, groups)
        return Rows(self.numbers[index], self.codes[index], self.labels[index], starts)

    def __len__(self) -> int:
        return len(self.starts) - 1


@dataclass(frozen=True)
class Sizes:
    """What the network must know of the data."""

    num_numbers: int
    num_codes: int
    table_rows: int
    tasks: int


class DCNv2:
    """The ranker: ``fit`` on point-in-time rows, ``score`` columns of candidates.

    Scores are probabilities with ``loss: bce`` and logits (only comparable within a query) with ``listwise``.
    """

    Config: ClassVar[type[Section]] = DCNv2Config

    def __init__(self, config: DCNv2Config | None = None) -> None:
        self.config: DCNv2Config = config or DCNv2Config()
        self._columns: Columns | None = None
        self._members: list[dict[str, Array]] = []

    # -- learning ------------------------------------------------------------------------------------------------------

    def fit(
        self, columns: Mapping[str, Array], labels: Float32, groups: Int64, ctx: FitContext, *, checkpoint: Place | None = None
    ) -> Metrics:
        """Learn from rows. ``labels`` float32[N, tasks] >= 0, NaN = unknown; ``groups`` int64[N] sorted. Part of the groups is held
        out for early stopping (by NDCG@10 for listwise, log loss for bce), another part by each member. Returns the mean over members.
        """
        from maple.models.loop import fingerprint, train

        labels = np.asarray(labels, dtype=np.float32)
        _check(columns, labels, groups)
        if (self.config.loss == "bce" or self.config.blend) and np.nanmax(labels) > 1:
            raise DataError("bce takes labels between 0 and 1; use loss: listwise with blend: 0 for graded labels, or scale them")
        prepared = Columns.fit(columns, max_codes=self.config.max_codes, min_count=self.config.min_count, missing=self.config.missing)
        numbers, codes = prepared.transform(columns)
        bounds = np.concatenate([[0], np.flatnonzero(np.diff(groups)) + 1, [len(groups)]]).astype(np.int64)
        rows = Rows(numbers, codes, labels, bounds)
        sizes = Sizes(prepared.width, len(prepared.codes), prepared.table_rows, labels.shape[1])
        identity = "" if checkpoint is None else fingerprint(str(self.config.plain()), numbers, codes, labels, groups)
        self._columns = prepared
        order = rng(ctx.seed, "dcn/holdout").permutation(len(rows))
        trained: list[dict[str, Array]] = []
        metrics: list[Metrics] = []
        for member in range(self.config.ensemble):
            held, kept = _fold(order, member, self.config)
            valid = rows.take(held)
            watch = "neg_log_loss" if self.config.loss == "bce" else "ndcg_10"
            usable = watch in _quality(valid, valid.labels)

            def validate(net: torch.nn.Module, valid: Rows = valid) -> Metrics:
                return _quality(valid, forward(valid.numbers, valid.codes, arrays(net), self.config))

            result = train(
                self, sizes, rows.take(kept) if usable else rows, self.config.training, ctx, name=f"dcn/{member}",
                validate=validate if usable else None, watch=watch, report_from=member * self.config.training.epochs,
                checkpoint=None if checkpoint is None else checkpoint / f"member-{member}", identity=identity,
            )  # fmt: skip
            trained.append(arrays(result.net))
            metrics.append(result.metrics)
        self._members = trained
        return {name: float(np.mean([one[name] for one in metrics])) for name in metrics[0] if all(name in one for one in metrics)}

    def build(self, sizes: Sizes) -> torch.nn.Module:
        """The network."""
        from maple.models.nets import DCN

        c = self.config
        return DCN(
            num_numbers=sizes.num_numbers, num_codes=sizes.num_codes, table_rows=sizes.table_rows, embedding=c.embedding,
            cross_layers=c.cross_layers, rank=c.rank, deep=c.deep, stacked=c.structure == "stacked", wide=c.wide, tasks=sizes.tasks,
            dropout=c.dropout,
        )  # fmt: skip

    def batches(self, data: Rows, rng: np.random.Generator) -> Iterator[Batch]:
        """Whole groups in random order, about ``batch_size`` rows at a time. For listwise alone, groups without a positive are left out."""
        assert self._columns is not None
        unknown = self._columns.unknown_rows
        groups = np.arange(len(data))
        if self.config.loss == "listwise" and not self.config.blend:
            positive = np.add.reduceat(np.nan_to_num(data.labels).sum(1), data.starts[:-1]) > 0
            groups = groups[positive]
        groups = rng.permutation(groups)
        ends = np.cumsum(np.diff(data.starts)[groups])
        batch_of = (ends - 1) // min(self.config.training.batch_size, max(256, int(data.starts[-1]) // 50))
        for chosen in np.split(groups, np.flatnonzero(np.diff(batch_of)) + 1):
            if len(chosen) == 0:
                continue
            some = data.take(chosen)
            hide = rng.random(some.codes.shape) < self.config.code_dropout
            sizes = np.diff(some.starts)
            yield {
                "numbers": some.numbers, "codes": np.where(hide, unknown, some.codes).astype(np.int64), "labels": some.labels,
                "group": np.repeat(np.arange(len(sizes)), sizes), "place": np.arange(some.starts[-1]) - np.repeat(some.starts[:-1], sizes),
            }  # fmt: skip

    def loss(self, net: torch.nn.Module, batch: Tensors) -> torch.Tensor:
        """The loss that the settings name, plus ``blend`` times the other one."""
        from maple.models.losses import binary_cross_entropy, listwise

        logits, labels = net(batch["numbers"], batch["codes"]), batch["labels"]
        is_list = self.config.loss == "listwise"
        out = listwise(logits, labels, batch["group"], batch["place"]) if is_list else binary_cross_entropy(logits, labels)
        if self.config.blend:
            other = binary_cross_entropy(logits, labels) if is_list else listwise(logits, labels, batch["group"], batch["place"])
            out = out + self.config.blend * other
        return out

    # -- answering -----------------------------------------------------------------------------------------------------

    def score(self, columns: Mapping[str, Array]) -> Float32:
        """float32[N, tasks]. Extra columns are ignored; a missing one is a ``DataError``."""
        if self._columns is None or not self._members:
            raise NotFittedError("this DCN-v2 ranker has not been fitted or loaded; call fit, or load a bundle")
        numbers, codes = self._columns.transform(columns)
        chunks = []
        for start in range(0, max(len(numbers), 1), CHUNK_ROWS):
            here = slice(start, start + CHUNK_ROWS)
            logits = forward(numbers[here], codes[here], self._members[0], self.config)
            for weights in self._members[1:]:
                logits += forward(numbers[here], codes[here], weights, self.config)
            chunks.append(logits / len(self._members))
        out: Float32 = np.concatenate(chunks)
        return sigmoid(out) if self.config.loss == "bce" else out

    def state(self) -> State:
        """Preprocessing and the members' weights."""
        if self._columns is None:
            raise NotFittedError("this DCN-v2 ranker has not been fitted or loaded; call fit, or load a bundle")
        state: State = {f"columns.{name}": array for name, array in self._columns.state().items()}
        for member, weights in enumerate(self._members):
            state |= {f"member.{member}.{name}": array for name, array in weights.items()}
        return state

    @classmethod
    def from_state(cls, config: Section, state: State) -> Self:
        """The ranker again."""
        assert isinstance(config, DCNv2Config)
        model = cls(config)
        model._columns = Columns.from_state(part(state, "columns."))
        model._members = [part(state, f"member.{member}.") for member in range(config.ensemble)]
        return model


def forward(numbers: Float32, codes: Int32, weights: Mapping[str, Array], config: DCNv2Config) -> Float32:
    """The logits [N, tasks] of one network in numpy: Wang et al. 2021, eq. 1 and 2, the same as ``nets.DCN``."""
    x0 = numbers
    if codes.shape[1]:
        table = weights["table.weight"]
        x0 = np.concatenate([numbers, table[codes].reshape(len(codes), codes.shape[1] * table.shape[1])], axis=1)
    x = x0
    for layer in range(config.cross_layers):
        down = weights.get(f"cross.{layer}.down.weight")
        inner = linear(x if down is None else x @ down.T, weights, f"cross.{layer}.up")
        inner *= x0
        inner += x
        x = inner
    if config.deep:
        x = mlp(x, weights, "deep") if config.structure == "stacked" else np.concatenate([x, mlp(x0, weights, "deep")], axis=1)
    out = linear(x, weights, "head")
    return linear(x0, weights, "wide") + out if config.wide else out


def _check(columns: Mapping[str, Array], labels: Float32, groups: Int64) -> None:
    """What ``fit`` takes; ``DataError`` says what is wrong."""
    if labels.ndim != 2 or len(labels) != len(groups):
        raise DataError(f"labels must have the shape [rows, tasks] with {len(groups)} rows, not {labels.shape}")
    if len(labels) == 0:
        raise DataError("there are no ranker rows to train on; the window between the two cuts holds no target event of a known user")
    uneven = [name for name, column in columns.items() if column.shape != (len(labels),)]
    if uneven:
        raise DataError(f"feature column {uneven[0]!r} has shape {columns[uneven[0]].shape}, the labels have {len(labels)} rows")
    if (np.diff(groups) < 0).any():
        raise DataError("groups must be sorted: the rows of a query stand together")
    if not (np.nan_to_num(labels) >= 0).all():
        raise DataError("labels must be 0 or more (NaN = unknown)")
    if not (np.nan_to_num(labels).sum(0) > 0).all():
        raise DataError("a task has no positive label in the ranker rows; widen the window, or leave the task out")


def _fold(order: Int64, member: int, config: DCNv2Config) -> tuple[Int64, Int64]:
    """(held out, kept) groups of one member, each sorted; fewer than ten groups would only give noise, so none are held out then."""
    count = round(len(order) * config.training.holdout)
    count = count if count >= 10 else 0
    start = member * count % max(len(order), 1)
    held = np.take(order, np.arange(start, start + count), mode="wrap")
    return np.sort(held), np.setdiff1d(order, held)


def _quality(rows: Rows, logits: Float32) -> Metrics:
    """Means over tasks of what can be measured on these rows: AUC and minus the log loss (both classes needed), NDCG@10 (a positive)."""
    values: dict[str, list[float]] = {"auc": [], "neg_log_loss": [], "ndcg_10": []}
    for task in range(rows.labels.shape[1]):
        known = ~np.isnan(rows.labels[:, task])
        labels, z = rows.labels[known, task], logits[known, task].astype(np.float64)
        values["auc"].append(auc(labels, z))
        if 0 < (labels > 0).sum() < len(labels):
            values["neg_log_loss"].append(-float(np.mean(np.logaddexp(0, z) - labels * z)))
        values["ndcg_10"].append(ndcg(np.nan_to_num(rows.labels[:, task]), logits[:, task], rows.starts, 10))
    return {name: float(np.nanmean(found)) for name, found in values.items() if found and not np.isnan(found).all()}


def auc(labels: Array, scores: Array) -> float:
    """Area under the ROC curve, ties counted half; NaN without both classes."""
    positive = labels > 0
    count, other = int(positive.sum()), int((~positive).sum())
    if count == 0 or other == 0:
        return float("nan")
    return float((rankdata(scores)[positive].sum() - count * (count + 1) / 2) / (count * other))


def ndcg(labels: Array, scores: Array, starts: Int64, k: int) -> float:
    """NDCG@k with linear gains, mean over groups with a positive label; ties by a fixed shuffle. NaN if no group has one."""
    sizes = np.diff(starts)
    group = np.repeat(np.arange(len(sizes)), sizes)
    place = np.arange(len(labels)) - np.repeat(starts[:-1], sizes)
    discount = np.where(place < k, 1 / np.log2(place + 2), 0)
    shuffle = np.random.default_rng(0).permutation(len(labels))
    got = np.bincount(group, labels[np.lexsort((shuffle, -scores, group))] * discount, minlength=len(sizes))
    best = np.bincount(group, labels[np.lexsort((-labels, group))] * discount, minlength=len(sizes))
    return float(np.mean(got[best > 0] / best[best > 0])) if (best > 0).any() else float("nan")
