"""The paper's methods: numbers of pvd.md by hand, poses, pools of hard things, and every architecture once."""

from __future__ import annotations

import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pvdconvert
from pvdconvert.distill import methods, paper, paper_terms, paper_views
from pvdconvert.distill.active import ActivePaper
from pvdconvert.distill.distiller import Stopped
from pvdconvert.distill.methods import PaperOptions
from pvdconvert.distill.paper import Paper
from pvdconvert.distill.paper_terms import Tap, cut, distance, learning_rate, weights
from pvdconvert.errors import Interrupted, UsageError
from pvdconvert.field import RadianceField
from pvdconvert.plugin import ArrayTensor
from pvdconvert.registry import default
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.report import StageReport
from pvdconvert.scene import Box, RaySpace, Scene
from pvdconvert.testing.analytic import AnalyticScene
from pvdconvert.testing.subject import Subject
from tests.lessons import camera_of, lesson, subject_of

ARCHITECTURES = sorted(default().architectures())


@pytest.fixture(scope="module")
def voxels() -> Subject:
    return subject_of("plenoxels")


# -- names and options ----------------------------------------------------------------------------------------------


def test_a_method_and_its_options_are_one_word() -> None:
    method, options = methods.parse("pvd:loss=L2,rays=512")
    assert (method.name, options.loss, options.rays, options.rates) == ("pvd", "L2", 512, "paper")
    assert methods.parse("store")[0].resumes
    assert PaperOptions() == methods.parse("pvd-al")[1]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("pvd_al", "did you mean pvd-al"),
        ("pvd:size=3", "loss, rays"),
        ("pvd:rays=many", "not a number"),
        ("pvd:rays=0", "1 .."),
        ("pvd:loss=L3", "normL2"),
        ("store:rays=4", "has none"),
    ],
)
def test_a_method_that_is_none_is_refused_in_one_line(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        methods.parse(text)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError):
        pvdconvert.convert("nothing.ckpt", "ngp", method=text)


# -- numbers --------------------------------------------------------------------------------------------------------


def test_weights_at_each_paper_step() -> None:
    assert weights(0) == weights(1999.9) == (0.002, 0, 0, 0, 0)
    # ln 0.995 = -0.00501254; 2000 and 5000 of it are -10.02508 and -25.06271 (pvd.md 1.2: 8.9e-8 and 2.6e-14).
    volume, render = weights(2000), weights(5000)
    assert list(volume) == pytest.approx([8.855e-8, 0.002, 0.002, 0, 0], rel=1e-3, abs=0)
    assert list(render) == pytest.approx([2.609e-14, 0.002, 0.002, 1.0, 1e-4], rel=1e-3, abs=0)
    assert weights(0, tapped=False) == weights(4999, tapped=False) == (0, 0.002, 0.002, 0, 0)
    assert weights(0, joint=True) == (0.002, 0.002, 0.002, 1.0, 1e-4)
    assert weights(1, joint=True).feature == pytest.approx(0.00199)


def test_the_rate_is_a_cosine_to_7e_5() -> None:
    assert learning_rate(1e-2, 0.0) == pytest.approx(1e-2)
    assert learning_rate(1e-2, 0.5) == pytest.approx(5.035e-3)
    assert learning_rate(1e-2, 1.0) == pytest.approx(7e-5)
    assert learning_rate(1e-3, 1 / 3) == pytest.approx(7e-5 + 0.75 * 9.3e-4)
    assert learning_rate(10.0, 1.0) == pytest.approx(0.07)  # a rate in units of its own falls by the same factor


def test_distances_by_hand() -> None:
    a, b = torch.tensor([[3.0, 4.0], [1.0, 2.0]]), torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    by_hand = {"normL2": 5.0, "L2": 25 / 4, "normL1": 7.0, "L1": 7 / 4}
    quarter = {"normL2": 2.5, "L2": 25 / 16, "normL1": 7 / 4, "L1": 7 / 16}
    w = torch.tensor([0.25, 8.0])
    assert {k: float(distance(a, b, k)) for k in methods.LOSSES} == pytest.approx(by_hand)
    assert {k: float(distance(a, b, k, w)) for k in methods.LOSSES} == pytest.approx(quarter)


