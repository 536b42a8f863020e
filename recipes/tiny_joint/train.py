"""Train tiny-hunyuan, tiny-flux or tiny-sd3 from nothing on one GPU and save a stock pipeline.

    python -m recipes.tiny_joint.train tiny-flux --output dit_accel/models/tiny-flux

Stages, each of which leaves files in the work folder and is skipped when they are there: `text`
teaches the text encoders which words belong together, `vae` trains the autoencoder, `latents` draws
and encodes scenes, `dit` trains the transformer and writes the pipeline, every few minutes as far
as it is. A run that was cut short, or that `--deadline-s` ended, goes on from its last checkpoint
when started again; `--start FOLDER` keeps a saved pipeline's autoencoder and text encoders and
trains its transformer on. With several GPUs, stages and sizes (`--buckets`) can run side by side,
and `--stages rehearse` tries the transformer's steps on noise, which fills the compiler's cache.
"""

import argparse
import copy
import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from recipes.shared.portable import make_portable, save_half
from recipes.tiny_joint import autoencoders
from recipes.tiny_joint.model import Bucket, Model
from recipes.tiny_joint.tiny_flux import TinyFlux
from recipes.tiny_joint.tiny_hunyuan import TinyHunyuan
from recipes.tiny_joint.tiny_sd3 import TinySd3
from recipes.tiny_joint.trainer import ALONE, Trainer, initialise, validate

MODELS: dict[str, type[Model]] = {
    "tiny-hunyuan": TinyHunyuan,
    "tiny-flux": TinyFlux,
    "tiny-sd3": TinySd3,
}
STAGES = ("text", "vae", "latents", "dit")
FACTS = "training.json"  # what the training measured, for the model card
VALIDATION_BATCHES = 4
EMBED_BATCH = 256


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--output", type=Path, required=True, help="folder of the saved pipeline")
    parser.add_argument(
        "--work", type=Path, help="folder of intermediate files (default: OUTPUT.work)"
    )
    parser.add_argument(
        "--stages", nargs="+", choices=(*STAGES, "rehearse"), default=STAGES, help="only these"
    )
    parser.add_argument("--start", type=Path, help="a saved pipeline of this model to train on")
    parser.add_argument("--buckets", nargs="+", help="only these sizes in the stage latents")
    parser.add_argument("--text-seconds", type=float, default=90)
    parser.add_argument("--vae-seconds", type=float, default=150)
    parser.add_argument("--dit-seconds", type=float, default=1000)
    parser.add_argument(
        "--save-every-s", type=float, default=240, help="time between pipelines written in training"
    )
    parser.add_argument(
        "--deadline-s", type=float, help="stop with a checkpoint this long after the start"
    )
    parser.add_argument("--no-capture", action="store_true", help="no CUDA graphs: slower")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny parts, to try the code")
    args = parser.parse_args()
    args.work = args.work or args.output.with_name(args.output.name + ".work")
    return args


