"""A teacher's pictures, rendered once, and what is left of its occupancy when only what shows is kept."""

from __future__ import annotations

import dataclasses
from typing import Any

from pvdconvert.distill.fog import clear
from pvdconvert.distill.label import label
from pvdconvert.field import RadianceField
from pvdconvert.metrics import QUICK_COUNT, QUICK_SIZE, ReferenceViews, views
from pvdconvert.prepare import Prepared
from pvdconvert.progress import Progress, Silent
from pvdconvert.render.occupancy import Occupancy

SEED = 41
"""Of the quick views; those of ``fidelity/1`` have their own."""

SCOUT_BATCHES, SCOUT_SEED = 2, 97

UNCHANGED = 50.0
"""dB between pictures that differ by less than a byte shows."""

FEWER: dict[str, Any] = {"count": QUICK_COUNT, "size": QUICK_SIZE}
"""The quick views: 4 at 100 px."""


def reference(prepared: Prepared, **options: Any) -> ReferenceViews:
    """The teacher's side of ``fidelity/1`` (options of :func:`pvdconvert.metrics.views`)."""
    return views(
        prepared.field,
        prepared.scene,
        occupancy=prepared.occupancy,
        box=prepared.box,
        step=prepared.step,
        **options,
    )


def see_through(prepared: Prepared, progress: Progress | None = None) -> tuple[Prepared, ReferenceViews, str]:
    """Cut occupancy back to what a few rays show (distill/fog.py), and check with pictures what that changes.

    Returns the prepared field, its quick views, and one line for the report ("" where there was no fog). Where there is
    no fog and yet the pictures change, scouting missed something and nothing is cut.
    """
    scouted, _ = label(
        prepared.field,
        prepared.scene,
        prepared.occupancy,
        step=prepared.step,
        seconds=0.0,
        max_samples=0,
        batches=SCOUT_BATCHES,
        seed=SCOUT_SEED,
        cameras=prepared.scene.cameras,
        progress=progress or Silent(),
        device=prepared.device,
    )
    cleared = clear(scouted)
    smaller = dataclasses.replace(prepared, occupancy=cleared.occupancy, box=cleared.occupancy.box)
    after = reference(smaller, seed=SEED, **FEWER)
    before = reference(prepared, cameras=after.cameras)
    changed = before.measure(list(zip(after.images, after.opacity, after.depth))).psnr
    if cleared.fog == 0 and changed < UNCHANGED:
        return prepared, reference(prepared, seed=SEED, **FEWER), ""
    text = f"fog: {cleared.fog} cells of the background's own colour are seen through; with against without them: "
    return smaller, after, f"{text}{changed:.1f} dB" if cleared.fog else ""


class QuickScore:
    """dB of a student on the quick views: called by the stages."""

    def __init__(self, quick: ReferenceViews, student: RadianceField, cells: Occupancy) -> None:
        self.quick, self.student, self.cells = quick, student, cells

    def __call__(self) -> float:
        was = self.student.training
        score = self.quick.compare(self.student.eval(), self.cells).psnr
        self.student.train(was)
        return float(score)