def test_an_unsquared_norm_keeps_its_slope_as_the_error_falls_and_has_none_at_zero() -> None:
    for size, slope in ((1.0, 1.0), (1e-3, 1.0), (0.0, 0.0)):
        x = torch.tensor([[size, 0.0]], requires_grad=True)
        distance(x, torch.zeros(1, 2), "normL2").backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None
        assert float(x.grad[0, 0]) == pytest.approx(slope)


def test_the_cut_keeps_gradients_that_lead_back() -> None:
    x = torch.tensor([-5.0, -5.0, 0.0, 9.0, 9.0], requires_grad=True)
    y = cut(x, -2.0, 7.0)
    assert y.tolist() == [-2, -2, 0, 7, 7]
    y.backward(torch.tensor([-1.0, 1.0, 1.0, 1.0, -1.0]))  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert x.grad.tolist() == [-1, 0, 1, 1, 0]  # a step goes against it: up from below, down from above, never further


def test_a_log_density_that_fell_out_of_the_range_comes_back() -> None:
    raw = torch.tensor([-9.0, 12.0], requires_grad=True)
    optimizer = torch.optim.Adam([raw], lr=0.5)
    target = torch.tensor([3.0, 5.0])
    for _ in range(200):
        optimizer.zero_grad()
        distance(paper_terms.log_density(raw.exp(), 1.0), target, "L2").backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert raw.tolist() == pytest.approx([3.0, 5.0], abs=0.1)


def test_constrained_density_is_per_unit_of_the_scene() -> None:
    sigma = torch.tensor([0.0, math.exp(-2), 1.0, 2000.0]) / 4
    assert paper_terms.log_density(sigma, 4.0).tolist() == pytest.approx([-2, -2, 0, 7], abs=1e-6)
    # pvd.md 1.3: opacity of a step at both ends of the range.
    alpha = [1 - math.exp(-math.exp(h) * paper_terms.STEP) for h in (paper_terms.FLOOR, paper_terms.CEILING)]
    assert alpha == pytest.approx([4.58e-4, 0.9755], rel=1e-3)


