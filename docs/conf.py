"""The documentation as a site: Sphinx, MyST and furo. `scripts/docs` builds it; nothing is fetched then, nor when it is read."""

import sys
from pathlib import Path
from typing import Any

from docutils.utils.math.latex2mathml import tex2mathml

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

project = "Sluice"
extensions = ["myst_parser", "reference_pages", "source_pages"]
source_suffix = {".md": "markdown"}
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


def setup(app: Any) -> None:
    """Formulas become MathML here, by docutils' own converter: browsers draw it without a script."""

    def visit(self: Any, node: Any) -> None:
        block = node.tagname == "math_block"
        mathml = tex2mathml(node.astext(), as_block=block)
        self.body.append(f'<div class="math">{mathml}</div>' if block else mathml)
        raise_skip()

    def raise_skip() -> None:
        from docutils.nodes import SkipNode

        raise SkipNode

    app.add_html_math_renderer("mathml", inline_renderers=(visit, None), block_renderers=(visit, None))
