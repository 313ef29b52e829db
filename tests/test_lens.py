"""Lenses: known answers by OpenCV's formulas, round trips, and where a lens reaches nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvdconvert.cameras import Camera
from pvdconvert.data.opening import open_dataset
from pvdconvert.errors import InputError
from pvdconvert.lens import Lens, from_keys
from tests import datasets as made
from tests.datasets import BALLS, Array

IDENTITY = tuple(tuple(float(i == j) for j in range(4)) for i in range(3))


def one(lens: Lens, *point: float) -> list[float]:
    return [float(v) for v in lens.distort(np.array([point]))[0]]


def test_known_answers() -> None:
    """By hand. r^2 = 0.25: 1 + 0.1/4 + 0.2/16 + 0.32/64 = 1.0425; over 1 + 0.08/4 = 1.02."""
    assert one(Lens(radial=(0.1, 0.2, 0.32)), 0.6, 0.8, 2.0) == pytest.approx([0.3 * 1.0425, 0.4 * 1.0425])
    assert one(Lens(radial=(0.1, 0.2, 0.32), rational=(0.08,)), 0.6, 0.8, 2.0) == pytest.approx(
        [0.3 * 1.0425 / 1.02, 0.4 * 1.0425 / 1.02]
    )
    # 2 p1 x y + p2 (r^2 + 2 x^2) = 0.02 * 0.12 + 0.03 * 0.43; p1 (r^2 + 2 y^2) + 2 p2 x y = 0.01 * 0.57 + 0.06 * 0.12
    assert one(Lens(tangential=(0.01, 0.03)), 0.3, 0.4, 1.0) == pytest.approx([0.3 + 0.0153, 0.4 + 0.0129])
    # 45 degrees to the right, 90 down, 135 to the left of a fisheye
    q = math.pi / 4
    assert one(Lens("fisheye"), 5.0, 0.0, 5.0) == pytest.approx([q, 0.0])
    assert one(Lens("fisheye", (0.1, 0.01)), 0.0, 3.0, 0.0) == pytest.approx(
        [0.0, 2 * q * (1 + 0.1 * (2 * q) ** 2 + 0.01 * (2 * q) ** 4)]
    )
    assert one(Lens("fisheye"), -1.0, 0.0, -1.0) == pytest.approx([-3 * q, 0.0])
    assert one(Lens("fisheye", (0.3,)), 0.0, 0.0, 4.0) == [0.0, 0.0]


def test_what_a_lens_does_not_see() -> None:
    assert np.isnan(one(Lens(radial=(0.1,)), 0.1, 0.1, -1.0)).all()
    assert np.isnan(one(Lens("fisheye"), 0.0, 0.0, -1.0)).all()
    # x (1 - 0.3 x^2) turns back at x = 1 / sqrt(0.9) = 1.0541, where it is 0.70273.
    barrel = Lens(radial=(-0.3,))
    assert np.isnan(one(barrel, 1.06, 0.0, 1.0)).all()
    assert one(barrel, 1.05, 0.0, 1.0) == pytest.approx([1.05 * (1 - 0.3 * 1.1025), 0.0])
    reached = barrel.reaches(np.array([[0.7026, 0.0], [0.7029, 0.0], [0.0, -2.0]]))
    assert reached.tolist() == [True, False, False]
    nearest = barrel.undistort(np.array([[0.9, 0.0]]))[0]
    assert nearest[0] / nearest[2] == pytest.approx(1 / math.sqrt(0.9), rel=1e-6)


coefficient = st.floats(-0.25, 0.25)


@given(
    st.lists(coefficient, max_size=4),
    st.lists(st.floats(0.0, 0.2), max_size=3),
    st.tuples(*[st.floats(-0.004, 0.004)] * 2),
    st.sampled_from([0.5, 0.0]),
)
def test_opencv_round_trip(radial: list[float], rational: list[float], p: tuple[float, float], offset: float) -> None:
    lens = Lens("opencv", tuple(radial), tuple(rational), p)
    expect_round_trip(Camera(640, 480, 420.0, 410.0, 310.0, 250.0, IDENTITY, offset, lens))


@given(st.lists(st.floats(-0.08, 0.08), max_size=4), st.floats(150.0, 400.0))
def test_fisheye_round_trip(radial: list[float], focal: float) -> None:
    expect_round_trip(Camera(640, 480, focal, focal, 310.0, 250.0, IDENTITY, 0.5, Lens("fisheye", tuple(radial))))


def expect_round_trip(camera: Camera) -> None:
    """Pixel -> ray -> point -> pixel: below 0.1 px for every pixel that the lens reaches, and the middle is reached."""
    assert camera.lens is not None
    i, j = (v.reshape(-1) for v in np.meshgrid(np.linspace(0, 639, 23), np.linspace(0, 479, 17)))
    o, d = camera.rays_at(i, j)
    assert np.isfinite(d).all()
    np.testing.assert_allclose(np.linalg.norm(d, axis=1), 1, atol=1e-5)
    uv = np.stack([(i + camera.offset - camera.cx) / camera.fx, (j + camera.offset - camera.cy) / camera.fy], -1)
    reached = camera.lens.reaches(uv)
    assert reached[np.hypot(*uv.T) < 0.4].all()
    # Just beside the fold single precision of the rays may fall beyond it.
    back = camera.project(o + 3.0 * d.astype(np.float64))[reached]
    seen = np.isfinite(back[:, 0])
    assert seen.sum() >= reached.sum() - 2
    assert np.abs(back - np.stack([i, j], -1)[reached])[seen].max() < 0.1


def test_a_lens_of_nothing_is_a_pinhole() -> None:
    plain = Camera(64, 48, 50.0, 51.0, 30.0, 25.0, IDENTITY)
    glass = Camera(64, 48, 50.0, 51.0, 30.0, 25.0, IDENTITY, lens=Lens())
    np.testing.assert_allclose(glass.rays()[1], plain.rays()[1], atol=1e-7)
    points = np.array([[0.3, -0.2, -2.0], [1.0, 1.0, 3.0]])
    np.testing.assert_allclose(glass.project(points), plain.project(points), equal_nan=True)
    # 0.3 / 2 right of and 0.2 / 2 below the axis; the other point is behind.
    np.testing.assert_allclose(plain.project(points), [[30 + 7.5 - 0.5, 25 + 5.1 - 0.5], [np.nan, np.nan]])


def test_a_camera_with_a_lens_goes_through_json() -> None:
    lens = Lens("opencv", (0.1, -0.02), (0.03,), (0.001, -0.002))
    for camera in (
        Camera(64, 48, 50.0, 51.0, 30.0, 25.0, IDENTITY, lens=lens),
        Camera(64, 48, 50.0, 51.0, 30.0, 25.0, IDENTITY, lens=Lens("fisheye", (0.1, 0.2, 0.3, 0.4))),
        Camera(64, 48, 50.0, 51.0, 30.0, 25.0, IDENTITY),
    ):
        assert Camera.from_json(json.loads(json.dumps(camera.to_json()))) == camera
        assert hash(camera) == hash(Camera.from_json(camera.to_json()))
    assert "lens" not in Camera(64, 48, 50.0, 51.0, 30.0, 25.0, IDENTITY).to_json()


def test_a_moved_camera_sees_a_moved_world() -> None:
    camera = Camera(64, 48, 50.0, 51.0, 30.0, 25.0, tuple(map(tuple, made.orbit(3)[1][:3].tolist())))
    cycle = np.array([[0, 0, 2.5, 1], [2.5, 0, 0, 2], [0, 2.5, 0, 3], [0, 0, 0, 1.0]])
    moved = BALLS @ cycle[:3, :3].T + cycle[:3, 3]
    np.testing.assert_allclose(camera.moved(cycle).project(moved), camera.project(BALLS), atol=1e-9)
    for bad in (np.diag([1, 1, -1, 1.0]), np.diag([1, 1, 2, 1.0]), np.zeros((4, 4))):
        with pytest.raises(InputError, match="mirrored, sheared or stretched"):
            camera.moved(bad)


# ---------------------------------------------------------------------------------------------- in transforms.json


def brown(points: Array) -> Array:
    x, y = points[:, 0] / points[:, 2], points[:, 1] / points[:, 2]
    r2 = x**2 + y**2
    g = 1 - 0.21 * r2 + 0.05 * r2**2
    return np.stack(
        [x * g + 2 * 0.003 * x * y - 0.002 * (r2 + 2 * x**2), y * g + 0.003 * (r2 + 2 * y**2) - 2 * 0.002 * x * y], 1
    )


def rational(points: Array) -> Array:
    x, y = points[:, 0] / points[:, 2], points[:, 1] / points[:, 2]
    r2 = x**2 + y**2
    g = (1 + 0.3 * r2 + 0.1 * r2**2) / (1 + 0.5 * r2 + 0.1 * r2**2 + 0.02 * r2**3)
    return np.stack([x * g, y * g], 1)


def eighth(points: Array) -> Array:
    x, y = points[:, 0] / points[:, 2], points[:, 1] / points[:, 2]
    r2 = x**2 + y**2
    g = 1 + 0.1 * r2 + 0.9 * r2**4
    return np.stack([x * g, y * g], 1)


def fisheye(points: Array) -> Array:
    r = np.hypot(points[:, 0], points[:, 1])
    t = np.arctan2(r, points[:, 2])
    return points[:, :2] * (t * (1 - 0.05 * t**2 + 0.02 * t**4 + 0.003 * t**6) / r)[:, None]


@pytest.mark.parametrize(
    ("distort", "keys"),
    [
        (brown, {"camera_model": "OPENCV", "k1": -0.21, "k2": 0.05, "p1": 0.003, "p2": -0.002}),
        (brown, {"k1": -0.21, "k2": 0.05, "p1": 0.003, "p2": -0.002, "is_fisheye": False}),
        (rational, {"k1": 0.3, "k2": 0.1, "k4": 0.5, "k5": 0.1, "k6": 0.02}),
        (eighth, {"camera_model": "OPENCV", "k1": 0.1, "k4": 0.9}),
        (fisheye, {"camera_model": "OPENCV_FISHEYE", "k1": -0.05, "k2": 0.02, "k3": 0.003}),
        (fisheye, {"k1": -0.05, "k2": 0.02, "k3": 0.003, "is_fisheye": True}),
        (made.pinhole, {"camera_model": "PINHOLE", "k1": 0.4}),
    ],
)
@pytest.mark.parametrize("downscale", [1, 2])
def test_lenses_of_transforms(tmp_path: Path, distort: made.Distort, keys: dict[str, Any], downscale: int) -> None:
    """The pictures are bent by the formulas above; the loader's cameras find the balls, and rays go through them."""
    k = made.matrix((120, 100), 110.0)
    cameras = made.orbit(5, 2.2)
    made.transforms(tmp_path, cameras, (120, 100), k=k, distort=distort, **keys)
    for frame in open_dataset(tmp_path, holdout=0, downscale=downscale).split("train"):
        where = made.middles(frame.read())
        np.testing.assert_allclose(frame.camera.project(BALLS) + 0.5, where, atol=0.1)
        o, d = (v.astype(np.float64) for v in frame.camera.rays_at(*(where - 0.5).T))
        assert np.linalg.norm(np.cross(BALLS - o, d), axis=1).max() < 0.1 * 3 / frame.camera.fx
        assert frame.mask is None


