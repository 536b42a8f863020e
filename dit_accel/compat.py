"""The private parts of diffusers that attachment relies on, in one place (0.36 to 0.42)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.errors import ContextParallelError, OptionError, did_you_mean

OWN_BACKENDS = "dit_accel_"
"""Prefix of the names under which accelerations register."""


def add_attention_backend(name: str, function: Callable[..., Tensor]) -> Callable[[], None]:
    """Register ``function`` as diffusers attention backend ``name``; return how to remove it.

    Diffusers keeps its backend names in a closed enum; a pseudo-member makes ``name`` valid
    everywhere that takes one.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    names: Any = AttentionBackendName
    registry: Any = _AttentionBackendRegistry
    member = str.__new__(names, name)
    member._name_, member._value_ = name.upper(), name
    member._sort_order_ = len(names._member_names_)
    names._member_map_[member._name_] = member
    names._value2member_map_[name] = member
    names._member_names_.append(member._name_)
    options: dict[str, Any] = {"constraints": []}
    if "supports_context_parallel" in inspect.signature(registry.register).parameters:
        options["supports_context_parallel"] = True
    registry.register(member, **options)(function)

    def remove() -> None:
        names._member_map_.pop(member._name_, None)
        names._value2member_map_.pop(name, None)
        if member._name_ in names._member_names_:
            names._member_names_.remove(member._name_)
        for table in (registry._backends, registry._constraints, registry._supported_arg_names):
            table.pop(member, None)
        getattr(registry, "_supports_context_parallel", set()).discard(name)
        if registry._active_backend == member:
            registry._active_backend = names.NATIVE

    return remove


def active_backend() -> str:
    """Return the name of the attention backend that diffusers uses where none is chosen."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    active: Any = _AttentionBackendRegistry._active_backend
    return str(getattr(active, "value", active))


def backend_member(name: str) -> Any:
    """Return the enum member of a registered backend."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    return AttentionBackendName(name)


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None,
    scale: float | None,
    backend: Any,
) -> Tensor:
    """Run diffusers' own attention ``[B, N, H, D]`` with ``backend``, or the active one if None."""
    from diffusers.models.attention_dispatch import (
        AttentionBackendName,
        _AttentionBackendRegistry,
        dispatch_attention_fn,
    )

    chosen: Any = backend if backend is not None else _AttentionBackendRegistry._active_backend
    if str(getattr(chosen, "value", chosen)).startswith(OWN_BACKENDS):
        chosen = AttentionBackendName.NATIVE
    return dispatch_attention_fn(
        query,
        key,
        value,
        attn_mask=mask,
        scale=scale,
        backend=chosen,
    )


