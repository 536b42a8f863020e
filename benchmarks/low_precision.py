"""Attention in 8 bits: is it right, how fast is it beside bfloat16, and what does it cost.

    python benchmarks/low_precision.py --output benchmarks/results/low-precision-h200.json
    python benchmarks/low_precision.py --only kernels --configs 64,128,4,2,1 128,128,8,3,1
    timeout 300 python benchmarks/low_precision.py --only kernels --stages 3 4 5

Three parts, the first of which stops what is wrong from being timed:

* ``kernels``: at a small ragged size with masks and text the kernel must be within a fifth of the
  error of its own formula (`quantised_reference.py`); then TFLOP/s on attended pairs over random
  lists of full tiles, the rounding pass included, beside the bfloat16 kernels and cuDNN dense;
* ``activations``: the error on queries, keys and values of a trained model. PSNR is relative to the
  largest magnitude of the exact output of a call;
* ``generations``: PSNR of frames against the same method in bfloat16. The distance of bfloat16 from
  float32 stands beside it: where trajectories part, it is no larger.

``--stages`` tries the kernel for Hopper with so many buffers; give it a run of its own, because a
wrong barrier hangs. Without a GPU ``activations`` runs the formula instead of the kernel, and the
others are left out.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from dit_accel import accelerate_pipeline, acceleration_report, restore_pipeline
from dit_accel.bench.cases import Case, make_case
from dit_accel.bench.contenders import cudnn_dense
from dit_accel.bench.measuring import manifest, median_ms, write_json
from dit_accel.compat import dense_attention
from dit_accel.eval.fidelity import psnr
from dit_accel.generation import GenerationRequest, generate
from dit_accel.kernels.precision import PRECISIONS, why_no_precision
from dit_accel.kernels.quantised_reference import accuracy, key_blocks, quantised_attention
from dit_accel.kernels.reference import lists_to_mask, masked_attention
from dit_accel.kernels.tiles import tile_lists_from_dense
from dit_accel.kernels.tuning import KernelConfig
from dit_accel.models import generation_defaults, load_pipeline
from dit_accel.world.worlds import fixed_prompts

HEADS = 8
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QKV = tuple[Tensor, Tensor, Tensor]
Setting = KernelConfig | int | None


def quantised(qkv: QKV, lists: Any, precision: str, setting: Setting, **options: Any) -> Any:
    """Run the portable kernel with a tile shape, or the one for Hopper with so many buffers."""
    if isinstance(setting, int):
        from dit_accel.kernels.block_sparse_hopper_quantised import hopper_quantised_attention

        return hopper_quantised_attention(*qkv, lists, precision, stages=setting, **options)
    from dit_accel.kernels.block_sparse_quantised import quantised_block_sparse_attention

    return quantised_block_sparse_attention(*qkv, lists, precision, config=setting, **options)


def check(precision: str, head_size: int, setting: Setting) -> dict[str, Any]:
    """Compare one small call with its formula and with exact attention."""
    torch.manual_seed(0)
    video, text = 1480, 77
    kind = torch.randint(0, 3, (2, 3, 12, 12)).repeat_interleave(128, -1).repeat_interleave(128, -2)
    kind = kind[..., :video, :video]
    mask = (kind == 0) | ((kind == 1) & (torch.rand(kind.shape) < 0.5))
    lists = tile_lists_from_dense(mask.to(DEVICE), 128)
    shape = 3, 2, video + text, 3, head_size
    q, k, v = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).unbind()
    qkv = q, k + 2, v
    options: dict[str, Any] = {"text_length": text, "text_first": True, "return_lse": True}
    out, lse = quantised(qkv, lists, precision, setting, **options)
    again, _ = quantised(qkv, lists, precision, setting, **options)
    allowed = lists_to_mask(lists, text, True)
    exact, exact_lse = masked_attention(*(x.double() for x in qkv), allowed)
    blocks = key_blocks(video, text, True, 128).to(DEVICE)
    formula, _ = quantised_attention(*qkv, allowed, precision, blocks)
    error, of_formula = (accuracy(x, exact)["relative_error"] for x in (out, formula))
    seen = exact_lse.isfinite()
    lse_error = accuracy(lse[seen], exact_lse[seen])["relative_error"]
    right = error < 1.2 * of_formula + 0.005 and lse_error < 0.01 and torch.equal(out, again)
    return {
        "precision": precision, "head_size": head_size, "error": error,
        "error_of_formula": of_formula, "lse_error": lse_error,
        "repeats": torch.equal(out, again), "correct": bool(right),
    }  # fmt: skip


def timed_rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Check each precision, then time those that are right beside bfloat16."""
    shapes = [KernelConfig(*map(int, text.split(","))) for text in args.configs]
    variants: list[tuple[str, Setting]]
    variants = [(p, setting) for p in args.precisions for setting in (None, *shapes, *args.stages)]
    for head_size in args.head_size:
        right = []
        for precision, setting in variants:
            try:
                row = check(precision, head_size, setting)
            except Exception as error:  # a shape may not compile for this GPU, or not be served
                row = {"precision": precision, "head_size": head_size, "failed": repr(error)[-500:]}
            row["setting"] = setting_text(setting)
            right += [(precision, setting)] if row.get("correct") else []
            yield row
        for density in args.density:
            case = make_case(args.tokens, HEADS, head_size, density)
            yield from time_case(case, density, right)