def test_pixels_that_no_ray_reaches_are_masked_and_said(tmp_path: Path) -> None:
    """x (1 - 0.3 x^2) ends at 0.70273: with 20 px focal length 14 px from the middle of 40."""
    made.transforms(tmp_path, made.orbit(3), (40, 30), k=made.matrix((40, 30), 20.0), k1=-0.3)
    dataset = open_dataset(tmp_path, holdout=0)
    assert any("the lens reaches no ray for some pixels of 3 pictures" in n for n in dataset.notes)
    mask = dataset.split("train")[0].mask
    assert mask is not None
    i, j = np.meshgrid(np.arange(40) + 0.5 - 20, np.arange(30) + 0.5 - 15)
    inside = np.hypot(i, j)
    counts = mask()
    assert counts[inside < 14.05].all()
    assert not counts[inside > 14.2].any()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"camera_model": "THIN_PRISM_FISHEYE"}, "camera_model 'THIN_PRISM_FISHEYE' is not supported"),
        ({"k1": "much"}, "'k1' is 'much', not a coefficient"),
        ({"k2": 1e30}, "'k2' is 1e.30, not a coefficient"),
        ({"k1": float("nan")}, "'k1' is nan"),
        ({"ftheta_p0": 0.1}, "'ftheta_p0': that camera is not supported"),
        ({"latlong": True}, "'latlong'"),
        ({"is_fisheye": True, "p1": 0.1}, "here: lens: a fisheye has neither"),
    ],
)
def test_other_cameras_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_keys(keys, "here")


def test_a_lens_is_checked() -> None:
    with pytest.raises(InputError, match="unknown kind 'mirror'"):
        Lens.from_json({"kind": "mirror"})
    with pytest.raises(InputError, match="no coefficients"):
        Lens(radial=(float("inf"),))
