"""Every exception that dit-accel raises on purpose: each says what is wrong and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DitAccelError(Exception):
    """Base class of all errors raised by dit-accel."""


class OptionError(DitAccelError, ValueError):
    """An option has an impossible value, or no option of that name exists."""


class UnknownMethodError(OptionError):
    """No method of that name is registered."""


class UnknownPipelineError(DitAccelError, TypeError):
    """The pipeline belongs to no known family."""


class GridMismatchError(DitAccelError, ValueError):
    """The token grid and the text length do not explain the number of tokens."""


class OperatorUnavailableError(DitAccelError, RuntimeError):
    """The attention operator that was asked for cannot run this call here."""


class DensityUnreachableError(OptionError):
    """The method has no pattern as sparse as the density that was asked for.

    Attributes:
        least: the smallest density that it reaches there.
    """

    def __init__(self, message: str, least: float) -> None:
        super().__init__(message)
        self.least = least


class ContextParallelError(DitAccelError, RuntimeError):
    """This combination of method and context parallelism would give wrong results."""


class RankFailedError(ContextParallelError):
    """Another rank has failed, which ends this one, too."""


class BackboneError(DitAccelError, RuntimeError):
    """A network that a measure needs is not installed, or its weights can't be loaded."""


class VideoError(DitAccelError, ValueError):
    """A video or image can't be read, or shows nothing."""


class UnknownWordsWarning(UserWarning):
    """A prompt has words that the model's captions never had."""


class QualityWarning(UserWarning):
    """Sparse attention was too far from dense attention, or not finite."""


class SpeedWarning(UserWarning):
    """Sparse attention that was asked for by name is slower than dense attention here."""


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the nearest of ``valid``, followed by the whole list."""
    names = sorted(valid)
    near = difflib.get_close_matches(name.lower(), [n.lower() for n in names], n=1, cutoff=0.5)
    hint = ""
    if near:
        hint = f" Did you mean {next(n for n in names if n.lower() == near[0])!r}?"
    return f"{hint} Valid: {', '.join(names)}." if names else hint
