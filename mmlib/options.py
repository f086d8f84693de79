"""What the texts of the command line's options mean."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

CHAPTERS = Path(__file__).parents[1] / "book" / "chapters"


def read_settings(texts: list[str]) -> dict[str, float]:
    """Read NAME=VALUE texts as settings of the simulator."""
    from mmlib.clips.simulate import Settings

    kinds = {field.name: type(field.default) for field in fields(Settings)}
    values = {}
    for name, text in _split_pairs("--set", texts).items():
        if name not in kinds:
            raise ValueError(f"--set {name}: no such setting; there are {', '.join(kinds)}")
        try:
            values[name] = kinds[name](text)
        except ValueError:
            kind = "a whole number" if kinds[name] is int else "a number"
            raise ValueError(f"--set {name}: expected {kind}, got {text!r}") from None
        if not abs(values[name]) < float("inf"):
            raise ValueError(f"--set {name}: expected a finite number, got {text!r}")
    return values


def read_parameters(notebook: Path, texts: list[str]) -> dict[str, object]:
    """Read NAME=VALUE texts as parameters that the notebook has."""
    import papermill
    import yaml

    known = papermill.inspect_notebook(notebook)
    values = {}
    for name, text in _split_pairs("-p", texts).items():
        if name not in known:
            raise ValueError(f"-p {name}: {notebook.stem} has no such parameter; "
                             f"it has {', '.join(known) or 'none'}")
        try:
            values[name] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ValueError(f"-p {name}: {text!r} is not YAML") from None
        if isinstance(values[name], str):  # YAML takes 1e-3 for text, papermill for a number
            try:
                values[name] = float(values[name])
            except ValueError:
                pass
    return values


def read_shard(text: str) -> tuple[int, int]:
    """Read I/N."""
    number, slash, total = text.partition("/")
    if not (slash and number.isdecimal() and total.isdecimal()):
        raise ValueError(f"--shard {text}: expected I/N, such as 1/4")
    return int(number), int(total)


def _split_pairs(option: str, texts: list[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"{option} {text}: expected NAME=VALUE")
        if name in pairs:
            raise ValueError(f"{option} {name}: given twice, {pairs[name]!r} and {value!r}")
        pairs[name] = value
    return pairs


def find_chapter(name: str) -> Path:
    """Return the notebook of the chapter with that name or number."""
    chapters = sorted(CHAPTERS.glob("*.ipynb"))
    if not chapters:
        raise ValueError(f"{CHAPTERS}: no chapters there; rerun works from a checkout of the repository")
    stem = name.removesuffix(".ipynb")
    found = [path for path in chapters if path.stem == stem or path.stem.startswith(f"{stem}_")]
    if len(found) != 1:
        listed = ", ".join(path.stem for path in found or chapters)
        number = "more than one" if found else "no"
        raise ValueError(f"{name}: {number} chapter has that name; there are {listed}")
    return found[0]
