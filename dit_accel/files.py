"""Writing results: refused before any work is done, and never left half-written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from dit_accel.errors import OptionError

VIDEO_SUFFIX, IMAGE_SUFFIX = ".mp4", ".png"


def check_outputs(paths: Iterable[Path], *, force: bool) -> None:
    """Raise `OptionError` if a path can't be written, or exists and ``force`` is not given."""
    for path in paths:
        if path.is_dir():
            raise OptionError(f"output {str(path)!r} is a folder: name a file in it.")
        if path.exists() and not force:
            raise OptionError(
                f"output {str(path)!r} exists: give another name, or --force to replace it."
            )
        folder = path.absolute().parent
        while not folder.exists():
            folder = folder.parent
        if not folder.is_dir():
            raise OptionError(f"output {str(path)!r}: {str(folder)!r} is no folder.")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OptionError(f"output {str(path)!r}: folder {str(folder)!r} is not writable.")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside ``path`` that takes its place if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o666 & ~_umask())  # mkstemp makes files that only their owner can read
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_frames(path: Path, frames: Tensor, fps: int) -> None:
    """Write a video (.mp4) or the only frame of an image (.png).

    Args:
        path: its suffix says which.
        frames: float ``[T, 3, H, W]`` in [0, 1].
        fps: frames per second of a video.
    """
    pixels = (frames.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    with replacing(path) as partial:
        if path.suffix.lower() == IMAGE_SUFFIX:
            from PIL import Image

            Image.fromarray(pixels[0]).save(partial)
            return
        import imageio.v2 as imageio

        options: dict[str, Any] = {"fps": fps, "quality": 8, "macro_block_size": 2}
        imageio.mimwrite(partial, list(pixels), **options)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
