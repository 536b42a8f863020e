"""FreeSwim's second stage: windows, full passes, and what the ones take over from the others.

The two passes of a step go through the transformer block by block: a block runs for the full pass
first, then for the window pass, which takes over what the full one read from the text. So only one
layer of it is alive where nothing is kept between steps, and no batch is doubled. In a step that
reuses what was kept, the window pass runs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dit_accel import compat
from dit_accel.call import TokenLayout, text_back, text_last
from dit_accel.errors import OptionError
from dit_accel.highres.full_pass import pooled_attention, pooled_share, text_attention
from dit_accel.highres.stages import Sizes, generate_in_stages, sizes_of
from dit_accel.highres.store import TensorStore
from dit_accel.kernels.merge import merge
from dit_accel.methods.base import AttentionMethod
from dit_accel.pipelines.base import Streams
from dit_accel.plan import PastJointPlan
from dit_accel.report import CallRecord, StepRecord
from dit_accel.session import Forward, ResolutionSession, Seam, SelfAttention, is_compiled

if TYPE_CHECKING:
    from dit_accel.highres.freeswim import FreeSwim

Key = tuple[int, str]
"""A transformer and a guidance branch."""
Name = tuple[Any, ...]
"""A layer, and what of it."""


@dataclass
class _Pass:
    """The forward under way, if its text is taken over.

    Attributes:
        key: what its tensors are kept by.
        guided: whether a full pass runs beside it; else what was kept is used.
        keeps: whether later steps will use what the full pass reads.
        in_full: whether the full pass runs just now, rather than the window pass.
        full: the full pass's tokens behind the last block.
        fresh: what the full pass read from the text in the block at hand.
    """

    key: Key
    guided: bool
    keeps: bool
    in_full: bool = False
    full: Streams | None = None
    fresh: dict[Name, Tensor] = field(default_factory=dict)


class FreeSwimSession(ResolutionSession):
    """Stands in front of the pipeline, its blocks and their cross-attention.

    Raises:
        OptionError: if the pipeline, its model or its scheduler can't be used so.
    """

    def __init__(self, method: FreeSwim, pipe: Any, seam: Seam) -> None:
        self.method, self.pipe, self.seam = method, pipe, seam
        self.sizes: Sizes = sizes_of(method, pipe, seam.family)
        self.store = TensorStore(method.offload)
        self._second_stage = False
        self._forward: Forward | None = None
        self._pass: _Pass | None = None
        self._guided_at: dict[Key, tuple[int, torch.Size]] = {}
        for name in seam.family.components:
            transformer = getattr(pipe, name, None)
            if transformer is not None and method.override == "cross":
                self._check_cross(transformer)
        if method.override == "joint":
            self._check_joint()

    def attach(self, transformer: nn.Module) -> None:
        """See `Session.attach`."""
        compat.refuse_other_caches(transformer)
        self._refuse_compiled(transformer)
        if self.method.override == "none":
            return
        for index, block in enumerate(self.seam.family.blocks(transformer)):
            self.seam.intercept(block, partial(self._run_block, index))
        if self.method.override == "cross":
            for index, module in enumerate(self._cross_attention(transformer)):
                self.seam.intercept(module, partial(self._run_cross, index))

    def generate(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """See `ResolutionSession.generate`."""
        return generate_in_stages(self, call, args, kwargs)

    @contextmanager
    def second_stage(self) -> Iterator[None]:
        """Attend by windows meanwhile."""
        self._second_stage = True
        try:
            yield
        finally:
            self._second_stage = False
            self.begin()

    def begin(self) -> None:
        """See `Session.begin`."""
        self.store.clear()
        self._guided_at.clear()

    def method_at(self, layout: TokenLayout) -> AttentionMethod | None:
        """See `ResolutionSession.method_at`."""
        if not self._second_stage:
            return None
        return self.method.sliding_window(layout.grid, self.sizes.trained_grid)

    # ------------------------------------------------------------------ one transformer call

    def enter(self, forward: Forward) -> None:
        """See `Session.enter`."""
        self._pass = self._forward = None
        if self._second_stage:
            self._forward = forward
            branches = ("cond", "uncond") if self.method.branches == "both" else ("cond",)
            taking = forward.moment.branch in (*branches, "cond_uncond")
            if taking and self.method.override != "none":
                self._refuse_compiled(forward.transformer)
                self._pass = self._plan_pass(forward)

    def _plan_pass(self, forward: Forward) -> _Pass:
        """Decide whether a full pass runs in this step."""
        key, step, every = forward.key, forward.moment.step, self.method.refresh_every
        shape = forward.kwargs["hidden_states"].shape
        if any(transformer != key[0] for transformer, _ in self._guided_at):
            self.begin()  # another transformer took over; what was kept is of the one before
        last, of_shape = self._guided_at.get(key, (None, None))
        recent = step is not None and last is not None and last < step < last + every
        guided = not recent or of_shape != shape
        if guided and step is not None:
            self._guided_at[key] = step, shape
        more = step is not None and step + 1 != forward.moment.num_steps
        return _Pass(key, guided, keeps=every > 1 and more)

    def leave(self, output: Any) -> None:
        """See `Session.leave`."""
        forward, done = self._forward, self._pass
        self._forward = self._pass = None
        if forward is None:
            return
        if output is None:
            self.begin()
            return
        recorder, blocks = self.seam.recorder, self.seam.family.blocks(forward.transformer)
        recorder.cache_bytes = max(recorder.cache_bytes, self.store.nbytes)
        why, reused = "windows alone", 0
        if done is not None:
            why = "windows and a full pass" if done.guided else ""
            reused = 0 if done.guided else len(blocks)
        moment, ran = forward.moment, (True,) * len(blocks)
        recorder.steps.append(
            StepRecord(moment.step, moment.branch, ran, why, attention_reused=reused)
        )

    def _run_block(self, index: int, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a block for the full pass, if there is one, and for the window pass."""
        now, family = self._pass, self.seam.family
        if now is None:
            return inner(*args, **kwargs)
        if now.guided:
            before = now.full or family.streams_in(args, kwargs)
            full_args, full_kwargs = family.with_streams(args, kwargs, before)
            now.in_full = True
            now.full = family.streams_out(inner(*full_args, **full_kwargs))
            now.in_full = False
            if now.full.text is not None:
                now.fresh[index, "text"] = now.full.text
        output = inner(*args, **kwargs)
        streams = family.streams_out(output)
        if streams.text is None:
            return output
        return family.as_output(Streams(streams.video, self._taken((index, "text"))))

    def _run_cross(
        self, index: int, inner: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Run a cross-attention, or give what the full pass's gave."""
        now = self._pass
        if now is None:
            output: Tensor = inner(*args, **kwargs)
            return output
        if not now.in_full:
            return self._taken((index, "cross"))
        now.fresh[index, "cross"] = output = inner(*args, **kwargs)
        return output

    def _taken(self, name: Name) -> Tensor:
        """Return what the full pass read just now, keeping it if need be, or in an earlier step."""
        now = self._pass
        if now is None:
            raise RuntimeError("no pass is under way")
        key = (*now.key, *name)
        if name not in now.fresh:
            return self.store.get(key)
        fresh = now.fresh.pop(name)
        if now.keeps:
            self.store.put(key, fresh)
        return fresh

    # ------------------------------------------------------------------ one attention call

    def attend(self, attention: SelfAttention) -> Tensor:
        """See `ResolutionSession.attend`."""
        call, now = attention.call, self._pass
        joint = self.method.override == "joint" and call.layout.text_length > 0
        if now is not None and now.in_full:
            output = self._attend_fully(attention)
            if joint:
                self._read_text(attention, now)
            return output
        if now is None or not joint:
            return attention.own(attention.qkv, call.layout, attention.scale, False)[0]
        layout = call.layout
        video = replace(layout, text_length=0)
        query, key, value = (text_last(x, layout)[:, : layout.video_length] for x in attention.qkv)
        output, lse = attention.own((query, key, value), video, attention.scale, True)
        if lse is None:
            raise RuntimeError("an operator gave no LSE")
        name = (call.layer, attention.sample)
        image = merge(output, lse, *(self._taken((*name, which)) for which in ("part", "lse")))
        # The full pass's text tokens take the place of the window pass's behind each block.
        unused = image.new_zeros(len(image), layout.text_length, *image.shape[2:])
        return text_back(torch.cat([image, unused], 1), layout, dim=1)

    def _attend_fully(self, attention: SelfAttention) -> Tensor:
        """Attend in a full pass: to everything, by the chosen method, or to pooled keys."""
        query, call = attention.qkv[0], attention.call
        window = self.method.sliding_window(call.layout.grid, self.sizes.trained_grid)
        scale = window.scaled(attention.scale, query.shape[-1])
        call = replace(call, branch=f"{call.branch} full")
        if self.method.pool_keys == 1:
            return attention.usual(attention.qkv, call, scale)
        share = torch.tensor(pooled_share(call.layout, self.method.pool_keys))
        self.seam.recorder.calls.append(
            CallRecord(
                call.step, call.layer, call.branch, PastJointPlan(share), "dense, pooled keys",
                str(query.dtype).removeprefix("torch."),
            )
        )  # fmt: skip
        return pooled_attention(
            *attention.qkv, call.layout, attention.order, self.method.pool_keys, scale
        )

    def _read_text(self, attention: SelfAttention, now: _Pass) -> None:
        """Note what the image tokens of the full pass read from the text, with its LSE."""
        layout = attention.call.layout
        query, key, value = (text_last(x, layout) for x in attention.qkv)
        image, text = slice(0, layout.video_length), slice(layout.video_length, None)
        part, lse = text_attention(query[:, image], key[:, text], value[:, text], attention.scale)
        name = (attention.call.layer, attention.sample)
        now.fresh |= {(*name, "part"): part, (*name, "lse"): lse}

    # ---------------------------------------------------------------------------- checks

    def _cross_attention(self, transformer: nn.Module) -> list[nn.Module]:
        found = self.seam.family.cacheable_attention(transformer)
        return [module for module, kind in found if kind == "cross"]

    def _refuse_compiled(self, transformer: nn.Module) -> None:
        blocks = self.seam.family.blocks(transformer)
        if self.method.override == "cross" and any(is_compiled(block) for block in blocks):
            raise OptionError(
                "override='cross' replaces cross-attention inside blocks, which compiled blocks "
                "can't do: leave compile out, or choose override='none'."
            )

    def _check_cross(self, transformer: nn.Module) -> None:
        if not self._cross_attention(transformer):
            raise OptionError(
                f"override='cross' needs cross-attention, and {type(transformer).__name__} has "
                "none: its text shares the sequence with the image. Choose override='joint' "
                "(experimental), or 'none' for windows alone."
            )

    def _check_joint(self) -> None:
        if "text" not in self.seam.family.block_output:
            raise OptionError(
                "override='joint' is for models whose text shares the sequence with the image: "
                "choose override='cross' here."
            )
