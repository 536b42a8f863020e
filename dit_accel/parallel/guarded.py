"""The quality guard in a ring: probed rows ride along, and what is too wrong goes around again."""

from __future__ import annotations

from torch import Tensor

from dit_accel.guard.engine import Guard, Heads, repaired, sums_of_squares
from dit_accel.parallel.ring import RingCall
from dit_accel.parallel.split import Streams
from dit_accel.plan import BlockSparsePlan, JointPlan


def guarded(
    guard: Guard,
    ring: RingCall,
    plan: BlockSparsePlan | JointPlan,
    q: Streams,
    k: Streams,
    v: Streams,
    sample: int,
) -> tuple[Streams, float]:
    """Attend by a sparse plan in a ring, and repair what is too wrong.

    The rows probed are those that one rank alone would probe, each by the part that holds it. Text
    queries attend densely anyway, so only the image stream is repaired.

    Args:
        guard: that judges.
        ring: the call.
        plan: for the whole sequence.
        q: this part's streams; ``k`` and ``v`` likewise.
        sample: of the batch, where samples run one by one.

    Returns:
        The output of this part's queries, padding included, and the share of all heads that were
        computed densely.
    """
    split, part = ring.split, ring.split.group.ring.rank
    places = guard.rows(ring.call, sample, q[0].device)
    rows, held = (None, None) if places is None else split.shares.rows(part, places)
    image, text, dense = ring.attend(plan, q, k, v, rows)
    sums = None
    if held is not None and dense is not None:
        here = held[:, None, None]
        sums = sums_of_squares(image[:, rows].where(here, 0), dense.where(here, 0))

    def again(heads: Heads) -> Tensor:
        return ring.attend_densely(q, k, v, heads)

    outputs = [image[:, : split.shares.count(part)]]
    if text is not None:
        outputs.append(text[:, : split.part_text_rows])
    heads, share = guard.judge(outputs, sums, ring.call, sample)
    return (repaired(image, heads, again), text), share
