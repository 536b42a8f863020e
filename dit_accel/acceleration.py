"""Attaches methods to a diffusers pipeline, and takes them off again.

Stock attention processors stay in place: only their backend becomes ours, and a few hooks tell it
what the tokens are. Everything is undone in reverse by `restore_pipeline`.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dit_accel import compat
from dit_accel.backend_function import attach_layer, backend_function
from dit_accel.caching.brought import brought_options
from dit_accel.choosing.forecast import watch
from dit_accel.composition import MethodChoice, check_general, compose, members
from dit_accel.errors import OptionError, UnknownPipelineError
from dit_accel.guard.engine import make_guard
from dit_accel.guard.options import GuardChoice, guard_option
from dit_accel.kinds import Method
from dit_accel.methods.base import AttentionMethod, check_density
from dit_accel.operators import check_backend
from dit_accel.pipelines.base import PipelineFamily, Undo
from dit_accel.policy import policy_rows
from dit_accel.presets import attention_preset, auto_method, preset_for, source_of
from dit_accel.registry import family_class, list_families, method_class
from dit_accel.report import AccelerationReport, forward_seconds
from dit_accel.runtime import Runtime
from dit_accel.schedule import Schedule, Steps
from dit_accel.session import (
    AttentionSession,
    ResolutionSession,
    Session,
    SessionMethod,
    arguments_by_name,
    intercept_pipeline,
    is_compiled,
)

if TYPE_CHECKING:
    from dit_accel.calibration import Calibration
    from dit_accel.choosing.automatic import Settled
    from dit_accel.choosing.choice import Choice

_ATTRIBUTE = "_dit_accel"


def accelerate_pipeline(
    pipe: Any,
    method: MethodChoice = "auto",
    *,
    density: float | None = None,
    dense_steps: Steps | tuple[Steps, Steps] | None = None,
    dense_layers: int | Sequence[int] | None = None,
    min_tokens: int | None = None,
    backend: str = "auto",
    precision: str | None = None,
    compile: bool | Mapping[str, Any] = False,
    guard: GuardChoice = None,
    min_psnr: float | None = None,
    max_error: float | None = None,
    target_speedup: float | None = None,
    probe: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    probe_s: float | None = None,
    calibration: str | Path | None = None,
    per_head: bool | str | Path = False,
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> Any:
    """Attach an attention method, a cache, a guidance, a resolution method. For inference.

    Calling it again replaces what was attached; `restore_pipeline` undoes it. Returns the pipeline.

    Args:
        pipe: a pipeline of a known family (see `list_families`).
        method: name or config object of a method, or a list of them, at most one of each kind
            (`list_methods` tells them by kind). "auto" chooses: by a budget if there is one, else
            a careful published setting; where that is not predicted to be 1.05x faster at the size
            at hand, attention stays dense. Without an attention method, attention is not touched.
        density: share of (query, key) pairs to keep, in (0, 1]; the method's options are set so
            that the share that is computed does not exceed it. None leaves them as they are.
        dense_steps: denoising steps that stay dense: a number (int) or share (float) of first
            steps, or ``(first, last)``. None: as published for this method and family.
        dense_layers: number of first layers that stay dense, or their indices. None likewise.
        min_tokens: video tokens under which everything stays dense. None: 2048.
        backend: "auto", or what must run: "hopper", "triton", "flash-attn-4", "flex" or "torch".
        precision: what the sparse kernel rounds to: "fp8" (everything in e4m3), "int8_fp8"
            (queries and keys in int8: nearer to exact) or "int8" (queries and keys alone; from
            compute capability 8.0 on, the others from 8.9). None: the tensors' own dtype. Needs a
            method without pooled blocks, and float16 or bfloat16.
        compile: whether to compile repeated blocks; a mapping has arguments of ``torch.compile``.
        guard: compare sparse attention with dense in a few rows, and compute densely what is too
            wrong: True or "on", also None; False or "off"; a `QualityGuard` or its options.
        min_psnr, max_error: budgets instead of knobs: the fastest setting with which nine prompts
            in ten stay this near to dense, in dB of frames or relative L1 of latents. All methods
            (with "auto"), or those named, are tried on ``probe`` before this returns.
        target_speedup: likewise, the setting nearest to dense with which denoising is so much
            faster. With a cache by name and no min_psnr, this and max_error choose its strength
            alone, and speed is counted in block calls.
        probe: keyword arguments of ``pipe(...)`` to try it on, or a list of these, of the size and
            steps that will be used, 8 to 16 prompts. None: prompts that a bundled model knows.
        probe_s: seconds for trying settings, the dense generations included: what was found by
            then is taken. A repeated call goes on from there. None: no limit.
        calibration: a file of ``dit-accel calibrate --method auto``, in place of ``probe``. Refused
            if made with another model, GPU or version, or for another size or number of steps.
        per_head: True shares ``density`` out among layers and heads by what each loses, measured on
            ``probe``; or the file of such densities (see `dit_accel.per_head`).
        progress: told of each generation that is tried: for what, how many so far, in all (or 0).
        options: options of the methods given by name, e.g. ``decay=0.5``; a dict under a method's
            name goes to that method alone, e.g. ``radial={"decay": 0.5}``.

    Raises:
        UnknownPipelineError: if its transformer belongs to no known family.
        UnknownMethodError: if no method has that name.
        OptionError: on an unknown option or an impossible value. What a GPU can't run is raised by
            the first forward, as `OperatorUnavailableError`.
    """
    general: dict[str, Any] = {"density": density, "backend": backend, "precision": precision}
    general |= {"dense_steps": dense_steps, "dense_layers": dense_layers, "min_tokens": min_tokens}
    general["guard"] = guard_option(guard)  # so that what is tried for a wish is what will run
    wish = dict[str, Any](min_psnr=min_psnr, max_error=max_error, target_speedup=target_speedup)
    wish |= dict(probe=probe, probe_s=probe_s, calibration=calibration)
    wish |= dict(per_head=per_head or None, progress=progress)
    acceleration = _prepare(pipe, method, general, compile, wish, options)
    acceleration.guard_by(guard)
    _replace(pipe, acceleration)
    return pipe


def restore_pipeline(pipe: Any) -> Any:
    """Undo `accelerate_pipeline`; outputs are bit-identical to before. Returns the pipeline."""
    acceleration = pipe.__dict__.pop(_ATTRIBUTE, None)
    if acceleration is not None:
        acceleration.restore()
    return pipe


def acceleration_report(pipe: Any) -> AccelerationReport:
    """Return what the pipeline did in its last generation (it prints as a table).

    Raises:
        OptionError: if the pipeline is not accelerated.
    """
    acceleration = pipe.__dict__.get(_ATTRIBUTE)
    if acceleration is None:
        raise OptionError("this pipeline is not accelerated: call accelerate_pipeline first.")
    return acceleration.report()


def family_of(pipe: Any) -> PipelineFamily:
    """Return a fresh family object for ``pipe``, recognised by its transformer's class.

    Raises:
        UnknownPipelineError: listing the families, and how to add one.
    """
    names: set[str] = set()
    for component in ("transformer", "transformer_2"):
        transformer = unwrapped(getattr(pipe, component, None))
        names |= {cls.__name__ for cls in type(transformer).__mro__}
    for name in list_families():
        cls = family_class(name)
        if names & set(cls.transformer_classes):
            return cls()
    known = "; ".join(f"{n} ({family_class(n).pipelines})" for n in list_families())
    raise UnknownPipelineError(
        f"{type(pipe).__name__} belongs to no known family. Known: {known}. To add one, write a "
        "PipelineFamily (see dit_accel/pipelines/wan.py) and register it under the entry point "
        "group 'dit_accel.families'."
    )


def _prepare(
    pipe: Any,
    method: MethodChoice,
    general: Mapping[str, Any],
    compiling: bool | Mapping[str, Any],
    wish: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Acceleration:
    """Check and settle everything that `accelerate_pipeline` was given; nothing is attached yet."""
    family = family_of(pipe)
    variants = family.variants(pipe)
    names = members(method)
    settled = _settle_budget(pipe, names, general, wish, options)
    if settled is not None:
        names, general, options = settled.applied_to(general)
    binding = settled is None and "auto" in names
    chosen, general, notes = _settle_auto(names, general, variants)

    def defaults(name: str) -> dict[str, Any]:
        return {**preset_for(*variants, method=name).options, **brought_options(pipe, name)}

    methods = compose(chosen, options, defaults)
    check_general(chosen, general)
    attention = next((m for m in methods.values() if isinstance(m, AttentionMethod)), None)
    check_backend(general["backend"], general["precision"])
    _check_exact(attention, general["precision"])
    if general["density"] is not None:
        check_density(general["density"])
    preset = attention_preset(chosen, variants)
    schedule = Schedule.make(
        *(
            getattr(preset, name) if general[name] is None else general[name]
            for name in ("dense_steps", "dense_layers", "min_tokens")
        )
    )
    source, compiled = source_of(chosen, variants), compat.compile_options(compiling)
    calibration = None if settled else _calibrate(pipe, chosen, wish, {**general, **options})
    if calibration is not None:
        methods = compose(chosen, {**options, calibration.method: calibration.options}, defaults)
    if wish["per_head"] is not None:
        attention = _share_out(pipe, methods, general, schedule, wish)
        methods, general = {**methods, "attention": attention}, {**general, "density": None}
    how = (general["backend"], general["density"], general["precision"])
    runtime = Runtime(pipe, family, attention, schedule, *how)
    runtime.recorder.notes += notes
    runtime.sessions = _start_sessions(pipe, runtime, methods.values())
    watch(runtime, methods, binding=binding, settled=settled)
    choice = None if settled is None else settled.choice
    return Acceleration(
        pipe, runtime, tuple(methods.values()), source, compiled, calibration, choice
    )


def _calibrate(
    pipe: Any, chosen: list[str | Method], wish: Mapping[str, Any], options: Mapping[str, Any]
) -> Calibration | None:
    """Choose the strength of the cache among the methods, if that was asked for."""
    mine = {name: wish[name] for name in ("target_speedup", "max_error", "probe")}
    if wish["per_head"] is not None or all(value is None for value in mine.values()):
        return None
    # It accelerates the pipeline to try strengths out, so it lies above this module.
    from dit_accel.calibration import calibrate_for

    with _set_aside(pipe):
        return calibrate_for(pipe, chosen, options=options, progress=wish["progress"], **mine)


def _settle_budget(
    pipe: Any,
    names: Sequence[str | Method],
    general: Mapping[str, Any],
    wish: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Settled | None:
    """Choose methods and their strengths, if a budget asks for more than a cache's strength."""
    given = {name for name, value in wish.items() if value is not None} - {"progress", "probe_s"}
    if "per_head" in given and given - {"per_head", "probe"}:
        raise OptionError(
            "per_head shares density= out, and a budget would choose it: leave one out."
        )
    kinds = [_class_of(name).kind for name in names if name != "auto"]
    one_cache = "cache" in kinds and "auto" not in names and len(set(kinds)) == len(kinds)
    # About the strength of that cache alone.
    of_cache = one_cache and not given & {"min_psnr", "calibration"}
    if not given or "per_head" in given or of_cache:
        if wish["probe_s"] is not None:
            raise OptionError(
                "probe_s limits how long settings are tried for a budget, and none is asked for "
                "that would choose among settings: leave it out."
            )
        return None
    from dit_accel.choosing.automatic import settle  # above this module, as calibration is

    with _set_aside(pipe):
        return settle(pipe, names, wish, general=general, options=options)


