"""What the tests of PSA, Rectified SpaAttn and PISA share."""

import math

import torch

from dit_accel.call import AttentionCall, TokenLayout
from dit_accel.kernels.joint_gather import gathered_joint_attention

LAYOUTS = [
    TokenLayout((5, 7, 9)),
    TokenLayout((1, 13, 21), 7),
    TokenLayout((13, 4, 6), 1),
    TokenLayout((1, 1, 100)),
]
"""Ragged ones; no text, and an odd number of text tokens."""


def random_inputs(layout, *, batch=2, heads=2, size=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = batch, layout.num_tokens, heads, size
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)
    ]


def dense(query, key, value):
    scores = torch.einsum("bnhd,bmhd->bhnm", query, key) / math.sqrt(query.shape[-1])
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), value)


def in_order(method, layout, tensors):
    """The tensors in the method's order, and how to undo it."""
    index = method.token_order(layout.grid).permutation(layout.grid)
    index = torch.cat([index, torch.arange(len(index), layout.num_tokens)])
    return [x[:, index] for x in tensors], torch.argsort(index)


def make_plan(method, layout, query, key, value):
    """The plan of one call, as a runtime asks for it."""
    (q, k, v), _ = in_order(method, layout, (query, key, value))
    return method.plan(AttentionCall(layout), q, k, v, method.token_order(layout.grid))


def run_plan(method, layout, query, key, value):
    """What an operator makes of the method's plan, in raster order."""
    (q, k, v), back = in_order(method, layout, (query, key, value))
    plan = method.plan(AttentionCall(layout), q, k, v, method.token_order(layout.grid))
    out, _ = gathered_joint_attention(
        q,
        k,
        v,
        plan.levels,
        query_block=plan.query_block,
        key_block=plan.key_block,
        text_length=layout.text_length,
        statistics=plan.statistics,
        remainder=plan.remainder,
        first_order=plan.first_order,
        row_factor=plan.row_factor,
        added=plan.added,
    )
    return out[:, back]


def blocks_of(tokens, layout, size):
    """The video tokens ``[V, D]`` of one head as a list of blocks."""
    return list(tokens[: layout.video_length].split(size))
