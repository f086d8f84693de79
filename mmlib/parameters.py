"""Read the parameters of a chapter by their declared types, whoever hands them over.

papermill, ``mmlib rerun`` and the ``Snakefile`` all end here: a chapter calls :func:`read` on its own names, so that
the text ``False`` is no flag that is set, and ``010`` is ten.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable, Container
from contextlib import suppress
from pathlib import Path
from typing import Any

WANTED = {"bool": "true or false", "int": "a whole number", "float": "a finite number"}
WANTED["str"] = "text (papermill -r passes it as it is)"
FLAGS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def _least(number: int) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value >= number, f"at least {number}"


def _one_of(*names: str) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value in names, f"one of {', '.join(names)}"


MEMBERS: tuple[Callable[[Any], bool], str] = lambda value: 1 <= value <= 16, "1 to 16"
RANGES = {  # what a parameter of a chapter may be, by name and type: whether a value is that, and how it is said
    "architecture: str": _one_of(
        "narrow_seresnext26", "narrow_seresnext14", "seresnext50_32x4d", "legacy_seresnext50_32x4d"
    ),
    "clips: float": _least(1),
    "device: str": _one_of("auto", "cpu", "cuda"),
    "draws: int": _least(100),
    "epochs: int": _least(1),
    "grid: str": _one_of("none", "coarse", "fine"),
    "grid_identities: int": _least(12),
    "hours: float": (lambda value: value > 0, "above 0"),
    "identities: float": _least(1),
    "identities: int": (lambda value: value == 0 or value >= 12, "at least 12, or 0"),
    "level: float": (lambda value: 0 < value < 1, "above 0 and below 1"),
    "members: int": MEMBERS,
    "pairs: int": _least(100),
    "picture_identities: int": _least(2),
    "profile: str": _one_of("tiny", "quick", "full"),
    "sets: str": _one_of("ytf", "cfp", "lfw"),
    "sizes: int": MEMBERS,
}


def read(namespace: dict) -> None:
    """Convert the annotated parameters of a notebook, its ``globals()``, to the types that they declare.

    Raises ValueError, naming parameter, value and what it may be, for one of another type or beyond its range.
    """
    known = namespace.get("__annotations__", {})
    for name, declared in known.items():
        kind = declared if isinstance(declared, str) else inspect.formatannotation(declared)
        namespace[name] = convert(name, namespace[name], kind)
    _check_data(known, namespace)


def read_texts(notebook: Path, texts: dict[str, str]) -> dict[str, object]:
    """Convert texts by name to the parameters that the notebook declares; refuse a name that it has not.

    Raises ValueError as `read` does.
    """
    import papermill

    known = papermill.inspect_notebook(notebook)
    for name in texts:
        if name not in known:
            raise ValueError(f"-p {name}: {notebook.stem} has no such parameter; it has {', '.join(known) or 'none'}")
    values = {name: convert(f"-p {name}", text, known[name]["inferred_type_name"]) for name, text in texts.items()}
    _check_data(known, values)
    return values


def _check_data(known: Container[str], values: dict) -> None:
    """Refuse a clip store where a notebook reads tables of real faces instead."""
    if "faces" in known and (data := values.get("data", "simulated")) != "simulated":
        raise ValueError(f"data={data}: has no meaning here; faces= names the folder of the tables of real faces")


def convert(name: str, value: object, declared: str) -> object:
    """Return a parameter as its declared type: int, float, bool, str, or a list of one of them; refuse others by name.

    Text is read by that type, digits as a decimal number.  What is declared as text is taken as it is, a whole number
    as papermill makes it of digits.  A list may be JSON, or parts between commas, or one value.  Seeds, of a name that
    ends so, are different whole numbers >= 0, at least one.  Others are held to `RANGES`.

    >>> convert("seeds", "[010, 3]", "list[int]"), convert("others", "no", "bool"), convert("data", 2019, "str")
    ([10, 3], False, '2019')
    """
    listed = re.fullmatch(r"(?:list|tuple)(?:\[(\w+).*\])?", declared)
    if not listed:
        return _scalar(name, value, declared)
    element = listed[1] or ""
    parts = _parts(name, value, element) if isinstance(value, str) else value
    values = [_scalar(name, part, element) for part in (parts if isinstance(parts, list | tuple) else [parts])]
    if name.endswith("seeds") and (not values or min(values) < 0 or len(set(values)) < len(values)):
        raise ValueError(f"{name} must be different whole numbers >= 0, at least one, got {values!r}")
    return values


def _parts(name: str, text: str, element: str) -> list:
    """Split the text of a list; quoted parts may hold commas."""
    inside = text.strip()
    if inside.startswith("[") != inside.endswith("]"):
        raise ValueError(f"{name} must be a list such as [0, 1], got {text!r}")
    if element == "str" and '"' in inside:
        try:
            return json.loads(inside)
        except ValueError:
            raise ValueError(f'{name} must be a list such as ["a", "b"], got {text!r}') from None
    parts = [part.strip().strip("'\"") for part in inside.strip("[]").split(",")]
    return [] if parts == [""] else parts


def _scalar(name: str, value: object, declared: str) -> object:
    """Return one value as its declared type, in its range."""
    read = _typed(name, value, declared)
    within, words = RANGES.get(f"{name.removeprefix('-p ')}: {declared}", (None, ""))
    if within and not within(read):
        raise ValueError(f"{name} must be {words}, got {read!r}")
    return read


def _typed(name: str, value: object, declared: str) -> object:
    text = value.strip() if isinstance(value, str) else str(value) if type(value) in (bool, int, float) else ""
    if declared == "bool" and type(value) in (bool, str) and text.lower() in FLAGS:
        return FLAGS[text.lower()]
    if declared == "int" and re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    if declared == "float":
        with suppress(ValueError):
            if math.isfinite(number := float(text)):
                return number
    if declared == "str" and type(value) in (int, str):
        return str(value)
    if declared not in WANTED:
        return value
    raise ValueError(f"{name} must be {WANTED[declared]}, got {value!r}")