def _share_out(
    pipe: Any,
    methods: Mapping[str, Method],
    general: Mapping[str, Any],
    schedule: Schedule,
    wish: Mapping[str, Any],
) -> AttentionMethod:
    """Return the attention method with a density of its own for every layer and head."""
    from dit_accel.per_head.sharing import share_out  # above this module, as calibration is

    with _set_aside(pipe):
        return share_out(
            pipe, methods, general, schedule, per_head=wish["per_head"], probe=wish["probe"]
        )


class Acceleration:
    """Methods attached to one pipeline: what was installed, and how to undo it."""

    def __init__(
        self,
        pipe: Any,
        runtime: Runtime,
        methods: tuple[Method, ...],
        preset: str,
        compiling: dict[str, Any] | None,
        calibration: Calibration | None = None,
        choice: Choice | None = None,
    ) -> None:
        self.pipe, self.runtime, self.methods = pipe, runtime, methods
        self.preset, self.compiling, self.calibration = preset, compiling, calibration
        self.choice = choice
        self._name = compat.OWN_BACKENDS + uuid.uuid4().hex[:12]
        self._undo: list[Undo] = []

    def guard_by(self, choice: GuardChoice) -> None:
        """Add the quality guard. Beside a budget it may find that there is nothing to look at."""
        idle = self.choice is not None and not self.runtime.attends
        self.runtime.guard = make_guard(None if idle else choice, self.runtime.attends)

    def attach(self) -> None:
        """Install the backend and the hooks; on failure leave the pipeline as it was."""
        try:
            if self.runtime.attends:
                function, forget = backend_function(self._name, self.runtime)
                self._undo.append(forget)
                self._undo.append(compat.add_attention_backend(self._name, function))
            for component in self.runtime.family.components:
                found = getattr(self.pipe, component, None)
                if found is not None:
                    self._compile(found)
                    self._attach_transformer(unwrapped(found))
            for session in self.runtime.sessions:
                if isinstance(session, ResolutionSession):
                    self._undo.append(intercept_pipeline(self.pipe, session.generate))
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        """Undo everything, the last change first."""
        while self._undo:
            self._undo.pop()()

    def report(self) -> AccelerationReport:
        """Sum up the last generation."""
        runtime, schedule = self.runtime, self.runtime.schedule
        recorder = runtime.recorder
        return AccelerationReport(
            methods=self.methods,
            family=runtime.family.name,
            settings={
                "preset": self.preset,
                "density": runtime.density,
                "dense_steps": [schedule.first_steps, schedule.last_steps],
                "dense_layers": sorted(schedule.layers),
                "min_tokens": schedule.min_tokens,
                "backend": runtime.backend,
                "tuning": dict(runtime.recorder.tuning),
                "precision": runtime.precision,
                "compile": self.compiling is not None,
            },
            calls=tuple(recorder.calls),
            steps=tuple(recorder.steps),
            cache_bytes=recorder.cache_bytes,
            # What a cache says of a perturbed pass is more exact, so it comes last.
            policy=policy_rows(
                recorder.calls, [*recorder.perturbed, *recorder.steps], recorder.layer_blocks
            ),
            forward_s=forward_seconds(recorder.forwards),
            rejected=dict(recorder.rejected),
            notes=tuple(recorder.notes),
            perturbed=tuple(recorder.perturbed),
            calibration=self.calibration,
            guard=None if runtime.guard is None else runtime.guard.report(),
            choice=self.choice,
        )

    def _compile(self, transformer: nn.Module) -> None:
        if self.compiling is not None:
            names = self.runtime.family.repeated_blocks
            compiled = is_compiled(transformer)
            self._undo.append(compat.compile_blocks(transformer, names, self.compiling, compiled))

    def _attach_transformer(self, transformer: nn.Module) -> None:
        runtime = self.runtime
        layers = runtime.family.attention_layers(transformer)
        runtime.recorder.layer_blocks = _blocks_of(layers, runtime.family.blocks(transformer))
        member = None
        if runtime.attends:
            self._undo += runtime.family.install_processors(transformer)
            member = compat.backend_member(self._name)
            for index, layer in enumerate(layers):
                self._undo.append(attach_layer(layer, index, member, runtime))
        self._undo.append(runtime.tracker.watch(transformer))
        self._undo.append(runtime.seam.restore)
        for session in runtime.sessions:
            session.attach(transformer)

        @torch.compiler.disable
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            backends = [getattr(layer.processor, "_attention_backend", None) for layer in layers]
            off = sum(backend != member for backend in backends) if member is not None else 0
            if off:
                runtime.recorder.warn_switched_off(off, len(layers))
            parallel = compat.parallel_config(module)
            named = arguments_by_name(module, args, kwargs)
            return (), runtime.enter(module, named, len(layers), parallel)

        @torch.compiler.disable
        def leave(_module: nn.Module, _args: Any, output: Any) -> None:
            runtime.leave(output)

        # First in line, so that it sees the caller's inputs before the family's hooks change them.
        self._undo.append(
            transformer.register_forward_pre_hook(enter, with_kwargs=True, prepend=True).remove
        )
        self._undo += runtime.family.install_shuffle(transformer, runtime.shuffle)
        self._undo.append(transformer.register_forward_hook(leave, always_call=True).remove)


