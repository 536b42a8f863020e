"""tiny-flux: a small `FluxPipeline` of pictures, with embedded guidance."""

from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)

from dit_accel.world import pictures
from recipes.tiny_joint import text_encoders
from recipes.tiny_joint.autoencoders import make_picture_autoencoder
from recipes.tiny_joint.model import Bucket, Model


class TinyFlux(Model):
    """Three dual-stream and five single-stream blocks of three heads."""

    world = pictures
    buckets = (
        Bucket("128", (128, 128), 48_000, 240, 128, shift=1.5, share=0.1, text_length=128),
        Bucket("256", (256, 256), 30_000, 60, 48, shift=2.0, share=0.55, text_length=256),
        Bucket("512", (512, 512), 6_000, 15, 10, shift=3.0, share=0.35, text_length=512),
    )
    smoke_buckets = (
        Bucket("32", (32, 32), 8, 4, 4, shift=2.0, share=0.5, text_length=64),
        Bucket("64", (64, 64), 8, 4, 2, shift=3.0, share=0.5, text_length=64),
    )
    autoencoder_sizes = ((32, 128, 128), (12, 256, 256), (12, 256, 256), (3, 512, 512))
    smoke_autoencoder_sizes = ((2, 32, 32), (1, 64, 64))
    measured_sizes = ((16, 256, 256), (4, 512, 512))
    guidance = (1.0, 6.0)
    lessons = (
        (text_encoders.teach_clip, "tokenizer", "text_encoder", 0.3),
        (text_encoders.teach_t5, "tokenizer_2", "text_encoder_2", 0.7),
    )
    defaults: ClassVar = {
        "steps": 20, "guidance": 2.5, "height": 256, "width": 256, "world": "pictures"
    }  # fmt: skip

    def make_autoencoder(self, smoke):
        """See `Model`."""
        return make_picture_autoencoder((8, 8, 8) if smoke else (32, 64, 96))

    def load_autoencoder(self, folder):
        """See `Model`."""
        return AutoencoderKL.from_pretrained(folder).float().eval()

    def latent_shape(self, size):
        """See `Model`."""
        return 8, size[0] // 4, size[1] // 4

    def make_text(self):
        """See `Model`."""
        words = pictures.vocabulary()
        tokenizer, clip = text_encoders.make_clip(words)
        tokenizer_2, t5 = text_encoders.make_t5(words)
        return {
            "tokenizer": tokenizer, "text_encoder": clip,
            "tokenizer_2": tokenizer_2, "text_encoder_2": t5,
        }  # fmt: skip

    def make_transformer(self, smoke):
        """See `Model`."""
        return FluxTransformer2DModel(
            in_channels=32,
            num_layers=1 if smoke else 3,
            num_single_layers=1 if smoke else 5,
            num_attention_heads=1 if smoke else 3,
            attention_head_dim=64,
            joint_attention_dim=text_encoders.T5_SIZES["d_model"],
            pooled_projection_dim=text_encoders.CLIP_SIZES["hidden_size"],
            guidance_embeds=True,
            axes_dims_rope=(8, 28, 28),
        )

    def make_pipeline(self, text: dict[str, Any], vae, transformer):
        """See `Model`."""
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
        return FluxPipeline(scheduler=scheduler, vae=vae, transformer=transformer, **text)

    def embed(self, pipe, captions, length):
        """T5's answers [B, L, C] and CLIP's pooled ones [B, P]."""
        return pipe.encode_prompt(captions, None, max_sequence_length=length)[:2]

    def velocity(self, transformer, x, sigma, text, guidance):
        """See `Model`; latents travel as tokens of 2 x 2."""
        batch, channels, height, width = x.shape
        words, pooled = text
        tokens = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5)
        rows = torch.arange(height // 2, device=x.device)[:, None].expand(-1, width // 2)
        columns = torch.arange(width // 2, device=x.device).expand(height // 2, -1)
        places = torch.stack((torch.zeros_like(rows), rows, columns), -1).flatten(0, 1)
        out = transformer(
            hidden_states=tokens.flatten(3).flatten(1, 2),
            encoder_hidden_states=words,
            pooled_projections=pooled,
            timestep=sigma,
            img_ids=places.float(),
            txt_ids=torch.zeros(words.shape[1], 3, device=x.device),
            guidance=guidance,
            return_dict=False,
        )[0]
        out = out.view(batch, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return out.flatten(4).flatten(2, 3)
