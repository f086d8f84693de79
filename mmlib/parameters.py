"""Read the parameters of a chapter by their declared types, whoever hands them over.

papermill, ``mmlib rerun`` and the ``Snakefile`` all end here: a chapter calls :func:`read` on its own names, so that
the text ``False`` is no flag that is set, and ``010`` is ten.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

FLAGS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def read(namespace: dict) -> None:
    """Convert the annotated parameters of a notebook, its ``globals()``, to the types that they declare."""
    for name, declared in namespace.get("__annotations__", {}).items():
        namespace[name] = convert(name, namespace[name], declared if isinstance(declared, str) else _named(declared))


def read_texts(notebook: Path, texts: dict[str, str]) -> dict[str, object]:
    """Convert texts by name to the parameters that the notebook declares; refuse a name that it has not."""
    import papermill

    known = papermill.inspect_notebook(notebook)
    for name in texts:
        if name not in known:
            raise ValueError(f"-p {name}: {notebook.stem} has no such parameter; it has {', '.join(known) or 'none'}")
    return {name: convert(f"-p {name}", text, known[name]["inferred_type_name"]) for name, text in texts.items()}


def convert(name: str, value: object, declared: str) -> object:
    """Return a parameter as its declared type: int, float, bool, str, or a list of one of them.

    Text is read by that type, digits as a decimal number; what cannot be read is refused by name.  What is declared as
    text is taken as it is; a whole number is what papermill makes of a name of digits.  A list may be JSON, or parts
    between commas, or one value.  Seeds, of a name that ends so, are different whole numbers >= 0, at least one.

    >>> convert("seeds", "[010, 3]", "list[int]"), convert("others", "no", "bool"), convert("data", 2019, "str")
    ([10, 3], False, '2019')
    """
    element = re.fullmatch(r"(?:list|tuple)(?:\[(\w+).*\])?", declared)
    if not element:
        return _scalar(name, value, declared)
    if isinstance(value, str):
        value = _parts(name, value, element[1] or "")
    values = list(value) if isinstance(value, list | tuple) else [value]
    values = [_scalar(name, part, element[1] or "") for part in values]
    if name.endswith("seeds") and (not values or min(values) < 0 or len(set(values)) < len(values)):
        raise ValueError(f"{name} must be different whole numbers >= 0, at least one, got {values!r}")
    return values


def _named(declared: object) -> str:
    return declared.__name__ if type(declared) is type else str(declared)


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
    text = value.strip() if isinstance(value, str) else ""
    if declared == "bool":
        if isinstance(value, bool) or text.lower() in FLAGS:
            return FLAGS.get(text.lower(), value)
        raise ValueError(f"{name} must be true or false, got {value!r}")
    if declared == "int":
        if type(value) is int or re.fullmatch(r"[+-]?\d+", text):
            return int(text or value)
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if declared == "float":
        try:
            number = float(text or value) if not isinstance(value, bool) else math.nan
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"{name} must be a finite number, got {value!r}")
        return number
    if declared == "str":
        if isinstance(value, str) or type(value) is int:
            return str(value)
        raise ValueError(f"{name} must be text, got {value!r} (papermill -r passes text as it is)")
    return value
