"""Sphinx: how the documentation is built. `./launch/docs` builds it."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

project = "syncnorm"
author = "the authors of syncnorm"
release = version = re.search(r'^__version__ = "(.+)"', (ROOT / "syncnorm/__init__.py").read_text(), re.MULTILINE)[1]

extensions = ["docstrings", "myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "compatibility-table.md", "figures", "plots", "records"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"syncnorm {version}"

autodoc_member_order = "bysource"
autodoc_mock_imports = ["lightning"]
autodoc_inherit_docstrings = False
autodoc_typehints = "signature"
autodoc_type_aliases = {"ProcessGroupLike": "ProcessGroupLike"}
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Collectives", "Shapes", "Source"]

nitpicky = True
nitpick_ignore_regex = [  # what other projects document: the build needs no network
    ("py:.*", r"(collections|datetime|mpi4py|nn|pathlib|torch)\..*"),
    ("py:exc", r"(Exception|RuntimeError|TypeError|ValueError)"),
    ("py:class", r"(Converter|Timing|syncnorm\.testing\.(ranks\.Result|split\.Batch|whole_batch\.report\.Run))"),
    ("py:class", r"syncnorm\.planning\.(explain|network|predict|report|trace|waiting)\..*"),
]
