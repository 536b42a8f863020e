"""The text side: a word-level tokenizer and a small stock `UMT5EncoderModel`."""

import random
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
import world
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

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


@torch.no_grad()
def look_nearby(attention: nn.Module, reach: int = 128) -> None:
    """Start a head that looks back, one that looks ahead, one that looks both ways and a free one.

    From the stock random start, word order is not found in thousands of steps: a caption stays a
    bag of words, and "green circle on dark blue" may come as a blue circle on dark green.
    """
    offsets = torch.arange(-reach, reach + 1)  # of the word looked at
    distance = offsets.abs().float()
    back = torch.where(offsets <= 0, -distance, torch.full_like(distance, -8.0))
    biases = torch.stack((back, back.flip(0), -0.4 * distance, torch.zeros_like(distance)), 1)
    buckets = attention._relative_position_bucket(offsets)
    farthest_first = distance.argsort(descending=True)  # the nearest offset of a bucket is kept
    for i in farthest_first.tolist():
        attention.relative_attention_bias.weight[buckets[i]] = biases[i]


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


# What the words of a thing's phrase, and all other words, are trained to know.
THING_CLASSES = {
    "size": tuple(world.SIZES),
    "colour": tuple(world.COLOURS),
    "texture": world.TEXTURES,
    "shape": world.SHAPES,
    "motion": world.MOTIONS,
}
SCENE_CLASSES = {
    "background": tuple(world.BACKGROUNDS),
    "pattern": world.PATTERNS,
    "camera": world.CAMERAS,
}
UNASKED = -100


def _labelled(tokenizer, scenes: list[world.Scene], rng: random.Random, length: int):
    """Token ids [B, L] of captions, and the class each token should know of each attribute."""
    asked = {**THING_CLASSES, **SCENE_CLASSES}
    labels = torch.full((len(asked), len(scenes), length), UNASKED)
    captions = []
    for b, scene in enumerate(scenes):
        at, words = 0, []
        for phrase, owner in world.phrases(scene, rng):
            count = len(phrase.replace(",", " , ").split())
            source, names = (
                (scene, SCENE_CLASSES) if owner is None else (scene.things[owner], THING_CLASSES)
            )
            for a, name in enumerate(asked):
                if name in names:
                    labels[a, b, at : at + count] = asked[name].index(getattr(source, name))
            at += count
            words.append(phrase)
        captions.append(" ".join(words))
    ids = tokenizer(
        captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids, labels


def _share_right(answers: list[Tensor], labels: Tensor) -> float:
    guesses = torch.stack([answer.argmax(-1) for answer in answers])
    return float((guesses == labels)[labels != UNASKED].float().mean())


def pretrain(
    encoder, length: int, seconds: float, device: str, log: Callable, batch: int = 128
) -> float:
    """Teach the encoder which words belong together, before a transformer reads it.

    Each word learns to name all attributes of the thing (or of the scene) that its phrase speaks
    of. Returns the share of right answers at the end.
    """
    tokenizer, rng = make_tokenizer(), random.Random(3)
    sizes = [len(c) for c in (*THING_CLASSES.values(), *SCENE_CLASSES.values())]
    head = nn.Linear(encoder.config.d_model, sum(sizes)).to(device)
    encoder.to(device).train()
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)
    start, done = time.monotonic(), 0
    while (share := (time.monotonic() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (done + 1) / 50) * min(1.0, 2 * (1 - share) + 0.01)
        scenes = [world.sample_scene(rng) for _ in range(batch)]
        ids, labels = (t.to(device) for t in _labelled(tokenizer, scenes, rng, length))
        answers = head(embed(encoder, ids)).split(sizes, -1)
        losses = [
            F.cross_entropy(answer.flatten(0, 1), label.flatten(), ignore_index=UNASKED)
            for answer, label in zip(answers, labels, strict=True)
        ]
        optimizer.zero_grad()
        sum(losses).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        done += 1
        if done % 200 == 0:
            log(f"text: step {done}, {100 * _share_right(answers, labels):.1f} % right")
    return _share_right(answers, labels)
