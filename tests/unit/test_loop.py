"""The training loop: resume equals uninterrupted, early stopping keeps the best weights, bad losses are named, runs are seeded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from maple.artifacts import MANIFEST, Place
from maple.errors import ArtifactError, ConfigError, DataError
from maple.models.base import FitContext, Metrics
from maple.models.loop import DivergedError, fingerprint, train
from maple.models.nn import Batch, Tensors, Training

SETTINGS = Training(epochs=6, batch_size=16, learning_rate=1e-2, weight_decay=0.01, warmup_steps=5, patience=6, device="cpu")


class Line:
    """A tiny regression with dropout, so that any difference in the random state shows."""

    def __init__(self, poison: int | None = None) -> None:
        self.poison, self.drawn = poison, 0

    def build(self, sizes: int) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(sizes, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1))

    def batches(self, data: tuple[np.ndarray, np.ndarray], rng: np.random.Generator) -> Iterator[Batch]:
        x, y = data
        order = rng.permutation(len(x))
        for start in range(0, len(x), 16):
            self.drawn += 1
            here = order[start : start + 16]
            yield {"x": x[here], "y": y[here] * (np.inf if self.drawn == self.poison else 1)}

    def loss(self, net: torch.nn.Module, batch: Tensors) -> torch.Tensor:
        return ((net(batch["x"])[:, 0] - batch["y"]) ** 2).mean()


@pytest.fixture
def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 3)).astype(np.float32)
    return x, x @ np.array([1, -2, 0.5], dtype=np.float32)


def weights(net: torch.nn.Module) -> np.ndarray:
    return np.concatenate([tensor.numpy().ravel() for tensor in net.state_dict().values()])


def run(data: tuple[np.ndarray, np.ndarray], place: Place | None = None, stop_after: int | None = None, seed: int = 1) -> np.ndarray:
    class Killed(Exception):
        pass

    def report(epoch: int, metrics: Metrics) -> None:
        if epoch == stop_after:
            raise Killed

    def validate(net: torch.nn.Module) -> Metrics:
        return {"fit": -float(((net(torch.from_numpy(data[0]))[:, 0].numpy() - data[1]) ** 2).mean())}

    ctx = FitContext(seed=seed, report=report)
    try:
        return weights(train(Line(), 3, data, SETTINGS, ctx, name="line", validate=validate, watch="fit", checkpoint=place).net)
    except Killed:
        return np.empty(0)


def test_it_learns_and_reports(data: tuple[np.ndarray, np.ndarray]) -> None:
    seen: list[tuple[int, Metrics]] = []
    settings = SETTINGS.with_(epochs=40)
    result = train(Line(), 3, data, settings, FitContext(report=lambda epoch, metrics: seen.append((epoch, metrics))), name="line")
    assert [epoch for epoch, _ in seen] == list(range(1, 41))
    assert seen[-1][1]["loss"] < 0.3 * seen[0][1]["loss"]
    assert {"grad_norm", "grad_norm_max", "learning_rate", "seconds"} <= set(seen[0][1])
    assert result.metrics["steps"] == 40 * 7
    assert not result.net.training


def test_same_seed_same_bits_other_seed_other_weights(data: tuple[np.ndarray, np.ndarray]) -> None:
    torch.manual_seed(5)
    first = run(data)
    torch.manual_seed(6)
    assert np.array_equal(first, run(data))
    assert not np.array_equal(first, run(data, seed=2))


def test_the_callers_torch_state_is_untouched(data: tuple[np.ndarray, np.ndarray]) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(data)
    assert torch.equal(torch.rand(3), expected)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("stop_after", [1, 3, 5])
def test_a_resumed_run_equals_an_uninterrupted_one(data: tuple[np.ndarray, np.ndarray], tmp_path: Path, stop_after: int) -> None:
    place = Place.at(tmp_path / "run")
    assert run(data, place, stop_after).size == 0
    assert np.array_equal(run(data, place), run(data))


def test_a_finished_run_is_not_repeated(data: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    place = Place.at(tmp_path / "run")
    expected = run(data, place)
    model = Line()
    again = train(model, 3, data, SETTINGS, FitContext(seed=1), name="line", checkpoint=place)
    assert model.drawn == 0
    assert np.array_equal(weights(again.net), expected)


def test_a_torn_checkpoint_is_ignored_and_an_altered_one_refused(data: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    place = Place.at(tmp_path / "run")
    run(data, place, 2)
    (place / "epoch-00003" / "tensors.safetensors").write(b"half a fi")
    assert np.array_equal(run(data, place), run(data))
    last = place / "epoch-00006"
    raw = bytearray((last / "tensors.safetensors").read())
    raw[-1] ^= 1
    (last / "tensors.safetensors").write(bytes(raw))
    with pytest.raises(ArtifactError, match="altered"):
        run(data, place)


def test_a_checkpoint_of_another_run_is_refused(data: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    place = Place.at(tmp_path / "run")
    run(data, place, 2)
    with pytest.raises(ArtifactError, match="another run"):
        run(data, place, seed=9)
    assert fingerprint(data[0]) != fingerprint(data[0].astype(np.float64))


def test_only_the_newest_checkpoint_is_kept(data: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    place = Place.at(tmp_path / "run")
    run(data, place)
    assert [child.name for child in place.children()] == ["epoch-00006"]
    assert json.loads((place / "epoch-00006" / MANIFEST).read())["meta"]["progress"]["epoch"] == 6


def test_early_stopping_keeps_the_best_weights(data: tuple[np.ndarray, np.ndarray]) -> None:
    kept: list[np.ndarray] = []
    values = iter([0.1, 0.5, 0.3, 0.4, 0.5])

    def validate(net: torch.nn.Module) -> Metrics:
        kept.append(weights(net))
        return {"value": next(values)}

    result = train(Line(), 3, data, SETTINGS.with_(patience=3, epochs=50), FitContext(), name="line", validate=validate, watch="value")
    assert len(kept) == 5
    assert np.array_equal(weights(result.net), kept[1])
    assert result.metrics["value"] == 0.5
    assert (result.metrics["best_epoch"], result.metrics["epochs"]) == (2, 5)


def test_a_loss_that_is_not_finite_names_its_step(data: tuple[np.ndarray, np.ndarray]) -> None:
    with pytest.raises(DivergedError, match=r"line: the loss is inf at step 10 \(epoch 2"):
        train(Line(poison=10), 3, data, SETTINGS, FitContext(), name="line")


def test_a_gradient_that_is_not_finite_is_caught(data: tuple[np.ndarray, np.ndarray]) -> None:
    class Root(Line):
        def loss(self, net: torch.nn.Module, batch: Tensors) -> torch.Tensor:
            return torch.sqrt((net(batch["x"]) * 0).sum())  # 0, with an infinite slope

    with pytest.raises(DivergedError, match="gradient norm is nan at step 1"):
        train(Root(), 3, data, SETTINGS, FitContext(), name="line")


def test_errors_that_settings_or_data_cause(data: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="nothing to train on"):
        train(Line(), 3, (data[0][:0], data[1][:0]), SETTINGS, FitContext(), name="line")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="sees no GPU"):
        train(Line(), 3, data, SETTINGS.with_(device="cuda"), FitContext(), name="line")
