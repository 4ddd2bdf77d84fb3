"""Finding a source: a preset that ships with Maple, a YAML file, or a data folder with its own YAML or of a known layout."""

from __future__ import annotations

import os
from pathlib import Path

from maple.artifacts import Place
from maple.config import read_yaml
from maple.data.recognise import how_to_write, recognise
from maple.data.sources import SourceConfig, check_uri
from maple.errors import ConfigError, unknown_name

FOLDER = Path(__file__).with_name("presets")
FOLDER_FILES = ("source.yaml", "maple.yaml")


def names() -> list[str]:
    """The presets, by name."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def path(name: str) -> Path:
    """The YAML file of a preset."""
    return FOLDER / f"{name}.yaml"


def default_folder(name: str) -> Path:
    """Where a preset's files are if nothing else is said: ``$MAPLE_DATA/<name>``."""
    data = os.environ.get("MAPLE_DATA")
    if not data:
        raise ConfigError(f"the preset {name!r} needs its data folder: give the folder, or set MAPLE_DATA to the folder that holds {name}/")
    return Path(data) / name


def load_source(name_or_yaml: str, folder: str | Path | Place | None = None) -> tuple[SourceConfig, Place]:
    """A source and the root of its files. ``name_or_yaml`` is a preset (with ``folder``), a YAML file, or a data folder.

    A folder uses its own ``source.yaml`` (or ``maple.yaml``), else the preset of its name, else the layout it is recognised by (which
    ``about`` tells); where there is none, the ``ConfigError`` lists the columns found and shows what to write.
    """
    if name_or_yaml.endswith((".yaml", ".yml")):
        path = Path(name_or_yaml)
        return SourceConfig.parse(read_yaml(path), str(path)), Place.at(folder if folder is not None else path.absolute().parent)
    if name_or_yaml in names() and (folder is not None or not Path(name_or_yaml).is_dir()):
        if folder is None:
            folder = default_folder(name_or_yaml)
        return _preset(name_or_yaml), _existing(folder)
    if folder is not None:
        raise ConfigError(unknown_name("source preset", name_or_yaml, names()) + " Or give the path of a source YAML.")
    if "://" not in name_or_yaml and "/" not in name_or_yaml and not Path(name_or_yaml).exists():
        raise ConfigError(unknown_name("source preset", name_or_yaml, names()) + " Or give a data folder or the path of a source YAML.")
    root = _existing(name_or_yaml)
    for file in FOLDER_FILES:
        if root.local and (root.local / file).exists():
            return SourceConfig.parse(read_yaml(root.local / file), f"{root.uri}/{file}"), root
    source = _preset(root.name) if root.name in names() else None
    if source is None or not all((root / file).exists() for table in source.events for file in table.paths):
        source = recognise(root) or source
    if source is None:
        raise ConfigError(how_to_write(root, names()))
    return source, root


def _preset(name: str) -> SourceConfig:
    return SourceConfig.parse(read_yaml(path(name)), f"preset {name}")


def _existing(folder: str | Path | Place) -> Place:
    root = Place.at(folder if isinstance(folder, Place) else check_uri(str(folder)))
    if not root.exists():
        raise ConfigError(f"the data folder {root.uri} does not exist; check the path (presets: {', '.join(names())})")
    return root
