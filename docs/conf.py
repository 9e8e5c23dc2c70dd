"""Sphinx: the pages are MyST Markdown, the reference comes from the docstrings. ``nox -s docs`` builds it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sphinx.ext.napoleon.docstring import GoogleDocstring
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.nodes import make_refnode

import aiokeyless

if TYPE_CHECKING:
    from docutils.nodes import Element, reference
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

project = "aiokeyless"
copyright = "the authors of aiokeyless"  # noqa: A001  # the name that Sphinx reads
release = version = aiokeyless.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "templates"]
html_theme = "furo"
html_title = "aiokeyless"
html_static_path = ["style"]
html_css_files = ["site.css"]
html_js_files = [("site.js", {"defer": "defer"})]
html_favicon = "style/favicon.svg"
templates_path = ["templates"]
maximum_signature_line_length = 100  # longer ones have a line for each argument

myst_enable_extensions = ["alert"]
myst_heading_anchors = 3
myst_heading_slug_func = "github"  # the pages are read there too
default_role = "py:obj"  # `Name` in a docstring links to the name

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "undoc-members": True}
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # the attributes of a struct are described in one place

nitpicky = True
nitpick_ignore_regex = [
    # Names of the standard library and of other packages, whose inventories would have to be fetched.
    ("py:.*", r"(aiohttp|anyio|asyncio|collections|datetime|enum|logging|msgspec)(\..*)?"),
    ("py:.*", r"(asyncpg|nats|opentelemetry|pathlib|ssl|tenacity|types|typing)(\..*)?"),
    ("py:.*", r"wait_base|Client|Connection|Broker|Path|web\.BaseRunner"),
    ("py:.*", r"TracerProvider|MeterProvider"),
    # Sphinx cannot parse the signature of a struct with the default <factory>, and splits it at the commas.
    ("py:class", r"(dict|tuple)\[str"),
    # A type variable and names that users need in no other place.
    ("py:class", r"aiokeyless\.worker\.messages\.T|Broker|HealthServer|aiokeyless\.sandbox\.server\.ClientOptions"),
]


# Napoleon would take the first words of an attribute's docstring, up to a colon, for its type.
GoogleDocstring._consume_inline_attribute = lambda self: ("", self._dedent(self._consume_to_end()))  # type: ignore[method-assign]  # noqa: SLF001  # there is no option


def resolve_short_name(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: Element
) -> reference | Element | None:
    """Find a public name that is written without its module, or with the private one that defines it."""
    for name in (node["reftarget"], node["reftarget"].rpartition(".")[2]):
        for module in ("", ".errors", ".events", ".worker", ".sandbox", ".shutdown", ".otel"):
            found = env.domains.python_domain.objects.get(f"aiokeyless{module}.{name}")
            if found is not None:
                return make_refnode(app.builder, node["refdoc"], found.docname, found.node_id, contnode, name)
    # A single backtick is also how a docstring shows an argument, which has no page of its own.
    return contnode if node["reftype"] == "obj" and node["reftarget"].isidentifier() else None


def describe_alias(_app: Sphinx, what: str, name: str, _value: object, _options: object, lines: list[str]) -> None:
    """Describe the type of an argument as the module does that defines it, and not as Python's class of such types."""
    if what == "data":
        for module in ("aiokeyless.client", "aiokeyless.events", "aiokeyless.reports"):
            documented = ModuleAnalyzer.for_module(module).find_attr_docs()
            lines[:] = documented.get(("", name.rpartition(".")[2]), lines)


#: What the rules of axe-core find wrong in the HTML of Sphinx and Furo, and what is right.
CORRECTIONS = {
    r'<p class="caption" role="heading">': r'<p class="caption" role="heading" aria-level="2">',
    r'<aside class="sidebar-drawer">': r'<aside class="sidebar-drawer" aria-label="All pages">',
    r'<aside class="toc-drawer': r'<aside aria-label="This page" class="toc-drawer',
    r'<div class="content-icon-container">': r'<div class="content-icon-container" role="region" aria-label="Tools">',
    r'<th class="head"><p></p></th>': r"<td></td>",
    # The lines of a long signature: a list of definitions without a term.
    r"<dl>\n(?=<dd><em)": r'<span class="signature">',
    r'<dd>(<em class="sig-param">.*)</dd>\n': r"<span>\1</span>",
    r'</dl>\n\n(?=<span class="sig-paren">)': r"</span>",
}


def accessible(html: str) -> str:
    """Return a page as axe-core wants it."""
    for pattern, right in CORRECTIONS.items():
        html = re.sub(pattern, right, html)
    return html


def add_to_context(_app: Sphinx, _page: str, _template: str, context: dict[str, object], _document: object) -> None:
    """Let docs/templates/page.html use what is above."""
    context["accessible"] = accessible


#: Directives, which GitHub would show as they are written, and which stand in comments for that reason.
FOR_THE_SITE = re.compile(r"^<!-- site\n(.*?)^-->", re.DOTALL | re.MULTILINE)
#: A list of pages in the first page: its heading, and the links.
PAGES = re.compile(r"^## (.*)\n\n((?:- \[.*\]\(.*\.md\)\n)+)", re.MULTILINE)


def show_directives(_app: Sphinx, page: str, source: list[str]) -> None:
    """Read the directives in comments, and the lists of pages in the first page as the table of contents."""
    text = FOR_THE_SITE.sub(r"\1", source[0])
    if page == "index":
        text, heading, lists = text.partition("\n## ")
        contents = PAGES.sub(r"```{toctree}\n:caption: \1\n:maxdepth: 1\n\n\2```\n", heading + lists)
        contents = re.sub(r"^- \[.*\]\((.*)\.md\)$", r"\1", contents, flags=re.MULTILINE)
        text += f"\n````{{container}} contents-columns\n{contents}````\n"
    source[0] = text


def write_llms_txt(app: Sphinx, failure: Exception | None) -> None:
    """Write llms.txt, with links to the pages of the site."""
    if failure is None and app.builder.format == "html":
        text = (app.srcdir / "llms.txt").read_text()
        (app.outdir / "llms.txt").write_text(re.sub(r"(?<=]\()(.*)\.md\)$", r"\1.html)", text, flags=re.MULTILINE))


def setup(app: Sphinx) -> None:
    """Connect what is above."""
    app.connect("source-read", show_directives)
    app.connect("build-finished", write_llms_txt)
    app.connect("missing-reference", resolve_short_name)
    app.connect("autodoc-process-docstring", describe_alias)
    app.connect("html-page-context", add_to_context)
