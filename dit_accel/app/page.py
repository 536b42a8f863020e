"""The page: its frame, its tabs, and how it looks."""

from __future__ import annotations

from typing import Any

import gradio as gr

from dit_accel.app.site import Site
from dit_accel.app.tabs.evaluate import evaluate_tab
from dit_accel.app.tabs.generate import generate_tab
from dit_accel.app.tabs.guidance import guidance_tab
from dit_accel.app.tabs.highres import highres_tab
from dit_accel.app.tabs.masks import masks_tab

TABS = {
    "Generate": generate_tab,
    "Masks": masks_tab,
    "Guidance": guidance_tab,
    "High resolution": highres_tab,
    "Evaluate": evaluate_tab,
}
HEADER = """<header class="da-header"><h1>dit-accel</h1>
<p>Faster video and image transformers, and what it costs: see both side by side.</p></header>"""


def build_page(site: Site) -> gr.Blocks:
    """Return the page of a site."""
    with gr.Blocks(title="dit-accel", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(HEADER)
        with gr.Tabs():
            for name, draw in TABS.items():
                with gr.Tab(name, id=name):
                    draw(site, page)

        def leave(request: gr.Request) -> None:
            site.cancel(request)

        page.unload(leave)
    page.queue(default_concurrency_limit=4)
    return page


def theme() -> Any:
    """Return the page's theme: fonts that gradio brings, one accent, flat surfaces."""
    sans, mono = (
        gr.themes.LocalFont("IBM Plex Sans", (400, 700)),
        gr.themes.LocalFont("IBM Plex Mono", (400,)),
    )
    return gr.themes.Base(
        primary_hue=gr.themes.colors.blue,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_sm,
        font=[sans, "system-ui", "sans-serif"],
        font_mono=[mono, "ui-monospace", "monospace"],
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
        block_title_text_weight="600",
        block_title_text_size="*text_sm",
        block_title_text_color="*neutral_800",
        block_title_text_color_dark="*neutral_100",
        form_gap_width="0px",
        button_large_text_weight="600",
        block_border_width="0px",
        block_border_width_dark="0px",
        block_shadow="none",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_padding="0px",
        input_background_fill="white",
        input_background_fill_dark="*neutral_900",
        input_border_width="1px",
        input_border_color="*neutral_300",
        input_border_color_dark="*neutral_600",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_600",
        button_primary_text_color="white",
        slider_color="*primary_700",
        checkbox_background_color_selected="*primary_700",
        checkbox_background_color_selected_dark="*primary_600",
    )
