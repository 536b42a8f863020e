"""Small stock text encoders for pipelines whose blocks attend over text and picture together.

Each is taught by `recipes.shared.words` which words belong together and is then left alone: the
transformer is trained on its stored answers, made by the stock pipeline.
"""

import random
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from recipes.shared.words import CAPTION_TOKENS, UNASKED, Lessons, look_nearby, teach

BATCH = 128
CLIP_TOKENS = 77
T5_LENGTHS = (64, 128, 256)  # tokens that pipelines pad a prompt to; T5 sees the padding there
T5_SIZES = dict(d_model=192, d_kv=48, d_ff=384, num_layers=2, num_heads=4)
CLIP_SIZES = dict(hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4)
LLAMA_SIZES = dict(hidden_size=192, intermediate_size=192, num_attention_heads=4)
LLAMA_LAYERS = 4  # HunyuanVideoPipeline reads what comes before the last two


def _word_tokenizer(
    words: list[str], special: tuple[str, ...], template: str, **roles: str
) -> PreTrainedTokenizerFast:
    """Lower-cased whole words; `special` come first, `template` says where they stand."""
    entries = {w: i for i, w in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(entries, unk_token=roles["unk_token"]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, pair=None, special_tokens=[(s, entries[s]) for s in special]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="right", **roles)


def make_t5(words: list[str]) -> tuple[PreTrainedTokenizerFast, T5EncoderModel]:
    """A T5 encoder whose heads start by looking nearby, and its tokenizer."""
    tokenizer = _word_tokenizer(
        words,
        ("<pad>", "</s>", "<unk>"),
        "$A </s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )
    torch.manual_seed(1)
    fixed = dict(feed_forward_proj="gated-gelu", dropout_rate=0.0, pad_token_id=0, eos_token_id=1)
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            **fixed,
            **T5_SIZES,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )
    look_nearby(encoder.encoder.block[0].layer[0].SelfAttention)
    return tokenizer, encoder


def make_clip(
    words: list[str], projection: int | None = None, seed: int = 4
) -> tuple[PreTrainedTokenizerFast, CLIPTextModel | CLIPTextModelWithProjection]:
    """A CLIP text encoder and its tokenizer; `projection` is the width of its pooled answer."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    tokenizer = _word_tokenizer(
        words,
        ("<unk>", start, "<pad>", end),  # transformers reads an end token of id 2 in an old way
        f"{start} $A {end}",
        bos_token=start,
        eos_token=end,
        pad_token=end,
        unk_token="<unk>",
        model_max_length=CLIP_TOKENS,
    )
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        **CLIP_SIZES,
        max_position_embeddings=CLIP_TOKENS,
        projection_dim=projection or CLIP_SIZES["hidden_size"],
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer, (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def make_llama(words: list[str]) -> tuple[PreTrainedTokenizerFast, LlamaModel]:
    """A Llama encoder, and a tokenizer that fits HunyuanVideoPipeline's prompt template.

    The pipeline drops as many tokens as the template takes in its own vocabulary. Here the text
    before the prompt is one token, and fillers stand for the others.
    """
    fill, pad = "<fill>", "<pad>"
    dropped = DEFAULT_PROMPT_TEMPLATE["crop_start"]
    tokenizer = _word_tokenizer(
        words,
        (pad, fill, "<unk>"),
        " ".join([fill] * (dropped - 1) + ["$A"]),
        pad_token=pad,
        unk_token="<unk>",
        model_max_length=1024,
    )
    before, after = DEFAULT_PROMPT_TEMPLATE["template"].split("{}")
    tokenizer.add_tokens(
        [AddedToken(before, normalized=False), AddedToken(after, normalized=False)]
    )
    torch.manual_seed(5)
    encoder = LlamaModel(
        LlamaConfig(
            vocab_size=len(tokenizer),
            **LLAMA_SIZES,
            num_hidden_layers=LLAMA_LAYERS,
            num_key_value_heads=LLAMA_SIZES["num_attention_heads"],
            max_position_embeddings=1024,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    return tokenizer, encoder


def teach_t5(
    tokenizer, encoder, world: ModuleType, seconds: float, log: Callable, device: str
) -> float:
    """Teach a T5 encoder, with padding of several lengths that it sees, as in the pipelines."""
    lessons, rng = Lessons(world), random.Random(6)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            captions, labels, _ = lessons.draw(BATCH)
            ids = _padded(tokenizer, captions, rng.choice(T5_LENGTHS))
            yield _some_unknown(ids, labels, tokenizer.unk_token_id), labels

    def read(ids: Tensor) -> Tensor:
        return encoder(ids).last_hidden_state[:, :CAPTION_TOKENS]

    width = encoder.config.d_model
    return teach(encoder, read, width, batches(), lessons.sizes, seconds, log, device)


def teach_clip(
    tokenizer, encoder, world: ModuleType, seconds: float, log: Callable, device: str
) -> float:
    """Teach a CLIP encoder what its pooled answer should know of the whole scene."""
    lessons = Lessons(world)
    projected = isinstance(encoder, CLIPTextModelWithProjection)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            captions, _, whole = lessons.draw(BATCH)
            yield _padded(tokenizer, captions, CLIP_TOKENS), whole

    def read(ids: Tensor) -> Tensor:
        return encoder(ids).text_embeds if projected else encoder(ids).pooler_output

    width = encoder.config.projection_dim if projected else encoder.config.hidden_size
    return teach(encoder, read, width, batches(), lessons.sizes, seconds, log, device)


def teach_llama(
    tokenizer, encoder, world: ModuleType, seconds: float, log: Callable, device: str
) -> float:
    """Teach the layers of a Llama encoder that HunyuanVideoPipeline reads."""
    lessons = Lessons(world, past_only=True)
    template, dropped = (DEFAULT_PROMPT_TEMPLATE[k] for k in ("template", "crop_start"))

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            captions, labels, _ = lessons.draw(BATCH)
            texts = [template.format(c) for c in captions]
            yield _padded(tokenizer, texts, dropped + CAPTION_TOKENS), labels

    def read(ids: Tensor) -> Tensor:
        kept = (ids != tokenizer.pad_token_id).long()
        states = encoder(ids, attention_mask=kept, output_hidden_states=True).hidden_states
        return states[-3][:, dropped:]

    width = encoder.config.hidden_size
    return teach(encoder, read, width, batches(), lessons.sizes, seconds, log, device)


def _padded(tokenizer, captions: list[str], length: int) -> Tensor:
    return tokenizer(
        captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids


def _some_unknown(ids: Tensor, labels: Tensor, unknown: int) -> Tensor:
    """Make some words of a tenth of the captions unknown, and ask nothing of those words."""
    noisy = torch.rand(len(ids), 1) < 0.1
    hit = noisy & (torch.rand(ids.shape) < 0.12) & (ids > unknown)
    labels[:, hit[:, :CAPTION_TOKENS]] = UNASKED
    return ids.masked_fill(hit, unknown)