class Run:
    """One run of the recipe."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.started = args, time.monotonic()
        self.model = MODELS[args.model]()
        self.work, self.device = args.work, args.device
        self.draw = self.model.world.make_renderer()
        self.buckets = self.model.smoke_buckets if args.smoke else self.model.buckets
        self.work.mkdir(parents=True, exist_ok=True)
        if args.start is not None and not (self.work / "vae").exists():
            self._take_over(args.start)

    def _take_over(self, folder: Path) -> None:
        """Bring what a saved pipeline has into the work folder, as if its stages had run here."""
        shutil.copytree(folder / "vae", self.work / "vae", dirs_exist_ok=True)
        for name in self.model.make_text():
            shutil.copytree(folder / name, self.work / "text" / name, dirs_exist_ok=True)
        facts = json.loads((folder / FACTS).read_text())
        facts["earlier_s"] = facts["transformer_s"]
        facts["earlier_steps"] = facts["transformer_steps"]
        self.note(**facts)

    def log(self, line: str) -> None:
        """Print a line with the time, and keep it in the work folder."""
        line = f"[{time.monotonic() - self.started:6.1f} s] {line}"
        print(line, flush=True)
        with (self.work / "log.txt").open("a") as file:
            file.write(line + "\n")

    def note(self, **entries: object) -> None:
        """Keep facts for the model card."""
        (self.work / FACTS).write_text(json.dumps({**self.facts(), **entries}, indent=1) + "\n")

    def facts(self) -> dict:
        """The facts kept so far."""
        path = self.work / FACTS
        return json.loads(path.read_text()) if path.exists() else {}

    def train_autoencoder(self) -> None:
        """Stage `vae`."""
        model, smoke = self.model, self.args.smoke
        vae = model.make_autoencoder(smoke)
        sizes = list(model.smoke_autoencoder_sizes if smoke else model.autoencoder_sizes)
        started = time.monotonic()
        steps = autoencoders.train_autoencoder(
            vae, model.world, self.draw, sizes, self.args.vae_seconds, self.device, self.log
        )
        spent = round(time.monotonic() - started)
        autoencoders.measure_latents(
            vae, model.world, self.draw, sizes[0], 2 if smoke else 16, self.device
        )
        save_half(vae, self.work / "vae")
        vae = model.load_autoencoder(self.work / "vae").to(self.device)
        psnr = {}
        for size in sizes[:1] if smoke else model.measured_sizes:
            name = "x".join(map(str, size[1:]))
            value = autoencoders.reconstruction_psnr(
                vae, model.world, self.draw, size, 4, self.device
            )
            psnr[name] = round(value, 2)
            self.log(f"autoencoder: {value:.2f} dB on unseen scenes of {name}")
        self.note(autoencoder_steps=steps, autoencoder_s=spent, autoencoder_psnr_db=psnr)

    def encode_scenes(self) -> None:
        """Stage `latents`."""
        vae = self.model.load_autoencoder(self.work / "vae").to(self.device)
        draw = self.model.world.make_renderer(compiled=self.device == "cuda")
        started = time.monotonic()
        for i, bucket in enumerate(self.buckets):
            path = self.latents(bucket)
            if path.exists() or bucket.name not in (self.args.buckets or [bucket.name]):
                continue
            held_out = bucket.encode_batch * VALIDATION_BATCHES
            stored = {
                "train": self._encode(vae, draw, bucket, bucket.scenes, 11 + i),
                "held out": self._encode(vae, draw, bucket, held_out, 1011 + i),
            }
            torch.save(stored, path.with_suffix(".partial"))
            path.with_suffix(".partial").replace(path)
            self.log(f"latents: {bucket.scenes} scenes of {bucket.name}")
        self.note(
            scenes={b.name: b.scenes for b in self.buckets},
            latents_s=round(time.monotonic() - started),
        )

    def latents(self, bucket: Bucket) -> Path:
        """The file of a bucket's encoded scenes."""
        return self.work / f"latents-{bucket.name}.pt"

    @torch.no_grad()
    def _encode(self, vae, draw: Callable, bucket: Bucket, count: int, seed: int):
        """Normalised latents in bf16, and captions."""
        world, rng, latents, captions = self.model.world, random.Random(seed), [], []
        for _ in range(count // bucket.encode_batch):
            size = (bucket.encode_batch, *bucket.size)
            scenes, x = autoencoders.drawn(world, draw, size, rng, self.device)
            half = torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda")
            with half, autoencoders.quick_to_train(vae):
                z = vae.encode(x).latent_dist.mean.float()
            shift = getattr(vae.config, "shift_factor", None) or 0.0
            latents.append(((z - shift) * vae.config.scaling_factor).bfloat16())
            captions += [world.caption(s, rng) for s in scenes]
        return torch.cat(latents), captions

    def teach_text(self) -> None:
        """Stage `text`."""
        text, started = self.model.make_text(), time.monotonic()
        self.model.teach(text, self.args.text_seconds, self.log, self.device)
        for name, part in text.items():
            part = part if name.startswith("tokenizer") else part.cpu()
            part.save_pretrained(self.work / "text" / name)
        self.note(text_s=round(time.monotonic() - started))

    def load_text(self) -> dict:
        """Tokenizers and taught text encoders."""
        text = self.model.make_text()
        for name, part in text.items():
            if not name.startswith("tokenizer"):
                text[name] = type(part).from_pretrained(self.work / "text" / name).float().eval()
        return text

    @torch.no_grad()
    def _embed(self, pipe: DiffusionPipeline, captions: list[str], length: int):
        """`Model.embed` in pieces, floats in bf16."""
        parts = []
        for i in range(0, len(captions), EMBED_BATCH):
            made = self.model.embed(pipe, captions[i : i + EMBED_BATCH], length)
            parts.append([t.bfloat16() if t.is_floating_point() else t for t in made])
        return tuple(torch.cat(p) for p in zip(*parts, strict=True))

    def _prepare(
        self, trainer: Trainer, pipe: DiffusionPipeline, bucket: Bucket, latents, captions
    ) -> None:
        """Make the training steps of a bucket."""
        words = self._embed(pipe, captions, bucket.text_length)
        empty = self._embed(pipe, [""], bucket.text_length)
        for guided in (False,) if self.model.guidance is None else (False, True):
            trainer.add(bucket, latents, words, empty, guided=guided)

    def rehearse(self) -> None:
        """Take a few steps of every size on noise."""
        model = self.model
        transformer = model.make_transformer(self.args.smoke)
        initialise(transformer)
        pipe = model.make_pipeline(model.make_text(), None, None).to(self.device)
        trainer = Trainer(model, transformer, self.device, self.log, not self.args.no_capture)
        for bucket in self.buckets:
            shape = (2 * bucket.batch, *model.latent_shape(bucket.size))
            noise = torch.randn(shape, device=self.device).bfloat16()
            self._prepare(trainer, pipe, bucket, noise, ["a red circle"] * len(noise))
        trainer.measure(self.log)

    def train_transformer(self) -> None:
        """Stage `dit`."""
        args, model = self.args, self.model
        stored = {
            b.name: torch.load(self.latents(b), map_location=self.device) for b in self.buckets
        }
        text = self.load_text()
        transformer = model.make_transformer(args.smoke)
        if args.start is None:
            torch.manual_seed(2)
            initialise(transformer)
        else:
            transformer = type(transformer).from_pretrained(args.start, subfolder="transformer")
        pipe = model.make_pipeline(text, None, None).to(self.device)
        trainer = Trainer(model, transformer, self.device, self.log, not self.args.no_capture)
        checkpoint = self.work / "checkpoint.pt"
        if checkpoint.exists():
            trainer.load(checkpoint)
            self.log(f"transformer: goes on from step {trainer.done}")
        held_out = {}
        for bucket in self.buckets:
            self._prepare(trainer, pipe, bucket, *stored[bucket.name]["train"])
            latents, captions = stored[bucket.name]["held out"]
            held_out[bucket] = latents, self._embed(pipe, captions, bucket.text_length)

        def save() -> torch.nn.Module:
            """Write a pipeline of the averaged weights and what is needed to go on."""
            averaged = model.make_transformer(args.smoke)
            trainer.store_average(averaged)
            save_pipeline(model, text, self.work, averaged, args.output)
            trainer.save(checkpoint)
            self.note(
                transformer_steps=trainer.done + self.facts().get("earlier_steps", 0),
                transformer_s=round(trainer.spent) + self.facts().get("earlier_s", 0),
            )
            shutil.copy(self.work / FACTS, args.output)
            self.log(f"transformer: saved at step {trainer.done}")
            return averaged

        deadline = None if args.deadline_s is None else self.started + args.deadline_s
        alone = ALONE if args.start is None else 0.0
        finished = trainer.train(args.dit_seconds, deadline, save, args.save_every_s, alone=alone)
        averaged = save().to(self.device).eval()
        self.log(f"transformer: {trainer.done} steps, {'done' if finished else 'to be resumed'}")
        losses = {}
        for bucket, (latents, words) in held_out.items():
            loss = validate(model, averaged, latents, words, bucket.encode_batch)
            losses[bucket.name] = round(loss, 4)
            self.log(f"transformer: loss {losses[bucket.name]} on unseen scenes of {bucket.name}")
        gpu = torch.cuda.get_device_name() if self.device == "cuda" else self.device
        self.note(transformer_loss=losses, device=gpu)
        shutil.copy(self.work / FACTS, args.output)


def save_pipeline(model: Model, text: dict, work: Path, transformer, output: Path) -> None:
    """Write the pipeline in fp16, in a form that transformers 4 and 5 load alike."""
    halves: dict[str, Callable] = {}
    for name, part in text.items():
        halves[name] = part if name.startswith("tokenizer") else copy.deepcopy(part).cpu().half()
    vae = model.load_autoencoder(work / "vae").half()
    pipe = model.make_pipeline(halves, vae, copy.deepcopy(transformer).cpu().half())
    pipe.save_pretrained(output)
    make_portable(output)
    (output / "dit_accel.json").write_text(json.dumps(model.defaults, indent=2) + "\n")


def main() -> None:
    """Run the stages asked for."""
    args = arguments()
    torch.set_num_threads(min(4, torch.get_num_threads()))  # scenes are small: more only wait
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    # Runs with cuDNN's attention ended in illegal reads; its part in them is not proven.
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch._dynamo.config.recompile_limit = 64
    run = Run(args)
    if "text" in args.stages and not (run.work / "text").exists():
        run.teach_text()
    if "vae" in args.stages and not (run.work / "vae").exists():
        run.train_autoencoder()
    if "latents" in args.stages and not all(run.latents(b).exists() for b in run.buckets):
        run.encode_scenes()
    if "rehearse" in args.stages:
        run.rehearse()
    if "dit" in args.stages:
        run.train_transformer()


if __name__ == "__main__":
    main()
