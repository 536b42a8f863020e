"""How long one attention call takes: from a measured table, or from a short measurement here.

The table, ``rates.json``, is made by ``benchmarks/rates.py`` from ``benchmarks/results``: for each
method on a card a + b * (tokens * heads) + c * (block pairs * heads) + d * (computed pairs * head
channels * heads). On other cards, and for what the table doesn't have, the call itself is measured
with random tokens, for a fraction of a second, and kept in the user's cache folder.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from dit_accel import __version__
from dit_accel.call import TokenLayout
from dit_accel.files import write_text
from dit_accel.guard.options import QualityGuard
from dit_accel.methods.base import AttentionMethod, StaticMethod
from dit_accel.tuning_file import cache_folder

DENSE = "dense"
_TABLE_FROM = 16_000
"""Tokens from which the table holds; below, launching kernels counts."""
_MOST_ELEMENTS = 2**27
"""Of a query: larger calls are measured with a part of the heads."""
_LAUNCHED_AHEAD = 8
"""Short calls that a GPU is given at once, as in a forward: it does not wait for each launch."""
_REPEATS, _MOST, _ENOUGH_S = 3, 40, 0.3
"""Runs of a call: at least, and at most; short ones are repeated until so much time is spent."""


@dataclass(frozen=True)
class Place:
    """One attention call, and where it runs.

    Attributes:
        layout: its tokens.
        heads: heads.
        head_size: channels of a head.
        batch: samples.
        dtype: of query, key and value.
        device: where they are.
    """

    layout: TokenLayout
    heads: int
    head_size: int
    batch: int = 1
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def card(self) -> str:
        """Name of the GPU, or of the processor."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


@dataclass
class AttentionTimes:
    """Answers how many seconds a call takes, and remembers.

    Attributes:
        measuring: whether calls that the table doesn't have may be measured.
        guard: looks at some of the calls, which measured times count, and the table doesn't.
        table: `rates.json`, or another for tests: by card, then by method.
        sources: where the answers came from, for the report.
        clock: what measured times are read from.
    """

    measuring: bool = True
    guard: QualityGuard | None = None
    table: Mapping[str, Any] = field(default_factory=lambda: shipped_rates())
    sources: dict[str, None] = field(default_factory=dict)
    clock: Callable[[], float] = time.perf_counter
    _known: dict[str, float] = field(default_factory=dict)
    _read: set[str] = field(default_factory=set)

    def seconds(self, method: AttentionMethod | None, place: Place) -> float | None:
        """Return the time of a call by ``method``, at its density; None: dense.

        None if it is in no table and may not be measured.
        """
        found = self._from_table(method, place)
        if found is not None:
            self.sources[f"table of {place.card}"] = None
            return found
        key = attention_key(method, place, self.guard)
        self._read_file(place)
        if key not in self._known:
            if not self.measuring:
                return None
            self._known[key] = measure_seconds(method, place, self.guard, self.clock)
            self._write_file(place)
        self.sources[f"measured on this {place.card}"] = None
        return self._known[key]

    def _from_table(self, method: AttentionMethod | None, place: Place) -> float | None:
        card = _card(self.table, place)
        if card is None or place.layout.num_tokens < _TABLE_FROM:
            return None
        rows, name = self.table[card]["methods"], DENSE if method is None else _row_name(method)
        if name not in rows or str(place.head_size) not in self.table[card]["head_sizes"]:
            return None
        if place.dtype not in (torch.float16, torch.bfloat16):
            return None
        density = 1.0 if method is None else expected_density(method, place.layout)
        block = 128 if method is None else _block_of(method)
        if density is None or block < 64:
            return None
        return predicted_seconds(rows[name], place, density, block) * float(
            self.table[card]["head_sizes"][str(place.head_size)]
        )

    def _read_file(self, place: Place) -> None:
        path = times_path(place.card)
        if place.card in self._read or path is None:
            return
        self._read.add(place.card)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["made_with"] == _made_with(place.card):
                rows = content["seconds"].items()
                self._known |= {k: float(v) for k, v in rows if math.isfinite(v) and v > 0}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return  # measured anew, and written over

    def _write_file(self, place: Place) -> None:
        path = times_path(place.card)
        if path is not None:
            mine = {k: v for k, v in self._known.items() if k.startswith(place.card)}
            content = {"made_with": _made_with(place.card), "seconds": mine}
            write_text(path, json.dumps(content, indent=1) + "\n")


def shipped_rates() -> dict[str, Any]:
    """Return the table that comes with the package."""
    text = (files("dit_accel") / "choosing/rates.json").read_text(encoding="utf-8")
    table: dict[str, Any] = json.loads(text)["cards"]
    return table


