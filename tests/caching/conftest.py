"""The subjects of the cache tests as a fixture, and a cache folder for each test."""

from __future__ import annotations

from pathlib import Path

import pytest
from cache_subjects import SUBJECTS, Subject


@pytest.fixture(params=sorted(SUBJECTS))
def subject(request: pytest.FixtureRequest) -> Subject:
    """Each family in turn, Wan with one transformer and with two."""
    return Subject(request.param)


@pytest.fixture(autouse=True)
def calibrations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep what probes measure out of the user's cache folder; return where it goes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dit-accel" / "calibrations"
