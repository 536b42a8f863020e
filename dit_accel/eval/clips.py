"""Which videos a folder holds, and the prompt of each: by VBench's naming, a list, or a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel.errors import OptionError, did_you_mean
from dit_accel.eval.vbench import prompt_of
from dit_accel.eval.videos import IMAGE_SUFFIXES, VIDEO_SUFFIXES

RESULTS_FILE = "results.json"


@dataclass(frozen=True)
class Clip:
    """One video or picture, and what it was to show."""

    path: Path
    prompt: str


def find_clips(folder: Path, *, prompts: Path | None = None) -> list[Clip]:
    """Return the videos and pictures that lie in ``folder``, by name.

    Args:
        folder: of the files.
        prompts: a .json with the prompt of each by its file name; None takes it from the name, as
            in "a red circle-0.mp4".

    Raises:
        OptionError: if there is no such folder, it holds none, or ``prompts`` can't be read or
            names a file that isn't there.
    """
    if not folder.is_dir():
        raise OptionError(f"{str(folder)!r} is no folder.")
    suffixes = VIDEO_SUFFIXES + IMAGE_SUFFIXES
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in suffixes and p.is_file())
    if not paths:
        raise OptionError(f"{str(folder)!r} holds no videos ({', '.join(suffixes)}).")
    if prompts is None:
        return [Clip(path, prompt_of(path)) for path in paths]
    listed = _read_prompts(prompts)
    names = {path.name for path in paths}
    for name in listed:
        if name not in names:
            raise OptionError(
                f"{str(prompts)!r} names {name!r}, which isn't in {str(folder)!r}."
                f"{did_you_mean(name, names) if len(names) < 20 else ''}"
            )
    return [Clip(path, listed.get(path.name, "")) for path in paths]


def find_run_clips(folder: Path) -> dict[str, list[Clip]]:
    """Return the clips of a run of ``dit-accel eval``, by method.

    Raises:
        OptionError: if its ``results.json`` isn't there or isn't that of a run.
    """
    path = folder / RESULTS_FILE
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        clips: dict[str, list[Clip]] = {}
        for row in rows:
            clips.setdefault(row["method"], []).append(Clip(folder / row["clip"], row["prompt"]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise OptionError(f"{str(path)!r} is no result of a run: {error!r}") from error
    if not clips:
        raise OptionError(f"{str(path)!r} lists no clips.")
    return clips


def _read_prompts(path: Path) -> Mapping[str, str]:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"prompts {str(path)!r} can't be read: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(x, str) for x in content.values()):
        raise OptionError(f"prompts {str(path)!r} must map file names to prompts.")
    return {Path(name).name: prompt for name, prompt in content.items()}
