"""The losses against slow references and finite differences; the logQ correction against an exact expectation."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maple.models.losses import binary_cross_entropy, listwise, log_inclusion, softmax_of_positives


def slow_listwise(logits: np.ndarray, labels: np.ndarray, group: np.ndarray) -> float:
    total = 0.0
    for task in range(logits.shape[1]):
        losses = []
        for g in np.unique(group):
            s, y = logits[group == g, task], labels[group == g, task]
            if y.sum() > 0:
                losses.append(-(y / y.sum() * (s - np.log(np.exp(s - s.max()).sum()) - s.max())).sum())
        total += np.mean(losses) if losses else 0.0
    return float(total)


def places(sizes: list[int]) -> tuple[np.ndarray, np.ndarray]:
    return np.repeat(np.arange(len(sizes)), sizes), np.concatenate([np.arange(size) for size in sizes])


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(1, 3), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_listwise_equals_the_loop_over_groups(sizes: list[int], tasks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    group, place = places(sizes)
    logits, labels = rng.normal(size=(len(group), tasks)) * 5, rng.integers(0, 3, (len(group), tasks)).astype(float)
    got = listwise(*(torch.from_numpy(array) for array in (logits, labels, group, place)))
    np.testing.assert_allclose(got.item(), slow_listwise(logits, labels, group), rtol=1e-9, atol=1e-12)


def test_listwise_known_answer() -> None:
    """Two candidates with equal scores, one relevant: log 2. A group without a positive changes nothing."""
    logits, labels = torch.zeros(5, 1), torch.tensor([[1.0], [0], [0], [0], [0]])
    assert abs(listwise(logits, labels, torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 1, 0, 1, 2])).item() - np.log(2)) < 1e-6


def test_gradients_match_finite_differences() -> None:
    generator = torch.Generator().manual_seed(1)
    group, place = (torch.from_numpy(array) for array in places([3, 4, 2]))
    labels = torch.randint(0, 2, (9, 2), generator=generator).double()
    logits = torch.randn(9, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: listwise(x, labels, group, place), logits)
    labels[0, 0] = torch.nan
    assert torch.autograd.gradcheck(lambda x: binary_cross_entropy(x, labels), logits)
    scores = torch.randn(3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    query, candidate = torch.tensor([0, 0, 2]), torch.tensor([1, 4, 3])
    assert torch.autograd.gradcheck(
        lambda x: softmax_of_positives(x, query, candidate, torch.tensor([1.0, 2.0, 0.5]).double(), torch.randn(5).double() * 0 - 1), scores
    )


def test_unknown_labels_do_not_count() -> None:
    logits = torch.tensor([[0.3], [-2.0], [1.0]])
    with_gap = binary_cross_entropy(logits, torch.tensor([[1.0], [torch.nan], [0.0]]))
    without = binary_cross_entropy(logits[[0, 2]], torch.tensor([[1.0], [0.0]]))
    torch.testing.assert_close(with_gap, without)


def test_all_unknown_is_zero_with_a_finite_gradient() -> None:
    logits = torch.ones(2, 1, requires_grad=True)
    binary_cross_entropy(logits, torch.full((2, 1), torch.nan)).backward()
    assert logits.grad is not None
    assert (logits.grad == 0).all()


def test_full_softmax_is_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(2)
    scores, target = torch.randn(4, 6, generator=generator), torch.tensor([5, 0, 2, 2])
    got = softmax_of_positives(scores, torch.arange(4), target, torch.ones(4))
    torch.testing.assert_close(got, torch.nn.functional.cross_entropy(scores, target))


def test_inclusion_chance_known_answers() -> None:
    frequency = np.array([0.5, 0.3, 0.2], dtype=np.float32)
    np.testing.assert_allclose(np.exp(log_inclusion(frequency, 1, 0)), frequency, rtol=1e-5)
    np.testing.assert_allclose(np.exp(log_inclusion(frequency, 2, 0)), 1 - (1 - frequency) ** 2, rtol=1e-5)
    np.testing.assert_allclose(np.exp(log_inclusion(frequency, 0, 3)), 1 - (2 / 3) ** 3, rtol=1e-5)
    np.testing.assert_allclose(np.exp(log_inclusion(np.ones(1, np.float32), 5, 0)), 1, rtol=1e-5)


def test_the_logq_correction_makes_the_sampled_sum_unbiased() -> None:
    """Mean over sampled batches of sum_c exp(s_c - log q_c) over distinct candidates is the sum over the whole catalogue."""
    rng = np.random.default_rng(3)
    frequency = np.array([0.6, 0.2, 0.1, 0.06, 0.04])
    scores = np.array([0.0, 1.0, 2.0, -1.0, 1.5])
    corrected = np.exp(scores - log_inclusion(frequency.astype(np.float32), 3, 2))
    sums, plain = [], []
    for _ in range(6_000):
        batch = np.unique(np.concatenate([rng.choice(5, 3, p=frequency), rng.integers(0, 5, 2)]))
        sums.append(corrected[batch].sum())
        plain.append(np.exp(scores)[batch].sum())
    whole = np.exp(scores).sum()
    assert abs(np.mean(sums) - whole) < 4 * np.std(sums) / np.sqrt(len(sums))
    assert abs(np.mean(plain) - whole) > 0.2 * whole
