"""What each method's attention costs as a whole: choosing, pooling and attending.

    python benchmarks/methods.py --output benchmarks/results/methods-h200.json
    python benchmarks/methods.py --quick                   # one size and density
    python benchmarks/methods.py --sweep                   # tile shapes of the joint kernel
    python benchmarks/methods.py --device cpu --tokens 1560 # a trial: its times mean nothing

Beside it, in the same run: cuDNN dense, and FlexAttention and flash-attn-4 (where installed) with
lists of 128 x 128 blocks at the same density, chosen at random and for free. Random inputs: a
method's time depends on how many blocks it keeps, which `density` fixes, and not on which. Tokens
are in the method's order already, because pipelines reorder them once per forward.

Every method is checked before it is timed, against its float64 reference at a small size and
against the literal maths of a few query blocks at the size that is timed. A row that fails says so
and the run goes on; the output is written after each. A method that can't be as sparse as asked is
measured once a size at the least density that it "reaches".
"""

from __future__ import annotations

import argparse
import math
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from checking import check_blocks, check_whole
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from dit_accel.bench.cases import make_case
from dit_accel.bench.contenders import GRIDS, cudnn_dense
from dit_accel.bench.measuring import manifest, median_ms, write_json
from dit_accel.call import AttentionCall, TokenLayout
from dit_accel.errors import DensityUnreachableError, DitAccelError
from dit_accel.kernels.importance import sampled_importance
from dit_accel.kernels.statistics import block_statistics
from dit_accel.kernels.tuning import KernelConfig
from dit_accel.methods.base import AttentionMethod
from dit_accel.methods.psa import PSA
from dit_accel.methods.selecting import SelectingMethod
from dit_accel.operators import choose_operator, joint_options, make_operators
from dit_accel.plan import AttentionPlan, BlockSparsePlan, DensePlan, JointPlan
from dit_accel.registry import resolve_method

LARGE, TOY = (75_600, 32_760, 118_800), 1_560
SMALL_GRID = (9, 20, 26)
METHODS: dict[str, dict[str, Any]] = {
    "radial": {},
    "radial + remainder": {"remainder": "pooled"},
    "gna": {},
    "gna + remainder": {"remainder": "pooled"},
    "psa": {},
    "psa, 32 samples": {"samples_per_block": 32},
    "rectified": {},
    "rectified, not gain-aware": {"gain_aware": False},
    "pisa": {},
    "pisa, zeroth order": {"terms": 0},
}
COLUMNS = (
    "tokens", "density", "achieved_density", "cudnn_dense_ms", "statistics_ms", "importance_ms",
    "selection_ms", "attention_ms", "total_ms", "speedup", "choosing_of_dense", "flex_ms",
    "flash_attn_4_ms",
)  # fmt: skip
Row = dict[str, Any]


def make_method(name: str, small: bool = False) -> AttentionMethod:
    """Return a method with the options of `METHODS`, with small blocks if the size is small."""
    method_name, options = name.split()[0].rstrip(","), dict(METHODS[name])
    if small:
        blocks = ("query_block", "key_block") if method_name == "psa" else ("block_size",)
        options |= dict.fromkeys(blocks, 32)
    return resolve_method(method_name, **options)


def measure_method(
    method: AttentionMethod, qkv: tuple[Tensor, Tensor, Tensor], layout: TokenLayout
) -> Row:
    """Check a method at this size, then time its parts and the whole."""
    order, call = method.token_order(layout.grid), AttentionCall(layout)
    static = not isinstance(method, SelectingMethod)
    # A static method's plan is made once for all calls.
    make: Callable[[], AttentionPlan] = partial(method.plan, call, *qkv, order)
    plan = make()
    if isinstance(plan, DensePlan):
        return {"dense": plan.reason}
    operator = choose_operator("auto", make_operators(), plan, qkv[0]).operator
    row: Row = {"achieved_density": round(plan.block_density, 4), "operator": operator.name}

    def attend(plan: AttentionPlan = plan) -> Tensor:
        return operator.run(*qkv, plan, None, False)[0]

    row |= check_blocks(method, plan, qkv, attend(), order)
    if isinstance(method, SelectingMethod):
        rows, columns = method.block_sizes
        blocks: dict[str, Any] = {"query_block": rows, "key_block": columns}
        wanted = {"wanted": method.wanted(layout), "pooled_levels": method.pooled_levels}
        collect = partial(block_statistics, *qkv, **blocks, **wanted)
        row["statistics_ms"] = median_ms(collect)
        statistics = collect()
        choose = partial(method.choose, *qkv[:2], statistics, layout, order)
        row["selection_ms"] = median_ms(choose)
        if isinstance(method, PSA):
            samples = {"samples_per_block": method.samples_per_block}
            weigh = partial(sampled_importance, *qkv[:2], **blocks, **samples)
            row["importance_ms"] = median_ms(weigh)
            row["selection_ms"] -= row["importance_ms"]
        finish = partial(method.joint_plan, qkv[1], choose(), statistics, layout, order)
        row["finish_plan_ms"] = median_ms(finish)
    elif not isinstance(plan, BlockSparsePlan):
        size = {"query_block": plan.query_block, "key_block": plan.key_block}
        row["statistics_ms"] = median_ms(partial(block_statistics, *qkv, **size))
    parts = [row[name] for name in row if name.endswith("_ms")]
    row["choosing_ms"] = sum(parts)
    if static:
        row["total_ms"] = median_ms(attend)  # statistics of a remainder included
        row["attention_ms"] = row["total_ms"] - row["choosing_ms"]
    else:
        row["attention_ms"] = median_ms(attend)
        row["total_ms"] = median_ms(lambda: attend(make()))
    return row


