"""Attaches a method to a diffusers pipeline, and takes it off again.

Stock attention processors stay in place: only their backend becomes ours, and a few hooks tell it
what the tokens are. Everything is undone in reverse by `restore_pipeline`.
"""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel import compat
from dit_accel.errors import ContextParallelError, OptionError, UnknownPipelineError
from dit_accel.methods.base import AttentionMethod, check_density
from dit_accel.operators import check_backend
from dit_accel.pipelines.base import PipelineFamily, Undo
from dit_accel.presets import DEFAULT, auto_method, preset_for
from dit_accel.registry import family_class, list_families, resolve_method
from dit_accel.report import AccelerationReport, forward_seconds
from dit_accel.runtime import Runtime, warn_switched_off
from dit_accel.schedule import Schedule, Steps

_ATTRIBUTE = "_dit_accel"
_UNSET = object()


def accelerate_pipeline(
    pipe: Any,
    method: str | AttentionMethod | Sequence[str | AttentionMethod] = "auto",
    *,
    density: float | None = None,
    dense_steps: Steps | tuple[Steps, Steps] | None = None,
    dense_layers: int | Sequence[int] | None = None,
    min_tokens: int | None = None,
    backend: str = "auto",
    guard: None = None,
    **options: Any,
) -> Any:
    """Make a diffusers pipeline attend sparsely, in place. For inference.

    Calling it again replaces the method; `restore_pipeline` undoes it exactly.

    Args:
        pipe: a pipeline of a known family (see `list_families`).
        method: name or config object of an attention method, or a list holding one; "auto" takes
            the published one for this family, if there is one, and stays dense otherwise.
        density: share of (query, key) pairs to keep, in (0, 1]; the method's options are set so
            that the share that is computed does not exceed it. None leaves them as they are.
        dense_steps: denoising steps that stay dense: a number (int) or share (float) of first
            steps, or ``(first, last)``. None: as published for this method and family.
        dense_layers: number of first layers that stay dense, or their indices. None likewise.
        min_tokens: video tokens under which everything stays dense. None: 2048.
        backend: "auto", or the operator that must run: "hopper", "triton", "flash-attn-4", "flex",
            "torch".
        guard: reserved for the quality guard; must be None.
        options: options of the method given by name, e.g. ``decay=0.5``.

    Returns:
        The same pipeline.

    Raises:
        UnknownPipelineError: if its transformer belongs to no known family.
        UnknownMethodError: if no method has that name.
        OptionError: on an unknown option or an impossible value.
    """
    if guard is not None:
        raise OptionError("guard is not available in this version: leave it None.")
    family = family_of(pipe)
    variants = family.variants(pipe)
    chosen, notes = _single_method(method), []
    if chosen == "auto":
        chosen, why = auto_method(*variants)
        notes.append(f"method='auto' took {chosen!r}: {why}")
    preset = preset_for(*variants, method=chosen) if isinstance(chosen, str) else DEFAULT
    if isinstance(chosen, str):
        options = {**preset.options, **options}
    resolved = resolve_method(chosen, **options)
    check_backend(backend)
    if density is not None:
        check_density(density)
    schedule = Schedule.make(
        preset.dense_steps if dense_steps is None else dense_steps,
        preset.dense_layers if dense_layers is None else dense_layers,
        preset.min_tokens if min_tokens is None else min_tokens,
    )
    runtime = Runtime(pipe, family, resolved, schedule, backend, density)
    runtime.recorder.notes += notes
    acceleration = Acceleration(pipe, runtime, preset.source)
    restore_pipeline(pipe)
    acceleration.attach()
    object.__setattr__(pipe, _ATTRIBUTE, acceleration)
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
        transformer = _unwrap(getattr(pipe, component, None))
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


