"""``dit-accel bench tune``: the tile shapes and schedules that are fastest on this card.

Each setting is checked on a small ragged case before it is timed on a large one; what is wrong,
does not fit into the chip or runs out of memory is noted, and the run goes on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from dit_accel.bench.cases import Case, make_case, visited_tiles
from dit_accel.bench.measuring import Row, median_ms
from dit_accel.kernels.backend import why_no_gluon, why_no_hopper_kernel
from dit_accel.kernels.tuning import LONG_LIST, HopperConfig, KernelConfig, Tuning

BLOCK_SPARSE, HOPPER = "block_sparse", "hopper"
TOKENS, DENSITY = 32_760, 0.25
"""The size that is timed: 256 tiles, of which 64 are visited."""
SHORT_DENSITY = 0.1
SMALL_TOKENS, SMALL_DENSITY = 1_480, 0.4
BETTER = 1.02
"""How much faster than the built-in setting another must be: runs vary by 1 %."""


@dataclass(frozen=True)
class TuneBench:
    """Checks and times one setting of one kernel.

    Attributes:
        device: "cuda"; "cpu" tries the bench out, under Triton's interpreter.
        tokens: length of the sequence that is timed.
        heads: number of heads.
    """

    device: str
    tokens: int = TOKENS
    heads: int = 8

    def measure(self, task: Mapping[str, Any]) -> Row:
        """Return time and rate of a task made by `tune_tasks`."""
        row: Row = {}
        for tokens, density, timed in (
            (min(SMALL_TOKENS, self.tokens), SMALL_DENSITY, False),
            (self.tokens, task["density"], True),
        ):
            case = make_case(
                tokens, self.heads, task["head_size"], density, self.device,
                getattr(torch, task["dtype"]),
            )  # fmt: skip
            run = _runner(case, task)
            if not timed:
                error, of_plain = case.sampled_errors(run())
                if not error <= 2 * of_plain + torch.finfo(case.qkv[0].dtype).eps / 4:
                    return {"failed": f"wrong result: relative error {error:.2e}"}
                row["relative_error"] = float(f"{error:.2e}")
                continue
            row["ms"] = round(median_ms(run, device=self.device), 4)
            row["tflops"] = float(f"{4 * case.pairs() * task['head_size'] / row['ms'] / 1e9:.4g}")
        return row


def tune_tasks(
    device: str, *, head_sizes: Sequence[int], dtypes: Sequence[str], quick: bool = False
) -> Iterator[Row]:
    """Yield every setting of every kernel that runs here; ``quick`` tries a few of each."""
    from dit_accel.kernels.block_sparse import why_unavailable

    place = torch.device(device)
    for dtype, head_size in itertools.product(dtypes, head_sizes):
        size = {"dtype": dtype, "head_size": head_size}
        kind = getattr(torch, dtype)
        if why_unavailable(place, kind, head_size) is None:
            for config in _kernel_configs(place, kind, quick):
                yield {"kernel": BLOCK_SPARSE, **size, "density": DENSITY, "config": asdict(config)}
        if why_no_gluon() is None and why_no_hopper_kernel(place, kind, head_size, 128) is None:
            for density in (DENSITY, SHORT_DENSITY):
                for hopper in _hopper_configs(head_size, quick):
                    yield {"kernel": HOPPER, **size, "density": density, "config": asdict(hopper)}


def best_settings(rows: Iterable[Row], built_in: Callable[[Row], Row], tokens: int) -> Tuning:
    """Return the fastest settings, where they beat the built-in ones by more than runs vary.

    Args:
        rows: measured tasks.
        built_in: the setting that a task's kernel takes of itself.
        tokens: length of the sequence that was timed.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if "tflops" in row:
            key = row["kernel"], row["dtype"], row["head_size"], row["density"]
            groups.setdefault(key, []).append(row)
    block_sparse, hopper = {}, {}
    for (kernel, dtype, head_size, density), found in groups.items():
        best = max(found, key=lambda row: row["tflops"])
        usual = [row for row in found if row["config"] == built_in(row)]
        if usual and best["tflops"] < BETTER * usual[0]["tflops"]:
            best = usual[0]
        if kernel == HOPPER:
            # The dtype is one of two that take the same instructions.
            kind = "short" if visited_tiles(tokens, density) < LONG_LIST else "long"
            hopper[head_size, kind] = HopperConfig(**best["config"])
        else:
            itemsize = torch.finfo(getattr(torch, dtype)).bits // 8
            block_sparse[head_size, itemsize] = KernelConfig(**best["config"])
    return Tuning("measured just now", block_sparse, hopper)


def built_in_setting(row: Row, device: str, tokens: int) -> Row:
    """Return what the kernel of ``row`` takes without a tuning file."""
    from dit_accel.kernels.tuning import hopper_config, kernel_config

    if row["kernel"] == HOPPER:
        longest = visited_tiles(tokens, row["density"])
        return asdict(hopper_config(row["head_size"], longest, with_text=False))
    itemsize = torch.finfo(getattr(torch, row["dtype"])).bits // 8
    return asdict(kernel_config(_capability(torch.device(device)), row["head_size"], itemsize))


def _runner(case: Case, task: Mapping[str, Any]) -> Callable[[], Any]:
    if task["kernel"] == HOPPER:
        from dit_accel.kernels.block_sparse_hopper import hopper_block_sparse_attention

        hopper = HopperConfig(**task["config"])
        return partial(hopper_block_sparse_attention, *case.qkv, case.lists(), config=hopper)
    from dit_accel.kernels.block_sparse import block_sparse_attention

    config = KernelConfig(**task["config"])
    return partial(block_sparse_attention, *case.qkv, case.lists(), config=config)


def _kernel_configs(device: torch.device, dtype: torch.dtype, quick: bool) -> list[KernelConfig]:
    """The grid of tile shapes; the copy engine exists from Hopper on."""
    engine = (False, True) if _capability(device)[0] >= 9 else (False,)
    if quick:
        choices = itertools.product((64, 128), (64,), (4, 8), (2,), engine[-1:])
    elif dtype == torch.float32:
        choices = itertools.product((32, 64), (16, 32), (4, 8), (1, 2), (False,))
    else:
        choices = itertools.product((64, 128), (32, 64), (4, 8), (2, 3, 4), engine)
    return list(itertools.starmap(KernelConfig, choices))


def _hopper_configs(head_size: int, quick: bool) -> list[HopperConfig]:
    """The grid of schedules; more buffers fit at head size 64."""
    stages = (6 if head_size == 64 else 3,) if quick else (3, 4, 6) if head_size == 64 else (2, 3)
    either = (False, True)
    choices = itertools.product(stages, either, (0, 1, 2), either)
    return list(itertools.starmap(HopperConfig, choices))


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