def measure_peers(
    tokens: int, heads: int, head_size: int, density: float, device: str, flex: Any
) -> Row:
    """FlexAttention and flash-attn-4 over random lists of the same density."""
    case = make_case(tokens, heads, head_size, density, device)
    mask = case.block_mask()
    heads_first = [x.transpose(1, 2) for x in case.qkv]
    peers = guarded(
        "flex", lambda: {"flex_ms": median_ms(lambda: flex(*heads_first, block_mask=mask))}
    )
    layout = TokenLayout((1, 1, tokens))
    plan = BlockSparsePlan(layout, resolve_method("dense").token_order(layout.grid), mask)
    fa4 = make_operators()["flash-attn-4"]
    if fa4.why_not(plan, case.qkv[0]) is None:
        run = partial(fa4.run, *case.qkv, plan, None, False)
        peers |= guarded("flash_attn_4", lambda: {"flash_attn_4_ms": median_ms(run)})
    return peers


def guarded(name: str, measure: Callable[[], Row]) -> Row:
    """Return what ``measure`` returns, or its exception: one failure must not cost the run."""
    try:
        return measure()
    except DitAccelError as error:
        return {f"{name}_refused": str(error)}
    except Exception as error:
        traceback.print_exc()
        return {f"{name}_failed": f"{type(error).__name__}: {str(error)[:500]}"}


