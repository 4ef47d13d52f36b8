"""The documentation: the README and the Markdown pages of this folder, and the API reference from the docstrings."""

import fpq_analysis

project = "fpq_analysis"
author = "The fpq_analysis authors"
release = version = fpq_analysis.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3  # so that [text](page.md#heading) is checked
default_role = "code"  # in docstrings `x` is code, as it is in Markdown
autodoc_typehints = "description"

html_theme = "furo"
html_title = f"{project} {release}"
html_show_copyright = False
