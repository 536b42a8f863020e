"""``dit-accel bench kernel``: attention alone, per attended pair, ours beside its peers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dit_accel.bench.cases import Lists, make_case
from dit_accel.bench.contenders import Contender, baseline_name, make_contenders
from dit_accel.bench.measuring import Row, alternating_ms

DENSE = "dense"
"""In the place of a kind of lists, for contenders that take none."""
APPROXIMATE_ERROR = 0.1
"""Relative error up to which a contender that is not exact counts as right."""


@dataclass
class KernelBench:
    """Checks and times one contender on one case, beside the dense baseline.

    Attributes:
        device: "cuda" or "cpu"; times on a CPU mean nothing.
        heads: number of heads.
        repeats: timed rounds.
    """

    device: str
    heads: int
    repeats: int = 7
    _size: Any = field(default=None, repr=False)
    _contenders: Mapping[str, Contender] = field(default_factory=dict, repr=False)

    def measure(self, task: Mapping[str, Any]) -> Row:
        """Return time, rate and errors of a task made by `kernel_tasks`.

        A result that is further from float64 than twice the plain formula in the same dtype is not
        timed. The contender and the baseline take turns, so that both find the GPU equally hot.
        """
        contenders = self._at(task)
        lists: Lists = "random" if task["lists"] == DENSE else task["lists"]
        case = make_case(
            task["tokens"], self.heads, task["head_size"], task["density"], self.device,
            getattr(torch, task["dtype"]), lists,
        )  # fmt: skip
        contender, density = contenders[task["contender"]], task["density"]
        if reason := contender.why_not(case):
            return {"refused": reason}
        run = contender.runner(case, density)
        error, of_plain = contender.errors(case, run(), density)
        rounding = torch.finfo(case.qkv[0].dtype).eps / 4
        bound = 2 * of_plain + rounding if contender.exact else APPROXIMATE_ERROR
        row: Row = {"relative_error": _short(error), "plain_relative_error": _short(of_plain)}
        if not error <= bound:
            return row | {"failed": f"wrong result: relative error {error:.2e} over {bound:.2e}"}
        every_pair = self.heads * case.tokens**2
        pairs = contender.pairs(case, density)
        row["attended_share"] = round(pairs / every_pair, 4)
        runs, baseline = [run], contenders[baseline_name(self.device)]
        paired = baseline is not contender and baseline.why_not(case) is None
        if paired:
            runs.append(baseline.runner(case, density))
        times = alternating_ms(runs, self.repeats, device=self.device)
        row |= {"ms": round(times[0], 4), "tflops": self._rate(pairs, task, times[0])}
        if paired:
            row["baseline_ms"] = round(times[1], 4)
            rate = self._rate(every_pair, task, times[1])
            row |= {"baseline_tflops": rate, "of_baseline_rate": round(row["tflops"] / rate, 4)}
        return row

    def _at(self, task: Mapping[str, Any]) -> Mapping[str, Contender]:
        """Return the contenders, new ones for each size: FlexAttention is compiled once for it.

        Without the reset, torch would stop compiling after eight sizes and run it eagerly.
        """
        size = task["dtype"], task["head_size"], task["tokens"]
        if size != self._size:
            torch._dynamo.reset()
            self._size, self._contenders = size, make_contenders()
        return self._contenders

    def _rate(self, pairs: int, task: Mapping[str, Any], milliseconds: float) -> float:
        """TFLOP/s: four operations for each channel of each pair, two products."""
        return float(f"{4 * pairs * task['head_size'] / milliseconds / 1e9:.4g}")


def kernel_tasks(
    *,
    tokens: Sequence[int],
    densities: Sequence[float],
    head_sizes: Sequence[int],
    dtypes: Sequence[str],
    lists: Sequence[str],
    contenders: Sequence[str],
) -> Iterator[Row]:
    """Yield the tasks, size by size; dense contenders have one for each size."""
    known = make_contenders()
    dense = [name for name in contenders if known[name].dense]
    sparse = [name for name in contenders if not known[name].dense]
    for dtype in dtypes:
        for head_size in head_sizes:
            for length in tokens:
                size = {"dtype": dtype, "head_size": head_size, "tokens": length}
                for name in dense:
                    yield {**size, "lists": DENSE, "density": 1.0, "contender": name}
                for kind in lists:
                    for density in densities:
                        for name in sparse:
                            yield {**size, "lists": kind, "density": density, "contender": name}


def _short(error: float) -> float | None:
    """Three digits; None where JSON has no number."""
    return float(f"{error:.2e}") if error == error and abs(error) != float("inf") else None
