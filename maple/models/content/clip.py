"""Images and texts in one space by a pretrained CLIP (Radford et al. 2021), through ``transformers``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from maple.config import Section
from maple.data.dataset import Float32
from maple.models.base import FitContext
from maple.models.content.base import Input, library
from maple.models.content.images import MAX_PIXELS, check_root, read_image
from maple.models.content.pretrained import Pretrained, PretrainedConfig
from maple.models.content.texts import MAX_CHARACTERS


class ClipImageConfig(PretrainedConfig):
    """Which model, and where images are."""

    root: str | None = None
    """A folder or URI that the addresses of the column are below; without it they are paths or URIs themselves."""
    max_pixels: int = Field(default=MAX_PIXELS, ge=1)
    """Larger images are missing."""


class ClipText(Pretrained):
    """One vector per text, comparable with CLIP's image vectors."""

    name: ClassVar[str] = "clip-text"
    kind: ClassVar[Literal["text", "image", "id"]] = "text"

    def load(self, folder: Path) -> Any:
        tokenizer = library("transformers", self.name).AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return _clip(folder, self.name), tokenizer

    def width(self, model: Any) -> int:
        return int(model[0].config.projection_dim)

    def rows(self, model: Any, inputs: Sequence[str]) -> tuple[list[int], Any]:
        net, tokenizer = model
        longest = int(net.config.text_config.max_position_embeddings)
        out = []
        for start in range(0, len(inputs), self.config.batch):
            texts = [text[:MAX_CHARACTERS] for text in inputs[start : start + self.config.batch]]
            tokens = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
            out.append(_features(net.get_text_features, input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]))
        return list(range(len(inputs))), np.concatenate(out)


class ClipImage(Pretrained):
    """One vector per image address; a bad image is missing."""

    Config: ClassVar[type[Section]] = ClipImageConfig
    name: ClassVar[str] = "clip-image"
    kind: ClassVar[Literal["text", "image", "id"]] = "image"
    config: ClipImageConfig

    def fit(self, inputs: Sequence[Input], ctx: FitContext) -> None:
        check_root(self.config.root)
        super().fit(inputs, ctx)

    def load(self, folder: Path) -> Any:
        library("PIL", self.name)
        processor = library("transformers", self.name).AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        return _clip(folder, self.name), processor

    def width(self, model: Any) -> int:
        return int(model[0].config.projection_dim)

    def rows(self, model: Any, inputs: Sequence[str]) -> tuple[list[int], Any]:
        net, processor = model
        places: list[int] = []
        out: list[Float32] = [np.empty((0, self.width(model)), np.float32)]
        for start in range(0, len(inputs), self.config.batch):
            chunk = inputs[start : start + self.config.batch]
            found = [read_image(address, self.config.root, self.config.max_pixels) for address in chunk]
            images = [image for image in found if image is not None]
            places += [start + at for at, image in enumerate(found) if image is not None]
            if images:
                out.append(_features(net.get_image_features, pixel_values=processor(images=images, return_tensors="pt")["pixel_values"]))
        return places, np.concatenate(out)


def _clip(folder: Path, name: str) -> Any:
    model = library("transformers", name).CLIPModel.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    return model.float().eval()


def _features(function: Any, **tensors: Any) -> Float32:
    """Projected features float32[n, D]; a library of version 5 wraps them."""
    import torch

    with torch.inference_mode():
        found = function(**tensors)
    return np.asarray(getattr(found, "pooler_output", found).numpy(), np.float32)
