import base64
import re

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbformat import v4

from codalib.reporting import pages

PIXEL = base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()


def requests_of(page):
    """Addresses that a browser would load by itself; what a script puts together at run time is the browser tests'."""
    soup = BeautifulSoup(page, "html.parser")
    loaded = [
        tag.get("src") or tag.get("href") for tag in soup.select("script[src], link[href], img[src], iframe[src]")
    ]
    return [address for address in loaded if not address.startswith("data:")] + re.findall(
        r"url\((?!data:|\$\{)[^)]*\)", page
    )


@pytest.fixture
def notebook():
    stream = "\r  0%|     | 0/3\r100%|#####| 3/3 [00:01]\nstep 3 done\n\rtokens: 0it [00:00, ?it/s]\rtokens: 0it\n"
    html = "<div><style scoped>td {color: red}</style><table><tr><td>7</td></tr></table></div>"
    return v4.new_notebook(
        cells=[
            v4.new_markdown_cell("# A title\n\nThe equation $x^2$."),
            v4.new_code_cell("steps: int = 3", metadata={"tags": ["parameters"]}),
            v4.new_markdown_cell("## Train\n\n## Train"),
            v4.new_code_cell("run()", outputs=[v4.new_output("stream", name="stderr", text=stream)]),
            v4.new_code_cell(
                "show()",
                outputs=[
                    v4.new_output("display_data", {"image/png": PIXEL}, metadata={"image/png": {"alt": "a <curve>"}}),
                    v4.new_output("display_data", {"text/html": html, "text/plain": "frame"}),
                    v4.new_output("display_data", {"application/javascript": "alert(1)", "text/plain": "kept"}),
                ],
            ),
        ]
    )


def test_a_notebook_page_loads_nothing(notebook):
    page = pages.notebook_page(notebook, "name", home="index.html")
    assert requests_of(page) == []
    assert "alert(1)" not in page
    assert "kept" in page


def test_the_settings_of_a_run_are_folded():
    table = v4.new_output("execute_result", {"text/html": "<table><tr><td>0.05</td></tr></table>"}, execution_count=1)
    cells = [v4.new_code_cell("settings_table(fit)  # all", outputs=[table]), v4.new_code_cell("x", outputs=[table])]
    soup = BeautifulSoup(pages.notebook_page(v4.new_notebook(cells=cells), "name"), "html.parser")
    settings, code = soup.select("details.code:not([open])")
    assert settings.summary.text == "Settings of this run"
    assert settings.td.text == "0.05"
    assert "settings_table" in settings.text
    assert code.td is None
    assert len(soup.select("td")) == 2


def test_a_link_to_a_notebook_leads_to_its_page():
    text = "[Table 1](table1_ablation.ipynb) and [elsewhere](https://example.org/a.ipynb)"
    page = pages.notebook_page(v4.new_notebook(cells=[v4.new_markdown_cell(text)]), "name")
    assert 'href="table1_ablation.html"' in page
    assert 'href="https://example.org/a.ipynb"' in page


def test_a_notebook_page_keeps_results_and_drops_progress_bars(notebook):
    before = nbformat.writes(notebook)
    soup = BeautifulSoup(pages.notebook_page(notebook, "name"), "html.parser")
    assert soup.title.text == "A title"
    assert "step 3 done" in soup.text
    assert "0it" not in soup.text
    assert "%|" not in soup.text
    assert soup.select_one("details.code summary").text == "Parameters and their defaults"
    assert len(soup.select("details.code:not([open])")) == 3  # a page leads with its results
    assert soup.img["alt"] == "a <curve>"
    assert soup.select_one(".scroll > table td").text == "7"
    assert not soup.select("main style")
    assert nbformat.writes(notebook) == before


def test_the_contents_lead_to_every_heading(notebook):
    soup = BeautifulSoup(pages.notebook_page(notebook, "name"), "html.parser")
    targets = [link["href"].removeprefix("#") for link in soup.select("nav a")]
    assert len(targets) == 2 == len(set(targets))
    assert all(soup.find(id=target).name == "h2" for target in targets)


def test_a_page_is_readable_on_a_phone_and_in_the_dark():
    page = pages.page("A & B", "<p>x</p>", footer="end")
    assert "<title>A &amp; B</title>" in page
    assert 'name="viewport" content="width=device-width' in page
    assert "prefers-color-scheme: dark" in page


def test_formulas_become_mathml():
    html = pages.markdown("a $\\frac{Q}{\\sqrt{d}}$ b\n\n$$\\text{one\\_hot}(A)$$\n\n\\begin{align}x &= 1\\end{align}")
    assert html.count("<math") == 3
    assert html.count('<span class="formula"><math') == html.count('display="block"') == 2
    assert "one_hot" in html
    assert "$" not in html


def test_a_formula_that_cannot_be_read_is_named():
    with pytest.raises(ValueError, match="x_"):
        pages.markdown("$x_$")


def test_nested_progress_bars_leave_no_empty_box(notebook):
    cell = nbformat.v4.new_code_cell("train()")
    pieces = ["\router:   0%|  | 0/3", "\n", "\rinner:   0%|  | 0/1", "\x1b[A", "\n\router: 100%|##| 3/3", "\n"]
    cell.outputs = [nbformat.v4.new_output("stream", name="stderr", text=piece) for piece in pieces]
    notebook.cells = [*notebook.cells[:2], cell]
    soup = BeautifulSoup(pages.notebook_page(notebook, "name"), "html.parser")
    assert not [box for box in soup.find_all("pre") if not box.get_text(strip=True)]
