"""The contract of a feature cache."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dit_accel.kinds import Method
from dit_accel.session import Session

if TYPE_CHECKING:
    from dit_accel.runtime import Runtime


@dataclass(frozen=True)
class Cache(Method):
    """Keeps what a transformer computed in earlier steps. Its options are its fields."""

    kind: ClassVar[str] = "cache"

    @abstractmethod
    def session(self, pipe: Any, runtime: Runtime) -> Session:
        """Return the working state for one acceleration of ``pipe``.

        Raises:
            OptionError: if the cache can do nothing on this pipeline.
        """
