"""tiny-hunyuan: a small `HunyuanVideoPipeline` of clips, with embedded guidance."""

from typing import ClassVar

from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)

from dit_accel.world import clips
from recipes.shared.words import CAPTION_TOKENS
from recipes.tiny_joint import text_encoders
from recipes.tiny_joint.autoencoders import make_clip_autoencoder
from recipes.tiny_joint.model import Bucket, Model


class TinyHunyuan(Model):
    """Two dual-stream and six single-stream blocks of three heads.

    The pipeline masks a prompt's padding, so training keeps little of it.
    """

    world = clips
    buckets = (
        Bucket("33x128", (33, 128, 128), 16_000, 32, 64, 2.0, 0.25, CAPTION_TOKENS),
        Bucket("33x256", (33, 256, 256), 4_000, 8, 16, 3.0, 0.45, CAPTION_TOKENS),
        Bucket("61x256", (61, 256, 256), 2_000, 4, 8, 3.0, 0.30, CAPTION_TOKENS),
    )
    smoke_buckets = (
        Bucket("9x32", (9, 32, 32), 8, 4, 4, 2.0, 0.5, CAPTION_TOKENS),
        Bucket("9x64", (9, 64, 64), 8, 4, 2, 3.0, 0.5, CAPTION_TOKENS),
    )
    # The stock autoencoder works on 17 frames at a time.
    autoencoder_sizes = ((4, 17, 128, 128), (4, 17, 128, 128), (1, 17, 256, 256))
    smoke_autoencoder_sizes = ((2, 9, 32, 32), (1, 5, 64, 64))
    measured_sizes = ((8, 33, 128, 128), (4, 33, 256, 256), (2, 61, 256, 256))
    guidance = (1.0, 6.0)
    lessons = (
        (text_encoders.teach_llama, "tokenizer", "text_encoder", 0.75),
        (text_encoders.teach_clip, "tokenizer_2", "text_encoder_2", 0.25),
    )
    defaults: ClassVar = {
        "steps": 20, "guidance": 3.5, "frames": 33, "height": 256, "width": 256, "fps": 16,
        "world": "clips",
    }  # fmt: skip

    def make_autoencoder(self, smoke):
        """See `Model`."""
        return make_clip_autoencoder((8, 8, 8, 8) if smoke else (8, 16, 48, 64))

    def load_autoencoder(self, folder):
        """See `Model`."""
        return AutoencoderKLHunyuanVideo.from_pretrained(folder).float().eval()

    def latent_shape(self, size):
        """See `Model`."""
        frames, height, width = size
        return 16, (frames - 1) // 4 + 1, height // 8, width // 8

    def make_text(self):
        """See `Model`."""
        words = clips.vocabulary()
        tokenizer, llama = text_encoders.make_llama(words)
        tokenizer_2, clip = text_encoders.make_clip(words)
        return {
            "tokenizer": tokenizer, "text_encoder": llama,
            "tokenizer_2": tokenizer_2, "text_encoder_2": clip,
        }  # fmt: skip

    def make_transformer(self, smoke):
        """See `Model`."""
        return HunyuanVideoTransformer3DModel(
            in_channels=16,
            out_channels=16,
            num_attention_heads=1 if smoke else 3,
            attention_head_dim=64,
            num_layers=1 if smoke else 2,
            num_single_layers=1 if smoke else 6,
            num_refiner_layers=1,
            patch_size=2,
            patch_size_t=1,
            guidance_embeds=True,
            text_embed_dim=text_encoders.LLAMA_SIZES["hidden_size"],
            pooled_projection_dim=text_encoders.CLIP_SIZES["hidden_size"],
            rope_axes_dim=(16, 24, 24),
        )

    def make_pipeline(self, text, vae, transformer):
        """See `Model`."""
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        return HunyuanVideoPipeline(scheduler=scheduler, vae=vae, transformer=transformer, **text)

    def embed(self, pipe, captions, length):
        """Llama's answers [B, L, C], CLIP's pooled ones [B, P] and the prompts' masks [B, L]."""
        return pipe.encode_prompt(captions, max_sequence_length=length)

    def velocity(self, transformer, x, sigma, text, guidance):
        """See `Model`."""
        words, pooled, mask = text
        return transformer(
            hidden_states=x,
            timestep=sigma * 1000,
            encoder_hidden_states=words,
            encoder_attention_mask=mask,
            pooled_projections=pooled,
            guidance=guidance * 1000,
            return_dict=False,
        )[0]
