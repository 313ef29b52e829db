"""Cameras: known reprojections, views that are filled as stated, and the errors of transforms files."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvdconvert.cameras import (
    Array,
    Camera,
    fit_camera,
    load_transforms,
    look_at,
    orbit_cameras,
    sphere_cameras,
    sphere_directions,
)
from pvdconvert.errors import InputError
from pvdconvert.scene import Box

BOX = Box((-0.7, -0.2, 0.1), (0.9, 0.4, 2.1))
IDENTITY = tuple(tuple(float(i == j) for j in range(4)) for i in range(3))


def project(camera: Camera, points: Array) -> Array:
    """Pixel columns and rows [N, 2] of world points [N, 3], written down independently of Camera.rays."""
    m = np.eye(4)
    m[:3] = camera.c2w
    local = (np.linalg.inv(m) @ np.concatenate([points, np.ones((len(points), 1))], 1).T).T
    assert (local[:, 2] < 0).all(), "behind the camera"
    u = camera.fx * local[:, 0] / -local[:, 2] + camera.cx - camera.offset
    v = -camera.fy * local[:, 1] / -local[:, 2] + camera.cy - camera.offset
    return np.stack([u, v], axis=1)


def corners(box: Box) -> Array:
    return np.array([[(box.min, box.max)[b >> k & 1][k] for k in range(3)] for b in range(8)])


def test_the_rays_of_a_tiny_camera() -> None:
    """2 x 2 pixels, 90 degrees: pixel centres half way to the edge; +x right, +y up, looking along -z."""
    origins, directions = Camera(2, 2, 1.0, 1.0, 1.0, 1.0, IDENTITY).rays()
    expected = np.array([[-0.5, 0.5, -1], [0.5, 0.5, -1], [-0.5, -0.5, -1], [0.5, -0.5, -1]])
    assert origins.dtype == directions.dtype == np.float32
    np.testing.assert_array_equal(origins, np.zeros((4, 3)))
    np.testing.assert_allclose(directions, expected / np.sqrt(1.5), rtol=1e-6)


def test_the_vanilla_offset_moves_rays_by_half_a_pixel() -> None:
    centre = Camera(4, 4, 2.0, 2.0, 2.0, 2.0, IDENTITY)
    corner = Camera(4, 4, 2.0, 2.0, 2.0, 2.0, IDENTITY, offset=0.0)
    i, j = np.array([1.5]), np.array([2.5])
    np.testing.assert_allclose(centre.rays_at(i - 0.5, j - 0.5)[1], corner.rays_at(i, j)[1])
    assert not np.allclose(centre.rays()[1], corner.rays()[1])


@given(
    st.tuples(*[st.floats(-1, 1)] * 3).filter(lambda v: sum(a * a for a in v) > 0.1),
    st.floats(0, 31),
    st.floats(0, 23),
    st.floats(0.5, 20),
    st.sampled_from([0.0, 0.5]),
)
def test_a_point_on_a_ray_projects_to_its_pixel(
    position: tuple[float, float, float], i: float, j: float, t: float, offset: float
) -> None:
    m = look_at(position, (2.0, -1.5, 0.3))
    camera = Camera(32, 24, 40.0, 35.0, 15.0, 13.0, tuple(tuple(map(float, r)) for r in m), offset)
    origins, directions = camera.rays_at(np.array([i]), np.array([j]))
    assert abs(float(np.linalg.norm(directions)) - 1) < 1e-6
    np.testing.assert_allclose(origins[0], position, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(project(camera, origins + t * directions.astype(np.float64)), [[i, j]], atol=2e-3)


@given(st.tuples(*[st.floats(-3, 3)] * 3), st.tuples(*[st.floats(-3, 3)] * 3))
def test_look_at_is_a_rotation_that_looks_there(
    position: tuple[float, float, float], target: tuple[float, float, float]
) -> None:
    gap = np.subtract(target, position)
    if np.linalg.norm(gap) < 1e-3:
        return
    m = look_at(position, target)
    np.testing.assert_allclose(m[:, :3].T @ m[:, :3], np.eye(3), atol=1e-9)
    assert np.linalg.det(m[:, :3]) == pytest.approx(1.0)
    np.testing.assert_allclose(-m[:, 2], gap / np.linalg.norm(gap), atol=1e-9)
    assert m[2, 1] >= -1e-9, "up in the image is never down in the world"


def test_look_at_straight_down_still_is_a_camera() -> None:
    m = look_at((0, 0, 5), (0, 0, 0))
    np.testing.assert_allclose(m[:, :3].T @ m[:, :3], np.eye(3), atol=1e-12)
    np.testing.assert_allclose(m[:, 2], [0, 0, 1])


def test_a_camera_cannot_look_at_itself() -> None:
    with pytest.raises(InputError, match="its own position"):
        look_at((1, 2, 3), (1, 2, 3))


@pytest.mark.parametrize("fill", [0.4, 0.66, 0.9])
def test_the_box_fills_the_stated_share(fill: float) -> None:
    for camera in sphere_cameras(BOX, 12, 100, seed=3, fill=fill):
        pixels = project(camera, corners(BOX))
        middle = project(camera, np.array([BOX.center]))
        np.testing.assert_allclose(middle + camera.offset, [[50, 50]], atol=1e-6)
        height = float(np.ptp(pixels[:, 1]))
        reach = 2 * float(np.abs(pixels + camera.offset - 50).max())
        assert reach <= 98.1, "the box stays in the picture"
        assert height == pytest.approx(fill * 100, rel=1e-3) or (height < fill * 100 and reach > 97.9)
        if fill <= 0.66:
            assert height >= 60 * fill / 0.66


def test_sphere_directions_cover_both_hemispheres_evenly() -> None:
    d = sphere_directions(200, seed=1)
    np.testing.assert_allclose(np.linalg.norm(d, axis=1), 1, atol=1e-12)
    assert np.linalg.norm(d.mean(0)) < 0.02
    np.testing.assert_allclose(d.T @ d / len(d), np.eye(3) / 3, atol=0.02)
    nearest = np.sort(d @ d.T, axis=1)[:, -2]
    assert np.degrees(np.arccos(nearest)).min() > 8, "no two cameras are neighbours"
    for axis in range(3):
        assert 90 <= int((d[:, axis] > 0).sum()) <= 110


def test_sphere_cameras_depend_on_the_seed_alone() -> None:
    assert sphere_cameras(BOX, 5, 50, seed=7) == sphere_cameras(BOX, 5, 50, seed=7)
    assert sphere_cameras(BOX, 5, 50, seed=7) != sphere_cameras(BOX, 5, 50, seed=8)


def test_orbit_cameras_keep_their_elevation_and_go_round() -> None:
    cameras = orbit_cameras(BOX, 8, 64, elevation=30)
    out = np.stack([c.position for c in cameras]) - np.asarray(BOX.center)
    np.testing.assert_allclose(out[:, 2] / np.linalg.norm(out, axis=1), 0.5, atol=1e-9)
    angles = np.unwrap(np.arctan2(out[:, 1], out[:, 0]))
    np.testing.assert_allclose(np.diff(angles), math.pi / 4, atol=1e-9)


def test_a_resized_camera_sees_the_same() -> None:
    camera = fit_camera(BOX, (1, 2, 1), 100)
    half = camera.resized(50, 50)
    assert (half.width, half.height) == (50, 50)
    full = project(camera, corners(BOX)) + camera.offset
    np.testing.assert_allclose(project(half, corners(BOX)) + half.offset, full / 2, atol=1e-9)


@pytest.mark.parametrize("offset", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("times", [2, 4])
def test_a_pixel_of_a_reduced_picture_sees_the_mean_of_those_it_is_made_of(offset: float, times: int) -> None:
    """Rays at z = -1, so that places are averaged as colours are; of programs with rays at corners, too."""
    camera = dataclasses.replace(fit_camera(BOX, (1, 2, 1), 8 * times), offset=offset)

    def places(of: Camera) -> np.ndarray:
        _, d = of.rays()
        local = d.astype(np.float64) @ np.asarray(of.c2w)[:3, :3]
        return np.asarray(local[:, :2] / -local[:, 2:]).reshape(of.height, of.width, 2)

    large = places(camera).reshape(8, times, 8, times, 2).mean((1, 3))
    np.testing.assert_allclose(places(camera.resized(8, 8)), large, atol=1e-6)


# ---------------------------------------------------------------------------------------------- transforms.json

FRAME: dict[str, Any] = {"file_path": "r_0", "transform_matrix": np.eye(4).tolist()}
GOOD: dict[str, Any] = {"camera_angle_x": math.pi / 2, "w": 100, "h": 60, "frames": [FRAME]}


def written(folder: Path, data: Any) -> Path:
    path = folder / "transforms.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_blender_transforms(tmp_path: Path) -> None:
    (camera,) = load_transforms(written(tmp_path, GOOD))
    assert (camera.width, camera.height, camera.cx, camera.cy) == (100, 60, 50, 30)
    assert camera.fx == camera.fy == pytest.approx(50.0)
    assert camera.c2w == IDENTITY


def test_explicit_intrinsics_win_and_frames_before_globals(tmp_path: Path) -> None:
    frame = {**FRAME, "fl_x": 70.0, "cx": 41.0}
    (camera,) = load_transforms(written(tmp_path, {**GOOD, "fl_x": 80.0, "fl_y": 81.0, "cy": 33.0, "frames": [frame]}))
    assert (camera.fx, camera.fy, camera.cx, camera.cy) == (70.0, 81.0, 41.0, 33.0)


def test_the_size_comes_from_the_first_image(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (30, 20)).save(tmp_path / "r_0.png")
    data = {"camera_angle_x": 1.0, "frames": [FRAME, {**FRAME, "file_path": "missing"}]}
    first, second = load_transforms(written(tmp_path, data))
    assert (first.width, first.height) == (second.width, second.height) == (30, 20)


def test_a_given_size_is_used_where_the_file_has_none(tmp_path: Path) -> None:
    data = {"camera_angle_x": 1.0, "frames": [FRAME]}
    (camera,) = load_transforms(written(tmp_path, data), width=8, height=6)
    assert (camera.width, camera.height) == (8, 6)


def frame(**changes: Any) -> dict[str, Any]:
    return {**GOOD, "frames": [FRAME, {**FRAME, **changes}]}


SCALED = np.diag([2.0, 2.0, 2.0, 1.0]).tolist()
INFINITE = np.full((4, 4), math.inf).tolist()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "not a transforms.json"),
        ("{", "not a transforms.json"),
        ("[1, 2]", "not a transforms.json"),
        ({}, "not a transforms.json: 'frames'"),
        ({"frames": []}, "'frames' is empty"),
        ({"frames": 3}, "'frames' is empty"),
        (frame(transform_matrix=[[1, 0], [0, 1]]), r"frames\[1\]: transform_matrix"),
        (frame(transform_matrix=3), r"frames\[1\]"),
        (frame(transform_matrix="no"), r"frames\[1\]"),
        (frame(transform_matrix=SCALED), r"frames\[1\]: transform_matrix is not a rotation"),
        (
            frame(transform_matrix=INFINITE),
            r"frames\[1\]: transform_matrix is not 4x4 finite",
        ),
        ({**GOOD, "frames": [{"file_path": "r_0"}]}, r"frames\[0\]: missing key 'transform_matrix'"),
        ({"w": 1, "h": 1, "frames": [FRAME]}, r"frames\[0\]: missing key 'camera_angle_x'"),
        (frame(w="wide"), r"frames\[1\]"),
        (frame(w=0), r"frames\[1\]: .*size"),
        (frame(camera_angle_x=0.0), r"frames\[1\]: .*focal"),
        ({**GOOD, "frames": ["r_0"]}, r"frames\[0\]"),
        ({"camera_angle_x": 1.0, "frames": [FRAME]}, "no image there, so the size is unknown .*add 'w' and 'h'"),
    ],
)
def test_a_bad_transforms_file_is_refused_in_one_line(tmp_path: Path, data: Any, message: str) -> None:
    path = written(tmp_path, data)
    with pytest.raises(InputError, match=message) as caught:
        load_transforms(path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_missing_transforms_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        load_transforms(tmp_path / "none.json")


def test_an_image_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "r_0.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"r_0.png: .*image"):
        load_transforms(written(tmp_path, {"camera_angle_x": 1.0, "frames": [FRAME]}))
