"""PSNR and SSIM by hand, held-out cameras, and the protocol fidelity/1."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pvdconvert import metrics
from pvdconvert.cameras import Camera, look_at, sphere_cameras
from pvdconvert.field import FunctionField
from pvdconvert.metrics import between_cameras, fidelity, held_out_cameras, mse, psnr, ssim, views
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.scene import Box, RaySpace, Scene


def ball(radius: float = 0.5, red: float = 0.2) -> FunctionField:
    def density(x: Tensor) -> Tensor:
        return torch.where(x.norm(dim=-1) < radius, 60.0, 0.0)

    return FunctionField(density, lambda x, d: torch.stack([0 * x[:, 0] + red, x[:, 1] + 0.5, x[:, 2] + 0.5], -1))


def occupancy(n: int = 24) -> Occupancy:
    grid = torch.zeros(n, n, n, dtype=torch.uint8)
    edge = n // 5
    grid[edge : n - edge, edge : n - edge, edge : n - edge] = 1
    return Occupancy(torch.full((3,), -1.0), 2 / n, grid)


SCENE = Scene(Box.cube(1.0))


def test_psnr_by_hand() -> None:
    a = np.full((4, 4, 3), 0.5)
    assert psnr(a, a + 0.1) == pytest.approx(20.0)
    assert psnr(a, a - 0.01) == pytest.approx(40.0)
    assert mse(np.zeros((2, 2, 3)), np.ones((2, 2, 3))) == 1.0
    assert psnr(a, a) == math.inf
    b = a.copy()
    b[0, 0] = 0.6  # one pixel of 16: mse 0.01 / 16
    assert psnr(a, b) == pytest.approx(20 + 10 * math.log10(16))


def test_psnr_of_bytes_tensors_and_masks() -> None:
    a, b = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 51, np.uint8)  # 51 / 255 = 0.2
    assert psnr(a, b) == pytest.approx(-20 * math.log10(0.2))
    assert psnr(torch.from_numpy(a), torch.from_numpy(b)) == psnr(a, b)
    assert psnr(torch.zeros(2, 2, 3), torch.full((2, 2, 3), 0.1)) == pytest.approx(20.0)
    b[0] = 0
    mask = np.zeros((4, 4), bool)
    mask[1] = True
    assert psnr(a, b, mask) == pytest.approx(-20 * math.log10(0.2))
    with pytest.raises(ValueError, match="no pixels"):
        psnr(a, b, np.zeros((4, 4), bool))


def test_ssim_by_hand() -> None:
    rng = np.random.default_rng(0)
    a = rng.random((20, 24, 3))
    assert ssim(a, a) == pytest.approx(1.0)
    # Constant pictures p, q have no variance: (2pq + C1) / (p^2 + q^2 + C1), C1 = 1e-4.
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.04 + 0.36 + 1e-4)
    assert ssim(np.full((12, 12, 3), 0.2), np.full((12, 12, 3), 0.6)) == pytest.approx(expected)
    assert expected == pytest.approx(0.6000999750, abs=1e-9)
    # One window: a single point of height 1 in the middle against black. mu = g0^2 and E[x^2] = g0^2 with the window's
    # middle weight g0^2 = (1 / sum exp(-k^2 / 4.5), k = -5..5)^2 = 0.2660117^2 = 0.0707622, so var = 0.0657549 and
    # ssim = C1 C2 / ((mu^2 + C1) (var + C2)) = 1e-4 * 9e-4 / ((0.00500729 + 1e-4) (0.0657549 + 9e-4)).
    point = np.zeros((11, 11, 1))
    point[5, 5] = 1.0
    assert ssim(point, np.zeros((11, 11, 1))) == pytest.approx(2.643740e-4, rel=1e-5)
    with pytest.raises(ValueError, match="needs 11 pixels"):
        ssim(a[:10], a[:10])


def test_ssim_against_plain_loops() -> None:
    rng = np.random.default_rng(1)
    a = rng.random((14, 13, 2))
    b = np.clip(a + rng.normal(0, 0.2, a.shape), 0, 1)
    k = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(k, k) / k.sum() ** 2
    values = []
    for c in range(2):
        for i in range(4):
            for j in range(3):
                x, y = a[i : i + 11, j : j + 11, c], b[i : i + 11, j : j + 11, c]
                mx, my = (window * x).sum(), (window * y).sum()
                vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
                cov = (window * (x - mx) * (y - my)).sum()
                values.append((2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    assert ssim(a, b) == pytest.approx(float(np.mean(values)), rel=1e-9)
    assert ssim(a, b) == pytest.approx(ssim(b, a), rel=1e-12)


def test_held_out_cameras_surround_the_box() -> None:
    box = Box((0.0, -1.0, 0.0), (1.0, 1.0, 3.0))
    cameras = held_out_cameras(SCENE, box)
    assert len(cameras) == 16
    assert {(c.width, c.height) for c in cameras} == {(200, 200)}
    above = [c.position[2] > box.center[2] for c in cameras]
    assert 6 <= sum(above) <= 10
    assert cameras == held_out_cameras(SCENE, box)
    assert cameras != sphere_cameras(box, 16, 200, seed=0)
    corners = np.array([[(box.min, box.max)[b >> k & 1][k] for k in range(3)] for b in range(8)])
    for camera in cameras:
        m = np.asarray(camera.c2w)
        local = (corners - camera.position) @ m[:, :3]
        rows = camera.cy - camera.fy * local[:, 1] / -local[:, 2]
        columns = camera.cx + camera.fx * local[:, 0] / -local[:, 2]
        assert 0 <= rows.min() <= rows.max() <= 200
        assert 0 <= columns.min() <= columns.max() <= 200
        assert max(np.ptp(rows), np.ptp(columns)) >= 0.6 * 200


def ring(count: int) -> tuple[Camera, ...]:
    """Cameras on a horizontal circle of radius 4 around the origin, 80 x 60."""
    out = []
    for k in range(count):
        angle = 2 * math.pi * k / count
        pose = look_at((4 * math.cos(angle), 4 * math.sin(angle), 1.0), (0.0, 0.0, 0.0))
        out.append(Camera(80, 60, 90.0, 90.0, 40.0, 30.0, tuple(tuple(map(float, row)) for row in pose)))
    return tuple(out)


def test_a_scene_with_cameras_is_seen_between_them() -> None:
    given = ring(24)
    scene = dataclasses.replace(SCENE, cameras=given)
    cameras = held_out_cameras(scene, Box.cube(0.5), size=40)
    assert len(cameras) == 16
    positions = {tuple(c.position) for c in given}
    for c in cameras:
        assert (c.width, c.height, c.fx) == (40, 30, 45.0)
        m = np.asarray(c.c2w)[:, :3]
        np.testing.assert_allclose(m.T @ m, np.eye(3), atol=1e-12)
        assert np.linalg.det(m) == pytest.approx(1.0)
        assert tuple(c.position) not in positions
        # Neighbours on the ring, not opposite cameras: never inside, and still looking at the object.
        assert 3.3 < np.linalg.norm(c.position[:2]) < 4.5
        to_centre = -c.position / np.linalg.norm(c.position)
        assert np.dot(-m[:, 2], to_centre) > 0.98
    assert cameras == held_out_cameras(scene, Box.cube(0.5), size=40)


def test_one_camera_and_ndc_are_jittered_in_place() -> None:
    (single,) = ring(1)
    for c in between_cameras([single], 5, 80, seed=1):
        assert np.allclose(c.position, single.position)
        assert not np.allclose(np.asarray(c.c2w)[:, :3], np.asarray(single.c2w)[:, :3])
    space = RaySpace("ndc", width=80.0, height=60.0, focal=70.0, near=1.0)
    cameras = held_out_cameras(dataclasses.replace(SCENE, ray_space=space), Box.cube(1.0), size=40)
    assert len({tuple(c.position) for c in cameras}) == 16
    for c in cameras:
        assert np.linalg.norm(c.position) < 0.6
        assert -np.asarray(c.c2w)[2, 2] < -0.99  # looks along -z
        assert (c.width, c.height, c.fx) == (40, 30, 35.0)


def test_a_field_is_identical_to_itself_and_json_stays_finite() -> None:
    occ = occupancy()
    got = fidelity(ball(), ball(), SCENE, teacher_occupancy=occ, student_occupancy=occ, box=occ.box, count=3, size=24)
    assert got.identical
    assert got.psnr == got.psnr_worst == metrics.CAP
    assert got.ssim == pytest.approx(1.0)
    assert (got.opacity_error, got.depth_error) == (0.0, 0.0)
    data = json.loads(json.dumps(got.to_json(), allow_nan=False))
    assert data["views"] == [100.0] * 3
    assert data["protocol"] == "fidelity/1 (3 views, 24 px)"
    assert "100.00 dB" in str(got)


def test_figures_of_a_known_difference() -> None:
    occ = occupancy()
    reference = views(ball(red=0.2), SCENE, occupancy=occ, box=occ.box, count=4, size=40, step=0.02)
    got = reference.compare(ball(red=0.4), occ)
    assert not got.identical
    # Red differs by 0.2 = 51 bytes on the ball, nothing else differs: per view 10 log10 of 3 / (0.04 * share).
    expected = []
    for opacity in reference.opacity:
        share = float((opacity.astype(np.float64) ** 2).mean())
        expected.append(-10 * math.log10(0.04 * share / 3))
    assert got.views == pytest.approx(expected, abs=0.05)
    assert got.psnr == pytest.approx(np.mean(got.views))
    assert got.psnr_worst == min(got.views)
    assert got.psnr_object is not None
    assert got.psnr_object < got.psnr
    assert got.psnr_object == pytest.approx(-10 * math.log10(0.04 / 3), abs=0.6)
    above = [v for v, c in zip(got.views, reference.cameras) if c.position[2] > occ.box.center[2]]
    assert 0 < len(above) < 4
    assert got.psnr_upper == pytest.approx(np.mean(above))
    assert (got.opacity_error, got.depth_error) == (0.0, 0.0)


def test_opacity_and_depth_errors_measure_geometry() -> None:
    occ = occupancy()
    reference = views(ball(0.5), SCENE, occupancy=occ, box=occ.box, count=4, size=60, step=0.01)
    got = reference.compare(ball(0.45), occ)
    # The disc's area shrinks by 1 - 0.45^2 / 0.5^2 = 19 % (seen in perspective); the surface moves 0.05 back or more.
    share = float(np.mean([o.mean() for o in reference.opacity]))
    assert got.opacity_error == pytest.approx(0.19 * share, rel=0.15)
    assert got.depth_error is not None
    assert 0.05 < got.depth_error * occ.box.diagonal < 0.12
    assert got.psnr < 30
    assert got.psnr > reference.compare(ball(0.4), occ).psnr


def test_an_empty_student_has_no_depth_and_an_empty_pair_no_object() -> None:
    occ = occupancy()
    nothing = dataclasses.replace(occ, grid=torch.zeros_like(occ.grid))
    reference = views(ball(), SCENE, occupancy=occ, box=occ.box, count=2, size=24)
    got = reference.compare(ball(), nothing)
    assert got.depth_error is None
    assert got.psnr_object is not None
    blank = views(ball(), SCENE, occupancy=nothing, box=occ.box, count=2, size=24).compare(ball(), nothing)
    assert blank.psnr_object is None
    assert blank.identical
    json.dumps(blank.to_json(), allow_nan=False)


def test_the_teacher_is_rendered_once() -> None:
    occ = occupancy()
    calls = 0

    def density(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.where(x.norm(dim=-1) < 0.5, 60.0, 0.0)

    teacher = FunctionField(density, lambda x, d: 0 * x)
    reference = views(teacher, SCENE, occupancy=occ, box=occ.box, count=2, size=24)
    before = calls
    for radius in (0.5, 0.45):
        fidelity(
            teacher,
            ball(radius),
            SCENE,
            teacher_occupancy=occ,
            student_occupancy=occ,
            box=occ.box,
            teacher_cache=reference,
        )
    assert before > 0
    assert calls == before


def test_protocol_names_and_progress() -> None:
    occ = occupancy(12)
    said: list[tuple[str, float]] = []

    class Listener:
        def stage(self, name: str, total: float | None = None) -> None:
            said.append((name, total or 0))

        def advance(self, done: float, **metrics: float) -> None:
            said.append(("", done))

        def note(self, text: str) -> None: ...
        def close(self) -> None: ...

    nothing = dataclasses.replace(occ, grid=torch.zeros_like(occ.grid))
    full = views(ball(), SCENE, occupancy=nothing, box=occ.box)
    assert full.protocol == "fidelity/1"
    assert len(full.images) == 16
    assert full.images[0].shape == (200, 200, 3)
    cameras = sphere_cameras(occ.box, 2, 24, seed=4)
    given = views(ball(), SCENE, occupancy=nothing, box=occ.box, cameras=cameras, size=24, progress=Listener())
    assert given.protocol == "fidelity/1 (2 given views, 24 px)"
    given.compare(ball(), nothing, progress=Listener())
    assert said == [("reference views", 2), ("", 1), ("", 2), ("validate", 2), ("", 1), ("", 2)]
    with pytest.raises(ValueError, match="no cameras"):
        views(ball(), SCENE, occupancy=nothing, box=occ.box, cameras=())


def test_linear_colours_are_compared_as_displayed() -> None:
    occ = occupancy()
    scene = dataclasses.replace(SCENE, background=(0.0, 0.0, 0.0), color_space="linear")
    grey = FunctionField(lambda x: 1e4 * (x.norm(dim=-1) < 0.5), lambda x, d: 0 * x + 0.5)
    image = views(grey, scene, occupancy=occ, box=occ.box, count=1, size=24).images[0]
    assert image[12, 12].tolist() == [188, 188, 188]
