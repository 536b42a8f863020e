"""What each method's attention costs as a whole: choosing, pooling and attending, on a GPU.

    python benchmarks/methods.py --output benchmarks/results/methods-h200.json

Beside it, in the same run: cuDNN dense, FlexAttention and (where installed) flash-attn-4 with lists
of 128 x 128 blocks at the same density, chosen at random and for free. Random inputs: a method's
time depends on how many blocks it keeps, which `density` fixes, and not on which.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kernels import cudnn_dense, make_case
from measuring import manifest, median_ms, write_json
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from dit_accel.call import AttentionCall, TokenLayout
from dit_accel.errors import DitAccelError
from dit_accel.operators import choose_operator, make_operators
from dit_accel.plan import BlockSparsePlan
from dit_accel.registry import resolve_method

GRIDS = {32_760: (21, 30, 52), 75_600: (21, 45, 80), 118_800: (33, 45, 80)}
METHODS: dict[str, dict[str, Any]] = {
    "radial": {},
    "radial + remainder": {"remainder": "pooled"},
    "gna": {},
    "gna + remainder": {"remainder": "pooled"},
    "psa": {},
    "rectified": {},
    "pisa": {},
    "pisa, zeroth order": {"terms": 0},
}


def measure_method(
    name: str, qkv: tuple[Tensor, ...], layout: TokenLayout, density: float
) -> dict[str, Any]:
    """Time planning and attending of one method; a static method's plan is made once."""
    method = resolve_method(name.split()[0].rstrip(","), **METHODS[name])
    try:
        method = method.at_density(density, layout)
    except DitAccelError as error:
        return {"refused": str(error)}
    order, call = method.token_order(layout.grid), AttentionCall(layout)
    make = partial(method.plan, call, *qkv, order)
    plan = make()
    operator = choose_operator("triton", make_operators(), plan, qkv[0]).operator
    static = isinstance(plan, BlockSparsePlan) or plan.statistics is None
    plan_ms = 0.0 if static else median_ms(make)
    run_ms = median_ms(lambda: operator.run(*qkv, plan, None, False))
    return {
        "achieved_density": round(plan.density, 4),
        "choose_ms": round(plan_ms, 3),
        "attend_ms": round(run_ms, 3),
        "total_ms": round(plan_ms + run_ms, 3),
    }


def measure_peers(tokens: int, heads: int, head_size: int, density: float) -> dict[str, float]:
    """FlexAttention and flash-attn-4 over random lists of the same density."""
    case = make_case(tokens, heads, head_size, density)
    mask = case.block_mask()
    compiled = torch.compile(flex_attention, dynamic=False)
    heads_first = [x.transpose(1, 2) for x in case.qkv]
    peers = {"flex_ms": round(median_ms(lambda: compiled(*heads_first, block_mask=mask)), 3)}
    layout = TokenLayout((1, 1, tokens))
    plan = BlockSparsePlan(layout, resolve_method("dense").token_order(layout.grid), mask)
    fa4 = make_operators()["flash-attn-4"]
    if fa4.why_not(plan, case.qkv[0]) is None:
        ms = median_ms(lambda: fa4.run(*case.qkv, plan, None, False))
        peers["flash_attn_4_ms"] = round(ms, 3)
    return peers


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(GRIDS), choices=GRIDS)
    parser.add_argument("--density", type=float, nargs="+", default=[0.25, 0.15, 0.1])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--commit")
    args = parser.parse_args()

    rows = []
    for tokens in args.tokens:
        layout = TokenLayout(GRIDS[tokens])
        qkv = make_case(tokens, args.heads, args.head_size, 0.1).qkv
        dense_ms = median_ms(partial(cudnn_dense, *qkv))
        for density in args.density:
            peers = measure_peers(tokens, args.heads, args.head_size, density)
            for name in args.methods:
                row = {"tokens": tokens, "density": density, "method": name}
                row |= {"cudnn_dense_ms": round(dense_ms, 3), **peers}
                row |= measure_method(name, qkv, layout, density)
                if "total_ms" in row:
                    row["speedup"] = round(dense_ms / row["total_ms"], 2)
                    row["choose_share_of_dense"] = round(row["choose_ms"] / dense_ms, 4)
                rows.append(row)
                print(row, flush=True)
    result = {"manifest": manifest(args.commit), "dense_backend": "cuDNN SDPA", "rows": rows}
    result |= {"heads": args.heads, "head_size": args.head_size, "dtype": "bfloat16"}
    write_json(result, args.output)


if __name__ == "__main__":
    main()
