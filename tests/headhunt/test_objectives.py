"""Objectives: the drawn worlds' checker, and networks with random weights in their place."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from tiny_pipelines import clip_tokenizer
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPVisionConfig,
)

from dit_accel.errors import BackboneError, OptionError
from dit_accel.eval import dimensions
from dit_accel.eval.dimensions import dimension_class
from dit_accel.headhunt.objectives import list_objectives, make_objective
from dit_accel.headhunt.objectives.networks import ClipImage
from dit_accel.world import pictures
from dit_accel.world.worlds import sample_prompts

SIDE = 32


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Return the folder of a CLIP model with random weights, and the model."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2}
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), max_position_embeddings=77, **sizes,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(image_size=SIDE, patch_size=8, **sizes)
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=768
    )
    model = CLIPModel(config).eval()
    processor = CLIPProcessor(
        CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer,
    )
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, model, processor


FRAMES = torch.rand(3, 1, 3, 48, 40, generator=torch.Generator().manual_seed(0))
ENTRIES = [{"prompt": prompt} for prompt in ("a red ball", "two stars on the left", "snow")]


def similarity(clip, frames, texts):
    """Return the cosines of pictures ``[B, 3, H, W]`` and texts, each pair by itself."""
    _, model, processor = clip
    factor = float(model.logit_scale.detach().exp())
    found = []
    for frame, text in zip(frames, texts, strict=True):
        picture = Image.fromarray((frame.permute(1, 2, 0) * 255).round().byte().numpy())
        inputs = processor(text=[text], images=[picture], return_tensors="pt")
        with torch.no_grad():
            outputs = model(**inputs)
        found.append(float(outputs.logits_per_image) / factor)
    return found


def test_text_similarity_and_pickscore_are_clips_own(clip):
    expected = similarity(clip, FRAMES[:, 0], [entry["prompt"] for entry in ENTRIES])
    assert len({round(value, 4) for value in expected}) == 3
    text = make_objective(f"clip_text:{clip[0]}")
    text.load("cpu")
    assert text.score(FRAMES, ENTRIES) == pytest.approx(expected, abs=1e-4)
    pick = make_objective(f"pickscore:{clip[0]}")
    pick.load("cpu")
    factor = float(clip[1].logit_scale.detach().exp())
    assert pick.score(FRAMES, ENTRIES) == pytest.approx([factor * x for x in expected], abs=1e-2)


def test_a_videos_score_is_the_mean_of_its_frames(clip):
    text = make_objective(f"clip_text:{clip[0]}")
    text.load("cpu")
    video = FRAMES[:, 0][None]
    (score,) = text.score(video, ENTRIES[:1])
    assert score == pytest.approx(sum(text.score(FRAMES, ENTRIES[:1] * 3)) / 3, abs=1e-5)
    long = video.repeat_interleave(11, 1)
    assert text.score(long, ENTRIES[:1])[0] == pytest.approx(score, abs=0.05)


def test_image_similarity_is_largest_for_the_picture_itself(clip, tmp_path, monkeypatch):
    monkeypatch.setattr(ClipImage, "hub_model", str(clip[0]))
    monkeypatch.setattr(ClipImage, "hub_processor", str(clip[0]))
    path = tmp_path / "picture.png"
    pixels = (FRAMES[1, 0].permute(1, 2, 0) * 255).round().byte().numpy()
    Image.fromarray(pixels).save(path)
    image = make_objective(f"clip_image:{path}")
    image.load("cpu")
    scores = image.score(FRAMES, ENTRIES)
    assert scores[1] == pytest.approx(1, abs=1e-4)
    assert max(scores) == scores[1]
    before = image.identity()
    Image.fromarray(255 - pixels).save(path)
    assert image.identity() != before
    path.write_bytes(b"no picture")
    with pytest.raises(OptionError, match="no picture that can be read"):
        image.load("cpu")


def test_dimensions_are_objectives():
    one = make_objective("dimension:proxy_temporal_flickering")
    one.load("cpu")
    still = FRAMES[:, :1].expand(-1, 4, -1, -1, -1)
    moving = torch.rand(3, 4, 3, 48, 40, generator=torch.Generator().manual_seed(1))
    assert min(one.score(still, ENTRIES)) > max(one.score(moving, ENTRIES))
    measured = dimension_class("proxy_temporal_flickering")().measure(moving[1])
    assert one.score(moving, ENTRIES)[1] == measured


def test_the_aesthetic_score_is_that_of_the_dimension(monkeypatch):
    monkeypatch.setattr(
        dimensions, "load_backbone", lambda *_, **__: lambda images: 10 * images.mean((1, 2, 3))
    )
    aesthetic = make_objective("aesthetic")
    aesthetic.load("cpu")
    lighter = aesthetic.score(FRAMES / 2 + 0.5, ENTRIES)
    assert all(a > b for a, b in zip(lighter, aesthetic.score(FRAMES, ENTRIES), strict=True))


@pytest.mark.parametrize(
    ("objective", "file"),
    [
        ("pickscore", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K|yuvalkirstain/PickScore_v1"),
        ("clip_text", "openai/clip-vit-large-patch14"),
        ("pickscore:no/such/folder", "no/such/folder"),
    ],
)
def test_weights_that_are_not_there_are_named(objective, file):
    made = make_objective(objective)
    with pytest.raises(
        BackboneError, match=rf"needs ({file}), which can't be loaded: .*hf download"
    ):
        made.load("cpu")


@pytest.mark.parametrize(
    ("text", "world", "says"),
    [
        ("folowing", "pictures", "Did you mean 'following'"),
        ("following", None, "this model belongs to none"),
        ("style:dark", None, "this model belongs to none"),
        ("following:dark", "pictures", "takes no argument"),
        ("style:drak", "pictures", "Did you mean 'dark'"),
        ("style", "clips", "has no styles"),
        ("clip_image", None, "clip_image:FILE"),
        ("aesthetic:v2", None, "takes no argument"),
        ("dimension:aesthetic_qualty", None, "Did you mean 'aesthetic_quality'"),
        ("dimension", None, "unknown dimension ''"),
        ("clip_image:none.png", None, "'none.png' is no file"),
    ],
)
def test_objectives_that_can_not_be_used_are_refused(text, world, says):
    with pytest.raises(OptionError, match=says):
        make_objective(text, world)


def drawn(style, seed=3):
    """Return prompts in a style, and pictures ``[B, 1, 3, H, W]`` of their scenes."""
    entries = sample_prompts("pictures", 6, seed, style)
    scenes = [pictures.Scene.from_dict(entry) for entry in entries]
    return entries, pictures.render(scenes, (128, 128), 0)[:, None] / 2 + 0.5


def test_drawn_pictures_are_scored_by_what_they_show():
    entries, frames = drawn("dark")
    style = make_objective("style:dark", "pictures")
    style.load("cpu")
    right = style.score(frames, entries)
    assert min(right) > 0.9
    lighter = style.score((frames * 2).clamp(0, 1), entries)
    for dark, plain in zip(right, lighter, strict=True):
        assert dark - 0.6 < plain <= dark - 0.4  # half of it is the style
    following = make_objective("following", "pictures")
    assert sum(following.score(frames, entries)) > 5.7
    assert sum(following.score(frames.flip(0), entries)) < 4


def test_prompts_are_drawn_in_the_style():
    for style in pictures.STYLES[1:]:
        entries = make_objective(f"style:{style}", "pictures").prompts(12, seed=1)
        assert {entry["style"] for entry in entries} == {style}
        assert len({entry["prompt"] for entry in entries}) == 12
        for entry in entries:
            scene = pictures.Scene.from_dict(entry)
            assert pictures.caption(scene) == entry["prompt"]
            assert style != "outlined" or all(t.colour != "white" for t in scene.things)
    mixed = make_objective("style", "pictures").prompts(30, seed=1)
    assert len({entry["style"] for entry in mixed}) > 3
    clips = make_objective("following", "clips").prompts(5, seed=1)
    assert all("motion" in entry["things"][0] for entry in clips)
    with pytest.raises(OptionError, match="brings no prompts"):
        make_objective("pickscore").prompts(4, 0)


def test_drawn_prompts_follow_from_their_seed():
    assert sample_prompts("pictures", 4, 7) == sample_prompts("pictures", 8, 7)[:4]
    assert sample_prompts("pictures", 4, 7) != sample_prompts("pictures", 4, 8)


def test_every_objective_says_what_it_is():
    assert list_objectives() == [
        "aesthetic", "clip_image", "clip_text", "dimension", "following", "pickscore", "style",
    ]  # fmt: skip
