"""Every chapter keeps the rules, is in step with its notebook, and runs in the tiny profile."""

import ast
import os
import re
import subprocess
import sys
import tokenize
from io import StringIO
from pathlib import Path

import jupytext
import nbformat
import pytest
import yaml

from mmlib.data.public import import_lfw, import_public

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted((ROOT / "book" / "chapters").glob("*.md"))
COMMON_PARAMETERS = {"seeds", "profile", "data", "device"}
MOST_LINES = 11  # "under twelve"
MOST_FUNCTION_LINES = 5
SECONDS = 300

each_chapter = pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)


# The rules, each a function from a notebook to a list of complaints.


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def code(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose(notebook) -> str:
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def opening(notebook, topic: str) -> list[str]:
    """The page starts with its label and title, and has the closing sections."""
    text, found = prose(notebook), []
    if not re.match(rf"\(ch-{re.escape(topic)}\)=\n# \S", text):
        found.append(f"does not start with the label (ch-{topic})= and a title")
    for section in ("What we keep", "References"):
        if not re.search(rf"^## {section}$", text, re.MULTILINE):
            found.append(f"has no section {section!r}")
    return found


def parameters(notebook) -> list[str]:
    """One cell of annotated, commented parameters, before it nothing but imports."""
    cells = code(notebook)
    tagged = [index for index, cell in enumerate(cells) if "parameters" in tags(cell)]
    if len(tagged) != 1:
        return [f"has {len(tagged)} cells tagged parameters"]
    found, source = [], cells[tagged[0]].source
    for cell in cells[: tagged[0]]:
        if not all(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(cell.source).body):
            found.append("does more than import before the parameters")
    commented = {
        token.start[0]
        for token in tokenize.generate_tokens(StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    names = set()
    for node in ast.parse(source).body:
        if not isinstance(node, ast.AnnAssign) or node.value is None:
            found.append(f"parameters: line {node.lineno} is not `name: type = default`")
            continue
        names.add(node.target.id)
        if not commented & set(range(node.lineno, node.end_lineno + 1)):
            found.append(f"parameters: {node.target.id} has no comment with unit and range")
    if missing := COMMON_PARAMETERS - names:
        found.append(f"parameters: {', '.join(sorted(missing))} missing")
    return found


def cells(notebook) -> list[str]:
    """Cells are short plain Python that leaves computing to the library."""
    found = []
    for number, cell in enumerate(code(notebook), start=1):
        where = f"code cell {number}"
        if len(cell.source.splitlines()) > MOST_LINES:
            found.append(f"{where} has more than {MOST_LINES} lines")
        try:
            tree = ast.parse(cell.source)
        except SyntaxError:  # !shell, %magic, ?help
            found.append(f"{where} is not plain Python")
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found.append(f"{where} defines the class {node.name}")
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > MOST_FUNCTION_LINES:
                found.append(f"{where}: {node.name} has more than {MOST_FUNCTION_LINES} lines")
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.path", "os.chdir"):
                found.append(f"{where} touches {ast.unparse(node)}")
    return found


def figures(notebook) -> list[str]:
    """A cell that shows a figure carries its caption, label and alternative text."""
    found, names = [], []
    for number, cell in enumerate(code(notebook), start=1):
        if "plt.show(" not in cell.source:
            continue
        mystnb = cell.metadata.get("mystnb", {})
        figure, image = mystnb.get("figure", {}), mystnb.get("image", {})
        names.append(figure.get("name", ""))
        if not cell.source.rstrip().endswith("plt.show()"):
            found.append(f"code cell {number} goes on after plt.show()")
        if not figure.get("caption", "").strip():
            found.append(f"code cell {number} has no caption")
        if not names[-1].startswith("fig-"):
            found.append(f"code cell {number} has no label fig-…")
        if not image.get("alt", "").strip():
            found.append(f"code cell {number} has no alternative text")
    found += [f"two figures are called {name}" for name in sorted(set(names)) if names.count(name) > 1]
    return found


TYPED_NUMBER = re.compile(r"\d[.,]\d|(?<![\w.])\.\d|\d\s?(%|per cent|points?\b|seconds?\b)")
NO_PROSE = re.compile(
    r"^```(python|text|console|bash|\{math\}).*?^```$"  # code and displayed formulas
    r"|\$\$.*?\$\$(\s*\([\w-]+\))?"
    r"|\$[^$\n]+\$"
    r"|(\{[\w:-]+\})?(?<!`)(`{1,2})(?!`)[^`\n]+\4"  # code in a line, and roles: {glue:text}`…`
    r"|\]\([^)\s]*\)"  # where a link goes
    r"|^:[\w-]+:.*?$"  # options of a directive
    r"|<https?://[^>]*>",
    re.MULTILINE | re.DOTALL,
)


SHOWN = {"parameters", "remove-cell", "remove-input", "hide-input", "show"}


def plumbing(notebook) -> list[str]:
    """Every cell says what a reader sees of it, and what only prepares is not seen."""
    found = []
    for number, cell in enumerate(code(notebook), start=1):
        where, seen = f"code cell {number}", SHOWN & set(tags(cell))
        if not seen:
            found.append(f"{where} has none of the tags {', '.join(sorted(SHOWN))}")
        if "parameters" in seen and "hide-input" not in seen:
            found.append(f"{where}: the parameters are not folded (hide-input)")
        lines = [line for line in cell.source.splitlines() if line.strip()]
        prepares = all(line.startswith(("import ", "from ")) for line in lines)
        if (prepares or "figures.glue" in cell.source) and seen & {"show", "hide-input"} - {"parameters"}:
            found.append(f"{where} only imports, or glues, and is on the page")
        if "plt.show(" in cell.source and "remove-cell" in seen:
            found.append(f"{where} draws and is removed from the page")
    return found


def typed_numbers(notebook) -> list[str]:
    """A measured number in prose is glued; one that is quoted stands in a line with its citation."""
    figures = [cell.metadata.get("mystnb", {}).get("figure", {}) for cell in code(notebook)]
    text = "\n\n".join([prose(notebook), *(figure.get("caption", "") for figure in figures)])
    text = re.sub(r"^.*\{cite.*$", "", text, flags=re.MULTILINE)
    lines = NO_PROSE.sub(" ", text).splitlines()
    return [f"number typed by hand: {line.strip()}" for line in lines if TYPED_NUMBER.search(line)]


def complaints(notebook, topic: str) -> list[str]:
    """All complaints about a chapter; empty if it keeps the rules."""
    return (
        opening(notebook, topic)
        + parameters(notebook)
        + cells(notebook)
        + figures(notebook)
        + plumbing(notebook)
        + typed_numbers(notebook)
    )


def out_of_step(text: Path, notebook: Path) -> list[str]:
    """Say how ``notebook`` differs from what ``text`` says, and what of a run is left in it."""
    edited, paired = jupytext.read(text), nbformat.read(notebook, as_version=4)
    found = []
    for cell in code(paired):
        if cell.outputs or cell.execution_count is not None:
            found.append("has outputs or execution counts")
        if "injected-parameters" in tags(cell) or "papermill" in cell.metadata:
            found.append("has traces of papermill")
    if [plain(cell) for cell in edited.cells] != [plain(cell) for cell in paired.cells]:
        found.append("differs from the text: python3 tasks.py notebooks")
    return sorted(set(found))


def plain(cell) -> tuple:
    """What a cell says: kind, source, and the metadata that the pair keeps."""
    return cell.cell_type, cell.source, tags(cell), cell.metadata.get("mystnb", {})


# The chapters.


def test_contents_name_every_chapter_and_only_those():
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text())
    listed = [entry["file"] for entry in contents["chapters"] if entry["file"].startswith("chapters/")]
    assert listed == [f"chapters/{path.stem}.ipynb" for path in CHAPTERS]


@each_chapter
def test_notebook_is_in_step_with_the_text(chapter):
    assert out_of_step(chapter, chapter.with_suffix(".ipynb")) == []


@each_chapter
def test_chapter_keeps_the_rules(chapter):
    topic = chapter.stem.split("_", 1)[1].replace("_", "-")
    assert complaints(jupytext.read(chapter), topic) == []


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory):
    """A cache that the chapters share, as they do in the book, and that starts empty."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "mmlib-cache"


# Fewer worlds and members than a page has, where the tiny profile leaves many.
FEWER = {
    "04_aggregation": {"grid_identities": "12"},
    "05_loss": {"sweep_seeds": "[3]"},
    "08_ensemble": {"identities": "24", "sizes": "[1, 2]"},
    "10_ladder": {"identities": "24"},
}


def run_chapter(chapter: Path, folder: Path, cache: Path, **parameters: str) -> list:
    """Run a chapter as a user does, from ``folder``, and return its cells; it must leave nothing but its notebook."""
    given = [word for pair in (FEWER.get(chapter.stem, {}) | parameters).items() for word in ("-p", *pair)]
    notebook, env = chapter.with_suffix(".ipynb"), os.environ | {"MMLIB_CACHE": str(cache)}
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", notebook, "out.ipynb", *given]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-4000:]
    executed = code(nbformat.read(folder / "out.ipynb", as_version=4))
    outputs = [output for cell in executed for output in cell.outputs]
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    assert sorted(path.name for path in folder.iterdir()) == ["out.ipynb"]
    return outputs


def glued(outputs: list) -> dict[str, str]:
    """Return the values that a chapter hands to its prose, as text."""
    kind = "application/papermill.record/text/plain"
    return {
        output.metadata["scrapbook"]["name"]: output.data[kind] for output in outputs if kind in output.get("data", {})
    }


@pytest.mark.chapters
@each_chapter
def test_chapter_runs_in_the_tiny_profile_from_any_directory(chapter, tiny_cache, tmp_path):
    assert "notice" in glued(run_chapter(chapter, tmp_path, tiny_cache, profile="tiny", seeds="[3]"))


@pytest.fixture(scope="session")
def real_store(tmp_path_factory):
    """The public embeddings of real faces as a store; skips where the files are not."""
    folder = os.environ.get("MMLIB_REAL_DATA")
    if not folder:
        pytest.skip("MMLIB_REAL_DATA names no folder with the LFW embeddings (see CONTRIBUTING)")
    store = tmp_path_factory.mktemp("real") / "store"
    import_lfw(folder, store)
    return store


# A MAP@100 that each of these chapters glues.
REAL_FACES = {
    "02_metric": "metric-map",
    "03_baselines": "base-mlp",
    "04_aggregation": "agg-trained",
    "05_loss": "loss-margin",
    "07_fusion": "fus-face",
}


@pytest.mark.chapters
@pytest.mark.parametrize("name", REAL_FACES)
def test_chapter_runs_on_real_faces(name, real_store, tiny_cache, tmp_path):
    chapter = ROOT / "book" / "chapters" / f"{name}.md"
    found = glued(run_chapter(chapter, tmp_path, tiny_cache, data=str(real_store), seeds="[0]"))
    assert "own" in found["notice"] and "imulated" not in found["notice"]
    assert 0.9 < float(found[REAL_FACES[name]]) <= 1  # clean photographs: far above the chance level, and never above 1


# What these chapters have to say of faces without scenes; committed records of simulated clips must not speak for them.
SAID = [
    ("08_ensemble", "ens-source", "the run of this page"),
    ("09_inference", "inf-described-verdict", "cannot be tried"),
    ("10_ladder", "lad-from", "of this page's own run"),
]


@pytest.mark.chapters
@pytest.mark.parametrize("name, key, text", SAID)
def test_chapter_says_of_real_faces_what_is_so(name, key, text, real_store, tiny_cache, tmp_path):
    chapter = ROOT / "book" / "chapters" / f"{name}.md"
    found = glued(run_chapter(chapter, tmp_path, tiny_cache, data=str(real_store), seeds="[0]"))
    assert "own" in found["notice"] and "imulated" not in found["notice"]
    # The rates were searched for on simulated clips, which a page of real faces has to say too.
    spoken = {key: said for key, said in found.items() if not key.endswith("-search-source")}
    assert text in found[key] and not any("imulated" in str(said) for said in spoken.values())


@pytest.mark.chapters
@pytest.mark.parametrize("chapter", CHAPTERS[:10], ids=lambda path: path.stem)
def test_chapter_runs_on_clips_as_of_youtube_faces(chapter, face_tables, tiny_cache, tmp_path_factory, tmp_path):
    """Five frames a clip, scores, a scene and distractors, as the tables of YTF have them."""
    store = tmp_path_factory.mktemp("ytf") / "store"
    import_public("ytf", face_tables, store)
    found = glued(run_chapter(chapter, tmp_path, tiny_cache, data=str(store), seeds="[0]"))
    assert "own" in found["notice"] and "imulated" not in found["notice"]


# The rules themselves.

GOOD = """\
---
kernelspec: {name: python3, display_name: Python 3, language: python}
---
(ch-toy)=
# A toy

Does it work?
It reaches {glue:text}`toy-map:.3f`, as 0.87 {cite:p}`dong2019deepmef`, at $q > 0.5$ and `k=1.5`.

```{code-cell} ipython3
:tags: [remove-cell]

import matplotlib.pyplot as plt
```

```{code-cell} ipython3
:tags: [parameters, hide-input]

seeds: list[int] = [0, 1]  # worlds
profile: str = "quick"  # tiny, quick or full
data: str = "simulated"  # or a path
device: str = "auto"  # auto, cpu or cuda
```

```{code-cell} ipython3
---
tags: [remove-input]
mystnb:
  figure: {caption: A line., name: fig-toy}
  image: {alt: A line that goes up.}
---
plt.plot(seeds)
plt.show()
```

## What we keep

A toy.

## References
"""


def toy(old: str = "", new: str = ""):
    assert old in GOOD
    return jupytext.reads(GOOD.replace(old, new), fmt="md:myst")


def test_a_chapter_that_keeps_the_rules_is_accepted():
    assert complaints(toy(), "toy") == []


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("(ch-toy)=\n", "", "label"),
        ("## What we keep", "## What we saw", "What we keep"),
        (":tags: [parameters, hide-input]\n", "", "0 cells tagged"),
        (", hide-input]", "]", "not folded"),
        ("tags: [remove-input]\n", "", "none of the tags"),
        ("tags: [remove-input]", "tags: [remove-cell]", "draws and is removed"),
        ("[remove-cell]", "[show]", "is on the page"),
        ("import matplotlib.pyplot as plt", "import os\nroot = os.getcwd()", "more than import"),
        ('device: str = "auto"', 'device = "auto"', "is not `name: type = default`"),
        ("  # worlds", "", "seeds has no comment"),
        ('data: str = "simulated"  # or a path\n', "", "data missing"),
        ("plt.plot(seeds)\n", "plt.plot(seeds)\n" * 11, "more than 11 lines"),
        ("plt.plot(seeds)\n", "%matplotlib inline\n", "not plain Python"),
        ("plt.plot(seeds)\n", "!pip install numpy\n", "not plain Python"),
        ("plt.plot(seeds)\n", "class Model:\n    pass\n", "class Model"),
        ("plt.plot(seeds)\n", "def f():\n" + "    x = 1\n" * 5, "f has more than 5 lines"),
        ("plt.plot(seeds)\n", "sys.path.append('..')\n", "sys.path"),
        ("plt.show()\n", "plt.show()\nprint(1)\n", "goes on after"),
        ("caption: A line.", "caption: ''", "no caption"),
        ("caption: A line.", "caption: It reaches 0.91.", "typed by hand"),
        ("name: fig-toy", "name: toy", "no label"),
        ("{alt: A line that goes up.}", "{}", "no alternative text"),
        ("A toy.\n", "It reaches 0.912.\n", "typed by hand"),
        ("A toy.\n", "It reaches .912.\n", "typed by hand"),
        ("A toy.\n", "It gains 3 points.\n", "typed by hand"),
        ("A toy.\n", "It loses 40 %.\n", "typed by hand"),
        ("A toy.\n", "```{note}\nIt reaches 0.912.\n```\n", "typed by hand"),
    ],
)
def test_a_breach_of_the_rules_is_named(old, new, complaint):
    assert any(complaint in found for found in complaints(toy(old, new), "toy"))


def test_left_over_runs_and_unsynced_edits_are_named(tmp_path):
    text, notebook = tmp_path / "toy.md", tmp_path / "toy.ipynb"
    text.write_text(GOOD)
    run = toy()
    jupytext.write(run, notebook)
    assert out_of_step(text, notebook) == []
    code(run)[1].execution_count = 1
    code(run)[1].metadata.tags = ["injected-parameters"]
    jupytext.write(run, notebook)
    assert [found.split(":")[0] for found in out_of_step(text, notebook)] == [
        "differs from the text",
        "has outputs or execution counts",
        "has traces of papermill",
    ]
