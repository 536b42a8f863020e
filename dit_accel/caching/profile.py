"""Profiles of a model: which share of each block's attention goes to the foreground."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel.errors import OptionError
from dit_accel.pipelines.base import PipelineFamily

if TYPE_CHECKING:
    from dit_accel.caching.profiling import ProfilingCache

VERSION = 1


@dataclass(frozen=True)
class Profile:
    """What ``dit-accel profile`` measured.

    Attributes:
        model: what was profiled, as named by the user.
        family: of its pipeline.
        num_blocks: of its stack.
        width: channels of its tokens.
        settings: of the profiling run: prompts, steps, size, how the foreground was found.
        foreground: per block, the share of foreground tokens that get more than their share of
            attention, mean over steps and prompts.
        by_step: the same per step, then per block.
        grid: tokens as (T, H, W) that it was measured at; None: not written down.
    """

    model: str
    family: str
    num_blocks: int
    width: int
    settings: dict[str, Any]
    foreground: tuple[float, ...]
    by_step: tuple[tuple[float, ...], ...] = ()
    grid: tuple[int, ...] | None = None

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a profile.

        Raises:
            OptionError: if there is none, or it is no profile of this version.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise OptionError(f"profile {str(path)!r} can't be read: {error.strerror}.") from error
        except ValueError as error:
            raise OptionError(
                f"profile {str(path)!r} is not JSON, or is cut short: make it again with "
                "`dit-accel profile`."
            ) from error
        version = content.get("version") if isinstance(content, dict) else None
        if version != VERSION:
            raise OptionError(
                f"profile {str(path)!r} has version {version!r}, not {VERSION}: make it again with "
                "`dit-accel profile`."
            )
        try:
            names = [name for name in cls.__dataclass_fields__ if name != "grid"]
            grid = content.get("grid")  # profiles once had none
            found = cls(
                **{name: content[name] for name in names},
                grid=None if grid is None else tuple(map(int, grid)),
            )
            found = replace(found, foreground=tuple(map(float, found.foreground)))
        except (KeyError, TypeError, ValueError) as error:
            raise OptionError(
                f"profile {str(path)!r} is incomplete ({error}): make it again with `dit-accel "
                "profile`."
            ) from error
        if len(found.foreground) != found.num_blocks:
            raise OptionError(f"profile {str(path)!r} lists too few blocks: make it again.")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return what a profile's file holds."""
        return {"version": VERSION, **asdict(self)}

    def background_blocks(self, fraction: float) -> tuple[int, ...]:
        """Return the ``fraction`` of the blocks that lean least to the foreground, ascending."""
        order = sorted(range(self.num_blocks), key=lambda block: self.foreground[block])
        return tuple(sorted(order[: round(fraction * self.num_blocks)]))

    def applied_to(
        self, cache: ProfilingCache, family: PipelineFamily, transformer: Any
    ) -> ProfilingCache:
        """Return the cache with the blocks that this profile lists.

        Raises:
            OptionError: if the profile is another model's.
        """
        blocks = len(family.blocks(transformer))
        found = (family.name, blocks, token_width(transformer))
        mine = (self.family, self.num_blocks, self.width)
        if found != mine:
            raise OptionError(
                f"the profile was made for {self.model!r}, a {mine[0]} of {mine[1]} blocks and "
                f"width {mine[2]}; this one is a {found[0]} of {found[1]} blocks and width "
                f"{found[2]}: make its own with `dit-accel profile`."
            )
        return replace(cache, blocks=self.background_blocks(cache.fraction), profile=None)


def token_width(transformer: Any) -> int:
    """Return the channels of a transformer's tokens."""
    config = transformer.config
    return int(config.num_attention_heads * config.attention_head_dim)


def mean(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Return the mean of rows, column by column."""
    return tuple(sum(column) / len(column) for column in zip(*rows, strict=True))
