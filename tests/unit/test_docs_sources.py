"""The pages in docs/sources.md are ones that Maple reads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from maple.data.sources import SourceConfig

PAGE = (Path(__file__).parents[2] / "docs" / "sources.md").read_text()
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_a_page_of_the_docs_is_a_source(block: str) -> None:
    plain = yaml.safe_load(block)
    plain.setdefault("events", {})
    source = SourceConfig.parse(plain, "docs/sources.md")
    assert SourceConfig.parse(source.plain(), "again") == source


def test_there_are_pages() -> None:
    assert len(BLOCKS) >= 2
