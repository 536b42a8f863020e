"""The commands that tell what there is and what can run here, without loading a model."""

from __future__ import annotations

from dataclasses import MISSING, Field, asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dit_accel.cli.options import describe, method_hints, parse_options
from dit_accel.cli.output import print_json
from dit_accel.errors import OptionError

if TYPE_CHECKING:
    from dit_accel.call import TokenLayout
    from dit_accel.grid import Grid
    from dit_accel.kinds import Method
    from dit_accel.methods.base import StaticMethod

Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="An option, e.g. density=0.3. Repeatable.", metavar="NAME=VALUE"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def methods(
    kind: Annotated[
        str | None, typer.Option(help="Only attention, cache, guidance or resolution.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the methods with their options, as given to `generate --set`.

    One of each kind can be used together: `generate --method radial,first_block_cache`.
    """
    from dit_accel.registry import list_methods, method_class

    rows = [_method_row(method_class(name)) for name in list_methods(kind)]
    if as_json:
        print_json(rows)
        return
    caption = "static: the pattern follows from the token grid alone; `show-mask` draws it"
    table = Table(caption=caption)
    table.add_column("method", no_wrap=True)
    for column in ("kind", "options (type = default)", "paper"):
        table.add_column(column)
    for row in rows:
        options = [f"{o['name']}: {o['type']} = {o['default']}" for o in row["options"]]
        kind = f"{row['kind']}, static" if row["static"] else row["kind"]
        table.add_row(row["name"], kind, "\n".join(options), row["paper"], end_section=True)
    Console().print(table)


def families(as_json: AsJson = False) -> None:
    """List the model families that can be accelerated."""
    from dit_accel.registry import family_class, list_families

    found = [family_class(name) for name in list_families()]
    rows = [
        {
            "name": family.name,
            "pipelines": family.pipelines,
            "transformers": list(family.transformer_classes),
        }
        for family in found
    ]
    if as_json:
        print_json(rows)
        return
    table = Table("family", "pipelines", "transformer classes")
    for family in found:
        table.add_row(family.name, family.pipelines, "\n".join(family.transformer_classes))
    Console().print(table)


def doctor(as_json: AsJson = False) -> None:
    """Tell which attention operators can run here, and why the others can't."""
    import torch

    from dit_accel.environment import environment, ffmpeg_version, pick_device
    from dit_accel.models import list_models
    from dit_accel.operators import list_operators
    from dit_accel.tuning_file import load_tuning

    device = pick_device("auto")
    found = environment(device)
    found["tile_shapes"] = load_tuning(torch.device(device)).source
    operators = {operator.name: operator.why_not_here() for operator in list_operators()}
    ffmpeg, models = ffmpeg_version(), list_models()
    if as_json:
        print_json({"operators": operators, **found, "ffmpeg": ffmpeg, "bundled_models": models})
        return
    console = Console()
    table = Table("operator", "can run here", "why not")
    for name, reason in operators.items():
        table.add_row(name, "no" if reason else "yes", reason or "")
    console.print(table)
    table = Table("", show_header=False)
    table.add_row("python", found["python"])
    for package, installed in found["packages"].items():
        table.add_row(package, installed or "not installed")
    for name, value in found["device"].items():
        table.add_row(f"device {name}", str(value))
    table.add_row("tile shapes", found["tile_shapes"])
    table.add_row("ffmpeg", ffmpeg or "not found: videos can't be written")
    table.add_row("bundled models", ", ".join(models))
    console.print(table)


def show_mask(
    method: Annotated[str, typer.Argument(help="A method whose pattern is static.")],
    grid: Annotated[str, typer.Option(help="Tokens as T,H,W.", metavar="T,H,W")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A .png.")],
    text: Annotated[int, typer.Option(help="Text tokens behind the video tokens.")] = 0,
    options: Settings = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing picture.")] = False,
    as_json: AsJson = False,
) -> None:
    """Draw which tokens a static METHOD lets see which, and print the density of that."""
    from dit_accel.call import TokenLayout
    from dit_accel.files import IMAGE_SUFFIX, check_outputs, replacing
    from dit_accel.masks_png import save_mask_picture
    from dit_accel.plan import BlockSparsePlan

    settings = parse_options(method, options or [], general=("density",))
    if output.suffix.lower() != IMAGE_SUFFIX:
        raise OptionError(f"output {str(output)!r} must end in {IMAGE_SUFFIX}.")
    check_outputs([output], force=force)
    if text < 0:
        raise OptionError(f"--text {text} must not be negative.")
    layout = TokenLayout(_grid(grid), text)
    static = _static_method(method, settings, layout)
    with replacing(output) as partial:
        plan = save_mask_picture(static, layout, partial)
    density = block_density = 1.0
    if isinstance(plan, BlockSparsePlan):
        density, block_density = plan.density, plan.block_density
    found = {
        "method": asdict(static) | {"name": static.name},
        "grid": list(layout.grid),
        "text_length": text,
        "density": density,
        "block_density": block_density,
        "output": str(output),
    }
    if as_json:
        print_json(found)
        return
    Console().print(
        f"{static}\n{layout.num_tokens} tokens: {density:.4f} of the pairs attended, "
        f"{block_density:.4f} computed\nwrote {output}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _grid(text: str) -> Grid:
    from dit_accel.grid import as_grid

    try:
        axes = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise OptionError(f"--grid {text!r}: write tokens as T,H,W, such as 21,45,80.") from None
    return as_grid(axes)


def _static_method(method: str, settings: dict[str, Any], layout: TokenLayout) -> StaticMethod:
    from dit_accel.methods.base import StaticMethod
    from dit_accel.registry import resolve_method

    density = settings.pop("density", None)
    resolved = resolve_method(method, **settings)
    if not isinstance(resolved, StaticMethod):
        raise OptionError(f"the pattern of {method!r} depends on the values: there is no one mask.")
    return resolved if density is None else resolved.at_density(density, layout)


def _method_row(cls: type[Method]) -> dict[str, Any]:
    from dit_accel.methods.base import StaticMethod

    hints = method_hints(cls.name)
    return {
        "name": cls.name,
        "kind": cls.kind,
        "summary": cls.summary(),
        "paper": cls.paper,
        "static": issubclass(cls, StaticMethod),
        "options": [
            {"name": f.name, "type": describe(hints[f.name]), "default": _default(f)}
            for f in fields(cls)
            if f.init
        ],
    }


def _default(option: Field[Any]) -> Any:
    if option.default is not MISSING:
        return option.default
    return None if option.default_factory is MISSING else option.default_factory()
