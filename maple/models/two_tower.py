"""Two-tower retrieval: an item tower over id, categories and price, a user tower over the pooled history (Yi et al. 2019).

Trained by softmax over the items of the batch plus uniform negatives with the logQ correction, or over the whole catalogue where
it is small. The user is the history alone. Torch trains, numpy serves: an answer is one sparse product, a small MLP and the
item matrix. Letters: B queries, I items, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import scipy.sparse as sp
from pydantic import Field

from maple.artifacts import Place
from maple.config import Section
from maple.data.dataset import Bool, Dataset, Float32, Int32, Int64
from maple.errors import ConfigError
from maple.hashing import rng
from maple.index import topk_product
from maple.models.base import Array, FitContext, Metrics, Need, QueryBatch, SearchSpace, Space, State
from maple.models.examples import Examples, ExampleSource, HiddenExamples, NextExamples, pool_weights
from maple.models.families import Embedder, EmbedderConfig, take_array
from maple.models.nn import Batch, Tensors, Training, arrays, mlp, unit_rows

if TYPE_CHECKING:
    import torch

#: Width and hidden width of each size.
SIZES: dict[str, tuple[int, int]] = {"small": (32, 64), "medium": (64, 128), "large": (128, 256)}
VALID_K = 20


class TowerTraining(Training):
    """Training of a two-tower model; ``batch_size`` counts histories."""

    epochs: int = Field(default=30, ge=1)
    batch_size: int = Field(default=512, ge=1)
    learning_rate: float = Field(default=5e-3, gt=0)
    weight_decay: float = Field(default=1e-4, ge=0)
    warmup_steps: int = Field(default=50, ge=0)


class TwoTowerConfig(EmbedderConfig):
    """Settings of ``TwoTower``."""

    size: Literal["small", "medium", "large"] = "medium"
    """The one dial: width 32, 64 or 128, with a hidden layer of twice that."""
    embedding: int | None = Field(default=None, ge=2)
    """Width, if not that of the size."""
    hidden: int | None = Field(default=None, ge=0)
    """Hidden width of the user tower, if not that of the size; 0 = no MLP, the user is the pooled history."""
    examples: Literal["next", "hidden"] = "next"
    """next: predict the target items after a random cut. hidden: predict a hidden part of the items, for data without order."""
    horizon: int = Field(default=10, ge=1)
    """next: how many of the following target events are positives."""
    cuts_per_user: int = Field(default=4, ge=1)
    """next: examples of one user in an epoch, at most."""
    repeats: bool = True
    """next: whether an item of the history may be a positive again."""
    hide: float = Field(default=0.5, gt=0, lt=1)
    """hidden: part of a user's items that is hidden."""
    history: int = Field(default=200, ge=1)
    """Events of a history that training looks at, at most."""
    recency: float = Field(default=0.9, gt=0, le=1)
    """next: weight of an event per distinct later time; 1 = order does not matter."""
    softmax: Literal["auto", "sampled", "full"] = "auto"
    """auto: full up to ``full_below`` items."""
    full_below: int = Field(default=5000, ge=0)
    """Up to so many items ``auto`` takes the whole catalogue."""
    negatives: int = Field(default=1024, ge=0)
    """sampled: uniform negatives beside the items of the batch, shared by it."""
    temperature: float = Field(default=0.1, gt=0)
    """Cosines are divided by it."""
    bias: bool = True
    """A learned popularity per item, added to the cosine."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """In the user tower."""
    id_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Part of the items whose id is hidden in a step, so that their content learns to stand alone (only if there is content)."""
    item_fields: tuple[str, ...] = ("category", "brand")
    """Text columns of the item table; one that the table does not have is ignored."""
    item_numbers: tuple[str, ...] = ("price",)
    """Non-negative number columns of the item table, taken as logarithms; one that the table does not have is ignored."""
    training: TowerTraining = TowerTraining()
    """How it is trained."""

    @property
    def widths(self) -> tuple[int, int]:
        """(width, hidden width)."""
        width, hidden = SIZES[self.size]
        return self.embedding or width, hidden if self.hidden is None else self.hidden

    @classmethod
    def search_space(cls) -> SearchSpace:
        """What is worth tuning."""
        return {
            "size": ("choice", ["small", "medium", "large"]),
            "temperature": ("log", 0.05, 0.5),
            "recency": ("choice", [0.7, 0.9, 0.97, 1.0]),
            "horizon": ("choice", [1, 5, 10, 30]),
            "training.learning_rate": ("log", 1e-3, 2e-2),
            "training.weight_decay": ("log", 1e-5, 1e-1),
        }


