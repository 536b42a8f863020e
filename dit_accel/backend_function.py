"""The attention backend that diffusers' processors call while a pipeline is accelerated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dit_accel import compat
from dit_accel.errors import OptionError
from dit_accel.pipelines.base import Undo
from dit_accel.runtime import Runtime

_UNSET = object()


def backend_function(name: str, runtime: Runtime) -> tuple[Callable[..., Tensor], Undo]:
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
    ) -> Tensor:
        return attend(query, key, value, attn_mask, scale)

    return backend, library._destroy


def attach_layer(layer: Any, index: int, member: Any, runtime: Runtime) -> Undo:
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
