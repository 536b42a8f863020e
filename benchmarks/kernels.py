"""Speed of the block-sparse kernel per attended pair, beside cuDNN dense and FlexAttention.

    python benchmarks/kernels.py --output benchmarks/results/kernels-h200.json
    python benchmarks/kernels.py --sweep

Each query tile of 128 tokens visits a random set of key tiles, another one in each head; "density"
is the share of key tiles visited, and TFLOP/s count 4 * head_size operations for each pair of
tokens in a visited tile. Errors are relative to float64, over a sample of query rows.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measuring import manifest, median_ms, write_json
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from dit_accel.kernels.block_sparse import block_sparse_attention
from dit_accel.kernels.reference import masked_attention
from dit_accel.kernels.tiles import TileLists, tile_lengths
from dit_accel.kernels.tuning import KernelConfig

BLOCK = 128
SAMPLED_ROWS = 64


@dataclass(frozen=True)
class Case:
    """Random inputs, bfloat16 ``[1, tokens, heads, head_size]``, and random lists of full tiles."""

    qkv: tuple[Tensor, Tensor, Tensor]
    count: Tensor
    index: Tensor

    @property
    def tokens(self) -> int:
        return self.qkv[0].shape[1]

    def lists(self) -> TileLists:
        none = torch.zeros_like(self.count)
        no_index = none[..., None]
        bits = torch.zeros(1, BLOCK, BLOCK // 64, dtype=torch.int64, device="cuda")
        return TileLists(self.count, self.index, none, no_index, no_index, bits, BLOCK, self.tokens)

    def partial_lists(self) -> TileLists:
        """The same tiles, with half of the pairs in each hidden at random."""
        none = torch.zeros_like(self.count)
        bits = torch.randint(-(2**63), 2**63 - 1, (64, BLOCK, BLOCK // 64), device="cuda")
        slots = torch.randint(0, 64, self.index.shape, dtype=torch.int32, device="cuda")
        return TileLists(
            none, none[..., None], self.count, self.index, slots, bits, BLOCK, self.tokens
        )

    def block_mask(self) -> BlockMask:
        blocks = self.count.shape[-1]
        listed = F.pad(self.index, (0, blocks - self.index.shape[-1]))
        return BlockMask.from_kv_blocks(
            torch.zeros_like(self.count),
            torch.zeros_like(listed),
            self.count,
            listed,
            BLOCK_SIZE=BLOCK,
            seq_lengths=(self.tokens, self.tokens),
        )

    def pairs(self) -> int:
        lengths = tile_lengths(self.tokens, BLOCK, "cuda")
        return int((lengths[self.index.long()].sum(-1) * lengths).sum())

    def sampled_error(self, out: Tensor, dense: bool = False) -> float:
        """Relative error of ``out`` against float64 in some rows of every head."""
        rows = torch.linspace(0, self.tokens - 1, SAMPLED_ROWS, device="cuda").long()
        columns = torch.arange(self.tokens, device="cuda") // BLOCK
        listed = torch.zeros(
            *self.count.shape, self.count.shape[-1], dtype=torch.bool, device="cuda"
        ).scatter_(-1, self.index.long(), True)
        difference, norm = 0.0, 0.0
        for head in range(out.shape[2]):
            query, key, value = (x[:, :, head : head + 1].double() for x in self.qkv)
            mask = listed[:, head : head + 1, rows // BLOCK][..., columns] | dense
            exact, _ = masked_attention(query[:, rows], key, value, mask)
            difference += float((out[:, rows, head : head + 1] - exact).norm() ** 2)
            norm += float(exact.norm() ** 2)
        return (difference / norm) ** 0.5


def make_case(
    tokens: int,
    heads: int,
    head_size: int,
    density: float,
    device: str = "cuda",
    band: bool = False,
) -> Case:
    """Draw a case; the seed is fixed. ``band``: the tiles around each tile, as Radial visits."""
    torch.manual_seed(0)
    query, key, value = torch.randn(
        3, 1, tokens, heads, head_size, device=device, dtype=torch.bfloat16
    ).unbind()
    blocks = -(-tokens // BLOCK)
    visited = max(1, round(blocks * density))
    if band:
        first = (torch.arange(blocks, device=device) - visited // 2).clamp(0, blocks - visited)
        index = first[:, None] + torch.arange(visited, device=device)
        index = index.int().expand(1, heads, blocks, visited).contiguous()
    else:
        order = torch.rand(1, heads, blocks, blocks, device=device).argsort(-1)
        index = order[..., :visited].sort(-1).values.int().contiguous()
    count = torch.full((1, heads, blocks), visited, dtype=torch.int32, device=device)
    return Case((query, key, value), count, index)


def cudnn_dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Dense attention by cuDNN, ``[B, N, H, D]``."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        heads_first = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)


def measure(case: Case, run: Callable[[], Tensor], pairs: int, dense: bool = False) -> dict:
    """Time ``run`` and check what it returns."""
    error = case.sampled_error(run(), dense)
    milliseconds = median_ms(run)
    return {
        "ms": round(milliseconds, 3),
        "tflops": round(4 * pairs * case.qkv[0].shape[-1] / milliseconds / 1e9, 1),
        "relative_error": float(f"{error:.2e}"),
    }


def compare(tokens: int, heads: int, head_size: int, densities: list[float]) -> list[dict]:
    """One row per density: this kernel, FlexAttention and cuDNN dense at one size."""
    flex = torch.compile(flex_attention, dynamic=False)
    rows: list[dict[str, Any]] = []
    dense: dict[str, Any] = {}
    for density in densities:
        case = make_case(tokens, heads, head_size, density)
        if not dense:
            every_pair = heads * tokens * tokens
            dense = measure(case, partial(cudnn_dense, *case.qkv), every_pair, dense=True)
        block_mask = case.block_mask()
        heads_first = [x.transpose(1, 2) for x in case.qkv]

        def run_flex(heads_first=heads_first, block_mask=block_mask) -> Tensor:
            return flex(*heads_first, block_mask=block_mask).transpose(1, 2)

        ours = measure(case, partial(block_sparse_attention, *case.qkv, case.lists()), case.pairs())
        row = {
            "tokens": tokens,
            "heads": heads,
            "head_size": head_size,
            "density": density,
            "attended_share": round(case.pairs() / (heads * tokens * tokens), 4),
            "block_sparse": ours,
            "flex": measure(case, run_flex, case.pairs()),
            "cudnn_dense": dense,
            "of_cudnn_dense_rate": round(ours["tflops"] / dense["tflops"], 3),
        }
        masked = median_ms(
            partial(block_sparse_attention, *case.qkv, case.partial_lists()), repeats=3
        )
        row["all_tiles_partial_tflops"] = round(4 * case.pairs() * head_size / masked / 1e9, 1)
        rows.append(row)
        print(
            f"{tokens:7d} tokens, head size {head_size}, density {density:4}: "
            f"{ours['tflops']} TFLOP/s, flex {row['flex']['tflops']}, "
            f"cuDNN dense {dense['tflops']}, all partial {row['all_tiles_partial_tflops']}",
            flush=True,
        )
    return rows


def sweep(tokens: int, heads: int, head_size: int, density: float) -> list[dict]:
    """Every tile shape that fits, fastest first."""
    case = make_case(tokens, heads, head_size, density)
    lists = case.lists()
    rows = []
    choices = itertools.product((64, 128), (32, 64), (4, 8), (2, 3, 4), (False, True))
    for config in itertools.starmap(KernelConfig, choices):
        run = partial(block_sparse_attention, *case.qkv, lists, config=config)
        try:
            rows.append(asdict(config) | measure(case, run, case.pairs()))
        except Exception as error:  # too much shared memory, say: that is a result too
            rows.append(asdict(config) | {"failed": str(error)[:200], "tflops": 0})
        print(rows[-1], flush=True)
    return sorted(rows, key=lambda row: -row["tflops"])


def main() -> None:
    """Parse the command line, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--commit", help="commit to record; asked of git by default")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--sweep", action="store_true", help="try tile shapes at 75,600 tokens")
    args = parser.parse_args()
    result: dict[str, Any] = {"manifest": manifest(args.commit), "dense_backend": "cuDNN SDPA"}
    if args.sweep:
        result["sweep"] = {
            size: sweep(75_600, args.heads, size, density=0.25) for size in (64, 128, 256)
        }
    else:
        result["rows"] = [
            row
            for tokens, head_size in ((32_760, 128), (75_600, 128), (118_800, 128), (75_600, 64))
            for row in compare(tokens, args.heads, head_size, [1.0, 0.5, 0.25, 0.1])
        ]
    write_json(result, args.output)


if __name__ == "__main__":
    main()
