"""The losses of Maple's torch models, and the logQ correction of sampled softmax.

Letters: B queries, C candidate items, N rows, T tasks, P positives.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from maple.data.dataset import Float32


def binary_cross_entropy(logits_NT: Tensor, labels_NT: Tensor) -> Tensor:
    """Mean binary cross-entropy per task, summed over tasks. A NaN label is unknown and does not count."""
    known = ~torch.isnan(labels_NT)
    losses = F.binary_cross_entropy_with_logits(logits_NT, labels_NT.nan_to_num(), reduction="none") * known
    return (losses.sum(0) / known.sum(0).clamp(min=1)).sum()


def listwise(logits_NT: Tensor, labels_NT: Tensor, group_N: Tensor, place_N: Tensor) -> Tensor:
    """Softmax cross-entropy over each query's candidates (ListNet top-one, Cao et al. 2007), mean over groups, summed over tasks.

    ``group_N`` 0..G-1 and ``place_N`` (row within the group) say which cell of a padded [G, L] table a row takes. The target
    distribution of a group is its non-negative labels divided by their sum; a group without a positive label does not count.
    NaN labels count as 0.
    """
    num_groups, length = int(group_N.max()) + 1, int(place_N.max()) + 1
    shape = (num_groups, length, logits_NT.shape[1])
    scores_GLT = logits_NT.new_full(shape, -torch.inf).index_put((group_N, place_N), logits_NT)
    gains_GLT = logits_NT.new_zeros(shape).index_put((group_N, place_N), labels_NT.nan_to_num())
    log_p_GLT = torch.log_softmax(scores_GLT, dim=1).masked_fill(torch.isinf(scores_GLT), 0.0)
    total_GT = gains_GLT.sum(1)
    losses_GT = -(gains_GLT * log_p_GLT).sum(1) / total_GT.clamp(min=1e-12)
    return (losses_GT.sum(0) / (total_GT > 0).sum(0).clamp(min=1)).sum()


def softmax_of_positives(
    scores_BC: Tensor, query_P: Tensor, candidate_P: Tensor, weight_P: Tensor, log_q_C: Tensor | None = None
) -> Tensor:
    """Weighted mean over positives (query, candidate) of ``-log softmax`` over the candidates, corrected for how those were sampled.

    ``log_q_C`` is the log of the chance that a candidate is in the batch at all; subtracting it makes the sum over sampled
    candidates an unbiased estimate of the sum over all (Yi et al. 2019, sec. 4; None = all candidates are there).
    """
    if log_q_C is not None:
        scores_BC = scores_BC - log_q_C
    log_p_P = (scores_BC - torch.logsumexp(scores_BC, dim=1, keepdim=True))[query_P, candidate_P]
    return -(weight_P * log_p_P).sum() / weight_P.sum()


def log_inclusion(frequency: Float32, num_draws: float, num_uniform: int) -> Float32:
    """log of the chance that each item is among the distinct candidates of a batch: float32[I].

    The candidates are the items of ``num_draws`` positives, drawn by ``frequency`` (sums to 1), and ``num_uniform`` items
    drawn uniformly with replacement: 1 - (1 - f)^draws * (1 - 1/I)^uniform.
    """
    absent = num_draws * np.log1p(-np.minimum(frequency.astype(np.float64), 1 - 1e-12))
    if num_uniform:
        absent += num_uniform * np.log1p(-1 / max(len(frequency), 2))
    return np.log(np.maximum(-np.expm1(absent), 1e-12)).astype(np.float32)
