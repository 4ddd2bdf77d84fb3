"""Finding a source: a preset that ships with Maple, a YAML file, or a data folder; and the advice for a folder that has none."""

from __future__ import annotations

import os
from pathlib import Path

from maple.artifacts import Place
from maple.config import read_yaml
from maple.data.files import columns_of
from maple.data.sources import SourceConfig
from maple.errors import ConfigError, unknown_name

FOLDER = Path(__file__).with_name("presets")
FOLDER_FILES = ("source.yaml", "maple.yaml")
READABLE = (".csv", ".tsv", ".jsonl", ".parquet", ".dat", ".inter", ".item", ".user")


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


def how_to_write(root: Place) -> str:
    """What to tell someone whose folder Maple does not know: the columns found, and a mapping to start from."""
    found: list[tuple[str, list[str]]] = []
    for child in root.children():
        if child.name.lower().endswith(READABLE) and len(found) < 5:
            found.append((child.name, columns_of(child)))
    if not found:
        return f"{root.uri} holds no table that Maple reads ({', '.join(READABLE)}); check the path (presets: {', '.join(names())})"
    listed = "\n".join(f"  {name}: {', '.join(columns[:30]) or '(no columns could be read)'}" for name, columns in found)
    file = found[0][0]
    return (
        f"{root.uri} has no source.yaml and is not a preset ({', '.join(names())}). Its tables:\n{listed}\n"
        "Write source.yaml there, for example:\n"
        f"  events:\n    path: {file}\n    columns: {{user_id: <column>, item_id: <column>, timestamp: <column>, session_id: <column>, "
        "value: <quantity>, price: <unit price>}\n    constants: {event: purchase}"
    )


def load_source(name_or_yaml: str, folder: str | Path | Place | None = None) -> tuple[SourceConfig, Place]:
    """A source and the root of its files. ``name_or_yaml`` is a preset (with ``folder``), a YAML file, or a data folder.

    A folder uses its own ``source.yaml`` (or ``maple.yaml``), else the preset of its name; where there is neither, the ``ConfigError``
    lists the columns found and shows what to write.
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
    if root.name in names():
        return _preset(root.name), root
    raise ConfigError(how_to_write(root))


def _preset(name: str) -> SourceConfig:
    return SourceConfig.parse(read_yaml(path(name)), f"preset {name}")


def _existing(folder: str | Path | Place) -> Place:
    root = Place.at(folder)
    if not root.exists():
        raise ConfigError(f"the data folder {root.uri} does not exist; check the path (presets: {', '.join(names())})")
    return root
