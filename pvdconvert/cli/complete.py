"""Names for shell completion and for did-you-mean, from entry points alone: no plugin is loaded."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib.metadata import entry_points

# Written out, because pvdconvert.plugin imports numpy and a TAB should not wait for that.
_PLUGINS, _FORMATS = "pvdconvert.plugins", "pvdconvert.formats"


def _names(group: str, incomplete: str) -> list[str]:
    return sorted({point.name for point in entry_points(group=group) if point.name.startswith(incomplete)})


def architectures(incomplete: str) -> list[str]:
    """Values of ``--to``."""
    return _names(_PLUGINS, incomplete)


def formats(incomplete: str) -> list[str]:
    """Values of ``--from`` and ``--as``."""
    return _names(_FORMATS, incomplete)


def everything(incomplete: str) -> list[str]:
    """Values of ``selftest`` and ``formats NAME``."""
    return sorted({*architectures(incomplete), *formats(incomplete)})


def presets(incomplete: str) -> list[str]:
    """Values of ``--preset``."""
    return [name for name in ("fast", "balanced", "best") if name.startswith(incomplete)]


def methods(incomplete: str) -> list[str]:
    """Values of ``--method``."""
    from pvdconvert.distill.methods import METHODS

    return [name for name in METHODS if name.startswith(incomplete)]


def near(word: str, known: Iterable[str]) -> str:
    """ "did you mean 'tensorf'?", or nothing."""
    found = difflib.get_close_matches(word, list(known), 1, 0.5)
    return f"did you mean {found[0]!r}?" if found else ""
