"""Networks are wired as the originals are, load late, and say how to get what is missing."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, ViTConfig, ViTModel

from dit_accel.errors import BackboneError, OptionError
from dit_accel.eval import backbones
from dit_accel.eval.backbones import (
    BACKBONES,
    aesthetic_scores,
    clip_features,
    dino_features,
    load_backbone,
)
from dit_accel.eval.lpips import installed_lpips, load_lpips


@pytest.fixture
def vit() -> ViTModel:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=64,
    )
    model = ViTModel(config, add_pooling_layer=False).eval()
    nn.init.normal_(model.embeddings.position_embeddings)
    return model


def cubic_weights(outputs: int, side: int) -> Tensor:
    """Return what DINO's bicubic interpolation makes of a row of positions: ``[outputs, side]``."""
    scale, a = side / (outputs + 0.1), -0.75
    weights = torch.zeros(outputs, side)
    for i in range(outputs):
        place = (i + 0.5) * scale - 0.5
        base = int(torch.tensor(place).floor())
        for j in range(base - 1, base + 3):
            x = abs(place - j)
            near = (a + 2) * x**3 - (a + 3) * x**2 + 1
            far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
            weights[i, min(max(j, 0), side - 1)] += near if x <= 1 else far
    return weights


@torch.no_grad()
def test_dino_at_its_trained_size_is_transformers(vit):
    images = torch.randn(2, 3, 64, 64)
    expected = vit(images).last_hidden_state[:, 0]
    torch.testing.assert_close(dino_features(vit)(images), expected)


@torch.no_grad()
def test_dino_interpolates_positions_as_its_own_code_does(vit):
    images = torch.randn(2, 3, 64, 120)  # 4 x 7 whole patches
    plain = vit(images, interpolate_pos_encoding=True).last_hidden_state[:, 0]
    trained = vit.embeddings.position_embeddings
    grid = trained[0, 1:].reshape(4, 4, -1)
    grid = torch.einsum("ya,xb,abd->yxd", cubic_weights(4, 4), cubic_weights(7, 4), grid)
    positions = torch.cat((trained[0, :1], grid.flatten(0, 1)))

    features = dino_features(vit)(images)
    made = vit.embeddings.interpolate_pos_encoding(torch.zeros(2, 29, 32), 64, 120)
    torch.testing.assert_close(made[0], positions, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(features, plain, rtol=0)  # transformers interpolates otherwise


@torch.no_grad()
def test_clip_features_are_the_projected_ones():
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=32,
        patch_size=16,
        projection_dim=24,
    )
    model = CLIPVisionModelWithProjection(config).eval()
    images = torch.randn(2, 3, 32, 32)
    features = clip_features(model)(images)
    assert features.shape == (2, 24)
    pooled = model.vision_model(images).pooler_output
    torch.testing.assert_close(features, model.visual_projection(pooled))


@torch.no_grad()
def test_aesthetic_scores_by_hand():
    head = nn.Linear(2, 1)
    head.weight.copy_(torch.tensor([[5.0, 1.0]]))
    head.bias.fill_(2.0)
    scores = aesthetic_scores(lambda _: torch.tensor([[6.0, 8.0], [0.0, 9.0]]), head)
    assert scores(torch.zeros(2, 3, 224, 224)).tolist() == pytest.approx([5.8, 3.0])


def test_raft_is_torchvisions(monkeypatch, tmp_path):
    class Raft(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(1.0))

        def forward(self, first, second, num_flow_updates):
            assert num_flow_updates == 20
            assert (float(first.min()), float(second.max())) == (-1, 1)
            return [torch.zeros(1), self.factor * (second - first)[:, :2]]

    module = ModuleType("torchvision.models.optical_flow")
    weights = SimpleNamespace(C_T_V1=SimpleNamespace(url="https://nowhere/raft-1.pth"))
    module.Raft_Large_Weights, module.raft_large = weights, Raft
    for name in ("torchvision", "torchvision.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(BackboneError, match=r"raft-1\.pth isn't there.*pip install torchvision"):
        load_backbone("raft", download=False)

    (tmp_path / "checkpoints").mkdir()
    torch.save({"factor": torch.tensor(3.0)}, tmp_path / "checkpoints/raft-1.pth")
    flow = load_backbone("raft", download=False)
    black, white = torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 255.0)
    assert (flow(black, white) == 6).all()


def test_efficientnet_comes_with_its_weights():
    features = load_backbone("efficientnet_lite0", download=False)
    random = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, 3, 7, 7, generator=random)
    images = F.interpolate(coarse, (224, 388), mode="bilinear")
    with torch.no_grad():
        one, mirrored = features(torch.cat((images, images.flip(-1))))
        other = features(torch.randn(1, 3, 224, 388, generator=random))[0]
    assert one.shape == (1280,)
    near, far = (float(F.cosine_similarity(one, x, dim=0)) for x in (mirrored, other))
    assert near > far + 0.1


@pytest.mark.parametrize("name", [name for name in BACKBONES if name != "efficientnet_lite0"])
def test_what_is_missing_says_how_to_get_it(name):
    with pytest.raises(BackboneError) as refused:
        load_backbone(name, download=False)
    assert BACKBONES[name].hint in str(refused.value)
    assert BACKBONES[name].licence in str(refused.value)


def test_unknown_names_are_refused():
    with pytest.raises(OptionError, match="Did you mean 'dino'"):
        load_backbone("dinno")


def test_another_package_can_bring_a_network(monkeypatch):
    def points(group, name):
        assert group == "dit_accel.backbones"
        made = SimpleNamespace(load=lambda: lambda device: f"{name} on {device}")
        return [made] if name in ("amt", "new") else []

    monkeypatch.setattr(backbones, "entry_points", points)
    assert load_backbone("amt", "cpu") == "amt on cpu"
    assert load_backbone("new", "cpu") == "new on cpu"


def test_lpips_without_torchvision():
    assert installed_lpips() is None
    with pytest.raises(BackboneError, match="torchvision"):
        load_lpips()