def predicted_seconds(row: Mapping[str, float], place: Place, density: float, block: int) -> float:
    """Return the time of a call by one row of the table.

    Args:
        row: "fixed_s", "per_token_s", "per_block_pair_s" and "per_pair_s", the last for one
            channel of a head.
        place: the call.
        density: share of pairs computed.
        block: tokens per block.
    """
    tokens, heads = place.layout.num_tokens, place.heads * place.batch
    blocks = math.ceil(place.layout.video_length / block)
    return (
        row["fixed_s"]
        + row["per_token_s"] * tokens * heads
        + row["per_block_pair_s"] * blocks**2 * heads
        + row["per_pair_s"] * density * tokens**2 * place.head_size * heads
    )


def expected_density(method: AttentionMethod, layout: TokenLayout) -> float | None:
    """Return the share of pairs that a method computes on ``layout``; None if tokens decide."""
    if isinstance(method, StaticMethod):
        return method.block_density(layout)
    asked = getattr(method, "density", None)
    if asked is None:
        return None
    video = layout.video_length**2
    return (asked * video + layout.num_tokens**2 - video) / layout.num_tokens**2


def measure_seconds(
    method: AttentionMethod | None,
    place: Place,
    guard: QualityGuard | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Time a call with random tokens, as an accelerated pipeline runs it; see `rehearsal`."""
    from dit_accel.choosing.rehearsal import rehearse  # it needs the runtime, which lies above

    heads = place.heads
    while place.batch * place.layout.num_tokens * heads * place.head_size > _MOST_ELEMENTS:
        if heads % 2:
            break
        heads //= 2
    shape = place.batch, place.layout.num_tokens, heads, place.head_size
    generator = torch.Generator(place.device).manual_seed(0)
    kind: Any = {"device": place.device, "dtype": place.dtype, "generator": generator}
    query, key, value = (torch.randn(shape, **kind) for _ in range(3))
    calls = rehearse(method, (query, key, value), place.layout, guard)
    short = place.device.type == "cuda" and place.layout.num_tokens < _TABLE_FROM
    in_a_row = _LAUNCHED_AHEAD if short else 1
    spent: list[list[float]] = [[] for _ in calls]
    with torch.no_grad():
        for _, run in calls:
            run()
        while len(spent[0]) < _REPEATS or (len(spent[0]) < _MOST and _total(spent) < _ENOUGH_S):
            for of_call, (_, run) in zip(spent, calls, strict=True):
                of_call.append(_timed(run, place.device, clock, in_a_row))
    # On a CPU others take their share of some runs; the fastest had the least of that.
    best = min if place.device.type == "cpu" else statistics.median
    mean = sum(share * best(of_call) for (share, _), of_call in zip(calls, spent, strict=True))
    return mean * place.heads / heads


def times_path(card: str) -> Path | None:
    """Return the file of what was measured on a card; None where no cache folder is known."""
    folder = cache_folder()
    slug = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    return None if folder is None else folder / f"attention-times-{slug}.json"


def _timed(
    run: Callable[[], Any], device: torch.device, clock: Callable[[], float], in_a_row: int
) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = clock()
    for _ in range(in_a_row):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (clock() - start) / in_a_row


def _total(spent: Sequence[Sequence[float]]) -> float:
    return sum(map(sum, spent))


def attention_key(
    method: AttentionMethod | None, place: Place, guard: QualityGuard | None = None
) -> str:
    """Return the text that a call's time is kept by."""
    layout = place.layout
    text = f"{layout.text_length}{' first' if layout.text_first else ''}"
    call = f"{layout.grid}+{text} {place.heads}x{place.head_size} b{place.batch}"
    # What a guard costs follows from how often it looks, and at how much.
    by = "" if method is None or guard is None else f", guard {guard.rows}/{guard.every}"
    return f"{place.card} | {call} {place.dtype} | {DENSE if method is None else method!r}{by}"


def _row_name(method: AttentionMethod) -> str:
    pooled = isinstance(method, StaticMethod) and method.remainder == "pooled"
    return f"{method.name} + remainder" if pooled else method.name


def _block_of(method: AttentionMethod) -> int:
    sizes = getattr(method, "block_sizes", None)
    return min(sizes) if sizes else int(getattr(method, "block_size", 128))


def _card(table: Mapping[str, Any], place: Place) -> str | None:
    """Return the entry of the table for this card: the longest one that its name begins with."""
    found = [name for name in table if place.card.startswith(name)]
    return max(found, key=len, default=None)


def _made_with(card: str) -> dict[str, str]:
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return {"card": card, "dit_accel": __version__, "torch": torch.__version__, "triton": triton}


def heads_of(transformer: Any) -> tuple[int, int]:
    """Return a transformer's number of attention heads, and the channels of one."""
    config = transformer.config
    return int(config.num_attention_heads), int(config.attention_head_dim)
