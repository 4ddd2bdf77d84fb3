"""What a test needs from outside, importable from every test folder (each has its own ``conftest``)."""

from __future__ import annotations

import os

import pytest


def require(name: str, present: bool, why: str) -> None:
    """Skip a test whose ``name`` (data, redis, browser) is absent, or fail it where ``MAPLE_REQUIRE`` names it."""
    if present:
        return
    if name in os.environ.get("MAPLE_REQUIRE", "").split(","):
        pytest.fail(f"MAPLE_REQUIRE names {name}, but {why}")
    pytest.skip(why)
