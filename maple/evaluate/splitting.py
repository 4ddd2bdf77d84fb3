"""Single models measured under any split: a fresh model per fold, asked for what the fold held out, by the same harness as the pipeline."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from maple.data.dataset import Bool, Dataset, Int32, ragged_take
from maple.data.folds import Fold, Question, Split, folds_of
from maple.errors import DataError
from maple.evaluate.harness import CatalogueStats, Evaluation, Relevant, evaluate, item_strata, user_segments
from maple.evaluate.relevant import among, interest, judged
from maple.hashing import rng
from maple.models.base import FitContext, Mask, QueryBatch, Retriever


class SplitWarning(UserWarning):
    """How a split sees the future: its figures are not what a released model will do."""


def evaluate_split(
    make: Callable[[], Retriever],
    data: Dataset,
    split: Split,
    *,
    part: Literal["valid", "test"] = "test",
    ks: Sequence[int] = (5, 10, 20),
    new_only: bool = True,
    history_limit: int = 500,
    ctx: FitContext | None = None,
    bootstrap: int = 1000,
    max_users: int | None = None,
) -> list[Evaluation]:
    """A model from ``make`` fitted and measured on every fold; each result keeps the fold's settings and boundaries.

    ``new_only``: what a user already has is neither listed nor asked for. Segments: users by activity and history, items cold
    and warm, by what the model learned from. ``max_users``: of a fold, drawn if there
    are more. A ``SplitWarning`` says where a split sees the future.
    """
    ctx = ctx or FitContext()
    folds = folds_of(data, split)
    for text in dict.fromkeys(text for fold in folds for text in fold.warnings):
        warnings.warn(text, SplitWarning, stacklevel=2)
    return [_measure(make(), fold, part, ks, new_only, history_limit, ctx, bootstrap, max_users) for fold in folds]


def relevant_to(question: Question, *, new_only: bool) -> Relevant:
    """What a question's users should be offered: distinct items they went on to take, of items learned from, by users with a past.

    ``counts`` conserves as those of ``relevant_of`` do. ``DataError`` where nobody is left.
    """
    visible, fit = question.visible, question.fit
    user, item = question.wanted.target_pairs()
    bought = among((user, item), visible.target_pairs(), len(visible.items)) if new_only else np.zeros(len(user), bool)
    found = judged(user, item, _met(visible, "user")[user], _met(fit, "item")[item], bought)
    if len(found) == 0:
        raise DataError(f"no test user is left in this fold ({found.counts}); choose other shares, or use more data")
    return Relevant(found.users, found.offsets, found.items, new_only=new_only, counts=found.counts)


def _met(data: Dataset, what: Literal["user", "item"]) -> Bool:
    """Which users or items have an event of interest."""
    out = np.zeros(len(data.users if what == "user" else data.items), bool)
    out[(data.log.user if what == "user" else data.log.item)[interest(data)]] = True
    return out


def _measure(
    model: Retriever, fold: Fold, part: Literal["valid", "test"], ks: Sequence[int], new_only: bool, limit: int, ctx: FitContext,
    bootstrap: int, max_users: int | None,
) -> Evaluation:  # fmt: skip
    question = fold.question(part)
    fit, visible = question.fit, question.visible
    model.fit(fit, ctx)
    relevant = relevant_to(question, new_only=new_only)
    if max_users is not None and len(relevant) > max_users:
        relevant = relevant.take(np.sort(rng(ctx.seed, "evaluate/users").choice(len(relevant), max_users, replace=False)))
    now = question.now[np.searchsorted(question.users, relevant.users)]
    owner, owned = visible.target_pairs()
    ends = np.searchsorted(owner, np.arange(len(visible.users) + 1)).astype(np.int64)
    width = max(ks)

    def recommend(rows: Int32) -> Int32:
        users = relevant.users[rows]
        index, offsets = ragged_take(ends, users)
        mask = Mask(exclude=(offsets, owned[index])) if new_only else None
        return model.topk(QueryBatch.at(visible, users, now[rows], limit), width, mask)[0]

    end = int(fit.log.time.max()) + 1
    return evaluate(
        recommend, relevant, catalogue=CatalogueStats.of(fit, end), ks=ks, seed=ctx.seed, bootstrap=bootstrap,
        segments=user_segments(visible, relevant.users, int(now.max())), strata=item_strata(fit, end), split={"part": part, **fold.facts},
    )  # fmt: skip
