"""Pyramid Attention Broadcast: attention outputs of the middle steps serve several steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from dit_accel import compat
from dit_accel.caching.base import Cache, check_count, few_steps, note_idle
from dit_accel.errors import OptionError
from dit_accel.report import StepRecord
from dit_accel.session import Forward, Seam, Session, is_compiled


@dataclass(frozen=True)
class PyramidAttentionBroadcast(Cache):
    """Run each attention module every few steps only, and repeat its output between.

    Every module holds an output per guidance branch: much memory on videos, see the report.

    Args:
        self_every: a self-attention (or joint attention) runs in one step of so many.
        cross_every: likewise a cross-attention to the text.
        window: timesteps, of 1000, between which outputs are repeated: (low, high).
        min_steps: generations of fewer steps run in full.
    """

    name: ClassVar[str] = "pab"
    paper: ClassVar[str] = "Pyramid Attention Broadcast, 2408.12588"
    strength: ClassVar[str] = "self_every"
    strengths: ClassVar[tuple[float, ...]] = (2, 3, 4)
    skips_blocks: ClassVar[bool] = False

    self_every: int = 2
    cross_every: int = 6
    window: tuple[float, float] = (100.0, 800.0)
    min_steps: int = field(default=8, kw_only=True)

    def __post_init__(self) -> None:
        """Check the options."""
        check_count("self_every", self.self_every, 1)
        check_count("cross_every", self.cross_every, 1)
        check_count("min_steps", self.min_steps, 0)
        if len(self.window) != 2 or not 0 <= self.window[0] < self.window[1] <= 1000:
            raise OptionError(f"window={self.window!r}: give timesteps (low, high) in [0, 1000].")

    def session(self, pipe: Any, seam: Seam) -> Session:
        """See `SessionMethod.session`."""
        return PABSession(self, seam)


class PABSession(Session):
    """Keeps attention outputs by transformer, branch and module."""

    def __init__(self, cache: PyramidAttentionBroadcast, seam: Seam) -> None:
        self.cache, self.seam = cache, seam
        self._kept: dict[Any, dict[int, tuple[int, Any]]] = {}  # module: (step, output)
        self._last: dict[Any, tuple[int | None, Any]] = {}  # by branch: step and regime
        self._forward: Forward | None = None
        self._inside = False  # of the window
        self._reused = 0

    def attach(self, transformer: nn.Module) -> None:
        """See `Session.attach`."""
        compat.refuse_other_caches(transformer)
        every = {"self": self.cache.self_every, "cross": self.cache.cross_every}
        for index, (module, kind) in enumerate(self.seam.family.cacheable_attention(transformer)):
            self.seam.intercept(module, partial(self._run, index, every[kind]))

    def begin(self) -> None:
        """See `Session.begin`."""
        self._kept.clear()
        self._last.clear()

    @property
    def bytes_held(self) -> int:
        """Bytes of all outputs kept."""
        return sum(_bytes(output) for kept in self._kept.values() for _, output in kept.values())

    def enter(self, forward: Forward) -> None:
        """See `Session.enter`."""
        if any(is_compiled(block) for block in self.seam.family.blocks(forward.transformer)):
            raise OptionError(
                "pab replaces attention modules inside blocks, which compiled blocks can't do: "
                "don't compile them, or choose a cache that skips whole blocks."
            )
        moment, low_high = forward.moment, self.cache.window
        self._forward, self._reused = forward, 0
        step, total = moment.step, moment.num_steps or 0
        inside = step is not None and 0 < step < total - 1
        if total < self.cache.min_steps:
            note_idle(self.seam, self.cache, few_steps(self.cache.min_steps))
            inside = False
        self._inside = inside and low_high[0] < moment.times[step or 0] < low_high[1]
        before = (None if step is None else step - 1, forward.regime)
        if self._last.get(forward.key) != before or not self._inside:
            # A branch may have been kept by another transformer until the step before.
            for key in [key for key in self._kept if key[1] == moment.branch]:
                del self._kept[key]

    def leave(self, output: Any) -> None:
        """See `Session.leave`."""
        forward, self._forward = self._forward, None
        if forward is None or output is None:
            return
        moment, recorder = forward.moment, self.seam.recorder
        self._last[forward.key] = moment.step, forward.regime
        recorder.cache_bytes = max(recorder.cache_bytes, self.bytes_held)
        ran = (True,) * len(self.seam.family.blocks(forward.transformer))
        why = "" if self._reused else "outside the window" if not self._inside else "refreshed"
        recorder.steps.append(
            StepRecord(moment.step, moment.branch, ran, why, attention_reused=self._reused)
        )

    def _run(
        self, index: int, every: int, inner: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        forward = self._forward
        if forward is None or not self._inside:
            return inner(*args, **kwargs)
        kept, step = self._kept.setdefault(forward.key, {}), forward.moment.step or 0
        made, output = kept.get(index, (-every, None))
        if step - made < every and _like(output, args, kwargs):
            self._reused += 1
            return output
        output = inner(*args, **kwargs)
        if every > 1:
            kept[index] = step, output
        return output


def _bytes(output: Any) -> int:
    found = output if isinstance(output, tuple) else (output,)
    return sum(tensor.nbytes for tensor in found if isinstance(tensor, Tensor))


def _like(output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an output kept belongs to tokens like those coming in."""
    first = output[0] if isinstance(output, tuple) else output
    tokens = args[0] if args else kwargs["hidden_states"]
    return bool(first.shape[0] == tokens.shape[0] and first.device == tokens.device)
