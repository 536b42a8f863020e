"""Train tiny-wan from nothing on one GPU and save it as a stock `WanPipeline`.

    python -m recipes.tiny_wan.train --output dit_accel/models/tiny-wan

Stages, each of which leaves a file in the work folder and is skipped when that is there:
`vae` trains the autoencoder, `latents` draws and encodes clips, `text` teaches the text encoder
which words belong together, `dit` trains transformer and text encoder and writes the pipeline.
"""

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5EncoderModel

from dit_accel.world import clips as world
from recipes.shared.portable import make_portable, save_half
from recipes.tiny_wan import dit, text
from recipes.tiny_wan import vae as autoencoder

STAGES = ("vae", "latents", "text", "dit")
VAE_SIZES = [(4, 17, 128, 128)] * 3 + [(2, 33, 128, 128)] + [(1, 17, 256, 256)] * 2
BUCKETS = (
    dit.Bucket("33x128", (33, 128, 128), 24_000, 32, 64, shift=2.0, share=0.25),
    dit.Bucket("33x256", (33, 256, 256), 5_600, 8, 16, shift=3.0, share=0.45),
    dit.Bucket("61x256", (61, 256, 256), 2_800, 4, 8, shift=3.0, share=0.30),
)
SMOKE_VAE_SIZES = [(2, 9, 32, 32), (1, 5, 64, 64)]
SMOKE_BUCKETS = (
    dit.Bucket("9x32", (9, 32, 32), 8, 4, 4, shift=2.0, share=0.5),
    dit.Bucket("9x64", (9, 64, 64), 8, 4, 2, shift=3.0, share=0.5),
)
VALIDATION_BATCHES = 4
# Share of the transformer's time spent on the first, smallest bucket alone.
ALONE, ALONE_RESUMED = 0.35, 0.15


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the saved pipeline")
    parser.add_argument(
        "--work", type=Path, help="folder of intermediate files (default: OUTPUT.work)"
    )
    parser.add_argument(
        "--stage", choices=(*STAGES, "all"), default="all", help="the last stage to run"
    )
    parser.add_argument("--vae-seconds", type=float, default=150)
    parser.add_argument("--text-seconds", type=float, default=30)
    parser.add_argument("--dit-seconds", type=float, default=430)
    parser.add_argument(
        "--deadline-s", type=float, help="end training by this many seconds after the start"
    )
    parser.add_argument(
        "--resume", action="store_true", help="start from the transformer in OUTPUT"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny models and clips, to try the code"
    )
    args = parser.parse_args()
    args.work = args.work or args.output.with_name(args.output.name + ".work")
    return args


def run_vae(args: argparse.Namespace, draw: Callable, log: Callable) -> None:
    """Train the autoencoder and save it in fp16."""
    vae = autoencoder.make_vae(autoencoder.SMOKE_CONFIG if args.smoke else autoencoder.CONFIG)
    sizes = SMOKE_VAE_SIZES if args.smoke else VAE_SIZES
    on_gpu = args.device == "cuda"
    with autoencoder.whole_sequence(vae, compiled=on_gpu):
        steps = autoencoder.train_vae(vae, sizes, args.vae_seconds, args.device, draw, log)
        log(f"autoencoder: {steps} steps")
        autoencoder.measure_latents(
            vae,
            (4, 9, 32, 32) if args.smoke else (16, 33, 128, 128),
            2 if args.smoke else 32,
            args.device,
            draw,
        )
    save_half(vae, args.work / "vae")
    with autoencoder.whole_sequence(vae):
        for size in (
            [(2, 9, 32, 32)]
            if args.smoke
            else [(8, 33, 128, 128), (4, 33, 256, 256), (2, 61, 256, 256)]
        ):
            psnr = autoencoder.reconstruction_psnr(vae, size, 4, args.device, draw)
            log(f"autoencoder: {psnr:.2f} dB on unseen clips of {size[1]}x{size[2]}x{size[3]}")


