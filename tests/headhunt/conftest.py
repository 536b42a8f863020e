"""A tiny pipeline on disk to search."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_pipelines import tiny_sd3


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny Stable Diffusion 3 pipeline: three layers of two heads."""
    folder = tmp_path_factory.mktemp("models") / "image"
    tiny_sd3().save_pretrained(folder)
    return folder
