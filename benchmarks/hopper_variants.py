"""Settings of the kernels for Hopper: are they right, and how fast beside what there is.

    python benchmarks/hopper_variants.py --commit COMMIT --output hopper-variants-h100.json

First each variant is checked against float64 in a process of its own, all at once and with a limit
of time, because a wrong barrier hangs. What is right is then timed in turns with the kernel of the
library, cuDNN dense and flash-attn-4, one case after the other, and told as a ratio to each. Rows
are written as they come; rows that ``--output`` holds of the same commit are not measured again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Timer
from typing import Any

import torch
from torch import Tensor

from dit_accel.bench.cases import Case, make_case
from dit_accel.bench.contenders import cudnn_dense
from dit_accel.bench.measuring import alternating_ms, manifest, write_json
from dit_accel.kernels.quantised_reference import key_blocks, quantised_attention
from dit_accel.kernels.reference import lists_to_mask, masked_attention
from dit_accel.kernels.tiles import tile_lists_from_dense
from dit_accel.operators import make_operators

TOKENS, HEADS = 75_600, 8
CASES = [(128, 0.25), (128, 0.1), (64, 0.25), (64, 0.1), (128, 1.0), (64, 1.0)]
VARIANTS: dict[str, dict[str, Any]] = {
    "eager 1": {"eager": 1},
    "eager 2": {"eager": 2},
    "eager 2, other turns": {"eager": 2, "other_turns": True},
    "fp8": {},
    "fp8, eager 1": {"eager": 1},
    "fp8, eager 2": {"eager": 2},
}
CHECK_SECONDS = 90
LARGEST_FP8_ERROR = 0.075
"""On large random inputs; that of the formula is .060."""
Row = dict[str, Any]


def trial(name: str) -> Callable[..., Any]:
    """Return the attention of one variant; imported here, as Gluon needs Triton."""
    given = VARIANTS[name]
    if "fp8" in name:
        from dit_accel.kernels.block_sparse_hopper_quantised import hopper_quantised_attention

        return partial(hopper_quantised_attention, precision="fp8", **given)
    from dit_accel.kernels.block_sparse_hopper import hopper_block_sparse_attention
    from dit_accel.kernels.tuning import hopper_config

    def run(query: Tensor, key: Tensor, value: Tensor, lists: Any, **options: Any) -> Any:
        text = options.get("text_length", 0) > 0
        usual = hopper_config(query.shape[-1], lists.longest, text)
        turns = usual.turns != given.get("other_turns", False)
        config = replace(usual, eager=given["eager"], turns=turns)
        return hopper_block_sparse_attention(query, key, value, lists, config=config, **options)

    return run


def check(name: str) -> Iterator[Row]:
    """Compare small ragged calls with masks, and rows of the large ones, with float64."""
    run, low = partial(trial(name), return_lse=True), "fp8" in name
    small = [(d, video, text, f) for d in (128, 64) for video, text, f in
             ((1480, 77, 1), (1480, 77, 20), (2900, 0, 1))]  # fmt: skip
    for head_size, video, text, factor in small:
        row = {"kind": "check", "variant": name, "head_size": head_size, "tokens": video + text}
        yield row | check_small(run, low, head_size, video, text, factor)
    for head_size in (128, 64):
        # 8-bit products lose more bits the more of them add up.
        for density in (0.25, 0.1, 1.0) if low else (0.25, 0.1):
            case = make_case(TOKENS, HEADS, head_size, density)
            error, plain = case.sampled_errors(run(*case.qkv, case.lists())[0])
            yield {
                "kind": "check", "variant": name, "head_size": head_size, "tokens": TOKENS,
                "density": density, "error": error, "plain": plain,
                "right": error < (LARGEST_FP8_ERROR if low else 2 * plain),
            }  # fmt: skip


def check_small(run: Any, low: bool, head_size: int, video: int, text: int, factor: int) -> Row:
    """Tiles that are whole, masked and hidden; queries times ``factor`` make steep weights."""
    torch.manual_seed(0)
    # More programs than multiprocessors in the larger one, for the persistent loop.
    batch, heads, tiles = (1 if video > 2000 else 2), 6, -(-video // 128)
    kind = torch.randint(0, 3, (1, heads, tiles, tiles), device="cuda")
    kind = kind.repeat_interleave(128, -1).repeat_interleave(128, -2)[..., :video, :video]
    shown = (kind == 0) | ((kind == 1) & (torch.rand(kind.shape, device="cuda") < 0.5))
    lists = tile_lists_from_dense(shown, 128)
    shape = 3, batch, video + text, heads, head_size
    q, k, v = torch.randn(shape, device="cuda", dtype=torch.bfloat16).unbind()
    q = q * factor
    qkv = q, k, v
    out, lse = run(*qkv, lists, text_length=text)
    again, _ = run(*qkv, lists, text_length=text)
    mask = lists_to_mask(lists, text, False)
    exact, exact_lse = masked_attention(q.double(), k.double(), v.double(), mask)
    if low:
        blocks = key_blocks(video, text, False, 128).cuda()
        plain, plain_lse = quantised_attention(*qkv, mask, "fp8", blocks)
    else:
        plain, plain_lse = masked_attention(*qkv, mask)
    error, allowed = (float((x - exact).norm() / exact.norm()) for x in (out, plain))
    seen = exact_lse.isfinite()
    of_lse, allowed_lse = (
        float((x - exact_lse)[seen].norm() / exact_lse[seen].norm()) for x in (lse, plain_lse)
    )
    limits = (1.2 * allowed + 0.005, 1.2 * allowed_lse + 0.005) if low else (2 * allowed, 1e-4)
    right = error < limits[0] and of_lse < limits[1] and torch.equal(seen, lse.isfinite())
    return {
        "factor": factor, "error": error, "plain": allowed, "lse_error": of_lse,
        "repeats": torch.equal(out, again), "right": bool(right and torch.equal(out, again)),
    }  # fmt: skip


def timings(names: list[str], done: set[str], deadline: float) -> Iterator[Row]:
    """Time all right variants and what there is, in turns, case by case."""
    from dit_accel.kernels.block_sparse_quantised import quantised_block_sparse_attention
    from dit_accel.kernels.quantise import quantise

    flash = make_operators()["flash-attn-4"]
    for head_size, density in CASES:
        key = f"{head_size}/{density}"
        if key in done or time.time() > deadline:
            continue
        case = make_case(TOKENS, HEADS, head_size, density)
        lists = case.lists()
        runs: dict[str, Callable[[], Any]] = {
            "cudnn": partial(cudnn_dense, *case.qkv),
            "hopper": partial(make_operators()["hopper"].run, *case.qkv, case.plan, None, False),
        }
        if flash.unavailable is None and flash.why_not(case.plan, case.qkv[0]) is None:
            runs["flash-attn-4"] = partial(flash.run, *case.qkv, case.plan, None, False)
        if any("fp8" in name for name in names):
            runs["triton fp8"] = partial(quantised_block_sparse_attention, *case.qkv, lists, "fp8")
            runs["rounding"] = partial(
                quantise, *case.qkv, "fp8", num_video=TOKENS, text_first=False, key_block=128,
                scale=head_size**-0.5,
            )  # fmt: skip
        for name in names:
            runs[name] = partial(trial(name), *case.qkv, lists)
        for name, run in list(runs.items()):
            try:
                run()
                torch.cuda.synchronize()
            except Exception as error:  # a peer may not compile here
                yield {"kind": "failed", "case": key, "variant": name, "why": repr(error)[-400:]}
                del runs[name]
        times = dict(zip(runs, alternating_ms(list(runs.values()), repeats=7), strict=True))
        if "rounding" in times:
            ms = times.pop("rounding")
            yield {"kind": "rounding", "case": key, "variant": "rounding", "ms": round(ms, 4)}
        rates = {name: rate(case, name, ms) for name, ms in times.items()}
        for name, value in rates.items():
            yield {
                "kind": "time", "case": key, "variant": name, "ms": round(times[name], 4),
                "tflops": round(value, 1),
                **{f"of_{peer}": round(value / rates[peer], 4)
                   for peer in ("cudnn", "hopper", "flash-attn-4") if peer in rates},
            }  # fmt: skip


def rate(case: Case, name: str, ms: float) -> float:
    """TFLOP/s on attended pairs."""
    pairs = HEADS * TOKENS**2 if name == "cudnn" else case.pairs()
    return 4 * pairs * case.qkv[0].shape[-1] / ms / 1e9


def follow(command: list[str], seconds: float) -> tuple[list[Row], str | None]:
    """Run a part of this script; return its rows and why it ended early, if it did."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen([sys.executable, __file__, *command], stdout=out, stderr=err)
        try:
            code = process.wait(max(seconds, 1))
            why = None if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            why = f"not done after {seconds:.0f} s"
        out.seek(0)
        err.seek(0)
        rows = [json.loads(line) for line in out if line.startswith("{")]
        return rows, None if why is None else f"{why}: {err.read()[-800:]}"


