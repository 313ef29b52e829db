"""Progressive distillation from a store: features -> density -> color -> render.

The first three stages draw single samples and need no rays; the last composites whole rays. The teacher is never asked
again. Deterministic: the same seed, steps, machine and threads give the same bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pvdconvert import stopwatch
from pvdconvert.distill import losses
from pvdconvert.distill.methods import Lesson
from pvdconvert.distill.schedule import PATIENCE, SHARES, WARMUP, Plateau, rate
from pvdconvert.distill.store import Store
from pvdconvert.errors import PluginError, RequestError
from pvdconvert.field import RadianceField, Stage
from pvdconvert.kernels.composite import ray_sum, render_weights
from pvdconvert.plugin import Architecture
from pvdconvert.progress import Progress
from pvdconvert.report import StageReport
from pvdconvert.solve.lazy_adam import LazyAdam

SHOWN = 1e-3
"""Colour is asked where the teacher's or the student's weight exceeds this."""

TAP_WIDTH = 16
"""Principal components of the teacher's features that the first stage aligns (PVD's tap has 16 channels)."""

HELD_OUT = 1 << 13


class Stopped(Exception):
    """The caller asked to stop; the distiller's state is complete."""


@dataclasses.dataclass
class Position:
    """Where a run is: the stage, steps done in it, steps planned."""

    stage: int = 0
    step: int = 0
    planned: int = 0
    seconds: float = 0.0


