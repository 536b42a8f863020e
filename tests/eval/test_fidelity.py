"""Fidelity measures against golden values, other libraries, and values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from dit_accel.errors import OptionError
from dit_accel.eval.fidelity import (
    CONVENTIONS,
    fidelity,
    psnr,
    relative_l1,
    ssim,
    temporal_difference_error,
)


@pytest.fixture
def pair():
    """Two clips with structure, the second noisy."""
    random = torch.Generator().manual_seed(0)
    coarse = torch.rand(3, 3, 6, 7, generator=random, dtype=torch.float64)
    clip = torch.nn.functional.interpolate(coarse, (48, 56), mode="bilinear")
    noise = 0.15 * torch.randn(clip.shape, generator=random, dtype=torch.float64)
    return clip, (clip + noise).clamp(0, 1)


def test_golden_values(golden, clip, disturbed):
    expected = golden["fidelity"]
    measured = fidelity(disturbed, clip, lpips=None)
    assert measured["psnr_db"] == pytest.approx(expected["psnr_mean_of_frames"], abs=1e-9)
    assert measured["psnr_pooled_db"] == pytest.approx(expected["psnr_pooled_mse"], abs=1e-9)
    assert measured["psnr_worst_db"] == pytest.approx(min(expected["psnr_per_frame"]), abs=1e-9)
    assert measured["ssim"] == pytest.approx(expected["ssim_gauss11_s1.5_valid"], abs=1e-9)
    assert relative_l1(disturbed, clip) == pytest.approx(expected["rel_l1"], abs=1e-9)


@pytest.mark.parametrize(
    ("convention", "name"),
    [
        ("teacache", "ssim_gauss11_s1.5_valid"),
        ("fastvideo", "ssim_gauss11_s1.5_zeropad"),
        ("svg", "ssim_box11_zeropad"),
    ],
)
def test_golden_values_of_papers(golden, clip, disturbed, convention, name):
    measured = fidelity(disturbed, clip, convention=convention, lpips=None)
    assert measured["ssim"] == pytest.approx(golden["fidelity"][name], abs=1e-9)


def test_differences_do_not_wrap_around(golden, clip):
    measured = fidelity(1 - clip, clip, lpips=None)["psnr_db"]
    expected = golden["fidelity_inverted_clip"]
    assert measured == pytest.approx(expected["psnr_true_mean_of_frames"], abs=1e-9)
    assert measured < expected["psnr_uint8_wrap_BUG"] - 20
    pixels = (clip * 255).byte()
    with pytest.raises(OptionError, match="divide 8-bit pixels by 255"):
        fidelity(255 - pixels, pixels)


def test_psnr_is_torchmetrics(pair):
    clip, noisy = pair
    measured = fidelity(noisy, clip, lpips=None)
    whole = float(peak_signal_noise_ratio(noisy, clip, data_range=1.0))
    frames = [float(peak_signal_noise_ratio(a, b, data_range=1.0)) for a, b in zip(noisy, clip)]  # noqa: B905
    assert measured["psnr_pooled_db"] == pytest.approx(whole)
    assert measured["psnr_db"] == pytest.approx(np.mean(frames))
    assert measured["psnr_worst_db"] == pytest.approx(min(frames))


def test_ssim_is_torchmetrics_without_its_padded_border(pair):
    clip, noisy = pair
    padded, full = structural_similarity_index_measure(
        noisy, clip, data_range=1.0, return_full_image=True
    )
    assert ssim(noisy, clip) == pytest.approx(float(full[..., 5:-5, 5:-5].mean()), abs=1e-12)
    assert abs(ssim(noisy, clip) - float(padded)) > 1e-3


def test_ssim_is_scikit_image(pair):
    clip, noisy = pair
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    values = [
        structural_similarity(a.numpy(), b.numpy(), channel_axis=0, data_range=1.0, **options)
        for a, b in zip(noisy, clip, strict=True)
    ]
    assert ssim(noisy, clip) == pytest.approx(np.mean(values), abs=1e-12)


def test_rectifieds_ssim_is_scikit_image_on_grey_pixels(pair):
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)

    def grey(frames):
        pixels = (frames * 255).round()
        return torch.einsum("c,tchw->thw", weights, pixels).round().byte().numpy()

    clip, noisy = pair
    values = [structural_similarity(a, b) for a, b in zip(grey(noisy), grey(clip), strict=True)]
    measured = fidelity(noisy, clip, convention="rectified", lpips=None)
    assert measured["ssim"] == pytest.approx(
        np.mean(values), abs=1e-4
    )  # halves may round either way


@pytest.mark.parametrize(
    ("convention", "black", "first"),
    [("ours", -1, "red"), ("svg", 0, "red"), ("rectified", 0, "blue")],
)
def test_what_lpips_is_given(convention, black, first):
    red = torch.zeros(2, 3, 16, 16)
    red[:, 0] = 1
    given = []

    def distance(actual, dense):
        given.append((actual, dense))
        return torch.tensor(0.25 * len(given))

    measured = fidelity(red, torch.zeros_like(red), convention=convention, lpips=distance)
    assert measured["lpips"] == pytest.approx((0.25 + 0.5) / 2)
    actual, dense = given[0]
    assert actual.shape == (1, 3, 16, 16)
    assert (dense == black).all()
    lit = 0 if first == "red" else 2
    assert (actual[:, lit] == 1).all()
    assert (actual[:, 2 - lit] == black).all()


def test_equal_frames():
    frames = torch.rand(2, 3, 16, 16)
    measured = fidelity(
        frames, frames, actual_latents=frames, dense_latents=frames, convention="ours", lpips=None
    )
    assert measured == {
        "psnr_db": pytest.approx(100),
        "psnr_pooled_db": pytest.approx(100),
        "psnr_worst_db": pytest.approx(100),
        "ssim": pytest.approx(1),
        "temporal_difference_error": 0,
        "latent_relative_l1": 0,
    }


def test_one_bad_frame_shows_in_the_worst_frame():
    frames = torch.full((4, 3, 16, 16), 0.5)
    other = frames.clone()
    other[2] += 0.1
    measured = fidelity(other, frames, lpips=None)
    assert measured["psnr_worst_db"] == pytest.approx(20, abs=1e-4)
    assert measured["psnr_db"] == pytest.approx((3 * 100 + 20) / 4, abs=1e-4)
    assert measured["psnr_pooled_db"] == pytest.approx(20 + 10 * math.log10(4), abs=1e-4)


def test_temporal_difference_error_sees_flicker_and_no_constant_shift():
    frames = torch.rand(5, 3, 8, 8, dtype=torch.float64) / 2
    assert temporal_difference_error(frames + 0.2, frames) == pytest.approx(0)
    flicker = frames.clone()
    flicker[1::2] += 0.1  # each of four differences is 0.1 off
    assert temporal_difference_error(flicker, frames) == pytest.approx(0.1)
    assert temporal_difference_error(frames[:1], frames[1:2]) == 0


def test_psnr_of_a_known_error():
    frames = torch.full((2, 3, 4, 5), 0.5)
    assert psnr(frames, frames + 0.1) == pytest.approx(20, abs=1e-4)
    assert psnr(frames, frames) == math.inf


def test_psnr_pools_the_squared_error_over_frames():
    frames = torch.zeros(2, 3, 8, 8)
    other = frames.clone()
    other[0] = 0.2
    assert psnr(frames, other) == pytest.approx(-10 * math.log10(0.04 / 2), abs=1e-4)


def test_ssim_of_flat_frames():
    # Without structure only the means count: (2ab + c) / (a^2 + b^2 + c) with c = 0.01^2.
    frames = torch.full((2, 3, 16, 16), 0.5)
    expected = (2 * 0.5 * 0.4 + 1e-4) / (0.5**2 + 0.4**2 + 1e-4)
    assert ssim(frames, frames - 0.1) == pytest.approx(expected, abs=1e-4)
    assert ssim(frames, frames) == pytest.approx(1)


def test_relative_l1_of_a_known_error():
    latents = torch.tensor([[1.0, -3.0], [0.0, 4.0]])
    assert relative_l1(latents + 0.5, latents) == pytest.approx(2 / 8)
    assert relative_l1(latents, latents) == 0


@pytest.mark.parametrize("measure", [psnr, ssim, relative_l1, temporal_difference_error, fidelity])
def test_other_shapes_are_refused(measure):
    with pytest.raises(OptionError, match="equal shapes"):
        measure(torch.zeros(2, 3), torch.zeros(3, 2))


def test_bad_input_is_refused():
    frames = torch.zeros(2, 3, 16, 16)
    with pytest.raises(OptionError, match="Did you mean 'svg'"):
        fidelity(frames, frames, convention="svgg")
    with pytest.raises(OptionError, match="both or neither"):
        fidelity(frames, frames, actual_latents=frames)
    with pytest.raises(OptionError, match="at least 11 x 11"):
        ssim(frames[..., :8], frames[..., :8])
    with pytest.raises(OptionError, match=r"frames \[T, 3, H, W\]"):
        fidelity(frames[:, :2], frames[:, :2])
    with pytest.raises(OptionError, match=r"frames \[T, 3, H, W\]"):
        fidelity(frames[:0], frames[:0])


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_every_convention_works_in_single_precision(convention, clip, disturbed):
    single = fidelity(disturbed.float(), clip.float(), convention=convention, lpips=None)
    double = fidelity(disturbed, clip, convention=convention, lpips=None)
    assert single == pytest.approx(double, rel=1e-5)
