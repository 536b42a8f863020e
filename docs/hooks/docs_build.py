"""MkDocs hooks: what the site takes from the code and from the results, page by page.

``<!-- made: NAME ARGUMENT -->`` on a page becomes what `MADE` makes of it, and ``{{ KEY:FORMAT }}``
a number of benchmarks/results/summary.json. A page of methods/ is prose with its picture, options
and rows around it (`method_pages`); a method without prose gets a page from its docstring.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from command_pages import command_reference  # noqa: E402
from measured_rows import overview, table, value  # noqa: E402
from method_pages import method_list, method_page, navigation, own_methods, prose_of  # noqa: E402
from option_tables import options_of  # noqa: E402
from pictures import paths_of  # noqa: E402
from registry_tables import families, operators  # noqa: E402

MADE = {
    "methods": method_list,
    "table": table,
    "overview": overview,
    "families": families,
    "options": options_of,
    "operators": operators,
    "commands": command_reference,
    "changelog": lambda: (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").partition("\n")[2],
}
MARKER = re.compile(r"^<!-- made: (\w+) ?(\S*) -->$", re.MULTILINE)
NUMBER = re.compile(r"\{\{ ([\w.\-]+?):([.\d]*[%fdg]) \}\}")
RESULTS = "benchmarks/results/"


def on_config(config: Any) -> Any:
    """Put the methods' pages into the navigation, and draw pictures that are missing."""
    for name in own_methods():
        paths_of(name)
    for entry in config.nav:
        if "Methods" in entry:
            entry["Methods"] = navigation()
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add pages of methods that nobody wrote prose for, and the results that tables name."""
    for name in own_methods():
        uri = f"methods/{name}.md"
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, content=prose_of(name)))
    for path in sorted((ROOT / RESULTS).iterdir()):
        if path.suffix in (".json", ".svg"):
            files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in what is made, and point to the site's copy of results."""
    uri = page.file.src_uri
    folder, _, file = uri.rpartition("/")
    if folder == "methods" and file != "index.md":
        markdown = method_page(file.removesuffix(".md"), markdown)
    up = "../" * uri.count("/")
    text = MARKER.sub(lambda m: _made(m[1], m[2]), markdown)
    text = NUMBER.sub(lambda m: format(value(m[1]), m[2]), text)
    return text.replace(f"]({RESULTS}", f"]({up}results/").replace("](@/", f"]({up}")


def _made(name: str, argument: str) -> str:
    return MADE[name](argument) if argument else MADE[name]()  # type: ignore[operator]