class Distiller:
    """Teaches ``student`` from ``store``.

    evaluate  dB against the teacher on the quick held-out views; called before and after each stage and now and then
    stop      asked after every step; true ends the run with :class:`Stopped` in a resumable state
    """

    def __init__(
        self,
        architecture: Architecture,
        student: RadianceField,
        store: Store,
        *,
        seed: int,
        progress: Progress,
        evaluate: Callable[[], float],
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.architecture, self.student, self.store = architecture, student, store
        self.progress, self.evaluate, self.stop = progress, evaluate, stop
        self.device = store.x.device
        groups = architecture.param_groups(student)
        self.peaks = [float(g["lr"]) for g in groups]
        self.optimizer = LazyAdam(groups, betas=(0.9, 0.99), eps=1e-15)
        self.generator = torch.Generator().manual_seed(seed)
        self.position = Position()
        self.reports: list[StageReport] = []
        self.batch = student.batch_points
        self.tap: tuple[Tensor, Tensor] | None = None
        self.seed = seed
        self.ray_share = self.sample_share = 1.0
        self.renew(store)

    def renew(self, store: Store) -> None:
        """Go on with other answers of the same teacher."""
        self.store = store
        self.ray_of = store.ray_of()
        # Colours are drawn by compositing weight (the soft form of PVD-AL's "top 30 % of a ray").
        self.colored = store.colored.nonzero().squeeze(1)
        self.cumulative = torch.cumsum(store.weight[self.colored].double(), 0)
        self.sided = torch.cumsum(store.weight[store.many].double(), 0)
        self.backdrop = torch.tensor(store.scene.backdrop, device=self.device)
        per_ray = max(1.0, len(store) / store.rays)
        self.ray_batch = max(64, min(store.rays, int(self.batch / per_ray)))
        held = torch.Generator().manual_seed(self.seed + 7919)
        self.held = torch.randint(len(store), (min(HELD_OUT, len(store)),), generator=held).to(self.device)

    def release(self) -> None:
        """Give back what only learning needs: gradients and the optimiser's moments, three times the student's size."""
        self.optimizer.state.clear()
        for parameter in self.student.parameters():
            parameter.grad = None

    @property
    def where(self) -> str:
        """Where it is, for a person."""
        stage = tuple(Stage)[min(self.position.stage, len(Stage) - 1)]
        return f"stage {stage} after {self.position.step} steps"

    # -- what is drawn ---------------------------------------------------------------------------------------------

    def _by_weight(self, count: int) -> Tensor:
        u = torch.rand(count, generator=self.generator, dtype=torch.float64).to(self.device) * self.cumulative[-1]
        return self.colored[torch.searchsorted(self.cumulative, u).clamp_max(len(self.colored) - 1)]

    def _from_sides(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Indices [N] of samples drawn by weight, and d, rgb [N,K,3] of K of the sides they were asked from."""
        s = self.store
        u = torch.rand(count, generator=self.generator, dtype=torch.float64).to(self.device) * self.sided[-1]
        at = torch.searchsorted(self.sided, u).clamp_max(len(s.many) - 1)
        k = min(self.student.batch_sides, s.many_d.shape[1])
        low = int(torch.randint(s.many_d.shape[1] - k + 1, (1,), generator=self.generator))
        return s.many[at], s.many_d[at, low : low + k], s.many_rgb[at, low : low + k]

    def _points(self, share: int = 2) -> tuple[Tensor, Tensor]:
        """(by weight, uniform over all samples): indices into the store, batch / ``share`` and batch / 4 of them."""
        shown = self._by_weight(self.batch // share)
        rest = torch.randint(len(self.store), (self.batch // 4,), generator=self.generator).to(self.device)
        return shown, rest

    def _free(self) -> tuple[Tensor, Tensor, Tensor]:
        """(x [F,3], density, length) of free points.

        A student without a mask gets more of them, and its empty ones stand for a way through the whole box: thin fog
        would add up along it.
        """
        s = self.store
        share = 4 if s.whole_space else 8
        free = torch.randint(len(s.free_x), (self.batch // share,), generator=self.generator).to(self.device)
        sigma = s.free_sigma[free]
        dt = s.lengths(s.free_x[free])
        return s.free_x[free], sigma, dt.masked_fill_(sigma == 0, s.scene.box.longest) if s.whole_space else dt

    def _rays(self) -> Tensor:
        """Rays of the store, uniform."""
        return torch.randint(self.store.rays, (self.ray_batch,), generator=self.generator).to(self.device)

    def _tapped(self) -> Tensor:
        """Which of the samples whose features were asked."""
        assert self.tap is not None
        return torch.randint(len(self.tap[0]), (self.batch,), generator=self.generator).to(self.device)

    # -- where several processes run one (distill/parallel.py) agree; one agrees with itself ------------------------

    def _mean(self, own: Tensor) -> Tensor:
        return own

    def _agree(self, stop: bool, late: bool) -> tuple[bool, bool]:
        return stop, late

    def _planned(self, steps: int) -> int:
        return steps

    def _share_gradients(self) -> None: ...

    # -- the stages ------------------------------------------------------------------------------------------------

    def _ask(self, stage: Stage, x: Tensor, d: Tensor | None, latent: Tensor | None = None) -> Tensor:
        """What the student answers at ``stage``. Raises PluginError where its plugin answers nothing."""
        answer = self.architecture.forward_stage(self.student, stage, x, d, latent)
        if answer is None:
            name = type(self.architecture).__name__
            raise PluginError(
                f"plugin {name}: forward_stage answers nothing at stage {stage}", hint="pvdconvert selftest"
            )
        return answer

    def prepare_features(self) -> str:
        """Ask the teacher for its tap at some samples. Returns "" or the reason why the stage is skipped."""
        s = self.store
        with torch.no_grad():
            probe = self.student.encode(s.x[:8])
            if self.architecture.forward_stage(self.student, Stage.FEATURES, s.x[:8], None, probe) is None:
                return "the student has no feature tap"
            index = self._by_weight(min(1 << 16, 8 * len(self.colored)))
            taken = []
            for part in torch.split(index, 1 << 14):
                tap = s.teacher.features(s.teacher.encode(s.x[part]))
                if tap is None:
                    # Canonical features instead of the teacher's (pvd.md 6.2): log thickness and the colour's logit.
                    thick = torch.log(s.sigma[part] * s.dt[part] + losses.TINY).clamp(losses.FLOOR, losses.CEILING)
                    tap = torch.cat([thick[:, None], torch.logit(s.rgb[part].clamp(0.01, 0.99))], 1)
                taken.append(tap)
            _, _, targets = losses.whitened(torch.cat(taken), TAP_WIDTH)
        if not targets.shape[1]:
            return "the teacher's features are constant"
        self.tap = (index, targets)
        return ""

    def _features_loss(self) -> Tensor:
        assert self.tap is not None
        index, targets = self.tap
        pick = self._tapped()
        x = self.store.x[index[pick]]
        ours = self._ask(Stage.FEATURES, x, None)
        # The adapter is solved in closed form on each batch, so feature widths never have to match.
        with torch.no_grad():
            a = losses.adapter(ours, targets[pick], self._mean)
        return (ours @ a[:-1] + a[-1] - targets[pick]).square().mean() + losses.too_large(ours, self._mean)

    def _volume_loss(self, stage: Stage, index: tuple[Tensor, Tensor] | None = None) -> Tensor:
        s = self.store
        sides = self._from_sides(self.batch // 2) if stage is Stage.COLOR and index is None and len(s.many) else None
        shown, rest = self._points(2 if sides is None else 4) if index is None else index
        both = torch.cat([shown, *(() if sides is None else sides[:1]), rest])
        x, sigma_t, dt = s.x[both], s.sigma[both], s.dt[both]
        if index is None and len(s.free_x):
            free = self._free()
            x, sigma_t, dt = torch.cat([x, free[0]]), torch.cat([sigma_t, free[1]]), torch.cat([dt, free[2]])
        latent = self.student.encode(x)
        sigma = self._ask(Stage.DENSITY, x, None, latent)
        loss = losses.density_loss(sigma, sigma_t, dt)
        if stage is Stage.COLOR and len(shown):
            n = len(shown)
            d = s.d[self.ray_of[shown]][:, None]
            rgb = self._ask(Stage.COLOR, x[:n], d, latent[:n])
            loss = loss + losses.color_loss(rgb[:, 0], s.rgb[shown])
            if sides is not None:  # one trunk answers for a sample's density and all its colours
                m = n + len(sides[0])
                loss = loss + 2.0 * losses.color_loss(self._ask(Stage.COLOR, x[n:m], sides[1], latent[n:m]), sides[2])
        return loss

    def _render_loss(self) -> Tensor:
        s = self.store
        rays = self._rays()
        start, counts = s.offsets[rays], s.offsets[rays + 1] - s.offsets[rays]
        offsets = torch.zeros(len(rays) + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(counts, 0, out=offsets[1:])
        index = torch.repeat_interleave(start - offsets[:-1], counts) + torch.arange(
            int(offsets[-1]), device=self.device
        )
        x, dt, sigma_t, weight_t = s.x[index], s.dt[index], s.sigma[index], s.weight[index]
        latent = self.student.encode(x)
        sigma = self._ask(Stage.DENSITY, x, None, latent)
        weight, through = render_weights(sigma * dt, offsets)
        shown = (torch.maximum(weight.detach(), weight_t) > SHOWN).nonzero().squeeze(1)
        d = s.d[self.ray_of[index[shown]]][:, None]
        rgb = self._ask(Stage.COLOR, x[shown], d, latent[shown])
        colors = torch.zeros(len(index), 3, device=self.device).index_copy(0, shown, rgb[:, 0])
        pixel = ray_sum(weight[:, None] * colors, offsets) + through[:, None] * self.backdrop
        loss = (pixel - s.ray_rgb[rays]).square().mean()
        loss = loss + 0.1 * (1.0 - through - s.ray_opacity[rays]).square().mean()
        apart = weight_t[shown, None] * s.colored[index[shown], None] * (rgb[:, 0] - s.rgb[index[shown]]).square()
        loss = (loss + 0.1 * apart.sum() / (3 * len(rays))) * self.ray_share
        if len(s.many):
            many, dirs, colored = self._from_sides(self.batch // 4)
            loss = loss + 0.3 * losses.color_loss(self._ask(Stage.COLOR, s.x[many], dirs), colored)
        if s.whole_space:
            free = self._free()
            sigma = torch.cat([sigma, self._ask(Stage.DENSITY, free[0], None)])
            sigma_t, dt = torch.cat([sigma_t, free[1]]), torch.cat([dt, free[2]])
        return loss + 0.05 * self.sample_share * losses.density_loss(sigma, sigma_t, dt)

    def _loss(self, stage: Stage) -> Tensor:
        if stage is Stage.FEATURES:
            return self._features_loss()
        if stage is Stage.RENDER:
            return self._render_loss()
        return self._volume_loss(stage)

    @torch.no_grad()
    def _held_loss(self, stage: Stage) -> float:
        return float(self._volume_loss(stage, (self.held[:0], self.held)))

    # -- the run ---------------------------------------------------------------------------------------------------

    def run(
        self,
        seconds: float,
        *,
        stages: Sequence[Stage] = tuple(Stage),
        steps: dict[str, tuple[int, int]] | None = None,
    ) -> list[StageReport]:
        """Run the stages within about ``seconds``, or exactly ``steps`` (name -> (run, planned)) of each.

        Resumes at :attr:`position`. Raises Stopped, or RequestError where the loss is no number.
        """
        total = sum(SHARES[s] for s in stages)
        begin = stopwatch.now()
        before = 0.0
        for number, stage in enumerate(stages):
            share = SHARES[stage] / total
            window = (before, before + share)
            before += share
            if number < self.position.stage:
                continue
            if stage is Stage.FEATURES and self.tap is None and (reason := self.prepare_features()):
                self.reports.append(StageReport(str(stage), note=f"skipped: {reason}"))
                self.progress.note(f"stage features skipped: {reason}")
                self.position = Position(number + 1)
                continue
            fixed = None if steps is None else steps.get(str(stage), (0, 0))
            left = max(0.0, seconds - (stopwatch.now() - begin))
            later = sum(SHARES[s] for s in stages[number:])
            self._stage(stage, left * SHARES[stage] / later, window, fixed)
            self.position = Position(number + 1)
        return self.reports

    def _stage(self, stage: Stage, seconds: float, window: tuple[float, float], fixed: tuple[int, int] | None) -> None:
        at = self.position
        self.progress.stage(str(stage), float(at.planned) if at.planned else None)
        report = StageReport(str(stage))
        report.psnr_before = (
            self.reports[-1].psnr_after if self.reports and self.reports[-1].psnr_after else self.evaluate()
        )
        plateau = Plateau(PATIENCE.get(stage, 0.0))
        begin = measured = stopwatch.now()
        first = at.step
        if fixed is not None:
            at.planned = fixed[1]
        limit = None if fixed is None else fixed[0]
        while (at.planned == 0 or at.step < at.planned) and (limit is None or at.step < limit):
            progress = window[0] + (window[1] - window[0]) * at.step / max(1, at.planned)
            # While steps are still being timed nobody knows how many there will be; a replay must not know either.
            factor = rate(window[0] if at.step < WARMUP else progress, at.step)
            for group, peak in zip(self.optimizer.param_groups, self.peaks):
                group["lr"] = peak * factor
            loss = self._loss(stage)
            loss.backward()  # type: ignore[no-untyped-call]
            self._share_gradients()
            self.optimizer.step()
            self.optimizer.zero_grad()
            at.step += 1
            now = stopwatch.now()
            if at.step == first + 3 and not at.planned:
                measured = now  # the first steps may compile kernels
            if at.step == first + WARMUP and not at.planned:
                cost = (now - measured) / (WARMUP - 3)
                at.planned = self._planned(max(WARMUP, WARMUP + int((seconds - (now - begin)) / max(cost, 1e-6))))
                self.progress.stage(str(stage), float(at.planned))
            if at.step % 16 == 0:
                value = float(loss.detach())
                if value != value or value == float("inf"):
                    raise RequestError(f"stage {stage}: the student's loss is not a number", hint="try another --seed")
                self.progress.advance(at.step, loss=value)
            at.seconds = now - begin
            late = fixed is None and at.planned > 0 and now - begin > 1.25 * seconds and at.step >= WARMUP
            stop, late = self._agree(self.stop(), late)
            if stop:
                raise Stopped
            if late:
                break
            if (
                fixed is None
                and stage in PATIENCE
                and at.planned
                and at.step % max(4 * WARMUP, at.planned // 5) == 0
                and plateau.reached(self._held_loss(stage))
            ):
                report.note = "plateau"
                break
        report.steps, report.planned = at.step, at.planned
        report.seconds = stopwatch.now() - begin
        report.psnr_after = self.evaluate()
        self.progress.advance(at.step, psnr=report.psnr_after)
        self.reports.append(report)

    def again(
        self,
        name: str,
        stage: Stage,
        seconds: float,
        fixed: tuple[int, int] | None,
        *,
        rates: float = 1.0,
        window: tuple[float, float] = (0.0, 1.0),
    ) -> StageReport:
        """More of ``stage`` at this share of the peak rates, in this part of their fall. Returns its report."""
        peaks, self.peaks = self.peaks, [p * rates for p in self.peaks]
        try:
            self.position = Position(len(Stage))
            self._stage(stage, seconds, window, fixed)
        finally:
            self.peaks = peaks
        self.reports[-1].name = name
        return self.reports[-1]


def teach(lesson: Lesson) -> Distiller:
    """The trainer of the default method."""
    return Distiller(
        lesson.architecture,
        lesson.student,
        lesson.store,
        seed=lesson.seed,
        progress=lesson.progress,
        evaluate=lesson.evaluate,
        stop=lesson.stop,
    )
