"""Read the parameters of a chapter by their declared types, whoever handed them over."""

from __future__ import annotations

from mmlib.experiment import as_seeds


def read(namespace: dict) -> None:
    """Convert the annotated parameters of a notebook, ``globals()``, to the types that they declare."""
    for name in namespace.get("__annotations__", {}):
        if name.endswith("seeds"):
            namespace[name] = as_seeds(namespace[name])
