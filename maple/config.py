"""Settings: typed sections that people write in YAML, and where Maple keeps its things.

A section rejects unknown keys and names the nearest known one. Defaults live beside their owner: a model's
``Config`` is in the model's file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from maple.errors import ConfigError, unknown_name

MAX_YAML_BYTES = 1 << 20


class _Loader(yaml.SafeLoader):
    """The safe loader, except that an unquoted date stays text: settings that are times are written as ISO texts."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as the base class declares it
        first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:timestamp"]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class Section(BaseModel):
    """Base of every configuration section: immutable, unknown keys rejected with a near-match hint."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str) -> Self:
        """The section built from plain values, or a ``ConfigError`` that names ``where``, the key, and the nearest known key."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise ConfigError(f"{where}: {_explain(cls, error)}") from None

    def plain(self) -> dict[str, Any]:
        """JSON-ready values, the inverse of ``parse``."""
        return self.model_dump(mode="json")

    def with_(self, **changes: Any) -> Self:
        """A validated copy with some fields changed."""
        return type(self).parse({**self.plain(), **changes}, type(self).__name__)


def _explain(cls: type[BaseModel], error: ValidationError) -> str:
    lines = []
    problems = error.errors(include_url=False, include_input=False)
    inner = {problem["loc"][:depth] for problem in problems for depth in range(1, len(problem["loc"]))}
    for problem in problems:
        if problem["loc"] in inner and problem["type"] == "too_short":  # said of a list whose entries were not read for the errors in them
            continue
        path, owner = _place(cls, problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = getattr(owner, "model_fields", {})
            lines.append(unknown_name("setting", path, known) if known else f"unknown setting {path!r}")
        else:
            lines.append(f"{path or 'value'}: {problem['msg']}")
    return "; ".join(lines)


def _place(cls: type[BaseModel], location: Sequence[int | str]) -> tuple[str, Any]:
    """A location as people write it, and the type that its last step belongs to.

    A step is a field, an entry of a list or mapping, or the tag (``kind``) of a member of a union, which is not written.
    """
    owner: Any = cls
    parent: Any = cls
    written: list[str] = []
    for part in location:
        members = get_args(owner)
        tags = {tag: member for member in members for tag in get_args(getattr(_fields(member).get("kind"), "annotation", None))}
        if part in tags:
            owner = tags[part]
            continue
        written.append(str(part))
        parent = owner
        if part in _fields(owner):
            owner = _fields(owner)[part].annotation
            if type(None) in get_args(owner):  # an optional section is written like one that must be there
                owner = next((member for member in get_args(owner) if _fields(member)), owner)
        else:
            owner = next((member for member in reversed(members) if _fields(member)), None)
    return ".".join(written), parent


def _fields(kind: Any) -> Mapping[Any, Any]:
    return getattr(kind, "model_fields", {})


def yaml_value(text: str | bytes) -> Any:
    """Plain values from YAML; ``yaml.YAMLError`` where it is none."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file (safe loader, at most 1 MiB, no aliases); a ``ConfigError`` says what is wrong with it."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the settings file {path}: {error.strerror or error}. Check the path.") from None
    if len(raw) > MAX_YAML_BYTES:
        raise ConfigError(f"{path}: a settings file may have at most {MAX_YAML_BYTES} bytes, this one has {len(raw)}")
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(raw, Loader=yaml.SafeLoader)):
            raise ConfigError(f"{path}: YAML aliases (*name) are not accepted in settings; write the value out")
        values = yaml_value(raw)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of settings at the top, found {type(values).__name__}")
    return values


def maple_home() -> str:
    """The folder or URI that holds everything Maple writes: ``MAPLE_HOME``, or ``.maple`` in the current folder."""
    return os.environ.get("MAPLE_HOME") or str(Path(".maple").absolute())
