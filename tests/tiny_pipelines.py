"""Tiny stock diffusers pipelines with random weights: offline, built in a fraction of a second.

`TINY_PIPELINES` maps a name to ``(builder, call arguments)``; `run_tiny` runs one and returns its
latents (or whatever ``output_type`` asks for) as a tensor. The sizes give a few hundred tokens on
grids with odd sides, so that blocks are ragged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

PROMPT = "a red ball rolls to the right"


def byte_tokenizer(*, bos: str | None = None, eos: str = "</s>", max_length: int = 512) -> Any:
    """Return a tokenizer of single bytes: covers every string, needs no file."""
    pad = "<pad>"
    specials = [token for token in (pad, eos, bos) if token]
    symbols = specials + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    tokenizer.add_special_tokens(specials)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}" if bos else f"$A {eos}",
        special_tokens=[(token, symbols.index(token)) for token in specials],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        model_max_length=max_length,
        padding_side="right",
    )


def clip_tokenizer() -> Any:
    """Return a byte tokenizer with CLIP's start token, end token and length."""
    return byte_tokenizer(bos="<|startoftext|>", eos="<|endoftext|>", max_length=77)


def t5_encoder(width: int, *, umt5: bool = False) -> torch.nn.Module:
    """Return a two-layer T5 (or UMT5) encoder with random weights."""
    config = (UMT5Config if umt5 else T5Config)(
        vocab_size=300,
        d_model=width,
        d_kv=width // 4,
        d_ff=2 * width,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
    )
    return (UMT5EncoderModel if umt5 else T5EncoderModel)(config).eval()


def clip_encoder(width: int, tokenizer: Any, *, projection: bool = False) -> torch.nn.Module:
    """Return a two-layer CLIP text encoder with random weights."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def llama_encoder(width: int, tokenizer: Any) -> torch.nn.Module:
    """Return a three-layer Llama with random weights (HunyuanVideo reads the third from last)."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaModel(config).eval()


def image_vae() -> torch.nn.Module:
    """Return an image VAE with four latent channels that shrinks each side eight times."""
    return AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    ).eval()


def _wan_transformer(
    *, in_channels: int = 16, image_dim: int | None = None, vace: bool = False
) -> torch.nn.Module:
    config: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "in_channels": in_channels,
        "out_channels": 16,
        "text_dim": 32,
        "freq_dim": 32,
        "ffn_dim": 128,
        "num_layers": 3,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 128,
        "image_dim": image_dim,
        "added_kv_proj_dim": 64 if image_dim else None,
    }
    if vace:
        # 96 = 2 x 16 latent channels (inactive, reactive) + 64 of the folded 8 x 8 mask.
        config |= {"vace_layers": [0, 2], "vace_in_channels": 96}
        return WanVACETransformer3DModel(**config).eval()
    return WanTransformer3DModel(**config).eval()


def _wan_parts() -> dict[str, Any]:
    """Return what all Wan pipelines share; the VAE's default statistics need 16 channels."""
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    return {
        "tokenizer": byte_tokenizer(),
        "text_encoder": t5_encoder(32, umt5=True),
        "vae": vae.eval(),
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    }


def tiny_wan(*, moe: bool = False, expand_timesteps: bool = False, seed: int = 0) -> WanPipeline:
    """Wan text-to-video: 2.1, 2.2 with two transformers (``moe``), or TI2V (timestep per token)."""
    torch.manual_seed(seed)
    return WanPipeline(
        **_wan_parts(),
        transformer=_wan_transformer(),
        transformer_2=_wan_transformer() if moe else None,
        boundary_ratio=0.9 if moe else None,
        expand_timesteps=expand_timesteps,
    )


def tiny_wan_i2v(*, expand_timesteps: bool = False, seed: int = 0) -> WanImageToVideoPipeline:
    """Wan image-to-video: 2.1, with image features in the cross-attention, or TI2V.

    TI2V takes no features; its timesteps differ between the first frame's tokens and the rest.
    """
    torch.manual_seed(seed)
    if expand_timesteps:
        parts = {"transformer": _wan_transformer()}
    else:
        vision = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=28,
            patch_size=14,
        )
        side = {"height": 28, "width": 28}
        parts = {
            "transformer": _wan_transformer(in_channels=36, image_dim=32),
            "image_encoder": CLIPVisionModel(vision).eval(),
            "image_processor": CLIPImageProcessor(size=side, crop_size=side),
        }
    return WanImageToVideoPipeline(**_wan_parts(), **parts, expand_timesteps=expand_timesteps)


def tiny_wan_vace(*, seed: int = 0) -> WanVACEPipeline:
    """Wan VACE: control blocks beside the main ones."""
    torch.manual_seed(seed)
    return WanVACEPipeline(**_wan_parts(), transformer=_wan_transformer(vace=True))


