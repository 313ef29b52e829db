"""What the teacher is asked: a scouting pass, then rays through what it saw, then more where a run goes on."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pvdconvert import memory, stopwatch
from pvdconvert.distill.label import SIDED, SIDES, focus, label, latest, merge, visible_cells
from pvdconvert.distill.scratch import IN_MEMORY, Scratch
from pvdconvert.distill.seen import Seen
from pvdconvert.distill.store import Store
from pvdconvert.prepare import Prepared
from pvdconvert.progress import Progress
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.render.trace import CANDIDATES
from pvdconvert.report import StageReport
from pvdconvert.scene import Box

if TYPE_CHECKING:
    from pvdconvert.distill.parallel import Ranks

MAX_SAMPLES = 14_000_000
HELD = 4
"""Stores of that size that later rounds may add up to, where memory has room for them."""
FEWEST_SAMPLES = 500_000
SCOUT_SHARE = 0.2

BYTES, MAPPED = 240, 150
"""What a sample of the store costs at the worst moment of a conversion, and what of that stays in memory where the
store is mapped from files: copies that projections and stages make of parts of it."""

STUDENT = 1 << 28
"""Bytes for a student, its gradients and moments, and kernels, beside the store."""

CANDIDATE = 64
"""Bytes of a lattice point while tracing."""

Batches = tuple[int, int]
"""Batches of rays while scouting and after: what a replay repeats."""


@dataclasses.dataclass(frozen=True)
class Room:
    """What a store may take: so many samples, in memory or mapped from files in a folder.

    ``held``: to how many samples later rounds may add; a multiple of the former, for a result that does not hang on how
    much memory happens to be free.
    """

    samples: int = MAX_SAMPLES
    held: int = HELD * MAX_SAMPLES
    scratch: Scratch = IN_MEMORY
    candidates: int = CANDIDATES

    @classmethod
    def of(cls, left: int, folder: Path | None) -> Room:
        """For ``left`` bytes of memory. ``folder`` None: mapping is out of the question."""
        candidates = max(1 << 18, min(CANDIDATES, left // 8 // CANDIDATE))
        if left >= MAX_SAMPLES * BYTES or folder is None:
            samples = max(FEWEST_SAMPLES, min(MAX_SAMPLES, left // BYTES))
            return cls(samples, samples * max(1, min(HELD, left // BYTES // samples)), IN_MEMORY, candidates)
        disk = shutil.disk_usage(folder).free // 2 // BYTES
        samples = min(MAX_SAMPLES, left // MAPPED, disk)
        if samples <= left // BYTES:  # the disk is no help
            samples, folder = left // BYTES, None
        samples = max(FEWEST_SAMPLES, samples)
        return cls(samples, samples, IN_MEMORY if folder is None else Scratch(folder), candidates)

    def told(self, adds: bool) -> str | None:
        """What a report says of it, ``adds`` if later rounds follow; None where it is as usual."""
        usual = Room()
        if self == (usual if adds else dataclasses.replace(usual, held=self.held)):
            return None
        return f"memory: {self}" + (f"; {self.held / 1e6:.1f} M with those of later rounds" if adds else "")

    def __str__(self) -> str:
        where = "" if self.scratch.folder is None else ", mapped from files"
        return f"{self.samples / 1e6:.1f} M of the teacher's answers at most{where}"


def room_for(bound: int | None, device: torch.device, folder: Path | None, among: int = 1) -> Room:
    """What a store may take of ``bound`` bytes for the whole process, or (None) of what is free.

    folder  where files may be mapped from;  among  processes that share the machine
    """
    if device.type == "cuda":
        left = torch.cuda.mem_get_info(device)[0]
        return Room.of(int(0.9 * left if bound is None else min(left, bound)) - STUDENT, None)
    now = memory.resident()
    if bound is None:
        there = memory.free()
        return Room() if there is None else Room.of(int(0.9 * there / among) - STUDENT, folder)
    return Room.of(bound - now - STUDENT, folder)


class Asking:
    """Asks ``prepared`` along rays; the same seed and batches give the same store."""

    def __init__(
        self, prepared: Prepared, seed: int, progress: Progress, ranks: Ranks | None = None, room: Room | None = None
    ) -> None:
        self.prepared, self.shell = prepared, prepared
        self.seed, self.progress, self.ranks = seed, progress, ranks
        self.room = room or Room()
        self.batches: Batches = (0, 0)
        self.cells: Occupancy | None = None
        self.seen: Seen | None = None
        self.around: Box | None = None

    def first(self, seconds: float, fixed: Batches | None = None) -> tuple[Store, StageReport]:
        """Scout, then trace many more rays through nothing but the surroundings of what was seen.

        fixed  exactly these batches, whatever the clock says
        """
        clock = stopwatch.now()
        scouts, rest = (None, None) if fixed is None else fixed
        self.progress.stage("scout", SCOUT_SHARE * seconds)
        few, scouted = self._trace(self.prepared, SCOUT_SHARE * seconds, self.room.samples // 4, scouts, 0)
        self.progress.stage("labels", (1.0 - SCOUT_SHARE) * seconds)
        self.shell = dataclasses.replace(self.prepared, occupancy=visible_cells(few, grow=2))
        if self.prepared.scene.ray_space.kind != "contracted":
            self.seen = Seen.of(few, SIDED, self.prepared.occupancy.cell)
        left = seconds - (stopwatch.now() - clock)
        many, asked = self._trace(self.shell, left, self.room.samples - len(few), rest, scouted)
        store = merge(few, many, self.room.scratch)
        self.batches = (scouted, asked)
        note = f"{store.rays} rays with {len(store)} samples, {len(store.many)} of them seen from {SIDES} sides more"
        return store, StageReport("labels", asked, asked, stopwatch.now() - clock, note=note)

    def more(self, seconds: float, batches: int | None, first: int, held: Store) -> tuple[Store, int]:
        """New answers from batch ``first`` on, focused, behind as many of the latest of ``held`` as there is room for:
        (store, batches asked). Empties ``held``."""
        self.progress.stage("labels", seconds)
        store, done = self._trace(self.shell, seconds, self.room.samples, batches, first)
        store = self.focus(store, seed=self.seed + first)
        kept = latest(held, self.room.held - len(store))
        held.clear()
        return merge(kept, store, self.room.scratch), done

    def aim(self, cells: Occupancy, around: Box | None) -> None:
        """What :meth:`focus` keeps from now on: ``cells``, and free points in ``around`` for a student without mask."""
        self.cells, self.around = cells, around

    def focus(self, store: Store, *, seed: int) -> Store:
        """``store`` cut down to what a student that was restricted to the cells can answer. Empties it on the way."""
        assert self.cells is not None
        return focus(store, cells=self.cells, around=self.around, seed=seed, scratch=self.room.scratch)

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
            scratch=self.room.scratch,
            candidates=self.room.candidates,
            seen=self.seen,
        )
