"""The kernel for Hopper under several settings, beside the portable one and its peers.

    python benchmarks/hopper.py > hopper.jsonl
    python benchmarks/hopper.py --only hopper stages=3,late=0 --tokens 75600 --head-size 128

JSON lines: first one per variant with its error at a small size, then one per case and variant with
TFLOP/s on attended pairs. Lists are random, or a band of tiles around each tile; "masked" is random
with half of the pairs hidden in every tile. A wrong barrier would hang the GPU, so variants are
checked first, each in a process of its own, and whatever falls silent while timing is killed and
left out from there on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from kernels import Case, cudnn_dense, make_case
from measuring import manifest, median_ms
from torch import Tensor

from dit_accel.call import TokenLayout
from dit_accel.grid import RASTER
from dit_accel.kernels.tiles import TileLists
from dit_accel.kernels.tuning import HopperConfig
from dit_accel.operators import make_operators
from dit_accel.plan import BlockSparsePlan

HEADS = 8
PEERS = ("cudnn", "triton", "flash-attn-4")
DEFAULT = (
    *PEERS,
    "hopper",  # what the product picks
    "late=1,persistent=0",
    "late=1,persistent=1",
    "late=0,persistent=1",
    "stages=3,persistent=1",
)


def settings(variant: str) -> HopperConfig | None:
    """Read a variant such as ``stages=3,late=0``, fields of `HopperConfig`."""
    if variant == "hopper":
        return None
    fields = dict(field.split("=") for field in variant.split(","))
    return HopperConfig(**{name: int(value) for name, value in fields.items()})


def runner(variant: str, case: Case, masked: bool) -> Callable[[], Tensor] | None:
    """What to time for a variant, or None if it can't run the case."""
    if variant == "cudnn":
        return partial(cudnn_dense, *case.qkv)
    lists: TileLists = case.partial_lists() if masked else case.lists()
    if variant == "triton":
        from dit_accel.kernels.block_sparse import block_sparse_attention

        return partial(block_sparse_attention, *case.qkv, lists)
    if variant == "flash-attn-4":
        operator = make_operators()[variant]
        plan = BlockSparsePlan(TokenLayout((1, 1, case.tokens)), RASTER, case.block_mask())
        reason = "lists of masked tiles" if masked else operator.why_not(plan, case.qkv[0])
        if reason:
            return None
        return lambda: operator.run(*case.qkv, plan, None, False)[0]
    from dit_accel.kernels.block_sparse_hopper import hopper_block_sparse_attention

    return partial(hopper_block_sparse_attention, *case.qkv, lists, config=settings(variant))


def check(variant: str) -> dict[str, Any]:
    """Relative errors against float64 at a small ragged size, for each head size."""
    found: dict[str, Any] = {"variant": variant}
    for head_size in (128, 64):
        case = make_case(1_480, HEADS, head_size, 0.4)
        run = runner(variant, case, masked=False)
        if run is None:
            return found | {"refused": True}
        out = run()
        found[f"error_{head_size}"] = case.sampled_error(out, dense=variant == "cudnn")
        found["repeats"] = bool(torch.equal(out, run()))
    return found


def cases(args: argparse.Namespace) -> list[tuple[int, int, str, float]]:
    """``(head size, tokens, kind of list, density)``, the most telling first."""
    found = []
    for head_size, tokens in itertools.product(args.head_size, args.tokens):
        found += [(head_size, tokens, kind, d) for kind in args.lists for d in args.density]
        if tokens == 75_600:
            found.append((head_size, tokens, "masked", 0.25))
    return found


def measure(todo: list[tuple[int, int, str, float]], variants: list[str]) -> Iterator[dict]:
    """Time all variants of a case one after the other."""
    for number, (head_size, tokens, kind, density) in enumerate(todo):
        case = make_case(tokens, HEADS, head_size, density, band=kind == "band")
        for variant in variants:
            row: dict[str, Any] = {"case": number, "variant": variant, "tokens": tokens}
            row |= {"head_size": head_size, "lists": kind, "density": density}
            yield row | {"started": True}
            try:
                run = runner(variant, case, kind == "masked")
                if run is None:
                    continue
                milliseconds = median_ms(run, repeats=5)
            except Exception:
                yield row | {"failed": traceback.format_exc()[-600:]}
                continue
            pairs = HEADS * tokens**2 if variant == "cudnn" else case.pairs()
            rate = 4 * pairs * head_size / milliseconds / 1e9
            yield row | {"ms": round(milliseconds, 3), "tflops": round(rate, 1)}


def start(task: dict[str, Any], stderr: int | None = None) -> subprocess.Popen[str]:
    """Run this file as a child that prints JSON lines."""
    command = [sys.executable, __file__, "--child", json.dumps(task)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)


def child(task: dict[str, Any]) -> None:
    """Check one variant, or measure."""
    rows = [check(task["check"])] if "check" in task else measure(task["todo"], task["variants"])
    for row in rows:
        print(json.dumps(row), flush=True)


def checked(variants: list[str], timeout: float) -> list[str]:
    """The variants that came back right from processes of their own; prints one line for each."""
    children = {variant: start({"check": variant}, subprocess.PIPE) for variant in variants}
    right = []
    for variant, process in children.items():
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            output, errors = "", f"nothing after {timeout} s"
        row = json.loads(output) if output else {"variant": variant, "failed": errors[-1200:]}
        print(json.dumps(row), flush=True)
        if max(row.get("error_128", 1.0), row.get("error_64", 1.0)) < 0.02:
            right.append(variant)
    return right


def measured(todo: list[tuple[int, int, str, float]], variants: list[str], silence: float) -> None:
    """Print the rows of a measuring child; without a word for ``silence`` seconds it is killed."""
    while todo and variants:
        process = start({"todo": todo, "variants": variants})
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=_forward, args=(process, lines), daemon=True).start()
        row: dict[str, Any] = {}
        try:
            while line := lines.get(timeout=silence):
                row = json.loads(line)
                if "started" not in row:
                    print(line, flush=True)
            if process.wait() == 0:
                return
            failed = f"exit code {process.returncode}"
        except queue.Empty:
            failed = f"nothing for {silence} s"
            process.kill()
            process.wait()
        print(json.dumps(row | {"failed": failed}), flush=True)
        if "variant" not in row:
            return
        variants = [name for name in variants if name != row["variant"]]
        todo = todo[row["case"] + 1 :]


def _forward(process: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
    for line in process.stdout or ():
        lines.put(line.strip())
    lines.put("")


def main() -> None:
    """Parse the command line; check, then measure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--only", nargs="+", default=list(DEFAULT), help="peers, hopper, or settings to try"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[75_600, 32_760, 118_800])
    parser.add_argument("--head-size", type=int, nargs="+", default=[128, 64])
    parser.add_argument("--density", type=float, nargs="+", default=[0.5, 0.25, 0.1])
    parser.add_argument("--lists", nargs="+", choices=["random", "band"])
    parser.add_argument("--check-timeout", type=float, default=60, help="seconds")
    parser.add_argument("--silence", type=float, default=30, help="seconds")
    parser.add_argument("--commit", help="commit to record; asked of git by default")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(json.loads(args.child))
        return
    args.lists = args.lists or ["random", "band"]
    print(json.dumps({"manifest": manifest(args.commit)}), flush=True)
    measured(cases(args), checked(args.only, args.check_timeout), args.silence)


if __name__ == "__main__":
    main()
