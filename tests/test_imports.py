"""Importing the package is cheap: heavy and optional packages are imported on first use only."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("triton", "gradio", "typer", "transformers", "diffusers", "torch")


def imported_by(code: str) -> set[str]:
    """Run ``code`` in a fresh interpreter and return the modules it imported."""
    script = f"import sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    return set(done.stdout.splitlines()[-1].split())


def test_importing_the_package_imports_nothing_heavy():
    assert imported_by("import dit_accel").isdisjoint(HEAVY)


def test_importing_the_command_imports_nothing_heavy():
    assert imported_by("import dit_accel.cli").isdisjoint(set(HEAVY) - {"typer"})


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("from dit_accel import accelerate_pipeline", id="accelerate_pipeline"),
        pytest.param("import dit_accel; dit_accel.list_methods()", id="methods"),
        pytest.param("import dit_accel; dit_accel.list_families()", id="families"),
        pytest.param("import dit_accel; dit_accel.Radial().plan_layout", id="a method"),
    ],
)
def test_without_a_pipeline_no_pipeline_and_no_kernel_is_imported(code):
    modules = imported_by(code)
    assert modules.isdisjoint({"triton", "gradio", "typer", "transformers"})
    assert not [name for name in modules if name.startswith("diffusers.pipelines")]


def test_every_public_name_can_be_imported():
    import dit_accel

    for name in dit_accel.__all__:
        assert getattr(dit_accel, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dit_accel.nothing  # noqa: B018
