"""Read the parameters of a chapter by their declared types, whoever hands them over.

papermill, ``mmlib rerun`` and the ``Snakefile`` all end here: a chapter calls :func:`read` on its own names, so that
the text ``False`` is no flag that is set, and ``010`` is ten.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from contextlib import suppress
from pathlib import Path

WANTED = {"bool": "true or false", "int": "a whole number", "float": "a finite number"}
WANTED["str"] = "text (papermill -r passes it as it is)"
FLAGS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def read(namespace: dict) -> None:
    """Convert the annotated parameters of a notebook, its ``globals()``, to the types that they declare."""
    for name, declared in namespace.get("__annotations__", {}).items():
        kind = declared if isinstance(declared, str) else inspect.formatannotation(declared)
        namespace[name] = convert(name, namespace[name], kind)


def read_texts(notebook: Path, texts: dict[str, str]) -> dict[str, object]:
    """Convert texts by name to the parameters that the notebook declares; refuse a name that it has not."""
    import papermill

    known = papermill.inspect_notebook(notebook)
    for name in texts:
        if name not in known:
            raise ValueError(f"-p {name}: {notebook.stem} has no such parameter; it has {', '.join(known) or 'none'}")
    return {name: convert(f"-p {name}", text, known[name]["inferred_type_name"]) for name, text in texts.items()}


def convert(name: str, value: object, declared: str) -> object:
    """Return a parameter as its declared type: int, float, bool, str, or a list of one of them; refuse others by name.

    Text is read by that type, digits as a decimal number.  What is declared as text is taken as it is, a whole number
    as papermill makes it of digits.  A list may be JSON, or parts between commas, or one value.  Seeds, of a name that
    ends so, are different whole numbers >= 0, at least one.

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
