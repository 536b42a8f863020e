"""What `accelerate_pipeline` asks when it is given a budget, a calibration, or nothing at all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch

from dit_accel import __version__
from dit_accel.caching.brought import brought_options
from dit_accel.calibration import PipelineCall, bundled_calls, calls_for
from dit_accel.calibration_file import circumstances
from dit_accel.choosing.budget import USUAL_PSNR, Budget
from dit_accel.choosing.choice import Choice, choose, kept_path, load, save
from dit_accel.choosing.cost import CostModel, Workload
from dit_accel.choosing.search import Search
from dit_accel.choosing.settings import Line, Setting, attention_lines, cache_lines
from dit_accel.choosing.times import AttentionTimes
from dit_accel.choosing.trials import OutOfTime, Prediction, Seen, Trials
from dit_accel.errors import OptionError, did_you_mean
from dit_accel.generation import GenerationRequest, Progress
from dit_accel.guard.options import guard_option, settle_guard
from dit_accel.models import world_of
from dit_accel.parallel.pipeline import is_spread
from dit_accel.presets import AUTO_ORDER, DEFAULT
from dit_accel.registry import list_methods, method_class, option_names
from dit_accel.world.worlds import fixed_prompts

Row = dict[str, Any]
PROMPTS = 16
"""Fixed prompts of a bundled model that are tried where none are given."""
_GENERAL = ("dense_steps", "dense_layers", "min_tokens", "backend", "precision", "guard")
_TOO_SHORT = (
    "probe_s: {}, and nothing was tried yet. Give more time, fewer prompts or fewer steps; or no "
    "budget, which takes a careful setting without trying any."
)
_BATCHES = (
    "Prompts were tried together, and a cache that looks decides for a batch as a whole: it may "
    "skip other steps where prompts are generated one by one. Give probe= a list of calls to try "
    "that."
)
_USUAL_STEPS = 0.25
"""Dense first steps of all attention settings that are tried."""


@dataclass(frozen=True)
class Settled:
    """What to attach in place of a budget.

    Attributes:
        choice: the choice, for the report.
        setting: what to run.
        grid: video tokens that it was made for; None if any may come.
        steps: denoising steps, likewise.
        source: the file that it comes from; "" if it was just made.
    """

    choice: Choice
    setting: Setting
    grid: tuple[int, ...] | None = None
    steps: int | None = None
    source: str = ""

    def applied_to(self, general: Mapping[str, Any]) -> tuple[list[Any], Row, Row]:
        """Return methods, `accelerate_pipeline`'s own options, and the methods' options."""
        own = {name: self.setting.options.get(name, {}) for name in self.setting.methods}
        given = {k: v for k, v in self.setting.options.items() if k not in own}
        sparse = any(method_class(name).kind == "attention" for name in own)
        if not sparse or self.setting.methods == ("dense",):
            general = {**dict.fromkeys(general), "backend": "auto"}
        return list(self.setting.methods), {**general, **given}, own


def settle(
    pipe: Any,
    names: Sequence[Any],
    wish: Mapping[str, Any],
    *,
    general: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Settled:
    """Choose what to attach to a pipeline that is not accelerated.

    Args:
        pipe: the pipeline.
        names: "auto", or the methods to choose among.
        wish: the `Budget` by its fields, and "probe", "probe_s", "calibration" and "progress" as
            `accelerate_pipeline` has them. No budget stands for `USUAL_PSNR`.
        general: `accelerate_pipeline`'s own options.
        options: of single methods.

    Raises:
        OptionError: if options contradict the budget or one another, if the budget can't be met,
            or if the calibration is of another model, size or version.
    """
    budget = Budget(*(wish[name] for name in ("min_psnr", "max_error", "target_speedup")))
    if budget == Budget():
        budget = Budget(min_psnr=USUAL_PSNR)
    _check(names, general, options, wish)
    if wish["calibration"] is not None:
        return _from_file(pipe, names, budget, Path(wish["calibration"]), _given(general))
    made = calibrate_auto(
        pipe,
        budget,
        wish["probe"],
        names=names,
        general=general,
        options=options,
        probe_s=wish["probe_s"],
        progress=wish["progress"],
    )
    return Settled(made.choice, _setting(made.choice))


@dataclass(frozen=True)
class Made:
    """What `calibrate_auto` found: the choice, and what it holds for."""

    choice: Choice
    where: Row
    seen: Row

    def save(self, path: Path) -> None:
        """Write the points, so that other budgets can be served from them, too."""
        save(path, self.where, self.seen, self.choice.points)


def calibrate_auto(
    pipe: Any,
    budget: Budget,
    probe: PipelineCall | Sequence[PipelineCall] | None = None,
    *,
    names: Sequence[str] = ("auto",),
    general: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    probe_s: float | None = None,
    progress: Progress | None = None,
    times: AttentionTimes | None = None,
) -> Made:
    """Try settings on a pipeline and choose one; the pipeline is left as it is.

    Points that were measured earlier under the same circumstances are taken from the user's cache
    folder, and new ones are kept there.

    Args:
        pipe, budget, probe, names, general, options: see `settle`.
        probe_s: seconds after which no more is generated; None: no limit.
        progress: told of every generation.
        times: what attention calls take; None: the table, or measured here.

    Raises:
        OptionError: see `settle`.
    """
    check_probe_s(probe_s)
    if is_spread(pipe):
        raise OptionError(
            "a budget times settings, and ranks would time, and choose, differently: measure on "
            "one GPU, before parallelize_pipeline or with `dit-accel calibrate --method auto`, and "
            "give every rank the file, calibration=...."
        )
    calls, general = _calls(pipe, probe), _given(general or {})
    times = AttentionTimes(guard=settle_guard(general.get("guard"))) if times is None else times
    told = Prediction(times)
    decode = budget.min_psnr is not None or budget.max_error is None
    trials = Trials(
        pipe,
        calls,
        decode=decode,
        predict=told,
        hopeless=budget.hopeless,
        probe_s=probe_s,
        progress=progress,
    )
    where = _circumstances(pipe, calls, {**general, **(options or {})}, trials.decode)
    path = kept_path(where)
    if path is not None and path.exists():
        _recall(trials, path, where)
    try:
        seen = trials.look()
    except OutOfTime as short:
        raise OptionError(_TOO_SHORT.format(short)) from None
    told.model = CostModel(Workload(seen.place, seen.layers, seen.steps, 1), seen.dense_s, times)
    lines = lines_for(pipe, names, seen.place.layout, general, options or {})
    search, ended = Search(budget, lines, trials.measure, told), ""
    try:
        search.run()
    except OutOfTime as over:
        if not search.points:
            raise OptionError(_TOO_SHORT.format(over)) from None
        ended = str(over)
    finally:
        if path is not None and trials.points and where is not None:
            save(path, where, seen.to_row(), trials.points)
    refused = {**trials.refused, **search.idle}
    choice = choose(
        search.points, budget, refused, list(times.sources), prompts=seen.prompts, ended=ended
    )
    methods = () if choice.chosen is None else choice.chosen.setting.methods
    caches = any(method_class(name).kind == "cache" for name in methods)
    if caches and any(map(_is_batch, calls)):
        choice = replace(choice, why=f"{choice.why.removesuffix('.')}. {_BATCHES}")
    return Made(choice, {**_about(pipe), **_tried_with(general)}, seen.to_row())


def probe_for(
    pipe: Any, request: GenerationRequest, count: int | None = None
) -> list[PipelineCall]:
    """Return calls to try settings on before a request: its size and steps, other noise.

    The prompts are fixed ones of a bundled model, `PROMPTS` unless ``count`` says how many; of
    another, the request's own from so many seeds, usually four.
    """
    world = world_of(pipe)
    if world is None:
        seeds = range(request.seed + 1, request.seed + 1 + (count or 4))
        return calls_for(pipe, [replace(request, seed=seed) for seed in seeds])
    count = count or PROMPTS
    texts = [entry["prompt"] for entry in fixed_prompts(world)[:: 64 // count][:count]]
    tried = [replace(request, prompt=text, seed=seed) for seed, text in enumerate(texts, 1)]
    return calls_for(pipe, tried)


def _is_batch(call: PipelineCall) -> bool:
    prompt = call.get("prompt")
    return isinstance(prompt, list | tuple) and len(prompt) > 1


def check_probe_s(probe_s: Any) -> None:
    """Raise `OptionError` unless a limit is None or a number of seconds."""
    number = isinstance(probe_s, int | float) and not isinstance(probe_s, bool)
    if probe_s is not None and not (number and 0 < probe_s < math.inf):
        raise OptionError(f"probe_s={probe_s!r} must be a number of seconds over 0, or None.")


def _check(
    names: Sequence[Any],
    general: Mapping[str, Any],
    options: Mapping[str, Any],
    wish: Mapping[str, Any],
) -> None:
    if general.get("density") is not None:
        raise OptionError("density= and a budget both say how sparse attention is: leave one out.")
    if "auto" in names and len(names) > 1:
        raise OptionError(
            "with a budget 'auto' chooses the attention method and the cache itself: give 'auto' "
            "alone, or name the methods to choose among without it."
        )
    if "auto" in names and options:
        raise OptionError(
            f"options {sorted(options)} belong to a method by name, and 'auto' chooses the method: "
            "leave them out, or name the method."
        )
    if not all(isinstance(name, str) for name in names):
        raise OptionError("with a budget, give methods by name: their options are to be chosen.")
    others = [
        n for n in names if n != "auto" and method_class(n).kind not in ("attention", "cache")
    ]
    if others:
        raise OptionError(
            f"{others[0]!r} has no strength that a budget could choose: name attention methods and "
            "caches alone."
        )
    if wish["probe"] is not None and wish["calibration"] is not None:
        raise OptionError("probe= measures anew, and calibration= is measured: leave one out.")
    if wish["probe_s"] is not None and wish["calibration"] is not None:
        raise OptionError("probe_s limits measuring, and calibration= is measured: leave one out.")
    _check_options(names, options)


def _check_options(names: Sequence[str], options: Mapping[str, Any]) -> None:
    """Refuse options that would not reach what is tried."""
    for name, value in options.items():
        cls: Any = method_class(name) if name in names and isinstance(value, Mapping) else None
        if cls is None or cls.kind != "cache":
            raise OptionError(
                f"{name}=: with a budget the options of attention methods are chosen, and those of "
                "a cache go under its name, as in easycache={'first_steps': 2}."
            )
        if cls.strength in value:
            raise OptionError(
                f"{cls.strength}= and a budget both say how strong {name} is: leave one out."
            )
        for option in value:
            if option not in option_names(cls):
                hint = did_you_mean(str(option), option_names(cls))
                raise OptionError(f"method {name!r} has no option {option!r}.{hint}")


def _calls(pipe: Any, probe: PipelineCall | Sequence[PipelineCall] | None) -> list[PipelineCall]:
    if probe is None:
        return bundled_calls(pipe, range(0, 64, 64 // PROMPTS), batch=1)
    calls: list[PipelineCall] = [probe] if isinstance(probe, Mapping) else list(probe)
    if not calls or not all(isinstance(call, Mapping) for call in calls):
        raise OptionError("probe: give keyword arguments of pipe(...), or a list of these.")
    return calls


def lines_for(
    pipe: Any,
    names: Sequence[str],
    layout: Any,
    general: Mapping[str, Any],
    options: Mapping[str, Any],
) -> list[Line]:
    """Return what may be chosen, the most promising first.

    Args:
        pipe: the pipeline.
        names: see `settle`.
        layout: what is generated.
        general: `accelerate_pipeline`'s own options, as far as given.
        options: of single methods.
    """
    if "auto" in names:
        known = [name for name in AUTO_ORDER if name in list_methods()]
        names = [*known, *(name for name in list_methods() if name not in known)]
    attention = [name for name in names if method_class(name).kind == "attention"]
    caches = [name for name in names if method_class(name).kind == "cache"]
    own = {name: {**brought_options(pipe, name), **options.get(name, {})} for name in caches}
    jsonable = {
        name: {k: list(v) if isinstance(v, tuple) else v for k, v in of.items()}
        for name, of in own.items()
    }
    if layout.video_length < general.get("min_tokens", DEFAULT.min_tokens):
        attention = []
    lines = attention_lines(layout, _tried_with(general), attention) if attention else []
    return lines + (cache_lines(caches, jsonable) if caches else [])


def _given(general: Mapping[str, Any]) -> Row:
    """Return the options that go with all settings, as far as given, as JSON would have them."""
    general = {**general, "guard": guard_option(general.get("guard"))}
    given = {k: v for k, v in general.items() if k in _GENERAL and v not in (None, "auto")}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}


def _tried_with(general: Mapping[str, Any]) -> Row:
    """Return the options of all attention settings that are tried."""
    return {"dense_steps": _USUAL_STEPS, "dense_layers": 0, **general}


def _setting(choice: Choice) -> Setting:
    return Setting() if choice.chosen is None else choice.chosen.setting


def _from_file(
    pipe: Any, names: Sequence[str], budget: Budget, path: Path, general: Row
) -> Settled:
    where, seen, points = load(path)
    # An option that is left out is the file's; a guard that is left out is the usual one.
    here = {**_about(pipe), "guard": None, **general}
    differences = [
        f"{name.replace('_', ' ')} {where.get(name)} (here: {value})"
        for name, value in here.items()
        if where.get(name) != value
    ]
    if differences:
        raise OptionError(
            f"calibration {str(path)!r} was made with {' and '.join(differences)}: take what it "
            "was made with, or make it anew with `dit-accel calibrate --method auto`."
        )
    if "auto" not in names:
        points = [point for point in points if set(point.setting.methods) <= set(names)]
    if budget.min_psnr is not None and not all(point.psnr_db for point in points):
        raise OptionError(
            f"calibration {str(path)!r} compared latents alone: ask for max_error=, or make it "
            "anew for min_psnr."
        )
    choice = choose(points, budget, {}, [f"calibration {path}"], prompts=seen["prompts"])
    grid = tuple(seen["grid"])
    return Settled(choice, _setting(choice), grid, seen["steps"], f"calibration {str(path)!r}")


def _about(pipe: Any) -> Row:
    """Return what a calibration holds for, sizes aside."""
    found = circumstances(pipe, "auto", {}, []) or {}
    device = getattr(pipe, "device", torch.device("cpu"))
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    return {
        "dit_accel": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "gpu": gpu,
        "pipeline": type(pipe).__name__,
        "weights": found.get("weights"),
    }


def _circumstances(
    pipe: Any, calls: Sequence[PipelineCall], options: Mapping[str, Any], decode: bool
) -> Row | None:
    found = circumstances(pipe, "auto", options, calls)
    return None if found is None else {**found, **_about(pipe), "decoded": decode}


def _recall(trials: Trials, path: Path, where: Row | None) -> None:
    """Let trials know what the cache folder has; nothing if the file is damaged or another's."""
    try:
        found, seen, points = load(path)
        if found == where:
            trials.recall(points, Seen.read(seen))
    except (OptionError, ValueError, TypeError, KeyError, AttributeError):
        return
