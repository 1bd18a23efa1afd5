"""What the site needs beyond Markdown: pages from elsewhere, commands' help, docstrings, equations, the demo."""

import os
import re
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

from docutils import nodes
from latex2mathml.converter import convert
from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
PAGES = {  # pages of the site that are files of the repository; docs/ has a line with a link in the place of each
    "overview": "README.md",
    "contributing": "CONTRIBUTING.md",
    "changelog": "CHANGELOG.md",
    "pretrained": "pretrained_models/README.md",
    "pretrained_resnet20": "pretrained_models/resnet20_1w1a/README.md",
    "imagenet_data": "imagenet/dataset/README.md",
}
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")
HELP_COLUMNS = "92"  # what fits into the site's column


def read_page(app: Sphinx, docname: str, source: list[str]) -> None:
    """Give a page its text: source[0], Markdown, of which Sphinx makes the page."""
    file = DOCS / f"{docname}.md"
    if docname in PAGES:
        file = ROOT / PAGES[docname]
        source[0] = file.read_text()
        app.env.note_dependency(str(file))
    elif docname == "commands":
        source[0] += command_help()
        app.env.note_reread()
    elif docname.startswith("results/") and docname != "results/README":
        app.env.metadata[docname]["orphan"] = True  # it is found by links, not in the table of contents
    source[0] = LINK.sub(lambda link: _relinked(link, file.parent, (DOCS / docname).parent), source[0])


def _relinked(link: re.Match[str], base: Path, place: Path) -> str:
    """A link to a file of the repository, written beside the folder `base`, as a page in the folder `place` has it.

    What is a page of the site stays one; Sphinx copies other files into the site.
    """
    text, target, anchor = link[1], link[2], link[3] or ""
    path = (base / target).resolve()
    if not path.is_file():
        return link[0]  # code that looks like a link, or a mistake, of which Sphinx warns
    page = next((name for name, file in PAGES.items() if ROOT / file == path), None)
    relative = os.path.relpath(DOCS / f"{page}.md" if page else path, place)
    if path.is_relative_to(DOCS / "demo"):
        return f'<a href="{relative}">{text}</a>'  # a page that is none of Sphinx's
    as_file = path.suffix == ".md" and not page and not path.is_relative_to(DOCS)
    return f"[{text}]({'path:' if as_file else ''}{relative}{anchor})"


def command_help() -> str:
    """Every command's --help, as Markdown: a heading and a block each, from the parsers themselves."""
    from biper.commands.main import COMMANDS

    parts = []
    with patch.dict(os.environ, COLUMNS=HELP_COLUMNS):
        for name, (file, text) in COMMANDS.items():
            shown = import_module(f"biper.commands.{file}").build_parser(prog=f"biper {name}").format_help()
            parts.append(f"\n## biper {name}\n{text[0].upper()}{text[1:]}.\n```text\n{shown.rstrip()}\n```\n")
    return "".join(parts)


def docstring_as_rst(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Our docstrings are plain text with code between backticks: say so to reStructuredText.

    What else it takes for markup is escaped. A name between backticks becomes a link where it is known.
    """
    parts = "\n".join(lines).split("`")  # prose and code in turn
    parts[::2] = [re.sub(r"([*|_\\])", r"\\\1", prose) for prose in parts[::2]]
    parts[1::2] = [f"`{code}`" if re.fullmatch(r"[\w.]+", code) else f"``{code}``" for code in parts[1::2]]
    lines[:] = "".join(parts).split("\n")


def as_mathml(display: str) -> Callable[[Any, nodes.Element], None]:
    """How an equation is written, `inline` or as a `block`: in MathML, which browsers draw without help."""

    def write(translator: Any, node: nodes.Element) -> None:  # noqa: ANN401
        translator.body.append(convert(node.astext(), display=display))
        raise nodes.SkipNode

    return write


def copy_demo(app: Sphinx, error: Exception | None) -> None:
    """Put the page with a network in it into the site as it is."""
    if error is None and app.builder.format == "html":
        shutil.copytree(DOCS / "demo", Path(app.outdir) / "demo", dirs_exist_ok=True)


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_lexer("mermaid", TextLexer)  # such a diagram is legible as it is written
    app.add_html_math_renderer("mathml", (as_mathml("inline"), None), (as_mathml("block"), None))
    app.connect("source-read", read_page)
    app.connect("autodoc-process-docstring", docstring_as_rst)
    app.connect("build-finished", copy_demo)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
