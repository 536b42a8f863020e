"""What two or four ranks do in the tests: each case returns what its test looks at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cache_subjects import GUIDED
from diffusers import ContextParallelConfig
from tiny_pipelines import TINY_PIPELINES, run_tiny
from torch import Tensor

from dit_accel import (
    accelerate_pipeline,
    acceleration_report,
    parallelize_pipeline,
    restore_pipeline,
    unparallelize_pipeline,
)
from dit_accel.parallel.reports import report_of_ranks

EVERYWHERE: dict[str, Any] = {"dense_steps": 0, "dense_layers": 0, "min_tokens": 0, "guard": False}
"""The guard would repair most of what random weights do."""
METHODS: dict[str, dict[str, Any]] = {
    "dense": {},
    "radial": {"block_size": 16, "thin_below": 8, "decay": 0.1},
    "gna": {"block_size": 16, "window": (1.0, 0.4, 0.4)},
    "gna pooled": {"block_size": 16, "window": (1.0, 0.4, 0.4), "remainder": "pooled"},
    "sliding_window": {"block_size": 16},
    "psa": {"query_block": 32, "key_block": 16},
    "pisa": {"block_size": 16, "density": 0.4},
    "pisa kept": {"block_size": 16, "density": 0.4, "refresh_every": 2},
    "rectified": {"block_size": 16, "drop": 0.6, "cumulative": 0.1},
}
ODD: dict[str, Any] = {"num_frames": 9}
"""Of videos: a grid of (3, 7, 9), 189 tokens."""


class Subject:
    """A tiny pipeline whose outputs with and without ranks are compared."""

    def __init__(self, family: str, method: str | None, **changes: Any) -> None:
        build, arguments = TINY_PIPELINES[family]
        self.pipe, self.arguments = build(), arguments | changes
        if family.startswith("wan"):
            self.arguments |= ODD
        self.method = method
        if method is not None:
            self.accelerate()

    def accelerate(self) -> None:
        options = METHODS[str(self.method)]
        accelerate_pipeline(self.pipe, str(self.method).split()[0], **EVERYWHERE, **options)

    def run(self) -> Tensor:
        return run_tiny(self.pipe, self.arguments)


def compared(family: str, method: str | None, split: dict[str, int], **changes: Any) -> Any:
    """Return the largest difference that a split makes, whether it can be undone, and densities."""
    changes = {"num_inference_steps": 2} | changes
    subject = Subject(family, method, **changes)
    alone = subject.run()
    densities = []
    if method is not None:
        densities.append(acceleration_report(subject.pipe).density)
    parallelize_pipeline(subject.pipe, **split)
    spread = subject.run()
    if method is not None:
        densities.append(report_of_ranks(acceleration_report(subject.pipe)).density)
    restored = True
    if method in ("gna", None):
        unparallelize_pipeline(subject.pipe)
        restored = torch.equal(alone, subject.run())
    return difference(alone, spread), restored, densities


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def methods(split: dict[str, int]) -> dict[str, Any]:
    """Every method on a video of odd length."""
    found = {method: compared("wan", method, split) for method in METHODS}
    dense, sparse = (Subject("wan", method).run() for method in ("dense", "gna"))
    found["matters"] = difference(dense, sparse)
    return found


def families(split: dict[str, int]) -> dict[str, Any]:
    """Families whose text shares the sequence, and other forms of Wan."""
    found = {}
    for family in ("flux", "sd3", "hunyuan", "wan22", "wan_ti2v_image"):
        for method in ("gna", "psa"):
            found[f"{family} {method}"] = compared(family, method, split)
    return found


def guided(split: dict[str, int]) -> dict[str, Any]:
    """Both passes on ranks of their own, with and without a method; and how many calls each ran."""
    found = {}
    for family in ("wan", "sd3", "flux", "hunyuan"):
        for method in (None, "gna"):
            more = {**(GUIDED if family in ("flux", "hunyuan") else {}), "num_inference_steps": 4}
            found[f"{family} {method}"] = compared(family, method, split, **more)
    return found


def perturbed(split: dict[str, int]) -> dict[str, Any]:
    """Guidances that perturb blocks or heads, beside attention of their own."""
    found = {}
    heads: dict[str, Any] = {"heads": ((1, 1), (2, 0)), "strength": 0.7}
    uniform = heads | {"perturbation": "uniform"}
    subjects: list[tuple[str, str, dict[str, Any]]] = [
        ("wan", "pag", {"layers": (1,)}),
        ("wan", "slg", {"layers": (1,), "start": 0, "stop": 1.0}),
        ("wan", "softpag", uniform),
        ("flux", "softpag", uniform),
        ("hunyuan", "softpag", uniform),
        ("sd3", "softpag", uniform | {"scope": "image"}),
    ]
    if "ulysses" in split:
        subjects += [("wan", "seg", {"layers": (1,)}), ("sd3", "seg", {"layers": (1,)})]
        subjects += [("flux", "softpag", heads | {"perturbation": "query_mean"})]
    for family, name, options in subjects:
        subject = Subject(family, None)
        chosen = ["gna", name]
        accelerate_pipeline(subject.pipe, chosen, **EVERYWHERE, **METHODS["gna"], **options)
        alone = subject.run()
        parallelize_pipeline(subject.pipe, **split)
        spread = difference(alone, subject.run())
        found[f"{family} {name} {options}"] = spread, guides(subject, alone), []
    return found


def guides(subject: Subject, guided: Tensor) -> bool:
    """Whether the guidance of a subject changes its output at all."""
    unparallelize_pipeline(subject.pipe)
    accelerate_pipeline(subject.pipe, "gna", **EVERYWHERE, **METHODS["gna"])
    return difference(subject.run(), guided) > 1e-3


def in_any_order(_split: dict[str, int]) -> dict[str, Any]:
    """Diffusers' own switch, before and after accelerating, and ours likewise."""

    def own_after(subject: Subject) -> None:
        subject.accelerate()
        spread_by_diffusers(subject)

    def own_before(subject: Subject) -> None:
        spread_by_diffusers(subject)
        subject.accelerate()

    def ours_before(subject: Subject) -> None:
        parallelize_pipeline(subject.pipe, ulysses=2)
        subject.accelerate()

    orders: dict[str, Callable[[Subject], None]] = {
        "diffusers after": own_after, "diffusers before": own_before, "ours before": ours_before,
    }  # fmt: skip
    found = {}
    for name, arrange in orders.items():
        subject = Subject("wan", None)
        subject.method = "gna"
        arrange(subject)
        found[name] = difference(Subject("wan", "gna").run(), subject.run())
    subject = Subject("sd3", "gna")
    alone = subject.run()
    restore_pipeline(subject.pipe)
    parallelize_pipeline(subject.pipe, ulysses=2)
    found["stock is refused"] = refused(subject.run)
    subject.accelerate()
    found["sd3 before"] = difference(alone, subject.run())
    return found


