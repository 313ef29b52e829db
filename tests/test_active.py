"""What is hard and what becomes of it: poses, rays and points of active learning, with errors made by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from pvdconvert.cameras import Camera
from pvdconvert.distill import active, paper_views
from pvdconvert.distill.active import ActivePaper, HardPoses, HardRays, heaviest, worst
from pvdconvert.distill.methods import PaperOptions
from pvdconvert.distill.paper import Batch
from pvdconvert.field import FunctionField
from pvdconvert.testing.subject import Subject
from tests.lessons import lesson, subject_of


@pytest.fixture(scope="module")
def voxels() -> Subject:
    return subject_of("plenoxels")


def test_the_heaviest_third_and_one_of_each_solid_ray() -> None:
    rays = [[0.1, 0.6, 0.05, 0.2], [0.2, 0.1, 0.1], [], [0.7], [0.01 * k for k in (1, 9, 2, 30, 4, 5, 6, 7, 8, 3)]]
    offsets = torch.tensor([0, *itertools.accumulate(len(r) for r in rays)])
    picked = heaviest(torch.tensor([w for ray in rays for w in ray]), offsets)
    # floor(0.3 n) + 1 = 2, -, -, 1, 4; the second ray's opacity is 0.4.
    wanted = [[1, 3], [], [], [0], [1, 3, 7, 8]]
    parts = [picked[a:b].nonzero().squeeze(1).tolist() for a, b in itertools.pairwise(offsets.tolist())]
    assert parts == wanted


def test_the_points_are_the_union_of_both_sides(voxels: Subject) -> None:
    trainer = ActivePaper(lesson(voxels))
    s = paper_views.Samples(torch.zeros(4, 3), torch.zeros(4), torch.tensor([0, 4]), torch.zeros(1, 3), 0.1)
    chosen = trainer.chosen(s, torch.tensor([0.1, 0.6, 0.05, 0.2]), torch.tensor([0.9, 0.05, 0.02, 0.01]))
    assert chosen is not None
    assert chosen.tolist() == [0, 1, 3]


def camera(k: int) -> Camera:
    return Camera(8, 8, 10.0, 10.0, 4.0, 4.0, ((1.0, 0, 0, float(k)), (0, 1.0, 0, 0), (0, 0, 1.0, 3.0)))


def test_the_pool_of_poses_fills_and_then_gives_its_drawn_places_to_the_next_worst() -> None:
    pool, rng = HardPoses(5), np.random.default_rng(0)
    for k in (0, 3):
        pool.put([camera(k), camera(k + 1), camera(k + 2)])
        assert pool.full is (k == 3)
    drawn = pool.draw(2, rng)
    places = list(pool.drawn)
    assert [pool.cameras[p] for p in places] == drawn
    pool.put([camera(90), camera(91)])
    assert [pool.cameras[p] for p in places] == [camera(90), camera(91)]
    assert len(pool.cameras) == 6
    assert {c for k, c in enumerate(pool.cameras) if k not in places} <= {camera(k) for k in range(6)}
    pool.put([camera(99)])  # nothing was drawn: nothing is overwritten
    assert camera(99) not in pool.cameras


def test_the_pool_of_rays_fills_and_then_gives_its_drawn_places_to_new_rays() -> None:
    pool, g = HardRays(4, torch.device("cpu")), torch.Generator().manual_seed(0)
    rows = torch.arange(30.0).reshape(10, 3)
    pool.put(rows[:3], -rows[:3])
    assert not pool.full
    pool.put(rows[3:6], -rows[3:6])
    assert pool.full
    assert torch.equal(pool.o, rows[:4])
    o, d = pool.draw(2, g)
    assert pool.drawn is not None
    places = pool.drawn.tolist()
    assert torch.equal(o, rows[places])
    assert torch.equal(d, -rows[places])
    pool.put(rows[8:], -rows[8:])
    assert torch.equal(pool.o[places], rows[8:])
    kept = [p for p in range(4) if p not in places]
    assert torch.equal(pool.o[kept], rows[kept])


def test_the_worst_tenth_in_order() -> None:
    scores = [30.0, 12.0, 31.0, 11.0, *[40.0] * 16]
    assert worst(scores, 0.1) == [3, 1]
    assert worst([5.0], 0.1) == [0]


def test_hard_poses_are_those_where_the_student_is_wrong(voxels: Subject) -> None:
    """The student is the teacher but for a ball of light on one side: only views that see it are hard."""
    teacher = voxels.teacher

    def color(x: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        own = teacher.color(x, d[:, None])[:, 0]
        return torch.where((x[:, :1] > 0) & (d[:, :1] < 0), 1.0 - own, own)

    trainer = ActivePaper(lesson(voxels))
    trainer.student = FunctionField(teacher.density, color)
    trainer.options = PaperOptions(rays=1024)  # scored on 8 x 8 pixels
    trainer.epoch_size = 30
    first = trainer.new_epoch()
    trainer.hard_poses.capacity = 2
    trainer.new_epoch()
    scores = dict(zip((c.c2w for c in first), trainer.scores))
    hard = trainer.hard_poses.cameras
    assert len(hard) == 3
    assert all(c.position[0] > 0 for c in hard)  # their rays go towards -x
    assert sorted(scores.values())[:3] == sorted(scores[c.c2w] for c in hard)


def test_hard_poses_come_back_from_the_fifth_epoch_on_and_count_half(voxels: Subject) -> None:
    trainer = ActivePaper(lesson(voxels))
    trainer.epoch_size = 20
    trainer.hard_poses.capacity = 5
    trainer.score = lambda cameras: [float(k) for k in range(len(cameras))]  # type: ignore[method-assign]
    for epoch in range(6):
        trainer.poses = []
        batch = trainer.batch()
        assert trainer.epoch == epoch
        assert len(trainer.met) == 20
        expected = 2 if epoch >= active.PATIENCE else 0
        assert len(trainer.hard) == expected
        assert batch.weight is not None
        assert float(batch.weight[0]) == (0.5 if 0 in trainer.hard else 1.0)
        assert len(trainer.hard_poses.cameras) == min(6, 2 * epoch)


def test_the_hardest_new_rays_enter_the_pool_and_share_their_mass(voxels: Subject) -> None:
    trainer = ActivePaper(lesson(voxels))
    trainer.options = PaperOptions(rays=20)
    trainer.hard_rays = HardRays(4, torch.device("cpu"))
    rays = torch.arange(60.0).reshape(20, 3)
    error = torch.zeros(20)
    error[[13, 7]] = torch.tensor([0.9, 0.4])
    trainer.fresh = 20
    trainer.after(Batch(rays, -rays, rays), error)
    assert torch.equal(trainer.hard_rays.o[:2], rays[[13, 7]])
    error[[13, 7]] = 0
    error[[2, 19]] = torch.tensor([0.3, 0.8])
    trainer.after(Batch(rays, -rays, rays), error)
    assert trainer.hard_rays.full
    batch = trainer.batch()
    assert batch.o.shape == (22, 3)
    assert torch.equal(batch.d[20:], -batch.o[20:])  # from the pool
    errors = torch.zeros(22)
    errors[[4, 11, 20, 21]] = torch.tensor([1.0, 2.0, 9.0, 9.0])
    weight = trainer.reweighted(batch, errors)
    assert weight is not None
    halved = (weight < 1).nonzero().squeeze(1).tolist()
    assert halved == [4, 11, 20, 21]  # two of the new and those from the pool: 18 + 4 / 2 = 20 rays' worth
    assert float(weight.sum()) == 20.0
    trainer.after(batch, errors)
    kept = {tuple(r) for r in trainer.hard_rays.o.tolist()}
    assert {tuple(batch.o[4].tolist()), tuple(batch.o[11].tolist())} <= kept  # and none of those just trained on
    assert len(kept & {tuple(r) for r in batch.o[20:].tolist()}) == 0


def test_a_pool_in_proportion_to_the_run(voxels: Subject) -> None:
    trainer = ActivePaper(lesson(voxels))
    trainer.options = PaperOptions()
    trainer.expect(30_000)
    assert len(trainer.hard_rays.o) == 409 * 1503  # 614,400 rays are full after 1,502.2 steps
    trainer.expect(300)
    assert len(trainer.hard_rays.o) == 409 * 16