@dataclass(frozen=True, eq=False)
class Catalogue:
    """The item tower's inputs: field rows int32[I, F] (rows of one table; per field one for unknown), numbers float32[I, P], which
    items occur in the training log, and which have any content."""

    fields: Int32
    numbers: Float32
    seen: Bool
    described: Bool

    @staticmethod
    def of(data: Dataset, config: TwoTowerConfig) -> Catalogue:
        """From a dataset's item table."""
        num_items = len(data.items)
        seen = np.bincount(data.log.item[data.log.item >= 0], minlength=num_items) > 0
        described, fields, numbers, start = np.zeros(num_items, np.bool_), [], [], 0
        names = data.item_table.column_names
        for name in [name for name in config.item_fields if name in names]:
            column = data.item_table[name].cast(pa.string()).combine_chunks()
            values = pc.unique(column.filter(pa.array(seen))).drop_null()  # a value that no trained item has says nothing
            rows = np.asarray(pc.fill_null(pc.index_in(column, value_set=values), -1)).astype(np.int32) if len(values) else None
            if rows is not None:
                described |= rows >= 0
                fields.append(rows + 1 + start)
                start += len(values) + 1
        for name in [name for name in config.item_numbers if name in names]:
            values = np.asarray(data.item_table[name].cast(pa.float32()).fill_null(float("nan")), dtype=np.float64)
            known = np.isfinite(values) & (values >= 0)
            if known[seen].sum() >= 2:
                logs = np.log1p(np.where(known, values, 0))
                spread = logs[known & seen].std()
                numbers += [np.where(known, (logs - logs[known & seen].mean()) / (spread or 1), 0).clip(-5, 5), (~known).astype(np.float64)]
                described |= known
        return Catalogue(
            np.stack(fields, 1).astype(np.int32) if fields else np.empty((num_items, 0), np.int32),
            np.stack(numbers, 1).astype(np.float32) if numbers else np.empty((num_items, 0), np.float32), seen, described,
        )  # fmt: skip

    @property
    def id_rows(self) -> Int64:
        """The id row of each item: its own, or the last one if training never saw it."""
        return np.where(self.seen, np.arange(len(self.seen)), len(self.seen)).astype(np.int64)


