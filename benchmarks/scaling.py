"""Strong scaling of one Wan2.1-14B-sized forward over several GPUs, densely and by sparse methods.

    python -m torch.distributed.run --nproc-per-node 4 benchmarks/scaling.py --output FILE

Random weights in the real configuration, batch 1. Times are taken of two depths: their difference
gives the time per block, and what is left the time of everything else; ``forward_s`` puts forty
blocks together. A split over fewer ranks than were started runs on all of them, as copies; the
slowest rank counts. With ``cfg`` a step is two forwards, so it is compared with two. The quality
guard is off; "gna watched" probes every call of each forward (four times as many as it does in a
generation) and repairs nothing, "gna repaired" also computes every head densely.

One row a task, written at once by rank 0; a later run goes on where the file ends. `--tiny` tries
everything out on CPUs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor, nn

from dit_accel import QualityGuard, acceleration_report, compat, restore_pipeline
from dit_accel.bench.architectures import load_architecture
from dit_accel.bench.breakdown import attention_range, breakdown
from dit_accel.bench.measuring import Row, free_memory, guarded, manifest
from dit_accel.bench.methods import accelerate_at
from dit_accel.bench.runs import ResultFile
from dit_accel.parallel.exchange import gather_heads, scatter_heads
from dit_accel.parallel.groups import Axis, SequenceGroup
from dit_accel.parallel.guided import GuidedRanks
from dit_accel.parallel.launch import DEGREES, join_ranks, rank_mesh
from dit_accel.parallel.ring import rotate
from dit_accel.tracking import Moment

SIZES = {"720p x 81": (21, 90, 160), "720p x 321": (81, 90, 160), "tiny": (5, 14, 18)}
"""Latents: frames, height, width."""
METHODS = ("radial", "gna", "pisa", "dense")
BUDGETS = {"watched": 1e9, "repaired": 1e-9}
"""What the guard lets pass in ``gna watched`` and ``gna repaired``."""
TINY = {
    "num_attention_heads": 4, "attention_head_dim": 32, "ffn_dim": 128, "text_dim": 32,
    "freq_dim": 32,
}  # fmt: skip
TEXT = 512


@dataclass(frozen=True)
class Layout:
    """Over how many ranks a forward is split, and how."""

    ring: int = 1
    ulysses: int = 1
    cfg: int = 1

    @property
    def ranks(self) -> int:
        """All ranks that one step takes."""
        return self.ring * self.ulysses * self.cfg

    @property
    def name(self) -> str:
        """For rows."""
        parts = [f"{n}={getattr(self, n)}" for n in ("cfg", "ring", "ulysses")
                 if getattr(self, n) > 1]  # fmt: skip
        return ",".join(parts) or "one"


def layouts(world: int) -> list[Layout]:
    """Return the splits to measure on ``world`` ranks, and on 1, 2, 4, ... of them."""
    found, ranks = [Layout()], 2
    while ranks <= world:
        found += [Layout(ulysses=ranks), Layout(ring=ranks)]
        if ranks >= 4:
            found += [Layout(ring=2, ulysses=ranks // 2)]
        found += [Layout(cfg=2, ulysses=ranks // 2)]
        ranks *= 2
    return found


class _Passes:
    """Says which of a step's two passes a call is, in place of a pipeline's tracker."""

    def __init__(self) -> None:
        self.branch = "cond"

    def advance(self, _timestep: Any) -> Moment:
        return Moment(1, 2, self.branch, 0)

    @contextmanager
    def hold(self, _moment: Moment) -> Iterator[None]:
        yield


@dataclass
class ScalingBench:
    """Times forwards of one model on all ranks at once."""

    args: argparse.Namespace
    device: str
    pipe: Any = field(init=False)
    blocks: list[nn.Module] = field(init=False)

    def __post_init__(self) -> None:
        """Build the model."""
        self.pipe = make_pipeline(self.args, self.device)
        self.blocks = list(self.pipe.transformer.blocks)
        self._attached: tuple[str, str] | None = None
        self._meshes: dict[tuple[int, int], Any] = {}
        self._alone: dict[tuple[str, str], Tensor] = {}

    def measure(self, task: Row, layout: Layout) -> Row:
        """Return the row of one task; called on every rank."""
        inputs = self._inputs(task["size"])
        row = self._attach(task, inputs)
        mesh = self._mesh(layout.ring, layout.ulysses)
        spread = layout.ring * layout.ulysses > 1
        transformer = self.pipe.transformer
        try:
            if spread:
                compat.spread_over_ranks(transformer, layout.ring, layout.ulysses, mesh, None)
            return row | self._times(task, layout, mesh, inputs)
        finally:
            transformer.blocks = nn.ModuleList(self.blocks)
            if spread:
                compat.gathered_from_ranks(transformer, None)

    def _times(self, task: Row, layout: Layout, mesh: Any, inputs: Row) -> Row:
        run, passes = self._step(layout, mesh, inputs)
        few, many = self.args.layers
        seconds = {}
        for depth in (many, few):
            self.pipe.transformer.blocks = nn.ModuleList(self.blocks[:depth])
            output = run()  # plans, kernels, first allocations
            if depth == many:
                found = self._against_one(task, layout, output)
                free_memory()
                if torch.cuda.is_available():
                    torch.cuda.reset_peak_memory_stats()
            seconds[depth] = min(self._slowest_s(run) for _ in range(self.args.repeats))
            if depth == many:
                found["peak_gib"] = _peak_gib()
                if layout.ranks == 1:
                    found["attention_ms"] = self._attention_ms(run) / many
        per_block = (seconds[many] - seconds[few]) / (many - few)
        beside = seconds[few] - few * per_block
        report = acceleration_report(self.pipe)
        return {
            "ranks": layout.ranks,
            "passes": passes,
            "tokens": _tokens(task["size"]),
            "density": report.density,
            "operators": sorted({call.operator for call in report.calls}),
            "balance": [note for note in report.notes if "ring parts" in note],
            "measured_s": seconds,
            "block_ms": per_block * 1e3,
            "beside_ms": beside * 1e3,
            "forward_s": (beside + 40 * per_block),
            **found,
        }

    def _step(self, layout: Layout, mesh: Any, inputs: Row) -> tuple[Callable[[], Tensor], int]:
        """Return what a step is: one forward, or with ``cfg`` both passes on ranks of their own."""
        transformer = self.pipe.transformer
        guard = self.pipe._dit_accel.runtime.guard

        def forward() -> Tensor:
            if guard is not None:
                guard.begin()  # so that every forward is a generation's first
            return transformer(**inputs)[0]

        if layout.cfg == 1:
            return forward, 1
        pairs = self._mesh(2, layout.ring * layout.ulysses)["ring"]
        axis = Axis(2, pairs.get_local_rank(), pairs.get_group())
        tracker = _Passes()
        guided = GuidedRanks(axis, None, tracker)  # type: ignore[arg-type]

        def step() -> Tensor:
            found = []
            for branch in ("cond", "uncond"):
                tracker.branch = branch
                found.append(guided.run(transformer, transformer, **inputs)[0])
            return found[0]

        step()  # both passes on both: what predictions look like
        return step, 2

    def _attention_ms(self, run: Callable[[], Any]) -> float:
        """Return the milliseconds of attention in a forward."""
        with attention_range(self.pipe):
            parts = breakdown(run, self.device)
        return float(parts["attention"])

    def _slowest_s(self, run: Callable[[], Any]) -> float:
        """Return the seconds that the slowest rank takes."""
        dist.barrier()
        _wait()
        begun = time.perf_counter()
        run()
        _wait()
        spent = torch.tensor(time.perf_counter() - begun, dtype=torch.float64, device=self.device)
        dist.all_reduce(spent, op=dist.ReduceOp.MAX)
        return float(spent)

    def _against_one(self, task: Row, layout: Layout, output: Tensor) -> Row:
        """Compare an output with that of one rank."""
        key = task["size"], task["method"]
        if layout.ranks == 1:
            self._alone[key] = output.float().cpu()
        alone = self._alone.get(key)
        if not bool(output.isfinite().all()):
            return {"failed": "the output is not finite"}
        if alone is None:
            return {}
        return {"relative_error": float((output.float().cpu() - alone).norm() / alone.norm())}

    def _mesh(self, ring: int, ulysses: int) -> Any:
        """Return the mesh of so many ranks and copies of it, made once."""
        if (ring, ulysses) not in self._meshes:
            shape = dist.get_world_size() // (ring * ulysses), ring, ulysses
            mesh = rank_mesh(self.device, shape, DEGREES, self.args.timeout_s)
            self._meshes[ring, ulysses] = mesh
        return self._meshes[ring, ulysses]

    def _attach(self, task: Row, inputs: Row) -> Row:
        """Put a method on, at the density asked for or the least that it reaches."""
        key = task["size"], task["method"]
        if self._attached == key:
            return {}
        restore_pipeline(self.pipe)
        options: Row = {"dense_steps": 0, "dense_layers": 0, "min_tokens": 0}
        method, *guard = task["method"].split()
        if method != "dense":
            options["density"] = self.args.density
            options |= {"block_size": 16} if self.args.tiny else {}
        if guard:
            options["guard"] = QualityGuard(max_error=BUDGETS[guard[0]])
        row = accelerate_at(self.pipe, method, lambda: self.pipe.transformer(**inputs), **options)
        self._attached = key
        return row

    def _inputs(self, size: str) -> Row:
        generator = torch.Generator().manual_seed(0)
        config = self.pipe.transformer.config
        dtype = self.pipe.transformer.dtype

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.device, dtype)

        return {
            "hidden_states": noise(1, config.in_channels, *SIZES[size]),
            "encoder_hidden_states": noise(1, TEXT, config.text_dim),
            "timestep": torch.tensor([500.0], device=self.device),
            "return_dict": False,
        }

    def exchange(self, task: Row, layout: Layout) -> Row:
        """Time what a block exchanges, without attention: for the cost model."""
        mesh = self._mesh(layout.ring, layout.ulysses)
        axes = [Axis(mesh[n].size(), mesh[n].get_local_rank(), mesh[n].get_group())
                for n in ("ulysses", "ring")]  # fmt: skip
        group = SequenceGroup(*axes)
        config = self.pipe.transformer.config
        heads, size = config.num_attention_heads, config.attention_head_dim
        rows = -(-_tokens(task["size"]) // group.ranks)
        dtype = self.pipe.transformer.dtype
        tokens = torch.randn(1, rows, heads, size, device=self.device).to(dtype)

        def run() -> None:
            q, k, v = (x.movedim(0, 1).flatten(1, 2) for x in
                       scatter_heads([tokens] * 3, group.ulysses))  # fmt: skip
            if group.ring.size > 1:
                for _ in rotate(group.ring, k, v):
                    pass
            gather_heads(q.unflatten(1, (group.ulysses.size, -1)).movedim(1, 0), group.ulysses)

        run()
        seconds = min(self._slowest_s(run) for _ in range(5))
        once = tokens.numel() * tokens.element_size()
        sent = 4 * once * (group.ulysses.size - 1) / group.ulysses.size
        sent += 2 * once * (group.ring.size - 1)
        return {"ranks": layout.ranks, "exchange_ms": seconds * 1e3, "sent_bytes": sent,
                "gb_per_s": sent / seconds / 1e9}  # fmt: skip


def make_pipeline(args: argparse.Namespace, device: str) -> WanPipeline:
    """Return a pipeline of a transformer with random weights and nothing else."""
    torch.manual_seed(0)
    config = {**load_architecture("wan2.1-14b").config, "num_layers": max(args.layers)}
    config |= TINY if args.tiny else {}
    torch.set_default_dtype(torch.float32 if args.tiny else torch.bfloat16)
    with torch.device(device):
        transformer = WanTransformer3DModel(**config).eval()
    torch.set_default_dtype(torch.float32)
    transformer.requires_grad_(False)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    return WanPipeline(None, None, None, scheduler, transformer)


def with_efficiency(rows: list[Row]) -> list[Row]:
    """Return rows with the share of the ideal speed-up over one rank, per pass."""
    alone = {(row["size"], row["method"]): row for row in rows if row.get("split") == "one"}
    found = []
    for row in rows:
        base = alone.get((row["size"], row["method"]), {})
        if "forward_s" in row and "forward_s" in base:
            ideal = row["passes"] * base["forward_s"] / row["ranks"]
            row = row | {"efficiency": ideal / row["forward_s"]}
        found.append(row)
    return found


def line(row: Row) -> str:
    """One row for a terminal."""
    text = f"{row['size']:10s} {row['method']:8s} {row['split']:18s}"
    for name in ("refused", "failed"):
        if name in row:
            return f"{text} {name}: {row[name]}"
    if "exchange_ms" in row:
        return f"{text} {row['exchange_ms']:.2f} ms, {row['gb_per_s']:.0f} GB/s"
    efficiency = f", efficiency {row['efficiency']:.3f}" if "efficiency" in row else ""
    error = f", error {row['relative_error']:.1e}" if "relative_error" in row else ""
    return (
        f"{text} {row['forward_s']:.3f} s of which {row['beside_ms']:.0f} ms beside blocks, "
        f"{row['block_ms']:.2f} ms a block{efficiency}{error}"
    )


def _tokens(size: str) -> int:
    frames, height, width = SIZES[size]
    return frames * (height // 2) * (width // 2)


def _peak_gib() -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["720p x 81"], choices=SIZES)
    parser.add_argument("--methods", nargs="+", default=list(METHODS),
                        choices=[*METHODS, *(f"gna {guard}" for guard in BUDGETS)])  # fmt: skip
    parser.add_argument("--splits", nargs="+", help="e.g. one ulysses=2 ring=2,ulysses=2")
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--layers", type=int, nargs=2, default=[1, 4], help="two depths")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--budget-s", type=float, default=600, help="begin no task after that")
    parser.add_argument("--timeout-s", type=float, default=240, help="of an exchange")
    parser.add_argument("--tiny", action="store_true", help="a narrow model on the CPU")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--commit")
    parser.add_argument("--force", action="store_true", help="start the file again")
    args = parser.parse_args()
    if args.tiny:
        args.sizes = ["tiny"]
    return args


@torch.no_grad()
def main() -> None:
    begun = time.perf_counter()
    args = arguments()
    device = join_ranks("cpu" if args.tiny else "auto", args.timeout_s)
    first = dist.get_rank() == 0
    settings: Row = {
        "what": "one forward of Wan2.1-14B, batch 1, random weights, over several ranks, eager",
        "dtype": "float32" if args.tiny else "bfloat16",
        "layers_measured": args.layers,
        "layers_of_the_real_model": 40,
        "density": args.density,
    }
    results = None
    if first:
        results = ResultFile("scaling", manifest(args.commit), settings, args.output, args.force)
    bench = ScalingBench(args, device)
    chosen = [found for found in layouts(dist.get_world_size())
              if not args.splits or found.name in args.splits]  # fmt: skip
    tasks = [(size, method, found) for size, method, found in
             product(args.sizes, ["exchange", *args.methods], chosen)
             if method != "exchange" or (found.ranks > 1 and found.cfg == 1)]  # fmt: skip
    for size, method, layout in tasks:
        task = {"size": size, "method": method, "split": layout.name}
        go = [first and not results.has(task) and time.perf_counter() - begun < args.budget_s]  # type: ignore[union-attr]
        dist.broadcast_object_list(go, src=0)
        if not go[0]:
            continue
        measure = bench.exchange if method == "exchange" else bench.measure
        row = guarded(lambda task, measure=measure, layout=layout: measure(task, layout), task)
        if results is not None:
            results.add(task, row | {"world": dist.get_world_size()})
            results.content["rows"] = with_efficiency(results.rows)
            results.write()
            print(line(next(r for r in results.rows if all(r[k] == v for k, v in task.items()))),
                  flush=True)  # fmt: skip
    if results is not None:
        told: Row = {"rows": len(results.rows), "seconds": time.perf_counter() - begun}
        told["efficiency"] = {
            f"{row['size']} {row['method']} {row['split']}": round(row["efficiency"], 3)
            for row in results.rows if "efficiency" in row and row["ranks"] > 1
        }  # fmt: skip
        print(json.dumps(told, indent=1))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