def checked(name: str, seconds: float) -> list[Row]:
    """All checks of a variant, and a row that says whether it may be timed."""
    rows, why = follow(["--check", name], seconds)
    right = why is None and all(row["right"] for row in rows)
    return [*rows, {"kind": "verdict", "variant": name, "right": right, "why": why}]


def measure(args: argparse.Namespace, result: Row) -> None:
    """Check, then time; write after each part."""
    start, rows = time.time(), result["rows"]
    verdicts = {r["variant"]: r["right"] for r in rows if r["kind"] == "verdict"}
    missing = [name for name in args.variants if name not in verdicts]
    with ThreadPoolExecutor(len(missing) or 1) as pool:
        for found in pool.map(lambda name: checked(name, CHECK_SECONDS), missing):
            rows += found
            verdicts[found[-1]["variant"]] = found[-1]["right"]
            write_json(result, args.output)
            print(found[-1], file=sys.stderr, flush=True)
    right = [name for name in args.variants if verdicts[name]]
    command = ["--time", *right, "--done", *{r["case"] for r in rows if r["kind"] == "time"}]
    left = args.seconds - (time.time() - start)
    command += ["--deadline", str(time.time() + left - 10)]
    process = subprocess.Popen(
        [sys.executable, __file__, *command], stdout=subprocess.PIPE, text=True
    )
    # A hang must not hold the machine: what has come by then stays.
    timer = Timer(max(left + 15, 30), process.kill)
    timer.start()
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            rows.append(json.loads(line))
            write_json(result, args.output)
            print(line, end="", file=sys.stderr, flush=True)
    process.wait()
    timer.cancel()


