"""Pretrained encoders under the one contract, with tiny models of random weights made on the spot; and the folders that are refused."""

from __future__ import annotations

import json
import shutil
import struct
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from encoder_suite import CTX, EncoderSuite

from maple.errors import ArtifactError, ConfigError
from maple.models.content.base import Encoder, Input
from maple.models.content.clip import ClipImage, ClipImageConfig, ClipText
from maple.models.content.images import read_image
from maple.models.content.pretrained import PretrainedConfig, check_folder
from maple.models.content.sentence import Sentence

WORDS = ["red", "blue", "cotton", "wool", "shirt", "sock", "garden", "spade", "soil", "seed"]


@pytest.fixture(scope="module")
def sentence_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers with mean pooling, as sentence-transformers saves it."""
    import sentence_transformers
    import torch
    from sentence_transformers.models import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizer

    bert, folder = tmp_path_factory.mktemp("bert"), tmp_path_factory.mktemp("models") / "sentence"
    (bert / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 32}
    BertModel(BertConfig(vocab_size=15, **sizes)).save_pretrained(bert)
    BertTokenizer(str(bert / "vocab.txt")).save_pretrained(bert)
    modules = [Transformer(str(bert)), Pooling(32)]
    sentence_transformers.SentenceTransformer(modules=modules, device="cpu").save(str(folder))
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of two layers a side, whose tokens are letters."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    side = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 16}
    text = {**side, "vocab_size": 60, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    torch.manual_seed(0)
    CLIPModel(
        CLIPConfig(text_config=text, vision_config={**side, "image_size": 32, "patch_size": 8}, projection_dim=16)
    ).save_pretrained(folder)  # fmt: skip
    letters = [letter + end for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    vocabulary = {token: code for code, token in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer.from_pretrained(str(folder)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two reddish images and a blue one; and what is no image."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    for name, colour in (("red", (250, 0, 0)), ("pink", (240, 20, 20)), ("blue", (0, 0, 250))):
        Image.new("RGB", (40, 50), colour).save(folder / f"{name}.png")
    Image.new("P", (20, 60), 3).save(folder / "palette.gif")
    (folder / "torn.png").write_bytes((folder / "red.png").read_bytes()[:60])
    (folder / "text.png").write_text("no image")
    (folder / "empty.png").write_bytes(b"")
    (folder / "bomb.png").write_bytes(_bomb(60_000, 60_000))
    return folder


def _bomb(width: int, height: int) -> bytes:
    """A few bytes that say they are an image of billions of pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100_000)) + chunk(b"IEND", b"")


class TestSentence(EncoderSuite):
    near = ("red cotton shirt", "blue cotton shirt")
    far = ("red cotton shirt", "garden soil seed spade")
    vital = "fingerprint"

    @pytest.fixture
    def catalogue(self) -> Sequence[Input]:
        return ["red wool sock", None, "garden spade", "garden spade"]

    @pytest.fixture
    def unfitted(self, sentence_folder: Path) -> Encoder:
        return Sentence(PretrainedConfig(model=str(sentence_folder), batch=2))


class TestClipText(EncoderSuite):
    near, far = ("red shirt", "red shirts"), ("red shirt", "garden spade")
    vital = "fingerprint"

    @pytest.fixture
    def catalogue(self) -> Sequence[Input]:
        return ["red sock", None, "garden spade " * 50]

    @pytest.fixture
    def unfitted(self, clip_folder: Path) -> Encoder:
        return ClipText(PretrainedConfig(model=str(clip_folder), batch=2))


class TestClipImage(EncoderSuite):
    near, far = ("red.png", "pink.png"), ("red.png", "blue.png")
    strange: ClassVar[Sequence[Input]] = (None, "", "torn.png", "text.png", "empty.png", "bomb.png", "none.png", "../x.png", "/etc/passwd")
    vital = "fingerprint"

    @pytest.fixture
    def catalogue(self) -> Sequence[Input]:
        return ["red.png", "torn.png", None, "blue.png", "palette.gif"]

    @pytest.fixture
    def unfitted(self, clip_folder: Path, pictures: Path) -> Encoder:
        return ClipImage(ClipImageConfig(model=str(clip_folder), root=str(pictures), batch=2))


def test_images_are_bounded_and_stay_below_their_folder(pictures: Path) -> None:
    assert read_image("red.png", str(pictures)).size == (40, 50)
    assert read_image(f"file://{pictures}/red.png").size == (40, 50)
    assert read_image("palette.gif", str(pictures)).mode == "RGB"
    assert read_image("red.png", str(pictures), max_pixels=1999) is None
    assert read_image(f"../{pictures.name}/red.png", str(pictures)) is None
    assert read_image(str(pictures / "red.png"), str(pictures)) is None
    assert read_image(f"file://{pictures}/red.png", str(pictures)) is None
    with pytest.raises(ConfigError, match="check `root`"):
        ClipImage(ClipImageConfig(model="x", root=str(pictures / "none"))).fit([], CTX)


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _code(folder: Path) -> None:
    (folder / "modeling_own.py").write_text("raise SystemExit('executed')")


def _foreign_module(folder: Path) -> None:
    page = json.loads((folder / "modules.json").read_text())
    page[1]["type"] = "os.system"
    (folder / "modules.json").write_text(json.dumps(page))


def _auto_map(folder: Path) -> None:
    page = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(page | {"auto_map": {"AutoModel": "modeling_own.Own"}}))


def _pickled_part(folder: Path) -> None:
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / "pytorch_model.bin").write_bytes(b"\x80\x04N.")


def _torn_weights(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_pickled, "no .safetensors weights beside it"),
        (_pickled_part, "no .safetensors weights beside it"),
        (_code, "is code"),
        (_foreign_module, "os.system"),
        (_auto_map, "auto_map"),
        (_torn_weights, "cannot be loaded"),
        (lambda folder: (folder / "modules.json").write_text("{"), "not valid JSON"),
    ],
    ids=["pickle", "pickled part", "code", "foreign class", "auto map", "torn weights", "torn page"],
)
def test_a_folder_that_may_run_code_is_refused(sentence_folder: Path, tmp_path: Path, spoil: object, says: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sentence_folder, folder)
    check_folder(folder)
    spoil(folder)  # type: ignore[operator]
    with pytest.raises(ConfigError, match=says):
        Sentence(PretrainedConfig(model=str(folder))).fit(["red"], CTX)


def test_another_model_in_the_folder_is_noticed(clip_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(clip_folder, folder)
    encoder = ClipText(PretrainedConfig(model=str(folder)))
    encoder.fit(["red"], CTX)
    state = encoder.state()
    page = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(page | {"logit_scale_init_value": 1.0}))
    loaded = ClipText.from_state(encoder.config, state)
    assert loaded.dim == 16  # what was encoded can be read without the folder
    assert not np.any(loaded.encode([None]))
    with pytest.raises(ArtifactError, match="build them again"):
        loaded.encode(["red"])


def test_settings_name_one_place() -> None:
    for values in ({}, {"model": "a", "hub": "b/c"}):
        with pytest.raises(ConfigError, match="give either"):
            PretrainedConfig.parse(values, "config")
    with pytest.raises(ConfigError, match="not a folder of a pretrained model"):
        Sentence(PretrainedConfig(model="no/such/folder")).fit(["red"], CTX)


@pytest.mark.parametrize("package", ["transformers", "sentence_transformers"])
def test_without_the_extra_the_error_says_how_to_install_it(sentence_folder: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"{package}.*pip install 'maple-rec\[content\]'"):
        Sentence(PretrainedConfig(model=str(sentence_folder))).fit(["red"], CTX)
