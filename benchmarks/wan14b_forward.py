"""One forward of a Wan2.1-14B-sized transformer, dense against sparse, on a GPU.

Random weights in the real configuration, a few of its forty layers; the time of all forty is
scaled from them and said to be. The step is past the dense ones, so every layer is sparse except
those that the preset keeps dense (none here: `dense_layers=0`, said in the JSON).

    python benchmarks/wan14b_forward.py --output benchmarks/results/wan14b-forward-h200.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from measuring import manifest, median_ms, write_json

from dit_accel import accelerate_pipeline, acceleration_report, restore_pipeline

REAL_LAYERS = 40
CONFIG: dict[str, Any] = {
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "ffn_dim": 13824,
    "text_dim": 4096,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
}
LATENTS = {"720p x 81": (21, 90, 160), "480p x 81": (21, 60, 104)}
METHODS: dict[str, dict[str, Any]] = {
    "radial": {"method": "radial"},
    "gna": {"method": "gna"},
    "gna density .16": {"method": "gna", "window": (1.0, 24 / 45, 24 / 80), "stride": (1, 8, 8)},
}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--compile", action="store_true", help="also with compiled blocks")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--commit")
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        transformer = WanTransformer3DModel(**CONFIG, num_layers=args.layers).eval()
    torch.set_default_dtype(torch.float32)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipe = WanPipeline(None, None, None, scheduler, transformer)
    rows = []
    for compiled in (False, True) if args.compile else (False,):
        if compiled:
            transformer.compile_repeated_blocks(fullgraph=True)
        for size, grid in LATENTS.items():
            rows += measure(pipe, size, grid, compiled, args.layers)
            print(rows[-4:], flush=True)
    result = {
        "manifest": manifest(args.commit),
        "what": "one forward, batch 1, bf16, random weights",
        "layers_measured": args.layers,
        "layers_of_the_real_model": REAL_LAYERS,
        "scaled": "forward_40_layers_s = measured_ms x 40 / layers_measured",
        "rows": rows,
    }
    write_json(result, args.output)


@torch.no_grad()
def measure(
    pipe: WanPipeline, size: str, grid: tuple[int, int, int], compiled: bool, layers: int
) -> list[dict[str, Any]]:
    """Time one latent size densely, by cuDNN and by torch's own choice, and with each method."""
    transformer = pipe.transformer
    inputs = {
        "hidden_states": torch.randn(1, 16, *grid, device="cuda", dtype=torch.bfloat16),
        "timestep": torch.tensor([500.0], device="cuda"),
        "encoder_hidden_states": torch.randn(1, 512, 4096, device="cuda", dtype=torch.bfloat16),
        "return_dict": False,
    }
    rows: list[dict[str, Any]] = []

    def add(name: str, **more: Any) -> None:
        transformer(**inputs)
        time_ms = median_ms(lambda: transformer(**inputs), repeats=3, warmup=1)
        dense_ms = min([r["measured_ms"] for r in rows if r["density"] == 1], default=time_ms)
        rows.append(
            {
                "size": size,
                "grid": [grid[0], grid[1] // 2, grid[2] // 2],
                "compiled_blocks": compiled,
                "attention": name,
                "density": 1,
                "measured_ms": time_ms,
                "forward_40_layers_s": time_ms * REAL_LAYERS / layers / 1e3,
                "speedup_over_best_dense": dense_ms / time_ms,
                **more,
            }
        )

    add("dense: torch's choice")
    transformer.set_attention_backend("_native_cudnn")
    add("dense: cuDNN")
    transformer.reset_attention_backend()
    for name, options in METHODS.items():
        accelerate_pipeline(pipe, **options, dense_steps=0, dense_layers=0)
        transformer(**inputs)
        report = acceleration_report(pipe)
        add(
            name,
            density=report.sparse_density,
            block_density=report.block_density,
            operator=report.calls[-1].operator,
            options=report.options[report.method],
        )
        restore_pipeline(pipe)
    return rows


if __name__ == "__main__":
    main()
