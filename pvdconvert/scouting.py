"""Before training: where the scene is, how fine a field of it may be, and a start for one.

A coarse voxel field learns the geometry from the pixels (distill/scout.py). What it shows decides which cells the
architecture is restricted to, and it stands for the teacher wherever a contract asks for one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from pvdconvert.distill.distiller import Stopped
from pvdconvert.distill.framing import footprint
from pvdconvert.distill.label import focus, label
from pvdconvert.distill.photometric import Photometric
from pvdconvert.distill.raybank import RayBank
from pvdconvert.distill.sampling import segments
from pvdconvert.distill.scout import Scout, ScoutField
from pvdconvert.errors import Interrupted, RequestError
from pvdconvert.field import RadianceField
from pvdconvert.loading import to_device
from pvdconvert.plugin import Architecture, ArchitectureBase, TeacherFacts
from pvdconvert.progress import Progress
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.render.occupy import dilate, grid_over, resample, split, tight
from pvdconvert.report import StageReport
from pvdconvert.scene import Box, Scene
from pvdconvert.settings import PRESETS

GRID, FINEST = 64, 256
"""Cells along the longest side of the box: of the scout, and at most of what a student is restricted to."""

LIVE = 128
"""Cells along it in which training looks for what is occupied."""

SCOUT_STEP = 0.75
"""Distance of the scout's samples, in cells."""

PARTS = 2
"""Parts of the scout's run; what the second one sees is the scene."""

FITS = {"fast": 160.0, "balanced": 480.0}
"""Pixels across what is occupied up to which a larger preset would only learn noise."""


def whole(box: Box, device: torch.device) -> Occupancy:
    """Every cell of ``box``."""
    grid = grid_over(box, GRID, device)
    grid.grid.fill_(1)
    return grid


def find(
    bank: RayBank,
    scene: Scene,
    *,
    seconds: float,
    seed: int,
    device: torch.device,
    progress: Progress,
    steps: Mapping[str, tuple[int, int]] | None = None,
    stop: Callable[[], bool],
    clock: Callable[[], float],
) -> tuple[ScoutField, Occupancy, list[StageReport]]:
    """The coarse field, the cells of its that some pixel showed (and their neighbours), and what was done.

    Raises RequestError where the pictures show nothing in the box.
    """
    cells = whole(scene.box, device)
    rays = bank.take(0, 1 << 12)
    way = segments(rays.o, rays.d, scene, scene.box)
    if not bool((way.t1 > way.t0).any()):
        raise RequestError(
            f"no picture looks into the box {scene.box.min} .. {scene.box.max}",
            hint="is the box right? give --bounds x0,y0,z0,x1,y1,z1",
        )
    field = to_device(ScoutField(scene), device.type if device.index is None else str(device)).train()
    assert isinstance(field, ScoutField)
    trainer = Photometric(
        Scout(),
        field,
        bank,
        scene,
        cells,
        step=SCOUT_STEP * cells.cell,
        seed=seed,
        progress=progress,
        stop=stop,
        clock=clock,
    )

    def watch() -> None:
        if trainer.seen is None:
            trainer.seen = torch.zeros_like(cells.grid)

    try:
        trainer.run("scout", seconds, parts=PARTS, steps=steps, watch=watch)
    except Stopped:
        raise Interrupted("stopped while looking for the scene", hint="there is nothing to resume yet") from None
    assert trainer.seen is not None
    seen = Occupancy(cells.origin, cells.cell, dilate(trainer.seen))
    if not seen.count:
        raise RequestError(
            f"the pictures show nothing but background in the box {scene.box.min} .. {scene.box.max}",
            hint="is the box right? give --bounds x0,y0,z0,x1,y1,z1",
        )
    return field.eval(), tight(seen), trainer.reports


def refined(seen: Occupancy, bank: RayBank, scene: Scene, cells: int | None) -> Occupancy:
    """``seen`` in cells as small as the pictures' pixels deserve, or ``cells`` along the scene's box."""
    if cells is not None:
        return tight(resample(seen, grid_over(scene.box, cells, seen.origin.device)))
    pixel = footprint(bank.cameras, seen.box, scene.ray_space)
    factor = 1
    while 2 * factor * GRID <= FINEST and seen.cell / factor > 1.5 * pixel:
        factor *= 2
    return split(seen, factor)


def facts(scene: Scene, cells: Occupancy) -> TeacherFacts:
    """What a planner is told."""
    return TeacherFacts(scene, cells.box, cells.count, cells.count, cells.cell, occupancy=cells)


def fitting(preset: str, bank: RayBank, known: TeacherFacts) -> tuple[str, float]:
    """A preset no finer than the pictures, and the pixels across what is occupied."""
    box = known.occupied_box
    across = box.longest / footprint(bank.cameras, box, known.scene.ray_space)
    names = list(PRESETS)
    fits = next((n for n, most in FITS.items() if across <= most), names[-1])
    return min(preset, fits, key=names.index), across


def start_from(
    scout: ScoutField,
    seen: Occupancy,
    architecture: Architecture,
    student: RadianceField,
    cells: Occupancy,
    *,
    scene: Scene,
    seconds: float,
    seed: int,
    progress: Progress,
) -> str | None:
    """Start ``student`` from the coarse field where the architecture has a closed form; one line on it, or None."""
    if getattr(type(architecture), "project", None) is ArchitectureBase.project:
        return None
    progress.stage("projection", None)
    store, _ = label(
        scout,
        scene,
        seen,
        step=seen.cell,
        seconds=0.0,
        max_samples=1 << 22,
        batches=1,
        seed=seed,
        cameras=scene.cameras,
        progress=progress,
        device=seen.origin.device,
    )
    around = None if student.support() is not None else scene.box
    return architecture.project(student, focus(store, cells=cells, seed=seed, around=around), seconds)


def searched(student: RadianceField, seen: Occupancy, cells: Occupancy, scene: Scene) -> Occupancy:
    """The cells in which training draws samples: those of the student, no finer than :data:`LIVE`, or the whole box if
    it has none."""
    if student.support() is None:
        return whole(scene.box, cells.origin.device)
    coarse = scene.box.longest / LIVE
    return cells if cells.cell > 0.99 * coarse else split(seen, max(1, round(seen.cell / coarse)))
