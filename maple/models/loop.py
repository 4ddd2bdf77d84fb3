"""The only training loop: optimiser, learning rate, early stopping, checkpoints, gradient health and metrics for all torch models.

A model gives three hooks (``nn.Neural``). Every epoch draws its randomness from (seed, name, epoch) alone, so a run that
is resumed from the checkpoint of an epoch goes on exactly as if it had never stopped, and same seed, versions, CPU and
thread count give the same bits.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy.typing as npt
import safetensors.torch
import torch

from maple.artifacts import MANIFEST, Place, open_manifest, read_file, seal, write_file
from maple.errors import ArtifactError, ConfigError, DataError, MapleError
from maple.hashing import combine, rng, sha256, torch_seed
from maple.models.base import FitContext, Metrics
from maple.models.nn import DataT, Neural, SizesT, Training

KIND = "checkpoint"


class DivergedError(MapleError):
    """The loss or the gradient of a training step was not finite."""


@dataclass
class Progress:
    """Where a run stands after an epoch."""

    epoch: int = 0  # epochs done
    step: int = 0  # optimiser steps done
    best: float | None = None  # best validation value
    best_epoch: int = 0
    stale: int = 0  # validations since the best
    stopped: bool = False
    metrics: Metrics = field(default_factory=dict)  # of the best epoch (the last one without validation)


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained network, in eval mode on the CPU with its best weights, and what was measured."""

    net: torch.nn.Module
    metrics: Metrics


def train(
    model: Neural[SizesT, DataT],
    sizes: SizesT,
    data: DataT,
    settings: Training,
    ctx: FitContext,
    *,
    name: str,
    validate: Callable[[torch.nn.Module], Metrics] | None = None,
    watch: str = "",
    checkpoint: Place | None = None,
    identity: str = "",
    report_from: int = 0,
) -> Trained:
    """Train ``model.build(sizes)`` on ``model.batches(data, rng)`` and return it with its best weights.

    ``validate`` is called after every epoch; ``watch`` names which of its metrics (higher is better) decides early stopping
    and which weights are kept. With ``checkpoint`` every finished epoch is saved there, and a run that finds one of the same
    ``identity`` (what the caller says the run is: settings and data) goes on from it; at most one epoch is repeated.
    ``ctx.report`` gets the metrics per epoch, counted from ``report_from``; what it raises ends the run.

    Raises ``DivergedError`` (loss or gradient not finite, names the step), ``DataError`` (an epoch without batches),
    ``ArtifactError`` (a checkpoint of another run, or altered).
    """
    device = _device(settings)
    identity = combine([identity, name, str(ctx.seed), json.dumps(settings.plain(), sort_keys=True)])
    with _deterministic(ctx.threads, device):
        torch.manual_seed(torch_seed(ctx.seed, f"{name}/init"))
        net = model.build(sizes).to(device)
        optimiser = _optimiser(net, settings)
        progress, best = Progress(), _copy(net)
        if checkpoint is not None:
            progress, best = _resume(checkpoint, identity, net, optimiser) or (progress, best)
        while progress.epoch < settings.epochs and not progress.stopped:
            metrics = _epoch(model, net, optimiser, data, settings, ctx, name, progress, device)
            started = time.perf_counter()
            if validate is not None:
                net.eval()
                with torch.no_grad():
                    measured = validate(net)
                metrics |= measured
                _judge(progress, measured[watch], settings)
            improved = validate is None or progress.stale == 0
            if improved:
                best, progress.metrics = _copy(net), {key: value for key, value in metrics.items() if key != "seconds"}
            metrics["seconds"] = metrics["seconds"] + time.perf_counter() - started
            if checkpoint is not None:
                _save(checkpoint, identity, net, optimiser, progress, best)
            if ctx.report is not None:
                ctx.report(report_from + progress.epoch, metrics)
        net.load_state_dict(best)
    ran = {"epochs": float(progress.epoch), "best_epoch": float(progress.best_epoch or progress.epoch), "steps": float(progress.step)}
    return Trained(net.cpu().eval(), progress.metrics | ran)


def fingerprint(*parts: npt.NDArray[Any] | str) -> str:
    """One hash of arrays and texts: what a caller passes as ``identity``."""
    return combine([piece if isinstance(piece, str) else f"{piece.dtype}{piece.shape}{sha256(piece.tobytes())}" for piece in parts])