def tiny_hunyuan(*, seed: int = 0) -> HunyuanVideoPipeline:
    """HunyuanVideo: two dual-stream and two single-stream blocks."""
    torch.manual_seed(seed)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=16,
        rope_axes_dim=(8, 12, 12),
    )
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=4,
    )
    tokenizer, tokenizer_2 = byte_tokenizer(), clip_tokenizer()
    return HunyuanVideoPipeline(
        text_encoder=llama_encoder(16, tokenizer),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=clip_encoder(16, tokenizer_2),
        tokenizer_2=tokenizer_2,
    )


def _flux_parts(*, guidance_embeds: bool = True) -> dict[str, Any]:
    transformer = FluxTransformer2DModel(
        in_channels=16,  # the pipeline packs 2 x 2 latents of 4 channels into a token
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(8, 12, 12),
    )
    tokenizer = clip_tokenizer()
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        "vae": image_vae(),
        "text_encoder": clip_encoder(32, tokenizer),
        "tokenizer": tokenizer,
        "text_encoder_2": t5_encoder(32),
        "tokenizer_2": byte_tokenizer(),
        "transformer": transformer.eval(),
    }


def tiny_flux(*, guidance_embeds: bool = True, seed: int = 0) -> FluxPipeline:
    """FLUX.1 dev, or schnell without guidance embeddings."""
    torch.manual_seed(seed)
    return FluxPipeline(**_flux_parts(guidance_embeds=guidance_embeds))


def tiny_flux_kontext(*, seed: int = 0) -> FluxKontextPipeline:
    """FLUX.1 Kontext: the reference image's tokens follow the generated image's."""
    torch.manual_seed(seed)
    return FluxKontextPipeline(**_flux_parts())


def tiny_sd3(*, dual: tuple[int, ...] = (0,), seed: int = 0) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3.5; ``dual`` names the blocks with a second, image-only attention."""
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=32,
        num_attention_heads=2,
        caption_projection_dim=64,
        joint_attention_dim=64,  # T5's width; CLIP's features are padded up to it
        pooled_projection_dim=64,  # both CLIP projections, concatenated
        pos_embed_max_size=32,
        dual_attention_layers=dual,
        qk_norm="rms_norm",
    )
    tokenizer, tokenizer_2 = clip_tokenizer(), clip_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=image_vae(),
        text_encoder=clip_encoder(32, tokenizer, projection=True),
        tokenizer=tokenizer,
        text_encoder_2=clip_encoder(32, tokenizer_2, projection=True),
        tokenizer_2=tokenizer_2,
        text_encoder_3=t5_encoder(64),
        tokenizer_3=byte_tokenizer(),
    )


# Grids: video (4, 7, 9) = 252 tokens; images (1, 15, 17) = 255 tokens.
_VIDEO: dict[str, Any] = {"height": 112, "width": 144, "num_frames": 13, "max_sequence_length": 33}
_IMAGE: dict[str, Any] = {"height": 240, "width": 272, "max_sequence_length": 33}
_HUNYUAN: dict[str, Any] = {"prompt_template": {"template": "{}", "crop_start": 0}}


_PICTURE = Image.linear_gradient("L").convert("RGB").resize((144, 112))
_FIRST_FRAME: dict[str, Any] = {"image": _PICTURE}
# Wan 2.1's processor takes whatever follows 512 text tokens for image features.
_LONG_PROMPT: dict[str, Any] = {"max_sequence_length": 512}


TINY_PIPELINES: dict[str, tuple[Callable[[], DiffusionPipeline], dict[str, Any]]] = {
    "wan": (tiny_wan, _VIDEO),
    "wan22": (lambda: tiny_wan(moe=True), _VIDEO),
    "wan_ti2v": (lambda: tiny_wan(expand_timesteps=True), _VIDEO),
    "wan_ti2v_image": (lambda: tiny_wan_i2v(expand_timesteps=True), _VIDEO | _FIRST_FRAME),
    "wan_i2v": (tiny_wan_i2v, _VIDEO | _FIRST_FRAME | _LONG_PROMPT),
    "wan_vace": (tiny_wan_vace, _VIDEO),
    "hunyuan": (tiny_hunyuan, _VIDEO | _HUNYUAN),
    "flux": (tiny_flux, _IMAGE),
    "flux_schnell": (lambda: tiny_flux(guidance_embeds=False), _IMAGE | {"guidance_scale": 0.0}),
    "flux_kontext": (
        tiny_flux_kontext,
        _IMAGE | {"image": _PICTURE, "max_area": 240 * 272, "_auto_resize": False},
    ),
    "sd3": (tiny_sd3, _IMAGE),
}


def run_tiny(pipe: DiffusionPipeline, arguments: dict[str, Any], **overrides: Any) -> Tensor:
    """Generate from `PROMPT` in three steps with a fixed seed and return the latents."""
    pipe.set_progress_bar_config(disable=True)
    settings = {
        "prompt": PROMPT,
        "num_inference_steps": 3,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
    }
    output = pipe(**settings | arguments | overrides)
    return output.frames if hasattr(output, "frames") else output.images
