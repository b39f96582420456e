"""How Sphinx builds the manual: `python -m sphinx -W docs build/manual` (extra `docs`)."""

import re
import shutil
from pathlib import Path

import hnsw_gpu

HERE = Path(__file__).parent
FIELD = re.compile(r"(\w+): (.*)")

project = "hnsw_gpu"
release = hnsw_gpu.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
default_role = "code"  # of `names` in docstrings
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say shapes, dtypes and units
html_theme = "furo"
html_title = f"hnsw_gpu {release}"
html_show_copyright = False
html_copy_source = False  # the sources lie beside their pages, where llms.txt finds them
html_extra_path = ["llms.txt"]


def as_fields(app, what, name, obj, options, lines):
    """Lines `name: meaning` of a docstring, and those that go on with them, as a list of fields."""
    written, is_field = [], False
    for line in lines:
        found = FIELD.match(line)
        if found:
            kind = "param" if found[1].islower() or len(found[1]) == 1 else "raises"
            written += [] if is_field else [""]
            line = f":{kind} {found[1]}: {found[2]}"
        elif is_field and line and not line.startswith(" "):
            line = f"    {line}"
        is_field = bool(found) or (is_field and bool(line))
        written.append(line)
    lines[:] = written


def copy_sources(app, exception):
    """Put the Markdown of every page beside it."""
    for page in HERE.rglob("*.md"):
        if app.builder.name == "html" and exception is None:
            shutil.copy(page, Path(app.outdir) / page.relative_to(HERE))


def setup(app):
    app.connect("autodoc-process-docstring", as_fields)
    app.connect("build-finished", copy_sources)
