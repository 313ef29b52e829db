"""Losses without dead zones, schedules that replay, and the order of the stages."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from pvdconvert.distill import losses
from pvdconvert.distill.label import focus, latest, merge, visible_cells
from pvdconvert.distill.rounds import cycles
from pvdconvert.distill.schedule import Plateau, Replay, rate
from pvdconvert.distill.store import Store
from pvdconvert.distill.views import draw_rays, forward_cameras
from pvdconvert.errors import UsageError
from pvdconvert.prepare import prepare
from pvdconvert.render.trace import render_rays
from pvdconvert.scene import Box, RaySpace, Scene
from pvdconvert.testing.analytic import AnalyticScene
from tests.answers import answers


@pytest.fixture(scope="module")
def store() -> Store:
    field = AnalyticScene()
    return answers(prepare(field, field.scene, seconds=1.0).occupancy, 2)


# -- density, with the paper's special care ----------------------------------------------------------------------


@pytest.mark.parametrize("start", [-25.0, 12.0])
def test_a_student_stuck_beyond_either_limit_recovers(start: float) -> None:
    """PVD's clamp has no gradient outside of [-2, 7]; here an entry comes back from far beyond both ends."""
    target = torch.tensor([0.5, 5.0, 20.0, 60.0])
    dt = torch.full((4,), 0.02)
    raw = torch.full((4,), start, requires_grad=True)
    optimizer = torch.optim.Adam([raw], lr=0.1)
    first = None
    for _ in range(1500):
        optimizer.zero_grad()
        loss = losses.density_loss(raw.exp(), target, dt)
        loss.backward()  # type: ignore[no-untyped-call]
        first = raw.grad.clone() if first is None and raw.grad is not None else first
        optimizer.step()
    assert first is not None
    assert bool((first.abs() > 0).all())
    assert torch.allclose(raw.detach().exp(), target, rtol=0.02)


def test_beyond_the_limits_the_loss_is_one_sided() -> None:
    dt = torch.ones(1)
    empty, opaque = torch.tensor([0.0]), torch.tensor([1e6])
    floor, ceiling = math.exp(losses.FLOOR), math.exp(losses.CEILING)
    below, above = torch.tensor([floor / 10]), torch.tensor([ceiling * 10])
    assert float(losses.log_thickness_error(below, empty, dt)) == 0.0
    assert float(losses.log_thickness_error(above, opaque, dt)) == 0.0
    assert float(losses.log_thickness_error(above, empty, dt)) == pytest.approx(
        math.log(ceiling * 10 / floor), rel=1e-5
    )
    assert float(losses.log_thickness_error(below, opaque, dt)) == pytest.approx(
        math.log(floor / 10 / ceiling), rel=1e-5
    )


def test_density_loss_is_zero_only_for_equal_opacity() -> None:
    sigma = torch.tensor([1.0, 10.0, 100.0])
    dt = torch.full((3,), 0.05)
    assert float(losses.density_loss(sigma, sigma, dt)) == pytest.approx(0.0, abs=1e-9)
    by_hand = (math.exp(-0.5) - math.exp(-0.05)) ** 2
    got = losses.density_loss(torch.tensor([1.0]), torch.tensor([10.0]), torch.tensor([0.05]), log_weight=0.0)
    assert float(got) == pytest.approx(by_hand, rel=1e-5)


def test_the_adapter_finds_an_affine_map_between_taps_of_any_width() -> None:
    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(500, 7, generator=generator)
    theirs = ours @ torch.randn(7, 20, generator=generator) + 3.0
    _, _, z = losses.whitened(theirs, 16)
    assert z.shape == (500, 7)  # a rank-7 tap has seven components, not sixteen
    assert torch.allclose(z.T @ z / len(z), torch.eye(7), atol=1e-3)
    a = losses.adapter(ours, z, ridge=1e-9)
    assert torch.allclose(ours @ a[:-1] + a[-1], z, atol=1e-3)


# -- schedules -----------------------------------------------------------------------------------------------------


def test_the_rate_warms_up_and_falls() -> None:
    assert rate(0.0, 0) < rate(0.0, 5) < rate(0.0, 100) == pytest.approx(1.0)
    assert rate(0.5, 100) == pytest.approx(0.51, abs=0.01)
    assert rate(1.0, 100) == pytest.approx(0.02)


def test_plateau() -> None:
    watch = Plateau(0.02)
    assert [watch.reached(v) for v in (1.0, 0.5, 0.4, 0.399)] == [False, False, False, True]


def test_replay_survives_its_text() -> None:
    replay = Replay(3, 12, (("density", 90, 120), ("color", 5, 5)))
    assert Replay.parse(str(replay)) == replay


@pytest.mark.parametrize("text", ["", "labels=0", "labels=3;density=9/4", "labels=x", "density=3"])
def test_a_bad_replay_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="replay"):
        Replay.parse(text)


# -- the store -----------------------------------------------------------------------------------------------------


def test_the_store_holds_what_the_teacher_renders(store: Store) -> None:
    """Compositing the stored samples gives the stored pixels; they agree with a five times finer render."""
    w = store.weight
    rgb = torch.zeros(store.rays, 3).index_add_(0, store.ray_of(), w[:, None] * store.rgb)
    assert torch.allclose(rgb, store.ray_rgb, atol=2e-3)
    field = AnalyticScene()
    o = store.x[store.offsets[:-1]] - store.t[store.offsets[:-1], None] * store.d
    fine, opacity, _ = render_rays(field, o[:2000], store.d[:2000], store.occupancy, step=0.006, backdrop=(0, 0, 0))
    assert float((fine - store.ray_rgb[:2000]).square().mean().sqrt()) < 0.02
    assert float((opacity - store.ray_opacity[:2000]).abs().mean()) < 0.01


