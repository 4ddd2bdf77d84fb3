"""What every content encoder promises, whatever it is made of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import pytest

from maple.artifacts import tensor_bytes, tensors_of
from maple.errors import ArtifactError, NotFittedError
from maple.models.base import FitContext
from maple.models.content.base import Encoder, Input

CTX = FitContext(seed=5)


class EncoderSuite:
    """Subclasses give ``make`` (an unfitted encoder), ``catalogue`` (what it learns from), ``near`` and ``far`` and ``strange``."""

    #: Pairs of inputs: those of ``near`` are alike, those of ``far`` are not.
    near: ClassVar[tuple[Input, Input]]
    far: ClassVar[tuple[Input, Input]]
    #: Inputs that say nothing to a fitted encoder.
    strange: ClassVar[Sequence[Input]] = (None, "")
    #: An array of the state without which it is of no use.
    vital: ClassVar[str]

    @pytest.fixture
    def catalogue(self) -> Sequence[Input]:
        raise NotImplementedError

    @pytest.fixture
    def unfitted(self) -> Encoder:
        raise NotImplementedError

    @pytest.fixture
    def fitted(self, unfitted: Encoder, catalogue: Sequence[Input]) -> Encoder:
        unfitted.fit(catalogue, CTX)
        return unfitted

    def test_rows_are_of_unit_length_or_zero(self, fitted: Encoder, catalogue: Sequence[Input]) -> None:
        rows = fitted.encode([*catalogue, *self.near, *self.far, *self.strange])
        assert rows.shape == (len(catalogue) + 4 + len(self.strange), fitted.dim)
        assert rows.dtype == np.float32
        norms = np.linalg.norm(rows, axis=1)
        known, missing = norms[len(catalogue) : len(catalogue) + 4], norms[len(catalogue) + 4 :]
        assert known == pytest.approx(np.ones(4), abs=1e-5)
        assert not missing.any()
        assert np.minimum(norms, abs(norms - 1)).max() < 1e-5

    def test_what_is_alike_is_nearer(self, fitted: Encoder) -> None:
        a, b = fitted.encode(self.near)
        c, d = fitted.encode(self.far)
        assert a @ b > c @ d + 0.005
        assert not np.array_equal(c, d)

    def test_nothing_at_all_can_be_encoded(self, fitted: Encoder) -> None:
        assert fitted.encode([]).shape == (0, fitted.dim)
        assert not fitted.encode([None, None]).any()

    def test_a_row_does_not_depend_on_the_others(self, fitted: Encoder, catalogue: Sequence[Input]) -> None:
        inputs = [*self.near, None, *self.far, self.near[0]]
        together = fitted.encode(inputs)
        apart = np.concatenate([fitted.encode([one]) for one in inputs])
        np.testing.assert_allclose(together, apart, atol=2e-6)
        assert np.array_equal(together[0], together[-1])

    def test_the_same_catalogue_and_seed_give_the_same_bits(self, fitted: Encoder, catalogue: Sequence[Input]) -> None:
        again = type(fitted)(fitted.config)  # type: ignore[call-arg]
        again.fit(catalogue, CTX)
        state, other = fitted.state(), again.state()
        assert state.keys() == other.keys()
        for name, array in state.items():
            assert np.array_equal(array, other[name]), name
        assert np.array_equal(fitted.encode(catalogue), again.encode(catalogue))

    def test_it_is_the_same_again_from_disk(self, fitted: Encoder, catalogue: Sequence[Input]) -> None:
        config = type(fitted).Config.parse(json.loads(json.dumps(fitted.config.plain())), "test")
        loaded = type(fitted).from_state(config, tensors_of(tensor_bytes(fitted.state())))
        assert loaded.dim == fitted.dim
        inputs = [*catalogue, *self.near, *self.far, *self.strange]
        assert np.array_equal(loaded.encode(inputs), fitted.encode(inputs))

    def test_a_torn_state_is_refused(self, fitted: Encoder) -> None:
        state = fitted.state()
        del state[self.vital]
        with pytest.raises(ArtifactError, match=self.vital):
            type(fitted).from_state(fitted.config, state)

    def test_before_fit_it_knows_nothing(self, unfitted: Encoder) -> None:
        for ask in (lambda: unfitted.encode(["a"]), unfitted.state, lambda: unfitted.dim):
            with pytest.raises(NotFittedError, match="fit"):
                ask()
