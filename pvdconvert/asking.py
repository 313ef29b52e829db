"""What the teacher is asked: a scouting pass, then rays through what it saw, then more where a run goes on."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING

from pvdconvert.distill.label import SIDES, focus, label, merge, visible_cells
from pvdconvert.distill.store import Store
from pvdconvert.prepare import Prepared
from pvdconvert.progress import Progress
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.report import StageReport
from pvdconvert.scene import Box

if TYPE_CHECKING:
    from pvdconvert.distill.parallel import Ranks

MAX_SAMPLES = 14_000_000
SCOUT_SHARE = 0.2

Batches = tuple[int, int]
"""Batches of rays while scouting and after: what a replay repeats."""


class Asking:
    """Asks ``prepared`` along rays; the same seed and batches give the same store."""

    def __init__(self, prepared: Prepared, seed: int, progress: Progress, ranks: Ranks | None = None) -> None:
        self.prepared, self.shell = prepared, prepared
        self.seed, self.progress, self.ranks = seed, progress, ranks
        self.batches: Batches = (0, 0)
        self.cells: Occupancy | None = None
        self.around: Box | None = None

    def first(self, seconds: float, fixed: Batches | None = None) -> tuple[Store, StageReport]:
        """Scout, then trace many more rays through nothing but the surroundings of what was seen.

        fixed  exactly these batches, whatever the clock says
        """
        clock = time.perf_counter()
        scouts, rest = (None, None) if fixed is None else fixed
        self.progress.stage("scout", SCOUT_SHARE * seconds)
        few, scouted = self._trace(self.prepared, SCOUT_SHARE * seconds, MAX_SAMPLES // 4, scouts, 0)
        self.progress.stage("labels", (1.0 - SCOUT_SHARE) * seconds)
        self.shell = dataclasses.replace(self.prepared, occupancy=visible_cells(few, grow=2))
        left = seconds - (time.perf_counter() - clock)
        many, asked = self._trace(self.shell, left, MAX_SAMPLES - len(few), rest, scouted)
        store = merge(few, many)
        self.batches = (scouted, asked)
        note = f"{store.rays} rays with {len(store)} samples, {len(store.many)} of them seen from {SIDES} sides more"
        return store, StageReport("labels", asked, asked, time.perf_counter() - clock, note=note)

    def more(self, seconds: float, batches: int | None, first: int) -> tuple[Store, int]:
        """New answers from batch ``first`` on, focused: (store, batches asked)."""
        self.progress.stage("labels", seconds)
        store, done = self._trace(self.shell, seconds, MAX_SAMPLES, batches, first)
        return self.focus(store, seed=self.seed + first), done

    def aim(self, cells: Occupancy, around: Box | None) -> None:
        """What :meth:`focus` keeps from now on: ``cells``, and free points in ``around`` for a student without mask."""
        self.cells, self.around = cells, around

    def focus(self, store: Store, *, seed: int) -> Store:
        """``store`` cut down to what a student that was restricted to the cells can answer."""
        assert self.cells is not None
        return focus(store, cells=self.cells, around=self.around, seed=seed)

    def _trace(
        self, prepared: Prepared, seconds: float, most: int, batches: int | None, first: int
    ) -> tuple[Store, int]:
        return label(
            prepared.field,
            prepared.scene,
            prepared.occupancy,
            step=prepared.step,
            seconds=seconds,
            max_samples=most,
            batches=batches,
            first=first,
            seed=self.seed,
            cameras=prepared.scene.cameras,
            progress=self.progress,
            device=prepared.device,
            ranks=self.ranks,
        )
