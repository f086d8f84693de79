"""The report as one file: pages in order, and links between them lead to places in it."""

import importlib.util
from pathlib import Path

import pytest
from bs4 import BeautifulSoup

FILE = Path(__file__).parents[1] / "book" / "_ext" / "print_report.py"
HEAD = '<head><link rel="stylesheet" href="{up}_static/book.css?v=1"><link rel="next" href="x"><script></script></head>'
INDEX = """<article class="bd-article"><h1 id="start">Start</h1><a href="chapters/one.html#fig">a figure</a>
<a href="https://example.org/a#b">elsewhere</a><a href="chapters/one.html">a page</a></article>"""
ONE = """<article class="bd-article"><figure id="fig"><img src="../_images/a.png"></figure><a href="#fig">up</a>
<details><summary>Folded</summary></details><a href="../index.html#start">back</a>
<a href="../other.html">a page that is not printed</a>
<svg><path id="fig-p" clip-path="url(#fig-p)"></path></svg></article>"""


@pytest.fixture
def book(tmp_path):
    """The report of two pages, printed, as HTML."""
    spec = importlib.util.spec_from_file_location("print_report", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "chapters").mkdir()
    for name, text, up in (("index", INDEX, ""), ("chapters/one", ONE, "../")):
        page = f"<html>{HEAD.format(up=up)}<body><nav>aside</nav>{text}</body></html>"
        (tmp_path / f"{name}.html").write_text(page)
    return BeautifulSoup(module.assembled(tmp_path, ["index", "chapters/one"]), "html.parser")


def test_pages_stand_in_order_without_what_a_screen_needs(book, tmp_path):
    assert [section["id"] for section in book.find_all("section")] == ["index--", "chapters-one--"]
    assert not book.find_all(["script", "nav"]) and "open" not in book.details.attrs
    assert [link["href"] for link in book.find_all("link")] == [(tmp_path / "_static/book.css").as_uri()]


def test_links_lead_to_places_in_the_file_or_out_of_the_report(book, tmp_path):
    places = {tag["id"] for tag in book.find_all(id=True)}
    links = [tag["href"] for tag in book.find_all("a")]
    assert links == [
        "#chapters-one--fig",
        "https://example.org/a#b",
        "#chapters-one--",
        "#chapters-one--fig",
        "#index--start",
        (tmp_path / "other.html").as_uri(),
    ]
    assert {link[1:] for link in links if link.startswith("#")} <= places
    assert book.path["clip-path"] == f"url(#{book.path['id']})"
    assert book.img["src"] == (tmp_path / "_images/a.png").as_uri()