def _epoch(
    model: Neural[SizesT, DataT], net: torch.nn.Module, optimiser: torch.optim.Optimizer, data: DataT, settings: Training, ctx: FitContext,
    name: str, progress: Progress, device: torch.device,
) -> Metrics:  # fmt: skip
    """One pass over the data; advances ``progress`` and returns the epoch's metrics."""
    started, losses, norms, rate = time.perf_counter(), [], [], 0.0
    stream = f"{name}/epoch/{progress.epoch}"
    torch.manual_seed(torch_seed(ctx.seed, stream))
    net.train()
    for arrays in model.batches(data, rng(ctx.seed, stream)):
        rate = settings.learning_rate * _factor(settings, progress)
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.zero_grad(set_to_none=True)
        loss = model.loss(net, {key: torch.from_numpy(array).to(device) for key, array in arrays.items()})
        _check(loss.item(), "loss", name, progress, rate)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = float(torch.nn.utils.clip_grad_norm_(net.parameters(), settings.clip_norm))
        _check(norm, "gradient norm", name, progress, rate)
        optimiser.step()
        progress.step += 1
        losses.append(loss.item())
        norms.append(norm)
    if not losses:
        raise DataError(f"{name}: there is nothing to train on: an epoch has no batch. Give it more events, or lower its minimum history.")
    progress.epoch += 1
    return {
        "loss": math.fsum(losses) / len(losses), "grad_norm": math.fsum(norms) / len(norms), "grad_norm_max": max(norms),
        "learning_rate": rate, "seconds": time.perf_counter() - started,
    }  # fmt: skip


def _judge(progress: Progress, value: float, settings: Training) -> None:
    """Early stopping: remember whether this validation is the best so far, stop after ``patience`` that were not."""
    if math.isnan(value):
        raise DivergedError(f"the validation metric after epoch {progress.epoch} is NaN. Lower the learning rate, or look for bad values.")
    if progress.best is None or value > progress.best:
        progress.best, progress.best_epoch, progress.stale = value, progress.epoch, 0
    else:
        progress.stale += 1
        progress.stopped = progress.stale >= settings.patience


def _check(value: float, what: str, name: str, progress: Progress, rate: float) -> None:
    if not math.isfinite(value):
        raise DivergedError(
            f"{name}: the {what} is {value} at step {progress.step + 1} (epoch {progress.epoch + 1}, learning rate {rate:.2g}). "
            "Lower training.learning_rate or training.clip_norm, or look for infinite values in the data."
        )


def _factor(settings: Training, progress: Progress) -> float:
    """What the learning rate is multiplied by at this step: linear warm-up by step, decay by epoch."""
    warm = min(1.0, (progress.step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    done = progress.epoch / settings.epochs
    decay = {"constant": 1.0, "linear": 1 - 0.9 * done, "cosine": 0.1 + 0.45 * (1 + math.cos(math.pi * done))}[settings.schedule]
    return warm * decay


def _optimiser(net: torch.nn.Module, settings: Training) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices, none on biases and single scales."""
    matrices = [p for p in net.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in net.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=settings.learning_rate, fused=True)


def _copy(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in net.state_dict().items()}


def _device(settings: Training) -> torch.device:
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("training.device is cuda, but torch sees no GPU here; use auto or cpu")
    return torch.device("cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def _deterministic(threads: int, device: torch.device) -> Iterator[None]:
    """Deterministic kernels, the given threads and a private random state; all put back afterwards. On a GPU torch only warns."""
    before, mode = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.set_num_threads(max(1, threads))
    torch.use_deterministic_algorithms(True, warn_only=device.type != "cpu")
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warn)
        torch.set_num_threads(before)


# -- checkpoints: one sealed folder per epoch, the newest kept ------------------------------------------------------------


def _save(
    place: Place, identity: str, net: torch.nn.Module, optimiser: torch.optim.Optimizer, progress: Progress, best: dict[str, torch.Tensor]
) -> None:
    tensors = {f"net/{name}": tensor.detach().cpu() for name, tensor in net.state_dict().items()}
    tensors |= {f"best/{name}": tensor for name, tensor in best.items()}
    for name, parameter in net.named_parameters():
        tensors |= {f"optimiser/{name}/{key}": value.cpu() for key, value in optimiser.state.get(parameter, {}).items()}
    folder = place / f"epoch-{progress.epoch:05d}"
    folder.delete()  # a torn one of an earlier attempt
    files = [write_file(folder, "tensors.safetensors", safetensors.torch.save({key: value.contiguous() for key, value in tensors.items()}))]
    seal(folder, KIND, {"identity": identity, "progress": asdict(progress)}, files)
    for old in place.children():
        if old.name.startswith("epoch-") and old.name != folder.name:
            old.delete()


def _resume(
    place: Place, identity: str, net: torch.nn.Module, optimiser: torch.optim.Optimizer
) -> tuple[Progress, dict[str, torch.Tensor]] | None:
    """Load the newest finished checkpoint into the network and the optimiser; None if there is none."""
    finished = [child for child in place.children() if child.name.startswith("epoch-") and (child / MANIFEST).exists()]
    if not finished:
        return None
    folder = finished[-1]
    manifest = open_manifest(folder, KIND)
    if manifest.meta["identity"] != identity:
        raise ArtifactError(
            f"{folder.uri} is a checkpoint of another run (other settings, seed or data). Give this run its own folder, or delete that one."
        )
    tensors = safetensors.torch.load(read_file(folder, manifest, "tensors.safetensors"))
    net.load_state_dict({key.removeprefix("net/"): value for key, value in tensors.items() if key.startswith("net/")})
    for name, parameter in net.named_parameters():
        prefix = f"optimiser/{name}/"
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if state:
            optimiser.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}
    best = {key.removeprefix("best/"): value for key, value in tensors.items() if key.startswith("best/")}
    return Progress(**manifest.meta["progress"]), best
