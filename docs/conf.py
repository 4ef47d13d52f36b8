"""The documentation: the README and the Markdown pages of this folder, the notebooks, and references from the code."""

import shutil
import sys
from pathlib import Path

import fpq_analysis

here = Path(__file__).parent
sys.path.insert(0, str(here / "_extensions"))
shutil.copytree(here.parent / "notebooks", here / "notebooks", dirs_exist_ok=True)  # Sphinx reads what is below it

project = "fpq_analysis"
author = "The fpq_analysis authors"
release = version = fpq_analysis.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_design",
    "sphinx_copybutton",
    "command_line",
    "public_names",
]
exclude_patterns = ["_build", "notebooks/README.md"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4  # so that [text](page.md#heading) is checked
nb_execution_mode = "off"  # the notebooks are committed with their outputs, which come from minutes of training
default_role = "code"  # in docstrings `x` is code, as it is in Markdown
napoleon_custom_sections = [("Attributes", "params_style")]  # a list, as that of parameters
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_mock_imports = ["lightning", "transformers"]  # of packages that only their users have
python_maximum_signature_line_length = 80
copybutton_exclude = ".linenos, .gp, .go"  # prompts and what is printed

html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