class Acceleration:
    """A method attached to one pipeline: what was installed, and how to undo it."""

    def __init__(self, pipe: Any, runtime: Runtime, preset: str) -> None:
        self.pipe, self.runtime, self.preset = pipe, runtime, preset
        self._name = compat.OWN_BACKENDS + uuid.uuid4().hex[:12]
        self._undo: list[Undo] = []

    def attach(self) -> None:
        """Install the backend and the hooks; on failure leave the pipeline as it was."""
        try:
            function, forget = _compilable(self._name, self.runtime)
            self._undo.append(forget)
            self._undo.append(compat.add_attention_backend(self._name, function))
            for component in self.runtime.family.components:
                transformer = _unwrap(getattr(self.pipe, component, None))
                if transformer is not None:
                    self._attach_transformer(transformer)
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
        return AccelerationReport(
            method=runtime.method.name,
            options=asdict(runtime.method),
            family=runtime.family.name,
            settings={
                "preset": self.preset,
                "density": runtime.density,
                "dense_steps": [schedule.first_steps, schedule.last_steps],
                "dense_layers": sorted(schedule.layers),
                "min_tokens": schedule.min_tokens,
                "backend": runtime.backend,
                "tuning": dict(runtime.recorder.tuning),
            },
            calls=tuple(runtime.recorder.calls),
            forward_s=forward_seconds(runtime.recorder.forwards),
            rejected=dict(runtime.recorder.rejected),
            notes=tuple(runtime.recorder.notes),
        )

    def _attach_transformer(self, transformer: nn.Module) -> None:
        runtime = self.runtime
        self._undo += runtime.family.install_processors(transformer)
        layers = runtime.family.attention_layers(transformer)
        member = compat.backend_member(self._name)
        for index, layer in enumerate(layers):
            self._undo.append(_attach_layer(layer, index, member, runtime))
        self._undo.append(runtime.tracker.watch(transformer))

        @torch.compiler.disable
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            off = sum(
                getattr(layer.processor, "_attention_backend", None) != member for layer in layers
            )
            if off:
                warn_switched_off(runtime, off, len(layers))
            parallel = getattr(layers[0].processor, "_parallel_config", None) is not None
            named = _by_name(module, args, kwargs)
            return (), runtime.enter(module, named, len(layers), parallel)

        @torch.compiler.disable
        def leave(*_: Any) -> None:
            runtime.leave()

        # First in line, so that it sees the caller's inputs before the family's hooks change them.
        self._undo.append(
            transformer.register_forward_pre_hook(enter, with_kwargs=True, prepend=True).remove
        )
        self._undo += runtime.family.install_shuffle(transformer, runtime.shuffle)
        self._undo.append(transformer.register_forward_hook(leave, always_call=True).remove)


def _attach_layer(layer: Any, index: int, member: Any, runtime: Runtime) -> Undo:
    """Route one attention layer to the backend ``member``."""
    processor = layer.processor
    before = processor.__dict__.get("_attention_backend", _UNSET)
    if str(getattr(before, "value", "")).startswith(compat.OWN_BACKENDS):
        raise OptionError(
            "another pipeline that shares this transformer is accelerated: restore_pipeline it "
            "first, or use that pipeline."
        )
    if before is not _UNSET:
        runtime.dense_backend = before
    processor._attention_backend = member
    layer.__dict__["_dit_accel_layer"] = torch.tensor(index)

    def publish(module: Any, _args: Any) -> None:
        runtime.layer = module._dit_accel_layer

    handle = layer.register_forward_pre_hook(publish)

    def undo() -> None:
        handle.remove()
        layer.__dict__.pop("_dit_accel_layer", None)
        if processor.__dict__.get("_attention_backend") is not member:
            return  # the user has chosen another backend since; it stays
        if before is _UNSET:
            del processor._attention_backend
        else:
            processor._attention_backend = before

    return undo


def _compilable(name: str, runtime: Runtime) -> tuple[Callable[..., Tensor], Undo]:
    """Return the diffusers backend function of ``runtime``, and how to unregister its operator.

    Under ``torch.compile`` the whole attention call is one custom operator, so blocks compile to
    one graph without breaks whatever Python decides inside.
    """
    library = torch.library.Library("dit_accel", "FRAGMENT")
    library.define(
        f"{name}(Tensor query, Tensor key, Tensor value, Tensor? mask, float? scale, "
        "Tensor? layer) -> Tensor"
    )
    qualified = f"dit_accel::{name}"
    library.impl(
        name, lambda *args: runtime.attend(*args).contiguous(), "CompositeExplicitAutograd"
    )
    torch.library.register_fake(
        qualified, lambda query, *_: query.new_empty(query.shape), lib=library
    )
    operator = getattr(torch.ops.dit_accel, name)

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: Any) -> Tensor:
        run = operator if torch.compiler.is_compiling() else runtime.attend
        return run(query, key, value, mask, scale, runtime.layer)

    def backend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
        _parallel_config: Any = None,
    ) -> Tensor:
        if _parallel_config is None:
            return attend(query, key, value, attn_mask, scale)
        if compat.ring_degree(_parallel_config) > 1:
            raise ContextParallelError(
                "ring attention hands out keys in pieces, which a sparse pattern can't use: "
                "choose ContextParallelConfig(ulysses_degree=...)."
            )
        return compat.ulysses_attention(
            query,
            key,
            value,
            scale=scale,
            parallel_config=_parallel_config,
            forward=lambda q, k, v: attend(q, k, v, attn_mask, scale),
        )

    return backend, library._destroy


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the call's arguments by name."""
    if not args:
        return dict(kwargs)
    bound = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs)
    named = dict(bound.arguments)
    named.pop("self", None)
    return named


def _single_method(
    method: str | AttentionMethod | Sequence[str | AttentionMethod],
) -> str | AttentionMethod:
    if isinstance(method, str | AttentionMethod):
        return method
    if not isinstance(method, Sequence) or len(method) != 1:
        raise OptionError(f"method={method!r}: give one attention method, by name or as an object.")
    return method[0]


def _unwrap(transformer: Any) -> Any:
    """Return the module inside a ``torch.compile`` wrapper."""
    return getattr(transformer, "_orig_mod", transformer)
