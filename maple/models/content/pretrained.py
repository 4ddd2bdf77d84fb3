"""Pretrained encoders lie in a folder that is checked before anything is loaded: safetensors weights, no pickle, no code.

The encoder's state is the folder's fingerprint, not a copy of its weights: an artifact stays small, and a folder that was
changed since is refused. A model of the Hugging Face hub is fetched only where the settings name one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from maple.config import Section
from maple.data.dataset import Float32
from maple.errors import ArtifactError, ConfigError, MapleError, NotFittedError
from maple.models.base import FitContext, State
from maple.models.content.base import Input, library, scatter
from maple.models.families import take_array

#: Files that run code, or may, when a library loads them.
PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz"})
CODE = frozenset({".py", ".pyc", ".so", ".dll"})
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]


class PretrainedConfig(Section):
    """Where the model is; exactly one of ``model`` and ``hub``."""

    model: str | None = None
    """A local folder, as ``save_pretrained`` writes it."""
    hub: str | None = None
    """A model of the Hugging Face hub, such as ``org/name``: downloaded once into its cache."""
    revision: str | None = None
    """hub: a commit or tag; the latest if not given."""
    batch: int = Field(default=32, ge=1)
    """Inputs encoded at once."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.model is None) == (self.hub is None):
            raise ValueError("give either `model`, a local folder, or `hub`, a model of the Hugging Face hub that may be downloaded")
        return self


def folder_of(config: PretrainedConfig, name: str) -> Path:
    """The local folder of the model, checked; ``ConfigError`` where there is none or it is not safe to load."""
    if config.hub is not None:
        fetch = library("huggingface_hub", name).snapshot_download
        try:
            folder = Path(fetch(config.hub, revision=config.revision, allow_patterns=HUB_FILES))
        except Exception as error:  # its own, the network's and the file system's
            raise ConfigError(f"content: {config.hub!r} cannot be fetched from the hub: {type(error).__name__}: {error}") from None
    else:
        folder = Path(config.model or "").absolute()
    if not (folder / "config.json").is_file() and not (folder / "modules.json").is_file():
        raise ConfigError(f"content: {folder} is not a folder of a pretrained model: it has neither config.json nor modules.json")
    check_folder(folder)
    return folder


def check_folder(folder: Path) -> None:
    """``ConfigError`` for a folder with code, with weights that are only there as pickle, or with classes from outside."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in files:
        if path.suffix in CODE:
            raise ConfigError(f"content: {path} is code, and Maple loads no model that brings its own. Remove it, or choose another model.")
        if path.suffix in PICKLES and not any(one.suffix == ".safetensors" for one in path.parent.iterdir()):
            raise ConfigError(
                f"content: {path} may hold pickled objects, and there are no .safetensors weights beside it. "
                "Save the model with `save_pretrained(folder, safe_serialization=True)`."
            )
    if not any(path.suffix == ".safetensors" for path in files):
        raise ConfigError(f"content: {folder} holds no .safetensors weights. Save the model with `save_pretrained(folder)`.")
    for path in files:
        if path.name not in ("modules.json", "config.json", "tokenizer_config.json", "preprocessor_config.json"):
            continue
        try:
            page = json.loads(path.read_bytes())
        except ValueError as error:
            raise ConfigError(f"content: {path} is not valid JSON: {error}") from None
        foreign = [
            str(module.get("type"))
            for module in (page if isinstance(page, list) else [])
            if isinstance(module, dict) and not str(module.get("type")).startswith("sentence_transformers.")
        ]
        if foreign or (isinstance(page, dict) and "auto_map" in page):
            raise ConfigError(f"content: {path} names code from outside the libraries ({', '.join(foreign) or 'auto_map'}); not loaded")


def fingerprint(folder: Path) -> bytes:
    """SHA-256 over the names and bytes of the files that are loaded."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in {".json", ".safetensors", ".txt", ".model"}:
            with open(path, "rb") as handle:
                total.update(str(path.relative_to(folder)).encode() + b"\x00" + hashlib.file_digest(handle, "sha256").digest())
    return total.digest()


class Pretrained:
    """What pretrained encoders share: nothing is learned, equal inputs are encoded once, None stays missing."""

    Config: ClassVar[type[Section]] = PretrainedConfig
    name: ClassVar[str]
    kind: ClassVar[Literal["text", "image", "id"]]
    config: PretrainedConfig

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config
        self._state: State | None = None

    def load(self, folder: Path) -> Any:
        """The model of a checked folder, ready to encode; raised errors are told with the folder's name."""
        raise NotImplementedError

    def rows(self, model: Any, inputs: Sequence[str]) -> tuple[list[int], Any]:
        """Vectors of distinct inputs: the places that have one, and float[n, D]."""
        raise NotImplementedError

    def width(self, model: Any) -> int:
        """D."""
        raise NotImplementedError

    def fit(self, inputs: Sequence[Input], ctx: FitContext) -> None:
        vars(self).pop("_model", None)
        folder = folder_of(self.config, self.name)
        self._state = {"fingerprint": np.frombuffer(fingerprint(folder), np.uint8)}
        self._state["dim"] = np.array([self.width(self._model)], np.int64)

    @property
    def dim(self) -> int:
        return int(self.state()["dim"][0])

    def encode(self, inputs: Sequence[Input]) -> Float32:
        dim, distinct = self.dim, list(dict.fromkeys(text for text in inputs if text))
        if not distinct:
            return np.zeros((len(inputs), dim), np.float32)
        places, vectors = self.rows(self._model, distinct)
        table = scatter(places, vectors, len(distinct) + 1, dim)  # the last row, of zeros, is what is missing
        place = {text: at for at, text in enumerate(distinct)}
        return table[[place[text] if text else len(distinct) for text in inputs]]

    def state(self) -> State:
        if self._state is None:
            raise NotFittedError(f"the {self.name} encoder has not been fitted; call fit(inputs, ctx) or load it first")
        return dict(self._state)

    @classmethod
    def from_state(cls, config: Section, state: State) -> Self:
        assert isinstance(config, PretrainedConfig)
        encoder = cls(config)
        take_array(state, "fingerprint", np.uint8, (32,))
        take_array(state, "dim", np.int64, (1,))
        encoder._state = dict(state)
        return encoder

    @cached_property
    def _model(self) -> Any:
        """Loaded on first use, so that whoever only reads an artifact needs neither the folder nor the library."""
        folder = folder_of(self.config, self.name)
        if fingerprint(folder) != self.state()["fingerprint"].tobytes():
            raise ArtifactError(f"content: the model in {folder} is not the one that the features were built with; build them again")
        library("transformers", self.name).utils.logging.disable_progress_bar()
        try:
            return self.load(folder)
        except MapleError:
            raise
        except Exception as error:  # a damaged folder makes the libraries raise whatever they meet
            raise ConfigError(f"content: {folder} cannot be loaded as a {self.name} model: {type(error).__name__}: {error}") from None
