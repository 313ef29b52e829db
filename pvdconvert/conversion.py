"""One conversion, step by step: occupancy -> label -> plan -> project -> distil -> validate -> write."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pvdconvert import __version__, memory, stopwatch
from pvdconvert import ranks as environment
from pvdconvert import registry as registries
from pvdconvert.asking import Asking, Batches, Room, room_for
from pvdconvert.distill import methods
from pvdconvert.distill import resume as resuming
from pvdconvert.distill.distiller import Distiller, Stopped
from pvdconvert.distill.label import visible_cells
from pvdconvert.distill.rounds import rounds
from pvdconvert.distill.schedule import Replay
from pvdconvert.distill.store import Store
from pvdconvert.errors import Interrupted, QualityError, RequestError, UsageError
from pvdconvert.field import RadianceField
from pvdconvert.loading import Loaded, choose_device, to_device
from pvdconvert.looking import FEWER, QuickScore, reference, see_through
from pvdconvert.metrics import Fidelity, Keep
from pvdconvert.plugin import ArrayTensor, Parts, TeacherFacts
from pvdconvert.prepare import Prepared, prepare
from pvdconvert.progress import Progress
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.report import Report, StageReport
from pvdconvert.scene import Scene
from pvdconvert.settings import BEST_GAIN, BEST_ROUND, BEST_ROUNDS, Settings, rehearse
from pvdconvert.transcode import obstacle, refused, transcode
from pvdconvert.writing import byte_count, check_target, write_checked

if TYPE_CHECKING:
    from pvdconvert.distill.parallel import Ranks
    from pvdconvert.reality import Reality


class Conversion:
    """One conversion: checks, steps and report of :func:`pvdconvert.convert`."""

    def __init__(
        self,
        settings: Settings,
        out: Path | None,
        progress: Progress,
        registry: registries.Registry,
        stop: Callable[[], bool],
    ) -> None:
        self.settings, self.out, self.progress, self.registry, self.stop = settings, out, progress, registry, stop
        self.report = Report(settings=settings.to_json())
        self.spent = stopwatch.Stopwatch()
        self.device = "cpu"
        self.layout = ""
        self.keep: Keep | None = None
        """Told both sides of the validation."""
        self.student: RadianceField | None = None
        self.judge: Prepared | None = None
        """Whose pictures the student is measured by; the teacher's own if nobody else's."""
        self.of_source: dict[str, Any] | None = None
        """Fidelity to the teacher at hand where somebody else judges."""
        self.resumable = True
        self.ranks: Ranks | None = None
        self.reality: Reality | None = None

    def check(self, *, force: bool, resume: bool) -> None:
        """Refuse what cannot work, before any work."""
        s = self.settings
        self.architecture = self.registry.architecture(s.to)
        self.layout = s.layout or self.registry.native()
        spec = self.registry.formats().get(self.layout)
        code = self.registry.format(self.layout)
        if spec is not None and not spec.spec.can_write:
            raise UsageError(f"format {self.layout!r} is read-only", hint="pvdconvert formats lists those that write")
        if spec is not None and not {"*", s.to} & set(spec.spec.written):
            held = ", ".join(spec.spec.written)
            raise UsageError(f"format {self.layout!r} cannot hold {s.to!r}", hint=f"it holds: {held}")
        self.limits = code.limits(s.to)
        self.method, self.method_options = methods.parse(s.method)
        self.replay = None if s.steps is None else Replay.parse(s.steps)
        if self.out is not None:
            check_target(self.out, force=force)
        if resume and not self.method.resumes:
            raise UsageError(f"method {self.method.name!r} cannot resume", hint="start without --resume")
        if resume and (self.out is None or not resuming.folder(self.out).is_dir()):
            raise UsageError(f"nothing to resume beside {self.out}", hint="start without --resume")
        self.device = choose_device(s.device)

    def convert(self, loaded: Loaded, *, dry_run: bool, resume: bool, validate: bool) -> Report:
        s, report = self.settings, self.report
        report.dry_run = dry_run
        report.notes += list(loaded.notes)
        report.source = {
            "path": None if loaded.path is None else str(loaded.path),
            "format": loaded.format,
            "architecture": loaded.architecture,
            "bytes": loaded.bytes,
            "sha256": loaded.sha256,
            "reason": next((c.reason for c in loaded.candidates if c.format == loaded.format), ""),
        }
        if loaded.scene.ray_space.kind == "contracted" and "*" not in self.registry.formats()[self.layout].spec.written:
            raise RequestError(f"format {self.layout!r} cannot hold an unbounded scene", hint="leave --as away")
        if loaded.scene.ray_space.kind == "contracted" and not self.method.unbounded:
            raise RequestError(f"method {s.method} knows no unbounded scenes", hint="leave --method away")
        why = obstacle(loaded.parts, s.to, s.sets, s.max_mb, self.registry)
        if not why:
            try:
                return self._transcode(loaded)
            except RequestError as error:
                why = str(error)
                report.notes.append(f"laying the weights out anew is not enough: {error}")
        if s.exact:
            raise refused(loaded.path or "the source", why)
        rehearse(s, self.architecture, loaded.scene, self.limits)
        prepared = prepare(
            loaded.field,
            loaded.scene,
            device=self.device,
            seed=s.seed,
            seconds=min(6.0, 0.1 * s.seconds),
            progress=self.progress,
        )
        report.notes.append(f"occupancy: {prepared.check}")
        return self._distil(loaded, prepared, dry_run, resume, validate)

    # -- the same architecture: only the layout changes --------------------------------------------------------------

    def _transcode(self, loaded: Loaded) -> Report:
        """Raises RequestError where the layout cannot hold the field exactly."""
        r, out = self.report, None if self.report.dry_run else self.out
        if not self.leads:
            return self._finish()
        config, tensors = self.architecture.save(loaded.field)
        size = transcode(
            loaded.parts, config, tensors, out, self.layout, self.registry, r.source, self.settings.numbers
        )
        r.plan = {"kind": "transcode", "config": dict(config)}
        r.stages.append(StageReport("transcode", note="same architecture: re-laid out, nothing trained"))
        r.target = {"architecture": self.settings.to, "format": self.layout, "config": config, "bytes": size}
        r.target |= {} if out is None else {"path": str(out)}
        if self.reality is not None and not r.dry_run:
            field = prepare(loaded.field, loaded.scene, device=self.device, progress=self.progress)
            r.images = self.reality.columns(field, None, self.progress)
        return self._finish()

    # -- distillation ------------------------------------------------------------------------------------------------

    def _distil(self, loaded: Loaded, prepared: Prepared, dry_run: bool, resume: bool, validate: bool) -> Report:
        s, report = self.settings, self.report
        seconds = s.seconds
        state = resuming.load(resuming.folder(self.out), s, loaded.sha256) if resume and self.out else None
        clock = stopwatch.now()
        prepared, quick, text = see_through(prepared, self.progress)
        if self.ranks is not None:
            report.notes.append(f"{self.ranks.size} processes shared the work")
            prepared = dataclasses.replace(prepared, occupancy=self.ranks.same(prepared.occupancy))
        self.judge = self.judge or prepared
        report.notes += [text] if text else []
        # What the final validation will cost: 16 views of four times the pixels of the two sets just taken.
        cost = 6 * (stopwatch.now() - clock)
        self.full = s.min_psnr is not None or self.replay is not None or cost < 0.5 * seconds
        reserve = min(cost if self.full else cost / 16, 0.5 * seconds) if validate else 0.0
        last = 0.0 if self.reality is None else self.reality.share * seconds
        asking = Asking(prepared, s.seed, self.progress, self.ranks, self._room())
        fixed = None if self.replay is None else (self.replay.scout, self.replay.labels)
        fixed = fixed if state is None else (state.scout, state.labels)
        store, labels = asking.first((0.05 if dry_run else self.method.labels) * seconds, fixed)
        report.stages.append(labels)
        cells = visible_cells(store, factor=self._mask_factor(prepared))
        facts = TeacherFacts(
            scene=loaded.scene,
            occupied_box=cells.box,
            occupied_cells=prepared.occupancy.count,
            surface_cells=cells.count,
            cell=cells.cell,
            architecture=loaded.architecture,
            config=loaded.parts.config,
            occupancy=cells,
        )
        config = state.config if state else self.architecture.plan(facts, s.as_budget(), self.limits, s.sets)
        report.plan = {
            "kind": "distil",
            "config": config,
            "occupied_box": prepared.box.to_json(),
            "surface_cells": cells.count,
            "step": prepared.step,
            "samples": len(store),
            "rays": store.rays,
            "seconds": None if self.replay else seconds,
        }
        student = to_device(self.architecture.build(config, loaded.scene, s.seed), self.device).train()
        student.restrict(cells)
        size = byte_count(self.architecture.save(student)[1])
        report.target = {"architecture": s.to, "config": config, "bytes": size}
        if dry_run:
            return self._finish()
        asking.aim(cells, None if student.support() is not None else loaded.scene.box)
        focused = asking.focus(store, seed=s.seed)
        del store  # memory
        views = QuickScore(quick, student, cells)
        lesson = methods.Lesson(
            self.architecture,
            student,
            focused,
            seed=s.seed,
            progress=self.progress,
            evaluate=views,
            stop=self.stop,
            tensors=loaded.parts.tensors,
            options=self.method_options,
        )
        distiller = self._trainer(lesson)
        del lesson
        if state is None:
            if self.method.projects:
                evaluate = views if self.ranks is None else self.ranks.alone(views)
                self._project(student, focused, seconds, evaluate)
        else:
            assert isinstance(distiller, Distiller)
            student = state.restore(distiller, self.architecture, loaded.scene)
            views.student = student
            report.stages += state.reports
            seconds = max(0.0, seconds - state.elapsed)
        del focused
        try:
            self._stages(distiller, max(1.0, seconds - self.spent.budgeted() - reserve - last), asking)
        except Stopped:
            self._interrupt(distiller, config, loaded, asking.batches)
        report.stages += distiller.reports
        if isinstance(distiller, Distiller):
            distiller.release()
        del distiller  # and the store with it
        if self.reality is not None and self.reality.polish:
            self._polish(self.reality, student, cells, prepared, last)
        self.student = student.eval()
        if not self.leads:
            return self._finish()
        fidelity = self._validate(self.judge, student, cells) if validate else None
        if validate and self.judge is not prepared:
            self.of_source = self._validate(prepared, student, cells).to_json()
        if fidelity is not None:
            report.fidelity = fidelity.to_json()
            if s.min_psnr is not None and fidelity.psnr < s.min_psnr:
                raise QualityError(
                    f"fidelity {fidelity.psnr:.2f} dB is below the {s.min_psnr:g} dB asked for; nothing was written",
                    hint="a longer --budget or a larger --preset",
                )
        if self.reality is not None:
            report.images = self.reality.columns(self.judge, self._looked_at(student, cells), self.progress)
        self._write(student, loaded.scene, loaded)
        if self.out is not None:
            resuming.remove(self.out)
        return self._finish()

    def _polish(
        self, reality: Reality, student: RadianceField, cells: Occupancy, prepared: Prepared, seconds: float
    ) -> None:
        """The last stage, only where it is asked for: real pixels."""
        fixed = None
        if self.replay is not None:
            fixed = next(((run, planned) for name, run, planned in self.replay.stages if name == reality.stage), (0, 0))
        try:
            done = reality.polished(
                self.architecture,
                student,
                cells,
                prepared,
                seconds=max(1.0, seconds),
                fixed=fixed,
                seed=self.settings.seed,
                progress=self.progress,
                stop=self.stop,
            )
        except Stopped:
            raise Interrupted("stopped while polishing", hint="polishing cannot be resumed: start again") from None
        self.report.stages.append(done)
        self.report.replay += f";{done.name}={done.steps}/{done.planned}"

    def _looked_at(self, student: RadianceField, cells: Occupancy) -> Prepared:
        """The student, ready to be looked at as its teacher is."""
        assert self.judge is not None
        if student.support() is None:
            cells = prepare(student, self.judge.scene, device=self.device, seed=self.settings.seed).occupancy
        return dataclasses.replace(self.judge, field=student, occupancy=cells, box=cells.box)

    def _project(self, student: RadianceField, store: Store, seconds: float, views: Callable[[], float]) -> None:
        self.progress.stage("projection", None)
        before = views()
        clock = stopwatch.now()
        line = self.architecture.project(student, store, 0.15 * seconds)
        if line is None:
            return
        spent = stopwatch.now() - clock
        after = views()
        self.progress.note(f"preview after projection: {after:.2f} dB ({line})")
        self.report.stages.append(StageReport("projection", 1, 1, spent, before, after, line))

    def _room(self) -> Room:
        folder = None if self.out is None else self.out.absolute().parent
        found = room_for(self.settings.max_memory, torch.device(self.device), folder, environment.local()[1])
        line = found.told(adds=self.settings.preset == "best")
        self.report.notes += [] if line is None else [line]
        return found

    def _trainer(self, lesson: methods.Lesson) -> methods.Trainer:
        if self.ranks is None:
            return self.method.trainer(lesson)
        if not self.method.spreads:
            raise UsageError(f"method {self.method.name!r} runs in one process", hint="start without torchrun")
        from pvdconvert.distill.parallel import ParallelDistiller

        return ParallelDistiller(self.ranks, lesson)

    @property
    def leads(self) -> bool:
        """Whether this process reports, validates and writes."""
        return self.ranks is None or self.ranks.rank == 0

    def _stages(self, distiller: methods.Trainer, seconds: float, asking: Asking) -> None:
        first = sum(asking.batches)
        if self.replay is not None:
            named = {name: (run, planned) for name, run, planned in self.replay.stages}
            distiller.run(0.0, steps=named)
            if isinstance(distiller, Distiller):
                rounds(distiller, asking.more, first, most=BEST_ROUNDS, seconds=0.0, gain=0.0, fixed=named)
        else:
            most = self.settings.rounds
            distiller.run(seconds if isinstance(distiller, Distiller) or not most else math.inf)
            if isinstance(distiller, Distiller):
                rounds(distiller, asking.more, first, most=most, seconds=BEST_ROUND, gain=BEST_GAIN)
        earlier = [r for r in self.report.stages if r.name not in ("labels", "projection")]
        ran = [(r.name, r.steps, r.planned) for r in [*earlier, *distiller.reports] if r.planned]
        self.report.replay = str(Replay(*asking.batches, tuple(ran)))

    def _interrupt(self, distiller: methods.Trainer, config: dict[str, Any], loaded: Loaded, batches: Batches) -> None:
        where = f"stopped in {distiller.where}"
        if not isinstance(distiller, Distiller):
            raise Interrupted(where, hint=f"method {self.method.name} cannot go on from there: start again")
        if self.out is None or not self.resumable:
            raise Interrupted(where, hint="there is nothing to resume: no output file, or a chain")
        if not self.leads:
            raise Interrupted(where)
        reports = [r for r in self.report.stages if r.name != "labels"] + distiller.reports
        folder, request = resuming.folder(self.out), (self.settings, loaded.sha256, config)
        resuming.save(folder, *request, distiller, self.architecture, batches, reports, self.spent.budgeted())
        raise Interrupted(where, hint=f"the same command with --resume goes on from {folder}")

    def _mask_factor(self, prepared: Prepared) -> int:
        """How much finer than our occupancy a student's mask is: twice, or what the target layout holds."""
        if self.limits.cells is None:
            return 2
        return max(1, round(self.limits.cells * prepared.occupancy.cell / prepared.scene.box.longest))

    def _validate(self, prepared: Prepared, student: RadianceField, cells: Occupancy) -> Fidelity:
        note = "validated on fewer views than fidelity/1: the budget is short for this teacher"
        if not self.full and note not in self.report.notes:
            self.report.notes.append(note)
        views = reference(prepared, progress=self.progress, **({} if self.full else FEWER))
        cells = self._looked_at(student, cells).occupancy  # without a mask, what it draws in empty space counts
        keep, self.keep = self.keep, None  # a chain measures twice; the first is against the teacher
        return views.compare(student, cells, progress=self.progress, keep=keep)

    def _write(self, field: RadianceField, scene: Scene, loaded: Loaded) -> None:
        config, tensors = self.architecture.save(field)
        bad = [k for k, v in tensors.items() if v.is_floating_point() and not bool(torch.isfinite(v).all())]
        if bad:
            raise RequestError(f"the student's tensor {bad[0]!r} is not a number", hint="try another --seed")
        provenance = {
            "tool": f"pvdconvert {__version__}",
            "teacher": {k: self.report.source[k] for k in ("format", "architecture", "sha256")},
            "settings": {k: v for k, v in self.settings.to_json().items() if k not in ("device", "max_memory")},
            "replay": self.report.replay,
            "fidelity": self.report.fidelity,
            **({} if self.reality is None or not self.reality.polish else {"polished": self.reality.origin}),
            "earlier": dict(loaded.parts.provenance),
        }
        arrays = {k: ArrayTensor(v.detach().cpu().contiguous().numpy()) for k, v in tensors.items()}
        parts = Parts(self.settings.to, config, arrays, scene, provenance)
        target: dict[str, Any] = {"architecture": self.settings.to, "format": self.layout, "config": config}
        if self.out is not None:
            self.progress.stage("writing", None)
            target["bytes"] = write_checked(parts, self.out, self.layout, self.registry)
            target["path"] = str(self.out)
        else:
            target["bytes"] = byte_count(tensors)
        self.report.target = target

    def _finish(self) -> Report:
        self.report.seconds, self.report.cpu_seconds = self.spent.seconds(), self.spent.cpu()
        if self.spent.excused() > 1.0:
            self.report.notes.append(f"{self.spent.excused():.0f} s went into compiling kernels, beyond the budget")
        self.report.peak_bytes = memory.peak()
        return self.report
