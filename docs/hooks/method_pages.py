"""The page of a method: prose written by hand, and around it what code and results know."""

from __future__ import annotations

import html
import inspect
import re
from pathlib import Path
from typing import Any

from measured_rows import measured
from option_tables import option_table
from pictures import Picture, paths_of

import dit_accel
from dit_accel.kinds import KINDS, Method
from dit_accel.presets import PRESETS
from dit_accel.registry import list_methods, method_class

PROSE = Path(__file__).parents[1] / "methods"
TITLES = {
    "attention": "Attention",
    "cache": "Feature caches",
    "guidance": "Guidance",
    "resolution": "Resolution",
}


def own_methods(kind: str | None = None) -> list[str]:
    """Return the names of this package's methods; those of other packages have their own pages."""
    return [n for n in list_methods(kind) if method_class(n).__module__.startswith("dit_accel.")]


def navigation() -> list[dict[str, Any]]:
    """Return the entries of the methods, by kind."""
    pages = [
        {TITLES[kind]: [{name: f"methods/{name}.md"} for name in own_methods(kind)]}
        for kind in KINDS
    ]
    return [{"Overview": "methods/index.md"}, *pages]


def prose_of(name: str) -> str:
    """Return what was written about a method, or else what its docstring says."""
    path = PROSE / f"{name}.md"
    if path.exists():
        return path.read_text(encoding="utf-8")
    return f"# {name}\n\n{inspect.getdoc(method_class(name))}\n"


def method_page(name: str, prose: str) -> str:
    """Return the page: title, facts, first paragraph, pictures, more prose, options, rows."""
    cls = method_class(name)
    title, _, body = prose.partition("\n")
    intro, heading, rest = body.partition("\n## ")
    parts = [title, _facts(cls), intro.strip(), _pictures(name), heading + rest if heading else ""]
    parts += [_presets(name), "## Options", option_table(name), _shared(cls.kind)]
    parts += ["## Measured", measured(name, cls.kind)]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def method_list(kind: str) -> str:
    """Return a table of the methods of a kind."""
    rows = ["| name | what it does | paper |", "| --- | --- | --- |"]
    for name in own_methods(kind):
        text = prose_of(name).split("\n\n")[1].replace("\n", " ")
        paper = _linked(method_class(name).paper)
        rows.append(f"| [`{name}`](@/methods/{name}.md) | {_first_sentence(text)} | {paper} |")
    return "\n".join(rows) + "\n"


def _facts(cls: type[Method]) -> str:
    public = [n for n in dit_accel.__all__ if getattr(dit_accel, n) is cls]
    where = f"dit_accel.{public[0]}" if public else f"{cls.__module__}.{cls.__name__}"
    facts = [TITLES[cls.kind], f"<code>{cls.name}</code>", f"<code>{where}</code>"]
    if cls.paper:
        facts.append(_linked(cls.paper, as_html=True))
    items = "".join(f"<li>{fact}</li>" for fact in facts)
    return f'<ul class="facts">{items}</ul>'


def _linked(paper: str, *, as_html: bool = False) -> str:
    """Make arXiv numbers links."""
    link = r'<a href="https://arxiv.org/abs/\1">\1</a>' if as_html else (
        r"[\1](https://arxiv.org/abs/\1)"
    )  # fmt: skip
    text = html.escape(paper) if as_html else paper
    return re.sub(r"\b(\d{4}\.\d{5})\b", link, text)


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.])\s", text.strip(), maxsplit=1)[0]


def _pictures(name: str) -> str:
    shown = [(path, Picture.load(path)) for path in paths_of(name)]
    large = [_figure(path, picture) for path, picture in shown if picture.axes is None]
    small = [_figure(path, picture) for path, picture in shown if picture.axes is not None]
    row = f'<div class="matrices">{"".join(small)}</div>' if small else ""
    return "\n\n".join([*large, row]).strip()


def _figure(path: Path, picture: Picture) -> str:
    rows, columns = picture.pixels.shape[:2]
    caption = html.escape(picture.caption)
    # Pages lie one folder down.
    image = (
        f'<img src="../pictures/{path.name}" alt="{caption}" width="{columns}" height="{rows}" '
        f'loading="lazy">'
    )
    if picture.axes is None:
        return f'<figure class="frames">{image}<figcaption>{caption}</figcaption></figure>'
    right, down = picture.axes
    shape = "square" if rows == columns else "wide"
    return (
        f'<figure class="matrix {shape}"><div class="axis-right">{right} →</div>'
        f'<div class="axis-down">{down} →</div>{image}<figcaption>{caption}</figcaption></figure>'
    )


def _presets(name: str) -> str:
    rows = [
        f"| `{variant}` | {preset.source} |"
        for (variant, method), preset in sorted(PRESETS.items())
        if method == name
    ]
    if not rows:
        return ""
    head = "| model | published setting |\n| --- | --- |\n"
    told = "Without options, these settings are used for the models that they were published for."
    return f"## Published settings\n\n{told}\n\n{head}" + "\n".join(rows)


def _shared(kind: str) -> str:
    if kind == "attention":
        return (
            "Beside these, every attention method takes `density`, `dense_steps`, `dense_layers`, "
            "`min_tokens`, `backend` and `precision`: see [Density and budgets](../budgets.md)."
        )
    if kind == "cache":
        return (
            "`target_speedup` and `max_error` choose its strength for you: see "
            "[Density and budgets](../budgets.md#how-strong-a-cache)."
        )
    return ""
