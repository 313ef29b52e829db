"""The paper's three levels of active learning (PVD-AL, arXiv 2304.04012; pvd.md 5.4): ``--method pvd-al``.

No stages: every term from the first step. Poses, rays and points on which the student is worst are met more often.
docs/pvd.md lists what the reference does wrong at each level and what is done instead.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor

from pvdconvert.cameras import Camera
from pvdconvert.distill import paper_terms as terms
from pvdconvert.distill import paper_views as views
from pvdconvert.distill.methods import Lesson
from pvdconvert.distill.paper import Batch, Paper

HARD = 0.1
"""Share of poses of an epoch, and of rays of a step, that count as hard: as many are met again."""

POSES = 100
"""Hard poses kept for an epoch of 312; in proportion for a shorter one."""

PATIENCE = 4
"""The first epoch that meets hard poses again."""

BATCHES = 150
"""Steps' worth of hard rays kept in a run of 30,000 steps: 409 x 1,502; in proportion for a shorter run."""

POINTS = 0.3
"""Share of a ray's samples, the heaviest first, on which volume terms are compared."""

SOLID = 0.5
"""Opacity below which a ray has no such samples."""

SCORED = 1 / 16
"""Share of a step's rays in the lattice on which every pose of an epoch is scored: 16 x 16 of 4096."""

SHARED = 0.5
"""Weight of rays that stand for the hard tenth together with as many others: counted fully they would bias the loss."""


class HardPoses:
    """A pool of poses. Filled by the worst of each epoch; when full, the next worst overwrite what was drawn."""

    def __init__(self, capacity: float) -> None:
        self.capacity = capacity
        self.cameras: list[Camera] = []
        self.drawn: list[int] = []

    @property
    def full(self) -> bool:
        return len(self.cameras) > self.capacity

    def draw(self, count: int, rng: np.random.Generator) -> list[Camera]:
        """``count`` different ones; their places are remembered."""
        self.drawn = [int(k) for k in rng.permutation(len(self.cameras))[:count]]
        return [self.cameras[k] for k in self.drawn]

    def put(self, worst: list[Camera]) -> None:
        """Take in the worst of an epoch: appended until the pool is full, then in place of what was drawn."""
        if not self.full:
            self.cameras += worst
        for place, camera in zip(self.drawn, worst):
            self.cameras[place] = camera
        self.drawn = []


class HardRays:
    """A pool of rays: origins and directions [capacity, 3]."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.o, self.d = torch.zeros(capacity, 3, device=device), torch.zeros(capacity, 3, device=device)
        self.filled = 0
        self.drawn: Tensor | None = None

    @property
    def full(self) -> bool:
        return self.filled >= len(self.o)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Origins and directions of ``count`` different ones; their places are remembered."""
        self.drawn = torch.randperm(len(self.o), generator=generator)[:count].to(self.o.device)
        return self.o[self.drawn], self.d[self.drawn]

    def put(self, o: Tensor, d: Tensor) -> None:
        """Take in the hardest new rays of a step: appended until the pool is full, then in place of what was drawn."""
        if self.drawn is not None:
            n = min(len(self.drawn), len(o))
            self.o[self.drawn[:n]], self.d[self.drawn[:n]] = o[:n], d[:n]
            self.drawn = None
        elif not self.full:
            n = min(len(o), len(self.o) - self.filled)
            self.o[self.filled : self.filled + n], self.d[self.filled : self.filled + n] = o[:n], d[:n]
            self.filled += n


def heaviest(weight: Tensor, offsets: Tensor) -> Tensor:
    """[S] bool: the floor(0.3 n) + 1 samples of largest ``weight`` [S] of each ray of n; none where their sum < 0.5."""
    counts = offsets[1:] - offsets[:-1]
    ray = torch.repeat_interleave(torch.arange(len(counts), device=weight.device), counts)
    order = torch.argsort(weight, descending=True, stable=True)
    order = order[torch.argsort(ray[order], stable=True)]  # ray by ray, the heaviest first
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - offsets[:-1][ray]
    opacity = torch.zeros(len(counts), dtype=torch.float64, device=weight.device).index_add_(0, ray, weight.double())
    kept = (counts.double() * POINTS + 1e-9).floor().long() + 1
    return (rank < kept[ray]) & (opacity >= SOLID)[ray]


def worst(scores: list[float], share: float) -> list[int]:
    """Places of the ``share`` of lowest ``scores``, the lowest first; at least one."""
    count = max(1, round(share * len(scores)))
    return [int(k) for k in np.argsort(np.asarray(scores), kind="stable")[:count]]


