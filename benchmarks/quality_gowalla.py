"""Gowalla, the split of NGCF and LightGCN: Recall@20 and NDCG@20, train items masked, full ranking, users as histories.

Settings were chosen on a validation part cut from the train part (``--validate``), never on the test part. Published figures: BARS.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from harness import data_folder, row, show, upsert

from maple.config import Section
from maple.data.dataset import Dataset
from maple.evaluate.metrics import ranking_metrics
from maple.models.base import FitContext, Mask, QueryBatch, Retriever
from maple.models.factorization import Als, AlsConfig
from maple.models.knn import ItemKnn, ItemKnnConfig
from maple.models.popularity import Popularity, PopularityConfig
from maple.schema import TIMESTAMP

COMMAND = "python benchmarks/quality_gowalla.py"

#: name -> model, settings, what the reference is, its Recall@20 and NDCG@20.
MODELS: dict[str, tuple[type[Any], Section, str, float, float]] = {
    "popularity": (Popularity, PopularityConfig(window_days=None), "published MostPop", 0.0416, 0.0317),
    "item-knn": (ItemKnn, ItemKnnConfig(similarity="tfidf", neighbours=300, shrink=300, balance=0.1), "published ItemCF", 0.1570, 0.1214),
    "rp3beta": (ItemKnn, ItemKnnConfig(similarity="rp3beta", neighbours=1000, alpha=0.6, beta=0.2), "measured RP3beta", 0.1785, 0.1491),
    "als": (
        Als,
        AlsConfig(factors=640, regularization=20.0, alpha=15.0, damping=0.4, iterations=4),
        "measured bare implicit",
        0.1781,
        0.1466,
    ),
}


def read_pairs(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(users, items) of lines ``user item item ...``."""
    users, items = [], []
    for line in path.read_text().splitlines():
        user, *rest = map(int, line.split())
        users.append(np.full(len(rest), user, np.int32))
        items.append(np.array(rest, np.int32))
    return np.concatenate(users), np.concatenate(items)


def as_dataset(users: np.ndarray, items: np.ndarray, num_users: int, num_items: int) -> Dataset:
    """The pairs as purchases; the files have no time, so an event's time is its place in the file, in microseconds."""
    count = len(users)
    events = pa.table(
        {
            "event_id": np.char.zfill(np.arange(count).astype(str), 8),
            "user_id": np.char.zfill(users.astype(str), 6),
            "item_id": np.char.zfill(items.astype(str), 6),
            "event": pa.array(["purchase"] * count),
            "timestamp": pa.array(np.arange(count) + 1, TIMESTAMP),
            "value": pa.nulls(count, pa.float32()),
            "price": pa.nulls(count, pa.float32()),
        }
    )
    catalogue = pa.table({"item_id": np.char.zfill(np.arange(num_items).astype(str), 6)})
    people = pa.table({"user_id": np.char.zfill(np.arange(num_users).astype(str), 6)})
    return Dataset.from_tables(events, catalogue, people)  # zero-padded ids sort as numbers: codes are the file's numbers


def load(folder: Path, validate: bool = False) -> tuple[Dataset, tuple[np.ndarray, np.ndarray]]:
    """The train data and the test pairs; with ``validate`` a fifth of each user's train pairs takes the test's place."""
    train, test = read_pairs(folder / "train.txt"), read_pairs(folder / "test.txt")
    num_users, num_items = int(max(train[0].max(), test[0].max())) + 1, int(max(train[1].max(), test[1].max())) + 1
    if validate:
        place = np.lexsort((np.random.default_rng(2024).random(len(train[0])), train[0]))
        sizes = np.bincount(train[0])
        within = np.empty(len(place), np.int64)
        within[place] = np.arange(len(place)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        held = within < 0.2 * sizes[train[0]]
        train, test = (train[0][~held], train[1][~held]), (train[0][held], train[1][held])
    return as_dataset(*train, num_users, num_items), test


def measure(model: Retriever, data: Dataset, test: tuple[np.ndarray, np.ndarray], threads: int, known: bool = False) -> dict[str, float]:
    """Fit, list 20 per test user without train items, average; seconds of both."""
    started = time.perf_counter()
    model.fit(data, FitContext(seed=1, threads=threads))
    fitted = time.perf_counter()
    order = np.argsort(test[0], kind="stable")
    relevant, people = test[1][order], test[0][order]
    users, sizes = np.unique(people, return_counts=True)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    lists = []
    for start in range(0, len(users), 4096):
        part = users[start : start + 4096].astype(np.int32)
        queries = QueryBatch.at(data, part, np.full(len(part), data.span[1] + 1), 1 << 30, known=known)
        lists.append(model.topk(queries, 20, Mask.seen(queries))[0])
    found = ranking_metrics(np.concatenate(lists), offsets, relevant, ks=(20,))
    return {
        "recall@20": float(found["recall@20"].mean()), "ndcg@20": float(found["ndcg@20"].mean()),
        "fit": fitted - started, "list": time.perf_counter() - fitted,
    }  # fmt: skip


def rows(names: Sequence[str] = tuple(MODELS), threads: int | None = None, validate: bool = False) -> list[dict[str, Any]]:
    """Measured rows of the named models."""
    data, test = load(data_folder() / "gowalla", validate)
    out = []
    for name in names:
        kind, config, reference, recall, ndcg = MODELS[name]
        got = measure(kind(config), data, test, threads or os.cpu_count() or 1)
        out.append(row(f"gowalla/{name}/recall@20", got["recall@20"], "recall", reference, recall, COMMAND))
        out.append(row(f"gowalla/{name}/ndcg@20", got["ndcg@20"], "ndcg", reference, ndcg, COMMAND))
        out.append(row(f"gowalla/{name}/fit", got["fit"], "s", "", None, COMMAND))
        out.append(row(f"gowalla/{name}/list", got["list"], "s for 29,858 users", "", None, COMMAND))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="of " + ", ".join(MODELS) + "; all by default")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--validate", action="store_true", help="measure on the validation part, print only")
    parser.add_argument("--dry", action="store_true", help="print only")
    args = parser.parse_args()
    if unknown := set(args.names) - set(MODELS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(MODELS)}")
    measured = rows(args.names or tuple(MODELS), args.threads, args.validate)
    show(measured)
    if not (args.dry or args.validate):
        print(upsert("quality", measured))


if __name__ == "__main__":
    main()
