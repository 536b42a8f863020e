"""What the page's Generate button does: clips, figures, mask and snippet, without the page."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dit_accel.cli.options import parse_options
from dit_accel.demo.snippet import snippet
from dit_accel.environment import pick_device
from dit_accel.files import IMAGE_SUFFIX, VIDEO_SUFFIX, write_frames
from dit_accel.generation import (
    GenerationRequest,
    Progress,
    Result,
    generate_accelerated,
    makes_video,
)
from dit_accel.masks_png import save_mask_picture
from dit_accel.methods.base import StaticMethod
from dit_accel.models import generation_defaults, load_pipeline
from dit_accel.plan import BlockSparsePlan
from dit_accel.report import AccelerationReport


@dataclass(frozen=True)
class Outcome:
    """One press of Generate.

    Attributes:
        result: times, PSNR and the acceleration report.
        accelerated: the accelerated clip, an .mp4, or a .png of an image model.
        dense: the dense clip, if it was to be compared.
        mask: a picture of the pattern on the grid that ran; None if nothing ran sparsely, or the
            pattern depends on the values.
        code: Python that makes the accelerated clip again.
    """

    result: Result
    accelerated: Path
    dense: Path | None
    mask: Path | None
    code: str


class Runner:
    """Generates one request at a time, and keeps the last pipeline loaded.

    Its files lie in a temporary folder that goes when it does.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="dit-accel-")
        self._model: str | None = None
        self._pipe: Any = None

    def run(
        self,
        model: str,
        method: str,
        assignments: Sequence[str],
        request: GenerationRequest,
        *,
        compare: bool = True,
        progress: Progress | None = None,
    ) -> Outcome:
        """Generate a request, densely too if it is to be compared.

        Args:
            model: a bundled model, a folder or a hub id.
            method: name of the method, or several with commas.
            assignments: their options and those of `accelerate_pipeline`, as ``name=value``.
            request: what to generate; settings left out are the ones that the model recommends.
            compare: whether to generate it densely too.
            progress: told of every step.

        Raises:
            DitAccelError: if the model can't be loaded or accelerated so, or an option is wrong.
        """
        options = parse_options(method, assignments)
        defaults = generation_defaults(model)
        settings = ("steps", "guidance", "frames", "height", "width")
        missing = [name for name in settings if getattr(request, name) is None]
        request = replace(request, **{name: getattr(defaults, name) for name in missing})

        pipe = self._load(model, progress)
        result = generate_accelerated(
            pipe, request, method, options, compare=compare, progress=progress
        )
        folder = Path(tempfile.mkdtemp(dir=self._folder.name))
        suffix = VIDEO_SUFFIX if makes_video(type(pipe)) else IMAGE_SUFFIX
        accelerated, dense = folder / f"{method.replace(',', '-')}{suffix}", None
        write_frames(accelerated, result.accelerated.frames, defaults.fps)
        if result.dense is not None:
            dense = folder / f"dense{suffix}"
            write_frames(dense, result.dense.frames, defaults.fps)
        mask = draw_mask(result.report, folder / "mask.png")
        code = snippet(pipe, model, method, options, request, defaults.fps)
        return Outcome(result, accelerated, dense, mask, code)

    def _load(self, model: str, progress: Progress | None) -> Any:
        if model != self._model:
            self._model = self._pipe = None  # make room first
            if progress is not None:
                progress(f"loading {model}", 0, 1)
            self._pipe = load_pipeline(model, device=pick_device())
            self._model = model
        return self._pipe


def draw_mask(report: AccelerationReport, path: Path) -> Path | None:
    """Draw the pattern of the first sparse call in a report, if there is one and it is static."""
    plans = (call.plan for call in report.calls)
    plan = next((plan for plan in plans if isinstance(plan, BlockSparsePlan)), None)
    method = next((m for m in report.methods if isinstance(m, StaticMethod)), None)
    if plan is None or method is None:
        return None
    density = report.settings["density"]
    if density is not None:
        method = method.at_density(density, plan.layout)
    save_mask_picture(method, plan.layout, path)
    return path
