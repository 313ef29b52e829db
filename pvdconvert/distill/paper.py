"""Progressive Volume Distillation as published (arXiv 2211.15977, and its public code; pvd.md 1): ``--method pvd``.

Feature stage, volume stage, render stage by numbers of steps; 4096 rays a step, all through one pseudo-view; the
teacher is asked for every sample of every step; un-squared norms; log-density constrained to [-2, 7]. docs/pvd.md has
the constants and lists the reference's bugs that are fixed here; our own way is :mod:`pvdconvert.distill.distiller`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pvdconvert import stopwatch
from pvdconvert.cameras import Camera
from pvdconvert.distill import paper_terms as terms
from pvdconvert.distill import paper_views as views
from pvdconvert.distill.distiller import Stopped
from pvdconvert.distill.methods import Lesson, PaperOptions
from pvdconvert.errors import PluginError, RequestError
from pvdconvert.field import RadianceField, Stage
from pvdconvert.kernels.composite import ray_sum, render_weights
from pvdconvert.plugin import Architecture, LazyTensor
from pvdconvert.report import StageReport
from pvdconvert.scene import Scene
from pvdconvert.solve.lazy_adam import LazyAdam

CHUNK = 1 << 16
"""Points asked at a time."""

HEAVY = 2e5
"""FLOP a point from which a student's activations are computed twice instead of being held for all points."""

NEGLIGIBLE = 1e-6
"""A term of smaller weight is left out: the features' after 1,516 paper steps, at a 2000th of the colours'."""

Window = tuple[str, float, float]
"""A stage: its name, and the paper steps where it begins and ends."""


@dataclasses.dataclass
class Batch:
    """Rays of a step: o, d [R, 3]; background [R, 3] behind both fields; weight [R] of their pixels, or None."""

    o: Tensor
    d: Tensor
    background: Tensor
    weight: Tensor | None = None


@dataclasses.dataclass
class Answers:
    """What a field says at S samples: constrained log-density [S], colour [S, 3], features [S, F]; what was asked."""

    h: Tensor
    rgb: Tensor | None
    tap: Tensor | None