def summary(rows: list[Row]) -> Row:
    """What was wrong, and the rates beside each peer."""
    peers = ("cudnn", "hopper", "flash-attn-4")
    rates: Row = {"tflops, of": "cudnn, hopper, flash-attn-4"}
    for row in rows:
        if row["kind"] == "time":
            of_peers = [str(row.get(f"of_{peer}")) for peer in peers]
            case = rates.setdefault(row["case"], {})
            case[row["variant"]] = f"{row['tflops']}, of {' '.join(of_peers)}"
    other = [r for r in rows if r["kind"] == "rounding"]
    wrong = [row for row in rows if row.get("right") is False or row["kind"] == "failed"]
    return {"wrong": wrong, "rates": rates, "other": other}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commit", help="commit to record; asked of git by default")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--seconds", type=float, default=130, help="start no case after so long")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--check", choices=list(VARIANTS), help=argparse.SUPPRESS)
    parser.add_argument("--time", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--done", nargs="*", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.check or args.time is not None:
        found = (
            check(args.check) if args.check else timings(args.time, set(args.done), args.deadline)
        )
        for row in found:
            print(json.dumps(row), flush=True)
        return
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        parser.error("the loops need a Hopper GPU")
    result: Row = {"manifest": manifest(args.commit), "rows": []}
    if args.output and args.output.is_file():
        before = json.loads(args.output.read_text())
        if before["manifest"]["commit"] == result["manifest"]["commit"]:
            result["rows"] = before["rows"]
    measure(args, result)
    print(json.dumps(summary(result["rows"]), indent=1))


if __name__ == "__main__":
    main()
