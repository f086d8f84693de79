"""Run the project's tasks with nothing but Python: `python3 tasks.py TASK [arguments]`.

setup      make .venv and install what the other tasks need, if that has changed; `--torch FILE_OR_REQUIREMENT...`
           installs that build of PyTorch first, which then stays
book       build the report into _build/html; arguments go to jupyter-book (`--all -W -n --keep-going`)
pdf        build the report and print it into _build/report.pdf, with a Chromium or Chrome on the PATH
test       run the tests; arguments go to pytest (`-k store`, `-m "not chapters"`)
check      format and lint: ruff, and mypy on the library
full       on a GPU: checks, costs, and the chapters at the challenge's size, into gpu/ (`--minutes 9`)
notebooks  write the notebook of every chapter from its text, never the other way
clean      remove _build, the built report and the cache of executed chapters
"""

import sys

if sys.version_info < (3, 11):
    sys.exit("mmlib needs Python 3.11 or newer; this is Python %d.%d" % sys.version_info[:2])

import hashlib
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
SCRIPTS = VENV / ("Scripts" if sys.platform == "win32" else "bin")
PYTHON = SCRIPTS / ("python.exe" if sys.platform == "win32" else "python")
STAMP = VENV / "installed-for"
# Not the script beside Python: that names the folder in which it was installed.
JUPYTER_BOOK = "from jupyter_book.cli.main import main; main()"
REPORT = ROOT / "_build" / "html" / "index.html"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def run(command: list[object]) -> int:
    """Run ``command`` in the repository, whatever the current directory, and return its exit status."""
    return subprocess.run([str(part) for part in command], cwd=ROOT).returncode


def wanted() -> str:
    """Name what an installation depends on: the Python version, its place, and the two files that list the packages.

    Scripts and the installed library point to the folder that they were made in, so that a copy would run the original.
    """
    digest = hashlib.sha256()
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((ROOT / name).read_bytes().replace(b"\r\n", b"\n") + b"\0")
    place = hashlib.sha256(str(VENV).encode()).hexdigest()[:16]
    return "{}.{} {} {}".format(*sys.version_info[:2], place, digest.hexdigest())


def installed() -> str:
    """Return what .venv was made for; empty if it was never finished."""
    return STAMP.read_text() if PYTHON.exists() and STAMP.exists() else ""


def setup(*builds: str) -> int:
    """Make .venv and install into it, unless that is done; the stamp comes last, as interrupts do happen.

    builds: files or requirements of PyTorch that are installed first, such as one without CUDA; else MMLIB_TORCH has
    them, for every installation.  A version with a local part, such as 2.15.0+cpu, is what constraints.txt asks for.
    """
    if installed() == wanted() and not builds:
        return 0
    named = builds or os.environ.get("MMLIB_TORCH", "").split()
    chosen = [str(Path(build).resolve()) if Path(build).is_file() else build for build in named]
    inside = Path(sys.prefix).resolve() == VENV.resolve()  # its own Python cannot make it anew
    if not inside:
        if not all(importlib.util.find_spec(name) for name in ("venv", "ensurepip")):
            print(
                "Python's venv module is incomplete here; on Debian and Ubuntu: apt install python3-venv",
                file=sys.stderr,
            )
            return 1
        anew = installed().split(" ")[:2] not in ([""], wanted().split(" ")[:2])  # another Python, or another place
        what = "Updating {}" if PYTHON.exists() and not anew else "Making {} (several gigabytes, some minutes)"
        print(what.format(VENV), flush=True)
        if status := run([sys.executable, "-m", "venv", *(["--clear"] if anew else []), VENV]):
            return status
    STAMP.unlink(missing_ok=True)
    if chosen and (status := run([PYTHON, "-m", "pip", "install", "-c", "constraints.txt", *chosen])):
        return status
    if status := run([PYTHON, "-m", "pip", "install", "-c", "constraints.txt", "-e", ".[book,faces,test]"]):
        return status
    STAMP.write_text(wanted())
    return 0


def book(*arguments: str) -> int:
    """Build the report and say where it opens."""
    status = setup() or run([PYTHON, "-c", JUPYTER_BOOK, "build", "book/", *arguments])
    if status == 0:
        print("The report: {}\n{}".format(REPORT.relative_to(ROOT).as_posix(), REPORT.as_uri()))
    return status


def pdf() -> int:
    """Print the report as one PDF."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print("A PDF needs a Chromium or Chrome on the PATH; on Debian: apt install chromium", file=sys.stderr)
        return 1
    out = ROOT / "_build" / "report.pdf"
    status = book() or run([PYTHON, "book/_ext/print_report.py", REPORT.parent, out, browser])
    if status == 0:
        print("As one file: {}".format(out.relative_to(ROOT).as_posix()))
    return status


def test(*arguments: str) -> int:
    """Run the tests, with a process a core unless the arguments say how many (`-n 0`)."""
    workers = [] if "-n" in arguments else ["-n", "auto", "--dist", "worksteal"]
    return setup() or run([PYTHON, "-m", "pytest", *workers, *arguments])


def check(*arguments: str) -> int:
    """Check format, lint and types; arguments go to the linter (`--fix`)."""
    python = ["mmlib", "benchmarks", "tests", "book/_ext", "tasks.py"]
    commands = [["ruff", "format", "--check", *python], ["ruff", "check", *arguments, *python], ["mypy"]]
    return setup() or max(run([PYTHON, "-m", *command]) for command in commands)


def full(*arguments: str) -> int:
    """Run what waits for a GPU; arguments go to `python -m benchmarks.gpu`."""
    return setup() or run([PYTHON, "-m", "benchmarks.gpu", "--out", "gpu", *arguments])


def notebooks() -> int:
    """Write every chapter's notebook from its text, whichever was edited last; ids of unchanged cells stay."""
    texts = sorted((ROOT / "book" / "chapters").glob("*.md"))
    return setup() or run([PYTHON, "-m", "jupytext", "--quiet", "--update", "--to", "ipynb", *texts])


def clean() -> int:
    """Remove what building the report left."""
    shutil.rmtree(ROOT / "_build", ignore_errors=True)
    return 0


TASKS = {
    "setup": setup,
    "book": book,
    "pdf": pdf,
    "test": test,
    "check": check,
    "full": full,
    "notebooks": notebooks,
    "clean": clean,
}


def main(arguments: list[str]) -> int:
    """Run the task that ``arguments`` begin with; 2 if there is none of that name."""
    name, *rest = arguments or [""]
    if name in ("-h", "--help"):
        print(__doc__)
        return 0
    if name == "setup" and rest[:1] == ["--torch"]:
        rest = rest[1:] or [""]
    elif rest and name in ("setup", "pdf", "notebooks", "clean"):
        name = ""
    if name not in TASKS or "" in rest:
        print(__doc__, file=sys.stderr)
        return 2
    return TASKS[name](*rest)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
