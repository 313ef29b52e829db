"""How long work reports on itself. The core speaks this protocol; only ``pvdconvert.cli`` draws it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told about stages and steps; must be cheap. All methods may be called from the main thread only."""

    def stage(self, name: str, total: float | None = None) -> None:
        """A stage begins; ``total`` in the unit of :meth:`advance` (seconds or steps), None = unknown."""
        ...

    def advance(self, done: float, **metrics: float) -> None:
        """``done`` so far in this stage (absolute, not a difference); ``metrics`` such as psnr, loss."""
        ...

    def note(self, text: str) -> None:
        """One line worth keeping: what was found, guessed or skipped."""
        ...

    def close(self) -> None:
        """No more calls."""
        ...


class Silent:
    """Says nothing."""

    def stage(self, name: str, total: float | None = None) -> None: ...
    def advance(self, done: float, **metrics: float) -> None: ...
    def note(self, text: str) -> None: ...
    def close(self) -> None: ...
