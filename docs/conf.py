"""How the site is built: `make docs`."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]

import scoreinfer
from made_pages import reached

project, author = "scoreinfer", "The scoreinfer developers"
copyright = author
release = version = scoreinfer.__version__

extensions = [
    "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_design", "myst_nb", "made_pages",
]  # fmt: skip
exclude_patterns = ["_build", "_ext", "_made"]
needs_sphinx = "7.4"

# Pages are MyST Markdown. Code cells run when the site is built; results are kept until a cell changes.
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath", "substitution"]
myst_substitutions = {"reached": reached()}
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE / "_build" / "executed")
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True
# "ref.python": two rooms may have a class of the same name, and signatures name it without its room.
suppress_warnings = ["mystnb.unknown_mime_type", "config.cache", "ref.python"]

# Docstrings are Google's, with single backticks for names.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_use_rtype = False
python_maximum_signature_line_length = 88

html_theme = "pydata_sphinx_theme"
html_title = "scoreinfer"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "navbar_align": "left",
    "header_links_before_dropdown": 6,
    "show_prev_next": False,
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "tango",
    "pygments_dark_style": "monokai",
    "navbar_end": ["theme-switcher"],
}
# Pages without pages below them have no side bar.
alone = "index getting_started concepts exact when_not benchmarks faq glossary changelog gallery/index"
html_sidebars = {page: [] for page in alone.split()}
# Formulas become MathML, which browsers draw by themselves: reading the site needs no network either.
html_math_renderer = "mathml"
