"""Measures settings on the user's pipeline: time, PSNR and error of the latents, per prompt.

A setting that can't be chosen any more is given up between two calls of the pipeline; so is all
that is left when the time is over.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.acceleration import (
    accelerate_pipeline,
    acceleration_report,
    family_of,
    restore_pipeline,
    unwrapped,
)
from dit_accel.calibration import PipelineCall, generators
from dit_accel.call import TokenLayout
from dit_accel.choosing.choice import Point
from dit_accel.choosing.cost import CostModel
from dit_accel.choosing.settings import Setting
from dit_accel.choosing.times import AttentionTimes, Place, heads_of
from dit_accel.errors import DitAccelError, OptionError, SpeedWarning
from dit_accel.eval.fidelity import psnr, relative_l1
from dit_accel.generation import Progress, timed_call
from dit_accel.registry import method_class
from dit_accel.session import arguments_by_name

Row = dict[str, Any]
MOST_DB = 100.0
"""Stands for an infinite PSNR, which JSON has no number for."""


@dataclass(frozen=True)
class Generated:
    """What a pipeline made in one call.

    Attributes:
        frames: per prompt ``[T, 3, H, W]`` in [0, 1], float16; empty where not decoded.
        latents: per prompt, float32.
        seconds: of the denoising loop.
    """

    frames: list[Tensor]
    latents: list[Tensor]
    seconds: float


@dataclass(frozen=True)
class Seen:
    """What the dense generations were.

    Attributes:
        place: one self-attention call.
        layers: self-attention calls of a forward.
        steps: denoising steps.
        dense_s: seconds of one forward.
        prompts: how many.
    """

    place: Place
    layers: int
    steps: int
    dense_s: float
    prompts: int

    def to_row(self) -> Row:
        """Return everything as JSON-ready values."""
        place = self.place
        return {
            "grid": list(place.layout.grid),
            "text_length": place.layout.text_length,
            "text_first": place.layout.text_first,
            "heads": place.heads,
            "head_size": place.head_size,
            "batch": place.batch,
            "dtype": str(place.dtype).removeprefix("torch."),
            "device": str(place.device),
            "layers": self.layers,
            "steps": self.steps,
            "dense_s": self.dense_s,
            "prompts": self.prompts,
        }

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> Seen:
        """Undo `to_row`."""
        t, h, w = row["grid"]
        layout = TokenLayout((t, h, w), row["text_length"], row["text_first"])
        place = Place(
            layout,
            row["heads"],
            row["head_size"],
            row["batch"],
            getattr(torch, row["dtype"]),
            torch.device(row["device"]),
        )
        return cls(place, row["layers"], row["steps"], row["dense_s"], row["prompts"])


_CONFIRM_S = 2.0
"""Seconds of dense generations that are run again, at least one, to confirm a speed."""

Hopeless = Callable[[Sequence[float], Sequence[float], float, int, float], bool]
"""Whether a setting is given up; see `Budget.hopeless`."""


class OutOfTime(Exception):
    """The time for trying is over, or too short; says how far it came."""


class Trials:
    """Generates the prompts densely once, and by every setting that is asked for.

    Args:
        pipe: a pipeline, not accelerated.
        calls: keyword arguments of ``pipe(...)``; see `dit_accel.calibration`.
        decode: whether frames are compared, or latents alone.
        predict: foretells a setting's speed-up, for the record.
        hopeless: ends a setting's trial before all prompts are run; None: none ends early, and no
            speed is confirmed, for nothing is to be chosen.
        probe_s: seconds from now after which `OutOfTime` is raised in place of a generation, or as
            soon as it is clear that the dense ones will take longer; None: never. Speeds are
            confirmed all the same.
        progress: told of every generation.
    """

    def __init__(
        self,
        pipe: Any,
        calls: Sequence[PipelineCall],
        *,
        decode: bool = True,
        predict: Callable[[Setting], float | None] = lambda setting: None,
        hopeless: Hopeless | None = None,
        probe_s: float | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.pipe, self.calls, self.decode = pipe, list(calls), decode
        self.predict, self.hopeless, self.progress = predict, hopeless, progress
        self.refused: dict[str, str] = {}
        self._points: dict[str, Point] = {}
        self.seen: Seen | None = None
        self._dense: list[Generated] = []
        self._done = 0
        self._probe_s, self._began = probe_s, time.monotonic()

    def recall(self, points: Sequence[Point], seen: Seen) -> None:
        """Take points as measured: from earlier, under the same circumstances."""
        self._points |= {point.setting.key: point for point in points}
        self.seen = seen

    def look(self) -> Seen:
        """Return what is generated, from a dense generation or from earlier."""
        if self.seen is None:
            self.generate_dense()
        if self.seen is None:
            raise OptionError("the pipeline ran no transformer that this package knows.")
        return self.seen

    @property
    def points(self) -> list[Point]:
        """All that were measured or recalled."""
        return list(self._points.values())

    def generate_dense(self) -> list[Generated]:
        """Return what the pipeline makes without any acceleration, generated once."""
        if not self._dense:
            self._warm_up()
            with _Look(self.pipe) as look:
                dense = [self._generate_in_time(call, i) for i, call in enumerate(self.calls)]
            prompts = sum(len(one.latents) for one in dense)
            self.seen = self.seen or look.seen(sum(one.seconds for one in dense), prompts)
            self._dense = dense
        return self._dense

    def measure(self, setting: Setting, to_beat: float = 0.0) -> Point | None:
        """Return the point of a setting; None if this pipeline can't run it.

        Args:
            setting: what to run.
            to_beat: speed-up under which nobody wants to know more of it; see `Budget.hopeless`.

        Raises:
            OutOfTime: if the time is over; what was measured of this setting is lost.
        """
        key = setting.key
        known = self._points.get(key)
        if key not in self.refused and (known is None or self._wants_more(known, to_beat)):
            try:
                self._points[key] = self._measure(setting, to_beat)
            except DitAccelError as error:
                self.refused[key] = str(error)
            finally:
                restore_pipeline(self.pipe)
        return self._points.get(key)

    def _wants_more(self, known: Point, to_beat: float) -> bool:
        """Whether a trial was ended early that would not end so now, under another budget."""
        if len(known.error) == self.look().prompts:
            return False
        return not self._is_hopeless(known, to_beat)

    def _is_hopeless(self, point: Point, to_beat: float) -> bool:
        return self.hopeless is not None and self.hopeless(
            point.psnr_db, point.error, point.speedup, self.look().prompts, to_beat
        )

    def _may_be_chosen(self, point: Point, to_beat: float) -> bool:
        whole = self.hopeless is not None and len(point.error) == self.look().prompts
        return whole and point.speedup > to_beat and not self._is_hopeless(point, to_beat)

    def _measure(self, setting: Setting, to_beat: float) -> Point:
        accelerate_pipeline(self.pipe, list(setting.methods), **setting.options)
        if not self._dense:  # only now: what can't be attached is refused before a long run
            restore_pipeline(self.pipe)
            self.generate_dense()
            accelerate_pipeline(self.pipe, list(setting.methods), **setting.options)
        if self.pipe.device.type == "cuda":
            self._warm_up()
        with warnings.catch_warnings():
            # That a setting is slow is what is to be found out.
            warnings.simplefilter("ignore", SpeedWarning)
            point, times = self._compare(setting, to_beat)
            if self._may_be_chosen(point, to_beat):
                point = replace(point, speedup=point.speedup * self._confirmed(times))
        return point

    def _compare(self, setting: Setting, to_beat: float) -> tuple[Point, list[float]]:
        """Generate until it is hopeless; return what was seen, and the seconds of each call."""
        times: list[float] = []
        psnr_db: list[float] = []
        error: list[float] = []
        dense_s = 0.0
        for call, dense in zip(self.calls, self._dense, strict=True):
            self._check_time()
            made = self._generate(call)
            times.append(made.seconds)
            dense_s += dense.seconds
            for frames, wanted in zip(made.frames, dense.frames, strict=True):
                psnr_db.append(min(psnr(frames.float(), wanted.float()), MOST_DB))
            for latents, wanted in zip(made.latents, dense.latents, strict=True):
                error.append(relative_l1(latents, wanted))
            seconds = sum(times)
            point = Point(setting, seconds, dense_s / seconds, tuple(psnr_db), tuple(error))
            if self._is_hopeless(point, to_beat):
                break
        report = acceleration_report(self.pipe)
        skipped = report.blocks_skipped
        seen = replace(
            point,
            density=report.block_density,
            blocks_run=None if skipped is None else 1 - skipped,
            predicted=self.predict(setting),
        )
        return seen, times

    def _confirmed(self, times: Sequence[float]) -> float:
        """Return how many times its first speed-up the accelerated pipeline reaches now.

        What seems the fastest of many is often what was timed at a lucky moment, and the machine
        may be another one by now than when the dense generations ran: it got hot, or others use it.
        So some calls are timed once more, accelerated and then densely.
        """
        calls, dense_s = 0, 0.0
        while calls < len(self.calls) and dense_s < _CONFIRM_S:
            dense_s, calls = dense_s + self._dense[calls].seconds, calls + 1
        if not calls:
            return 1.0
        now = [self._generate(call).seconds for call in self.calls[:calls]]
        restore_pipeline(self.pipe)
        dense_now = [self._generate(call).seconds for call in self.calls[:calls]]
        return sum(dense_now) / sum(now) / (dense_s / sum(times[:calls]))

    def _check_time(self) -> None:
        if self._probe_s is not None and time.monotonic() - self._began > self._probe_s:
            raise OutOfTime(f"the {self._probe_s:g} s for trying settings are over")

    def _generate_in_time(self, call: Mapping[str, Any], number: int) -> Generated:
        """Generate one of the calls densely, if the others will have time, too."""
        if self._probe_s is not None and number:
            used_s = time.monotonic() - self._began
            needed_s = used_s * len(self.calls) / number
            if needed_s > self._probe_s:
                raise OutOfTime(
                    f"the dense generations alone take some {needed_s:.3g} s of the "
                    f"{self._probe_s:g} s for trying settings"
                )
        return self._generate(call)

    def _warm_up(self) -> None:
        """Run two steps, so that no time is spent on kernels, plans and first allocations later."""
        self._run({**self.calls[0], "num_inference_steps": 2})

    def _generate(self, call: Mapping[str, Any]) -> Generated:
        made = self._run(call)
        self._done += 1
        if self.progress is not None:
            self.progress("generations to try settings", self._done, 0)
        return made

    def _run(self, call: Mapping[str, Any]) -> Generated:
        arguments = {k: v for k, v in call.items() if k not in ("generator", "output_type")}
        configured = dict(getattr(self.pipe, "_progress_bar_config", {}))
        try:
            output, clock = timed_call(
                self.pipe,
                arguments,
                generators(call.get("generator", 0)),
                output_type="pt" if self.decode else "latent",
            )
        finally:
            self.pipe.set_progress_bar_config(**configured)
        frames: list[Tensor] = []
        if self.decode:
            made = output.frames if hasattr(output, "frames") else output.images[:, None]
            # Half precision is 20 dB finer than the 8 bits that will be written.
            frames = list(made.to(torch.float16).cpu())
        return Generated(frames, list(clock.latents.float().cpu()), clock.denoise_s)


@dataclass
class Prediction:
    """Foretells a setting's speed-up: of its attention alone, for what a cache skips is unknown."""

    times: AttentionTimes
    model: CostModel | None = None
    _known: dict[str, float | None] = field(default_factory=dict)

    def __call__(self, setting: Setting) -> float | None:
        """Return the speed-up; None if nothing can be said."""
        if self.model is None or len(setting.methods) != 1:
            return None
        name, key = setting.methods[0], str(setting)
        if "density" not in setting.options:
            return None
        if key not in self._known:
            cls: Any = method_class(name)
            place = self.model.workload.place
            try:
                method = cls(**setting.options.get(name, {}))
                method = method.at_density(setting.options["density"], place.layout)
                dense_steps = setting.options.get("dense_steps", 0)
                self._known[key] = self.model.speedup(method, dense_steps=dense_steps)
            except (DitAccelError, torch.OutOfMemoryError):
                self._known[key] = None
        return self._known[key]


class _Look:
    """Reads the first transformer call, and counts all of them."""

    def __init__(self, pipe: Any) -> None:
        self._pipe, self._family = pipe, family_of(pipe)
        self._place: Place | None = None
        self._layers = self._forwards = 0

    def __enter__(self) -> _Look:
        found = (getattr(self._pipe, name, None) for name in self._family.components)
        self._hooks = [
            unwrapped(one).register_forward_pre_hook(self._note, with_kwargs=True)
            for one in found
            if one is not None
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._forwards += 1
        if self._place is None:
            named = arguments_by_name(module, args, kwargs)
            layout = self._family.read_inputs(module, named).layouts[0]
            latents = named["hidden_states"]
            shape = (*heads_of(module), len(latents), latents.dtype, latents.device)
            self._place = Place(layout, *shape)
            self._layers = len(self._family.attention_layers(module))

    def seen(self, seconds: float, prompts: int) -> Seen | None:
        if self._place is None:
            return None
        steps = len(self._pipe.scheduler.timesteps)
        return Seen(self._place, self._layers, steps, seconds / self._forwards, prompts)