def _blocks_of(layers: list[Any], blocks: list[nn.Module]) -> tuple[int | None, ...]:
    """Return the index of the block that each attention layer is part of."""
    owner = {id(module): index for index, block in enumerate(blocks) for module in block.modules()}
    return tuple(owner.get(id(layer)) for layer in layers)


def _start_sessions(pipe: Any, runtime: Runtime, methods: Iterable[Method]) -> tuple[Session, ...]:
    """Return the working states of the methods that have one."""
    methods = list(methods)
    acting = [method for method in methods if isinstance(method, SessionMethod)]
    for method in acting:
        method.check_beside([other for other in methods if other is not method])
    sessions = tuple(method.session(pipe, runtime.seam) for method in acting)
    for method, session in zip(acting, sessions, strict=True):
        if runtime.method is None and session.needs_attention_method:
            example = "radial" if isinstance(session, AttentionSession) else "dense"
            raise OptionError(
                f"{method.name!r} acts on an attention method's calls: add one, such as "
                f"[{example!r}, {method.name!r}]."
            )
    return sessions


def _replace(pipe: Any, acceleration: Acceleration) -> None:
    """Attach an acceleration in place of the one before, which stays if that fails."""
    with _set_aside(pipe):
        acceleration.attach()
    object.__setattr__(pipe, _ATTRIBUTE, acceleration)


