"""What neural models share without torch: the settings of their training, and the numpy forward pass that serves them.

Torch trains, numpy serves: a trained network is a few arrays, and a replica that multiplies them needs neither torch's
memory nor its thread pools. Each model tests that its numpy forward equals its torch forward. The torch side is in
``loop`` (the only training loop), ``nets`` (the modules) and ``losses``; models import those inside ``fit`` alone.
The loop lives beside the models, not in ``maple.train``, because ``fit`` runs it and nothing imports upwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import Field

from maple.config import Section
from maple.data.dataset import Float32

if TYPE_CHECKING:
    import torch

#: One training step's arrays by name; the loop turns them into tensors on the training device.
Batch: TypeAlias = Mapping[str, npt.NDArray[Any]]
Tensors: TypeAlias = "Mapping[str, torch.Tensor]"

SizesT = TypeVar("SizesT", contravariant=True)
DataT = TypeVar("DataT", contravariant=True)


class Training(Section):
    """How a network is trained; every neural model's ``Config`` has one under ``training``."""

    epochs: int = Field(default=20, ge=1)
    """At most so many passes over the data."""
    batch_size: int = Field(default=512, ge=1)
    """What one unit is, the model says: users, rows, sequences."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """AdamW's, after the warm-up."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW, on matrices only."""
    warmup_steps: int = Field(default=100, ge=0)
    """The learning rate rises linearly over these."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Over epochs, down to a tenth."""
    clip_norm: float = Field(default=5.0, gt=0)
    """Of the whole gradient."""
    patience: int = Field(default=3, ge=1)
    """Validations without a better one before stopping."""
    holdout: float = Field(default=0.1, ge=0, le=0.5)
    """Part of the users or groups kept for early stopping; 0 = train all epochs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it trains; auto takes a GPU if torch sees one."""


class Neural(Protocol[SizesT, DataT]):
    """The three hooks that a torch model gives to the loop."""

    def build(self, sizes: SizesT) -> torch.nn.Module:
        """The network, freshly initialised from torch's global generator (which the loop seeds)."""

    def batches(self, data: DataT, rng: np.random.Generator) -> Iterator[Batch]:
        """One epoch of batches; all its randomness comes from ``rng``."""

    def loss(self, net: torch.nn.Module, batch: Tensors) -> torch.Tensor:
        """The scalar to minimise."""


def arrays(net: torch.nn.Module, prefix: str = "") -> dict[str, npt.NDArray[Any]]:
    """A network's parameters and buffers by name, as numpy copies."""
    return {prefix + name: tensor.detach().cpu().numpy().copy() for name, tensor in net.state_dict().items()}


def part(state: Mapping[str, npt.NDArray[Any]], prefix: str) -> dict[str, npt.NDArray[Any]]:
    """The entries of a state whose names start with ``prefix``, without it."""
    return {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}


def linear(x: Float32, weights: Mapping[str, npt.NDArray[Any]], name: str) -> Float32:
    """``nn.Linear`` in numpy: x float32[N, in] -> float32[N, out]; the bias is optional."""
    out: Float32 = x @ weights[f"{name}.weight"].T
    bias = weights.get(f"{name}.bias")
    if bias is not None:
        out += bias
    return out


def mlp(x: Float32, weights: Mapping[str, npt.NDArray[Any]], name: str, *, last_relu: bool = True) -> Float32:
    """``nets.MLP`` in numpy: layers ``{name}.layers.{i}``, ReLU between them and, by default, after the last."""
    count = 0
    while f"{name}.layers.{count}.weight" in weights:
        count += 1
    for layer in range(count):
        x = linear(x, weights, f"{name}.layers.{layer}")
        if last_relu or layer < count - 1:
            np.maximum(x, 0, out=x)
    return x


def sigmoid(x: Float32) -> Float32:
    """The logistic function without overflow."""
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + small), small / (1 + small)).astype(np.float32)


def unit_rows(x: Float32) -> Float32:
    """Rows scaled to length 1; a zero row stays zero."""
    length = np.sqrt(np.einsum("nd,nd->n", x, x))[:, None]
    return np.asarray(x / np.maximum(length, 1e-12), dtype=np.float32)