class ActivePaper(Paper):
    """The trainer."""

    joint = True

    def __init__(self, lesson: Lesson) -> None:
        super().__init__(lesson)
        self.met: list[Camera] = []
        """Poses of the epoch at hand; ``hard``: those of them that came from the pool."""
        self.hard: set[int] = set()
        self.hard_poses = HardPoses(POSES)
        self.hard_rays = HardRays(0, self.device)
        self.fresh = 0
        self.scores: list[float] = []

    def expect(self, steps: float) -> None:
        self.hard_poses.capacity = POSES * self.epoch_size / self.longest_epoch
        count = self.hard_count
        share = BATCHES * self.options.rays / (count * terms.STEPS)  # of a run, until the pool is full
        self.hard_rays = HardRays(count * max(1, math.ceil(share * steps)), self.device)

    @property
    def hard_count(self) -> int:
        """Rays of a step that count as hard: 409 of 4096."""
        return max(1, int(HARD * self.options.rays))

    # -- poses -----------------------------------------------------------------------------------------------------

    def new_epoch(self) -> list[Camera]:
        if self.met:
            self.scores = self.score(self.met)
            self.hard_poses.put([self.met[k] for k in worst(self.scores, HARD)])
        cameras = super().new_epoch()
        self.hard = set()
        if self.epoch >= PATIENCE and self.hard_poses.full:
            places = [int(k) for k in self.random.permutation(len(cameras))[: max(1, round(HARD * len(cameras)))]]
            for place, camera in zip(places, self.hard_poses.draw(len(places), self.random)):
                target = [float(v) for v in views.looked_at(camera, self.scene, self.box)]
                cameras[place] = views.jittered(camera, target, self.random)
                self.hard.add(place)
        self.met = list(cameras)
        return cameras

    @torch.no_grad()
    def score(self, cameras: list[Camera]) -> list[float]:
        """dB of the student against the teacher on the same lattice of pixels of every pose, all of one moment."""
        out, side = [], max(4, int(math.sqrt(SCORED * self.options.rays)))
        for camera in cameras:
            o, d = (v.to(self.device) for v in views.fixed_rays(camera, side))
            background = torch.tensor(self.scene.backdrop, device=self.device).expand(len(o), 3)
            s = views.sample(
                self.scene, self.cells, o, d, terms.STEP * self.unit, torch.full((len(o),), 0.5, device=self.device)
            )
            if not len(s.x):
                out.append(math.inf)
                continue
            theirs, ours = self.theirs(s, color=True, tap=False), self.ours(s, color=True, tap=False)
            a, b = (self.rendered(answers, s, background)[0] for answers in (theirs, ours))
            out.append(-10.0 * math.log10(max(1e-12, float((a - b).square().mean()))))
        return out

    # -- rays ------------------------------------------------------------------------------------------------------

    def batch(self) -> Batch:
        batch = super().batch()
        place = len(self.met) - len(self.poses) - 1
        self.fresh = len(batch.o)
        weight = torch.full((self.fresh,), SHARED if place in self.hard else 1.0, device=self.device)
        if not self.hard_rays.full:
            return dataclasses.replace(batch, weight=weight)
        o, d = self.hard_rays.draw(self.hard_count, self.generator)
        return Batch(
            torch.cat([batch.o, o]),
            torch.cat([batch.d, d]),
            torch.cat([batch.background, self.background(len(o), self.generator)]),
            torch.cat([weight, torch.full((len(o),), SHARED, device=self.device)]),
        )

    def reweighted(self, batch: Batch, error: Tensor) -> Tensor | None:
        """The hardest tenth of the new rays shares its mass with those drawn from the pool."""
        if batch.weight is None or len(batch.o) == self.fresh:
            return batch.weight
        weight = batch.weight.clone()
        weight[self._hardest(error)] *= SHARED
        return weight

    def after(self, batch: Batch, error: Tensor) -> None:
        # Only new rays may enter: one that was just trained on is no longer what the pool is for.
        hardest = self._hardest(error)
        self.hard_rays.put(batch.o[hardest], batch.d[hardest])

    def _hardest(self, error: Tensor) -> Tensor:
        return torch.topk(error[: self.fresh], min(self.hard_count, self.fresh)).indices

    # -- points ----------------------------------------------------------------------------------------------------

    def chosen(self, s: views.Samples, theirs: Tensor, ours: Tensor) -> Tensor | None:
        return (heaviest(theirs, s.offsets) | heaviest(ours, s.offsets)).nonzero().squeeze(1)
