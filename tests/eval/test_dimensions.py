"""VBench's dimensions against golden values, and with toy networks against values by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dit_accel.errors import BackboneError, OptionError, VideoError
from dit_accel.eval.dimensions import list_dimensions, load_dimensions
from dit_accel.eval.dimensions.aesthetic_quality import AestheticQuality
from dit_accel.eval.dimensions.background_consistency import BackgroundConsistency
from dit_accel.eval.dimensions.base import weighted_mean
from dit_accel.eval.dimensions.consistency import consistency
from dit_accel.eval.dimensions.dynamic_degree import DynamicDegree, is_dynamic
from dit_accel.eval.dimensions.imaging_quality import ImagingQuality
from dit_accel.eval.dimensions.motion_smoothness import MotionSmoothness
from dit_accel.eval.dimensions.overall_consistency import OverallConsistency
from dit_accel.eval.dimensions.proxy_motion_smoothness import ProxyMotionSmoothness
from dit_accel.eval.dimensions.proxy_temporal_flickering import ProxyTemporalFlickering
from dit_accel.eval.dimensions.subject_consistency import SubjectConsistency
from dit_accel.eval.dimensions.temporal_flickering import TemporalFlickering, stands_still
from dit_accel.eval.pixels import CLIP, IMAGENET, middle_indices, resize_shorter
from dit_accel.eval.vbench import SCALES

RED, GREEN, BLUE = torch.eye(3)


def flat(*colours: torch.Tensor, height: int = 30, width: int = 40) -> torch.Tensor:
    """Return a video of one-coloured frames."""
    return torch.stack(colours)[:, :, None, None].expand(-1, -1, height, width)


def colours_of(images: torch.Tensor, statistics=CLIP) -> torch.Tensor:
    """Return the mean colours ``[N, 3]`` in [0, 1] of normalised images."""
    mean, deviation = (torch.tensor(x) for x in statistics)
    return (images.mean((2, 3)) * deviation + mean).clamp(min=0).round(decimals=4)


def test_the_dimensions_are_vbenchs_or_called_proxies():
    names = list_dimensions()
    own = [name for name in names if not name.startswith("proxy_")]
    assert len(own) == 8
    assert set(own) <= SCALES.keys()
    assert not [name for name in SCALES if name.startswith("proxy_")]


def test_golden_flickering(golden, clip):
    expected = golden["temporal_flickering"]["score"]
    for dimension in (TemporalFlickering(), ProxyTemporalFlickering()):
        assert dimension.measure(clip) == pytest.approx(expected, abs=1e-6)


def test_golden_smoothness(golden, clip):
    expected = golden["motion_smoothness_linear_interp_proxy"]["score"]
    assert ProxyMotionSmoothness().measure(clip) == pytest.approx(expected, abs=1e-6)


def test_golden_consistency(golden):
    i, j = torch.meshgrid(torch.arange(1, 6), torch.arange(1, 9), indexing="ij")
    features = torch.cos(i * j * 0.21) + 0.1
    expected = golden["consistency"]["video_score"]
    assert float(consistency(features)) == pytest.approx(expected, abs=1e-6)


def test_golden_dynamic_degree(golden):
    for case in golden["dynamic_cases"]:
        found = is_dynamic(case["scores"], case["N"], case["min_side"])
        assert found == case["dynamic"]
    for case in golden["dynamic_degree"]:
        needed, pairs, threshold = case["count_num"], case["N"] - 1, case["threshold"]
        fast = [threshold + 0.01] * needed + [threshold] * (pairs - needed)
        assert is_dynamic(fast, case["N"], case["min_side"])
        assert needed == 0 or not is_dynamic(fast[1:], case["N"], case["min_side"])
    assert not is_dynamic([], 1, 480)


def test_golden_static_filter(golden):
    for case in golden["static_cases"]:
        assert stands_still(case["scores"], case["N"], case["min_side"]) == case["static"]


def test_golden_middle_frames(golden):
    for case, expected in golden["middle_indices"].items():
        count, frames = map(int, case.split("of"))
        assert middle_indices(frames, count) == expected


def test_subject_consistency_by_hand():
    def backbone(images):
        assert images.shape[1:] == (3, 224, 298)  # not cropped, the longer side rounded down
        return colours_of(images, IMAGENET)

    # Red, red: both cosines 1. Green after red: 0 and 0. Yellow after green: both 1 / sqrt(2).
    video = flat(RED, RED, GREEN, RED + GREEN)
    value = SubjectConsistency(backbone).measure(video)
    assert value == pytest.approx((1 + 0 + 0.5**0.5) / 3, abs=1e-3)


def test_opposite_features_count_as_zero():
    features = torch.tensor([[1.0, 0.0], [-2.0, 0.0], [3.0, 0.0]])
    # To the previous frame -1 and -1, to the first -1 and 1.
    assert float(consistency(features)) == pytest.approx((0 + 0.5) / 2)


def test_background_consistency_by_hand():
    def backbone(images):
        assert images.shape[1:] == (3, 224, 224)
        return colours_of(images)

    video = flat(RED, BLUE, RED)
    video = F.pad(video, (20, 20), value=0.3)  # cut off again
    # Blue after red: 0 and 0. Red after blue: 0 to the previous and 1 to the first.
    assert BackgroundConsistency(backbone).measure(video) == pytest.approx(0.25, abs=2e-2)


def test_vbench_pools_pairs_of_frames_over_videos():
    dimension = SubjectConsistency(colours_of)
    assert dimension.weight(3) == 2
    assert weighted_mean([1.0, 0.4], [dimension.weight(n) for n in (3, 5)]) == pytest.approx(0.6)
    assert MotionSmoothness(colours_of).weight(9) == 1


def test_flicker_by_hand():
    video = flat(*(torch.full((3,), shade / 255) for shade in (100, 110, 90)))
    assert TemporalFlickering().measure(video) == pytest.approx(1 - 15 / 255)


def test_flicker_counts_in_videos_that_stand_still():
    speeds = {}

    def flow(first, second):
        pair = int(first[0, 0, 0, 0]), int(second[0, 0, 0, 0])
        return torch.full((1, 2, 32, 40), speeds.get(pair, 0.0)) / 2**0.5

    video = flat(*(torch.full((3,), shade / 255) for shade in range(8)))
    dimension = TemporalFlickering(flow)  # 3 * 30 / 256 = 0.35 pixels, one pair may be faster
    assert dimension.counts(video)
    speeds[2, 3] = 1.0
    assert dimension.counts(video)
    speeds[0, 7] = 0.6  # first to last: twice as fast is allowed once
    assert dimension.counts(video)
    speeds[7, 0] = 0.8
    assert not dimension.counts(video)
    del speeds[7, 0]
    speeds[4, 5] = 1.0
    assert not dimension.counts(video)


def test_smoothness_by_hand():
    given = []

    def interpolate(before, after):
        given.append(before.shape)
        return torch.full_like(before, 100.9 / 255)  # cut to 100, not rounded

    shades = (0, 100, 50, 140, 50, 9)  # the last has no successor
    video = flat(*(torch.full((3,), shade / 255) for shade in shades))
    value = MotionSmoothness(interpolate).measure(video)
    assert value == pytest.approx(1 - (0 + 40) / 2 / 255)
    assert given == [(1, 3, 32, 48)] * 2  # multiples of 16


@pytest.mark.parametrize(
    ("fps", "pairs"), [(8, 15), (16, 7), (24, 5), (20, 7), (3, 15), (23.98, 5)]
)
def test_dynamic_degree_looks_at_8_frames_a_second(fps, pairs):
    given = []

    def flow(first, second):
        given.append(first)
        assert first.shape == (1, 3, 32, 40)
        assert float(first.max()) == 255
        return torch.zeros(1, 2, 32, 40)

    assert DynamicDegree(flow).measure(flat(*[RED] * 16), fps) == 0
    assert len(given) == pairs


def test_dynamic_degree_by_hand():
    # 3 and 4 pixels on 6 % of the field: its fastest 5 % go at 5 pixels, 6 * 200 / 256 = 4.69.
    def flow(first, second):
        field = torch.zeros(1, 2, 200, 304)
        field[:, 0, :12], field[:, 1, :12] = 3, 4
        return field

    video = flat(*[RED] * 4, height=200, width=300)
    assert DynamicDegree(flow).measure(video) == 1
    assert DynamicDegree(lambda *pair: 0.9 * flow(*pair)).measure(video) == 0


def test_aesthetic_quality_by_hand():
    def backbone(images):
        assert images.shape[1:] == (3, 224, 224)
        return 10 * colours_of(images)[:, 0]

    video = flat(RED, torch.full((3,), 51 / 255))
    assert AestheticQuality(backbone).measure(video) == pytest.approx((1 + 0.2) / 2, abs=1e-4)


@pytest.mark.parametrize(
    ("size", "given"),
    [((300, 400), (300, 400)), ((720, 1280), (288, 512)), ((601, 333), (512, 283))],
)
def test_imaging_quality_by_hand(size, given):
    def backbone(image):
        assert image.shape == (1, 3, *given)
        return 100 * image.mean((1, 2, 3))[:, None]

    video = flat(torch.ones(3), torch.full((3,), 51 / 255), height=size[0], width=size[1])
    assert ImagingQuality(backbone).measure(video) == pytest.approx((1 + 0.2) / 2, abs=1e-5)


def test_overall_consistency_by_hand():
    def backbone(clip, prompt):
        assert clip.shape == (8, 3, 224, 224)
        shades = (colours_of(clip)[:, 0] * 255).round().tolist()
        assert shades == [4, 14, 24, 34, 44, 54, 64, 75]
        return torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0]) * len(prompt)

    video = flat(*(torch.full((3,), shade / 255) for shade in range(81)))
    value = OverallConsistency(backbone).measure(video, prompt="a prompt")
    assert value == pytest.approx(0.6)
    with pytest.raises(VideoError, match="needs the prompt"):
        OverallConsistency(backbone).measure(video)


def test_networks_see_red_first():
    red = flat(RED, RED)
    seen = []
    SubjectConsistency(lambda images: seen.append(images) or torch.ones(len(images), 2)).measure(
        red
    )
    assert colours_of(seen[0], IMAGENET).tolist() == [[1, 0, 0]] * 2


def test_frames_are_rounded_to_8_bits_first():
    video = flat(torch.full((3,), 100.4 / 255), torch.full((3,), 99.6 / 255))
    assert TemporalFlickering().measure(video) == 1


def test_resizing_has_no_antialiasing():
    lines = torch.zeros(1, 3, 448, 448)
    lines[..., 0::2] = 255  # every other column: antialiasing would make it grey
    small = resize_shorter(lines[..., :-1], 224, "bilinear")
    assert small.std() > 10
    bicubic = resize_shorter(torch.tensor([0.0, 255.0]).repeat(1, 3, 8, 4), 16, "bicubic")
    assert bicubic.min() < 0  # floats overshoot, 8-bit images don't
    whole = resize_shorter(torch.tensor([0.0, 255.0]).repeat(1, 3, 8, 4), 16, "bicubic", whole=True)
    assert (whole.min(), whole.max()) == (0, 255)


def test_bad_input_is_refused():
    dimension = TemporalFlickering()
    with pytest.raises(OptionError, match="float frames"):
        dimension.measure(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(OptionError, match="float frames"):
        dimension.measure(torch.zeros(2, 8, 8, 3))
    with pytest.raises(VideoError, match="needs 2 frames, this video has 1"):
        dimension.measure(torch.zeros(1, 3, 8, 8))
    for fps in (0, -1, float("nan"), float("inf")):
        with pytest.raises(OptionError, match="fps="):
            dimension.measure(torch.zeros(2, 3, 8, 8), fps)
    with pytest.raises(OptionError, match="Did you mean 'subject_consistency'"):
        load_dimensions(["subject_consistancy"])


def test_what_is_no_number_is_no_value():
    video = flat(RED, RED)
    with pytest.raises(VideoError, match="is nan"):
        AestheticQuality(lambda images: images[:, 0, 0, 0] / 0 * 0).measure(video)


def test_without_downloads_there_are_proxies():
    ready, reasons = load_dimensions()
    assert sorted(ready) == [name for name in list_dimensions() if name.startswith("proxy_")]
    assert set(reasons) == set(list_dimensions()) - set(ready)
    assert "CC BY-NC" in reasons["motion_smoothness"]
    with pytest.raises(BackboneError, match="AMT-S"):
        load_dimensions(["motion_smoothness"])
    brought, _ = load_dimensions(backbones={"amt": lambda a, b: a})
    assert "motion_smoothness" in brought


def test_proxies_of_consistency_see_a_change_of_scene():
    ready, _ = load_dimensions()
    random = torch.Generator().manual_seed(0)
    one, other = (torch.rand(1, 3, 6, 8, generator=random) for _ in range(2))
    still = F.interpolate(torch.cat([one] * 4), (48, 64), mode="bilinear")
    cut = F.interpolate(torch.cat([one, one, other, other]), (48, 64), mode="bilinear")
    for name in ("proxy_subject_consistency", "proxy_background_consistency"):
        assert ready[name].measure(still) == pytest.approx(1, abs=1e-5)
        assert ready[name].measure(cut) < 0.98
