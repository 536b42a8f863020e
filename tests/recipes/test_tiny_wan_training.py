"""The training code's shortcuts give the same numbers as the stock classes."""

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from recipes.tiny_wan import dit, text
from recipes.tiny_wan import vae as autoencoder


@pytest.mark.parametrize("frames", [1, 5, 13], ids="frames={}".format)
@torch.no_grad()
def test_whole_sequence_equals_stock_autoencoder(frames):
    vae = autoencoder.make_vae(autoencoder.SMOKE_CONFIG).eval().double()
    clips = (
        torch.rand(2, 3, frames, 32, 48, generator=torch.Generator().manual_seed(0)).double() * 2
        - 1
    )
    moments = vae.encode(clips).latent_dist
    decoded = vae.decode(moments.mean).sample
    with autoencoder.whole_sequence(vae):
        mean, _ = autoencoder.encode(vae, clips)
        mine = autoencoder.decode(vae, moments.mean)
    torch.testing.assert_close(mean.double(), moments.mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mine.double().clamp(-1, 1), decoded, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(vae.decode(moments.mean).sample, decoded)


@torch.no_grad()
def test_text_embedding_equals_stock_encoder():
    tokenizer, encoder = text.make_tokenizer(), text.make_text_encoder(text.CONFIG).eval()
    batch = tokenizer(
        ["a small red circle", "camera panning left"],
        padding="max_length",
        max_length=12,
        return_tensors="pt",
    )
    stock = encoder(batch.input_ids, batch.attention_mask).last_hidden_state
    kept = batch.attention_mask.bool()
    mine = text.embed(encoder, batch.input_ids)
    torch.testing.assert_close(mine[kept], stock[kept], atol=1e-5, rtol=1e-4)
    assert (mine[~kept] == 0).all()


@torch.no_grad()
def test_one_padding_token_stands_for_all():
    model = dit.make_dit(dit.SMOKE_CONFIG).eval()
    attention = model.blocks[0].attn2
    attention.to_out[0].weight.normal_(generator=torch.Generator().manual_seed(0))
    random = torch.Generator().manual_seed(1)
    pixels, words = (
        torch.randn(2, 10, 64, generator=random),
        torch.randn(2, 512, 64, generator=random),
    )
    words[:, 20:] = 0
    stock = WanAttnProcessor()(attention, pixels, words)
    bias = torch.zeros(dit.TEXT_TOKENS)
    bias[-1] = torch.log(torch.tensor(512.0 - dit.TEXT_TOKENS + 1))
    short = dit.PaddedTextProcessor(bias)(attention, pixels, words[:, : dit.TEXT_TOKENS])
    torch.testing.assert_close(short, stock, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_fresh_text_encoder_hears_word_order():
    tokenizer, encoder = text.make_tokenizer(), text.make_text_encoder(text.CONFIG).eval()
    captions = ["a red circle and a blue square", "a blue circle and a red square"]
    first, second = text.embed(encoder, tokenizer(captions, return_tensors="pt").input_ids)
    circle = 2
    assert (first[circle] - second[circle]).norm() > 0.1 * first[circle].norm()


def test_pretraining_runs_and_reports_a_share():
    lines = []
    right = text.pretrain(
        text.make_text_encoder(text.SMOKE_CONFIG), 48, 2.0, "cpu", lines.append, 8
    )
    assert 0 <= right <= 1  # how far two seconds go depends on the machine