def run_latents(args: argparse.Namespace, draw: Callable, log: Callable) -> None:
    """Draw and encode the clips that the transformer learns from, and a few to validate on."""
    vae = load_vae(args.work).to(args.device)
    tokenizer = text.make_tokenizer()
    latents = {}
    with autoencoder.whole_sequence(vae, compiled=args.device == "cuda"):
        for i, bucket in enumerate(SMOKE_BUCKETS if args.smoke else BUCKETS):
            held_out = bucket.encode_batch * VALIDATION_BATCHES
            latents[bucket.name] = {
                part: dit.encode_clips(vae, tokenizer, bucket, clips, seed, args.device, draw)
                for part, clips, seed in (
                    ("train", bucket.clips, 11 + i),
                    ("held out", held_out, 1011 + i),
                )
            }
            log(f"latents: {bucket.clips} clips of {bucket.name}")
    torch.save(latents, args.work / "latents.pt")
    log("latents: saved")


def run_text(args: argparse.Namespace, log: Callable) -> None:
    """Prepare the text encoder."""
    encoder = text.make_text_encoder(text.SMOKE_CONFIG if args.smoke else text.CONFIG)
    right = text.pretrain(encoder, dit.TEXT_TOKENS, args.text_seconds, args.device, log)
    log(f"text: {100 * right:.1f} % of the attributes right")
    encoder.cpu().save_pretrained(args.work / "text_encoder")


def run_dit(args: argparse.Namespace, log: Callable) -> None:
    """Train transformer and text encoder, and save the whole pipeline."""
    latents = torch.load(args.work / "latents.pt", map_location=args.device)
    buckets = SMOKE_BUCKETS if args.smoke else BUCKETS
    if args.resume:
        transformer = WanTransformer3DModel.from_pretrained(args.output / "transformer").float()
    else:
        transformer = dit.make_dit(dit.SMOKE_CONFIG if args.smoke else dit.CONFIG)
    encoder = UMT5EncoderModel.from_pretrained(args.work / "text_encoder").float()
    trainer = dit.Trainer(transformer, encoder, args.device, log)
    for bucket in buckets:
        trainer.add(bucket, *latents[bucket.name]["train"])
    seconds = args.dit_seconds
    if args.deadline_s is not None:
        seconds = min(seconds, args.deadline_s - (time.monotonic() - args.started))
    alone = ALONE_RESUMED if args.resume else ALONE
    steps = trainer.train(alone * seconds, {buckets[0].name: 1.0}, hold=1.0)
    steps += trainer.train((1 - alone) * seconds, {b.name: b.share for b in buckets}, hold=0.25)
    log(f"transformer: {steps} steps")
    trainer.use_average()
    save_pipeline(args, transformer, encoder)
    log("pipeline saved")
    for bucket in buckets:
        loss = trainer.validate(*latents[bucket.name]["held out"], bucket.encode_batch)
        log(f"transformer: loss {loss:.4f} on unseen clips of {bucket.name}")


def load_vae(work: Path) -> AutoencoderKLWan:
    """The trained autoencoder in fp32."""
    return AutoencoderKLWan.from_pretrained(work / "vae").float().eval()


def save_pipeline(args: argparse.Namespace, transformer, encoder) -> None:
    """Write the pipeline in fp16, in a form that transformers 4 and 5 load alike."""
    transformer, encoder = (copy.deepcopy(m).cpu().half() for m in (transformer, encoder))
    for block in transformer.blocks:
        block.attn2.set_processor(dit.WanAttnProcessor())
    pipe = WanPipeline(
        tokenizer=text.make_tokenizer(),
        text_encoder=encoder,
        vae=load_vae(args.work).half(),
        transformer=transformer,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )
    pipe.save_pretrained(args.output)
    make_portable(args.output)


def main() -> None:
    """Run the stages up to the one asked for."""
    args = arguments()
    args.started = time.monotonic()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch._dynamo.config.recompile_limit = 64

    def log(line: str) -> None:
        line = f"[{time.monotonic() - args.started:6.1f} s] {line}"
        print(line, flush=True)
        with (args.work / "log.txt").open("a") as file:
            file.write(line + "\n")

    draw = world.make_renderer(compiled=args.device == "cuda")
    wanted = STAGES if args.stage == "all" else STAGES[: STAGES.index(args.stage) + 1]
    if "vae" in wanted and not (args.work / "vae").exists():
        run_vae(args, draw, log)
    if "latents" in wanted and not (args.work / "latents.pt").exists():
        run_latents(args, draw, log)
    if "text" in wanted and not (args.work / "text_encoder").exists():
        run_text(args, log)
    if "dit" in wanted:
        run_dit(args, log)


if __name__ == "__main__":
    main()
