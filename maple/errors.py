"""Every error Maple raises on purpose. Each message says what was wrong, where, and what to do next.

    MapleError
    +-- ConfigError      a setting that people wrote is wrong (YAML, flags, environment)
    +-- DataError        the input data cannot be used as it is
    +-- NotFittedError   a model was asked before it was fitted or loaded
    +-- ArtifactError    something Maple wrote is missing, torn, altered or of another format
    +-- ServeError       the service cannot do what was asked of it

Bugs are not in this tree: an invariant that fails is an ``AssertionError`` and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MapleError(Exception):
    """Base of all errors whose message is meant for the user; the command line prints it without a traceback."""


class ConfigError(MapleError):
    """A setting that people wrote is wrong."""


class DataError(MapleError):
    """The input data cannot be used as it is."""


class NotFittedError(MapleError):
    """A model was asked for an answer before it was fitted or loaded."""


class ArtifactError(MapleError):
    """Something Maple wrote is missing, torn, altered or of another format."""


class ServeError(MapleError):
    """The service cannot do what was asked of it."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """One sentence for an unknown name: what was given, the nearest known name (to it, or to its last part), and all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1) or difflib.get_close_matches(name.rsplit(".", 1)[-1], names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}.{hint} Known: {', '.join(names) if names else 'none'}."
