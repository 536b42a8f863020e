"""The subjects of the cache tests as a fixture."""

from __future__ import annotations

import pytest
from cache_subjects import SUBJECTS, Subject


@pytest.fixture(params=sorted(SUBJECTS))
def subject(request: pytest.FixtureRequest) -> Subject:
    """Each family in turn, Wan with one transformer and with two."""
    return Subject(request.param)