def time_case(case: Case, density: float, variants: list[Any]) -> Iterator[dict[str, Any]]:
    """Time all on one case, one after the other."""
    from dit_accel.kernels.block_sparse import block_sparse_attention
    from dit_accel.kernels.quantise import quantise

    head_size, lists = case.qkv[0].shape[-1], case.lists()
    runs: dict[Any, Any] = {
        "cudnn dense": partial(cudnn_dense, *case.qkv),
        "bf16 triton": partial(block_sparse_attention, *case.qkv, lists),
    }
    if why_hopper(case.qkv[0]) is None:
        from dit_accel.kernels.block_sparse_hopper import hopper_block_sparse_attention

        runs["bf16 hopper"] = partial(hopper_block_sparse_attention, *case.qkv, lists)
    for precision, setting in variants:
        name = f"{precision} {setting_text(setting)}"
        runs[name] = partial(quantised, case.qkv, lists, precision, setting)
        if setting is None:
            runs[f"{precision} rounding alone"] = partial(
                quantise, *case.qkv, precision, num_video=case.tokens, text_first=False,
                key_block=128, scale=head_size**-0.5,
            )  # fmt: skip
    for name, run in runs.items():
        dense = name == "cudnn dense"
        pairs = HEADS * case.tokens**2 if dense else case.pairs()
        row = {"run": name, "tokens": case.tokens, "head_size": head_size, "density": density}
        row["ms"] = round(median_ms(run), 3)
        if "alone" not in name:
            row["tflops"] = round(4 * pairs * head_size / row["ms"] / 1e9, 1)
            row["relative_error"] = float(f"{case.sampled_error(run(), dense):.2e}")
        yield row


def why_hopper(query: Tensor) -> str | None:
    from dit_accel.kernels.backend import why_no_gluon, why_no_hopper_kernel

    return why_no_gluon() or why_no_hopper_kernel(query.device, query.dtype, query.shape[-1], 128)


def setting_text(setting: Setting) -> str:
    if isinstance(setting, KernelConfig):
        return ",".join(str(int(value)) for value in asdict(setting).values())
    return "triton" if setting is None else f"hopper, {setting} stages"


def requests(args: argparse.Namespace) -> Iterator[GenerationRequest]:
    """The model's first fixed prompts, at its own settings."""
    defaults = asdict(generation_defaults(args.model))
    defaults.pop("fps")
    world = defaults.pop("world")
    for seed, entry in enumerate(fixed_prompts(world)[: args.prompts]):
        yield GenerationRequest(prompt=entry["prompt"], seed=seed, **defaults)


