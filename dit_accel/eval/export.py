"""Laying out videos for VBench's own tool: its file names, and its list of prompts."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from dit_accel.errors import OptionError, VideoError
from dit_accel.eval.clips import Clip
from dit_accel.eval.vbench import CUSTOM_DIMENSIONS, video_name
from dit_accel.files import replacing, write_text

VIDEOS, PROMPTS = "videos", "prompts.json"
LONGEST_NAME = 240  # bytes; file systems allow 255, and a file is first written under a longer one


def export_clips(clips: Sequence[Clip], folder: Path) -> tuple[str, list[str]]:
    """Copy clips to ``folder/videos`` under VBench's names, and write ``folder/prompts.json``.

    A prompt that no file can be called after gets a number instead; ``prompts.json`` has it whole.

    Args:
        clips: with their prompts; the order of equal ones gives their number.
        folder: is made; its ``videos`` must be empty.

    Returns:
        The command that measures them with VBench's tool, and a sentence for each clip that could
        not be copied.

    Raises:
        OptionError: if ``folder/videos`` holds something.
        OSError: if nothing can be written there.
    """
    videos = folder / VIDEOS
    if videos.exists() and any(videos.iterdir()):
        raise OptionError(f"{str(videos)!r} isn't empty: give another output.")
    videos.mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}
    prompts: dict[str, str] = {}
    problems = []
    for number, clip in enumerate(clips):
        sample = counts.get(clip.prompt, 0)
        name = video_name(clip.prompt, sample, clip.path.suffix)
        if not clip.prompt or "/" in name or len(name.encode()) > LONGEST_NAME:
            name = video_name(f"clip-{number:04}", sample, clip.path.suffix)
        try:
            _copy(clip.path, videos / name)
        except VideoError as error:
            problems.append(str(error))
            continue
        counts[clip.prompt] = sample + 1
        prompts[name] = clip.prompt
    write_text(folder / PROMPTS, json.dumps(prompts, indent=1, ensure_ascii=False) + "\n")
    command = (
        f"vbench evaluate --videos_path {shlex.quote(str(videos))} "
        f"--prompt_file {shlex.quote(str(folder / PROMPTS))} --mode custom_input "
        f"--dimension {' '.join(CUSTOM_DIMENSIONS)}"
    )
    return command, problems


def _copy(source: Path, target: Path) -> None:
    if not source.is_file():
        raise VideoError(f"{source}: there is no such file.")
    if not source.stat().st_size:
        raise VideoError(f"{source}: the file is empty.")
    with replacing(target) as partial:
        shutil.copyfile(source, partial)
