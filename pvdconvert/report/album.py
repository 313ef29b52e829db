"""What a page shows of two fields, taken from the pictures that measuring them made anyway. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pvdconvert.report.pictures import View, choose

if TYPE_CHECKING:
    from pvdconvert.metrics import Drawn, ReferenceViews


class Album:
    """Pass :meth:`keep` to what measures; then ``rows`` (of every view) and ``views`` (of a few) are there.

    ``names`` are those of the reference and of what is compared with it.
    """

    def __init__(self, names: tuple[str, str] = ("teacher", "student")) -> None:
        self.names = names
        self.rows: list[dict[str, Any]] = []
        self.views: list[View] = []

    def keep(self, reference: ReferenceViews, pictures: Sequence[Drawn]) -> None:
        """Note the figures of every view, and the pictures of the worst, the best, and some between."""
        one, two = self.names
        width = max(2, len(str(len(pictures) - 1)))
        self.rows = [{"name": f"view {n:0{width}d}", **row} for n, row in enumerate(reference.rows(pictures))]
        self.views = []
        for n in choose([row["psnr"] for row in self.rows]):
            image, opacity, depth = pictures[n]
            self.views.append(
                View(
                    self.rows[n]["name"],
                    {one: reference.images[n], two: image},
                    {one: reference.depth[n], two: depth},
                    {one: reference.opacity[n], two: opacity},
                )
            )
