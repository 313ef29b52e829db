"""Training a field from pictures: rays through their pixels, composited and compared. Any architecture.

What is asked of the field is what distillation asks; the optimiser, its schedule and the compositing are the same. The
cells in which samples lie follow the field: they are asked again from time to time, and what stays empty is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from pvdconvert import stopwatch
from pvdconvert.distill.distiller import Position, Stopped
from pvdconvert.distill.distortion import distortion
from pvdconvert.distill.raybank import RayBank, Rays
from pvdconvert.distill.sampling import Samples, importance, in_cells, reached, segments, stratified
from pvdconvert.distill.schedule import WARMUP, rate
from pvdconvert.errors import PluginError, RequestError
from pvdconvert.field import RadianceField, Stage
from pvdconvert.kernels.composite import ray_sum, render_weights
from pvdconvert.plugin import Architecture
from pvdconvert.progress import Progress
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.render.occupy import ALPHA, peak_density
from pvdconvert.render.trace import render_rays
from pvdconvert.report import StageReport
from pvdconvert.scene import Scene
from pvdconvert.solve.lazy_adam import LazyAdam

Sampling = Literal["occupancy", "hierarchical"]
SAMPLINGS: tuple[Sampling, ...] = ("occupancy", "hierarchical")

SHOWN = 1e-3
"""Colour is asked where the compositing weight exceeds this."""

SEEN = 5e-3
"""Compositing weight from which a cell counts as seen."""

POINTS = 8.0
"""Samples in a step, as a multiple of ``field.batch_points``: whole rays teach less a sample than single points."""

MOST_RAYS = 4096
"""Rays in a step, where most of them meet next to nothing."""

COARSE, FINE = 64, 128
"""Samples a ray of the two passes of hierarchical sampling (Mildenhall et al. 2020)."""

SWEEPS = 4
"""How often the cells are asked again in each part of a run."""

DECAY = 0.6
"""What is left of a cell's density, as far as it was known, at each sweep."""

PARTS = 4
"""Parts of a run: each is planned by what its steps cost."""

LONG, COARSEST = 48.0, 4.0
"""Samples of a ray above which they lie further apart, and how many times at most: a view full of fog, as
forward-facing scenes begin, learns more from many rays than from fine ones (fern in 60 s, test views: 19.9 -> 20.7 dB).
"""

REGULAR = 4
"""The regulariser is evaluated every so many steps, and counts as much."""


