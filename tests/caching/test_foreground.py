"""SAM2 as a way to find the foreground; the simpler ways are tested with the profiler."""

from __future__ import annotations

import pytest
import torch

from dit_accel.errors import OptionError
from dit_accel.foreground import Sam2Foreground, as_pictures, mask_function, prompt_points


def square() -> tuple[torch.Tensor, torch.Tensor]:
    """Return a velocity with a square that moves, and where it is."""
    mask = torch.zeros(3, 12, 16, dtype=torch.bool)
    for frame in range(3):
        mask[frame, 3:8, 2 + 4 * frame : 7 + 4 * frame] = True
    velocity = torch.randn(3, 12, 16, 6, generator=torch.Generator().manual_seed(0)) * 0.01
    velocity[mask] += torch.tensor([1.0, -1.0, 0.5, 0, 0, 0])
    return velocity, mask


def test_pictures_show_what_differs_and_stay_in_range():
    velocity, mask = square()
    pictures = as_pictures(velocity)
    assert pictures.shape == (3, 3, 12, 16)
    assert 0 <= pictures.min() <= pictures.max() <= 1
    first = pictures[:, 0]
    assert (first[mask].mean() - first[~mask].mean()).abs() > 0.8
    assert as_pictures(velocity[..., :2]).shape == (3, 3, 12, 16)


def test_points_lie_inside_and_outside():
    _, mask = square()
    points, labels = prompt_points(mask, size=1024)
    assert labels.tolist() == [1, 0]
    for frame in range(3):
        for point, inside in zip(points[frame], (True, False), strict=True):
            x, y = int(point[0] * 16 / 1024), int(point[1] * 12 / 1024)
            assert bool(mask[frame, y, x]) is inside


@pytest.fixture
def weights(tmp_path):
    """A folder with a SAM2 of random weights and little width."""
    from transformers import Sam2Config, Sam2Model

    small = {"hidden_size": 32, "num_attention_heads": 2, "mlp_dim": 32}
    backbone = {
        "hidden_size": 8,
        "embed_dim_per_stage": [8, 16, 32, 64],
        "blocks_per_stage": [1, 2, 2, 1],
        "num_attention_heads_per_stage": [1, 1, 1, 1],
        "global_attention_blocks": [4],
        "image_size": [256, 256],
        "window_size_per_stage": [8, 4, 4, 4],
    }
    config = Sam2Config(
        vision_config={
            "backbone_config": {"model_type": "sam2_hiera_det_model", **backbone},
            "backbone_channel_list": [64, 32, 16, 8],
            "backbone_feature_sizes": [[64, 64], [32, 32], [16, 16]],
            "fpn_hidden_size": 32,
        },
        prompt_encoder_config={"hidden_size": 32, "image_size": 256},
        mask_decoder_config=small,
    )
    Sam2Model(config).save_pretrained(tmp_path)
    return tmp_path


def test_sam2_is_asked_frame_by_frame_and_its_best_mask_is_taken(weights, monkeypatch):
    pytest.importorskip("transformers", minversion="4.56")
    velocity, mask = square()
    find = Sam2Foreground(str(weights))
    found = find(velocity)
    assert found.shape == mask.shape
    assert found.dtype == torch.bool

    asked = []

    def answer(pixel_values, input_points, input_labels):
        """A model that is right in the mask that it trusts most."""
        asked.append((tuple(pixel_values.shape), tuple(input_points.shape)))
        frame = len(asked) - 1
        right = torch.where(mask[frame], 5.0, -5.0)
        right = right.repeat_interleave(4, 0).repeat_interleave(4, 1)
        masks = torch.stack([-right, right, -right])[None, None]
        return type(
            "Out", (), {"pred_masks": masks, "iou_scores": torch.tensor([[[0.1, 0.9, 0.2]]])}
        )

    monkeypatch.setattr(find.model, "forward", answer)
    assert torch.equal(find(velocity), mask)
    assert asked == [((1, 3, 256, 256), (1, 1, 2, 2))] * 3


def test_what_sam2_lacks_is_said(tmp_path, monkeypatch):
    with pytest.raises(OptionError, match=r"SAM2's weights .* can't be loaded"):
        Sam2Foreground(str(tmp_path / "nowhere"))
    with pytest.raises(OptionError, match="Did you mean 'sam2'"):
        mask_function("sam")
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(OptionError, match=r"needs transformers 4\.56"):
        mask_function("sam2")
