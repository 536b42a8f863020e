"""ProfilingDiT: blocks that look at the background change slowly, so what they add is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from dit_accel.caching.base import check_count
from dit_accel.caching.gates import Gate, RunMasks
from dit_accel.caching.profile import Profile
from dit_accel.caching.stack import Setting, StackCache, StackSession
from dit_accel.errors import OptionError
from dit_accel.schedule import Steps
from dit_accel.session import Forward, Seam, Session

PUBLISHED_STEPS = 50
"""The schedule's constants are for so many steps, and are scaled to others."""


@dataclass(frozen=True)
class ProfilingCache(StackCache):
    """Skip the blocks that a profile found to lean to the background, between refresh steps.

    What a run of listed blocks adds is kept from the last refresh; all other blocks run in every
    step. Which steps refresh is known beforehand.

    Args:
        blocks: the listed blocks, counted over the whole stack. None: as published for the model,
            or of ``profile``.
        uniform_below: listed blocks under this index are refreshed every ``interval`` steps, the
            others at intervals that shrink.
        profile: a file made by ``dit-accel profile`` for this model; its lowest share is listed. A
            profile of another model is refused; one of another size is noted in the report.
        fraction: share of the profiled blocks to list.
        longest, shortest: interval between refreshes at the start and at the end, for 50 steps;
            other numbers of steps scale them.
        interval: between refreshes of blocks under ``uniform_below``, for 50 steps.
        first_steps, last_steps, max_reuses, min_steps: see `StackCache`. The paper's last step
            may reuse, so ``last_steps`` is 0.
    """

    name: ClassVar[str] = "profiling_cache"
    paper: ClassVar[str] = "ProfilingDiT, 2504.03140"
    strength: ClassVar[str] = "fraction"
    strengths: ClassVar[tuple[float, ...]] = (0.4, 0.6, 0.8)
    most: ClassVar[float] = 1.0

    blocks: tuple[int, ...] | None = None
    uniform_below: int = 0
    profile: str | None = None
    fraction: float = 0.6
    longest: int = 11
    shortest: int = 2
    interval: int = 6
    first_steps: Steps = field(default=0.12, kw_only=True)
    last_steps: Steps = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        for name in ("longest", "shortest", "interval"):
            check_count(name, getattr(self, name), 1)
        if self.shortest > self.longest:
            raise OptionError(f"shortest={self.shortest} is over longest={self.longest}.")
        if self.blocks is not None and self.profile is not None:
            raise OptionError("give blocks=(...) or profile=FILE: both name the blocks to skip.")
        if not isinstance(self.fraction, int | float) or not 0 < self.fraction < 1:
            raise OptionError(f"fraction={self.fraction!r} must be in (0, 1): a share of blocks.")
        check_count("uniform_below", self.uniform_below, 0)
        for block in self.blocks or ():
            check_count("a block of blocks", block, 0)

    @classmethod
    def options_from(cls, published: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """A list of blocks that is given replaces a published one, whatever its form."""
        lists = {"blocks", "profile", "uniform_below"}
        if lists & given.keys():
            published = {name: value for name, value in published.items() if name not in lists}
        elif published.get("profile") is not None:
            published = {k: v for k, v in published.items() if k not in lists or k == "profile"}
        return {**published, **given}

    def session(self, pipe: Any, seam: Seam) -> Session:
        """Read the profile, if one is given, and refuse models without any list."""
        cache, profile = self, None
        if self.profile is not None:
            profile = Profile.load(self.profile)
            cache = profile.applied_to(self, seam.family, getattr(pipe, "transformer", None))
        if not cache.blocks:
            raise OptionError(
                "no list of background blocks is published for this model: make a profile with "
                "`dit-accel profile` and give profile=FILE, or give blocks=(...)."
            )
        return ProfiledSession(cache, seam, profile)

    def scope(self, num_blocks: int) -> tuple[range, ...]:
        """Return the maximal runs of consecutive blocks that are refreshed together."""
        blocks = self.blocks or ()
        for block in blocks:
            if block >= num_blocks:
                raise OptionError(
                    f"block {block} is listed, but the model has {num_blocks}: the list or the "
                    "profile is another model's."
                )
        split = self.uniform_below
        return (*runs([b for b in blocks if b < split]), *runs([b for b in blocks if b >= split]))

    def gate(self, setting: Setting) -> Gate:
        """Play both schedules through."""
        first, steps = max(setting.limits.first, setting.start), setting.num_steps
        decreasing = refresh_steps(steps, first, self.longest, self.shortest)
        uniform = refresh_steps(steps, first, self.interval, self.interval)

        def mask(run: range) -> list[bool]:
            refreshed = uniform if run.start < self.uniform_below else decreasing
            return [step in refreshed for step in range(steps)]

        return RunMasks({run: mask(run) for run in self.scope(setting.num_blocks)})


class ProfiledSession(StackSession):
    """Tells when a generation has another size than the profile that lists its blocks.

    That is allowed, for profiles are meant to be made at a small size, but not silent.
    """

    def __init__(self, cache: ProfilingCache, seam: Seam, profile: Profile | None) -> None:
        super().__init__(cache, seam)
        self.profile = profile
        self._checked = False  # in this generation

    def begin(self) -> None:
        """See `Session.begin`."""
        super().begin()
        self._checked = False

    def enter(self, forward: Forward) -> None:
        """See `Session.enter`."""
        super().enter(forward)
        if self._checked or self.profile is None or self.profile.grid is None:
            return
        self._checked = True
        kwargs = dict(forward.kwargs)
        grid = self.seam.family.read_inputs(forward.transformer, kwargs).layouts[0].grid
        if tuple(grid) == self.profile.grid:
            return
        self.seam.recorder.note(
            f"the profile of {self.profile.model!r} was measured at a token grid of "
            f"{self.profile.grid}, and this generation has {tuple(grid)}: its list of blocks is "
            "used as it is; `dit-accel profile` makes one at this size"
        )


def runs(blocks: Sequence[int]) -> list[range]:
    """Return the maximal runs of consecutive numbers."""
    found: list[range] = []
    for block in sorted(set(blocks)):
        if found and found[-1].stop == block:
            found[-1] = range(found[-1].start, block + 1)
        else:
            found.append(range(block, block + 1))
    return found


def refresh_steps(num_steps: int, first: int, longest: int, shortest: int) -> set[int]:
    """Return the steps that refresh: all before ``first``, then at shrinking intervals.

    The interval falls linearly from ``longest`` to ``shortest``, is rounded to an even number, and
    is scaled from 50 steps to ``num_steps``. With 50 steps, 6, 11 and 2 this is the released list.
    """
    full, step = set(range(min(first, num_steps))), first
    scale = num_steps / PUBLISHED_STEPS
    while step < num_steps:
        full.add(step)
        exact = longest - (longest - shortest) * (step - first) / max(num_steps - first, 1)
        step += max(round(2 * round(exact / 2) * scale), 1)
    return full
