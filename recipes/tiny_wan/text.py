"""The text side: a word-level tokenizer and a small stock `UMT5EncoderModel`."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from dit_accel.world import clips as world
from recipes.shared.words import Lessons, look_nearby, teach

PAD, END, UNKNOWN = 0, 1, 2
CONFIG = dict(d_model=256, d_kv=64, d_ff=512, num_layers=2, num_heads=4)
SMOKE_CONFIG = {**CONFIG, "num_layers": 1}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Lower-cased words of the drawn world; `</s>` ends a prompt, padding is on the right."""
    words = ["<pad>", "</s>", "<unk>", *world.vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair=None, special_tokens=[("</s>", END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=512,
        padding_side="right",
    )


def make_text_encoder(config: dict) -> UMT5EncoderModel:
    """A fresh text encoder for `make_tokenizer`'s words, whose heads start by looking nearby."""
    torch.manual_seed(1)
    fixed = dict(
        feed_forward_proj="gated-gelu", dropout_rate=0.0, pad_token_id=PAD, eos_token_id=END
    )
    words = 3 + len(world.vocabulary())
    encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=words, **fixed, **config, is_encoder_decoder=False, use_cache=False)
    )
    for block in encoder.encoder.block:
        look_nearby(block.layer[0].SelfAttention)
    return encoder


def embed(encoder: UMT5EncoderModel, ids: Tensor) -> Tensor:
    """Embeddings [B, L, C] of token ids [B, L], zero on padding, as `WanPipeline` makes them.

    The stock forward checks its mask on the host, which a captured training step can't do; this
    walks the same modules.
    """
    stack, length = encoder.encoder, ids.shape[1]
    kept = ids != PAD
    hidden_padding = (~kept)[:, None, None, :].float() * -1e9
    x = stack.embed_tokens(ids)
    for block in stack.block:
        attention = block.layer[0].SelfAttention
        normed = block.layer[0].layer_norm(x)
        q, k, v = (
            project(normed).unflatten(2, (attention.n_heads, -1)).transpose(1, 2)
            for project in (attention.q, attention.k, attention.v)
        )
        scores = (q @ k.mT).float() + attention.compute_bias(length, length) + hidden_padding
        x = x + attention.o((scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2))
        x = block.layer[1](x)
    return stack.final_layer_norm(x) * kept[..., None]


def pretrain(
    encoder, length: int, seconds: float, device: str, log: Callable, batch: int = 128
) -> float:
    """Teach the encoder which words belong together; returns the share of right answers."""
    tokenizer, lessons = make_tokenizer(), Lessons(world)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            captions, labels, _ = lessons.draw(batch)
            ids = tokenizer(
                captions,
                padding="max_length",
                max_length=length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            yield ids, labels[:, :, :length]

    return teach(
        encoder,
        partial(embed, encoder),
        encoder.config.d_model,
        batches(),
        lessons.sizes,
        seconds,
        log,
        device,
    )
