"""The built report, where there is one: nothing missing, nothing unrendered, nothing from another site."""

import html
import importlib.util
import os
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from bs4 import BeautifulSoup
from docutils import nodes
from docutils.utils import new_document
from jinja2 import Template
from sphinx import addnodes

ROOT = Path(__file__).parents[1]
SITE = ROOT / "_build" / "html"
PAGES = sorted(SITE.rglob("*.html")) if (SITE / "index.html").exists() else []

HEAVIEST = 1_500_000  # bytes of a page
UNSAID = {"fig-cost-growth", "fig-cost-roofline"}  # drawn by benchmarks, from what the tables beside them say
# What a section says that has nothing to say, and a row of a reference held against itself.
EMPTY = re.compile(r"\(0\): none|no such records|\b[Oo]f 0 \w+|\[0\.00,\s0\.00\]")
UNRENDERED = re.compile(r"\{glue|glue:|\{(?:numref|ref|eq|term|cite)[:\w]*\}|\$\$|\bnan\b|@[A-Z]+@")
FOLDERS = "home|Users|root|tmp|var|mnt|opt|work|workspaces?"
MACHINE_PATH = re.compile(rf"(?<![\w:./-])(?:/(?:{FOLDERS})/[\w.-]+|[A-Z]:\\\w+)")


def read(page: Path) -> BeautifulSoup:
    return BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")


def article(page: BeautifulSoup):
    """Return what the project wrote; the theme's own parts are not ours to check."""
    return page.find("article") or page


def images(page: BeautifulSoup, file: Path) -> list[str]:
    """Each image exists, has alternative text, and stands in a figure with a caption."""
    found = []
    for image in article(page).find_all("img"):
        source = image.get("src", "")
        if not source.startswith("data:") and not (file.parent / unquote(source)).is_file():
            found.append(f"image {source} does not exist")
        if not image.get("alt", "").strip() or image["alt"].endswith(".png"):
            found.append(f"image {source} has no alternative text")
        figure = image.find_parent("figure")
        caption = figure.find("figcaption") if figure else None
        if caption is None or not caption.get_text(strip=True):
            found.append(f"image {source} has no caption")
    for drawn in article(page).select(".drawing > svg"):
        if drawn.get("role") != "img" or not drawn.get("aria-label", "").strip():
            found.append("a drawing has no alternative text")
        figure = drawn.find_parent("figure")
        if figure and figure.get("id") not in UNSAID and not figure.select_one("figcaption .source"):
            found.append(f"{figure.get('id')} does not say who made it")
    return found


def links(page: BeautifulSoup, file: Path) -> list[str]:
    """Each link inside the report leads to a page, and to a place on it."""
    found = []
    for link in page.find_all("a", href=True):
        parts = urlsplit(link["href"])
        if parts.scheme or parts.netloc or not (parts.path or parts.fragment):
            continue
        target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
        if not target.is_file():
            found.append(f"link to {link['href']}: no such file")
        elif parts.fragment and target.suffix == ".html" and unquote(parts.fragment) not in places(target):
            found.append(f"link to {link['href']}: no such place")
    return found


@cache
def places(target: Path) -> set[str]:
    """Return what a link can point to in a page."""
    return {tag.get("id") or tag["name"] for tag in read(target).select("[id], a[name]")}


def requests_elsewhere(page: BeautifulSoup, file: Path) -> list[str]:
    """Nothing is loaded from another site."""
    loaded = [(tag, "src") for tag in page.find_all(["script", "img", "iframe", "source"])]
    loaded += [(tag, "href") for tag in page.find_all("link") if "canonical" not in tag.get("rel", [])]
    sources = [tag.get(attribute, "") for tag, attribute in loaded]
    return [f"loads {source}" for source in sources if re.match(r"(https?:)?//", source)]


def text(page: BeautifulSoup, file: Path) -> list[str]:
    """Prose is rendered, and no output tells of an error, of warnings or of the machine it was made on."""
    body = article(page)
    found = [f"shows standard error: {cell.get_text()[:80]!r}" for cell in body.select(".stderr, .traceback")]
    everything = body.get_text()
    if "Traceback (most recent call last)" in everything:
        found.append("shows a traceback")
    found += [f"names a path of a machine: {match}" for match in MACHINE_PATH.findall(everything)]
    for code in body.select("pre, code"):
        code.extract()
    found += [f"not rendered: {match}" for match in UNRENDERED.findall(body.get_text())]
    found += [f"says nothing: {match}" for match in EMPTY.findall(body.get_text())]
    return found


def provenance(page: BeautifulSoup, file: Path) -> list[str]:
    """A chapter says, before its first section, that its data is simulated; the report has no other."""
    if file.parent.name != "chapters":
        return []
    banner, section = (article(page).select_one(name) for name in (".admonition.simulated", "h2"))
    in_time = banner is not None and (section is None or section in banner.find_all_next("h2"))
    return [] if in_time else ["does not say at its top that its data is simulated"]


