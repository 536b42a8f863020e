"""What the drawn worlds are made of: colours, shapes, textures, patterns, and words for them.

Lengths are in frame widths and heights (0 to 1), colours in [0, 1].
"""

from __future__ import annotations

from torch import Tensor

RGB = tuple[float, float, float]

# Each colour has two tones: the second fills the stripes, dots and squares of a texture.
COLOURS: dict[str, tuple[RGB, RGB]] = {
    "red": ((0.90, 0.10, 0.10), (1.00, 0.60, 0.55)),
    "green": ((0.10, 0.80, 0.15), (0.62, 0.98, 0.60)),
    "blue": ((0.15, 0.30, 0.98), (0.55, 0.72, 1.00)),
    "yellow": ((0.97, 0.90, 0.10), (0.60, 0.56, 0.00)),
    "orange": ((0.98, 0.52, 0.05), (1.00, 0.78, 0.42)),
    "cyan": ((0.10, 0.88, 0.92), (0.02, 0.48, 0.52)),
    "magenta": ((0.92, 0.15, 0.85), (1.00, 0.65, 0.97)),
    "white": ((0.97, 0.97, 0.97), (0.76, 0.76, 0.80)),
}
BACKGROUNDS: dict[str, RGB] = {
    "black": (0.03, 0.03, 0.03),
    "gray": (0.40, 0.40, 0.40),
    "dark blue": (0.05, 0.07, 0.34),
    "dark green": (0.03, 0.26, 0.08),
    "brown": (0.33, 0.18, 0.08),
    "purple": (0.27, 0.07, 0.38),
}
SIZES = {"small": 0.12, "large": 0.215}  # radius
SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
TEXTURES = ("plain", "striped", "dotted", "checkered")
PATTERNS = ("plain", "striped", "checkered", "dotted", "cloudy")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SYNONYMS = {
    "circle": ("ball", "disc"),
    "square": ("box",),
    "cross": ("plus",),
    "ring": ("donut",),
    "small": ("little", "tiny"),
    "large": ("big",),
    "spinning": ("rotating",),
    "growing": ("expanding",),
    "staying still": ("not moving", "static"),
    "moving": ("sliding", "going"),
    "gray": ("grey",),
    "dotted": ("spotted",),
    "checkered": ("checked",),
}


def second_tone(rgb: Tensor) -> Tensor:
    """The lighter tone of a background's pattern."""
    return (rgb * 1.2 + 0.1).clamp(max=1)
