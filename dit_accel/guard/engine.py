"""The quality guard at work: probes, decisions and repairs of one acceleration.

`reference.py` says what a probe measures. All that a call's decision needs is one short vector,
which the host reads once per sparse call: what is wrong is repaired before anything else sees it,
and a wait at a call that takes milliseconds costs less than running the repair for all heads and
choosing on the device. Under context parallelism the vector is summed over the ranks that share a
sequence before it is read, so all ranks decide alike for all heads, and repair their own. In a ring
each part adds what it has of the probed rows, and calls `Guard.rows` and `Guard.judge` itself
(`parallel/guarded.py`); whole sequences go through `Guard.check`.

On a GPU a wait costs more than a short call does. So short calls are waited for only where they
are probed, which is seldom; of the others the transformer's output is looked at, a forward later
(`late.py`), too late to repair it: that is told, and from then on every call is waited for.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel import compat
from dit_accel.call import AttentionCall, TokenLayout
from dit_accel.errors import OptionError, QualityWarning
from dit_accel.grid import Grid
from dit_accel.guard.late import LateLook
from dit_accel.guard.options import GuardChoice, QualityGuard, settle_guard
from dit_accel.guard.records import GuardRecord, GuardReport
from dit_accel.session import sample_of
from dit_accel.tracking import Moment

Output = tuple[Tensor, Tensor | None]
"""An output ``[B, N, H, D]`` and, where there is one, its LSE ``[B, H, N]``."""

Dense = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Dense attention: ``dense(query, key, value) -> output``, all ``[B, N, H, D]``."""

Heads = Tensor | slice
"""What ``x[:, :, heads]`` takes: int64 numbers of heads, or all of them."""

SHORT = 65_536
"""Tokens from which a GPU's call takes so long that a wait does not count: with a wait in each, a
step of Wan2.1-14B at 75,600 tokens took 0.8 % longer, one of Wan2.1-1.3B at 32,760 3.7 %."""

SHIFT = 0.6180339887498949
"""Successive probes are shifted by this share of the space between two rows: never the same."""


class _Where(NamedTuple):
    """What decisions are kept by."""

    transformer: int
    branch: str
    sample: int
    layer: int
    grid: Grid
    text_length: int


@dataclass
class _Known:
    """What was decided on the heads of one layer, in one branch."""

    calls: int = 0  # sparse calls so far
    dense: frozenset[int] = frozenset()
    whole: bool = False  # the layer is not run sparsely any more


