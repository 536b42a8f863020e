"""What happens while an accelerated transformer runs: read the inputs, plan, attend, record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.call import AttentionCall, TokenLayout, text_back, text_last
from dit_accel.compat import dense_attention
from dit_accel.errors import OptionError
from dit_accel.grid import RASTER, TokenOrder
from dit_accel.guard.engine import Guard
from dit_accel.kernels.precision import check_device
from dit_accel.methods.base import AttentionMethod, StaticMethod
from dit_accel.operators import AttentionOutput, Operator, choose_operator, make_operators
from dit_accel.parallel.context import ContextParallel
from dit_accel.parallel.split import Split, Streams
from dit_accel.pipelines.base import ForwardInputs, PipelineFamily, TokenShuffle
from dit_accel.plan import AttentionPlan, BlockSparsePlan, DensePlan, JointPlan, PastJointPlan
from dit_accel.planning import Planner
from dit_accel.reordering import Reorderings
from dit_accel.report import CallRecord, Recorder, time_mark
from dit_accel.running import RunningForward
from dit_accel.schedule import Schedule
from dit_accel.session import (
    AttentionSession,
    Forward,
    OutputSession,
    ResolutionSession,
    Seam,
    SelfAttention,
    Session,
)
from dit_accel.tracking import CallTracker, Moment


class Runtime:
    """The working state of one acceleration. All of it lives and dies with that object."""

    def __init__(
        self,
        pipe: Any,
        family: PipelineFamily,
        method: AttentionMethod | None,
        schedule: Schedule,
        backend: str,
        density: float | None,
        precision: str | None,
    ) -> None:
        self.family, self.schedule = family, schedule
        self.method = method  # None: attention stays as it is
        self.backend, self.density, self.precision = backend, density, precision
        self.dense_backend: Any = None  # the diffusers backend that dense calls use
        self.guard: Guard | None = None
        self.tracker = CallTracker(pipe)
        self.recorder = Recorder()
        self.seam = Seam(family, self.tracker, self.recorder)
        self.sessions: Sequence[Session] = ()
        self.shuffle = TokenShuffle()
        self.layer: Tensor | None = None  # 0-d, so that all compiled blocks share one graph
        self._planner = Planner(method, density, schedule.min_tokens)
        self._operators = make_operators(precision)
        self._parallel = ContextParallel(
            self._planner, self.recorder, backend, self._operators, self._record_call
        )
        self._started: tuple[Moment, Any] | None = None  # of the running forward, and when
        self._running: RunningForward | None = None
        self._lists: dict[Any, BlockSparsePlan] = {}  # where an LSE is needed, dense ones too
        self._reorderings = Reorderings()

    @property
    def attends(self) -> bool:
        """Whether attention runs through here: for a method, or for a resolution session's."""
        resolution = any(isinstance(session, ResolutionSession) for session in self.sessions)
        return self.method is not None or resolution

    # ------------------------------------------------------------------ one transformer call

    def enter(
        self, transformer: nn.Module, kwargs: dict[str, Any], num_layers: int, parallel: Any
    ) -> dict[str, Any]:
        """Prepare one forward of ``transformer``; return the arguments to run it with.

        ``parallel`` is the config under which diffusers spreads its tokens over ranks, if it does.
        """
        check_device(self.precision, kwargs["hidden_states"].device)
        moment = self.tracker.advance(kwargs.get("timestep"))
        if moment.generation != self.recorder.generation:
            self._planner.begin()
            if self.guard is not None:
                self.guard.begin()
            for session in self.sessions:
                session.begin()
        self.recorder.begin(moment.generation)
        self._forget_forward()  # an interrupt may have spared the one before its `leave`
        if self.attends:
            kwargs = self._enter_attention(transformer, kwargs, moment, num_layers, parallel)
        self.seam.renew(transformer)
        regime = None if self._running is None else self._running.regime
        for session in self.sessions:
            session.enter(Forward(transformer, moment, kwargs, regime))
        self._started = moment, time_mark(kwargs["hidden_states"])
        return kwargs

    def leave(self, output: Any) -> None:
        """End the forward, also after an exception (then ``output`` is None)."""
        self._forget_forward()
        if self.guard is not None:
            self.guard.leave(output)
        started, self._started = self._started, None
        if started is not None:
            moment, begun = started
            self.recorder.forwards.append((moment.step, begun, time_mark(begun)))
            for session in self.sessions:
                session.leave(output)

    def _forget_forward(self) -> None:
        self._running = None
        self.shuffle.gather = self.shuffle.scatter = None
        self.shuffle.rank, self.shuffle.ranks = 0, 1
        self.seam.split = None

    def _enter_attention(
        self,
        transformer: nn.Module,
        kwargs: dict[str, Any],
        moment: Moment,
        num_layers: int,
        parallel: Any,
    ) -> dict[str, Any]:
        inputs = self.family.read_inputs(transformer, kwargs)
        layout = inputs.layouts[0]
        resolution, method = self._method_now(layout)
        if method is None:
            return kwargs
        if resolution is not None and (parallel or not inputs.mask_explained):
            raise OptionError(
                "a resolution method can't follow context parallelism, nor a text mask with holes: "
                "run without them, or leave the method out."
            )
        if self.guard is not None:
            self.guard.enter(id(transformer), moment, parallel)
        wanted = method.token_order(layout.grid)
        call = AttentionCall(layout, step=moment.step, num_steps=moment.num_steps)
        dense_step = resolution is None and self.schedule.dense_step_reason(call) is not None
        order, split, kwargs = RASTER, None, inputs.kwargs
        if parallel is not None:
            order = wanted
            split, kwargs = self._parallel.enter(
                parallel, self.family, inputs, method, wanted, self.shuffle
            )
            self.seam.split = split
        elif not dense_step:
            order = self._reorder(inputs, wanted, kwargs["hidden_states"].device)
        self._running = RunningForward(
            inputs.layouts,
            method,
            moment,
            num_layers,
            inputs.mask_explained,
            wanted,
            order,
            dense_step,
            id(transformer),
            resolution,
            split=split,
        )
        return kwargs

    def _method_now(
        self, layout: TokenLayout
    ) -> tuple[ResolutionSession | None, AttentionMethod | None]:
        """Return a resolution session that has a method of its own now, and the method to run."""
        for session in self.sessions:
            if isinstance(session, ResolutionSession) and (own := session.method_at(layout)):
                return session, own
        return None, None if self.method is None else self._planner.method_for(layout)

    def _reorder(
        self, inputs: ForwardInputs, wanted: TokenOrder, device: torch.device
    ) -> TokenOrder:
        """Put this forward's tokens into the wanted order if possible; return their order."""
        layout = inputs.layouts[0]
        if wanted.is_raster and not inputs.tail_first:
            return RASTER
        if inputs.keep_order is not None:
            self.recorder.note(
                f"tokens are reordered in every layer, not once per step: {inputs.keep_order}"
            )
            return RASTER
        self.shuffle.gather, self.shuffle.scatter = self._reorderings.of_forward(
            layout.grid, wanted, inputs.tail_first, device
        )
        return wanted

    # ---------------------------------------------------------------------- one attention call

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float | None,
        layer: Tensor | None,
    ) -> Tensor:
        """Run one layer's attention on ``[B, N, H, D]`` and record what was done.

        Under context parallelism these are the tokens that this rank holds.
        """
        running = self._running
        if running is None or running.split is None or query.shape[1] != key.shape[1]:
            return self._whole(query, key, value, mask, scale, layer)
        return running.split.attend(
            (query, key, value),
            lambda qkv: self._whole(*qkv, None, scale, layer),
            partial(self._ring, scale=scale, layer=layer, running=running),
        )

    def _ring(
        self,
        split: Split,
        query: Streams,
        key: Streams,
        value: Streams,
        *,
        scale: float | None,
        layer: Tensor | None,
        running: RunningForward,
    ) -> Streams:
        """Run one layer's attention over the parts of a ring."""
        layout = running.layouts[0] if query[1] is not None else running.image_layout
        call = self._call(running, layer, layout, query[0])
        reason = self.schedule.dense_reason(call)
        if reason is None and self.guard is not None:
            reason = self.guard.dense_reason(call, running.sample)
        ring = self._parallel.ring
        return ring(split, query, key, value, call, running, reason, scale, self.guard)

    def _call(
        self, running: RunningForward, layer: Tensor | None, layout: TokenLayout, query: Tensor
    ) -> AttentionCall:
        index, moment = 0 if layer is None else int(layer), running.moment
        steps = moment.step, moment.num_steps, moment.branch
        heads = () if running.split is None else running.split.heads(query)
        return AttentionCall(layout, index, running.num_layers, *steps, *heads)

    def _whole(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float | None,
        layer: Tensor | None,
    ) -> Tensor:
        """Run one layer's attention on whole sequences."""
        output = self._attend(query, key, value, mask, scale, layer)
        if layer is not None and self._running is not None and query.shape[1] == key.shape[1]:
            for session in self.sessions:
                if isinstance(session, OutputSession):
                    output = session.attended(int(layer), (query, key, value), scale, output)
        return output

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float | None,
        layer: Tensor | None,
    ) -> Tensor:
        running = self._running
        if running is None or query.shape[1] != key.shape[1]:
            return self._dense(query, key, value, mask, scale)
        layouts = tuple(running.layout_of(query.shape[1], layout) for layout in running.layouts)
        call = self._call(running, layer, layouts[0], query)
        reason = None if running.resolution else self.schedule.dense_reason(call)
        if not running.mask_explained:
            reason = reason or "the model masks text in the middle"
            return self._dense(query, key, value, mask, scale, call, reason)
        if len(layouts) == 1:
            return self._sample(query, key, value, scale, call, reason, running)
        # Samples of different text lengths: each runs without its padding, whose rows are unused.
        out = torch.zeros_like(query)
        for i, layout in enumerate(layouts):
            rows = (slice(i, i + 1), slice(0, layout.num_tokens))
            sample = replace(call, layout=layout)
            out[rows] = self._sample(
                query[rows], key[rows], value[rows], scale, sample, reason,
                replace(running, sample=i),
            )  # fmt: skip
        return out

    def _sample(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        call: AttentionCall,
        reason: str | None,
        running: RunningForward,
    ) -> Tensor:
        if running.resolution is not None:
            return self._resolved(running.resolution, (query, key, value), scale, call, running)
        if reason is None and self.guard is not None:
            reason = self.guard.dense_reason(call, running.sample)
        if reason is not None:
            return self._dense(query, key, value, None, scale, call, reason)
        if running.order == running.wanted:
            return self._planned(query, key, value, scale, call, running)
        # The forward is in another order: go over into the method's around this one call.
        gather, scatter = self._reorderings.of_call(
            call.layout, running.order, running.wanted, query.device
        )
        q, k, v = (x.index_select(1, gather) for x in (query, key, value))
        return self._planned(q, k, v, scale, call, running).index_select(1, scatter)

    def _resolved(
        self,
        session: ResolutionSession,
        qkv: tuple[Tensor, Tensor, Tensor],
        scale: float | None,
        call: AttentionCall,
        running: RunningForward,
    ) -> Tensor:
        """Let a resolution session attend, by its own method or by the acceleration's."""

        def own(
            qkv: tuple[Tensor, Tensor, Tensor],
            layout: TokenLayout,
            scale: float | None,
            with_lse: bool,
        ) -> tuple[Tensor, Tensor | None]:
            return self._own(qkv, scale, replace(call, layout=layout), running, with_lse)

        def usual(
            qkv: tuple[Tensor, Tensor, Tensor], call: AttentionCall, scale: float | None
        ) -> Tensor:
            if self.method is None:
                return self._dense(*qkv, None, scale, call, "no attention method is chosen")
            layout, reason = call.layout, self.schedule.dense_reason(call)
            method = self._planner.method_for(layout)
            as_usual = replace(running, layouts=(layout,), method=method, resolution=None)
            as_usual = replace(as_usual, wanted=method.token_order(layout.grid))
            return self._sample(*qkv, scale, call, reason, as_usual)

        attention = SelfAttention(qkv, call, running.sample, scale, running.order, own, usual)
        return session.attend(attention)

    def _own(
        self,
        qkv: tuple[Tensor, Tensor, Tensor],
        scale: float | None,
        call: AttentionCall,
        running: RunningForward,
        with_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Run a call by the method that a resolution session has for this forward."""
        scatter = None
        if running.order != running.wanted:
            gather, scatter = self._reorderings.of_call(
                call.layout, running.order, running.wanted, qkv[0].device
            )
            q, k, v = (x.index_select(1, gather) for x in qkv)
            qkv = q, k, v
        method = running.method
        if not isinstance(method, StaticMethod):
            out, lse = self._planned(*qkv, scale, call, running), None
        else:
            where = method, call.layout, running.wanted, qkv[0].device
            own_scale = method.scaled(scale, qkv[0].shape[-1])

            def again() -> AttentionOutput:
                plain, lists = self._operators["torch"], self._lists_of(*where)
                return plain.run(*qkv, lists, scale=own_scale, return_lse=True)

            if with_lse:
                output = self._operate(qkv, own_scale, call, self._lists_of(*where), with_lse=True)
            else:
                output = self._planned(*qkv, scale, call, running), None
            if self.guard is not None:
                output = self.guard.check_finite(output, call, again)
            out, lse = output
        if scatter is not None:
            out = out.index_select(1, scatter)
            lse = None if lse is None else lse.index_select(2, scatter)
        return out, lse

    def _lists_of(
        self, method: StaticMethod, layout: TokenLayout, order: TokenOrder, device: torch.device
    ) -> BlockSparsePlan:
        """Return the method's plan as lists, also where they list every block."""
        where = (method, layout, order, device)
        if where not in self._lists:
            self._lists[where] = method.plan_block_sparse(layout, order, device)
        return self._lists[where]

    def _planned(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        call: AttentionCall,
        running: RunningForward,
    ) -> Tensor:
        layout = call.layout
        if (
            layout.text_first
            and layout.text_length
            and not isinstance(running.method, StaticMethod)
        ):
            # Methods that look at the tokens find the text behind the video.
            q, k, v = (text_last(x, layout) for x in (query, key, value))
            last = replace(call, layout=replace(layout, text_first=False))
            return text_back(self._planned(q, k, v, scale, last, running), layout, dim=1)
        plan = self._planner.plan(query, key, value, call, running)
        scale = running.method.scaled(scale, query.shape[-1])
        if isinstance(plan, DensePlan):
            return self._dense(query, key, value, None, scale, call, plan.reason)
        qkv = query, key, value
        for session in self.sessions:
            if isinstance(session, AttentionSession):
                run = partial(self._operator(plan, query, call).run, scale=scale, return_lse=True)
                output = session.attend(qkv, call, running.sample, plan, run)
                break
        else:
            output = self._operate(qkv, scale, call, plan)[0]
        if self.guard is None or running.resolution is not None:
            return output
        dense = partial(dense_attention, mask=None, scale=scale, backend=self.dense_backend)
        output, share = self.guard.check(qkv, output, call, running.sample, scale, dense)
        self.recorder.repaired(share)
        return output

    def _operate(
        self,
        qkv: tuple[Tensor, Tensor, Tensor],
        scale: float | None,
        call: AttentionCall,
        plan: BlockSparsePlan | JointPlan,
        with_lse: bool = False,
    ) -> AttentionOutput:
        operator = self._operator(plan, qkv[0], call)
        return operator.run(*qkv, plan, scale=scale, return_lse=with_lse)

    def _operator(
        self, plan: BlockSparsePlan | JointPlan, query: Tensor, call: AttentionCall
    ) -> Operator:
        """Choose who runs a plan, and record it."""
        choice = choose_operator(self.backend, self._operators, plan, query)
        self.recorder.rejected.update(choice.rejected)
        precision = self.precision or _dtype_name(query)
        self._record(call, plan, choice.operator.name, precision)
        tuning = choice.operator.tuning(query.device)
        if tuning is not None and self.precision is None and isinstance(plan, BlockSparsePlan):
            self.recorder.tuning[choice.operator.name] = tuning.source
        return choice.operator

    def _dense(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float | None,
        call: AttentionCall | None = None,
        reason: str = "",
    ) -> Tensor:
        if call is not None:
            self._record(call, DensePlan(reason), "dense", _dtype_name(query), reason)
        return dense_attention(
            query, key, value, mask=mask, scale=scale, backend=self.dense_backend
        )

    def _record(
        self, call: AttentionCall, plan: AttentionPlan, operator: str, precision: str,
        reason: str = "",
    ) -> None:  # fmt: skip
        past = PastJointPlan(plan.computed_share) if isinstance(plan, JointPlan) else plan
        self.recorder.calls.append(
            CallRecord(call.step, call.layer, call.branch, past, operator, precision, reason)
        )

    def _record_call(
        self, call: AttentionCall, plan: AttentionPlan, operator: str, query: Tensor, reason: str
    ) -> None:
        self._record(call, plan, operator, self.precision or _dtype_name(query), reason)


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
