"""Pictures and videos larger than a model was trained for."""

from __future__ import annotations

import gradio as gr

from dit_accel.app.options import MethodControls
from dit_accel.app.site import Site
from dit_accel.app.tabs.generate import GenerationTab


def highres_tab(site: Site, page: gr.Blocks) -> None:
    """Draw the tab for methods that generate beyond the trained size."""
    GenerationTab(
        site,
        "highres",
        MethodControls(["resolution", "attention"], general=False),
        {"resolution": "freeswim"},
        compare="Generate at this size without the method too, and compare",
        run="with the method",
        baseline="without it",
        enlarge=1.5,
        density=False,
    ).draw(page)