class Paper:
    """The trainer."""

    joint = False

    def __init__(self, lesson: Lesson) -> None:
        store = lesson.store
        self.architecture, self.student, self.teacher = lesson.architecture, lesson.student, store.teacher
        self.scene, self.cells, self.box, self.device = (
            store.scene,
            store.occupancy,
            store.occupancy.box,
            store.x.device,
        )
        self.progress, self.evaluate, self.stop = lesson.progress, lesson.evaluate, lesson.stop
        self.options = cast(PaperOptions, lesson.options)
        self.unit = 0.5 * self.box.longest
        self.copied = transplant(self.architecture, self.student, self.scene, lesson.tensors)
        groups = terms.groups(self.student, self.architecture.param_groups(self.student), self.options.rates)
        self.peaks = [float(g["lr"]) for g in groups]
        self.optimizer = LazyAdam(groups, betas=(0.9, 0.99), eps=1e-15)
        self.generator = torch.Generator().manual_seed(lesson.seed)
        self.random = np.random.default_rng(lesson.seed)
        self.seed = lesson.seed
        self.poses: list[Camera] = []
        self.epoch = -1
        self.epoch_size = self.longest_epoch
        self.tap: terms.Tap | None = None
        self.reports: list[StageReport] = []
        self.where = "before the first step"

    # -- what is looked at -----------------------------------------------------------------------------------------

    @property
    def longest_epoch(self) -> int:
        """Poses of an epoch of a run of 30,000 steps."""
        if self.scene.cameras:
            return max(10, len(self.scene.cameras))
        return views.FORWARD_EPOCH if self.scene.ray_space.kind == "ndc" else views.EPOCH

    def new_epoch(self) -> list[Camera]:
        """The poses of the next epoch."""
        below = self.options.views == "sphere"
        return views.epoch(self.scene, self.box, self.epoch_size, self.random, below=below)

    def batch(self) -> Batch:
        """Rays through the next pose."""
        if not self.poses:
            self.epoch += 1
            self.poses = self.new_epoch()
        return self.through(self.poses.pop(0), self.generator)

    def through(self, camera: Camera, generator: torch.Generator) -> Batch:
        o, d = views.rays_of(camera, self.options.rays, generator)
        return Batch(o.to(self.device), d.to(self.device), self.background(len(o), generator))

    def background(self, count: int, generator: torch.Generator) -> Tensor:
        """[count, 3]: the scene's, or a random colour for each ray where it is unknown."""
        if self.scene.background is None:
            return torch.rand(count, 3, generator=generator).to(self.device)
        return torch.tensor(self.scene.background, device=self.device).expand(count, 3)

    def samples(self, batch: Batch, generator: torch.Generator) -> views.Samples:
        jitter = torch.rand(len(batch.o), generator=generator).to(self.device)
        return views.sample(self.scene, self.cells, batch.o, batch.d, terms.STEP * self.unit, jitter)

    # -- what is asked ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def theirs(self, s: views.Samples, *, color: bool, tap: bool) -> Answers:
        """The teacher's answers at every sample."""
        parts = []
        for x, ray in zip(torch.split(s.x, CHUNK), torch.split(s.ray, CHUNK)):
            latent = self.teacher.encode(x)
            h = terms.log_density(self.teacher.density(latent), self.unit)
            rgb = self.teacher.color(latent, s.d[ray][:, None])[:, 0] if color else x[:0]
            features = self.teacher.features(latent) if tap else x[:0]
            parts.append((h, rgb, x[:0] if features is None else features))
        h, rgb, features = (torch.cat(column) for column in zip(*parts))
        return Answers(h, rgb if color else None, features if tap else None)

    def ours(self, s: views.Samples, *, color: bool, tap: bool) -> Answers:
        """The student's answers at every sample, differentiable."""
        heavy = self.student.flops_per_point > HEAVY and len(s.x) > CHUNK
        size = CHUNK if heavy else max(1, len(s.x))
        parts = []
        for x, ray in zip(torch.split(s.x, size), torch.split(s.ray, size)):
            given = (x, s.d[ray][:, None], color, tap)
            parts.append(checkpoint(self._ask, *given, use_reentrant=False) if heavy else self._ask(*given))
        h, rgb, features = (torch.cat(column) for column in zip(*parts))
        return Answers(h, rgb if color else None, features if tap else None)

    def _ask(self, x: Tensor, d: Tensor, color: bool, tap: bool) -> tuple[Tensor, Tensor, Tensor]:
        latent = self.student.encode(x)

        def at(stage: Stage, seen: Tensor | None) -> Tensor:
            answer = self.architecture.forward_stage(self.student, stage, x, seen, latent)
            if answer is None:
                name = type(self.architecture).__name__
                raise PluginError(f"plugin {name}: forward_stage answers nothing at stage {stage}")
            return answer

        h = terms.log_density(at(Stage.DENSITY, None), self.unit)
        return h, at(Stage.COLOR, d)[:, 0] if color else x[:0], at(Stage.FEATURES, None) if tap else x[:0]

    def rendered(self, a: Answers, s: views.Samples, background: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [R, 3] with the constrained density, and compositing weights [S]."""
        assert a.rgb is not None
        weight, through = render_weights(torch.exp(a.h) * (s.dt / self.unit), s.offsets)
        return ray_sum(weight[:, None] * a.rgb, s.offsets) + through[:, None] * background, weight

    # -- the loss --------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch, w: terms.Weights, generator: torch.Generator) -> tuple[Tensor, Tensor] | None:
        """(loss, L1 error of each ray's pixel [R], 0 where none was rendered); None where no ray meets a cell."""
        s = self.samples(batch, generator)
        if not len(s.x):
            return None
        kind, tap = self.options.loss, w.feature > NEGLIGIBLE
        color = w.color > 0 or w.pixel > 0
        theirs, ours = self.theirs(s, color=color, tap=tap), self.ours(s, color=color, tap=tap)
        total, error, rows = s.x.new_zeros(()), torch.zeros(len(batch.o), device=self.device), None
        if w.pixel:
            (goal, their_weight), (pixel, our_weight) = (self.rendered(a, s, batch.background) for a in (theirs, ours))
            error = (pixel.detach() - goal).abs().sum(1)
            batch = dataclasses.replace(batch, weight=self.reweighted(batch, error))
            total = total + w.pixel * terms.distance(pixel, goal, kind, batch.weight)
            rows = self.chosen(s, their_weight, our_weight.detach())
        weight = None if batch.weight is None else batch.weight[s.ray]
        if tap:
            assert self.tap is not None
            assert theirs.tap is not None
            assert ours.tap is not None
            a, b = self.tap.pair(ours.tap, theirs.tap)
            a, b = torch.cat([ours.h[:, None], a], 1), torch.cat([theirs.h[:, None], b], 1)
            total = total + w.feature * _among(a, b, kind, weight, rows)
        if w.color:
            assert ours.rgb is not None
            assert theirs.rgb is not None
            total = total + w.color * _among(ours.rgb, theirs.rgb, kind, weight, rows)
        if w.sigma:
            total = total + w.sigma * _among(ours.h, theirs.h, kind, weight, rows)
        if w.factors:
            norm: Callable[[RadianceField], Tensor | None] | None = getattr(self.architecture, "factor_norm", None)
            small = None if norm is None else norm(self.student)
            total = total if small is None else total + w.factors * small
        return total, error

    def chosen(self, s: views.Samples, theirs: Tensor, ours: Tensor) -> Tensor | None:
        """Indices of the samples that the terms before the last compare, from both compositing weights; None = all."""
        return None

    def reweighted(self, batch: Batch, error: Tensor) -> Tensor | None:
        """Weights [R] of the rays once the L1 errors of their pixels are known."""
        return batch.weight

    def after(self, batch: Batch, error: Tensor) -> None:
        """Called after each step with the L1 error of each ray's pixel."""

    # -- the run ---------------------------------------------------------------------------------------------------

    def prepare_tap(self) -> str:
        """Look at the teacher's features. Returns "" or the reason why they are not compared."""
        camera = views.epoch(self.scene, self.box, 1, np.random.default_rng(self.seed))[0]
        generator = torch.Generator().manual_seed(self.seed)
        s = self.samples(self.through(camera, generator), generator)
        with torch.no_grad():
            ours = self.student.features(self.student.encode(s.x[:8]))
            if ours is None:
                return "the student has no feature tap"
            if self.teacher.features(self.teacher.encode(s.x[:8])) is None:
                return "the teacher has no feature tap"
            some = dataclasses.replace(s, x=s.x[:: max(1, len(s.x) // CHUNK)], ray=s.ray[:: max(1, len(s.x) // CHUNK)])
            answers = self.theirs(some, color=False, tap=True)
        assert answers.tap is not None
        matter = answers.tap[answers.h > terms.FLOOR]
        if len(matter) < 2:
            return "no matter on the first view"
        self.tap = terms.Tap(matter, ours.shape[1])
        if self.tap.basis is not None and not self.tap.basis.shape[1]:
            self.tap = None
            return "the teacher's features are constant"
        return ""

    def stages(self) -> list[Window]:
        """The stages in the paper's steps. Without features to compare, the volume stage begins at once."""
        skipped = self.prepare_tap()
        note = "" if not self.copied else f"{len(self.copied)} tensors of the teacher copied"
        if self.joint:
            self.note = f"features left out: {skipped}" if skipped else note
            return [("joint", 0.0, float(terms.STEPS))]
        first = 0.0 if skipped else float(terms.FEATURES_END)
        if skipped:
            self.reports.append(StageReport("features", note=f"skipped: {skipped}"))
            self.progress.note(f"stage features skipped: {skipped}")
        self.note = note
        named = [] if skipped else [("features", 0.0, first)]
        return [*named, ("volume", first, float(terms.VOLUME_END)), ("render", terms.VOLUME_END, terms.STEPS)]

    def run(self, seconds: float, *, steps: dict[str, tuple[int, int]] | None = None) -> list[StageReport]:
        """Run about ``seconds``, exactly ``steps`` (stage -> (run, planned)), or 30,000 steps where both are endless.

        Raises Stopped, or RequestError where the loss is no number.
        """
        begin = stopwatch.now()
        plan = self.stages()
        pace = self._pace(plan) if steps is None and math.isfinite(seconds) else {}
        for number, (name, low, high) in enumerate(plan):
            if steps is not None:
                run, planned = steps.get(name, (0, 0))
            else:
                left = max(0.0, seconds - (stopwatch.now() - begin))
                later = sum((b - a) * pace.get(n, 0.0) for n, a, b in plan[number:])
                share = left / later if math.isfinite(left) else 1.0
                run = planned = max(1, round((high - low) * share))
            deadline = begin + 1.25 * seconds if steps is None else math.inf
            report = self._stage((name, low, high), run, planned, deadline)
            if pace and report.steps:
                drift = report.seconds / report.steps / pace[name]
                pace = {n: p if n == name else p * drift for n, p in pace.items()}
        return self.reports

    def _pace(self, plan: list[Window]) -> dict[str, float]:
        """Seconds that a step of each stage takes: two of the costliest are tried and thrown away."""
        camera = views.epoch(self.scene, self.box, 1, np.random.default_rng(self.seed))[0]
        generator, spent = torch.Generator().manual_seed(self.seed), 0.0
        for _ in range(2):
            clock = stopwatch.now()
            found = self.loss(self.through(camera, generator), terms.weights(terms.STEPS, tapped=False), generator)
            if found is not None:
                found[0].backward()  # type: ignore[no-untyped-call]
            spent = stopwatch.now() - clock
        self.optimizer.zero_grad()
        return {name: spent * (0.6 if name == "features" else 1.0) for name, _, _ in plan}

    def _stage(self, window: Window, run: int, planned: int, deadline: float) -> StageReport:
        name, low, high = window
        report = StageReport(name, note=self.note)
        self.note = ""
        self.progress.stage(name, float(planned))
        last = self.reports[-1].psnr_after if self.reports else None
        report.psnr_before = self.evaluate() if last is None else last
        whole = planned * terms.STEPS / (high - low)
        self.epoch_size = min(self.longest_epoch, max(10, round(whole / 15)))
        self.expect(whole)
        begin = stopwatch.now()
        for step in range(run):
            tau = low + (high - low) * step / planned
            for group, peak in zip(self.optimizer.param_groups, self.peaks):
                group["lr"] = terms.learning_rate(peak, tau / terms.STEPS)
            batch = self.batch()
            found = self.loss(batch, terms.weights(tau, tapped=self.tap is not None, joint=self.joint), self.generator)
            if found is not None:
                found[0].backward()  # type: ignore[no-untyped-call]
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.after(batch, found[1])
            report.steps = step + 1
            self.where = f"stage {name} after {step + 1} steps"
            if found is not None and (step % 16 == 0 or step + 1 == run):
                value = float(found[0].detach())
                if not math.isfinite(value):
                    raise RequestError(f"stage {name}: the student's loss is not a number", hint="try another --seed")
                self.progress.advance(step + 1, loss=value)
            if self.stop():
                raise Stopped
            if stopwatch.now() > deadline:
                break
        report.planned = planned
        report.seconds = stopwatch.now() - begin
        report.psnr_after = self.evaluate()
        self.progress.advance(report.steps, psnr=report.psnr_after)
        self.reports.append(report)
        return report

    def expect(self, steps: float) -> None:
        """Told before each stage how many steps the whole run will have at its pace."""


def _among(a: Tensor, b: Tensor, kind: str, weight: Tensor | None, rows: Tensor | None) -> Tensor:
    if rows is None:
        return terms.distance(a, b, kind, weight)
    return terms.distance(a[rows], b[rows], kind, None if weight is None else weight[rows])


@torch.no_grad()
def transplant(
    architecture: Architecture, student: RadianceField, scene: Scene, tensors: Mapping[str, LazyTensor]
) -> list[str]:
    """Copy the teacher's tensors into the student's of the same name and shape (pvd.md 1.1 b). Returns their names.

    In the reference every network shares its decoders' names, so that aligned features meet the decoder that they were
    made for. Nothing is frozen afterwards.
    """
    config, own = architecture.save(student)
    taken = [
        name
        for name, value in own.items()
        if name in tensors
        and value.is_floating_point()
        and "float" in tensors[name].dtype
        and tuple(tensors[name].shape) == tuple(value.shape)
    ]
    if not taken:
        return []
    given = {name: torch.from_numpy(np.array(tensors[name].numpy(), dtype=np.float32)) for name in taken}
    loaded = architecture.load(config, {**own, **given}, scene)
    theirs = dict(loaded.named_parameters())
    for name, parameter in student.named_parameters():
        parameter.copy_(theirs[name].to(parameter.device))
    return taken
