"""Sphinx's settings: `python -m sphinx -W --keep-going -n docs docs/_build` builds the pages, without a GPU."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # a clone is documented as it is, installed or not

import dlu_triton

project = "dlu_triton"
copyright = "the dlu_triton authors"  # as in LICENSE
release = dlu_triton.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
default_role = "literal"  # docstrings have names in single backticks

highlight_language = "none"  # of indented blocks

html_theme = "furo"
html_title = f"dlu_triton {release}"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["wide.css"]
copybutton_exclude = ".linenos, .gp, .go"  # prompts and output of consoles

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autoclass_content = "both"
autodoc_mock_imports = ["mmcv", "mmengine"]  # which want libGL, and containers may have none
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
python_maximum_signature_line_length = 88
# Nothing is downloaded to build the pages, so other projects' names are no links.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|numpy|np|nn|collections)\..*|Tensor|Module"),
    ("py:class", r"dlu_triton\._complexity\.UpsamplerCost"),  # its fields are in the text of `complexity`
]
