"""Whether a method's kernel computes what its definition says, on the sizes that are measured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit_accel.call import AttentionCall, TokenLayout
from dit_accel.errors import DensityUnreachableError
from dit_accel.grid import Grid, TokenOrder
from dit_accel.kernels.joint_reference import LEVELS, first_order_moment, pool
from dit_accel.kernels.reference import masked_attention
from dit_accel.kernels.statistics import block_statistics
from dit_accel.methods.base import AttentionMethod, StaticMethod
from dit_accel.methods.selecting import SelectingMethod, reordered
from dit_accel.operators import choose_operator, make_operators
from dit_accel.plan import BlockSparsePlan, DensePlan, JointPlan

QKV = tuple[Tensor, Tensor, Tensor]
SMALL_DENSITIES = 0.4, 0.8
"""The first is one at which PISA has its first-order term; not every method reaches it."""


def check_whole(method: AttentionMethod, grid: Grid, head_size: int, device: str) -> dict[str, Any]:
    """Compare one small call, choice included, with the method's own float64 reference.

    The reference gets the choice that the kernels made: a rounding error may turn a near tie. How
    much of it float64 would have chosen alike is told apart.
    """
    layout = TokenLayout(grid, 0 if isinstance(method, StaticMethod) else 77)
    try:
        density, method = SMALL_DENSITIES[0], method.at_density(SMALL_DENSITIES[0], layout)
    except DensityUnreachableError:
        density, method = SMALL_DENSITIES[1], method.at_density(SMALL_DENSITIES[1], layout)
    order = method.token_order(grid)
    index = order.permutation(layout.grid, device)
    torch.manual_seed(0)
    shape = 3, 1, layout.num_tokens, 2, head_size
    q, k, v = torch.randn(shape, device=device, dtype=torch.bfloat16).unbind()
    v = v + k
    ordered = reordered(q, index), reordered(k, index), reordered(v, index)
    plan = method.plan(AttentionCall(layout), *ordered, order)
    if isinstance(plan, DensePlan):
        return {"small_check": f"dense: {plan.reason}"}
    operator = choose_operator("auto", make_operators(), plan, q).operator
    out = reordered(operator.run(*ordered, plan, None, False)[0], torch.argsort(index))
    row: dict[str, Any] = {"small_operator": operator.name, "small_density": density}
    if isinstance(method, SelectingMethod) and isinstance(plan, JointPlan):
        where: dict[str, Any] = {"grid": grid, "text_length": layout.text_length}
        wide = q.double(), k.double(), v.double()
        chosen = method.select(*wide, **where)
        row["same_choice"] = float((chosen.to(torch.int8) == plan.levels).double().mean())
        given = {"selection": plan.levels}
        exact = method.reference(*wide, **where, **given)
        plain = method.reference(q, k, v, **where, **given)
    else:
        exact, plain = (_static_reference(method, plan, x) for x in (_wide(ordered), ordered))
        exact, plain = (reordered(x, torch.argsort(index)) for x in (exact, plain))
    return row | _verdict(out, exact, plain, "small_")


def check_blocks(
    method: AttentionMethod, plan: BlockSparsePlan | JointPlan, qkv: QKV, out: Tensor,
    order: TokenOrder,
) -> dict[str, Any]:  # fmt: skip
    """Compare a few query blocks of the last head, first and ragged last included."""
    head = slice(qkv[0].shape[2] - 1, None)
    one = tuple(x[:1, :, head] for x in qkv)
    size = plan.query_block if isinstance(plan, JointPlan) else plan.video_mask.BLOCK_SIZE[0]
    video = plan.layout.video_length
    blocks = sorted({0, video // size // 3, (video - 1) // size})
    found, exact, plain = [], [], []
    references = [_Literal(method, plan, x, order) for x in (_wide(one), one)]
    for block in blocks:
        rows = slice(block * size, min((block + 1) * size, video))
        found.append(out[:1, rows, head])
        exact.append(references[0].rows(rows, block))
        plain.append(references[1].rows(rows, block))
    return _verdict(torch.cat(found, 1), torch.cat(exact, 1), torch.cat(plain, 1), "")


class _Literal:
    """The maths of a plan for single query blocks of one head, in the dtype of the tensors."""

    def __init__(
        self, method: AttentionMethod, plan: BlockSparsePlan | JointPlan, qkv: QKV,
        order: TokenOrder,
    ) -> None:  # fmt: skip
        self.method, self.plan, self.order = method, plan, order
        self.query, self.key, self.value = qkv
        self.factor = self.added = None
        if not isinstance(plan, JointPlan):
            return
        self.levels = plan.levels[:1, -1:]
        if isinstance(method, SelectingMethod) and plan.row_factor is not None:
            rows, columns = method.block_sizes
            statistics = block_statistics(
                *qkv, query_block=rows, key_block=columns, wanted=method.wanted(plan.layout),
                backend="torch",
            )  # fmt: skip
            selection = self.levels == 1
            again = method.joint_plan(self.key, selection, statistics, plan.layout, order)
            self.factor, self.added = again.row_factor, again.added
        if plan.first_order:
            self.moment = first_order_moment(self.key, self.value, plan.key_block)

    def rows(self, rows: slice, block: int) -> Tensor:
        """Outputs ``[1, rows, 1, D]`` of query block number ``block``."""
        query, plan = self.query[:, rows], self.plan
        if isinstance(plan, BlockSparsePlan):
            index = self.order.permutation(plan.layout.grid, query.device)
            allowed = self.method.allowed(plan.layout, query.device)
            mask = allowed(index[rows, None], index[None])
            return masked_attention(query, self.key, self.value, mask[None, None])[0]
        level = self.levels[0, 0, block]
        keys, values, counts, kinds = [], [], [], []
        for kind in (*LEVELS, 0) if plan.remainder else LEVELS:
            k, count, of_block = pool(self.key, plan.key_block, kind or plan.key_block)
            v, _, _ = pool(self.value, plan.key_block, kind or plan.key_block)
            chosen = level[of_block] == kind
            keys.append(k[0, chosen, 0])
            values.append(v[0, chosen, 0])
            counts.append(count[chosen])
            kinds.append(torch.full_like(counts[-1], kind))
        scale = query.shape[-1] ** -0.5
        bias = torch.cat(counts).to(query.dtype).log()
        weights = (query[0, :, 0] @ torch.cat(keys).mT * scale + bias).softmax(-1)
        out = weights @ torch.cat(values)
        if plan.first_order:
            left = weights[:, torch.cat(kinds) == 0].sum(-1, keepdim=True)
            slope = query[0, :, 0] @ self.moment[0, 0] * scale
            out = out + left / plan.layout.video_length * slope
        if self.factor is not None and self.added is not None:
            out = out * self.factor[0, 0, block].to(out.dtype)
            out = out + self.added[0, 0, block].to(out.dtype)
        return out[None, :, None]


def _static_reference(method: AttentionMethod, plan: Any, qkv: tuple[Tensor, ...]) -> Tensor:
    """All rows of a static method's plan, in its order, per head."""
    size = plan.query_block if isinstance(plan, JointPlan) else plan.video_mask.BLOCK_SIZE[0]
    heads = []
    for head in range(qkv[0].shape[2]):
        one = tuple(x[:, :, head : head + 1] for x in qkv)
        literal = _Literal(method, plan, one, plan.order)  # type: ignore[arg-type]
        video = plan.layout.video_length
        blocks = range(-(-video // size))
        parts = [literal.rows(slice(b * size, min((b + 1) * size, video)), b) for b in blocks]
        heads.append(torch.cat(parts, 1))
    return torch.cat(heads, 2)


def _wide(tensors: tuple[Tensor, ...]) -> QKV:
    q, k, v = (x.double() for x in tensors)
    return q, k, v


def _verdict(out: Tensor, exact: Tensor, plain: Tensor, prefix: str) -> dict[str, Any]:
    """Errors relative to float64; right if at most twice that of the plain maths in this dtype."""
    error, allowed = (float((x.double() - exact).norm() / exact.norm()) for x in (out, plain))
    rounding = torch.finfo(out.dtype).eps / 4
    return {
        f"{prefix}relative_error": float(f"{error:.2e}"),
        f"{prefix}plain_relative_error": float(f"{allowed:.2e}"),
        f"{prefix}correct": error <= 2 * allowed + rounding,
    }
