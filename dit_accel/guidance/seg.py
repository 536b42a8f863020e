"""Smoothed-energy guidance in its limit: whole layers see as their mean query does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dit_accel.guidance.attention import Target
from dit_accel.guidance.pag import PAG


@dataclass(frozen=True)
class SEG(PAG):
    """Guide away from what the model predicts when queries are blurred to their mean.

    This is the limit of an infinite blur; a finite one is not defined where text shares the
    sequence. Needs an attention method ("dense" will do), which shows the queries.

    Args:
        layers: numbers of blocks in running order.
        scope: the queries that are blurred, as in `SoftPAG`.
    """

    name: ClassVar[str] = "seg"
    paper: ClassVar[str] = "Smoothed Energy Guidance, 2408.00760"
    target: ClassVar[Target] = "query_mean"

    @property
    def sees_queries(self) -> bool:
        """See `Guidance.sees_queries`."""
        return True