def activation_rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Errors on every ``args.every``-th self-attention call of a short dense generation."""
    pipe = load_pipeline(args.model, device=DEVICE)
    captured: list[QKV] = []

    def capture(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        captured.append((query, key, value))
        return dense_attention(query, key, value, **options)

    accelerate_pipeline(pipe, "dense")
    with mock.patch("dit_accel.runtime.dense_attention", capture):
        generate(pipe, replace(next(requests(args)), steps=4))
    found: dict[str, list[dict[str, float]]] = {}
    for qkv in captured[:: args.every]:
        q, k, v = (x[:1].bfloat16() for x in qkv)
        everything = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=DEVICE)
        exact, _ = masked_attention(q.double(), k.double(), v.double(), everything)
        results = {"bf16": _bfloat16(q, k, v, everything)}
        for precision in args.precisions:
            results[precision] = _low((q, k, v), precision)
        for name, out in results.items():
            difference = (out.double() - exact).square().mean()
            level = 10 * math.log10(float(exact.abs().max() ** 2 / difference))
            against = (out.double() - results["bf16"].double()).square().mean()
            row = accuracy(out, exact) | {"psnr_db": level}
            if name != "bf16":
                row["psnr_to_bf16_db"] = 10 * math.log10(float(exact.abs().max() ** 2 / against))
            found.setdefault(name, []).append(row)
    for name, rows in found.items():
        row = {"run": name, "calls": len(rows), "tokens": q.shape[1], "head_size": q.shape[-1]}
        for key in rows[0]:
            values = [r[key] for r in rows]
            worst = max(values) if key == "relative_error" else min(values)
            row |= {key: float(np.mean(values)), f"worst_{key}": float(worst)}
        yield row


def _bfloat16(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attention as bfloat16 kernels do it: products of rounded numbers, float32 in between."""
    scores = torch.einsum("bnhd,bmhd->bhnm", query.float(), key.float()) * query.shape[-1] ** -0.5
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    out = torch.einsum("bhnm,bmhd->bnhd", weights.bfloat16().float(), value.float())
    return (out / weights.sum(-1).transpose(1, 2)[..., None]).bfloat16()


def _low(qkv: QKV, precision: str) -> Tensor:
    """The kernel over lists that hold every tile, or its formula where there is no GPU."""
    tokens = qkv[0].shape[1]
    if DEVICE == "cpu":
        blocks = key_blocks(tokens, 0, False, 128)
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
        return quantised_attention(*qkv, mask, precision, blocks)[0].bfloat16()
    every = torch.ones(tokens, tokens, dtype=torch.bool, device=DEVICE)
    return quantised(qkv, tile_lists_from_dense(every, 128), precision, None)


def generation_rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """PSNR of frames, all steps sparse, against the same method in bfloat16."""
    exact = load_pipeline(args.model, device=DEVICE, dtype=torch.float32)
    pipe = load_pipeline(args.model, device=DEVICE, dtype=torch.bfloat16)
    for request in requests(args):
        frames: dict[str, Tensor] = {}
        for name in ("float32", "bf16", *args.precisions):
            chosen = exact if name == "float32" else pipe
            precision = name if name in args.precisions else None
            accelerate_pipeline(
                chosen,
                args.method,
                density=args.generation_density,
                precision=precision,
                guard=False,
            )
            frames[name] = generate(chosen, request).frames
            report = acceleration_report(chosen)
            restore_pipeline(chosen)
            row = {"seed": request.seed, "run": name, "sparse_density": report.sparse_density}
            row["operators"] = sorted({f"{c.operator} {c.precision}" for c in report.calls})
            if name != "float32":
                row["psnr_to_float32_db"] = psnr(frames[name], frames["float32"])
            if precision:
                row["psnr_to_bf16_db"] = psnr(frames[name], frames["bf16"])
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = {"kernels": timed_rows, "activations": activation_rows, "generations": generation_rows}
    parser.add_argument("--only", nargs="+", choices=list(parts), default=list(parts))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--tokens", type=int, default=75_600)
    parser.add_argument("--head-size", type=int, nargs="+", default=[128, 64])
    parser.add_argument("--density", type=float, nargs="+", default=[0.25, 0.1])
    parser.add_argument(
        "--configs", nargs="*", default=[], help="tile shapes to try: m,n,warps,stages,tma"
    )
    parser.add_argument("--stages", type=int, nargs="*", default=[], help="buffers, for Hopper")
    parser.add_argument("--model", default="tiny-wan")
    parser.add_argument("--method", default="gna")
    parser.add_argument("--generation-density", type=float, default=0.5)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--every", type=int, default=3, help="use every so many-th call")
    parser.add_argument("--commit", help="commit to record; asked of git by default")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    result: dict[str, Any] = {"manifest": manifest(args.commit)}
    for part in args.only:
        reason = why_no_precision("int8", torch.device(DEVICE), torch.bfloat16, 128, 128)
        if reason and part != "activations":
            print(f"{part}: left out: {reason}", file=sys.stderr)
            continue
        result[part] = []
        for row in parts[part](args):
            print(row, file=sys.stderr, flush=True)
            result[part].append(row)
    print(json.dumps(result, indent=1))
    write_json(result, args.output)


if __name__ == "__main__":
    main()