class Photometric:
    """Trains ``student`` on the pixels of ``bank``.

    cells     where samples may lie; narrowed as the field empties, on a grid of the same cells
    step      distance of samples, world units
    coarse    a second field of the same kind: hierarchical sampling, no cells (the original pipeline)
    clock     seconds that the budget is measured in
    """

    def __init__(
        self,
        architecture: Architecture,
        student: RadianceField,
        bank: RayBank,
        scene: Scene,
        cells: Occupancy,
        *,
        step: float,
        seed: int,
        progress: Progress,
        coarse: RadianceField | None = None,
        points: float | None = None,
        factor: float = 1.0,
        stop: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = stopwatch.now,
    ) -> None:
        self.architecture, self.student, self.coarse, self.bank = architecture, student, coarse, bank
        self.scene, self.cells, self.step, self.seed = scene, cells, step, seed
        self.progress, self.stop, self.clock = progress, stop, clock
        self.device = cells.origin.device
        groups = architecture.param_groups(student)
        groups += [] if coarse is None else architecture.param_groups(coarse)
        self.peaks = [factor * float(g.get("photometric", g["lr"])) for g in groups]
        self.optimizer = LazyAdam(groups, betas=(0.9, 0.99), eps=1e-15)
        self.generator = torch.Generator().manual_seed(seed)
        self.position = Position()
        self.reports: list[StageReport] = []
        self.points = int(points or POINTS * student.batch_points)
        weigh = getattr(architecture, "distortion", None)
        self.spread = 0.0 if weigh is None else float(weigh(scene))
        self._narrow(cells.grid.clone())
        self.known: Tensor | None = None
        self.seen: Tensor | None = None
        self.backdrop = torch.tensor(scene.backdrop, device=self.device)
        # Counts, never times: the same seed and steps draw the same rays. Samples of a ray at the finest distance.
        self.drawn, self.per_ray, self.hidden = 0, LONG, 0.0

    # -- what is compared --------------------------------------------------------------------------------------------

    def _ask(self, field: RadianceField, stage: Stage, x: Tensor, d: Tensor | None, latent: Tensor) -> Tensor:
        answer = self.architecture.forward_stage(field, stage, x, d, latent)
        if answer is None:
            name = type(self.architecture).__name__
            raise PluginError(
                f"plugin {name}: forward_stage answers nothing at stage {stage}", hint="pvdconvert selftest"
            )
        return answer

    def _random(self, *size: int) -> Tensor:
        return torch.rand(*size, generator=self.generator).to(self.device)

    def _composite(self, field: RadianceField, samples: Samples, rays: Rays) -> tuple[Tensor, Tensor, Tensor]:
        """(colour [R, 3] over nothing, what is left behind [R], weights [S])."""
        latent = field.encode(samples.x)
        sigma = self._ask(field, Stage.DENSITY, samples.x, None, latent)
        weight, through = render_weights(sigma * samples.dt, samples.offsets)
        shown = (weight.detach() > SHOWN).nonzero().squeeze(1)
        d = rays.d[samples.ray[shown], None]
        rgb = self._ask(field, Stage.COLOR, samples.x[shown], d, latent[shown])
        colors = torch.zeros(len(samples), 3, device=self.device).index_copy(0, shown, rgb[:, 0])
        return ray_sum(weight[:, None] * colors, samples.offsets), through, weight

    def _difference(self, color: Tensor, through: Tensor, rays: Rays) -> Tensor:
        """Mean square difference of pixels; where they have opacity, the mean over all colours that may lie behind.

        With b uniform in [0, 1] behind, the difference is c - b o (c of colours over nothing, o of opacities), and the
        mean of its square c^2 - c o + o^2 / 3: what random backgrounds estimate, without their noise.
        """
        if rays.alpha is None:
            return (color + through[:, None] * self.backdrop - rays.rgb).square().mean()
        c = color - rays.rgb * rays.alpha[:, None]
        o = (1.0 - through - rays.alpha)[:, None]
        return (c.square() - c * o + o.square() / 3).mean()

    def _loss(self) -> Tensor:
        if self.coarse is not None:
            return self._two_passes(self.coarse)
        apart = min(COARSEST, max(1.0, self.per_ray / LONG))
        count = int(max(64, min(MOST_RAYS, self.points * apart / max(self.per_ray, 0.25))))
        rays = self.bank.take(self.drawn, count)
        self.drawn += count
        way = segments(rays.o, rays.d, self.scene, self.around)
        samples = in_cells(way, self.live, apart * self.step, self._random(count))
        self.per_ray += 0.1 * (apart * len(samples) / count - self.per_ray)
        # What lies behind surfaces costs as much as what is seen; from a share on it pays to look first.
        if self.hidden > 0.4 and len(samples):
            with torch.no_grad():
                sigma = self.student.density(self.student.encode(samples.x))
                keep = reached(samples, render_weights(sigma * samples.dt, samples.offsets)[0])
            self.hidden += 0.1 * (1.0 - float(keep.float().mean()) - self.hidden)
            samples = samples.kept(keep)
            color, through, weight = self._composite(self.student, samples, rays)
        else:
            color, through, weight = self._composite(self.student, samples, rays)
            if len(samples):
                self.hidden += 0.1 * (1.0 - float(reached(samples, weight.detach()).float().mean()) - self.hidden)
        if self.seen is not None:
            self._mark(samples.x[weight.detach() > SEEN])
        loss = self._difference(color, through, rays)
        return loss if not self.spread else loss + self.spread * distortion(weight, *way.shares(samples))

    def _two_passes(self, coarse: RadianceField) -> Tensor:
        count = max(16, self.points // (2 * COARSE + FINE))
        rays = self.bank.take(self.drawn, count)
        self.drawn += count
        way = segments(rays.o, rays.d, self.scene, self.scene.box)
        first, t = stratified(way, self._random(count, COARSE))
        color, through, weight = self._composite(coarse, first, rays)
        loss = self._difference(color, through, rays)
        samples = importance(way, t, weight.detach().view(count, COARSE), self._random(count, FINE))
        color, through, _ = self._composite(self.student, samples, rays)
        return loss + self._difference(color, through, rays)

    def _regular(self, step: int) -> Tensor | None:
        """What the architecture's paper adds to the loss."""
        regularizer = getattr(self.architecture, "regularizer", None)
        if regularizer is None or step % REGULAR:
            return None
        extra: Tensor | None = regularizer(self.student, self.generator)
        return None if extra is None else REGULAR * extra

    # -- where samples lie -------------------------------------------------------------------------------------------

    def _mark(self, x: Tensor) -> None:
        assert self.seen is not None
        i = self.live.index(x)
        i = i[((i >= 0) & (i < torch.tensor(self.seen.shape, device=i.device))).all(-1)]
        self.seen[i[:, 0], i[:, 1], i[:, 2]] = 1

    @torch.no_grad()
    def sweep(self) -> None:
        """Ask all cells again: those that stay below the opacity that shows are left out from now on."""
        found = torch.zeros(self.cells.grid.shape, device=self.device)
        index = self.cells.grid.nonzero()
        where = (index[:, 0], index[:, 1], index[:, 2])
        was = self.student.training
        found[where] = peak_density(self.student.eval(), self.cells, 1, self._generator())
        self.student.train(was)
        self.known = found if self.known is None else torch.maximum(DECAY * self.known, found)
        opacity = 1.0 - torch.exp(-self.known * self.cells.cell)
        # Early on nothing is dense: what is left out must be thin compared with the rest, too.
        limit = min(ALPHA, 0.5 * float(opacity[where].mean())) if len(index) else ALPHA
        grid = ((opacity > limit) & (self.cells.grid > 0)).byte()
        self._narrow(grid if bool(grid.any()) else self.cells.grid)

    def _narrow(self, grid: Tensor) -> None:
        self.live = Occupancy(self.cells.origin, self.cells.cell, grid)
        self.around = self.live.box

    def _generator(self) -> torch.Generator:
        number = int(torch.randint(1 << 31, (1,), generator=self.generator))
        return torch.Generator(device=self.device).manual_seed(number)

    @torch.no_grad()
    def evaluate(self) -> float:
        """dB on the pixels that were set aside."""
        held = self.bank.held
        if self.student.flops_per_point > 2e4 or self.coarse is not None:
            held = held[:: max(1, len(held) // 512)]
        was = self.student.training
        rgb, _, _ = render_rays(
            self.student.eval(),
            held.o,
            held.d,
            self.live,
            step=self.step,
            near=self.scene.near,
            far=self.scene.far,
            backdrop=self.scene.backdrop,
            ray_space=self.scene.ray_space,
        )
        self.student.train(was)
        error = float((rgb.clamp(0, 1) - held.over(self.backdrop)).square().mean())
        return 100.0 if error <= 1e-10 else -10.0 * math.log10(error)

    # -- the run -----------------------------------------------------------------------------------------------------

    def run(
        self,
        name: str,
        seconds: float,
        *,
        parts: int = PARTS,
        steps: Mapping[str, tuple[int, int]] | None = None,
        watch: Callable[[], None] = lambda: None,
    ) -> list[StageReport]:
        """Train for about ``seconds``, or exactly ``steps`` (name -> (run, planned)) of each part, ``name``-1, ...

        Resumes at :attr:`position`. ``watch`` is called after each part. Raises Stopped, or RequestError where the loss
        is no number.
        """
        begin = self.clock()
        for number in range(parts):
            if number < self.position.stage:
                continue
            title = name if parts == 1 else f"{name}-{number + 1}"
            left = max(0.0, seconds - (self.clock() - begin)) / (parts - number)
            fixed = None if steps is None else steps.get(title, (0, 0))
            self._part(title, left, number / parts, (number + 1) / parts, fixed)
            self.position = Position(number + 1)
            watch()
        return self.reports

    def _part(self, title: str, seconds: float, low: float, high: float, fixed: tuple[int, int] | None) -> None:
        at = self.position
        report = StageReport(title, psnr_before=self.reports[-1].psnr_after if self.reports else self.evaluate())
        self.progress.stage(title, float(at.planned) if at.planned else None)
        begin = measured = self.clock()
        first = at.step
        if fixed is not None:
            at.planned = fixed[1]
        limit = None if fixed is None else fixed[0]
        while (at.planned == 0 or at.step < at.planned) and (limit is None or at.step < limit):
            done = at.step / at.planned if at.planned else 0.0
            # While steps are still being timed nobody knows how many there will be; a replay must not know either.
            factor = rate(low if at.step < WARMUP else low + (high - low) * done, at.step if low == 0.0 else WARMUP)
            for group, peak in zip(self.optimizer.param_groups, self.peaks):
                group["lr"] = peak * factor
            loss = self._loss()
            extra = self._regular(at.step)
            (loss if extra is None else loss + extra).backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.optimizer.zero_grad()
            at.step += 1
            now = self.clock()
            if at.step == first + 3 and not at.planned:
                measured = now  # the first steps may compile kernels
            if at.step == first + WARMUP and not at.planned:
                cost = (now - measured) / (WARMUP - 3)
                at.planned = max(WARMUP, WARMUP + int((seconds - (now - begin)) / max(cost, 1e-6)))
                self.progress.stage(title, float(at.planned))
            if at.step % 16 == 0:
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise RequestError(f"{title}: the loss is not a number", hint="try another --seed")
                self.progress.advance(at.step, loss=value)
            at.seconds = now - begin
            if self.coarse is None and at.planned and at.step % max(WARMUP, -(-at.planned // SWEEPS)) == 0:
                self.sweep()
            if self.stop():
                raise Stopped
            if fixed is None and at.planned and now - begin > 1.25 * seconds and at.step >= WARMUP:
                break
        report.steps, report.planned = at.step, at.planned
        report.seconds = self.clock() - begin
        report.psnr_after = self.evaluate()
        if self.coarse is None:
            report.note = f"{100 * self.live.count / max(1, self.live.grid.numel()):.1f} % of the cells occupied"
        self.progress.advance(at.step, psnr=report.psnr_after)
        self.reports.append(report)

    # -- resume ------------------------------------------------------------------------------------------------------

    def extra(self) -> dict[str, Tensor]:
        """What a resumed run needs beside student, optimiser and position."""
        numbers = torch.tensor([float(self.drawn), self.per_ray, self.hidden], dtype=torch.float64)
        known = torch.zeros(0) if self.known is None else self.known
        # A field may be stored with fewer digits than it learns with.
        weights = {f"weights.{name}": p.detach() for name, p in self.student.named_parameters()}
        return {"numbers": numbers, "cells": self.cells.grid, "live": self.live.grid, "known": known, **weights}

    def take_up(self, extra: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`extra`."""
        with torch.no_grad():
            for name, p in self.student.named_parameters():
                p.copy_(extra[f"weights.{name}"])
        drawn, self.per_ray, self.hidden = (float(v) for v in extra["numbers"])
        self.drawn = int(drawn)
        self._narrow(extra["live"].to(self.device))
        self.known = extra["known"].to(self.device) if extra["known"].numel() else None