@contextmanager
def _set_aside(pipe: Any) -> Iterator[None]:
    """Take the pipeline's acceleration off; it is back if what follows fails."""
    before = pipe.__dict__.get(_ATTRIBUTE)
    restore_pipeline(pipe)
    try:
        yield
    except BaseException:
        if before is not None:
            before.attach()
            object.__setattr__(pipe, _ATTRIBUTE, before)
        raise


def _settle_auto(
    chosen: list[str | Method], general: Mapping[str, Any], variants: tuple[str, ...]
) -> tuple[list[str | Method], dict[str, Any], list[str]]:
    """Return the choice with "auto" replaced by a name, general options, and why that one."""
    if "auto" not in chosen:
        return chosen, dict(general), []
    name, careful, why = auto_method(*variants)
    note = f"method='auto' took {name!r}: {why}"
    given = {option: value for option, value in general.items() if value is not None}
    names = [name if member == "auto" else member for member in chosen]
    return names, {**general, **careful, **given}, [note]


def _class_of(member: str | Method) -> type[Method]:
    return method_class(member) if isinstance(member, str) else type(member)


def _check_exact(method: AttentionMethod | None, precision: str | None) -> None:
    if precision is not None and method is not None and method.pools:
        raise OptionError(
            f"method {method.name!r} pools blocks, which are attended in the tensors' own dtype "
            f"alone: leave {precision=} out, or choose e.g. 'radial' or 'gna' without a remainder."
        )


def unwrapped(transformer: Any) -> Any:
    """Return the module inside a ``torch.compile`` wrapper."""
    return getattr(transformer, "_orig_mod", transformer)
