"""Settings of the site; its pages of the zoo, the gallery, the ledger and the API are written here first."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import pages  # noqa: E402

pages.write(HERE / "generated")

project = "ppl-models"
author = "the authors of ppl-models"
copyright = "the authors of ppl-models, Apache licence 2.0"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "mathml",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
html_theme = "furo"
html_title = "ppl-models"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#1d5a8c", "color-brand-content": "#1d5a8c"},
    "dark_css_variables": {"color-brand-primary": "#8ec1ea", "color-brand-content": "#8ec1ea"},
}