def test_rates_by_kind_of_parameter_and_never_above_the_plugins() -> None:
    class Student(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(2, 2)
            self.grid, self.linear_density, self.timid = (torch.nn.Parameter(torch.zeros(3)) for _ in range(3))

    s = Student()
    own = [
        {"params": [*s.net.parameters(), s.grid], "lr": 2e-2, "name": "both", "rotated": True},
        {"params": s.linear_density, "lr": 12.5, "name": "density"},
        {"params": [s.timid], "lr": 3e-3, "name": "timid"},
    ]
    made = paper_terms.groups(s, own, "paper")
    assert [(g["name"], g["lr"], len(g["params"])) for g in made] == [
        ("both", 1e-3, 2),
        ("both", 1e-2, 1),
        ("density", 12.5, 1),
        ("timid", 3e-3, 1),
    ]
    assert [g["lr"] for g in paper_terms.groups(s, own, "plugin")] == [2e-2, 2e-2, 12.5, 3e-3]
    assert set(made[0]) == {"params", "lr", "name"}  # the method is plain Adam: no other wish is granted


def test_features_of_equal_width_are_compared_as_they_are_within_the_teachers_range() -> None:
    theirs = torch.tensor([[0.0, 10.0], [2.0, 10.0]])  # means 1, 10; deviations 1, 0: cut to -3 .. 5 and to 10
    tap = Tap(theirs, 2)
    a, b = tap.pair(torch.tensor([[9.0, 9.0], [4.0, 11.0]]), torch.tensor([[-30.0, 10.0], [3.0, 10.0]]))
    assert a.tolist() == [[5, 10], [4, 10]]
    assert b.tolist() == [[-3, 10], [3, 10]]


def test_features_of_other_widths_meet_through_an_affine_map() -> None:
    g = torch.Generator().manual_seed(0)
    theirs = torch.randn(4000, 20, generator=g)
    ours = torch.cat([theirs @ torch.randn(20, 40, generator=g) + 3.0, torch.randn(4000, 2, generator=g)], 1)
    a, b = Tap(theirs, 42).pair(ours, theirs)
    assert a.shape == b.shape == (4000, 15)
    assert float((a - b).square().mean()) < 0.01 * float(b.square().mean())


# -- views ----------------------------------------------------------------------------------------------------------


def test_an_epoch_has_312_poses_dense_near_the_horizon() -> None:
    bands = paper_views.elevations()
    assert bands.shape == (312, 2)
    by_top = Counter(int(a) for a in bands[:, 1])
    # (90 - a) // 15 + 1: 7 at the horizon, 6 up to 15 degrees, one from 76 on.
    assert [by_top[a] for a in (0, 1, 15, 16, 30, 60, 61, 75, 76, 79, 80)] == [7, 6, 6, 5, 5, 3, 2, 2, 1, 1, 1]
    assert bands.mean() == pytest.approx(28, abs=2.5)
    assert [list(bands[by_top[0] - 1]), list(bands[-1])] == [[0, 0], [75, 80]]


def test_poses_lie_on_a_sphere_of_3_2_half_sides_and_look_at_the_centre() -> None:
    box = Box((1.0, -2.0, 0.0), (3.0, 4.0, 5.0))  # longest side 6, centre (2, 1, 2.5)
    up = paper_views.hemisphere(box, 312, np.random.default_rng(0), below=False)
    out = np.stack([c.position for c in up]) - [2, 1, 2.5]
    assert np.linalg.norm(out, axis=1) == pytest.approx(9.6)
    elevation = np.degrees(np.arcsin(out[:, 2] / 9.6))
    assert elevation.min() >= -1e-9
    assert elevation.mean() == pytest.approx(28, abs=3)
    for camera, away in zip(up, out):
        assert np.asarray(camera.c2w)[:, 2] == pytest.approx(away / 9.6)
        assert 2 * math.atan(camera.width / 2 / camera.fx) == pytest.approx(0.6911112)
    both = paper_views.hemisphere(box, 312, np.random.default_rng(0), below=True)
    low = sum(c.position[2] < 2.5 for c in both)
    assert 110 < low < 200
    assert abs(np.stack([c.position for c in both])[:, 2] - 2.5) == pytest.approx(out[:, 2])


def test_forward_facing_scenes_get_forward_facing_poses_that_are_rotations() -> None:
    scene = Scene(Box.cube(1.0), ray_space=RaySpace("ndc", 504, 378, 400, 1.0), near=0.0, far=1.0)
    for camera in paper_views.epoch(scene, scene.box, 30, np.random.default_rng(0)):
        m = np.asarray(camera.c2w)[:, :3]
        assert m.T @ m == pytest.approx(np.eye(3), abs=1e-9)
        assert np.linalg.det(m) == pytest.approx(1)
        assert m[2, 2] > 0.9


def test_a_scenes_own_cameras_are_its_poses() -> None:
    own = tuple(paper_views.hemisphere(Box.cube(1.0), 7, np.random.default_rng(1), below=False))
    scene = Scene(Box.cube(1.0), cameras=own)
    got = paper_views.epoch(scene, scene.box, 10, np.random.default_rng(0))
    assert len(got) == 10
    assert set(got[:7]) == set(own)


def test_a_jittered_camera_moves_and_keeps_what_it_looked_at() -> None:
    rng, center = np.random.default_rng(0), np.array([2.0, 1.0, 2.5])
    box = Box((1.0, -2.0, 0.0), (3.0, 4.0, 5.0))
    camera = paper_views.hemisphere(box, 1, rng, below=False)[0]
    target = paper_views.looked_at(camera, Scene(box), box)
    assert target == pytest.approx(center)
    angles = []
    for _ in range(50):
        moved = paper_views.jittered(camera, [float(v) for v in target], rng)
        assert np.linalg.norm(moved.position - center) == pytest.approx(9.6)
        away = (moved.position - center) / 9.6
        assert np.asarray(moved.c2w)[:, 2] == pytest.approx(away)
        m = np.asarray(moved.c2w)[:, :3] @ np.asarray(camera.c2w)[:, :3].T
        angles.append(math.degrees(math.acos(min(1.0, (np.trace(m) - 1) / 2))))
    assert 2 < np.mean(angles) < 12
    assert max(angles) < 9 * math.sqrt(3) + 0.5


def test_samples_lie_a_step_apart_in_cells() -> None:
    scene, cells = Scene(Box.cube(1.0)), Occupancy(-torch.ones(3), 1.0, torch.ones(2, 2, 2, dtype=torch.uint8))
    cells.grid[1] = 0  # nothing at x > 0
    o, d = torch.tensor([[-3.0, 0.5, 0.5], [0.5, 0.5, 3.0]]), torch.tensor([[1.0, 0, 0], [0, 0, -1.0]])
    s = paper_views.sample(scene, cells, o, d, 0.1, torch.tensor([0.5, 0.5]))
    assert s.offsets.tolist() == [0, 10, 10]
    assert s.x[:, 0].tolist() == pytest.approx([-0.95 + 0.1 * k for k in range(10)], abs=1e-5)
    assert s.ray.tolist() == [0] * 10


# -- stages ---------------------------------------------------------------------------------------------------------


class Clock:
    """A trainer's clock that moves by ``pace`` seconds a step; stages are planned and not run."""

    def __init__(self, trainer: Paper, monkeypatch: pytest.MonkeyPatch, pace: dict[str, float], tapped: bool) -> None:
        self.now, self.planned = 0.0, dict[str, int]()
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(trainer, "prepare_tap", lambda: "" if tapped else "nothing to compare")
        monkeypatch.setattr(trainer, "_pace", lambda plan: {name: 0.01 for name, _, _ in plan})

        def stage(window: paper.Window, run: int, planned: int, deadline: float) -> StageReport:
            name = window[0]
            self.now += run * pace[name]
            self.planned[name] = planned
            return StageReport(name, run, planned, run * pace[name])

        monkeypatch.setattr(trainer, "_stage", stage)


PACE = {"features": 0.01, "volume": 0.01, "render": 0.01}


def test_a_budget_keeps_the_papers_proportions(voxels: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Paper(lesson(voxels))
    clock = Clock(trainer, monkeypatch, PACE, tapped=True)
    trainer.run(3.0)
    assert clock.planned == {"features": 20, "volume": 30, "render": 250}
    trainer.run(math.inf)
    assert clock.planned == {"features": 2000, "volume": 3000, "render": 25000}


def test_a_budget_holds_where_steps_cost_more_than_was_tried(voxels: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Paper(lesson(voxels))
    clock = Clock(trainer, monkeypatch, {"features": 0.02, "volume": 0.02, "render": 0.02}, tapped=True)
    trainer.run(6.0)
    assert clock.now == pytest.approx(6.0, rel=0.02)


def test_without_features_the_volume_stage_begins_at_once(voxels: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Paper(lesson(voxels))
    clock = Clock(trainer, monkeypatch, PACE, tapped=False)
    trainer.run(3.0)
    assert clock.planned == {"volume": 50, "render": 250}
    assert trainer.reports[0].note == "skipped: nothing to compare"


@pytest.mark.parametrize("to", ARCHITECTURES)
@pytest.mark.parametrize("kind", [Paper, ActivePaper])
def test_every_architecture_learns(kind: type[Paper], to: str) -> None:
    given = lesson(subject_of(to))
    given.options = PaperOptions(rays=48, rates="plugin")
    reports = kind(given).run(0.0, steps={"volume": (5, 5), "render": (20, 20), "joint": (25, 25)})
    ran = [(r.name, r.steps) for r in reports if r.steps]
    assert ran == ([("joint", 25)] if kind is ActivePaper else [("volume", 5), ("render", 20)])
    before = next(r.psnr_before for r in reports if r.steps)
    assert max(r.psnr_after or 0 for r in reports) > (before or 99) + 0.1


def test_features_are_aligned_first_where_both_sides_have_them() -> None:
    subject = subject_of("ngp")
    given = lesson(subject, teacher=subject.field)
    given.evaluate = lambda: 0.0
    trainer = Paper(given)
    reports = trainer.run(0.0, steps={"features": (40, 40), "volume": (1, 1), "render": (1, 1)})
    assert [r.name for r in reports] == ["features", "volume", "render"]
    tap, generator = trainer.tap, torch.Generator().manual_seed(3)
    assert tap is not None
    batch = trainer.through(camera_of(subject), generator)

    def loss(student: RadianceField) -> float:
        trainer.student = student
        found = trainer.loss(batch, weights(0), torch.Generator().manual_seed(4))
        assert found is not None
        return float(found[0].detach())

    trained = trainer.student
    assert loss(trained) < 0.8 * loss(subject.fresh())


def test_decoders_of_the_same_name_and_shape_are_copied() -> None:
    subject = subject_of("ngp")
    _, theirs = subject.code.save(subject.field)
    student = subject.fresh()
    lazy = {k: ArrayTensor(v.numpy()) for k, v in theirs.items()}
    lazy["encoder.embeddings"] = ArrayTensor(np.zeros((4, 2), np.float32))
    taken = paper.transplant(subject.code, student, subject.scene, lazy)
    assert "color_net.0.weight" in taken
    assert "encoder.embeddings" not in taken
    _, ours = subject.code.save(student)
    _, fresh = subject.code.save(subject.fresh())
    assert torch.equal(ours["color_net.0.weight"], theirs["color_net.0.weight"])
    assert torch.equal(ours["encoder.embeddings"], fresh["encoder.embeddings"])


def test_backgrounds_are_random_only_where_nobody_knows_them(voxels: Subject) -> None:
    trainer = Paper(lesson(voxels))
    g = torch.Generator().manual_seed(0)
    assert float(trainer.background(50, g).abs().max()) == 0.0  # the scene's own is black
    trainer.scene = Scene(Box.cube(1.0))
    random = trainer.background(5000, g)
    assert float(random.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(random.std()) == pytest.approx(12**-0.5, abs=0.02)


def test_the_factors_of_a_low_rank_density_are_kept_small() -> None:
    subject = subject_of("tensorf")
    student = subject.fresh()
    norm = subject.code.factor_norm(student).detach()  # type: ignore[attr-defined]
    # Three planes and three lines; the initial 0.1 N(0, 1) has a mean absolute value of 0.0798 each.
    tensors = subject.code.save(student)[1]
    by_hand = sum(float(v.abs().mean()) for k, v in tensors.items() if k.startswith("density_"))
    assert float(norm) == pytest.approx(by_hand, rel=1e-5)
    assert by_hand > 0


@pytest.mark.parametrize("kind", [Paper, ActivePaper])
def test_the_same_seed_and_steps_give_the_same_student_bit_for_bit(kind: type[Paper], voxels: Subject) -> None:
    students = []
    for seed in (0, 0, 1):
        given = lesson(voxels)
        given.seed, given.evaluate = seed, lambda: 0.0
        kind(given).run(0.0, steps={"volume": (3, 3), "joint": (3, 3)})
        students.append(torch.cat([p.detach().flatten() for p in given.student.parameters()]))
    assert torch.equal(students[0], students[1])
    assert not torch.equal(students[0], students[2])


def test_a_stop_ends_the_run(voxels: Subject) -> None:
    given = lesson(voxels)
    calls = iter([False, False, True])
    given.stop = lambda: next(calls)
    trainer = Paper(given)
    with pytest.raises(Stopped):
        trainer.run(0.0, steps={"volume": (9, 9)})
    assert trainer.where == "stage volume after 3 steps"


# -- the road -------------------------------------------------------------------------------------------------------


def through(to: str, method: str, steps: str, out: Path, **options: Any) -> pvdconvert.Report:
    scene = AnalyticScene()
    sets = {"resolution": 24} if to == "plenoxels" else {"log2_table": 10, "levels": 4}
    settings = {"steps": steps, "method": method, "sets": sets, "validate": False, **options}
    return pvdconvert.convert(scene, to, scene=scene.scene, out=out, **settings)


def test_the_method_is_in_the_report_the_file_and_the_replay(tmp_path: Path) -> None:
    out, method = tmp_path / "o.safetensors", "pvd:rays=48"
    first = through("plenoxels", method, "labels=1;volume=4/4;render=8/8", out)
    assert first.settings["method"] == method
    assert [s.name for s in first.stages] == ["labels", "features", "volume", "render"]
    assert first.replay.endswith("volume=4/4;render=8/8")
    assert pvdconvert.open_field(out).parts.provenance["settings"]["method"] == method


def test_what_cannot_resume_says_so(tmp_path: Path) -> None:
    out = tmp_path / "o.safetensors"
    with pytest.raises(Interrupted, match="start again"):
        through("ngp", "pvd-al:rays=16", "labels=1;joint=9/9", out, stop=lambda: True)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="cannot resume"):
        through("ngp", "pvd-al", "labels=1;joint=9/9", out, resume=True)
