"""What is measured of one sample: the place where a run and its reports take their metrics from."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from dit_accel.eval.fidelity import psnr, relative_l1, ssim

PSNR_CAP_DB = 100.0

METRICS: Mapping[str, tuple[str, bool]] = {
    "psnr_db": ("PSNR, dB", True),
    "psnr_pooled_db": ("PSNR of all frames' error, dB", True),
    "psnr_worst_db": ("PSNR of the worst frame, dB", True),
    "ssim": ("SSIM", True),
    "lpips": ("LPIPS", False),
    "latent_relative_l1": ("relative L1 of latents", False),
    "temporal_difference_error": ("error of frame differences", False),
    "following": ("follows", True),
}
"""Measures of a sample: what to call them, and whether more is better."""

CONVENTIONS: Mapping[str, str] = {
    "frames": "float RGB in [0, 1], before any encoding, against the dense baseline's",
    "psnr_db": f"mean over frames, at most {PSNR_CAP_DB:g} a frame",
    "ssim": "Gaussian 11 x 11, sigma 1.5, mean over channels and frames",
    "following": "share of the prompt's attributes that the drawn world's checker finds",
    "interval": "95 % bootstrap interval of the mean over prompts, 10,000 draws",
    "generate_s": "seconds per sample of a batch's whole pipeline call, text and decoding included",
    "step_s": "seconds per sample and denoising step",
    "energy_j": "joules per sample, of the whole GPU",
}


def fidelity_to_dense(
    frames: Tensor, dense_frames: Tensor, latents: Tensor, dense_latents: Tensor
) -> dict[str, float]:
    """Return how close a sample is to the dense baseline's, by names in `METRICS`.

    Args:
        frames: float ``[T, 3, H, W]`` in [0, 1].
        dense_frames: likewise.
        latents: of the last step.
        dense_latents: likewise.

    Raises:
        OptionError: if the shapes differ.
    """
    pairs = zip(frames, dense_frames, strict=True)
    per_frame = [min(psnr(one, other), PSNR_CAP_DB) for one, other in pairs]
    with torch.backends.cudnn.flags(allow_tf32=False):  # SSIM's windows are a convolution
        similarity = ssim(frames, dense_frames)
    return {
        "psnr_db": fmean(per_frame),
        "psnr_pooled_db": min(psnr(frames, dense_frames), PSNR_CAP_DB),
        "psnr_worst_db": min(per_frame),
        "ssim": similarity,
        "latent_relative_l1": relative_l1(latents, dense_latents),
    }


def value_of(row: Mapping[str, Any], metric: str) -> float | None:
    """Return one measure of a sample's row, or None if it was not taken."""
    value = row.get("fidelity", {}).get(metric, row.get(metric))
    return None if value is None else float(value)
