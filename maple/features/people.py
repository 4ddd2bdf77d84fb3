"""Who is the same person online, and what people are described by: links between ids, the groups they make, legal attributes.

A link says that the events of an alias (a device, a guest id) are those of another id. Links are kept as they were told, so that taking
one back gives exactly what there would be without it. Groups follow the rule of the offline stitching (``data.identity``): connected ids
are one person, who goes by the smallest of the ids that something was merged into; what joins too many of those is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import pyarrow as pa

from maple.data.identity import MAX_COMPONENT, MAX_USERS
from maple.errors import DataError
from maple.features.attributes import plain_rows
from maple.features.states import Attribute
from maple.schema import check_id

#: (alias, the id it belongs to)
Link: TypeAlias = tuple[str, str]

MAX_ATTRIBUTES = 100
MAX_ATTRIBUTE_BYTES = 8192


def groups(ids: Iterable[str], links: Collection[Link]) -> dict[str, list[str]]:
    """The people that these ids are, given the links between them: the id each goes by -> all their ids, sorted."""
    parent = {each: each for each in ids}

    def root(each: str) -> str:
        while parent[each] != each:
            each = parent[each]
        return each

    for alias, into in links:
        parent[root(alias)] = root(into)
    found: dict[str, list[str]] = {}
    for each in sorted(parent):
        found.setdefault(root(each), []).append(each)
    users = {into for _, into in links}
    return {min(users.intersection(group), default=group[0]): group for group in found.values()}


def check_group(group: Sequence[str], links: Collection[Link]) -> None:
    """``DataError`` where so many ids cannot be one person."""
    users = {into for _, into in links}.intersection(group)
    if len(group) > MAX_COMPONENT or len(users) > MAX_USERS:
        raise DataError(
            f"this would make {len(group)} ids, {len(users)} of them users with aliases, one person; at most {MAX_COMPONENT} and "
            f"{MAX_USERS} are. A shared device belongs to nobody: leave it unmerged, or unmerge what was linked to it by mistake."
        )


def check_links(user_ids: Sequence[str], into: str) -> list[Link]:
    """The links that merging tells; ``DataError`` for an illegal id."""
    check_id(into, "user_id")
    return [(check_id(each, "alias"), into) for each in dict.fromkeys(user_ids) if each != into]


def check_attributes(attributes: Mapping[str, Attribute], what: str) -> dict[str, Attribute]:
    """Attributes that may be kept, plain: text, finite numbers, true or false, lists of texts; None takes one away. Or a ``DataError``."""
    if len(attributes) > MAX_ATTRIBUTES:
        raise DataError(f"{what} has {len(attributes)} attributes; at most {MAX_ATTRIBUTES} are kept")
    out: dict[str, Attribute] = {}
    for name, value in attributes.items():
        check_id(name, f"the name of an attribute of {what}")
        out[name] = _plain(value, f"attribute {name!r} of {what}")
    return out


def _plain(value: Any, where: str) -> Attribute:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        if not math.isfinite(value) or abs(value) > 1e18:
            raise DataError(f"{where} is not a finite number up to 1e18")
        return float(value)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where} must be a text, a number, true, false, a list of texts, or null to take it away")
    try:
        size = len(json.dumps(texts, ensure_ascii=False).encode())
    except UnicodeEncodeError:
        raise DataError(f"{where} is not valid text") from None
    if size > MAX_ATTRIBUTE_BYTES:
        raise DataError(f"{where} is longer than {MAX_ATTRIBUTE_BYTES} bytes")
    return value if isinstance(value, str) else list(texts)


def user_rows(users: pa.Table) -> Iterator[tuple[str, dict[str, Attribute]]]:
    """The rows of a USERS table as (id, attributes), checked; what is missing is left out."""
    for user, row in plain_rows(users):
        yield user, check_attributes(row, f"user {check_id(user, 'user_id')!r}")


def one_of_all(told: Iterable[tuple[str, str, Attribute]], person: str) -> dict[str, Attribute]:
    """A person's attributes from (id, name, value) of all their ids: those of the id they go by count, then by the order of ids."""
    out: dict[str, Attribute] = {}
    for _, name, value in sorted(told, key=lambda each: (each[0] == person, each[0]), reverse=True):
        out.setdefault(name, value)
    return out