def compile_options(compiling: bool | Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the arguments for ``torch.compile``, or None not to compile.

    Raises:
        OptionError: if it has no such argument.
    """
    if isinstance(compiling, bool):
        return {} if compiling else None
    if not isinstance(compiling, Mapping):
        raise OptionError(
            f"compile={compiling!r} must be True, False or torch.compile's keyword arguments."
        )
    valid = [*inspect.signature(torch.compile).parameters][1:]
    for name in compiling:
        if name not in valid:
            raise OptionError(f"torch.compile has no option {name!r}.{did_you_mean(name, valid)}")
    return dict(compiling)


def compile_blocks(
    transformer: nn.Module, unnamed: tuple[str, ...], options: dict[str, Any], compiled: bool
) -> Callable[[], None]:
    """Compile the repeated blocks, one by one, by diffusers' own method; return how to undo it.

    Args:
        transformer: a diffusers model.
        unnamed: class names of its repeated blocks, for models of which diffusers names none.
        options: keyword arguments of ``torch.compile``.
        compiled: whether the model is compiled as a whole.

    Raises:
        OptionError: if the model is compiled already, or this diffusers can't compile blocks.
    """
    if hasattr(transformer, "_orig_mod") or compiled:
        raise OptionError("this transformer is compiled as a whole already: leave compile out.")
    compile_repeated: Any = getattr(transformer, "compile_repeated_blocks", None)
    if compile_repeated is None:
        raise OptionError(
            f"compile needs compile_repeated_blocks of diffusers, which {type(transformer)} does "
            "not have: use diffusers 0.36 or newer."
        )
    parts = [module for module in transformer.modules() if module is not transformer]
    before = [(module, module._compiled_call_impl) for module in parts]

    def undo() -> None:
        for module, call in before:
            module._compiled_call_impl = call

    named: Any = getattr(transformer, "_repeated_blocks", None)
    try:
        if not named:
            transformer.__dict__["_repeated_blocks"] = list(unnamed)
        compile_repeated(**options)
    except BaseException:
        undo()
        raise
    finally:
        transformer.__dict__.pop("_repeated_blocks", None)
    return undo


def sequence_ranks(parallel_config: Any) -> int:
    """Return how many ranks share a sequence."""
    return int(parallel_config.context_parallel_config._flattened_mesh.size())


def sequence_mesh(parallel_config: Any) -> tuple[Any, Any]:
    """Return the device meshes of a config's Ulysses ranks and of its ring."""
    context = parallel_config.context_parallel_config
    return context._ulysses_mesh, context._ring_mesh


def parallel_config(transformer: Any) -> Any:
    """Return the config by which diffusers spreads a model's tokens over ranks, if it does."""
    config = getattr(transformer, "_parallel_config", None)
    return config if getattr(config, "context_parallel_config", None) is not None else None


def spread_over_ranks(
    transformer: Any, ring: int, ulysses: int, mesh: Any, plan: dict[str, Any] | None
) -> None:
    """Turn diffusers' context parallelism on for a transformer.

    Args:
        transformer: a diffusers model.
        ring: ranks of a ring; ``ulysses`` ranks of each of its parts.
        mesh: device mesh with dimensions "ring" and "ulysses", and maybe others.
        plan: where tokens are split; None for the model's own plan.

    Raises:
        ContextParallelError: if this diffusers can't.
    """
    try:
        from diffusers import ContextParallelConfig
    except ImportError as error:
        raise ContextParallelError(
            "context parallelism needs diffusers 0.36 or newer: upgrade it."
        ) from error
    options: dict[str, Any] = {}
    if "mesh" in inspect.signature(ContextParallelConfig).parameters:
        options["mesh"] = mesh
    elif mesh.ndim > 2:
        raise ContextParallelError(
            "CFG parallelism together with context parallelism needs a newer diffusers: upgrade "
            "it, or choose one of the two."
        )
    config = ContextParallelConfig(ring_degree=ring, ulysses_degree=ulysses, **options)
    own = plan if getattr(transformer, "_cp_plan", None) is None else None
    counted = torch.accelerator.device_count
    if counted() == 0:  # diffusers divides by it, also where all ranks are on the CPU
        torch.accelerator.device_count = lambda: 1
    try:
        transformer.enable_parallelism(config=config, cp_plan=own)
    finally:
        torch.accelerator.device_count = counted


def gathered_from_ranks(transformer: Any, plan: dict[str, Any] | None) -> None:
    """Undo `spread_over_ranks`."""
    from diffusers.hooks.context_parallel import remove_context_parallel

    own: Any = getattr(transformer, "_cp_plan", None)
    remove_context_parallel(transformer, own if own is not None else plan)
    transformer._parallel_config = None
    for module in transformer.modules():
        processor: Any = getattr(module, "processor", None)
        if getattr(processor, "_parallel_config", None) is not None:
            processor._parallel_config = None


def ulysses_share(parallel_config: Any) -> tuple[int, int]:
    """Return which share of the heads this rank attends with under Ulysses, and of how many."""
    context = getattr(parallel_config, "context_parallel_config", None)
    degree = int(getattr(context, "ulysses_degree", 1) or 1)
    return (int(context._ulysses_local_rank), degree) if context and degree > 1 else (0, 1)


def sum_over_sequence(parallel_config: Any, values: Tensor) -> Tensor:
    """Sum ``values`` over the ranks that share a sequence (not over all ranks there are)."""
    context = getattr(parallel_config, "context_parallel_config", None)
    mesh = getattr(context, "_flattened_mesh", None)
    if mesh is None:
        return values
    import torch.distributed as dist

    total = values.clone()
    dist.all_reduce(total, group=mesh.get_group())
    return total


def split_inputs(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a block's inputs as its body sees them: this rank's share, if it is where they split.

    Under context parallelism diffusers splits a model's tokens by a hook on one of its modules.
    """
    hooks = getattr(getattr(block, "_diffusers_hook", None), "hooks", {})
    for name, hook in hooks.items():
        if name.startswith("cp_input"):
            args, kwargs = hook.pre_forward(block, *args, **kwargs)
    return args, kwargs


def refuse_other_caches(transformer: nn.Module) -> None:
    """Raise `OptionError` if diffusers or cache-dit caches this transformer already."""
    if getattr(transformer, "is_cache_enabled", False):
        raise OptionError(
            "diffusers already caches this transformer: call its disable_cache() first, or choose "
            "no cache here."
        )
    if getattr(transformer, "_is_cached", False):
        raise OptionError(
            "cache-dit already caches this transformer: call cache_dit.disable_cache(pipe) first, "
            "or choose no cache here."
        )
