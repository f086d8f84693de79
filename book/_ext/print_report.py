"""Print the built report as one PDF: `python book/_ext/print_report.py SITE OUT BROWSER`.

The pages stand one after another in the order of the table of contents, as a browser prints them: folded parts stay
folded, links between pages lead to places in the file, headings become its outline.
"""

import sys
from pathlib import Path
from urllib.parse import unquote, urldefrag

import yaml
from bs4 import BeautifulSoup, Tag

TOC = Path(__file__).resolve().parents[2] / "_toc.yml"
MARGIN = {"top": "16mm", "bottom": "18mm", "left": "17mm", "right": "17mm"}
NUMBER = '<div style="width:100%;text-align:center;font:9px sans-serif"><span class="pageNumber"></span></div>'
USED = {"aria-labelledby", "aria-describedby", "for", "id", "name"}  # attributes that name a place


def listed() -> list[str]:
    """Return the pages in their order, without suffix."""
    toc = yaml.safe_load(TOC.read_text(encoding="utf-8"))
    return [toc["root"], *(chapter["file"].removesuffix(".ipynb") for chapter in toc["chapters"])]


def place(page: str, name: str = "") -> str:
    """Name a place of a page in the one file."""
    return f"{page.replace('/', '-')}--{name}"


def moved(site: Path, page: str, pages: list[str]) -> Tag:
    """Return the text of a page with its links and names changed for where it will stand."""
    file = site / f"{page}.html"
    article = BeautifulSoup(file.read_text(encoding="utf-8"), "html.parser").find("article")
    article.name, article["class"], article["id"] = "section", "page", place(page)
    drawn = {id(tag) for tag in article.select("svg *")}  # what these name is theirs alone in all the book
    for tag in [tag for tag in article.find_all(True) if id(tag) not in drawn]:
        for key in USED & {*tag.attrs}:
            if tag is not article and key != "name" or tag.name == "a" and key == "name":
                tag[key] = " ".join(place(page, name) for name in tag[key].split())
        for key in {"href", "src"} & {*tag.attrs}:
            target, name = urldefrag(tag[key])
            if "://" in target or target.startswith(("data:", "mailto:")):
                continue
            path = (file.parent / unquote(target)).resolve() if target else file
            inside = path.relative_to(site.resolve()).with_suffix("").as_posix() if path.suffix == ".html" else ""
            tag[key] = f"#{place(inside, unquote(name))}" if inside in pages else path.as_uri()
    return article


def assembled(site: Path, pages: list[str]) -> str:
    """Return the report as one page of HTML, in the light theme, without what only a screen needs."""
    book = BeautifulSoup((site / f"{pages[0]}.html").read_text(encoding="utf-8"), "html.parser")
    book.html["data-theme"] = book.html["data-mode"] = "light"
    for tag in book.find_all(["script", "noscript", "link"]):
        if tag.get("rel") == ["stylesheet"]:
            tag["href"] = (site / tag["href"].partition("?")[0]).resolve().as_uri()
        else:
            tag.decompose()
    main = book.new_tag("article", attrs={"class": "bd-article"})
    main.extend([moved(site, page, pages) for page in pages])
    for tag in main.find_all(["script", "button"]):
        tag.decompose()
    content = book.new_tag("div", attrs={"class": "bd-content"})
    content.append(main)
    book.body.clear()
    book.body.append(content)
    return str(book)


def print_report(site: Path, out: Path, browser: str) -> None:
    """Write the PDF, whole or not at all."""
    from playwright.sync_api import sync_playwright

    html = out.with_suffix(".html")
    html.write_text(assembled(site, listed()), encoding="utf-8")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=browser)
        tab = opened.new_page()
        tab.goto(html.as_uri(), wait_until="load")
        paper = {"format": "A4", "margin": MARGIN, "scale": 0.8}  # so that the widest table fits
        options = {"outline": True, "tagged": True, "print_background": True, **paper}
        content = tab.pdf(
            **options, display_header_footer=True, header_template="<span></span>", footer_template=NUMBER
        )
        opened.close()
    html.unlink()
    out.write_bytes(content)


if __name__ == "__main__":
    print_report(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve(), sys.argv[3])