class TwoTower(Embedder):
    """The retriever. An item without events is known by its content; without both there is no opinion about it."""

    Config: ClassVar[type[Section]] = TwoTowerConfig
    needs: ClassVar[frozenset[Need]] = frozenset({Need.ITEM_TABLE, Need.TIME})
    config: TwoTowerConfig

    def __init__(self, config: Section | None = None) -> None:
        super().__init__(config)
        self._vectors: Float32 = np.empty((0, 0), np.float32)  # [I, D] before scaling: what histories pool
        self._bias: Float32 = np.empty(0, np.float32)
        self._user: dict[str, Array] = {}
        self._catalogue: Catalogue | None = None  # while fitting

    # -- learning ------------------------------------------------------------------------------------------------------

    def fit(self, data: Dataset, ctx: FitContext, *, checkpoint: Place | None = None) -> Metrics:
        """Train on a dataset. Some users' last targets are held out for early stopping by NDCG@20; metrics are those of the best epoch."""
        from maple.models.loop import fingerprint, train

        c = self.config
        self._enter(Space.of(data))
        source: ExampleSource
        split = rng(ctx.seed, "two-tower/holdout")
        if c.examples == "hidden":
            source = HiddenExamples(data, hide=c.hide, holdout=c.training.holdout, rng=split)
        else:
            source = NextExamples(
                data, horizon=c.horizon, history=c.history, cuts_per_user=c.cuts_per_user, recency=c.recency, repeats=c.repeats,
                holdout=c.training.holdout, rng=split,
            )  # fmt: skip
        catalogue = self._catalogue = Catalogue.of(data, c)
        valid = source.valid()

        def validate(net: torch.nn.Module) -> Metrics:
            self._take(net, catalogue)
            assert valid is not None
            return self._quality(valid)

        log = data.log
        identity = "" if checkpoint is None else fingerprint(str(c.plain()), log.user, log.item, log.event, log.time, catalogue.fields)
        result = train(
            self, catalogue, source, c.training, ctx, name="two-tower", validate=validate if valid is not None else None,
            watch=f"ndcg_{VALID_K}", checkpoint=checkpoint, identity=identity,
        )  # fmt: skip
        self._take(result.net, catalogue)
        self._catalogue = None
        return result.metrics

    def build(self, sizes: Catalogue) -> torch.nn.Module:
        """The network."""
        import torch

        from maple.models.nets import TwoTowerNet

        width, hidden = self.config.widths
        return TwoTowerNet(
            num_items=len(sizes.seen), fields_IF=torch.from_numpy(sizes.fields.astype(np.int64)),
            numbers_IP=torch.from_numpy(sizes.numbers), width=width, pools=self._pools, hidden=hidden, dropout=self.config.dropout,
        )  # fmt: skip

    def batches(self, data: ExampleSource, rng: np.random.Generator) -> Iterator[Batch]:
        """Examples with their candidates: all items, or the batch's positives and uniform negatives with the chance that each is there."""
        from maple.models.losses import log_inclusion

        catalogue = self._catalogue
        assert catalogue is not None
        num_items = len(catalogue.seen)
        id_rows, pool = catalogue.id_rows, np.flatnonzero(catalogue.seen)
        content = catalogue.fields.shape[1] + catalogue.numbers.shape[1] > 0
        full = self.config.softmax == "full" or (self.config.softmax == "auto" and num_items <= self.config.full_below)
        for one in data.epoch(self.config.training.batch_size, rng):
            if len(one.rows) == 0:
                continue
            if full:
                candidates, log_q = pool, np.zeros(len(pool), np.float32)
            else:
                uniform = pool[rng.integers(0, len(pool), self.config.negatives)]
                candidates = np.unique(np.concatenate([one.items, uniform]))
                chance = log_inclusion(data.frequency[pool], len(one.rows), len(uniform))
                log_q = chance[np.searchsorted(pool, candidates)]
            used = np.unique(np.concatenate([candidates, *(weights.indices for weights in one.pools)]))
            rows = id_rows[used]
            if content and self.config.id_dropout:
                rows = np.where(catalogue.described[used] & (rng.random(len(used)) < self.config.id_dropout), num_items, rows)
            size = np.bincount(one.rows, minlength=one.pools[0].shape[0])
            batch: dict[str, Array] = {
                "items": used.astype(np.int64), "id_rows": rows, "candidates": np.searchsorted(used, candidates), "log_q": log_q,
                "query": one.rows.astype(np.int64), "positive": np.searchsorted(candidates, one.items),
                "weight": (1 / size[one.rows]).astype(np.float32),
            }  # fmt: skip
            for place, weights in enumerate(one.pools):
                batch[f"pool{place}.index"] = np.searchsorted(used, weights.indices)
                batch[f"pool{place}.offsets"] = weights.indptr[:-1].astype(np.int64)
                batch[f"pool{place}.weight"] = weights.data
            yield batch

    def loss(self, net: torch.nn.Module, batch: Tensors) -> torch.Tensor:
        """Softmax of each positive over the candidates; every history counts the same."""
        import torch.nn.functional as F

        from maple.models.losses import softmax_of_positives
        from maple.models.nets import TwoTowerNet

        assert isinstance(net, TwoTowerNet)
        raw = net.items(batch["items"], batch["id_rows"])
        pooled = [
            F.embedding_bag(
                batch[f"pool{place}.index"], raw, batch[f"pool{place}.offsets"], mode="sum", per_sample_weights=batch[f"pool{place}.weight"]
            )
            for place in range(self._pools)
        ]
        users, items = F.normalize(net.users(pooled), dim=1), F.normalize(raw[batch["candidates"]], dim=1)
        scores = users @ items.T / self.config.temperature
        if self.config.bias:
            scores = scores + net.bias(batch["id_rows"][batch["candidates"]])[:, 0]
        return softmax_of_positives(scores, batch["query"], batch["positive"], batch["weight"], batch["log_q"])

    @property
    def _pools(self) -> int:
        return 2 if self._recency < 1 else 1

    @property
    def _recency(self) -> float:
        return self.config.recency if self.config.examples == "next" else 1.0

    def _take(self, net: torch.nn.Module, catalogue: Catalogue) -> None:
        """Take a network's item vectors and user tower over as arrays."""
        import torch

        from maple.models.nets import TwoTowerNet

        assert isinstance(net, TwoTowerNet)
        with torch.no_grad():
            device = net.ids.weight.device
            rows = torch.from_numpy(catalogue.id_rows).to(device)
            vectors = net.items(torch.arange(len(rows), device=device), rows).cpu().numpy()
            bias = net.bias(rows)[:, 0].cpu().numpy()
        known = catalogue.seen | catalogue.described
        self._enter(self.space)
        self._vectors = np.where(known[:, None], vectors, 0).astype(np.float32)
        self._bias = np.where(known, bias, 0).astype(np.float32) if self.config.bias else np.zeros(len(rows), np.float32)
        self._user = {name: array for name, array in arrays(net).items() if name.startswith("user.")}

    def _quality(self, valid: Examples) -> Metrics:
        """Recall@20 and NDCG@20 on the validation examples, by the serving path; items of the history are masked unless repeats count."""
        masked = self.config.examples == "hidden" or not self.config.repeats
        history = valid.pools[-1]
        exclude = (history.indptr.astype(np.int64), history.indices.astype(np.int32)) if masked else None
        found, _ = topk_product(self._users(valid.pools), self.embed_items(), VALID_K, exclude=exclude)
        truth = sp.csr_matrix((np.ones(len(valid.rows)), (valid.rows, valid.items)), shape=history.shape)
        rows = np.repeat(np.arange(len(found)), VALID_K)
        hits = np.asarray(truth[rows, np.maximum(found, 0).ravel()]).reshape(found.shape) * (found >= 0)
        size = np.diff(truth.indptr)
        discount = 1 / np.log2(np.arange(VALID_K) + 2)
        ideal = np.concatenate([[0.0], np.cumsum(discount)])[np.minimum(size, VALID_K)]
        ok = size > 0
        recall, ndcg = hits.sum(1)[ok] / size[ok], (hits @ discount)[ok] / ideal[ok]
        return {f"recall_{VALID_K}": float(recall.mean()), f"ndcg_{VALID_K}": float(ndcg.mean())}

    # -- answering -----------------------------------------------------------------------------------------------------

    def embed_queries(self, queries: QueryBatch) -> Float32:
        """float32[B, D+1]: the user vector over the temperature, and the constant that brings the items' bias in."""
        space = self.space
        return self._users(pool_weights(queries.histories, len(space.items), space.signals, self._recency))

    def embed_items(self) -> Float32:
        """float32[I, D+1]: unit vectors and the (scaled) bias; zero where nothing is known of the item."""
        self.space  # noqa: B018  raises before fit
        return self._table

    @cached_property
    def _table(self) -> Float32:
        bias = self._bias[:, None] * np.float32(self.config.temperature)
        return np.ascontiguousarray(np.concatenate([unit_rows(self._vectors), bias], axis=1), dtype=np.float32)

    def _users(self, pools: tuple[sp.csr_matrix, ...]) -> Float32:
        """The user tower in numpy, from pooling weights: the same as ``nets.TwoTowerNet.users``."""
        pooled = [np.asarray(weights @ self._vectors, dtype=np.float32) for weights in pools]
        out = pooled[0]
        if self._user:
            out = out + mlp(np.concatenate(pooled, axis=1), self._user, "user", last_relu=False)
        known = (np.diff(pools[-1].indptr) > 0)[:, None]
        scale = np.float32(1 / self.config.temperature)
        return np.concatenate([unit_rows(out) * scale * known, scale * known.astype(np.float32)], axis=1)

    def state(self) -> State:
        """Item vectors, biases and the user tower."""
        self.space  # noqa: B018  raises before fit
        return {"vectors": self._vectors, "bias": self._bias} | self._user

    @classmethod
    def from_state(cls, config: Section, space: Space, state: State) -> Self:
        """The model again."""
        if not isinstance(config, TwoTowerConfig):
            raise ConfigError(f"a two-tower model needs TwoTowerConfig settings, not {type(config).__name__}")
        model = cls._load(config, space)
        width, num_items = config.widths[0], len(space.items)
        model._vectors = take_array(state, "vectors", np.float32, (num_items, width))
        model._bias = take_array(state, "bias", np.float32, (num_items,))
        model._user = {name: array for name, array in state.items() if name.startswith("user.")}
        return model
