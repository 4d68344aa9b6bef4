"""The documentation as a site: Sphinx, MyST and furo. `scripts/docs` builds it; nothing is fetched then, nor when it is read."""

import sys
from pathlib import Path
from typing import Any

from docutils.nodes import SkipNode
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

project = "Sluice"
extensions = ["myst_parser", "reference_pages", "source_pages"]
source_suffix = {".md": "markdown"}
smartquotes = False
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "Sluice"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_math_renderer = "mathml"
pygments_style = "tango"
pygments_dark_style = "github-dark"


def draw_formula(self: Any, node: Any) -> None:
    """MathML, by docutils' own converter: browsers draw it without a script."""
    is_block = node.tagname == "math_block"
    try:
        mathml = tex2mathml(node.astext(), as_block=is_block)
    except MathError as error:
        logging.getLogger(__name__).warning("formula: %s", error, location=node)
        raise SkipNode from error
    self.body.append(f'<div class="formula">{mathml}</div>' if is_block else mathml)
    raise SkipNode


def setup(app: Any) -> None:
    renderers = {"inline_renderers": (draw_formula, None), "block_renderers": (draw_formula, None)}
    app.add_html_math_renderer("mathml", **renderers)
