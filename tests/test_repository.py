"""Rules of this repository that a machine can check: sizes, forbidden constructs, file weights."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dit_accel"
FOLDERS = ("dit_accel", "tests", "recipes", "benchmarks", "examples", "docs")
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_EXAMPLE_LINES = 500, 80, 40
MAX_BYTES, MAX_MODEL_BYTES = 2**20, 36 * 2**20


def sources(*folders: str) -> Iterator[tuple[str, str, ast.Module]]:
    """Yield path, text and syntax tree of each Python file."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            yield path.relative_to(ROOT).as_posix(), text, ast.parse(text)


def gives_a_reason(node: ast.Module | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether the docstring says why its module or function is long."""
    return bool(re.search(r"\b(lines|long|length)\b", ast.get_docstring(node) or "", re.IGNORECASE))


def test_long_files_and_functions_say_why_in_their_docstring():
    offenders = []
    for name, text, tree in sources(*FOLDERS):
        if len(text.splitlines()) > MAX_FILE_LINES and not gives_a_reason(tree):
            offenders.append(name)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES and not gives_a_reason(node):
                    offenders.append(f"{name}: {node.name} has {lines} lines")
    assert not offenders


def test_behaviour_does_not_depend_on_environment_variables():
    forbidden = re.compile(r"\benviron\b|\bgetenv\b")
    assert not [name for name, text, _ in sources("dit_accel") if forbidden.search(text)]


def test_user_input_is_not_checked_by_assert():
    assert not [
        f"{name}:{node.lineno}"
        for name, _, tree in sources("dit_accel")
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert)
    ]


def test_triton_is_imported_by_kernels_only():
    offenders = []
    for name, _, tree in sources("dit_accel"):
        for node in ast.walk(tree):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                imported = [node.module or ""]
            if any(module.split(".")[0] == "triton" for module in imported):
                offenders.append(name)
    assert not [name for name in offenders if not name.startswith("dit_accel/kernels/")]


def test_examples_are_short():
    lengths = {name: len(text.splitlines()) for name, text, _ in sources("examples")}
    assert lengths
    assert not {name for name, length in lengths.items() if length > MAX_EXAMPLE_LINES}


def test_no_top_level_folder_shadows_a_package():
    """A root folder called ``kernels`` would break Hugging Face's package of that name."""
    assert not [name for name in ("kernels", "pipelines", "eval") if (ROOT / name).exists()]


def test_no_large_files():
    offenders = []
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            limit = MAX_MODEL_BYTES if PACKAGE / "models" in path.parents else MAX_BYTES
            if path.is_file() and path.stat().st_size > limit:
                offenders.append(path.relative_to(ROOT).as_posix())
    assert not offenders
