"""Colours, type and spacing of the page. Fonts are the visitor's own: the page asks no other host for anything."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

__all__ = ["SERIES", "css", "head", "start_script", "theme"]

SERIES = ("var(--s1)", "var(--s2)", "var(--s3)", "var(--s4)", "var(--s5)", "var(--s6)")
"""Colour of the first, second, … subject everywhere on the page; the prompt is drawn in the text colour."""

SANS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "DejaVu Sans", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Consolas", "DejaVu Sans Mono", "monospace")


def theme() -> gr.themes.Base:
    """Ink on warm paper, and its dark twin; colour is left to the subjects."""
    base = gr.themes.Base(
        primary_hue="stone",
        secondary_hue="stone",
        neutral_hue="stone",
        font=SANS,
        font_mono=MONO,
        radius_size="lg",
        text_size="md",
    )
    return base.set(
        body_background_fill="#faf9f7",
        body_background_fill_dark="#161514",
        body_text_color="#1f1d1a",
        body_text_color_dark="#eceae6",
        body_text_color_subdued="#6b675f",
        body_text_color_subdued_dark="#a19c93",
        background_fill_primary="#ffffff",
        background_fill_primary_dark="#1e1d1b",
        background_fill_secondary="#f4f2ee",
        background_fill_secondary_dark="#262422",
        border_color_primary="#e6e2da",
        border_color_primary_dark="#35322e",
        border_color_accent="#b9b2a5",
        border_color_accent_dark="#57524a",
        color_accent="#1f1d1a",
        color_accent_soft="#f0ede7",
        color_accent_soft_dark="#2d2b28",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_border_width="0px",
        block_border_width_dark="0px",
        block_shadow="none",
        block_shadow_dark="none",
        block_padding="0px",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_label_text_color="*body_text_color_subdued",
        block_label_text_color_dark="*body_text_color_subdued",
        block_title_text_color="*body_text_color",
        block_title_text_color_dark="*body_text_color",
        block_title_text_size="0.875rem",
        block_title_text_weight="550",
        block_info_text_color="*body_text_color_subdued",
        block_info_text_color_dark="*body_text_color_subdued",
        block_info_text_size="0.8125rem",
        input_background_fill="#ffffff",
        input_background_fill_dark="#1e1d1b",
        input_background_fill_focus="#ffffff",
        input_background_fill_focus_dark="#1e1d1b",
        input_border_color="#dcd7cd",
        input_border_color_dark="#3d3a35",
        input_border_color_focus="#8d8679",
        input_border_color_focus_dark="#8d8679",
        input_border_width="1px",
        input_border_width_dark="1px",
        button_border_width="1px",
        button_border_width_dark="1px",
        input_shadow="none",
        input_shadow_dark="none",
        input_shadow_focus="0 0 0 3px rgba(141,134,121,.18)",
        input_shadow_focus_dark="0 0 0 3px rgba(141,134,121,.25)",
        button_primary_background_fill="#1f1d1a",
        button_primary_background_fill_dark="#eceae6",
        button_primary_background_fill_hover="#3a3732",
        button_primary_background_fill_hover_dark="#ffffff",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#161514",
        button_primary_border_color="transparent",
        button_primary_border_color_dark="transparent",
        button_secondary_background_fill="#ffffff",
        button_secondary_background_fill_dark="#262422",
        button_secondary_background_fill_hover="#f4f2ee",
        button_secondary_background_fill_hover_dark="#302d2a",
        button_secondary_border_color="#dcd7cd",
        button_secondary_border_color_dark="#3d3a35",
        button_secondary_text_color="*body_text_color",
        button_secondary_text_color_dark="*body_text_color",
        button_cancel_background_fill="transparent",
        button_cancel_background_fill_dark="transparent",
        button_cancel_background_fill_hover="#fbecea",
        button_cancel_background_fill_hover_dark="#3a2522",
        button_cancel_border_color="#dcd7cd",
        button_cancel_border_color_dark="#3d3a35",
        button_cancel_text_color="#a83a2c",
        button_cancel_text_color_dark="#f0978a",
        checkbox_background_color_selected="#1f1d1a",
        checkbox_background_color_selected_dark="#eceae6",
        checkbox_border_color_selected="#1f1d1a",
        checkbox_border_color_selected_dark="#eceae6",
        checkbox_label_background_fill_selected="#f0ede7",
        checkbox_label_background_fill_selected_dark="#35322e",
        checkbox_label_text_color_selected="*body_text_color",
        checkbox_label_text_color_selected_dark="*body_text_color",
        slider_color="#1f1d1a",
        slider_color_dark="#eceae6",
        link_text_color="#1f1d1a",
        link_text_color_dark="#eceae6",
        layout_gap="20px",
        form_gap_width="0px",
    )


def css() -> str:
    """The style sheet beside this file."""
    return Path(__file__).with_name("style.css").read_text(encoding="utf-8")


def head() -> str:
    """The page's own icon and a viewport that phones respect."""
    return (
        '<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns=%22http://www.w3.org/2000/svg%22 viewBox=%220 0 32 32'
        "%22%3E%3Ccircle cx=%2212%22 cy=%2216%22 r=%2210%22 fill=%22%23128f7e%22/%3E%3Ccircle cx=%2220%22 cy=%2216"
        '%22 r=%2210%22 fill=%22%23dd6444%22 fill-opacity=%22.85%22/%3E%3C/svg%3E">'
    )


def start_script() -> str:
    """Run once in the browser: the visitor's choice of light or dark outlives a reload."""
    return """() => {
      const stored = localStorage.getItem('mole-theme');
      if (stored) document.body.classList.toggle('dark', stored === 'dark');
    }"""
