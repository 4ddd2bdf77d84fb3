"""The corpus of crafted files of ``benchmarks/bad_files.py``, but for the large ones: refused by name, or every row accounted for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def corpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr("os.fsync", lambda handle: None)  # a third of the time, and nothing here is about crashes
    import bad_files

    yield bad_files
    sys.modules.pop("bad_files", None)


@pytest.mark.parametrize("part", ["_text_to_refuse", "_parquet_to_refuse", "_text_to_account", "_json_to_account", "_parquet_to_account"])
def test_bad_files_are_refused_by_name_or_accounted_for(corpus: ModuleType, tmp_path: Path, part: str) -> None:
    wrong = {}
    count = 0
    for number, case in enumerate(getattr(corpus, part)()):
        verdict = corpus.judge(case, tmp_path / str(number), tmp_path / "executed")
        count += 1
        if not verdict.holds:
            wrong[case.name] = verdict.told
    assert wrong == {}
    assert count > 15


def test_damaged_archives_are_refused(corpus: ModuleType, tmp_path: Path) -> None:
    for number, case in enumerate(corpus._packed_to_refuse()):
        verdict = corpus.judge(case, tmp_path / str(number), tmp_path / "executed")
        assert verdict.holds, (case.name, verdict.told)


def test_code_in_extension_types_does_not_run(corpus: ModuleType, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    for number, case in enumerate(corpus._extensions(marker)):
        verdict = corpus.judge(case, tmp_path / str(number), marker)
        assert verdict.holds, (case.name, verdict.told)
        assert "extension types" in verdict.told
    assert not marker.exists()


def test_a_flipped_byte_is_found_or_changes_no_count(corpus: ModuleType, tmp_path: Path) -> None:
    for number, case in enumerate(corpus.flipped(15)):
        verdict = corpus.judge(case, tmp_path / str(number), tmp_path / "executed")
        assert verdict.holds, (case.name, verdict.told)


def test_the_judge_sees_what_is_lost(corpus: ModuleType, tmp_path: Path) -> None:
    """A case that claims more rows than its file has fails, and so does a good file that should be refused."""
    good = next(corpus._text_to_account())
    more = corpus.Case(good.name, good.data, (good.records or 0) + 1)
    assert not corpus.judge(more, tmp_path / "more", tmp_path / "executed").holds
    assert not corpus.judge(corpus.Case(good.name, good.data), tmp_path / "refuse", tmp_path / "executed").holds
