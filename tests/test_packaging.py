"""The wheel holds the whole package and nothing else, and works outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from dit_accel.models import list_models

ROOT = Path(__file__).parents[1]
MAX_WEIGHT_BYTES = 95 * 10**6  # of all bundled models together


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel in a fresh environment and return its folder of commands."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=False, symlinks=True)
    commands = folder / ("Scripts" if os.name == "nt" else "bin")
    python = commands / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel)
    # Dependencies come from this environment. Paths named in a .pth file are searched last, and
    # their own .pth files are not read, so an editable install of this checkout stays invisible.
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    Path(site.strip(), "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return commands


def run(*command: str | Path, cwd: Path | None = None) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_wheel_contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    assert {name.split("/")[0].split("-")[0] for name in names} == {"dit_accel"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    in_tree = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "dit_accel").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert in_tree == {name for name in names if name.startswith("dit_accel/")}
    weights = [size for name, size in sizes.items() if name.endswith(".safetensors")]
    assert sum(weights) <= MAX_WEIGHT_BYTES


@pytest.mark.slow
def test_installed_wheel_generates_elsewhere(installed, tmp_path):
    show = "import dit_accel; print(dit_accel.__file__)"
    where = run(installed / "python", "-c", show, cwd=tmp_path)
    assert ROOT not in Path(where.strip()).parents
    assert "tiny-wan" in list_models()
    run(
        *(installed / "dit-accel", "generate", "a red circle", "--output", "out.mp4"),
        *("--model", "tiny-wan", "--steps", "1", "--frames", "5"),
        *("--height", "64", "--width", "64", "--device", "cpu"),
        cwd=tmp_path,
    )
    assert (tmp_path / "out.mp4").stat().st_size > 0