def measure_size(
    args: argparse.Namespace, tokens: int, flex: Any, result: Row, small_checks: dict[str, Row]
) -> None:
    """Add the rows of one size to ``result``."""
    layout = TokenLayout(GRIDS[tokens])
    size = {"heads": args.heads, "head_size": args.head_size, "device": args.device}
    qkv = make_case(tokens, density=0.1, **size).qkv
    # Values that go with keys, so that the first-order term is more than noise.
    qkv = (qkv[0], qkv[1], qkv[2] + qkv[1])
    dense = guarded("cudnn_dense", lambda: {"cudnn_dense_ms": median_ms(dense_run(qkv))})
    cpu = args.device == "cpu"
    sparsest: set[str] = set()  # measured at the least density that they reach, instead
    for density in args.density:
        peers = measure_peers(tokens, density=density, flex=flex, **size)
        for name in args.methods:
            start = time.perf_counter()
            row: Row = {"tokens": tokens, "density": density, "method": name, **dense, **peers}
            if name not in small_checks:
                where = SMALL_GRID, args.head_size, args.device
                check = partial(check_whole, make_method(name, cpu), *where)
                small_checks[name] = guarded("small_check", check)
            row |= small_checks[name]

            def measure(name: str = name, density: float = density) -> Row:
                method = make_method(name, cpu)
                try:
                    return measure_method(method.at_density(density, layout), qkv, layout)
                except DensityUnreachableError as error:
                    if name in sparsest:
                        return {"reaches": error.least}
                    sparsest.add(name)
                    method = method.at_density(error.least, layout)
                    return {"reaches": error.least, **measure_method(method, qkv, layout)}

            row |= guarded("method", measure)
            if "total_ms" in row and "cudnn_dense_ms" in row:
                row["speedup"] = row["cudnn_dense_ms"] / row["total_ms"]
                row["choosing_of_dense"] = row["choosing_ms"] / row["cudnn_dense_ms"]
            row["spent_s"] = time.perf_counter() - start
            result["rows"].append(
                {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
            )
            print(result["rows"][-1], flush=True)
            write_json(result, args.output)


def sweep(args: argparse.Namespace, result: Row) -> None:
    """Attention alone with every tile shape of the joint kernel that may pay, fastest first."""
    from dit_accel.kernels.joint import joint_sparse_attention

    tokens = args.tokens[0]
    layout = TokenLayout(GRIDS[tokens])
    qkv = make_case(tokens, args.heads, args.head_size, 0.1, args.device).qkv
    for name in (name for name in ("pisa", "psa", "rectified") if name in args.methods):
        rows: list[Row] = []
        method = make_method(name).at_density(args.density[0], layout)
        order = method.token_order(layout.grid)
        plan = method.plan(AttentionCall(layout), *qkv, order)
        if not isinstance(plan, JointPlan):
            continue
        options = joint_options(plan, *qkv, None)
        block_m = plan.query_block
        for block_n, warps, stages in product((64, 32), (4, 8), (2, 3, 4)):
            if warps == 8 and block_m < 128:
                continue
            for use_tma in (True, False):
                config = KernelConfig(block_m, block_n, warps, stages, use_tma)
                run = partial(joint_sparse_attention, *qkv, **options, config=config)
                row = {"tokens": tokens, "method": name, **asdict(config)}
                row |= guarded("config", lambda run=run: {"attention_ms": median_ms(run)})
                rows.append(row)
                print(row, flush=True)
        result["rows"] += sorted(rows, key=lambda row: row.get("attention_ms", math.inf))
        write_json(result, args.output)


def dense_run(qkv: tuple[Tensor, Tensor, Tensor]) -> Callable[[], Tensor]:
    """Dense attention by cuDNN; by torch's choice on a CPU."""
    if qkv[0].is_cuda:
        return partial(cudnn_dense, *qkv)
    heads_first = [x.transpose(1, 2) for x in qkv]
    return partial(torch.nn.functional.scaled_dot_product_attention, *heads_first)


def table(rows: list[Row]) -> str:
    """Lay the rows out for a terminal."""
    lines = [("method", *(name.removesuffix("_ms") for name in COLUMNS), "correct")]
    for row in rows:
        cells = [row.get(name, "") for name in COLUMNS]
        cells = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells]
        right = row.get("correct"), row.get("small_correct")
        trouble = next((k for k in row if k.endswith(("_failed", "_refused"))), "")
        verdict = trouble or ("yes" if right == (True, True) else f"NO {right}")
        if "reaches" in row and "total_ms" not in row:
            verdict = f"reaches {row['reaches']}"
        lines.append((row["method"], *cells, verdict))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=128)
    sizes = (*LARGE, TOY)
    parser.add_argument("--tokens", type=int, nargs="+", default=LARGE, choices=sizes)
    parser.add_argument("--density", type=float, nargs="+", default=[0.15, 0.25, 0.1])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--quick", action="store_true", help="75,600 tokens and density .15 alone")
    parser.add_argument("--sweep", action="store_true", help="tile shapes, at the same")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--commit")
    args = parser.parse_args()
    if args.quick or args.sweep:
        args.tokens, args.density = [75_600], [0.15]

    result: Row = {"manifest": manifest(args.commit), "dense_backend": "cuDNN SDPA", "rows": []}
    fa4 = make_operators()["flash-attn-4"].unavailable
    result["manifest"]["flash_attn_4"] = f"not measured: {fa4}" if fa4 else "measured"
    result |= {"heads": args.heads, "head_size": args.head_size, "dtype": "bfloat16"}
    result["small_check_grid"] = SMALL_GRID
    # One compiled function: it compiles anew for each number of tokens, not for each density.
    flex = flex_attention if args.device == "cpu" else torch.compile(flex_attention, dynamic=False)
    if args.sweep:
        with torch.no_grad():
            sweep(args, result)
        return
    small_checks: dict[str, Row] = {}
    start = time.perf_counter()
    with torch.no_grad():
        for tokens in args.tokens:
            failed = guarded(
                "size", lambda t=tokens: measure_size(args, t, flex, result, small_checks) or {}
            )
            if failed:
                result["rows"].append({"tokens": tokens, "method": "all", **failed})
    result["manifest"]["spent_s"] = round(time.perf_counter() - start, 1)
    write_json(result, args.output)
    print(table(result["rows"]))


if __name__ == "__main__":
    main()