def spread_by_diffusers(subject: Subject) -> None:
    subject.pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))


def bad_input(_split: dict[str, int]) -> dict[str, str]:
    """What is refused, and how."""
    import torch.distributed as dist

    rank = dist.get_rank()
    found = {}
    pipe = Subject("wan", None).pipe
    found["too many"] = refused(lambda: parallelize_pipeline(pipe, ulysses=4))
    found["three passes"] = refused(lambda: parallelize_pipeline(pipe, cfg=3))
    other, _ = TINY_PIPELINES["flux" if rank else "wan"]
    found["other pipeline"] = refused(lambda: parallelize_pipeline(other(), ulysses=2))
    noise = Subject("wan", "gna")
    parallelize_pipeline(noise.pipe, ulysses=2)
    noise.arguments["generator"] = torch.Generator().manual_seed(rank)
    found["other noise"] = refused(noise.run)
    guidance = Subject("wan", None)
    accelerate_pipeline(guidance.pipe, "slg", layers=(1,))
    parallelize_pipeline(guidance.pipe, cfg=2)
    found["guidance beside cfg"] = refused(guidance.run)
    found["budget over ranks"] = refused(
        lambda: accelerate_pipeline(guidance.pipe, "pisa", min_psnr=30, probe=guidance.arguments)
    )
    found["twice"] = refused(lambda: parallelize_pipeline(guidance.pipe, cfg=2))
    kontext = Subject("flux_kontext", "gna")
    parallelize_pipeline(kontext.pipe, ring=2)
    found["reference on a ring"] = refused(kontext.run)
    vace, _ = TINY_PIPELINES["wan_vace"]
    found["no plan"] = refused(lambda: parallelize_pipeline(vace(), ulysses=2))
    return found


def refused(run: Callable[[], Any]) -> str:
    """Return the error that ``run`` raises."""
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


CASES: dict[str, tuple[Callable[[dict[str, int]], Any], dict[str, int]]] = {
    "methods ulysses": (methods, {"ulysses": 2}),
    "methods ring": (methods, {"ring": 2}),
    "families ulysses": (families, {"ulysses": 2}),
    "families ring": (families, {"ring": 2}),
    "guided": (guided, {"cfg": 2}),
    "perturbed ulysses": (perturbed, {"ulysses": 2}),
    "perturbed ring": (perturbed, {"ring": 2}),
    "in any order": (in_any_order, {}),
    "bad input": (bad_input, {}),
}


def four_ranks() -> dict[str, Any]:
    """Two splits at once, and a ring of more than two parts."""
    splits = ({"ulysses": 2, "ring": 2}, {"cfg": 2, "ring": 2}, {"ring": 4})
    subjects = (("wan", "gna"), ("wan", "psa"), ("hunyuan", "radial"))
    return {
        f"{family} {method} {split}": compared(family, method, split)
        for split in splits
        for family, method in subjects
    }


def two_ranks() -> dict[str, Any]:
    """Run all cases; one that fails does not take the others along."""
    return {name: caught(case, split) for name, (case, split) in CASES.items()}


def caught(case: Callable[[dict[str, int]], Any], split: dict[str, int]) -> Any:
    import traceback

    try:
        return case(split)
    except Exception:
        return traceback.format_exc()