def test_labels_are_bit_equal_and_more_batches_only_append(store: Store) -> None:
    again = answers(store.occupancy, 1)
    n = len(again)
    assert 0 < n < len(store)
    assert torch.equal(again.x, store.x[:n])
    assert torch.equal(again.rgb, store.rgb[:n])


def test_the_inside_of_solids_is_dropped_and_the_student_space_covers_all_weight(store: Store) -> None:
    cells = visible_cells(store)
    seen = store.weight > 1e-3
    assert bool(cells.contains(store.x[seen]).all())
    focused = focus(store, cells, 0)
    assert bool(cells.contains(focused.x).all())
    assert bool(cells.contains(focused.free_x).all())
    lost = 1.0 - float(focused.weight.sum() / store.weight.sum())
    assert 0.0 <= lost < 1e-3
    assert torch.equal(focused.offsets[1:] - focused.offsets[:-1], torch.bincount(focused.ray_of()))


@pytest.mark.parametrize("share", [-0.1, 0.0, 0.3, 1.0, 2.0])
def test_the_latest_rays_that_there_is_room_for(store: Store, share: float) -> None:
    focused = focus(store, visible_cells(store), 0)
    most = int(share * len(focused))
    kept = latest(focused, most)
    assert len(kept) <= max(0, most)
    rays = focused.rays - kept.rays
    if kept.rays < focused.rays:  # one more ray would not fit
        assert len(focused) - int(focused.offsets[rays - 1]) > most
    low = int(focused.offsets[rays])
    assert torch.equal(kept.x, focused.x[low:])
    assert torch.equal(kept.d, focused.d[rays:])
    assert torch.equal(kept.ray_of(), focused.ray_of()[low:] - rays)
    assert torch.equal(kept.x[kept.many], focused.x[focused.many[len(focused.many) - len(kept.many) :]])
    assert (
        len(kept.free_x) == len(kept.free_sigma) == pytest.approx(len(focused.free_x) * len(kept) / len(focused), abs=1)
    )
    x, many, count = kept.x.clone(), focused.x[focused.many], len(focused)
    joined = merge(kept, dataclasses.replace(focused, many=focused.many.clone()))
    assert len(joined) == count + len(x)
    assert torch.equal(joined.x[: len(x)], x)
    assert torch.equal(joined.x[joined.many[len(joined.many) - len(many) :]], many)
    assert torch.equal(joined.offsets[1:] - joined.offsets[:-1], torch.bincount(joined.ray_of()))


@pytest.mark.parametrize(("most", "lengths"), [(0, []), (1, [1]), (2, [2]), (6, [2, 4]), (12, [2, 4, 6])])
def test_cycles_of_rounds(most: int, lengths: list[int]) -> None:
    found = list(cycles(most))
    assert [len(c) for c in found] == lengths
    assert [k for c in found for k in c] == list(range(1, most + 1))


# -- pseudo-views ----------------------------------------------------------------------------------------------------


def test_rays_come_from_all_sides_and_most_meet_the_box() -> None:
    field = AnalyticScene()
    occupancy = field.occupancy()
    o, d = draw_rays(field.scene, occupancy.box, occupancy, 4000, seed=1)
    assert torch.allclose(d.norm(dim=1), torch.ones(4000), atol=1e-5)
    up = (o - torch.tensor(occupancy.box.center))[:, 2]
    assert 0.4 < float((up > 0).float().mean()) < 0.6
    o2, _ = draw_rays(field.scene, occupancy.box, occupancy, 4000, seed=1)
    assert torch.equal(o, o2)
    assert not torch.equal(o, draw_rays(field.scene, occupancy.box, occupancy, 4000, seed=2)[0])


def test_given_cameras_are_used_for_most_rays() -> None:
    field = AnalyticScene()
    camera = forward_cameras(RaySpace("ndc", 64, 48, 60.0, 1.0), 1, 48, 0)[0]
    o, _ = draw_rays(field.scene, Box.cube(1.0), field.occupancy(), 1000, 0, (camera,))
    at = torch.tensor(camera.position, dtype=torch.float32)
    near = (o - at).norm(dim=1) < 1e-3
    assert 0.6 < float(near.float().mean()) < 0.8


def test_ndc_scenes_are_looked_at_forwards() -> None:
    scene = Scene(Box.cube(1.0), ray_space=RaySpace("ndc", 504.0, 378.0, 400.0, 1.0))
    _, d = draw_rays(scene, Box.cube(1.0), AnalyticScene().occupancy(), 500, 0)
    assert bool((d[:, 2] < 0).all())


def test_density_far_below_empty_still_learns() -> None:
    raw = torch.tensor([-36.0], requires_grad=True)
    losses.density_loss(torch.nn.functional.softplus(raw), torch.tensor([50.0]), torch.tensor([0.1])).backward()  # type: ignore[no-untyped-call]
    assert raw.grad is not None
    assert raw.grad.item() < -1e-3


def test_units_of_any_scale_up_to_one_are_free_and_larger_ones_are_held() -> None:
    units = torch.randn(256, 8)
    assert losses.too_large(0.1 * units / units.square().mean().sqrt()) == 0
    large = (300.0 * units).requires_grad_()
    losses.too_large(large).backward()  # type: ignore[no-untyped-call]
    assert large.grad is not None
    assert (large.grad * large).sum() > 0
