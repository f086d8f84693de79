"""Sphinx hooks: contents, the cache of executed chapters, what a page shows of its notebook, formulas."""

import hashlib
import html
import importlib.util
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import chain, zip_longest
from pathlib import Path
from unittest.mock import patch

import nbformat
from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn, JupyterCacheAbstract
from jupyter_cache.executors.utils import single_nb_execution
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.environment import BuildEnvironment
from sphinx.errors import ExtensionError
from sphinx.util import logging
from sphinx.util.math import get_node_equation_number
from sphinx.writers.html5 import HTML5Translator

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("mmlib", "benchmarks")  # what chapters compute with
KERNELS = 4  # that execute at once, at most: each holds a gigabyte or two
LOGGER = logging.getLogger(__name__)
MADE = "how-this-page-was-made"  # the section that is folded, and takes the parameters
METADATA = re.compile(r'<metadata class="(\w+)">(.*?)</metadata>', re.DOTALL)  # of a drawing
HYPHEN = re.compile(r"(?<![\w.,)\]-])-(?=\.?\d)")  # that stands for a minus
SUMMARY = "Parameters, searches and reruns"
# Where a chapter of a repository on GitHub can be run.
LAUNCH = {"binderhub_url": "https://mybinder.org", "colab_url": "https://colab.research.google.com"}


def content_key(files: Iterable[Path], base: Path) -> str:
    """Hash the bytes and the relative names of ``files``; 12 hexadecimal digits."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.relative_to(base).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:12]


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts]


def cache_key(root: Path, *packages: Path) -> str:
    """Name what a chapter's outputs depend on besides its own cells.

    These are the packages that it computes with (all of each: a figure is an output too), the pins and the committed
    records.
    """
    pins = root / "constraints.txt"
    parts = [
        *(content_key(_files(package), package) for package in packages),
        content_key([pins] if pins.is_file() else [], root),
        content_key(_files(root / "book" / "results"), root),
    ]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:12]


def package_folder(name: str) -> Path:
    """Return where the package that a chapter would import lies."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise ImportError(f"{name} is not installed here; `python3 tasks.py setup` installs it")
    return Path(found.origin).parent


def configure(app: Sphinx, config: Config) -> None:
    """Point Sphinx at the table of contents above the book, and at the notebook cache of this library.

    jupyter-book finds `_config.yml` in a parent folder but not `_toc.yml`. Its notebook cache knows the cells
    of a chapter and nothing else, so that after an edit of the library it would serve the old numbers.
    """
    config.external_toc_path = str(ROOT / "_toc.yml")
    key = cache_key(ROOT, *map(package_folder, PACKAGES))
    config.nb_execution_cache_path = str(Path(app.outdir).parent / ".jupyter_cache" / key)
    # Pages that are published know their repository, by who publishes them; those of a build at home have no buttons.
    address = os.environ.get("MMLIB_REPOSITORY")
    nowhere = "the one that these pages were built from, which has no public address yet"
    config.myst_substitutions |= {"repository": f"`git clone {address}`" if address else nowhere}
    if address:
        shown = dict.fromkeys(("use_repository_button", "use_edit_page_button"), True)
        place = {"repository_url": address, "repository_branch": "main", "path_to_docs": "book"}
        config.html_theme_options |= {
            **shown,
            **place,
            "launch_buttons": {**LAUNCH, "notebook_interface": "jupyterlab"},
        }
        # An edit of a notebook is lost, so the button leads to the text that it is written from.
        text = f"{address}/edit/main/book/{{{{ file_name | replace('.ipynb', '.md') }}}}"
        config.html_context |= {"edit_page_url_template": text, "edit_page_provider_name": "GitHub"}


