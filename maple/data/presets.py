"""The source mappings that ship with Maple, and the advice given for a folder that has none."""

from __future__ import annotations

import os
from pathlib import Path

from maple.artifacts import Place
from maple.errors import ConfigError

FOLDER = Path(__file__).with_name("presets")
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
    from maple.data.readers import columns_of  # readers need the source types, which need this file

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
