"""The built report as a browser shows it, light and dark, wide and on a phone; pictures in _build/screenshots."""

import re
import shutil
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag

import axe_playwright_python
import pytest
from playwright.sync_api import TimeoutError, sync_playwright

ROOT = Path(__file__).parents[1]
SITE = ROOT / "_build" / "html"
SHOTS = ROOT / "_build" / "screenshots"
PROBE = (ROOT / "tests" / "pages.js").read_text(encoding="utf-8")
AXE = Path(axe_playwright_python.__file__).with_name("axe.min.js").read_text(encoding="utf-8")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
UTILITY = {"genindex.html", "search.html"}  # of the theme, not the report's text
WIDE, PHONE = 1440, 390
HEIGHT = {WIDE: 900, PHONE: 844}
SMALLEST = 9  # pixels of a letter in a drawing

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed: apt install chromium")
needs_report = pytest.mark.skipif(
    not (SITE / "index.html").exists(), reason="no report is built: python3 tasks.py book"
)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextmanager
def served(folder: Path):
    """Serve a folder and yield where."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    server.handle_error = lambda *_: None  # of a tab that was closed
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        offline = ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=offline)
        yield browser
        browser.close()


@contextmanager
def opened(browser, site, theme="light", width=WIDE, **options):
    """Yield a tab, and the list of what goes wrong in it: errors, and requests that leave the site."""
    size = {"width": width, "height": HEIGHT[width]}
    context, found = browser.new_context(viewport=size, color_scheme=theme, reduced_motion="reduce", **options), []
    tab = context.new_page()
    note = lambda kind, what, wrong: found.append(f"{kind}: {what}") if wrong else None  # noqa: E731
    tab.on("console", lambda said: note("console", said.text, said.type == "error"))
    tab.on("pageerror", lambda error: note("error", error, True))
    tab.on("request", lambda sent: note("asks for", sent.url, not sent.url.startswith((site, "data:", "blob:"))))
    yield tab, found
    context.close()


def look(browser, folder: Path, pages, theme="light", width=WIDE, shots: Path | None = None) -> dict[str, list[str]]:
    """Visit pages of a site in one view; return what is wrong with each, where anything is."""
    faults, links, places = {}, {}, {}
    with served(folder) as site, opened(browser, site, theme, width) as (tab, said):
        for page in pages:
            tab.goto(site + page, wait_until="load")
            drawn = tab.evaluate("document.documentElement.dataset.theme")
            found = faults[page] = [] if drawn in (theme, None) else [f"is {drawn}"]
            if shots:
                name = f"{page.removesuffix('.html').replace('/', '-')}-{width}-{theme}.jpg"
                tab.screenshot(path=shots / name, full_page=True, type="jpeg", quality=80)
            tab.add_script_tag(content=PROBE)
            if page.startswith("chapters/"):
                found += tab.evaluate("firstScreen()")
            found += tab.evaluate("layout", [width == WIDE, SMALLEST])
            urls, ids = tab.evaluate("links()")
            links[page], places[site + page] = sorted(set(urls)), set(ids)
            if width == WIDE:
                tab.add_script_tag(content=AXE)
                found += tab.evaluate("barriers", theme)
            found += said
            said.clear()
    for page, urls in links.items():
        for url in urls:
            target, place = urldefrag(url)
            name = unquote(target.removeprefix(site)).partition("?")[0]
            if url.startswith(site) and not (folder / name).exists():
                faults[page].append(f"dead link: {url.removeprefix(site)}")
            elif place and unquote(place) not in places.get(target, {unquote(place)}):
                faults[page].append(f"no such place: {url.removeprefix(site)}")
    return {page: found for page, found in faults.items() if found}


def report() -> list[str]:
    """Return the pages of the built report."""
    pages = [page.relative_to(SITE).as_posix() for page in SITE.rglob("*.html") if "_static" not in page.parts]
    return sorted(set(pages) - UTILITY)


@needs_browser
@needs_report
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, PHONE])
def test_every_page_is_sound(browser, width, theme):
    SHOTS.mkdir(exist_ok=True)
    found = look(browser, SITE, report(), theme, width, SHOTS)
    assert not found, "\n".join(f"{page}: {fault}" for page, faults in found.items() for fault in faults)


@needs_browser
@needs_report
def test_search_finds_a_word_of_every_page(browser):
    missed = []
    with served(SITE) as site, opened(browser, site) as (tab, wrong):
        for page in report():
            tab.goto(site + page)
            word = max(re.findall(r"\w+", tab.inner_text("article h1")), key=len)
            tab.keyboard.press("Control+k")
            tab.keyboard.type(word)
            tab.keyboard.press("Enter")
            try:
                tab.wait_for_selector(f"#search-results a[href*='{Path(page).name}']", timeout=10_000)
            except TimeoutError:
                missed.append((page, word))
        assert (missed, wrong) == ([], [])


def unreached(browser, folder: Path, page: str, width: int) -> list[str]:
    """Walk through a page with the tabulator; return what it shows to be clicked and does not reach."""
    with served(folder) as site, opened(browser, site, width=width) as (tab, _):
        tab.goto(site + page)
        tab.add_script_tag(content=PROBE)
        for _ in range(tab.evaluate("wanted()") + 20):
            tab.keyboard.press("Tab")
            tab.evaluate("document.activeElement.dataset.reached = 'yes'")
        return tab.evaluate("unreached()")


@needs_browser
@needs_report
@pytest.mark.parametrize("page", ["index.html", "chapters/01_data.html", "chapters/04_aggregation.html"])
@pytest.mark.parametrize("width", [WIDE, PHONE])
def test_the_keyboard_reaches_what_can_be_clicked(browser, page, width):
    assert unreached(browser, SITE, page, width) == []


TOUCHED = {"identities": "02_metric", "grid": "04_aggregation", "clips": "04_aggregation"}


@needs_browser
@needs_report
@pytest.mark.parametrize("kind", TOUCHED)
@pytest.mark.parametrize("width", [WIDE, PHONE])
def test_every_control_changes_what_is_shown(browser, kind, width):
    with served(SITE) as site, opened(browser, site, width=width) as (tab, wrong):
        tab.goto(f"{site}chapters/{TOUCHED[kind]}.html")
        box = tab.locator(f".touch[data-kind={kind}]")
        looks = lambda: [part.inner_html() for part in box.locator("output, .touch-box, tbody").all()]  # noqa: E731
        # A heading sorts, and sorts the other way; then the filters, which may leave rows that are alike.
        presses = {"thead button": ["Enter", "Enter"], "select, input": ["ArrowDown"]}
        tried = [
            (control, key) for part, keys in presses.items() for control in box.locator(part).all() for key in keys
        ]
        for control, key in tried:
            before = looks()
            control.press(key)
            assert looks() != before, control
        assert tried and wrong == [] and box.locator(".instead").count() == 0
        assert box.evaluate("box => box.scrollWidth <= box.clientWidth")  # no control is cut


@needs_browser
@needs_report
def test_the_arms_differ_on_clips_that_can_be_touched(browser):
    with served(SITE) as site, opened(browser, site) as (tab, wrong):
        tab.goto(f"{site}chapters/{TOUCHED['clips']}.html")
        box = tab.locator(".touch[data-kind=clips]")
        kind, ranks = box.locator("select").first, {}
        for name in kind.locator("option").all_inner_texts():
            kind.select_option(name)
            ranks[name] = {int(cell) for cell in box.locator("tbody td:nth-child(3)").all_inner_texts()}
        assert ranks.pop("found by every arm") == {1} and min(ranks.pop("found by no arm")) > 1
        assert ranks and all(len(found) > 1 for found in ranks.values()) and wrong == []


@needs_browser
@needs_report
@pytest.mark.parametrize("kind", TOUCHED)
def test_a_page_is_whole_without_scripts(browser, kind):
    with served(SITE) as site, opened(browser, site, java_script_enabled=False) as (tab, wrong):
        tab.goto(f"{site}chapters/{TOUCHED[kind]}.html")
        box = tab.locator(f".touch[data-kind={kind}]")
        assert box.locator(".instead").is_visible() and "scripts" in box.inner_text() and "{" not in box.inner_text()
        assert box.locator("select, input, button").count() == 0 and wrong == []
        assert tab.locator("article figure svg.wide").first.is_visible()


GOOD = """<!doctype html><html lang="en"><head><meta charset="utf-8"><link rel="icon" href="data:,"><title>A</title>
<meta name="viewport" content="width=device-width"><style>body { margin: 8px; color: #222; background: white }</style>
</head><body><article><h1 id="top">A page</h1><p>It answers its question.</p><figure><div class="drawing">
<svg class="wide" role="img" aria-label="A dot." viewBox="0 0 300 99" width="300"><text y="20" font-size="14">dot</text>
</svg></div>
</figure><img src="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg'/%3E" alt="A line.">
<p style="height: 900px">More.</p><h2>A section</h2><div style="overflow-x: auto"><table><tr><td>0.871</td></table>
</div><pre>import mmlib</pre><p>See <a href="page.html#top">above</a> or <a href="https://example.org/">elsewhere</a>.</p>
</article></body></html>"""
SOUND = "chapters/page.html"
FAULTS = [  # what is written instead of what, and what is then said
    ("<p>It", '<p style="width: 2000px">It', "pixels wide"),
    ("<td>", '<td style="min-width: 2000px">', "cut: table"),
    ("<pre>", '<pre style="overflow-x: auto">' + 400 * "x", "cut: pre"),
    ("<p>It answers", "<pre>import mmlib</pre><p>It answers", "code on the first screen"),
    ("<p>It answers", '<p style="margin-top: 900px">It answers', "no sentence is whole"),
    ('"drawing">\n<svg', '"drawing" style="overflow-x: auto"><svg class="narrow" style="width: 2000px"', "cut: div"),
    ('font-size="14"', 'font-size="7"', "small letters"),
    (' alt="A line."', "", "no alternative text"),
    (' aria-label="A dot."', "", "no alternative text"),
    ("data:image/svg+xml", "a.png?", "not loaded"),
    ("page.html#top", "page.html#end", "no such place"),
    ("page.html#top", "other.html", "dead link"),
    ("</article>", "<script>console.error('no')</script></article>", "console: no"),
    ("</article>", "<script>nothing()</script></article>", "error: nothing"),
    ("</article>", "<script>fetch('https://example.org/').catch(() => 0)</script></article>", "asks for: https"),
    ('<a href="page', '<a inert href="page', "cannot be focused"),
    ("color: #222", "color: #999", "contrast"),
    (">above<", "><", "discernible text"),
    ("h2>", "h5>", "Heading levels"),
    ('lang="en"', 'lang="en" data-theme="dark"', "is dark"),
]


@pytest.fixture(scope="module")
def seen(browser, tmp_path_factory):
    """Look at the sound page, and at one page a fault, which all link to the first."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "chapters").mkdir()
    (folder / SOUND).write_text(GOOD)
    for number, (old, new, _) in enumerate(FAULTS):
        assert old in GOOD
        (folder / "chapters" / f"{number}.html").write_text(GOOD.replace(old, new))
    return look(browser, folder, [SOUND, *(f"chapters/{number}.html" for number in range(len(FAULTS)))])


@needs_browser
def test_a_sound_page_is_accepted(browser, seen, tmp_path):
    assert SOUND not in seen
    (tmp_path / "page.html").write_text(GOOD)
    assert look(browser, tmp_path, ["page.html"], "dark", PHONE) == {}
    assert unreached(browser, tmp_path, "page.html", PHONE) == []


@needs_browser
def test_a_table_that_goes_on_to_the_right_of_a_phone_needs_a_sign(browser, tmp_path):
    wide = GOOD.replace("<td>", '<td style="min-width: 900px">')
    (tmp_path / "page.html").write_text(wide)
    (tmp_path / "faded.html").write_text(wide.replace("overflow-x: auto", "overflow-x: auto; --fade: 48px"))
    found = look(browser, tmp_path, ["page.html", "faded.html"], width=PHONE)
    assert [*found] == ["page.html"] and "without a sign" in found["page.html"][0]


@needs_browser
@pytest.mark.parametrize("number", range(len(FAULTS)), ids=[complaint for _, _, complaint in FAULTS])
def test_a_fault_of_a_page_is_seen(seen, number):
    assert any(FAULTS[number][2] in found for found in seen[f"chapters/{number}.html"])


@needs_browser
def test_a_link_that_the_keyboard_passes_by_is_seen(browser, tmp_path):
    (tmp_path / "page.html").write_text(GOOD.replace('<a href="page', '<a tabindex="-1" href="page'))
    assert unreached(browser, tmp_path, "page.html", WIDE) == ["a above"]
