"""How well a bundled model follows prompts: its world's fixed ones, generated and read back.

The i-th prompt always starts from seed i, drawn on the CPU, so a model's figures can be had again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dit_accel.acceleration import accelerate_pipeline, acceleration_report
from dit_accel.environment import environment
from dit_accel.errors import OptionError
from dit_accel.eval.contact_sheet import ContactSheet
from dit_accel.eval.settings import ModelSettings
from dit_accel.files import write_text
from dit_accel.generation import (
    GenerationRequest,
    Progress,
    generate_batch,
    makes_video,
    pipeline_arguments,
)
from dit_accel.journal import as_read_back, refuse_other
from dit_accel.models import generation_defaults, load_pipeline, pipeline_class, pipeline_outline
from dit_accel.world.worlds import fixed_prompts, make_reader, shares_right

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class FollowingRun(ModelSettings):
    """What to measure prompt following of, beside the settings of a model of a drawn world.

    Attributes:
        prompts: only the first so many; None takes all.
        method: a method, or several with commas; "dense" without options leaves the pipeline as
            it is.
        options: keyword arguments for `accelerate_pipeline`.

    Raises:
        OptionError: if a number is impossible, or the model belongs to no drawn world.
    """

    prompts: int | None = None
    method: str = "dense"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check what can be checked without the model."""
        self.check_counts("prompts", "batch")
        self.requests()

    @property
    def world(self) -> str:
        """The drawn world that the model was trained on."""
        world = generation_defaults(self.model).world
        if world is None:
            raise OptionError(
                f"model {self.model!r} belongs to no drawn world, so nothing can read what it "
                "draws: take a bundled model."
            )
        return world

    def entries(self) -> list[dict[str, Any]]:
        """Return the fixed prompts to generate, with what their scenes hold."""
        return fixed_prompts(self.world)[: self.prompts]

    def requests(self) -> list[GenerationRequest]:
        """Return what to generate for each of them."""
        return [self.request(entry["prompt"], i) for i, entry in enumerate(self.entries())]

    def settings(self) -> Row:
        """Return all that a prompt's row depends on, ready for JSON."""
        about = {"world": self.world, "method": self.method, "options": dict(self.options)}
        return self.described() | as_read_back(about)


def measure_following(
    run: FollowingRun,
    *,
    output: Path | None = None,
    sheet: Path | None = None,
    restart: bool = False,
    progress: Progress | None = None,
) -> Row:
    """Generate the fixed prompts and return which of their attributes come out.

    Args:
        run: what to measure.
        output: a .json that is written after every batch. Prompts that it already holds are kept.
        sheet: a .png with small pictures of all generations, written likewise.
        restart: start ``output`` and ``sheet`` again.
        progress: told of every prompt and step.

    Returns:
        "settings", "environment", "following" (shares of right attributes) and "rows", one a
        prompt: "marks" (per kind whether each attribute is right), "seen" (what was read),
        "generate_s", and "density" if the pipeline was accelerated.

    Raises:
        OptionError: if ``output`` was made with other settings, or ``sheet`` doesn't show what it
            holds, or the pipeline can't make that size.
        DitAccelError: if the model can't be loaded or accelerated so.
    """
    content: Row = {"settings": run.settings(), "environment": environment(run.device)}
    content |= {"following": {}, "rows": []}
    if output is not None and output.exists() and not restart:
        content = _read_output(output, content["settings"])
    rows: list[Row] = content["rows"]
    entries, requests = run.entries(), run.requests()
    video = makes_video(pipeline_class(run.model))
    pictures = ContactSheet(sheet, video=video, kept=len(rows)) if sheet else None
    if len(rows) >= len(entries):
        return content

    outline = pipeline_outline(run.model)
    if outline is not None:
        pipeline_arguments(outline, requests[0])  # refuses what this pipeline can't make
    if progress is not None:
        progress(f"loading {run.model}", 0, 1)
    pipe: Any = load_pipeline(run.model, device=run.device, dtype=run.dtype)
    if progress is not None:
        progress(f"loading {run.model}", 1, 1)
        progress("prompts", len(rows), len(entries))
    accelerated = run.method != "dense" or bool(run.options)
    if accelerated:
        accelerate_pipeline(pipe, run.method, **run.options)
    reader = make_reader(run.world, run.device)
    for start in range(len(rows), len(entries), run.batch):
        batch = requests[start : start + run.batch]
        began = time.perf_counter()
        generated = generate_batch(pipe, batch, progress=progress).frames.float()
        shared: Row = {"generate_s": round((time.perf_counter() - began) / len(batch), 2)}
        if accelerated:
            shared["density"] = acceleration_report(pipe).density
        for request, entry, frames in zip(batch, entries[start:], generated, strict=False):
            marks = reader(frames, entry)
            seen = marks.pop("seen")
            about = {"prompt": request.prompt, "seed": request.seed}
            rows.append({**about, "marks": marks, "seen": seen, **shared})
            if pictures is not None:
                pictures.add(frames)
        content["following"] = shares_right(row["marks"] for row in rows)
        if pictures is not None:
            pictures.write()
        if output is not None:
            write_text(output, json.dumps(content, indent=1, allow_nan=False) + "\n")
        if progress is not None:
            progress("prompts", len(rows), len(entries))
    return content


def _read_output(path: Path, settings: Row) -> Row:
    """Return what an earlier run wrote, if it was made with these settings."""
    try:
        content: Row = json.loads(path.read_text(encoding="utf-8"))
        earlier, _ = content["settings"], content["rows"]
    except (ValueError, TypeError, KeyError):
        raise OptionError(
            f"output {str(path)!r} is no result of `eval follow`: give another name, or --force "
            "to replace it."
        ) from None
    refuse_other(path, earlier, settings)
    return content