def answer(page: BeautifulSoup, file: Path) -> list[str]:
    """A chapter shows the figure that carries its answer before its first section, and no code before that."""
    if file.parent.name != "chapters":
        return []
    section = article(page).find("h2")
    before = section.find_all_previous(["figure", "pre"]) if section else []
    found = [] if any(tag.name == "figure" for tag in before) else ["has no figure before its first section"]
    seen = [tag for tag in before if tag.name == "pre" and not tag.find_parent("details")]
    return found + [f"shows code before its first section: {tag.get_text()[:40]!r}" for tag in seen]


def weight(page: BeautifulSoup, file: Path) -> list[str]:
    """A page and its images, without what the theme brings, take no more bytes than a phone has patience for."""
    sources = [image["src"] for image in article(page).find_all("img", src=True)]
    shown = {file.parent / unquote(source) for source in sources if not source.startswith("data:")}
    size = sum(path.stat().st_size for path in {file, *shown} if path.is_file())
    return [] if size <= HEAVIEST else [f"takes {size / 1e6:.1f} MB"]


CHECKS = [images, links, requests_elsewhere, text, provenance, answer, weight]


@pytest.mark.skipif(not PAGES, reason="no report is built: python3 tasks.py book")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_page_of_the_report(check):
    found = {page.relative_to(SITE).as_posix(): check(read(page), page) for page in PAGES}
    assert {page: faults for page, faults in found.items() if faults} == {}


GOOD = """<html><head><script src="_static/a.js"></script></head><body><article>
<div class="simulated admonition">Simulated.</div>
<figure id="fig"><img src="a.png" alt="A line."><figcaption>A line goes up.</figcaption></figure>
<h2>A section</h2><figure id="fig-b"><div class="drawing"><svg role="img" aria-label="Dots."></svg></div>
<figcaption>Some dots.<div class="legend"><p class="source">data</p></div></figcaption></figure>
<p>See <a href="page.html#fig">Fig. 1</a>, <a href="https://example.org/">elsewhere</a>: 0.871.</p>
<pre>price = "$$" + "{glue:text}"</pre></article></body></html>"""


def complaints(folder: Path, html: str) -> list[str]:
    file = folder / "chapters" / "page.html"
    file.parent.mkdir()
    file.write_text(html)
    (file.parent / "a.png").touch()
    return [found for check in CHECKS for found in check(read(file), file)]


def test_a_sound_page_is_accepted(tmp_path):
    assert complaints(tmp_path, GOOD) == []


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('src="a.png"', 'src="b.png"', "does not exist"),
        (' alt="A line."', "", "no alternative text"),
        ('aria-label="Dots."', "", "a drawing has no alternative text"),
        (' class="source"', "", "fig-b does not say who made it"),
        ("0.871", "Not in these records (0): none.", "says nothing"),
        ("0.871", "Of 0 differences, 0 have the same sign.", "says nothing"),
        ("0.871", "0.00 [0.00, 0.00]", "says nothing"),
        ("A line goes up.", "", "no caption"),
        ("page.html#fig", "page.html#table", "no such place"),
        ("page.html#fig", "other.html", "no such file"),
        ("_static/a.js", "https://cdn.example.org/a.js", "loads https"),
        ("0.871", "{glue:text}`toy-map`", "not rendered"),
        ("0.871", "nan", "not rendered"),
        ("0.871", "/Users/somebody/store", "path of a machine"),
        ('"simulated admonition"', '"admonition"', "simulated"),
        ('<div class="sim', '<h2>First</h2><div class="sim', "simulated"),
        ('<figure id="fig">', '<h2>First</h2><figure id="fig">', "no figure before"),
        ('<figure id="fig">', '<pre>import mmlib</pre><figure id="fig">', "shows code before"),
        ("<pre>", '<pre class="stderr">', "standard error"),
        ("0.871", "word " * 300_000, "takes 1.5 MB"),
        ("<pre>", "<pre>Traceback (most recent call last)", "traceback"),
    ],
)
def test_a_fault_of_a_page_is_named(tmp_path, old, new, complaint):
    assert old in GOOD
    assert any(complaint in found for found in complaints(tmp_path, GOOD.replace(old, new)))


