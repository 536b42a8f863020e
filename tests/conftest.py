"""Settings for all tests: no network, few threads."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Shared builders such as tiny_pipelines are imported by their bare name.
sys.path.insert(0, str(Path(__file__).parent))
