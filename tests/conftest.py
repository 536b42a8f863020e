"""Settings for all tests: no network, and Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Triton reads this once, when it is first imported, which any test may be the first to do.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
