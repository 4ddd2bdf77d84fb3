"""The release ledger: which bundle is champion, which was before it, which runs in its shadow, who said so and when.

One file per generation, ``000000012.json``, holding the whole state after that change. A change is a compare-and-set: the
record of generation n+1 is written aside, forced to disk, and then *linked* to its name, which the file system allows once.
So of two writers that both saw generation n exactly one wins, readers never see half a record, and the folder is the audit
log; each record carries the SHA-256 of the one before it, so a changed or missing record shows.

Object stores have no such link (pyarrow offers no conditional write), so a ledger lives in a local or NFS folder: by default
``<MAPLE_HOME>/releases``, and where MAPLE_HOME is a bucket, in the folder that ``MAPLE_LEDGER`` names, shared by all who promote.
"""

from __future__ import annotations

import contextlib
import errno
import getpass
import json
import os
import re
import uuid
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeAlias

from maple.artifacts import Place, open_manifest, verify
from maple.errors import ArtifactError, ConfigError, ServeError
from maple.hashing import sha256

Action: TypeAlias = Literal["none", "promote", "rollback", "shadow"]

_RECORD = re.compile(r"(\d{9})\.json")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_RETRIES = 1000


@dataclass(frozen=True)
class Release:
    """The state after one change. Generation 0 is the empty ledger.

    ``at`` is UTC, ISO 8601; ``parent`` is the SHA-256 of the record before, "" for the first.
    """

    generation: int = 0
    action: Action = "none"
    champion: str | None = None
    previous: str | None = None
    shadow: str | None = None
    at: str = ""
    by: str = ""
    note: str = ""
    parent: str = ""

    def plain(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True)
