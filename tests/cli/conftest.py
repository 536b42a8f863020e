"""Tiny pipelines saved to disk, and the command line run in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_pipelines import tiny_sd3, tiny_wan

from dit_accel.cli import main


@dataclass(frozen=True)
class Ran:
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def dit_accel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ran]:
    """Run ``dit-accel ARGUMENTS...`` in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> Ran:
        with pytest.raises(SystemExit) as exit_info:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ran(int(exit_info.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a model is loaded."""
    from diffusers import DiffusionPipeline

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", refuse)


@pytest.fixture(scope="session")
def video_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny Wan pipeline with recommended settings."""
    folder = tmp_path_factory.mktemp("models") / "video"
    tiny_wan().save_pretrained(folder)
    (folder / "dit_accel.json").write_text(
        '{"steps": 3, "frames": 9, "height": 112, "width": 144, "guidance": 3.0, "fps": 8}'
    )
    return folder


@pytest.fixture(scope="session")
def image_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny Stable Diffusion 3 pipeline."""
    folder = tmp_path_factory.mktemp("models") / "image"
    tiny_sd3().save_pretrained(folder)
    return folder