class Guard:
    """The working state of a `QualityGuard`. It dies with its acceleration."""

    def __init__(self, options: QualityGuard) -> None:
        self.options = options
        self.records: list[GuardRecord] = []
        self._known: dict[_Where, _Known] = {}
        self._dense_from: tuple[int | None] | None = None  # step of a trip that made all dense
        self._transformer = 0
        self._parallel: Any = None
        self._warned = False
        self._late = LateLook()
        self._unwaited: list[int] = []  # layers whose calls of this forward nobody looked at
        self._last = True  # whether no forward of this generation is sure to follow
        self._waits = False  # whether something was found too late: then all calls are waited for

    def begin(self) -> None:
        """Forget everything: a new generation is about to run."""
        self._look_back()
        self.records.clear()
        self._warned = False
        self._forget_decisions()

    def enter(self, transformer: int, moment: Moment, parallel_config: Any) -> None:
        """A transformer, given by its id, is about to run."""
        self._transformer, self._parallel = transformer, parallel_config
        self._unwaited.clear()  # an interrupt may have spared the forward before its `leave`
        step, steps = moment.step, moment.num_steps
        self._last = step is None or steps is None or step + 1 >= steps
        if step is None:  # no denoising loop: what was seen before has nothing to do with this
            self._forget_decisions()

    def leave(self, output: Any) -> None:
        """The forward is over: see whether the one before was finite, where nobody looked.

        In the last step this one is waited for, too.

        Args:
            output: of the transformer; None after an exception.
        """
        self._look_back()
        layers, self._unwaited = self._unwaited, []
        if layers and output is not None:
            self._late.ask(sample_of(output), layers)
        if self._last:
            self._look_back()

    def _look_back(self) -> None:
        layers = self._late.read()
        if not layers or self._waits:  # told already; one forward more ran meanwhile
            return
        self._waits = True
        warnings.warn(
            f"quality guard: a transformer's output was not finite, after sparse attention in the "
            f"layers {layers[0]} to {layers[-1]}, and it was seen only then: this generation is "
            "probably lost. From now on every call is checked before it is used, so the next "
            "generation is repaired if sparse attention was the cause.",
            QualityWarning,
            stacklevel=2,
        )

    def _forget_decisions(self) -> None:
        self._known.clear()
        self._dense_from = None

    def report(self) -> GuardReport:
        """Sum up the last generation."""
        self._look_back()
        whole = [(key.layer, key.branch) for key, known in self._known.items() if known.whole]
        first = None if self._dense_from is None else self._dense_from[0]
        return GuardReport(
            self.options, tuple(self.records), tuple(sorted(dict.fromkeys(whole))), first
        )

    # ---------------------------------------------------------------------- one attention call

    def dense_reason(self, call: AttentionCall, sample: int) -> str | None:
        """Return why this call must be dense by what was found before, or None."""
        if self._dense_from is not None:
            return "quality guard: the rest of the generation"
        known = self._known.get(self._key(call, sample))
        return "quality guard: the layer was over the budget" if known and known.whole else None

    def check(
        self,
        qkv: tuple[Tensor, Tensor, Tensor],
        output: Tensor,
        call: AttentionCall,
        sample: int,
        scale: float | None,
        dense: Dense,
    ) -> tuple[Tensor, float]:
        """Judge the output of a sparse call, and repair what is too wrong.

        Args:
            qkv: query, key and value ``[B, N, H, D]``, rows as ``call.layout`` says, the video
                tokens in any order.
            output: ``[B, N, H, D]``, of the sparse call.
            call: which call this is.
            sample: of the batch, where samples run one by one.
            scale: of the logits; None for ``D ** -0.5``.
            dense: what repairs heads.

        Returns:
            The output, repaired, and the share of the heads that were computed densely.
        """
        rows = self.rows(call, sample, output.device)
        sums = None if rows is None else probe_sums(*qkv, output, rows, scale)
        heads, share = self.judge((output,), sums, call, sample)
        return repaired(output, heads, lambda of: dense(*(x[:, :, of] for x in qkv))), share

    def rows(self, call: AttentionCall, sample: int, device: torch.device) -> Tensor | None:
        """Return in which rows a sparse call that is about to run, or has just run, is probed.

        Args:
            call: which call, not judged yet.
            sample: of the batch, where samples run one by one.
            device: of the call.

        Returns:
            int64 ``[R]`` of the rows that ``call.layout`` names, ascending; None if not probed.
        """
        known = self._known.get(self._key(call, sample))
        earlier = 0 if known is None else known.calls
        if not self.options.probes(call.layer, earlier, seldom=is_short(call.layout, device)):
            return None
        return probe_rows(call.layout, self.options.rows, earlier, device)

    def judge(
        self, outputs: Sequence[Tensor], sums: Tensor | None, call: AttentionCall, sample: int
    ) -> tuple[list[int], float]:
        """Decide what to do about a sparse call that has run; all ranks decide alike.

        Args:
            outputs: ``[B, N, H, D]`` each, of the call, as far as this rank has it.
            sums: of the call's `rows`, see `probe_sums`, as far as this rank has them; None if it
                is not probed.
            call: which call this is.
            sample: of the batch, where samples run one by one.

        Returns:
            Which of this rank's heads are to be computed densely, and the share of all ranks'
            heads that are.
        """
        known = self._known.setdefault(self._key(call, sample), _Known())
        known.calls += 1
        waits = known.dense or self._waits or not is_short(call.layout, outputs[0].device)
        if sums is None and not waits:
            self._unwaited.append(call.layer)
            return [], 0.0
        first, *others = (output.sum(dtype=torch.float32) for output in outputs)
        total = sum(others, first)
        errors, finite = self._read(sums, total)
        not_finite = () if finite else self._not_finite_heads(outputs)
        count = outputs[0].shape[2]
        share, shares = compat.ulysses_share(self._parallel)
        tripped, repair = self._decide(known, errors, not_finite, count * shares)
        if errors or not_finite or repair:
            dense = tuple(sorted(repair))
            where = call.step, call.layer, call.branch
            self.records.append(GuardRecord(*where, errors, not_finite, tripped, dense))
        if tripped or not_finite:
            self._tell(self.records[-1])
            if self.options.action == "step" and tripped:
                self._dense_from = (call.step,)
        own = [head - share * count for head in sorted(repair) if head // count == share]
        return own, len(repair) / (count * shares)

    def check_finite(
        self, output: Output, call: AttentionCall, again: Callable[[], Output]
    ) -> Output:
        """Return the output of a call, or what ``again`` gives if it is not finite.

        For attention that is not meant to be near dense, such as a resolution method's windows.
        """
        attended, _ = output
        if is_finite(attended):
            return output
        heads = self._not_finite_heads((attended,))
        self.records.append(
            GuardRecord(call.step, call.layer, call.branch, (), heads, heads, heads)
        )
        self._tell(self.records[-1])
        return again()

    def _key(self, call: AttentionCall, sample: int) -> _Where:
        # Not the layout as a whole: the text may move behind the video between asking and checking.
        grid, text = call.layout.grid, call.layout.text_length
        return _Where(self._transformer, call.branch, sample, call.layer, grid, text)

    def _decide(
        self,
        known: _Known,
        errors: tuple[float, ...],
        not_finite: tuple[int, ...],
        heads: int,
    ) -> tuple[tuple[int, ...], frozenset[int]]:
        """Return the heads that went over the budget just now, and those to compute densely."""
        options = self.options
        over = {head for head, error in enumerate(errors) if error > options.max_error}
        well = {h for h, error in enumerate(errors) if error < options.release * options.max_error}
        tripped = tuple(sorted((over | {*not_finite}) - known.dense))
        if options.action == "report":
            return tripped, frozenset(not_finite)
        known.dense = (known.dense | over | {*not_finite}) - (well - {*not_finite})
        if known.dense and options.action == "layer":
            known.dense = frozenset(range(heads))
        known.whole = 2 * len(known.dense) > heads
        return tripped, known.dense

    # ------------------------------------------------------------------------- what was found

    def _read(self, sums: Tensor | None, total: Tensor) -> tuple[tuple[float, ...], bool]:
        """Return the error of each head, of all ranks, and whether the outputs may be finite.

        Their ``total`` is not finite if one value isn't; the reverse is looked into where it
        happens.
        """
        if sums is None:
            return (), math.isfinite(compat.sum_over_sequence(self._parallel, total).item())
        shared = torch.cat([self._by_head(sums).flatten(), total[None]])
        values = compat.sum_over_sequence(self._parallel, shared).cpu()
        wrong, size = values[:-1].view(2, sums.shape[1], -1)
        errors = (wrong / size).sqrt().where(wrong > 0, wrong)  # 0 / 0 is no error, NaN stays
        errors = errors.where(errors.isfinite(), math.inf).amax(0)
        return tuple(errors.tolist()), math.isfinite(values[-1].item())

    def _not_finite_heads(self, outputs: Sequence[Tensor]) -> tuple[int, ...]:
        found = torch.stack([(~output.isfinite()).any(3).any(1).sum(0) for output in outputs])
        by_head = self._by_head(found.sum(0).float())
        shared = compat.sum_over_sequence(self._parallel, by_head)
        return tuple(shared.nonzero().flatten().tolist())

    def _by_head(self, values: Tensor) -> Tensor:
        """Return ``[..., H]`` as all ranks' heads, those of other ranks 0."""
        rank, degree = compat.ulysses_share(self._parallel)
        if degree == 1:
            return values
        shared = values.new_zeros(*values.shape[:-1], degree, values.shape[-1])
        shared[..., rank, :] = values
        return shared.flatten(-2)

    def _tell(self, record: GuardRecord) -> None:
        """Warn of the first trip of a generation."""
        if self._warned:
            return
        self._warned = True
        what = []
        over = [head for head in record.tripped if head not in record.not_finite]
        if over:
            what.append(
                f"{len(over)} heads over max_error={self.options.max_error:g}, the worst at "
                f"{record.worst:.3g}"
            )
        if record.not_finite:
            what.append(f"{len(record.not_finite)} heads not finite")
        did = {
            "head": "These heads are computed densely from here on",
            "layer": "The layer is dense from here on",
            "step": "All layers are dense from here on",
            "report": "Nothing but what is not finite is repaired (action='report')",
        }[self.options.action]
        warnings.warn(
            f"quality guard: sparse attention is too far from dense at step {record.step}, layer "
            f"{record.layer}, branch {record.branch!r}: {' and '.join(what)}. {did}; others may "
            "follow, see acceleration_report(pipe). A higher density, more dense_steps or "
            "dense_layers avoid it; guard=False switches the guard off.",
            QualityWarning,
            stacklevel=2,
        )


def make_guard(choice: GuardChoice, attends: bool) -> Guard | None:
    """Return the guard of an acceleration; None for none.

    Args:
        choice: as given to `accelerate_pipeline`.
        attends: whether attention runs through the acceleration.

    Raises:
        OptionError: if a guard was asked for that would have nothing to watch.
    """
    options = settle_guard(choice)
    if options is not None and attends:
        return Guard(options)
    if options is not None and choice is not None:
        raise OptionError(
            f"guard={choice!r} watches sparse attention, and no attention method is chosen: add "
            "one to method=[...] or leave it out."
        )
    return None


def is_short(layout: TokenLayout, device: torch.device) -> bool:
    """Return whether waiting for a call costs more than the call is worth."""
    return device.type == "cuda" and layout.num_tokens < SHORT


def is_finite(output: Tensor) -> bool:
    """Return whether a call's output is finite; waits for the device."""
    return math.isfinite(output.sum(dtype=torch.float32).item()) or bool(output.isfinite().all())


def probe_rows(layout: TokenLayout, count: int, earlier: int, device: torch.device) -> Tensor:
    """Return the rows of a probe, int64, ascending: spread evenly over the video tokens.

    Args:
        layout: the tokens.
        count: how many; fewer if there are not so many video tokens.
        earlier: how many sparse calls this layer had before.
        device: of the result.
    """
    video = layout.video_length
    count = min(count, video)
    first = layout.text_length if layout.text_first else 0
    space = video / count
    shift = int(earlier * SHIFT % 1 * space)
    begin = (first + shift) * count
    return torch.arange(begin, begin + count * video, video, device=device) // count


def probe_sums(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, rows: Tensor, scale: float | None
) -> Tensor:
    """Return the two sums of squares of `probe_error`, float32 ``[2, B, H]``: error and size.

    Dense attention is torch's, in the tensors' own dtype.
    """
    q, k, v = (x.transpose(1, 2) for x in (query[:, rows], key, value))
    dense = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return sums_of_squares(output[:, rows], dense.transpose(1, 2))


def sums_of_squares(output: Tensor, dense: Tensor) -> Tensor:
    """Return |output - dense|^2 and |dense|^2 of ``[B, R, H, D]`` as float32 ``[2, B, H]``."""
    dense = dense.float()
    both = output - dense, dense
    return torch.stack([x.square().sum((1, 3), dtype=torch.float32) for x in both])


def repaired(output: Tensor, heads: Sequence[int], dense: Callable[[Heads], Tensor]) -> Tensor:
    """Return an output ``[B, N, H, D]`` with some heads replaced.

    Args:
        output: what to repair.
        heads: which heads, ascending.
        dense: ``dense(heads)``: dense attention of these heads, ``[B, N, their number, D]``.
    """
    if not heads:
        return output
    if len(heads) == output.shape[2]:
        return dense(slice(None))
    index = torch.tensor(heads, device=output.device)
    return output.index_copy(2, index, dense(index).to(output.dtype))
