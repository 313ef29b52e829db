"""Real pictures beside a conversion: what teacher and student are worth on them, and polishing the student on them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pvdconvert.data import Dataset
from pvdconvert.data.opening import open_dataset
from pvdconvert.distill.photometric import Photometric
from pvdconvert.distill.raybank import RayBank
from pvdconvert.errors import RequestError
from pvdconvert.evaluation import evaluate
from pvdconvert.field import RadianceField
from pvdconvert.loading import Loaded
from pvdconvert.placing import pixel_offset, placed
from pvdconvert.plugin import Architecture
from pvdconvert.prepare import Prepared
from pvdconvert.progress import Progress
from pvdconvert.registry import Registry
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.render.occupy import resample
from pvdconvert.report import StageReport
from pvdconvert.scouting import whole

VIEWS, SIZE = 4, 200
"""Pictures that a conversion is judged by, and pixels of their longer side: a slow teacher renders them too."""

SHARE = 0.25
"""Of the budget: the time for polishing."""

POLISH = "photometric"
"""Name of the stage."""
STEP = 0.6
"""Distance of samples, in cells."""

RATE = 0.3
"""Learning rates of polishing, as a share of those that a field is trained with from nothing."""


@dataclasses.dataclass(frozen=True)
class Reality:
    """What was asked for; :meth:`of` brings it to a teacher.

    dataset   pictures of the scene; nothing of ``split`` is ever trained on
    views     how many of the split, evenly spaced, or their names
    size      pixels of the longer side; None = as they are
    polish    go on training the student on the pictures of the split "train"
    """

    dataset: Dataset
    split: str = "test"
    views: int | tuple[str, ...] | None = VIEWS
    size: int | None = SIZE
    polish: bool = False

    @classmethod
    def of(
        cls, images: Reality | Dataset | str | Path, loaded: Loaded, registry: Registry, *, polish: bool = False
    ) -> Reality:
        """:meth:`beside` a teacher, of a dataset or its path. Raises the errors of opening it, too."""
        if not isinstance(images, Reality):
            if not isinstance(images, Dataset):
                images = open_dataset(images, ndc=True if loaded.scene.ray_space.kind == "ndc" else None)
            images = cls(images, polish=polish)
        return images.beside(loaded, registry)

    def beside(self, loaded: Loaded, registry: Registry) -> Reality:
        """The same in the teacher's world, with rays through pixels as its program has them.

        Raises RequestError where the pictures live elsewhere, UsageError where they have no such split.
        """
        offset, _ = pixel_offset(loaded.format, loaded.parts.provenance, registry)
        there = placed(self.dataset, loaded.scene, offset)
        there.split(self.split)
        if self.polish:
            if self.split == "train":
                raise RequestError("a student cannot be judged by the pictures it is polished on", hint="another split")
            there.split("train")
        return dataclasses.replace(self, dataset=there)

    @property
    def share(self) -> float:
        """Share of a conversion's budget that polishing takes."""
        return SHARE if self.polish else 0.0

    @property
    def stage(self) -> str:
        """The name of polishing among the stages."""
        return POLISH

    @property
    def origin(self) -> dict[str, Any]:
        """What a polished student has learned from besides its teacher: JSON."""
        frames = self.dataset.split("train")
        return {"images": self.dataset.path.name, "format": self.dataset.kind, "split": "train", "frames": len(frames)}

    def judge(self, prepared: Prepared, progress: Progress) -> dict[str, Any]:
        """What the field is worth on the real pictures: a JSON object (:meth:`Evaluation.to_json`)."""
        return evaluate(
            prepared,
            self.dataset,
            self.split,
            views=self.views,
            size=self.size,
            progress=progress,
        ).to_json()

    def columns(self, teacher: Prepared, student: Prepared | None, progress: Progress) -> dict[str, Any]:
        """The report's ``images``: "teacher" and "student", which without ``student`` is the same field."""
        first = self.judge(teacher, progress)
        second = first if student is None else self.judge(student, progress)
        notes = list(dict.fromkeys([*first.pop("notes", []), *second.pop("notes", [])]))
        return {"teacher": first, "student": second, "notes": notes}

    def polished(
        self,
        architecture: Architecture,
        student: RadianceField,
        cells: Occupancy,
        prepared: Prepared,
        *,
        seconds: float,
        fixed: tuple[int, int] | None,
        seed: int,
        progress: Progress,
        stop: Callable[[], bool],
    ) -> StageReport:
        """Train ``student`` on real pixels of the split "train", in place; undone where pixels set aside get worse.

        ``fixed`` = (steps run, planned) of a replay. Raises :class:`pvdconvert.distill.distiller.Stopped`.
        """
        scene = prepared.scene
        if scene.background is None:
            scene = dataclasses.replace(scene, background=self.dataset.background)
        bank = RayBank(
            self.dataset.split("train"),
            held=self.dataset.splits.get("val", ()) if self.split != "val" else (),
            seed=seed,
            device=prepared.device,
            progress=progress,
        )
        # The student's cells, on the coarser grid of what its teacher occupies; where it has none, the whole box.
        bare = student.support() is None
        where = whole(scene.box, prepared.device) if bare else resample(cells, prepared.occupancy)
        before = copy.deepcopy(student.state_dict())
        trainer = Photometric(
            architecture,
            student.train(),
            bank,
            scene,
            where,
            step=STEP * where.cell,
            seed=seed,
            progress=progress,
            factor=RATE,
            stop=stop,
        )
        steps = None if fixed is None else {POLISH: fixed}
        report = trainer.run(POLISH, seconds, parts=1, steps=steps)[-1]
        report.note = f"{len(self.dataset.split('train'))} real pictures, split train; dB on pixels of them set aside"
        gained = (report.psnr_after or 0.0) - (report.psnr_before or 0.0)
        if gained < 0:
            student.load_state_dict(before)
            report.psnr_after = report.psnr_before
            report.note += f"; undone: it would have cost {-gained:.2f} dB"
        student.eval()
        return report