class Ledger:
    """A folder of release records, and the home whose bundles they point to."""

    folder: Path
    home: Place

    @staticmethod
    def open(home: Place | str | Path, folder: str | Path | None = None) -> Ledger:
        """The ledger of a home: in ``folder``, else in ``MAPLE_LEDGER``, else in ``<home>/releases``.

        Raises ``ConfigError`` where that is not a local (or NFS) folder, since an object store cannot arbitrate two writers.
        """
        place = Place.at(home)
        chosen = folder if folder is not None else os.environ.get("MAPLE_LEDGER")
        where = Place.at(chosen) if chosen else place / "releases"
        if where.local is None:
            raise ConfigError(
                f"the release ledger cannot live at {where.uri}: an object store cannot decide between two writers. "
                "Set MAPLE_LEDGER to a folder on a local disk or on NFS that everyone who promotes shares; bundles stay where they are."
            )
        return Ledger(where.local, place)

    def read(self) -> Release:
        """The current state; generation 0 where nothing was ever released."""
        newest = self._newest()
        return self._record(newest) if newest else Release()

    def champion(self) -> Release:
        """The current state, which has a champion; ``ArtifactError`` says what to do where there is none."""
        release = self.read()
        if release.champion is None:
            raise ArtifactError(
                f"{self.folder} has no champion: nothing was released yet. "
                "Publish a bundle with `maple publish` and release it with `maple promote <digest>`, or point MAPLE_HOME to where one is."
            )
        return release

    def resolve(self, beginning: str) -> str:
        """The one digest that begins so (at least 6 characters); ``ArtifactError`` lists what there is if none or several do."""
        known = [place.name for place in (self.home / "bundles").children() if _DIGEST.fullmatch(place.name)]
        found = [digest for digest in known if len(beginning) >= 6 and digest.startswith(beginning)]
        if len(found) != 1:
            what = "no bundle begins" if not found else f"{len(found)} bundles begin"
            listed = ", ".join(digest[:12] for digest in (found or known)[:20]) or "none; make one with `maple publish`"
            raise ArtifactError(f"{what} with {beginning[:80]!r} (give at least 6 characters). {(self.home / 'bundles').uri} has: {listed}")
        return found[0]

    def history(self) -> list[Release]:
        """Every state ever, oldest first; ``ArtifactError`` if a record is missing or was changed."""
        out: list[Release] = []
        parent = ""
        for generation in range(1, self._newest() + 1):
            record = self._record(generation)
            if record.parent != parent:
                raise ArtifactError(
                    f"{self._path(generation)} does not follow the record before it: one of the two was changed. "
                    "Restore the folder from a backup, or start a new ledger by moving this one away and promoting the champion again."
                )
            parent = sha256(self._path(generation).read_bytes())
            out.append(record)
        return out

    def promote(self, digest: str, *, expected_generation: int | None = None, by: str = "", note: str = "") -> Release:
        """Make a bundle the champion; the champion so far becomes ``previous``. Promoting the champion again changes nothing.

        ``expected_generation`` is the state that the caller decided upon: ``ServeError`` if the ledger moved since. Without it the
        change is applied to whatever is current. ``ArtifactError`` if the bundle is missing or damaged; nothing changes then.
        """
        self._check_bundle(digest)

        def step(now: Release) -> Release:
            if now.champion == digest:
                return now
            shadow = None if now.shadow == digest else now.shadow
            return replace(now, action="promote", champion=digest, previous=now.champion, shadow=shadow)

        return self._change(step, expected_generation, by, note)

    def rollback(self, *, expected_generation: int | None = None, by: str = "", note: str = "") -> Release:
        """Back to the champion before this one. A second rollback goes one further back, so a bad release never returns by itself.

        ``ServeError`` where there is nothing to go back to, ``ArtifactError`` if that bundle is gone or damaged.
        """

        def step(now: Release) -> Release:
            if now.previous is None:
                raise ServeError(
                    f"there is no earlier release to roll back to (generation {now.generation}). "
                    "Promote a known good bundle with `maple promote`."
                )
            self._check_bundle(now.previous)
            below = stack(self._until(now.generation))[:-1]
            return replace(now, action="rollback", champion=below[-1], previous=below[-2] if len(below) > 1 else None)

        return self._change(step, expected_generation, by, note)

    def set_shadow(self, digest: str | None, *, expected_generation: int | None = None, by: str = "", note: str = "") -> Release:
        """Make a bundle the shadow, or end the shadow with None. ``ServeError`` if it is the champion already."""
        if digest is not None:
            self._check_bundle(digest)

        def step(now: Release) -> Release:
            if digest is not None and digest == now.champion:
                raise ServeError(f"bundle {digest[:12]} is the champion; a shadow must be another bundle")
            return now if now.shadow == digest else replace(now, action="shadow", shadow=digest)

        return self._change(step, expected_generation, by, note)

    # -- the folder ----------------------------------------------------------------------------------------------------

    def _change(self, step: Callable[[Release], Release], expected: int | None, by: str, note: str) -> Release:
        for _ in range(_RETRIES):
            now = self.read()
            if expected is not None and now.generation != expected:
                raise _moved(expected, now)
            after = step(now)
            if after is now:
                return now
            parent = sha256(self._path(now.generation).read_bytes()) if now.generation else ""
            at = datetime.now(UTC).isoformat(timespec="microseconds")
            after = replace(after, generation=now.generation + 1, at=at, by=by or _user(), note=note, parent=parent)
            if self._append(after):
                return after
        raise ServeError(f"{self.folder} changes faster than this writer can follow ({_RETRIES} attempts); try again when it is quiet")

    def _append(self, record: Release) -> bool:
        """Write the record under its generation; False if somebody else has that generation already."""
        aside = self.folder / f"{record.generation:09d}.{uuid.uuid4().hex[:12]}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(aside, "wb") as handle:
                handle.write(json.dumps(record.plain(), indent=1, sort_keys=True).encode())
                handle.flush()
                os.fsync(handle.fileno())
            os.link(aside, self._path(record.generation))
            _sync(self.folder)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise ConfigError(
                    f"the file system of {self.folder} has no hard links, which the release ledger needs to decide between two writers. "
                    "Set MAPLE_LEDGER to a folder on a local disk or on NFS."
                ) from None
            raise ConfigError(f"cannot write to the release ledger {self.folder}: {error.strerror}. Nothing was changed.") from None
        finally:
            with contextlib.suppress(OSError):
                aside.unlink()
        return True

    def _newest(self) -> int:
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return 0
        except NotADirectoryError:
            raise ConfigError(f"{self.folder} is a file; the release ledger needs a folder. Move it away, or set MAPLE_LEDGER.") from None
        return max((int(match[1]) for match in map(_RECORD.fullmatch, names) if match), default=0)

    def _path(self, generation: int) -> Path:
        return self.folder / f"{generation:09d}.json"

    def _record(self, generation: int) -> Release:
        path = self._path(generation)
        try:
            plain = json.loads(path.read_bytes())
            record = Release(**plain)
            legal = isinstance(record.generation, int) and all(
                digest is None or _DIGEST.fullmatch(digest) for digest in (record.champion, record.previous, record.shadow)
            )
        except FileNotFoundError:
            raise ArtifactError(f"{path} is missing from the release ledger: later records exist. Restore it from a backup.") from None
        except (ValueError, TypeError) as error:
            raise ArtifactError(f"{path} cannot be read ({type(error).__name__}: {error}). Restore it from a backup.") from None
        if not legal or record.generation != generation:
            raise ArtifactError(f"{path} is not the record of generation {generation}. Restore it from a backup.")
        return record

    def _until(self, generation: int) -> list[Release]:
        return [record for record in self.history() if record.generation <= generation]

    def _check_bundle(self, digest: str) -> None:
        if not _DIGEST.fullmatch(digest):
            raise ArtifactError(
                f"{digest[:80]!r} is not a bundle digest (64 hexadecimal characters); "
                f"the folders of {(self.home / 'bundles').uri} are those that exist"
            )
        folder = self.home / "bundles" / digest
        manifest = open_manifest(folder, "bundle")
        if manifest.digest != digest:
            raise ArtifactError(
                f"{folder.uri} holds bundle {manifest.digest[:12]}, not {digest[:12]}: the folder was renamed. Publish it again."
            )
        verify(folder, manifest)


def stack(history: Iterable[Release]) -> list[str]:
    """The champions one could roll back through, the current one last: a promotion adds one, a rollback takes one off."""
    out: list[str] = []
    for record in history:
        if record.action == "promote" and record.champion is not None:
            out.append(record.champion)
        elif record.action == "rollback":
            out.pop()
    return out


def _moved(expected: int, now: Release) -> ServeError:
    champion = now.champion[:12] if now.champion else "none"
    return ServeError(
        f"the release is at generation {now.generation} (champion {champion}, {now.action} by {now.by or '?'} at {now.at or '?'}), "
        f"not at {expected} as expected: somebody else changed it. Nothing was changed; look at it with `maple releases` and decide again."
    )


def _sync(folder: Path) -> None:
    """Force the names in a folder to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"
