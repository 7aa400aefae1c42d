"""Sphinx: how the manual is built (python -m sphinx -W -b html docs docs/_build)."""

from __future__ import annotations

import fastseg

project = "fastseg"
author = "the fastseg developers"
copyright = "2026, the fastseg authors"
version = release = fastseg.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "numpydoc",
    "myst_parser",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
default_role = "autolink"
nitpicky = True
# Types of other libraries, which have no page here, and words of the docstrings' type fields.
nitpick_ignore_regex = [("py:.*", r"(?!fastseg\.).*")]

autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints = "none"
numpydoc_show_class_members = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

html_theme = "pydata_sphinx_theme"
html_title = f"fastseg {release}"
html_show_sourcelink = False
html_theme_options = {
    "header_links_before_dropdown": 8,
    "navbar_align": "left",
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_sidebars = {  # of pages that have none beside them
    page: [] for page in ("index", "quickstart", "losses", "mathematics", "performance", "numerics")
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
