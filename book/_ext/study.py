"""Sphinx hooks: the table of contents, the cache of executed chapters, glued numbers, formulas."""

import hashlib
import html
import importlib.util
from collections.abc import Iterable
from pathlib import Path

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.environment import BuildEnvironment
from sphinx.errors import ExtensionError
from sphinx.util import logging
from sphinx.util.math import get_node_equation_number
from sphinx.writers.html5 import HTML5Translator

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("mmlib", "benchmarks")  # what chapters compute with
LOGGER = logging.getLogger(__name__)


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


def require_pictures(app: Sphinx, doctree: nodes.document) -> None:
    """Stop the build where a cell that draws a figure has left no picture."""
    for cell in doctree.findall(nodes.container):
        figure = (cell.get("cell_metadata") or {}).get("mystnb", {}).get("figure")
        if cell.get("nb_element") == "cell_code" and figure and not list(cell.findall(nodes.image)):
            raise ExtensionError(
                f"{app.env.docname}: the cell of {figure.get('name', 'a figure')} has drawn no picture"
            )


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
    app.connect("doctree-read", require_pictures)
    app.connect("env-updated", write_all_pages)
    # Browsers and screen readers read MathML themselves; MathJax would come from another site at each visit.
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_display_math, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
