"""How close an accelerated generation is to the dense one: paired measures of frames and latents.

Frames are compared before any encoding, as floats ``[T, 3, H, W]`` in [0, 1], RGB. Floats do not
wrap around as the difference of 8-bit pixels does, and SSIM looks at whole windows only, so a
border that was padded with zeros in both pictures doesn't count as likeness.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.errors import OptionError, did_you_mean
from dit_accel.eval.lpips import Lpips, installed_lpips

LEAST_ERROR = 1e-10  # mean squared error of frames that count as equal: 100 dB


@dataclass(frozen=True, kw_only=True)
class Convention:
    """How a paper's evaluation script computes its numbers.

    Attributes:
        window: of SSIM: "gaussian" (11 x 11, sigma 1.5) or a box.
        size: side of the window in pixels.
        padding: zeros around the frame, in pixels; 0 looks at whole windows only.
        grey: compare luminance instead of each colour.
        unbiased: divide variances by n - 1.
        eight_bit: round frames to 8 bits first.
        lpips_net: the network of LPIPS.
        lpips_low: what LPIPS is given for black; it was trained with -1.
        lpips_bgr: whether LPIPS is given blue, green, red.
    """

    window: Literal["gaussian", "box"] = "gaussian"
    size: int = 11
    padding: int = 0
    grey: bool = False
    unbiased: bool = False
    eight_bit: bool = False
    lpips_net: Literal["alex", "vgg", "squeeze"] = "alex"
    lpips_low: float = -1.0
    lpips_bgr: bool = False


CONVENTIONS = MappingProxyType(
    {
        "ours": Convention(),
        "teacache": Convention(),
        "fastvideo": Convention(padding=5),
        "svg": Convention(window="box", padding=5, lpips_net="vgg", lpips_low=0.0),
        "rectified": Convention(
            window="box",
            size=7,
            grey=True,
            unbiased=True,
            eight_bit=True,
            lpips_low=0.0,
            lpips_bgr=True,
        ),
    }
)
"""Conventions by name. All but "ours" and "rectified" were applied to decoded .mp4 files."""


def fidelity(
    actual_frames: Tensor,
    dense_frames: Tensor,
    *,
    actual_latents: Tensor | None = None,
    dense_latents: Tensor | None = None,
    convention: str = "ours",
    lpips: Lpips | Literal["auto"] | None = "auto",
) -> dict[str, float]:
    """Return how close frames are to those of the dense run.

    Args:
        actual_frames: float ``[T, 3, H, W]`` in [0, 1], RGB; an image has T = 1.
        dense_frames: of the same shape.
        actual_latents: final latents of any shape, before the autoencoder.
        dense_latents: of the same shape.
        convention: one of `CONVENTIONS`, to stand beside a paper's numbers.
        lpips: what `load_lpips` returned (load it once for many videos); "auto" loads it if
            packages and weights are here; None leaves it out.

    Returns:
        "psnr_db", the mean over frames, "psnr_pooled_db", of one mean squared error over all
        frames, and "psnr_worst_db", of the worst frame, all at most 100; "ssim";
        "temporal_difference_error", see `temporal_difference_error`; "lpips" if it was loaded;
        "latent_relative_l1" if latents are given.

    Raises:
        OptionError: if shapes differ or are no frames, no convention has that name, latents are
            given for one side only, or frames are smaller than SSIM's window.
    """
    rules = find_convention(convention)
    _check_frames("fidelity", actual_frames, dense_frames)
    if (actual_latents is None) != (dense_latents is None):
        raise OptionError("fidelity compares latents of both runs: give both or neither.")
    actual, dense = (_as_measured(x, rules) for x in (actual_frames, dense_frames))
    errors = (actual.double() - dense.double()).square().flatten(1).mean(1)
    decibels = -10 * errors.clamp(min=LEAST_ERROR).log10()
    measured = {
        "psnr_db": float(decibels.mean()),
        "psnr_pooled_db": float(-10 * errors.mean().clamp(min=LEAST_ERROR).log10()),
        "psnr_worst_db": float(decibels.min()),
        "ssim": ssim(actual, dense, convention=convention),
        "temporal_difference_error": temporal_difference_error(actual, dense),
    }
    if lpips == "auto":
        lpips = installed_lpips(rules.lpips_net, actual.device)
    if lpips is not None:
        measured["lpips"] = _lpips(lpips, actual, dense, rules)
    if actual_latents is not None and dense_latents is not None:
        measured["latent_relative_l1"] = relative_l1(actual_latents, dense_latents)
    return measured


def find_convention(name: str) -> Convention:
    """Return the convention called ``name``.

    Raises:
        OptionError: if there is none; the message names the nearest.
    """
    if name not in CONVENTIONS:
        raise OptionError(f"unknown convention {name!r}.{did_you_mean(name, CONVENTIONS)}")
    return CONVENTIONS[name]


def psnr(first: Tensor, second: Tensor) -> float:
    """Return the peak signal-to-noise ratio of two float tensors in [0, 1], in dB.

    One mean squared error over all elements, frames included; ``math.inf`` if they are equal.

    Raises:
        OptionError: if the shapes differ.
    """
    _check_shapes("psnr", first, second)
    error = (first.double() - second.double()).square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(first: Tensor, second: Tensor, *, convention: str = "ours") -> float:
    """Return the mean structural similarity of frames ``[T, 3, H, W]`` in [0, 1].

    Windows of 11 x 11 pixels under a Gaussian of sigma 1.5, whole windows only, averaged over
    places, colours and frames (Wang et al. 2004, K = 0.01 and 0.03).

    Raises:
        OptionError: if the shapes differ or are no frames, or a frame is smaller than a window.
    """
    rules = find_convention(convention)
    _check_frames("ssim", first, second)
    if min(first.shape[-2:]) + 2 * rules.padding < rules.size:
        raise OptionError(
            f"ssim needs frames of at least {rules.size - 2 * rules.padding} x "
            f"{rules.size - 2 * rules.padding} pixels, got {first.shape[-2]} x {first.shape[-1]}."
        )
    # Frame by frame: the five filtered pictures of a long video would fill memory.
    values = [_frame_ssim(a, b, rules) for a, b in zip(first, second, strict=True)]
    return math.fsum(values) / len(values)


def relative_l1(actual: Tensor, expected: Tensor) -> float:
    """Return ``sum |actual - expected| / sum |expected|``, of latents for instance.

    Raises:
        OptionError: if the shapes differ.
    """
    _check_shapes("relative_l1", actual, expected)
    difference = (actual.double() - expected.double()).abs().sum()
    return float(difference / expected.double().abs().sum())


def temporal_difference_error(actual: Tensor, dense: Tensor) -> float:
    """Return the mean absolute error of the change from frame to frame; 0 for a single frame.

    A flicker that the dense video doesn't have shows here, and a constant shift of colour doesn't.

    Args:
        actual: ``[T, ...]``.
        dense: of the same shape.

    Raises:
        OptionError: if the shapes differ.
    """
    _check_shapes("temporal_difference_error", actual, dense)
    if len(actual) < 2:
        return 0.0
    return float((actual.double().diff(dim=0) - dense.double().diff(dim=0)).abs().mean())


def _as_measured(frames: Tensor, rules: Convention) -> Tensor:
    return (frames.clamp(0, 1) * 255).round() / 255 if rules.eight_bit else frames


def _frame_ssim(first: Tensor, second: Tensor, rules: Convention) -> float:
    """Return SSIM of one frame ``[3, H, W]``."""
    a, b = first.double()[:, None], second.double()[:, None]  # colours are filtered alike
    if rules.grey:
        luminance = torch.tensor([0.299, 0.587, 0.114], dtype=a.dtype, device=a.device)
        a, b = (torch.einsum("c,cnhw->nhw", luminance, x)[:, None] for x in (a, b))
        if rules.eight_bit:
            a, b = ((x * 255).round() / 255 for x in (a, b))
    line = torch.ones(rules.size, dtype=a.dtype, device=a.device)
    if rules.window == "gaussian":
        offset = torch.arange(rules.size, dtype=a.dtype, device=a.device) - rules.size // 2
        line = torch.exp(-(offset**2) / (2 * 1.5**2))
    line = line / line.sum()

    def local_mean(x: Tensor) -> Tensor:
        x = F.conv2d(x, line.view(1, 1, -1, 1), padding=(rules.padding, 0))
        return F.conv2d(x, line.view(1, 1, 1, -1), padding=(0, rules.padding))

    count = rules.size**2
    scale = count / (count - 1) if rules.unbiased else 1.0
    mean_a, mean_b = local_mean(a), local_mean(b)
    variance_a = scale * (local_mean(a * a) - mean_a * mean_a)
    variance_b = scale * (local_mean(b * b) - mean_b * mean_b)
    covariance = scale * (local_mean(a * b) - mean_a * mean_b)
    c1, c2 = 0.01**2, 0.03**2
    likeness = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    likeness /= (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
    return float(likeness.mean())


def _lpips(distance: Lpips, first: Tensor, second: Tensor, rules: Convention) -> float:
    def prepared(frame: Tensor) -> Tensor:
        if rules.lpips_bgr:
            frame = frame.flip(0)
        return (rules.lpips_low + (1 - rules.lpips_low) * frame.float())[None]

    values = [float(distance(prepared(a), prepared(b))) for a, b in zip(first, second, strict=True)]
    return math.fsum(values) / len(values)


def _check_shapes(name: str, first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape:
        raise OptionError(
            f"{name} compares equal shapes, got {tuple(first.shape)} and {tuple(second.shape)}."
        )


def _check_frames(name: str, first: Tensor, second: Tensor) -> None:
    _check_shapes(name, first, second)
    if first.dim() != 4 or first.shape[1] != 3 or not first.numel():
        raise OptionError(f"{name} compares frames [T, 3, H, W], got {tuple(first.shape)}.")
    if not (first.is_floating_point() and second.is_floating_point()):
        raise OptionError(
            f"{name} compares float frames in [0, 1], got {first.dtype} and {second.dtype}: "
            "divide 8-bit pixels by 255."
        )
