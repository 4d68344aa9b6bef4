"""Sphinx extension: links from the documentation into the repository.

On GitHub `[quickstart.yaml](../config/quickstart.yaml)` leads to the file. Here it leads to a page of the site that shows
it. So do the path of a file and the name of a test in `backquotes`, the latter at its line. Only files that are named get
a page. A relative link to a file that is not there is a warning, which the build takes for an error.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

DOCS = Path(__file__).parent
ROOT = DOCS.parent
LEXERS = {
    "": "bash",
    ".sh": "bash",
    ".py": "python",
    ".lua": "lua",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".json": "json",
    ".toml": "toml",
    ".md": "markdown",
}


@cache
def tests() -> dict[str, tuple[str, int]]:
    """Name of a test function -> file and line."""
    return {
        match[1]: (f"tests/{path.name}", number)
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if (match := re.match(r"(?:async )?def (test_\w+)", line))
    }


def source_of(text: str) -> tuple[str, int] | None:
    """File and line (0: none) that a piece of code in the text names."""
    if re.fullmatch(r"(\w[\w-]*/)+[\w.-]+", text) and not text.startswith(("docs/", "runs/")):
        return (text, 0) if (ROOT / text).is_file() and Path(text).suffix in LEXERS else None
    return tests().get(text.partition("[")[0])


def link_sources(app: Sphinx, doctree: nodes.document) -> None:
    """Turn links to files outside docs/, and code that names a file or a test, into links to their pages."""
    docname = app.env.docname
    for link in [*doctree.findall(addnodes.download_reference), *doctree.findall(addnodes.pending_xref)]:
        path = (DOCS / docname).parent.joinpath(link["reftarget"]).resolve()
        path = path if path.is_file() else path.with_suffix(".md")  # MyST takes README.md for a page of its own
        if path.is_file() and path.is_relative_to(ROOT) and not path.is_relative_to(DOCS):
            link.replace_self(_reference(app, path.relative_to(ROOT).as_posix(), 0, link.children))
    for code in list(doctree.findall(nodes.literal)):
        found = source_of(code.astext())
        if found and not isinstance(code.parent, (nodes.reference, addnodes.pending_xref, nodes.title)):
            code.replace_self(_reference(app, *found, [code.deepcopy()]))


def _reference(app: Sphinx, path: str, line: int, children: list[nodes.Node]) -> nodes.reference:
    named(app).add(path)
    up = "../" * app.env.docname.count("/")
    uri = f"{up}source/{path}.html" + (f"#L-{line}" if line else "")
    return nodes.reference("", "", *children, refuri=uri, internal=True)


def named(app: Sphinx) -> set[str]:
    """Files that get a page."""
    if not hasattr(app.env, "named_sources"):
        app.env.named_sources = set()
    return app.env.named_sources


def make_pages(app: Sphinx) -> Any:
    """(name, context, template) of each page that shows a file."""
    highlighter = getattr(app.builder, "highlighter", None)
    for path in sorted(named(app)) if highlighter else ():
        text = (ROOT / path).read_text()
        shown = highlighter.highlight_block(text, LEXERS.get(Path(path).suffix, "text"), lineanchors="L", force=True)
        yield f"source/{path}", {"title": path, "body": f"<h1>{path}</h1>{shown}"}, "page.html"


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("doctree-read", link_sources, priority=100)  # before Sphinx collects downloads
    app.connect("html-collect-pages", make_pages)
    return {"parallel_read_safe": False}
