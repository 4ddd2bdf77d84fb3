"""Known answers: one example worked by hand, and ranx as an outside referee on random lists."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from maple.evaluate.metrics import ranking_metrics
from maple.hashing import rng

LISTS = np.array([[10, 11, 12, 13, 14], [20, 21, 22, 23, 24], [30, 31, 32, 33, 34], [40, 41, 42, 43, 44]], dtype=np.int32)
RELEVANT = [[12], [20, 24, 99], [30, 31, 33, 90, 91, 92, 93, 94], [77]]


def ragged(relevant: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.concatenate([[0], np.cumsum([len(items) for items in relevant])]).astype(np.int64)
    return offsets, np.array([item for items in relevant for item in items], dtype=np.int32)


def gain(*ranks: int) -> float:
    return sum(1 / math.log2(rank + 1) for rank in ranks)


#: Worked by hand: user 1 hits at rank 3 of 1 relevant, user 2 at 1 and 5 of 3, user 3 at 1, 2 and 4 of 8, user 4 nowhere.
BY_HAND = {
    "recall@5": [1.0, 2 / 3, 3 / 8, 0.0],
    "precision@5": [1 / 5, 2 / 5, 3 / 5, 0.0],
    "ndcg@5": [gain(3) / gain(1), gain(1, 5) / gain(1, 2, 3), gain(1, 2, 4) / gain(1, 2, 3, 4, 5), 0.0],
    "map@5": [1 / 3, (1 + 2 / 5) / 3, (1 + 1 + 3 / 4) / 5, 0.0],
    "map_trec@5": [1 / 3, (1 + 2 / 5) / 3, (1 + 1 + 3 / 4) / 8, 0.0],
    "mrr@5": [1 / 3, 1.0, 1.0, 0.0],
    "hit@5": [1.0, 1.0, 1.0, 0.0],
}


@pytest.mark.parametrize("name", sorted(BY_HAND))
def test_every_user_of_the_hand_worked_example(name: str) -> None:
    found = ranking_metrics(LISTS, *ragged(RELEVANT), ks=(5,))
    assert set(found) == set(BY_HAND)
    np.testing.assert_allclose(found[name], BY_HAND[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("recall@5", 0.510417),
        ("precision@5", 0.3),
        ("ndcg@5", 0.462509),
        ("map@5", 0.3375),
        ("map_trec@5", 0.285937),
        ("mrr@5", 0.583333),
        ("hit@5", 0.75),
    ],
)
def test_published_means_of_the_example(name: str, value: float) -> None:
    assert ranking_metrics(LISTS, *ragged(RELEVANT), ks=(5,))[name].mean() == pytest.approx(value, abs=1e-6)


REFEREE = {"recall": "recall", "precision": "precision", "ndcg": "ndcg", "map_trec": "map", "mrr": "mrr", "hit": "hit_rate"}


def test_ranx_agrees_on_every_user_of_random_lists() -> None:
    ks = (1, 3, 10, 20)
    random = rng(0, "referee")
    users, items, width = 500, 80, 20
    lists = np.argsort(random.random((users, items)), axis=1)[:, :width].astype(np.int32)
    short = random.integers(1, width + 1, users)  # ragged lists: the referee sees no pads
    lists[np.arange(width)[None, :] >= short[:, None]] = -1
    relevant = [random.choice(items, size=int(random.integers(1, 40)), replace=False).tolist() for _ in range(users)]
    ours = ranking_metrics(lists, *ragged(relevant), ks=ks)

    names = [f"u{user:04d}" for user in range(users)]
    scored = [{f"i{item}": float(width - place) for place, item in enumerate(row) if item >= 0} for row in lists]
    question = {
        "qrels": {name: {f"i{item}": 1 for item in wanted} for name, wanted in zip(names, relevant, strict=True)},
        "run": dict(zip(names, scored, strict=True)),
        "metrics": [f"{theirs}@{k}" for theirs in REFEREE.values() for k in ks],
    }
    answer = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("referee_ranx.py"))],
        input=json.dumps(question), capture_output=True, text=True, check=True, env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
    )  # fmt: skip
    scores = json.loads(answer.stdout)
    for mine, theirs in REFEREE.items():
        for k in ks:
            referee = np.array([scores[f"{theirs}@{k}"][name] for name in names])
            np.testing.assert_allclose(ours[f"{mine}@{k}"], referee, rtol=0, atol=1e-9, err_msg=f"{mine}@{k}")
