"""Convert a trained radiance field of one architecture into another.

``pvdconvert.convert(...)`` is the whole road; see ``docs/`` for the command line. Importing this package imports no
torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pvdconvert.pipeline import convert, open_field

__version__ = "0.1.0"
__all__ = ["__version__", "convert", "open_field"]


def __getattr__(name: str) -> Any:
    if name in ("convert", "open_field"):
        from pvdconvert import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
