"""Texts by a pretrained sentence encoder (Reimers and Gurevych 2019), through ``sentence-transformers``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from maple.models.content.base import library
from maple.models.content.pretrained import Pretrained
from maple.models.content.texts import MAX_CHARACTERS


class Sentence(Pretrained):
    """One vector per text by a sentence-transformers model."""

    name: ClassVar[str] = "sentence"
    kind: ClassVar[Literal["text", "image", "id"]] = "text"

    def load(self, folder: Path) -> Any:
        model = library("sentence_transformers", self.name).SentenceTransformer(
            str(folder), device="cpu", trust_remote_code=False, local_files_only=True, model_kwargs={"use_safetensors": True}
        )
        return model.float().eval()

    def width(self, model: Any) -> int:
        return int(model.encode(["a"], show_progress_bar=False).shape[1])

    def rows(self, model: Any, inputs: Sequence[str]) -> tuple[list[int], Any]:
        texts = [text[:MAX_CHARACTERS] for text in inputs]
        return list(range(len(texts))), model.encode(texts, batch_size=self.config.batch, show_progress_bar=False, convert_to_numpy=True)
