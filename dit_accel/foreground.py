"""Ways to tell foreground from background in what a transformer predicts, for `profiler`.

ProfilingDiT (arXiv 2504.03140) shows the predicted velocity's first three principal components to
SAM2 as a picture. That needs SAM2's weights; two ways without any come first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.errors import OptionError, did_you_mean

MaskFunction = Callable[[Tensor], Tensor]
"""Finds the foreground: velocity ``[T, H, W, C]`` in, bool ``[T, H, W]`` out."""

SAM2 = "facebook/sam2.1-hiera-tiny"
"""Weights that "sam2" takes, from the Hugging Face hub or its local cache."""


def foreground_by_colour(velocity: Tensor) -> Tensor:
    """Split the first principal component by Otsu's threshold; the smaller side is foreground."""
    centred = velocity.flatten(0, 2).float()
    centred = centred - centred.mean(0)
    component = torch.linalg.eigh(centred.T @ centred)[1][:, -1]
    return _smaller_side(centred @ component).view(velocity.shape[:3])


def foreground_by_motion(velocity: Tensor) -> Tensor:
    """Split the variance over time, of each place; all frames share one mask."""
    variance = velocity.float().var(0, unbiased=False).mean(-1)
    return _smaller_side(variance.flatten()).view(variance.shape).expand(velocity.shape[:3])


def _smaller_side(values: Tensor) -> Tensor:
    over = values > otsu(values)
    return over if over.sum() * 2 <= len(values) else ~over


def otsu(values: Tensor, bins: int = 128) -> float:
    """Return the threshold between the two classes of ``values`` that differ most."""
    low, high = float(values.min()), float(values.max())
    if low == high:
        return high
    counts = torch.histc(values.float().cpu(), bins, low, high).double()
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)
    centres = (edges[1:] + edges[:-1]) / 2
    below, mass = counts.cumsum(0), (counts * centres).cumsum(0)
    above = below[-1] - below
    between = below * above * (mass / below - (mass[-1] - mass) / above) ** 2
    return float(edges[1:][between.nan_to_num().argmax()])


class Sam2Foreground:
    """Lets SAM2 (arXiv 2408.00714) outline the thing that the colour split points at, per frame.

    The paper does not say how SAM2 is prompted. Here each frame has one point on the foreground
    and one on the background: where `foreground_by_colour` is densest.

    Args:
        model: a folder or hub id of SAM2 weights for transformers.
        device: where it runs.

    Raises:
        OptionError: if transformers is too old, or the weights can't be had.
    """

    def __init__(self, model: str = SAM2, device: str | torch.device = "cpu") -> None:
        try:
            from transformers import Sam2Model
        except ImportError as error:
            raise OptionError(
                "mask 'sam2' needs transformers 4.56 or newer: upgrade it, or take mask='colour'."
            ) from error
        try:
            self.model = Sam2Model.from_pretrained(model).to(device).eval()
        except (OSError, ValueError) as error:
            raise OptionError(
                f"SAM2's weights {model!r} can't be loaded ({str(error).splitlines()[0]}): give a "
                f"folder to Sam2Foreground, put {SAM2} into the local cache, or take mask='colour'."
            ) from error

    @torch.no_grad()
    def __call__(self, velocity: Tensor) -> Tensor:
        """Return the foreground of ``[T, H, W, C]``, bool ``[T, H, W]``."""
        size = self.model.config.vision_config.backbone_config.image_size[0]
        device = next(self.model.parameters()).device
        pictures = as_pictures(velocity).to(device)
        pixels = F.interpolate(pictures, (size, size), mode="bilinear", align_corners=False)
        mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in IMAGENET)
        points, labels = prompt_points(foreground_by_colour(velocity), size)
        masks = []
        for frame in range(len(pixels)):
            out = self.model(
                pixel_values=(pixels[frame : frame + 1] - mean) / std,
                input_points=points[frame : frame + 1, None].to(device),
                input_labels=labels[None, None].to(device),
            )
            masks.append(out.pred_masks[0, 0, out.iou_scores[0, 0].argmax()])
        logits = torch.stack(masks)[:, None].float()
        small = F.interpolate(logits, velocity.shape[1:3], mode="area")[:, 0]
        return small > 0


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation of what SAM2 saw


def as_pictures(velocity: Tensor) -> Tensor:
    """Return the first three principal components of ``[T, H, W, C]`` as ``[T, 3, H, W]``.

    Each channel is stretched so that its middle 98 % fill [0, 1].
    """
    flat = velocity.flatten(0, 2).float()
    flat = flat - flat.mean(0)
    axes = torch.linalg.eigh(flat.T @ flat)[1].flip(-1)[:, :3]
    channels = F.pad(flat @ axes, (0, max(3 - axes.shape[1], 0)))
    sample = channels[:: max(len(channels) // 100_000, 1)]
    low, high = (torch.quantile(sample, q, dim=0) for q in (0.01, 0.99))
    stretched = ((channels - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)
    return stretched.view(*velocity.shape[:3], 3).movedim(-1, 1)


def prompt_points(foreground: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return a point on the foreground and one on the background of each frame, and their labels.

    Points ``[T, 2, 2]`` are (x, y) in a picture of ``size`` x ``size``; labels are 1 and 0.
    """
    height, width = foreground.shape[1:]
    points = []
    for mask in (foreground, ~foreground):
        dense = F.avg_pool2d(mask[:, None].float(), 5, stride=1, padding=2)
        at = dense.flatten(1).argmax(1)
        x, y = at % width, at // width
        points.append(torch.stack([(x + 0.5) * size / width, (y + 0.5) * size / height], -1))
    return torch.stack(points, 1), torch.tensor([1, 0])


MASKS: Mapping[str, Callable[[], MaskFunction]] = {
    "colour": lambda: foreground_by_colour,
    "motion": lambda: foreground_by_motion,
    "sam2": lambda: Sam2Foreground(device="cuda" if torch.cuda.is_available() else "cpu"),
}
"""What makes each of the named ways; SAM2 is loaded only when it is asked for."""


def mask_function(name: str) -> MaskFunction:
    """Return the way called ``name``.

    Raises:
        OptionError: if there is none, or it needs what is not there.
    """
    if name not in MASKS:
        raise OptionError(f"unknown mask {name!r}.{did_you_mean(str(name), MASKS)}")
    return MASKS[name]()
