"""The documentation site: python -m sphinx -W --keep-going docs docs/_build (pip install -e '.[docs]')."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # this checkout's biper, whichever is installed, and site_pages.py

project = "BiPer"
extensions = ["myst_parser", "sphinx.ext.autodoc", "site_pages"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3  # links to headings work as they do where the repository is shown

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True, "exclude-members": "extra_repr"}
default_role = "py:obj"  # what stands between backticks in a docstring is code, and a link where a name is meant
python_maximum_signature_line_length = 90
add_module_names = False

html_theme = "furo"
html_title = "BiPer"
html_math_renderer = "mathml"
html_show_copyright = False
