"""SeaCache: distances between latents, seen through the filter that a denoiser applies."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dit_accel.caching.base import check_count, check_threshold
from dit_accel.caching.gates import Accumulated, Gate
from dit_accel.caching.predictors import Predictor, Taylor
from dit_accel.caching.stack import Setting, StackCache


@dataclass(frozen=True)
class SeaCache(StackCache):
    """Reuse the whole stack while the Wiener-filtered latent has moved little.

    Args:
        threshold: reuse while the summed relative L1 distance of successive filtered latents is
            less.
        order: 1 extrapolates the residual linearly, 0 keeps it.
        power: exponent of the clean signal's assumed spectrum.
        first_steps, last_steps, max_reuses, min_steps: see `StackCache`.
    """

    name: ClassVar[str] = "seacache"
    paper: ClassVar[str] = "SeaCache, 2602.18993"
    strength: ClassVar[str] = "threshold"
    strengths: ClassVar[tuple[float, ...]] = (0.125, 0.25, 0.5)

    threshold: float = 0.25
    order: int = 1
    power: float = 3.0
    max_reuses: int | None = field(default=2, kw_only=True)

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_threshold("threshold", self.threshold)
        check_count("order", self.order, 0)

    def gate(self, setting: Setting) -> Gate:
        """Compare successive filtered latents."""
        return Accumulated(
            lambda look: wiener_filter(look.volume, look.sigma, self.power), self.threshold
        )

    def predictor(self, setting: Setting) -> Predictor:
        """Keep or extrapolate the residual, as far as reuses go."""
        return Taylor(self.order, horizon=max(self.max_reuses or 3, 1))


def wiener_filter(volume: Tensor, sigma: float, power: float) -> Tensor:
    """Filter ``[B, T, H, W, C]`` as an optimal denoiser would; float32 ``[B, T, H, W, C]``.

    Per axis the gain is (1 - sigma) P / ((1 - sigma)^2 P + sigma^2) with P = 1 / |f|^power; the
    product over the axes is scaled to a mean of 1.
    """
    sigma = min(max(sigma, 1e-6), 1 - 1e-6)
    gain = torch.ones((), device=volume.device)
    for axis, length in enumerate(volume.shape[1:4]):
        frequency = torch.fft.fftfreq(length, device=volume.device)
        clean = 1 / (frequency.abs() ** power + 1e-16)
        along = (1 - sigma) * clean / ((1 - sigma) ** 2 * clean + sigma**2 + 1e-16)
        gain = gain * along.view([-1 if i == axis else 1 for i in range(3)])
    gain = (gain / gain.mean())[None, ..., None]
    spectrum = torch.fft.fftn(volume.float(), dim=(1, 2, 3))
    return torch.fft.ifftn(spectrum * gain, dim=(1, 2, 3)).real
