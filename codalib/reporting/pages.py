"""HTML pages that stand alone: one file each, no request to anywhere, readable on a phone, light and dark."""

import re
from pathlib import Path
from typing import Any

import jinja2
import nbformat
from bs4 import BeautifulSoup
from latex2mathml.converter import convert as latex_to_mathml
from markupsafe import Markup
from nbconvert.exporters import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments.formatters import HtmlFormatter
from traitlets.config import Config

TEMPLATES = Path(__file__).with_name("templates")
PROGRESS_BAR = re.compile(r"\d+%\||\d+it( \[|$)")
CURSOR = re.compile(r"\x1b\[\d*[A-K]")  # what nested progress bars say to a terminal
CODE_STYLES = {"light": "default", "dark": "github-dark"}


# What a page can show without a running kernel; widgets and scripts are left out.
SHOWN = ["text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/plain"]


# --- text -------------------------------------------------------------------------------------------------------------
class _MathRenderer(IPythonRenderer):
    """Markdown with formulas as MathML, which browsers draw themselves."""

    def inline_math(self, body: str) -> str:
        return mathml(body, "inline")

    def block_math(self, body: str) -> str:
        return mathml(body, "block")

    def latex_environment(self, name: str, body: str) -> str:
        return mathml(rf"\begin{{{name}}}{body}\end{{{name}}}", "block")


def mathml(formula: str, display: str) -> str:
    """A LaTeX formula as MathML, DISPLAY "inline" or "block"; one that cannot be read raises ValueError with it."""
    try:
        drawn = latex_to_mathml(formula.strip(), display=display).replace(r"\_", "_")
    except Exception as error:  # the converter raises a class of its own for each kind of fault
        raise ValueError(
            f"expected a LaTeX formula, got {formula.strip()!r}, which cannot be turned into MathML: {error!r}"
        ) from error
    # Browsers do not scroll MathML itself: what holds it scrolls, so that a long formula does not widen a phone's page.
    return f'<span class="formula">{drawn}</span>' if display == "block" else drawn


def markdown(text: str) -> Markup:
    """Markdown with $formulas$ as HTML."""
    renderer = _MathRenderer(escape=False, exclude_anchor_links=True)
    return Markup(MarkdownWithMath(renderer=renderer).render(text))


# --- pages ------------------------------------------------------------------------------------------------------------
def fill(template: str, **values: Any) -> str:
    """A template with VALUES, texts escaped unless they are `Markup`."""
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(template).render(**values)


def page(title: str, body: str, home: str = "", footer: str = "", home_text: str = "All results") -> str:
    """BODY as a whole page with a table of contents made of its second- and third-level headings."""
    soup = BeautifulSoup(body, "html.parser")
    contents, taken = [], set()
    for heading in soup.find_all(["h2", "h3"]):
        name = re.sub(r"\W+", "-", heading.get_text().lower()).strip("-") or "section"
        while name in taken:
            name += "-"
        taken.add(name)
        heading["id"] = name
        contents.append({"id": name, "level": heading.name[1], "text": heading.get_text()})
    for frame in soup.find_all("table"):
        if not frame.find_parent(class_="scroll"):
            frame.wrap(soup.new_tag("div", attrs={"class": "scroll", "tabindex": "0"}))
    for scoped in soup.select("main style, div > style[scoped]"):  # pandas' own borders
        scoped.decompose()
    return fill(
        "page.html.j2",
        title=title,
        body=Markup(soup),
        contents=contents if len(contents) > 1 else [],
        home=home,
        home_text=home_text,
        footer=footer,
        style=Markup(_style()),
        script=Markup((TEMPLATES / "page.js").read_text(encoding="utf-8")),
    )


def _style() -> str:
    light, dark = (HtmlFormatter(style=name).get_style_defs(".highlight") for name in CODE_STYLES.values())
    style = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    plain = ".highlight, .highlight pre { background: var(--panel); }"
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n{style}\n{plain}"


def notebook_page(notebook: nbformat.NotebookNode, name: str, home: str = "", footer: str = "") -> str:
    """An executed notebook as a page: its text, its code folded, its outputs without progress bars.

    Links to other notebooks become links to their pages.

    Args:
        notebook: as read by nbformat, version 4.
        name: the page's title where the notebook has no first-level heading.
        home: a link back, relative to the page.
    """
    exporter = HTMLExporter(
        config=Config({"NbConvertBase": {"display_data_priority": SHOWN}}),
        extra_template_basedirs=[str(TEMPLATES)],
        template_name="notebook",
        filters={"markdown2html": markdown},
    )
    body, _ = exporter.from_notebook_node(_without_progress(notebook))
    body = re.sub(r'href="([\w-]+)\.ipynb"', r'href="\1.html"', body)
    heading = BeautifulSoup(body, "html.parser").find("h1")
    return page(heading.get_text() if heading else name, body, home, footer)


def _without_progress(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A copy whose text streams hold what a terminal would show at the end, without progress bars."""
    notebook = nbformat.from_dict(notebook)
    for cell in notebook.cells:
        outputs = []
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                text = CURSOR.sub("", output.text)
                lines = [line.rsplit("\r", 1)[-1] for line in text.rstrip("\r").split("\n")]
                output.text = "\n".join(line for line in lines if not PROGRESS_BAR.search(line))
                if not output.text.strip():
                    continue
            outputs.append(output)
        if "outputs" in cell:
            cell.outputs = outputs
    return notebook
