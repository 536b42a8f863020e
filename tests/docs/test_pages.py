"""The documentation: every method has a page, code blocks hold, examples run, options are told."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel
from torch.nn.functional import scaled_dot_product_attention

from dit_accel import (
    GNA,
    PISA,
    Radial,
    accelerate_pipeline,
    acceleration_report,
    list_methods,
    method_class,
    registry,
    restore_pipeline,
)
from dit_accel.cli import app
from dit_accel.functional import sparse_attention
from dit_accel.models import load_pipeline

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md"))
OWN = [n for n in list_methods() if method_class(n).__module__.startswith("dit_accel.")]
BLOCK = re.compile(r"(<!-- run -->\n)?```python\n(.*?)```", re.DOTALL)
RUN = [page for page in PAGES if "<!-- run -->" in page.read_text(encoding="utf-8")]
# Examples that a CPU can run, with constants that make them short.
SHORT: dict[str, dict[str, Any]] = {
    "caching": {"STEPS": 8},
    "compare": {"STEPS": 2},
    "custom_method": {"STEPS": 3},
    "evaluate": {"STEPS": 2},
    "freeswim": {"STEPS": 2, "FRAMES": 5, "SIZE": 320},
    "head_guidance": {"STEPS": 2},
}


def name_of(page: Path) -> str:
    return page.relative_to(DOCS).with_suffix("").as_posix()


def blocks(page: Path) -> Iterator[tuple[bool, str]]:
    """Yield the Python code of a page, and whether it is to run."""
    for marker, code in BLOCK.findall(page.read_text(encoding="utf-8")):
        yield bool(marker), code


def run_page(page: Path) -> dict[str, Any]:
    """Run a page's marked blocks one after the other and return what they defined."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for wanted, code in blocks(page):
        if wanted:
            exec(compile(code, str(page), "exec", dont_inherit=True), names)
    return names


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_pipeline("tiny-wan")


