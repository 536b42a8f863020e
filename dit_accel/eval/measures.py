"""The measures of one sample by name: what to call them, and how they were taken."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    "psnr_db": "mean over frames, at most 100 a frame",
    "psnr_pooled_db": "of the mean squared error of all frames",
    "psnr_worst_db": "of the worst frame",
    "ssim": "Gaussian 11 x 11, sigma 1.5, whole windows, mean over colours and frames",
    "lpips": "AlexNet, version 0.1, on [-1, 1]",
    "latent_relative_l1": "sum of absolute errors over sum of magnitudes, of the last latents",
    "temporal_difference_error": "mean absolute error of the change from frame to frame",
    "following": "share of the prompt's attributes that the drawn world's checker finds",
    "interval": "95 % bootstrap interval of the mean over prompts, 10,000 draws",
    "generate_s": "seconds per sample of a batch's whole pipeline call, text and decoding included",
    "step_s": "seconds per sample and denoising step",
    "energy_j": "joules per sample, of the whole GPU",
}


def value_of(row: Mapping[str, Any], metric: str) -> float | None:
    """Return one measure of a sample's row, or None if it was not taken."""
    value = row.get("fidelity", {}).get(metric, row.get(metric))
    return None if value is None else float(value)
