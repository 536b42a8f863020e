"""The recipes' shortcuts give what the stock pipelines give, and every stage runs on a CPU."""

import json
import sys

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline

from dit_accel.world import clips
from recipes.shared.words import UNASKED, Lessons, words_of
from recipes.tiny_joint import autoencoders, text_encoders, train, trainer
from recipes.tiny_joint.tiny_flux import TinyFlux

MODELS = sorted(train.MODELS)


@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_quick_autoencoder_equals_the_stock_one(model):
    recipe = train.MODELS[model]()
    vae = recipe.make_autoencoder(smoke=True).eval().double()
    size = (2, 3, 5, 32, 48) if model == "tiny-hunyuan" else (2, 3, 32, 48)
    x = torch.rand(size, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    moments = vae.encode(x).latent_dist
    decoded = vae.decode(moments.mean).sample
    with autoencoders.quick_to_train(vae):
        mean, _ = autoencoders.encode(vae, x)
        mine = autoencoders.decode(vae, moments.mean)
    torch.testing.assert_close(mean.double(), moments.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mine.double(), decoded, atol=1e-5, rtol=1e-5)
    assert torch.equal(vae.decode(moments.mean).sample, decoded), "the stock forward is back"


@torch.no_grad()
def test_flux_velocity_packs_latents_as_the_pipeline_does():
    class Echo(torch.nn.Module):
        def forward(self, hidden_states, img_ids, **rest):
            self.tokens, self.places = hidden_states, img_ids
            return (hidden_states,)

    x = torch.randn(2, 8, 6, 10, generator=torch.Generator().manual_seed(0))
    echo = Echo()
    words = torch.zeros(2, 4, 3), torch.zeros(2, 3)
    out = TinyFlux().velocity(echo, x, torch.ones(2), words, torch.ones(2))
    assert torch.equal(out, x)
    assert torch.equal(echo.tokens, FluxPipeline._pack_latents(x, 2, 8, 6, 10))
    places = FluxPipeline._prepare_latent_image_ids(2, 3, 5, "cpu", torch.float32)
    assert torch.equal(echo.places, places)


def test_hunyuan_prompt_starts_where_the_pipeline_cuts_the_template_off():
    tokenizer, _ = text_encoders.make_llama(clips.vocabulary())
    template, dropped = (
        text_encoders.DEFAULT_PROMPT_TEMPLATE[k] for k in ("template", "crop_start")
    )
    caption = "a small red circle moving left, on a black background"
    ids = tokenizer(template.format(caption)).input_ids[dropped:]
    words = tokenizer.convert_ids_to_tokens(ids)
    assert words[:-1] == words_of(caption)
    assert tokenizer.unk_token_id not in ids


@pytest.mark.parametrize("past_only", [False, True], ids=["all words", "last words"])
def test_lessons_label_each_word_with_its_own_thing(past_only):
    lessons = Lessons(clips, past_only=past_only)
    captions, labels, whole = lessons.draw(40)
    names = list(lessons.asked)
    colour = names.index("colour")
    for b, caption in enumerate(captions):
        for at, word in enumerate(words_of(caption)):
            asked = int(labels[colour, b, at])
            if asked != UNASKED and word in clips.COLOURS:
                assert list(clips.COLOURS)[asked] == word
    assert (labels[colour] != UNASKED).any()
    assert (whole[names.index("background")] != UNASKED).all()
    assert (whole[colour] == UNASKED).all()


def test_guidance_is_learned_from_a_teacher_that_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(trainer, "ALONE", 0.0)
    monkeypatch.setattr(trainer, "DISTILLED", 1.0)
    model = TinyFlux()
    torch.manual_seed(0)
    transformer = model.make_transformer(smoke=True)
    trainer.initialise(transformer)
    before = [p.detach().clone() for p in transformer.parameters()]
    student = trainer.Trainer(model, transformer, "cpu", log=lambda line: None)
    bucket = model.smoke_buckets[0]
    words = torch.randn(4, 8, transformer.config.joint_attention_dim)
    pooled = torch.randn(4, transformer.config.pooled_projection_dim)
    latents = torch.randn(4, *model.latent_shape(bucket.size))
    student.add(bucket, latents, (words, pooled), (words[:1], pooled[:1]), guided=True)
    student.train(0.5, None, save=lambda: None, save_every_s=60)
    assert student.done >= 1
    kept = zip(before, student.teacher.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in kept)
    assert any(not torch.equal(a, b) for a, b in zip(before, transformer.parameters(), strict=True))


def test_rehearsal_needs_no_other_stage(tmp_path, monkeypatch, capsys):
    command = ["train", "tiny-sd3", "--output", str(tmp_path / "out"), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [*command, "--smoke", "--stages", "rehearse"])
    train.main()
    assert "ms a step" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", MODELS)
def test_all_stages_resume_and_save_a_stock_pipeline(model, tmp_path, monkeypatch):
    monkeypatch.setattr(text_encoders, "BATCH", 2)
    out, work = tmp_path / model, tmp_path / "work"
    seconds = ["--vae-seconds", "0.01", "--text-seconds", "0.05", "--dit-seconds", "0.01"]
    command = ["train", model, "--output", str(out), "--work", str(work), "--device", "cpu"]

    monkeypatch.setattr(sys, "argv", [*command, "--smoke", *seconds, "--deadline-s", "0"])
    train.main()
    assert json.loads((work / "training.json").read_text())["transformer_steps"] == 0

    monkeypatch.setattr(sys, "argv", [*command, "--smoke", *seconds])
    train.main()
    facts = json.loads((work / "training.json").read_text())
    assert facts["transformer_steps"] > 0
    assert facts["autoencoder_steps"] > 0, "the first stages' facts are kept"
    assert (out / "dit_accel.json").exists()
    assert json.loads((out / "training.json").read_text()) == facts

    again = [*command[:2], "--output", str(tmp_path / "again"), "--start", str(out)]
    monkeypatch.setattr(sys, "argv", [*again, "--device", "cpu", "--smoke", *seconds])
    train.main()
    more = json.loads((tmp_path / "again" / "training.json").read_text())
    assert more["transformer_steps"] > facts["transformer_steps"], "earlier steps are counted in"
    assert more["autoencoder_steps"] == facts["autoencoder_steps"]
    same = "vae/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "again" / same).read_bytes() == (out / same).read_bytes()

    pipe = DiffusionPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    frames = {"num_frames": 5} if model == "tiny-hunyuan" else {}
    result = pipe(
        "a red circle", height=32, width=32, num_inference_steps=1, output_type="pt",
        max_sequence_length=64, **frames,
    )  # fmt: skip
    picture = result.frames if frames else result.images
    assert picture.isfinite().all()
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.float32}
