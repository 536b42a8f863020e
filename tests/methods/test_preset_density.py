"""Every published setting of a method that looks at tokens, scaled to a density."""

import pytest
import torch
from selecting_checks import make_plan, random_inputs

from dit_accel.call import TokenLayout
from dit_accel.errors import DensityUnreachableError
from dit_accel.methods.selecting import SelectingMethod
from dit_accel.plan import JointPlan
from dit_accel.presets import PRESETS
from dit_accel.registry import method_class, resolve_method

CASES = [key for key in PRESETS if issubclass(method_class(key[1]), SelectingMethod)]


@pytest.mark.parametrize("density", [0.5, 0.25])
@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_preset_meets_a_density_within_a_tenth(family: str, name: str, density: float) -> None:
    grid = (1, 48, 72) if family in ("flux", "sd3") else (6, 24, 24)
    layout = TokenLayout(grid, 40)
    method = resolve_method(name, **PRESETS[family, name].options)
    try:
        scaled = method.at_density(density, layout)
    except DensityUnreachableError as error:  # 27 blocks of 128 have many neighbours
        density = max(density, error.least)
        scaled = method.at_density(density, layout)
    qkv = random_inputs(layout, batch=1, heads=1, dtype=torch.float32)
    plan = make_plan(scaled, layout, *qkv)
    assert isinstance(plan, JointPlan)
    assert plan.density == pytest.approx(density, rel=0.1)
