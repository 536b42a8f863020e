"""The cost model of many GPUs against what `scaling.py` measured: a table, and a plot.

    python benchmarks/scaling_model.py benchmarks/results/scaling-h200.json
    python benchmarks/scaling_model.py ... --plot scaling.svg     # needs matplotlib (extra bench)

What one GPU does, and how fast GPUs exchange tokens in a node, is read from the file; how fast
nodes exchange them is an assumption (--between-gb-s), and so is the memory's speed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dit_accel.parallel.cost import Cost, Machine, Workload, cost_of, splits

HEADS, HEAD_SIZE, BLOCKS = 40, 128, 40  # Wan2.1-14B
RANKS = (1, 2, 4, 8, 64, 512)
UNITS = {"pisa": 64}
Row = dict[str, Any]


def workloads(rows: list[Row], size: str) -> dict[str, Workload]:
    """Return what each method costs on one GPU."""
    found = {}
    for row in rows:
        if row["size"] != size or row["split"] != "one" or "block_ms" not in row:
            continue
        attention_ms = min(row["attention_ms"], row["block_ms"])
        found[row["method"]] = Workload(
            tokens=row["tokens"],
            heads=HEADS,
            head_size=HEAD_SIZE,
            blocks=BLOCKS,
            density=row["density"],
            attention_s=attention_ms / 1e3,
            other_s=(row["block_ms"] - attention_ms) / 1e3,
            beside_s=max(row["beside_ms"], 0.0) / 1e3,
            block_size=UNITS.get(row["method"], 128),
        )
    return found


def machine(rows: list[Row], arguments: argparse.Namespace) -> Machine:
    """Return the GPUs that were measured, as the model sees them."""
    speeds = [row["gb_per_s"] for row in rows if row["method"] == "exchange" and "gb_per_s" in row]
    return Machine(
        inside_bytes_s=max(speeds, default=arguments.inside_gb_s) * 1e9,
        between_bytes_s=arguments.between_gb_s * 1e9,
        memory_bytes_s=arguments.memory_gb_s * 1e9,
    )


def against_measured(rows: list[Row], works: dict[str, Workload], gpus: Machine) -> list[Row]:
    """Return measured and predicted efficiency side by side."""
    found = []
    for row in rows:
        if "efficiency" not in row or row["passes"] > 1 or row["ranks"] == 1:
            continue
        degrees = dict(part.split("=") for part in row["split"].split(","))
        split = {name: int(degrees.get(name, 1)) for name in ("ulysses", "ring")}
        predicted = cost_of(works[row["method"]], gpus, **split)
        found.append(
            {
                "method": row["method"],
                "split": row["split"],
                "ranks": row["ranks"],
                "measured": round(row["efficiency"], 3),
                "predicted": round(predicted.efficiency, 3),
                "off_by": round(predicted.efficiency / row["efficiency"] - 1, 3),
            }
        )
    return found


def at_scale(works: dict[str, Workload], gpus: Machine) -> list[Row]:
    """Return the model's forward of each method over many GPUs."""
    found = []
    for method, work in works.items():
        for ranks in RANKS[1:]:
            for name, (ulysses, ring) in splits(ranks, HEADS, gpus.node_ranks).items():
                if -(-work.tokens // work.block_size) < ring:
                    continue
                cost = cost_of(work, gpus, ulysses=ulysses, ring=ring)
                found.append({"method": method, "split": name, "ranks": ranks, **told(cost)})
    return found


def told(cost: Cost) -> Row:
    """One prediction for a table."""
    return {
        "pairs": f"{cost.pairs:.3g}",
        "mib_heads": round(cost.ulysses_bytes / 2**20, 1),
        "mib_ring": round(cost.ring_bytes / 2**20, 1),
        "imbalance": round(cost.imbalance, 3),
        "forward_s": round(cost.forward_s, 4),
        "efficiency": round(cost.efficiency, 3),
    }


def markdown(rows: list[Row]) -> str:
    """Return rows as a table."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "| " + " | ".join("---" for _ in names) + " |"]
    return "\n".join(lines + ["| " + " | ".join(str(row[n]) for n in names) + " |" for row in rows])


def plot(path: Path, predicted: list[Row], measured: list[Row]) -> None:
    """Draw efficiency over the number of GPUs: lines are the model, dots were measured."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "dit-accel"
    from matplotlib import pyplot as plt

    kinds = ("ulysses", "ring", "hybrid")
    methods = list(dict.fromkeys(row["method"] for row in predicted))
    figure, panels = plt.subplots(1, 3, figsize=(10, 3.4), sharey=True, layout="constrained")
    for panel, kind in zip(panels, kinds, strict=True):
        for index, method in enumerate(methods):
            own = [(r["ranks"], r["efficiency"]) for r in predicted
                   if (r["method"], r["split"]) == (method, kind)]  # fmt: skip
            seen = [(r["ranks"], r["measured"]) for r in measured
                    if r["method"] == method and kind_of(r["split"]) == kind]  # fmt: skip
            if own:
                panel.plot(*zip(*own, strict=True), color=f"C{index}", label=method)
            if seen:
                panel.plot(*zip(*seen, strict=True), "o", color=f"C{index}")
        panel.set(title=kind, xscale="log", xlabel="GPUs", ylim=(0, 1.05))
        panel.set_xticks(RANKS[1:], [str(ranks) for ranks in RANKS[1:]])
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("share of the ideal speed-up")
    panels[0].legend()
    figure.savefig(path, metadata={"Date": None})


def kind_of(split: str) -> str:
    """Return the model's name for a measured split."""
    return "hybrid" if "," in split else split.split("=")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--size", default="720p x 81")
    parser.add_argument("--between-gb-s", type=float, default=50, help="400 Gb/s for each GPU")
    parser.add_argument("--inside-gb-s", type=float, default=300, help="if it wasn't measured")
    parser.add_argument("--memory-gb-s", type=float, default=2800)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    rows = json.loads(arguments.results.read_text())["rows"]
    rows = [row for row in rows if row["size"] == arguments.size]
    works, gpus = workloads(rows, arguments.size), machine(rows, arguments)
    measured, predicted = against_measured(rows, works, gpus), at_scale(works, gpus)
    print(f"inside a node {gpus.inside_bytes_s / 1e9:.0f} GB/s\n")
    for table in (measured, predicted):
        if table:
            print(markdown(table) + "\n")
    if arguments.plot is not None:
        plot(arguments.plot, predicted, measured)


if __name__ == "__main__":
    main()
