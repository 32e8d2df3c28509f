"""Fixtures of the tests against real Go Asynq."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.interop.gopeer import build, find_go


@pytest.fixture(scope="session")
def go_peer() -> Path:
    """Return the built Go program; skip where Go is missing, but fail in CI (`CI=true`)."""
    if find_go() is None:
        if os.environ.get("CI") == "true":
            pytest.fail("Go is not installed; in CI a skipped interop test is a failure")
        pytest.skip("Go is not installed")
    return build()