def execute_chapters(app: Sphinx, env: BuildEnvironment, pages: list[str]) -> None:
    """Execute the chapters that the notebook cache lacks, several at a time, each with its share of the cores.

    MyST-NB, which would execute one after the other, finds them in its cache; one that fails it executes again, and
    says why.
    """
    if app.config.nb_execution_mode != "cache":
        return
    cache = get_cache(app.config.nb_execution_cache_path)
    found = {file: nbformat.read(file, 4) for file in map(env.doc2path, pages) if file.endswith(".ipynb")}
    due = {file: notebook for file, notebook in found.items() if not in_cache(cache, notebook)}
    kernels = min(len(due), KERNELS, cpus := cores())
    if kernels < 2:
        return
    share = str(max(1, cpus // kernels))
    threads = {name: os.environ.get(name, share) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    LOGGER.info("executing %d chapters, %d at a time", len(due), kernels)
    with ThreadPoolExecutor(kernels) as pool, patch.dict(os.environ, threads):
        options = {"timeout": app.config.nb_execution_timeout, "allow_errors": False}
        running = {
            pool.submit(single_nb_execution, notebook, str(Path(file).parent), **options): file
            for file, notebook in due.items()
        }
        for done in as_completed(running):
            result, file = done.result(), running[done]
            LOGGER.info("%s: %s after %.0f s", Path(file).stem, "failed" if result.err else "executed", result.time)
            if result.err is None:
                bundle = CacheBundleIn(result.nb, file, data={"execution_seconds": result.time})
                cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)


def in_cache(cache: JupyterCacheAbstract, notebook: nbformat.NotebookNode) -> bool:
    """Say whether the notebook cache has an execution of these cells."""
    try:
        return bool(cache.match_cache_notebook(notebook))
    except KeyError:
        return False


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def require_pictures(app: Sphinx, doctree: nodes.document) -> None:
    """Stop the build where a cell that draws a figure has left no picture."""
    for cell in doctree.findall(nodes.container):
        figure = (cell.get("cell_metadata") or {}).get("mystnb", {}).get("figure")
        if cell.get("nb_element") == "cell_code" and figure and not list(cell.findall(nodes.image)):
            raise ExtensionError(
                f"{app.env.docname}: the cell of {figure.get('name', 'a figure')} has drawn no picture"
            )


def cells(doctree: nodes.document) -> list[tuple[nodes.container, list[str]]]:
    """Return the code cells of a page, each with its tags."""
    found = [node for node in doctree.findall(nodes.container) if node.get("nb_element") == "cell_code"]
    return [(cell, (cell.get("cell_metadata") or {}).get("tags", [])) for cell in found]


def drop_empty_sections(app: Sphinx, doctree: nodes.document) -> None:
    """Remove a section whose cell tagged ``section-if-output`` has put out nothing: it has nothing to say."""
    for cell, tags in cells(doctree):
        if "section-if-output" in tags and not cell.children and isinstance(cell.parent, nodes.section):
            cell.parent.parent.remove(cell.parent)


def fold_making(app: Sphinx, doctree: nodes.document) -> None:
    """Fold the section on how a page was made, and have it begin with the parameters of the notebook."""
    for section in doctree.findall(nodes.section):
        if MADE in section["ids"]:
            for cell, tags in cells(doctree):
                if "parameters" in tags:
                    cell.parent.remove(cell)
                    cell["prompt_show"] = cell["prompt_hide"] = "Parameters of this page"
                    again = f"papermill book/{app.env.docname}.ipynb out.ipynb -p NAME VALUE"
                    section.insert(1, nodes.paragraph("", "To run it again: ", nodes.literal("", again)))
                    section.insert(1, cell)
            section.insert(1, nodes.raw("", f'<details class="making"><summary>{SUMMARY}</summary>', format="html"))
            section.append(nodes.raw("", "</details>", format="html"))
            break


def place_drawings(app: Sphinx, doctree: nodes.document) -> None:
    """Put drawings into their page, where they take its letters and ink, and what they are drawn from beside it.

    A drawing is the SVG of ``figures.drawing``, whose metadata has its numbers, who made them and its form for a narrow
    screen; one that is drawn by hand has that form in a file beside it, such as ``system-narrow.svg``.
    """
    for figure in doctree.findall(nodes.figure):
        name = next(iter(figure["ids"] or figure["names"]), "figure")
        for image in [image for image in figure.findall(nodes.image) if image["uri"].endswith(".svg")]:
            file = Path(app.env.relfn2path(image["uri"], app.env.docname)[1])
            drawn = file.read_text(encoding="utf-8")
            said = {kind: html.unescape(text) for kind, text in METADATA.findall(drawn)}
            by_hand = file.with_name(f"{file.stem}-narrow.svg")
            narrow = by_hand.read_text(encoding="utf-8") if by_hand.is_file() else said.get("narrow", "")
            # Ids are unique in a picture, and have to be in a page.
            kinds = {name: METADATA.sub("", drawn), f"{name}-narrow": narrow}
            each = [re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{kind}-", svg) for kind, svg in kinds.items()]
            alt = html.escape(image.get("alt", ""))
            drawn = "".join(each).replace("<svg ", f'<svg role="img" aria-label="{alt}" ')
            image.parent.replace(image, nodes.raw("", f'<div class="drawing">{drawn}</div>', format="html"))
            line = nodes.paragraph(classes=["source"])
            if said.get("data"):
                beside = file.with_name(f"{name}.csv")
                beside.write_text(said["data"], encoding="utf-8")
                target = "/" + Path(os.path.relpath(beside, app.srcdir)).as_posix()
                line += addnodes.download_reference("", "", nodes.Text("data"), reftarget=target)
                line += nodes.Text(" · ")
            line += nodes.Text(said.get("made", ""))
            if line.astext():
                figure += nodes.legend("", line)


def write_minus(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Write a minus before a negative number, in prose and in the cells of tables, where formats leave a hyphen."""
    for text in list(doctree.findall(nodes.Text)):
        code = isinstance(text.parent, (nodes.literal, nodes.FixedTextElement, nodes.raw, nodes.math))
        if not code and "default_value" not in text.parent.get("classes", ()):
            text.parent.replace(text, nodes.Text(HYPHEN.sub("−", text)))
    for raw in doctree.findall(nodes.raw):
        text = re.sub(r"(?<=>)[^<]+(?=</td>)", lambda cell: HYPHEN.sub("−", cell[0]), raw.astext())
        raw.children = [nodes.Text(text)]


def mend_citations(app: Sphinx, page: str, template: str, context: dict, doctree: nodes.document | None) -> None:
    """Take the role of a list from citations, which are no items of one to a screen reader."""
    context["body"] = context.get("body", "").replace('<div role="list" class="citation-list">', "<div>")


def quote_docstring(app: Sphinx, what: str, name: str, item: object, options: object, lines: list[str]) -> None:
    """Have reStructuredText show a docstring, which is plain prose, as it stands: names as code, no other markup."""
    if "".join(lines).startswith("Alias for field"):  # what Python writes to a named tuple
        lines.clear()
    prose, mark, example = "\n".join(lines).partition(">>>")
    parts = re.split(r"`+([^`]+)`+", prose)
    plain = [re.sub(r"([*|\\]|_(?=\W|$))", r"\\\1", part) for part in parts[::2]]
    named = [f"``{code}``" for code in parts[1::2]]
    lines[:] = ("".join(chain(*zip_longest(plain, named, fillvalue=""))) + mark + example).split("\n")


def write_all_pages(app: Sphinx, env: BuildEnvironment) -> list[str]:
    """Have every page written: a number glued from another may have changed under an unchanged one."""
    return sorted(env.found_docs)


def mathml(node: nodes.Element, tex: str, block: bool) -> str:
    """Return ``tex`` as MathML; warn, with its place in the source, of one that docutils cannot read."""
    try:
        return tex2mathml(tex, as_block=block)
    except MathError as error:
        LOGGER.warning("formula not understood: %s: %s", error, tex, location=node)
        return f"<code>{html.escape(tex)}</code>"


def visit_math(self: HTML5Translator, node: nodes.math) -> None:
    self.body.append(self.starttag(node, "span", "", CLASS="math notranslate"))
    self.body.append(mathml(node, node.astext(), block=False) + "</span>")
    raise nodes.SkipNode


def visit_display_math(self: HTML5Translator, node: nodes.math_block) -> None:
    self.body.append(self.starttag(node, "div", CLASS="math notranslate"))
    if node["number"]:
        self.body.append(f'<span class="eqno">({get_node_equation_number(self, node)})')
        self.add_permalink_ref(node, "Link to this equation")
        self.body.append("</span>")
    self.body.append(mathml(node, node.astext(), block=True) + "</div>")
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the hooks."""
    app.connect("config-inited", configure, priority=850)  # the table of contents is read at 900
    app.connect("env-before-read-docs", execute_chapters)
    app.connect("doctree-read", require_pictures, priority=400)
    # Before Sphinx collects titles, pictures and downloads at 500.
    for hook in (drop_empty_sections, fold_making, place_drawings):
        app.connect("doctree-read", hook, priority=450)
    app.connect("doctree-resolved", write_minus)
    app.connect("autodoc-process-docstring", quote_docstring)
    app.connect("html-page-context", mend_citations)
    app.connect("env-updated", write_all_pages)
    # Browsers and screen readers read MathML themselves; MathJax would come from another site at each visit.
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_display_math, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