# The Sphinx hooks.


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("study", ROOT / "book" / "_ext" / "study.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def repository(tmp_path):
    for name in ("mmlib/a.py", "benchmarks/c.py", "book/results/b.json", "constraints.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1\n")
    return tmp_path


DEPENDS_ON = ["mmlib/a.py", "mmlib/new.csv", "benchmarks/c.py", "book/results/b.json", "constraints.txt"]


@pytest.mark.parametrize("name", DEPENDS_ON)
def test_what_a_page_depends_on_starts_a_new_notebook_cache(study, repository, name):
    packages = [repository / package for package in study.PACKAGES]
    before = study.cache_key(repository, *packages)
    (repository / name).write_text("2\n")
    assert study.cache_key(repository, *packages) != before


@pytest.mark.parametrize("name", ["mmlib/__pycache__/a.pyc", "README.md"])
def test_what_no_page_depends_on_keeps_the_notebook_cache(study, repository, name):
    packages = [repository / package for package in study.PACKAGES]
    before = study.cache_key(repository, *packages)
    (repository / name).parent.mkdir(exist_ok=True)
    (repository / name).write_text("2\n")
    assert study.cache_key(repository, *packages) == before


def test_the_packages_of_the_cache_are_all_that_chapters_import_of_the_repository(study):
    chapters = "".join(file.read_text() for file in (ROOT / "book" / "chapters").glob("*.md"))
    imported = set(re.findall(r"^(?:from|import) (\w+)", chapters, re.MULTILINE))
    assert {name for name in imported if (ROOT / name / "__init__.py").is_file()} == set(study.PACKAGES)


@pytest.mark.parametrize("address", ["", "https://example.org/somebody/study"])
def test_pages_have_buttons_of_a_repository_where_an_address_is_set(study, monkeypatch, tmp_path, address):
    monkeypatch.setenv("MMLIB_REPOSITORY", address)
    config = SimpleNamespace(html_theme_options={}, html_context={}, myst_substitutions={})
    study.configure(SimpleNamespace(outdir=tmp_path / "html"), config)
    assert config.html_theme_options.get("repository_url", "") == address
    assert bool(config.html_theme_options) == bool(config.html_context) == bool(address)
    assert (config.myst_substitutions["repository"] == f"`git clone {address}`") == bool(address)
    if address:  # and an edit is of the text of a chapter, not of its notebook
        edit = Template(config.html_context["edit_page_url_template"]).render(file_name="chapters/01_data.ipynb")
        assert edit == f"{address}/edit/main/book/chapters/01_data.md"


def test_a_docstring_is_prose_in_which_names_are_code(study):
    lines = ["Add `x`, ``y`` to *all of", "`a", "b`; trailing_ is c|d.", "", ">>> a_ * b", "1"]
    study.quote_docstring(None, "function", "f", None, None, lines)
    expected = ["Add ``x``, ``y`` to \\*all of", "``a", "b``; trailing\\_ is c\\|d.", "", ">>> a_ * b", "1"]
    assert lines == expected
    nothing, field = [], ["Alias for field number 0", ""]
    for none in (nothing, field):
        study.quote_docstring(None, "attribute", "f", None, None, none)
        assert "".join(none) == ""


def test_unknown_formula_is_warned_of_and_shown_as_typed(study, monkeypatch):
    warnings = []
    monkeypatch.setattr(study.LOGGER, "warning", lambda message, *rest, **_: warnings.append(message % rest))
    assert study.mathml(None, r"a < \nonsense", block=False) == r"<code>a &lt; \nonsense</code>"
    assert len(warnings) == 1 and "nonsense" in warnings[0]


def a_page(study, *cells, heading="section"):
    """A page with a section for every cell: (what it put out, its tags)."""
    page = new_document("page")
    for number, (outputs, tags) in enumerate(cells):
        section = nodes.section("", nodes.title("", f"{heading} {number}"), ids=[f"{heading}-{number}"])
        section += nodes.container("", *outputs, nb_element="cell_code", cell_metadata={"tags": tags})
        section += nodes.paragraph("", "The same comparison, row for row.")
        page += section
    return page


def test_a_section_whose_table_is_empty_is_not_on_the_page(study):
    tags, table = ["remove-input", "section-if-output"], nodes.container()
    page = a_page(study, ([], tags), ([table], tags), ([], ["remove-input"]))
    study.drop_empty_sections(None, page)
    assert [section["ids"] for section in page.findall(nodes.section)] == [["section-1"], ["section-2"]]


def test_how_a_page_was_made_is_folded_and_begins_with_the_parameters(study):
    page = a_page(study, ([], ["parameters", "hide-input"]), ([], ["remove-input"]))
    page[1]["ids"] = [study.MADE]
    study.fold_making(SimpleNamespace(env=SimpleNamespace(docname="chapters/01_data")), page)
    first, made = page.findall(nodes.section)
    assert not list(first.findall(nodes.container))
    assert [type(node) for node in made][:3] == [nodes.title, nodes.raw, nodes.container]
    assert made[2]["cell_metadata"]["tags"] == ["parameters", "hide-input"]
    assert "papermill book/chapters/01_data.ipynb" in made[3].astext()
    assert "<details" in made[1].astext() and made[-1].astext() == "</details>"


DRAWN = (
    '<svg width="1"><metadata class="data">arm,gain\na &amp; b,1\n</metadata><metadata class="made">Two records.'
    '</metadata><metadata class="narrow">&lt;svg width="2"&gt;&lt;path id="m1"/&gt;&lt;/svg&gt;</metadata>'
    '<path id="m1"/><use xlink:href="#m1" clip-path="url(#p2)"/></svg>'
)


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_drawing_stands_in_its_page_and_its_numbers_beside_it(study, tmp_path, by_hand):
    narrow = re.search(r'<metadata class="narrow">(.*?)</metadata>', DRAWN)
    (tmp_path / "a.svg").write_text(DRAWN.replace(narrow[0], "") if by_hand else DRAWN)
    if by_hand:
        (tmp_path / "a-narrow.svg").write_text(html.unescape(narrow[1]))
    places = SimpleNamespace(docname="page", relfn2path=lambda uri, page: (uri, str(tmp_path / uri)))
    figure = nodes.figure("", nodes.image(uri="a.svg", alt='Dots "a"'), nodes.caption("", "Dots."), ids=["fig-dots"])
    page = new_document("page")
    page += figure
    study.place_drawings(SimpleNamespace(env=places, srcdir=str(tmp_path)), page)
    body = figure[0].astext()
    assert 'role="img" aria-label="Dots &quot;a&quot;"' in body and "metadata" not in body
    assert 'id="fig-dots-m1"' in body and 'href="#fig-dots-m1"' in body and "url(#fig-dots-p2)" in body
    assert body.count('<svg role="img"') == 2 and 'id="fig-dots-narrow-m1"' in body
    (data,) = page.findall(addnodes.download_reference)
    assert (tmp_path / data["reftarget"].lstrip("/")).read_text() == "arm,gain\na & b,1\n"
    assert figure[-1].astext() == "data · Two records."


def test_the_drawing_of_the_system_says_the_same_in_both_its_forms():
    forms = [read(ROOT / "book" / "drawings" / f"{name}.svg") for name in ("system", "system-narrow")]
    assert [form.svg["class"] for form in forms] == [["wide"], ["narrow"]]
    first, second = (sorted(" ".join(text.text for text in form.find_all("text")).split()) for form in forms)
    assert first == second and "dead" in first
    assert forms[1].find(string="dead branch") and forms[1].find(attrs={"stroke-dasharray": True})
    assert min(float(text.get("font-size", 14)) for form in forms for text in form.find_all("text")) >= 12


def test_a_negative_number_has_a_minus_but_not_code_and_no_range(study):
    page = new_document("page")
    prose = "from -0.51 [-1.02, -.1] to 3-5 on 2026-11-28, CC-BY-4, 1e-3, x-1"
    page += nodes.paragraph("", prose, nodes.literal("", "-p -1"))
    page += nodes.raw("", "<style>a { top: -1px }</style><td class='-1'>-0.2</td>", format="html")
    study.write_minus(None, page, "page")
    written = prose.replace("-0.51", "−0.51").replace("-1.02", "−1.02").replace("-.1", "−.1")
    assert page.astext() == written + "-p -1" + "\n\n" + "<style>a { top: -1px }</style><td class='-1'>−0.2</td>"


def test_chapters_that_were_not_executed_are_executed_together_and_one_that_fails_is_left_to_the_build(
    study, tmp_path, monkeypatch
):
    monkeypatch.setattr(study, "cores", lambda: 2)
    meet = "import os, pathlib, time\npathlib.Path({!r}).touch()\nwhile not os.path.exists({!r}): time.sleep(0.01)"
    meet += "\nprint(os.environ['OMP_NUM_THREADS'])"
    cells = {"one": meet.format("a", "b"), "two": meet.format("b", "a"), "three": "1 / 0", "four": "2"}
    for name, source in cells.items():
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    config = {
        "nb_execution_mode": "cache",
        "nb_execution_cache_path": str(tmp_path / "cache"),
        "nb_execution_timeout": 60,
    }
    env = SimpleNamespace(doc2path=lambda page: str(tmp_path / f"{page}.ipynb"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    study.execute_chapters(SimpleNamespace(config=SimpleNamespace(**config)), env, ["one", "two", "three"])
    cache = study.get_cache(config["nb_execution_cache_path"])
    read = {name: nbformat.read(tmp_path / f"{name}.ipynb", 4) for name in cells}
    assert [name for name in cells if study.in_cache(cache, read[name])] == ["one", "two"]
    _, executed = cache.merge_match_into_notebook(read["one"])
    assert executed.cells[0].outputs[0].text == "1\n" and "OMP_NUM_THREADS" not in os.environ
