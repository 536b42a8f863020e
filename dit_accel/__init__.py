"""dit-accel: training-free acceleration of diffusers' diffusion-transformer pipelines."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Names are imported on first use, so that `import dit_accel` stays light.
_PUBLIC = {
    "accelerate_pipeline": "dit_accel.acceleration",
    "restore_pipeline": "dit_accel.acceleration",
    "acceleration_report": "dit_accel.acceleration",
    "parallelize_pipeline": "dit_accel.parallel.pipeline",
    "unparallelize_pipeline": "dit_accel.parallel.pipeline",
    "sparse_attention": "dit_accel.functional",
    "block_mask": "dit_accel.functional",
    "attention_mask": "dit_accel.functional",
    "list_methods": "dit_accel.registry",
    "list_families": "dit_accel.registry",
    "method_class": "dit_accel.registry",
    "QualityGuard": "dit_accel.guard.options",
    "Dense": "dit_accel.methods.dense",
    "Radial": "dit_accel.methods.radial",
    "GNA": "dit_accel.methods.gna",
    "SlidingWindow": "dit_accel.methods.sliding_window",
    "PSA": "dit_accel.methods.psa",
    "RectifiedSpaAttn": "dit_accel.methods.rectified",
    "PISA": "dit_accel.methods.pisa",
    "FirstBlockCache": "dit_accel.caching.first_block",
    "DualBlockCache": "dit_accel.caching.dual_block",
    "TeaCache": "dit_accel.caching.teacache",
    "MagCache": "dit_accel.caching.magcache",
    "TaylorSeer": "dit_accel.caching.taylorseer",
    "EasyCache": "dit_accel.caching.easycache",
    "SeaCache": "dit_accel.caching.seacache",
    "ProfilingCache": "dit_accel.caching.profiling",
    "PyramidAttentionBroadcast": "dit_accel.caching.pab",
    "UnconditionalCache": "dit_accel.caching.unconditional",
    "RemainderCache": "dit_accel.caching.remainder",
    "SoftPAG": "dit_accel.guidance.softpag",
    "PAG": "dit_accel.guidance.pag",
    "SEG": "dit_accel.guidance.seg",
    "SkipLayerGuidance": "dit_accel.guidance.skip_layer",
    "FreeSwim": "dit_accel.highres.freeswim",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from dit_accel.acceleration import accelerate_pipeline as accelerate_pipeline
    from dit_accel.acceleration import acceleration_report as acceleration_report
    from dit_accel.acceleration import restore_pipeline as restore_pipeline
    from dit_accel.caching.dual_block import DualBlockCache as DualBlockCache
    from dit_accel.caching.easycache import EasyCache as EasyCache
    from dit_accel.caching.first_block import FirstBlockCache as FirstBlockCache
    from dit_accel.caching.magcache import MagCache as MagCache
    from dit_accel.caching.pab import PyramidAttentionBroadcast as PyramidAttentionBroadcast
    from dit_accel.caching.profiling import ProfilingCache as ProfilingCache
    from dit_accel.caching.remainder import RemainderCache as RemainderCache
    from dit_accel.caching.seacache import SeaCache as SeaCache
    from dit_accel.caching.taylorseer import TaylorSeer as TaylorSeer
    from dit_accel.caching.teacache import TeaCache as TeaCache
    from dit_accel.caching.unconditional import UnconditionalCache as UnconditionalCache
    from dit_accel.functional import attention_mask as attention_mask
    from dit_accel.functional import block_mask as block_mask
    from dit_accel.functional import sparse_attention as sparse_attention
    from dit_accel.guard.options import QualityGuard as QualityGuard
    from dit_accel.guidance.pag import PAG as PAG
    from dit_accel.guidance.seg import SEG as SEG
    from dit_accel.guidance.skip_layer import SkipLayerGuidance as SkipLayerGuidance
    from dit_accel.guidance.softpag import SoftPAG as SoftPAG
    from dit_accel.highres.freeswim import FreeSwim as FreeSwim
    from dit_accel.methods.dense import Dense as Dense
    from dit_accel.methods.gna import GNA as GNA
    from dit_accel.methods.pisa import PISA as PISA
    from dit_accel.methods.psa import PSA as PSA
    from dit_accel.methods.radial import Radial as Radial
    from dit_accel.methods.rectified import RectifiedSpaAttn as RectifiedSpaAttn
    from dit_accel.methods.sliding_window import SlidingWindow as SlidingWindow
    from dit_accel.registry import list_families as list_families
    from dit_accel.registry import list_methods as list_methods
    from dit_accel.registry import method_class as method_class


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'dit_accel' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