@pytest.fixture
def hooks(monkeypatch) -> Any:
    """Return the module that makes methods' pages."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(DOCS / "hooks"))
    return importlib.import_module("method_pages")


@pytest.mark.parametrize("name", OWN)
def test_every_method_has_prose_and_pictures(name):
    page = DOCS / "methods" / f"{name}.md"
    assert page.exists(), f"write {page.relative_to(ROOT)}: what it does, when to use it, when not"
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert "\n## When to use it\n" in text
    assert "\n## When not to\n" in text
    assert any((DOCS / "pictures").glob(f"{name}-*.png")), f"draw it: docs/hooks/pictures.py {name}"


def test_no_page_is_of_a_method_that_is_gone():
    pages = {path.stem for path in (DOCS / "methods").glob("*.md")} - {"index"}
    pictures = {path.stem.rpartition("-")[0] for path in (DOCS / "pictures").glob("*.png")}
    assert pages == set(OWN)
    assert pictures <= set(OWN)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_compiles(page):
    for _, code in blocks(page):
        compile(code, str(page), "exec", dont_inherit=True)


@pytest.mark.parametrize("name", OWN)
def test_the_calls_on_a_methods_page_are_accepted(name, pipe):
    codes = [code for _, code in blocks(DOCS / "methods" / f"{name}.md")]
    assert codes
    for code in codes:
        exec(code, {"pipe": pipe, "accelerate_pipeline": accelerate_pipeline})
        restore_pipeline(pipe)


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_marked_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(page)


def test_the_method_of_the_page_is_its_definition():
    near_frames = run_page(DOCS / "extending" / "method.md")["NearFrames"]
    method = near_frames(1, block_size=16)
    grid, text = (5, 3, 7), 13
    query, key, value = torch.randn(3, 1, 5 * 3 * 7 + text, 2, 16, dtype=torch.float64)
    found = sparse_attention(query, key, value, method, grid=grid, text_length=text)
    frame = torch.arange(5 * 3 * 7) // 21
    allowed = torch.ones(query.shape[1], query.shape[1], dtype=torch.bool)
    allowed[: len(frame), : len(frame)] = (frame[:, None] - frame).abs() <= 1
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    expected = scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2)
    torch.testing.assert_close(found, expected)


def test_the_family_of_the_page_works(monkeypatch):
    family = run_page(DOCS / "extending" / "family.md")["LTXVideo"]
    point = SimpleNamespace(load=lambda: family)
    groups = {"dit_accel.families": [point]}
    monkeypatch.setattr(registry, "entry_points", lambda group: groups.get(group, []))
    registry._families.cache_clear()
    try:
        check_ltx_video()
    finally:
        registry._families.cache_clear()


def check_ltx_video() -> None:
    """Compare a tiny random LTX transformer with itself: stock, all pairs kept, some left out."""
    torch.manual_seed(0)
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=16,
    ).eval()
    pipe = LTXPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, transformer)
    grid = (3, 5, 7)

    @torch.no_grad()
    def forward() -> torch.Tensor:
        torch.manual_seed(1)
        return transformer(
            hidden_states=torch.randn(1, 3 * 5 * 7, 8),
            encoder_hidden_states=torch.randn(1, 6, 16),
            timestep=torch.tensor([500.0]),
            encoder_attention_mask=torch.ones(1, 6),
            **dict(zip(("num_frames", "height", "width"), grid, strict=True)),
        )[0]

    stock = forward()
    free = {"min_tokens": 0, "dense_steps": 0, "dense_layers": 0, "guard": False}
    # It reorders the tokens and leaves nothing out.
    accelerate_pipeline(pipe, PISA(density=1, block_size=16), **free)
    torch.testing.assert_close(forward(), stock)
    accelerate_pipeline(pipe, GNA(0.4, block_size=16), **free)
    assert acceleration_report(pipe).family == "ltx_video"
    assert not torch.allclose(forward(), stock, atol=1e-3)
    accelerate_pipeline(pipe, "taylorseer", first_steps=1)
    forward()
    restore_pipeline(pipe)
    assert torch.equal(forward(), stock)


def test_options_are_told_completely(hooks):
    options = importlib.import_module("option_tables")
    silent = [
        f"{name}.{field.name}"
        for name in OWN
        for field in fields(method_class(name))
        if field.init and not options.meaning_of(method_class(name), field.name)
    ]
    assert not silent
    assert "| `window` | int or float" in options.option_table("gna")
    assert "reuses in a row" in options.meaning_of(method_class("seacache"), "max_reuses")


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_example_compiles(path):
    compile(path.read_text(encoding="utf-8"), str(path), "exec")


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_example_runs(name, tmp_path, monkeypatch, capsys):
    code = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    for constant, value in SHORT[name].items():
        if re.search(rf"^{constant} = ", code, re.MULTILINE):
            code = re.sub(rf"^{constant} = .*$", f"{constant} = {value}", code, flags=re.MULTILINE)
    assert all(re.search(rf"\b{constant}\b", code) for constant in SHORT[name])
    monkeypatch.chdir(tmp_path)
    exec(compile(code, name, "exec", dont_inherit=True), {"__name__": "__main__"})
    assert capsys.readouterr().out


@pytest.mark.parametrize("name", OWN)
def test_a_method_without_prose_gets_a_page_from_its_docstring(name, hooks, monkeypatch, tmp_path):
    monkeypatch.setattr(hooks, "PROSE", tmp_path)
    page = hooks.method_page(name, hooks.prose_of(name))
    assert page.startswith(f"# {name}\n")
    assert method_class(name).summary() in page
    assert "\n## Options\n" in page
    assert "\n## Measured\n" in page


def test_measured_rows_are_those_of_the_results(hooks):
    rows = importlib.import_module("measured_rows")
    study = json.loads((ROOT / "benchmarks/results/caching-tiny-wan.json").read_text())
    own = [row for row in study["rows"] if row.get("cache") == "easycache" and "psnr_db" in row]
    shown = rows.measured("easycache", "cache")
    assert shown.count("| tiny-wan |") == len(own)
    assert all(f"{row['psnr_db']:.1f} dB" in shown for row in own)
    assert "gna-0.15-compiled" in rows.measured("gna", "attention")
    assert "gna-0.15" not in rows.measured("radial", "attention")
    assert rows.measured("slg", "guidance") == rows.NOTHING


def test_pictures_of_masks_are_what_the_code_draws(hooks):
    pictures = importlib.import_module("pictures")
    saved = [pictures.Picture.load(path) for path in pictures.paths_of("radial")][1:]
    drawn = list(pictures._masks(Radial()))
    assert [picture.caption for picture in drawn] == [picture.caption for picture in saved]
    for now, then in zip(drawn, saved, strict=True):
        assert (now.pixels == then.pixels).all()


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the calls of ``dit-accel`` in a page's shell blocks, and those in its sentences."""
    text = page.read_text(encoding="utf-8")
    lines = []
    for block in re.findall(r"```(?:sh|console)\n(.*?)```", text, re.DOTALL):
        lines += block.replace("\\\n", " ").splitlines()
    lines += re.findall(r"`(dit-accel [^`\n]+)`", text)
    for line in lines:
        if line.startswith("dit-accel "):
            yield shlex.split(line, comments=True)[1:]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_their_options_exist(page):
    for words in commands(page):
        command, rest = typer.main.get_command(app), words
        while rest and rest[0] in getattr(command, "commands", {}):
            command, rest = command.commands[rest[0]], rest[1:]
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        asked = {word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
        assert asked <= known, f"dit-accel {' '.join(words)}"
        takes = any(parameter.param_type_name == "argument" for parameter in command.params)
        assert takes or not rest or rest[0].startswith(("-", "...")), f"{' '.join(words)}"
