"""tiny-sd3: a small `StableDiffusion3Pipeline` of pictures, with classifier-free guidance."""

from typing import Any, ClassVar

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from dit_accel.world import pictures
from recipes.tiny_joint import text_encoders
from recipes.tiny_joint.model import Bucket
from recipes.tiny_joint.tiny_flux import TinyFlux

PROJECTION = 96  # width of each CLIP encoder's pooled answer


class TinySd3(TinyFlux):
    """Five joint blocks of three heads, the first two with a second attention over the picture.

    Autoencoder and pictures are those of tiny-flux.
    """

    buckets = (
        Bucket("128", (128, 128), 48_000, 240, 128, shift=1.5, share=0.1, text_length=64),
        Bucket("256", (256, 256), 30_000, 60, 48, shift=2.0, share=0.55, text_length=256),
        Bucket("512", (512, 512), 6_000, 15, 10, shift=3.0, share=0.35, text_length=256),
    )
    guidance = None
    lessons = (
        (text_encoders.teach_clip, "tokenizer", "text_encoder", 0.2),
        (text_encoders.teach_clip, "tokenizer_2", "text_encoder_2", 0.2),
        (text_encoders.teach_t5, "tokenizer_3", "text_encoder_3", 0.6),
    )
    defaults: ClassVar = {
        "steps": 20, "guidance": 4.0, "height": 256, "width": 256, "world": "pictures"
    }  # fmt: skip

    def make_text(self):
        """See `Model`."""
        words = pictures.vocabulary()
        text: dict[str, Any] = {}
        text["tokenizer"], text["text_encoder"] = text_encoders.make_clip(words, PROJECTION)
        text["tokenizer_2"], text["text_encoder_2"] = text_encoders.make_clip(words, PROJECTION, 7)
        text["tokenizer_3"], text["text_encoder_3"] = text_encoders.make_t5(words)
        return text

    def make_transformer(self, smoke):
        """See `Model`."""
        heads = 1 if smoke else 3
        return SD3Transformer2DModel(
            sample_size=64,  # of the default picture: 256 pixels
            patch_size=2,
            in_channels=8,
            out_channels=8,
            num_layers=2 if smoke else 5,
            num_attention_heads=heads,
            attention_head_dim=64,
            caption_projection_dim=heads * 64,
            joint_attention_dim=text_encoders.T5_SIZES["d_model"],
            pooled_projection_dim=2 * PROJECTION,
            pos_embed_max_size=64,
            dual_attention_layers=(0, 1),
            qk_norm="rms_norm",
        )

    def make_pipeline(self, text, vae, transformer):
        """See `Model`."""
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        return StableDiffusion3Pipeline(
            scheduler=scheduler, vae=vae, transformer=transformer, **text
        )

    def embed(self, pipe, captions, length):
        """CLIP's and T5's answers in a row [B, 77 + L, C], and pooled ones [B, P]."""
        words, _, pooled, _ = pipe.encode_prompt(
            captions, None, None, do_classifier_free_guidance=False, max_sequence_length=length
        )
        return words, pooled

    def velocity(self, transformer, x, sigma, text, guidance):
        """See `Model`."""
        words, pooled = text
        return transformer(
            hidden_states=x,
            encoder_hidden_states=words,
            pooled_projections=pooled,
            timestep=sigma * 1000,
            return_dict=False,
        )[0]
