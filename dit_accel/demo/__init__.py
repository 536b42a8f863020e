"""A page in the browser that generates densely and accelerated, side by side.

``runner.py`` does the work and knows nothing of pages, ``snippet.py`` writes it down as Python,
and ``page.py`` is what one sees. gradio is imported by ``page.py`` only.
"""

from __future__ import annotations

from typing import Any

from dit_accel.errors import OptionError


def launch(**options: Any) -> None:
    """Serve the page on this computer until it is interrupted.

    Args:
        options: keyword arguments of gradio's ``Blocks.launch``, e.g. ``server_port=7860``.

    Raises:
        OptionError: if gradio is not installed.
    """
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise OptionError(
            "the demo page needs gradio, which is not installed: pip install 'dit-accel[app]'"
        ) from error
    from dit_accel.demo.page import build_page

    build_page().launch(**{"footer_links": ["gradio", "settings"], **options})
