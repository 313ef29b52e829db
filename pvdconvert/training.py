"""Training a field of any architecture from posed pictures: read -> scout -> plan -> train -> write.

A coarse voxel field finds out where the scene is; the architecture is then planned, built and restricted to it as a
student of that field would be, started from it where there is a closed form, and trained on the pixels themselves.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pvdconvert import __version__, scouting, stopwatch
from pvdconvert import registry as registries
from pvdconvert.conversion import Conversion
from pvdconvert.data import Dataset, Frame
from pvdconvert.distill import resume as resuming
from pvdconvert.distill.distiller import Stopped
from pvdconvert.distill.framing import border_color, box_of_cameras
from pvdconvert.distill.photometric import PARTS, SAMPLINGS, Photometric, Sampling
from pvdconvert.distill.raybank import RayBank, teacher_dataset
from pvdconvert.errors import DeviceError, Interrupted, RequestError, UsageError
from pvdconvert.field import RadianceField
from pvdconvert.loading import to_device
from pvdconvert.plugin import ArrayTensor, Budget, Parts
from pvdconvert.progress import Progress, Silent
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.report import Report, StageReport
from pvdconvert.scene import Box, Scene, Vec3
from pvdconvert.settings import Settings, parse_sets, rehearse
from pvdconvert.writing import byte_count, write_checked

SCOUT_SHARE, SCOUT_MOST = 0.1, 60.0
"""Share of the budget for finding out where the scene is, and most seconds for it."""

STEP = 0.6
"""Distance of samples, in cells."""

CAMERAS = 100
"""Cameras that are written with the field, at most."""

__all__ = ["Training", "parse_steps", "teacher_dataset", "train"]

Watch = Callable[["Photometric", float], None]
"""Called after each part of a run with the trainer and the seconds spent so far."""


def train(
    dataset: Dataset | str | Path,
    to: str,
    *,
    out: str | Path | None = None,
    as_: str | None = None,
    preset: str = "balanced",
    budget: float | None = None,
    max_mb: float | None = None,
    sets: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str = "auto",
    split: str = "train",
    background: Vec3 | None = None,
    bounds: Box | None = None,
    near: float | None = None,
    far: float | None = None,
    sampling: Sampling = "occupancy",
    steps: str | None = None,
    force: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    stop: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = stopwatch.now,
    watch: Watch | None = None,
    registry: registries.Registry | None = None,
) -> Report:
    """Train a field of architecture ``to`` on the pictures of ``dataset`` and write it to ``out`` (None: nowhere).

    dataset     a path that :func:`pvdconvert.data.opening.open_dataset` opens, or what it answers
    budget      seconds of ``clock`` for everything; None = the preset's
    background  what lies behind the scene, RGB in [0, 1]; None = what the dataset says, or what the borders show
    bounds      the box, world units; None = the dataset's, or what the cameras look at
    near, far   distances along rays, world units; None = the dataset's
    sampling    "occupancy", or "hierarchical": two passes along the whole ray, a coarse and a fine field, nothing known
                of what is empty (Mildenhall et al. 2020): the baseline
    steps       a report's ``replay``: run exactly these steps, whatever the clock says
    resume      go on from ``OUT.resume/`` that an interrupted run left
    stop        asked after every step; true interrupts the run

    Returns the report: schema as of a conversion, with dB on pixels that were set aside in place of dB against a
    teacher. Raises the errors of :mod:`pvdconvert.errors`.
    """
    if sampling not in SAMPLINGS:
        raise UsageError(f"sampling {sampling!r}: unknown", hint=f"known: {', '.join(SAMPLINGS)}")
    if near is not None and far is not None and near >= far:
        raise UsageError(f"near {near:g} is not before far {far:g}")
    run = Training(
        Settings(to, preset, budget, max_mb, parse_sets(sets or {}), seed, device, as_),
        Path(out) if out is not None else None,
        progress or Silent(),
        registry or registries.default(),
        stop,
    )
    run.clock, run.sampling, run.watch = clock, sampling, watch
    try:
        run.check(force=force, resume=resume)
        run.fixed = None if steps is None else parse_steps(steps)
        if not isinstance(dataset, Dataset):
            from pvdconvert.data.opening import open_dataset

            dataset = open_dataset(dataset, background=background, bounds=bounds)
        asked = Asked(split, background, bounds, near, far)
        return run.train(dataset, asked, resume=resume)
    except torch.OutOfMemoryError as error:
        raise DeviceError(f"out of memory on {run.device}", hint="--device cpu, or a smaller --preset") from error
    except MemoryError as error:
        raise DeviceError("out of memory", hint="a smaller --preset or --max-mb") from error
    finally:
        run.progress.close()


def parse_steps(text: str) -> dict[str, tuple[int, int]]:
    """name -> (steps run, planned) of a report's ``replay``. Raises UsageError where it is none."""
    try:
        parts = {n: v.partition("/") for n, _, v in (p.partition("=") for p in text.split(";"))}
        found = {name: (int(run), int(planned or run)) for name, (run, _, planned) in parts.items()}
        if not all(0 <= run <= planned for run, planned in found.values()):
            raise ValueError(text)
    except ValueError as error:
        raise UsageError(f"steps {text!r} are not a replay: {error}", hint="copy 'replay' from a report") from error
    return found


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the user says about the pictures; None = not given."""

    split: str
    background: Vec3 | None
    bounds: Box | None
    near: float | None
    far: float | None


class Training(Conversion):
    """One training: checks (those of a conversion), steps and report."""

    clock: Callable[[], float] = staticmethod(stopwatch.now)
    sampling: Sampling = "occupancy"
    watch: Watch | None = None
    fixed: dict[str, tuple[int, int]] | None = None

    def train(self, dataset: Dataset, asked: Asked, *, resume: bool) -> Report:
        s, report = self.settings, self.report
        self.start = self.clock()
        frames = dataset.split(asked.split)
        held = dataset.splits.get("val", ()) if asked.split == "train" else ()
        self.bank = RayBank(frames, held=held, seed=s.seed, device=self.device, progress=self.progress)
        self.scene = self._scene_of(dataset, frames, asked)
        sha256 = fingerprint(dataset, asked.split)
        report.source = {
            "path": str(dataset.path),
            "format": dataset.kind,
            "split": asked.split,
            "frames": len(frames),
            "pixels": sum(f.camera.width * f.camera.height for f in frames),
            "sha256": sha256,
        }
        report.notes += [*dataset.notes]
        which = "the split val" if held else "the same pictures, never trained on"
        report.notes.append(f"trained on split {asked.split}; dB are on {len(self.bank.held)} pixels of {which}")
        rehearse(s, self.architecture, self.scene, self.limits)
        state = resuming.load(resuming.folder(self.out), s, sha256) if resume and self.out else None
        trainer = self._fresh_trainer() if state is None else self._resumed_trainer(state)
        try:
            left = s.seconds - self._spent() - self._reserve()
            trainer.run("train", max(1.0, left), steps=self.fixed, watch=lambda: self._watched(trainer))
        except Stopped:
            self._keep_for_later(trainer, sha256)
        report.stages += trainer.reports
        report.replay = ";".join(f"{r.name}={r.steps}/{r.planned}" for r in report.stages if r.planned)
        report.plan["rays"] = trainer.drawn
        self.student = trainer.student.eval()
        self._write_trained(trainer.student, dataset)
        if self.out is not None:
            resuming.remove(self.out)
        return self._finish()

    def _spent(self) -> float:
        return self.clock() - self.start

    def _reserve(self) -> float:
        """Seconds for writing and reading back."""
        return min(2.0, 0.02 * self.settings.seconds)

    def _watched(self, trainer: Photometric) -> None:
        if self.watch is not None:
            self.watch(trainer, self._spent())

    # -- the scene ---------------------------------------------------------------------------------------------------

    def _scene_of(self, dataset: Dataset, frames: Sequence[Frame], asked: Asked) -> Scene:
        cameras = [f.camera for f in frames]
        near = dataset.near if asked.near is None else asked.near
        far = dataset.far if asked.far is None else asked.far
        if dataset.ray_space.kind == "ndc":
            near, far = 0.0, 1.0
        box = asked.bounds or dataset.box
        if box is None:
            box = box_of_cameras(cameras, near, far, dataset.ray_space)
            self.report.notes.append(f"the box is what the cameras look at: {_numbers(box.min)} .. {_numbers(box.max)}")
        background = asked.background or dataset.background
        if background is None and not self.bank.alpha:
            background = border_color(frames)
            self.report.notes.append(f"the background is what the pictures' borders show: {_numbers(background)}")
        few = cameras[:: -(-len(cameras) // CAMERAS)]
        return Scene(
            box=box,
            background=background,
            near=near,
            far=far,
            ray_space=dataset.ray_space,
            cameras=tuple(few),
        )

    # -- where it is, and what is built there ------------------------------------------------------------------------

    def _photometric(
        self, student: RadianceField, cells: Occupancy, coarse: RadianceField | None = None
    ) -> Photometric:
        return Photometric(
            self.architecture,
            student,
            self.bank,
            self.scene,
            cells,
            step=STEP * cells.cell,
            seed=self.settings.seed,
            progress=self.progress,
            coarse=coarse,
            stop=self.stop,
            clock=self.clock,
        )

    def _fresh_trainer(self) -> Photometric:
        s, where = self.settings, torch.device(self.device)
        if self.sampling == "hierarchical":
            return self._without_cells(scouting.whole(self.scene.box, where))
        scout, seen, reports = scouting.find(
            self.bank,
            self.scene,
            seconds=min(SCOUT_SHARE * s.seconds, SCOUT_MOST),
            seed=s.seed,
            device=where,
            progress=self.progress,
            steps=self.fixed,
            stop=self.stop,
            clock=self.clock,
        )
        self.report.stages += reports
        cells = scouting.refined(seen, self.bank, self.scene, self.limits.cells)
        student = self._student_of(cells)
        student.restrict(cells)
        self._describe(cells, student)
        begin = self.clock()
        line = scouting.start_from(
            scout,
            seen,
            self.architecture,
            student,
            cells,
            scene=self.scene,
            seconds=0.05 * s.seconds,
            seed=s.seed,
            progress=self.progress,
        )
        if line is not None:
            self.report.stages.append(StageReport("projection", seconds=self.clock() - begin, note=line))
        return self._photometric(student, scouting.searched(student, seen, cells, self.scene))

    def _without_cells(self, cells: Occupancy) -> Photometric:
        student = self._student_of(cells)
        self._describe(cells, student)
        self.report.plan["sampling"] = self.sampling
        return self._photometric(student, cells, self._build(self.settings.seed + 1))

    def _student_of(self, cells: Occupancy) -> RadianceField:
        """A fresh student, no finer than the pictures."""
        s, known = self.settings, scouting.facts(self.scene, cells)
        preset, across = scouting.fitting(s.preset, self.bank, known)
        if preset != s.preset:
            self.report.notes.append(f"planned as for preset {preset}: the scene is {across:.0f} pixels across")
        self.config = self.architecture.plan(known, Budget(preset, s.seconds, s.max_mb), self.limits, s.sets)
        return self._build(s.seed)

    def _build(self, seed: int) -> RadianceField:
        return to_device(self.architecture.build(self.config, self.scene, seed), self.device).train()

    def _describe(self, cells: Occupancy, student: RadianceField) -> None:
        self.report.plan = {
            "kind": "train",
            "config": self.config,
            "box": self.scene.box.to_json(),
            "occupied_box": cells.box.to_json(),
            "surface_cells": cells.count,
            "pixels": len(self.bank),
            "seconds": None if self.fixed else self.settings.seconds,
        }
        size = byte_count(self.architecture.save(student)[1])
        self.report.target = {"architecture": self.settings.to, "config": self.config, "bytes": size}

    # -- resume and writing ------------------------------------------------------------------------------------------

    def _keep_for_later(self, trainer: Photometric, sha256: str) -> None:
        at = trainer.position
        where = f"stopped in part {at.stage + 1} of {PARTS} after {at.step} steps"
        if self.out is None or self.sampling == "hierarchical":
            raise Interrupted(where, hint="there is nothing to resume: no output file, or hierarchical sampling")
        folder, reports = resuming.folder(self.out), self.report.stages + trainer.reports
        cells = trainer.cells
        kept = {"config": self.config, "plan": self.report.plan, "origin": cells.origin.tolist(), "cell": cells.cell}
        resuming.save(
            folder,
            self.settings,
            sha256,
            kept,
            trainer,
            self.architecture,
            (0, 0),
            reports,
            self._spent(),
            extra=trainer.extra(),
        )
        raise Interrupted(where, hint=f"the same command with --resume goes on from {folder}")

    def _resumed_trainer(self, state: resuming.State) -> Photometric:
        """The trainer as it was when it was interrupted."""
        kept, extra = state.config, state.extra
        self.config, self.report.plan = kept["config"], kept["plan"]
        weights = {k.removeprefix("student."): v for k, v in state.tensors.items() if k.startswith("student.")}
        student = self.architecture.load(state.student, weights, self.scene)
        student = to_device(student, self.device).train()
        where = torch.device(self.device)
        origin = torch.tensor(kept["origin"], dtype=torch.float32, device=where)
        trainer = self._photometric(student, Occupancy(origin, float(kept["cell"]), extra["cells"].to(where)))
        state.restore(trainer, self.architecture, self.scene)
        trainer.take_up(extra)
        self.report.stages += [r for r in state.reports if not r.name.startswith("train-")]
        trainer.reports = [r for r in state.reports if r.name.startswith("train-")]
        self.start -= state.elapsed
        return trainer

    def _write_trained(self, field: RadianceField, dataset: Dataset) -> None:
        config, tensors = self.architecture.save(field)
        bad = [k for k, v in tensors.items() if v.is_floating_point() and not bool(torch.isfinite(v).all())]
        if bad:
            raise RequestError(f"the field's tensor {bad[0]!r} is not a number", hint="try another --seed")
        r = self.report
        provenance = {
            "tool": f"pvdconvert {__version__}",
            "how": "trained from images",
            "images": {k: r.source[k] for k in ("format", "split", "frames", "pixels", "sha256")},
            "settings": {k: v for k, v in self.settings.to_json().items() if k != "device"},
            "replay": r.replay,
            "held_out_psnr": r.stages[-1].psnr_after if r.stages else None,
        }
        arrays = {k: ArrayTensor(v.detach().cpu().contiguous().numpy()) for k, v in tensors.items()}
        parts = Parts(self.settings.to, config, arrays, self.scene, provenance)
        target: dict[str, Any] = {"architecture": self.settings.to, "format": self.layout, "config": config}
        if self.out is not None:
            self.progress.stage("writing", None)
            target |= {"bytes": write_checked(parts, self.out, self.layout, self.registry), "path": str(self.out)}
        else:
            target["bytes"] = byte_count(tensors)
        r.target = target


def fingerprint(dataset: Dataset, split: str) -> str:
    """What a resumed run must find again: the layout, the pictures' names and their cameras."""
    frames = [(f.name, f.camera.to_json()) for f in dataset.split(split)]
    box = None if dataset.box is None else dataset.box.to_json()
    text = json.dumps([dataset.kind, split, box, dataset.near, dataset.far, frames], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _numbers(values: Sequence[float]) -> str:
    return ",".join(f"{v:.4g}" for v in values)
