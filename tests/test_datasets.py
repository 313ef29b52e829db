"""Datasets of every layout: cameras reproject what the pictures show, splits do not mix, bytes are those on disk."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pvdconvert.data import Dataset
from pvdconvert.data.opening import open_cameras, open_dataset
from pvdconvert.errors import UsageError
from pvdconvert.lens import Lens
from pvdconvert.scene import Box
from tests import datasets as made
from tests.datasets import BALLS, Array
from tests.memory import PEAK

SPLITS = {"train": made.orbit(5), "val": made.orbit(2, 4.2), "test": made.orbit(3, 3.9)}
GIVEN = np.array(
    [
        [0.36, 0.48, -0.8, 1.7],
        [-0.8, 0.6, 0.0, -0.4],
        [0.48, 0.64, 0.6, 2.3],
        [0.0, 0.0, 0.0, 1.0],
    ]
)
"""A rotation (of the 3-4-5 kind) and a translation."""


def expect_seen(dataset: Dataset, points: Array = BALLS, within: float = 0.1) -> None:
    """Every camera projects the balls to where its picture shows them, and its rays go back through them."""
    for frame in (f for split in dataset.splits.values() for f in split):
        pixels = frame.read()
        assert pixels.shape[:2] == (frame.camera.height, frame.camera.width)
        where = made.middles(pixels)
        got = frame.camera.project(points) + frame.camera.offset
        np.testing.assert_allclose(got, where, atol=within, err_msg=frame.name)
        o, d = (v.astype(np.float64) for v in frame.camera.rays_at(*(where - frame.camera.offset).T))
        off = np.linalg.norm(np.cross(points - o, d), axis=1)
        assert off.max() < within * np.linalg.norm(points - o, axis=1).max() / frame.camera.fx


def counts(dataset: Dataset) -> dict[str, int]:
    return {name: len(frames) for name, frames in dataset.splits.items()}


# ------------------------------------------------------------------------------------------------------- layouts


def test_blender(tmp_path: Path) -> None:
    dataset = open_dataset(made.blender(tmp_path, SPLITS))
    assert (dataset.kind, counts(dataset)) == ("blender", {"train": 5, "val": 2, "test": 3})
    assert (dataset.box, dataset.near, dataset.far) == (Box.cube(1.5), 2.0, 6.0)
    assert dataset.background == (1.0, 1.0, 1.0)
    assert [f.name for f in dataset.split("val")] == ["r_0", "r_1"]
    assert dataset.split("train")[0].read().shape == (40, 48, 4)
    expect_seen(dataset)


@pytest.mark.parametrize("downscale", [2, 3])
@pytest.mark.parametrize("offset", [0.5, 0.0])
def test_blender_reduced(tmp_path: Path, downscale: int, offset: float) -> None:
    dataset = open_dataset(made.blender(tmp_path, SPLITS, (98, 81)), downscale=downscale, offset=offset)
    camera = dataset.split("train")[0].camera
    assert (camera.width, camera.height, camera.offset) == (98 // downscale, 81 // downscale, offset)
    expect_seen(dataset)


def test_one_file_of_blender_brings_its_siblings(tmp_path: Path) -> None:
    made.blender(tmp_path, SPLITS)
    assert counts(open_dataset(tmp_path / "transforms_test.json")) == {"train": 5, "val": 2, "test": 3}


def test_blender_from_elsewhere_has_a_guessed_box(tmp_path: Path) -> None:
    """Cameras 12 from (3, 0, 1): a sphere that touches the vertical half angle atan(1 / 2.8) has radius 12 sin(it)."""
    dataset = open_dataset(made.blender(tmp_path, {"train": made.orbit(9, 12.0, (3, 0, 1))}, alpha=False))
    assert dataset.near is None
    assert dataset.background is None
    assert any("guessed" in note for note in dataset.notes)
    assert dataset.box is not None
    np.testing.assert_allclose(dataset.box.center, (3, 0, 1), atol=1e-9)
    np.testing.assert_allclose(dataset.box.size, 24 * math.sin(math.atan(1 / 2.8)), rtol=1e-9)


def test_what_is_asked_for_wins(tmp_path: Path) -> None:
    made.blender(tmp_path, SPLITS)
    dataset = open_dataset(tmp_path, background=(0.0, 0.5, 1.0), bounds=Box.cube(0.9))
    assert (dataset.background, dataset.box) == ((0.0, 0.5, 1.0), Box.cube(0.9))


def facing(theta: float = 0.05) -> list[Array]:
    """Ten cameras near (0, 0, 4) that look along -z, turned a little, symmetric: their average is not turned."""
    out = []
    for k in range(5):
        x, y, a = 0.1 + 0.08 * k, 0.1 * k - 0.2, theta * (k - 2)
        for s in (1, -1):
            m = np.eye(4)
            c, d = math.cos(a), s * math.sin(a)
            m[:3, :3] = np.array([[c, 0.0, d], [0.0, 1.0, 0.0], [-d, 0.0, c]])
            m[:3, 3] = (s * x, s * y, 4.0)
            out.append(m)
    return out


def test_llff_forward_facing(tmp_path: Path) -> None:
    """The average camera stands at (0, 0, 4), unturned, and the nearest depth is 2: so the world becomes
    (p - (0, 0, 4)) / (0.75 * 2), wherever the poses were moved to before they were stored."""
    dataset = open_dataset(made.llff(tmp_path, facing(), world=GIVEN))
    assert (dataset.kind, counts(dataset)) == ("llff", {"train": 8, "test": 2})
    assert [f.name for f in dataset.split("test")] == ["image000", "image008"]
    points = (BALLS - (0, 0, 4)) / 1.5
    expect_seen(dataset, points)
    space = dataset.ray_space
    assert (space.kind, space.width, space.height, space.near) == ("ndc", 48.0, 40.0, 1.0)
    assert space.focal == pytest.approx(56.0)
    assert (dataset.near, dataset.far) == (0.0, 1.0)
    assert dataset.box is not None
    x, y, z = points.T
    warped = np.stack([-2 * 56 / 48 * x / z, -2 * 56 / 40 * y / z, 1 + 2 / z], 1)
    assert (warped > dataset.box.min).all()
    assert (warped < dataset.box.max).all()
    assert (dataset.box.min[2], dataset.box.max[2]) == (-1.0, 1.0)


def test_llff_in_the_world(tmp_path: Path) -> None:
    dataset = open_dataset(made.llff(tmp_path, facing(), world=GIVEN), ndc=False, holdout=0)
    assert dataset.ray_space.kind == "world"
    assert counts(dataset) == {"train": 10}
    assert [dataset.near, dataset.far] == pytest.approx([0.9 * 2 / 1.5, 9 / 1.5])
    expect_seen(dataset, (BALLS - (0, 0, 4)) / 1.5)


def spherical_world(cameras: list[Array], target: Array) -> Array:
    """[4, 4] by the published steps for scenes that are looked at from around, in the recentred world: up is the mean
    of the positions seen from the target, the first axis is (0.1, 0.2, 0.3) x up, lengths are in root mean squares."""
    at = np.stack([c[:3, 3] for c in cameras]) - target
    up = at.mean(0) / np.linalg.norm(at.mean(0))
    first = np.cross([0.1, 0.2, 0.3], up)
    first /= np.linalg.norm(first)
    m = np.eye(4)
    m[:3, :3] = np.stack([first, np.cross(up, first), up]) / math.sqrt((at**2).sum(1).mean())
    m[:3, 3] = -m[:3, :3] @ target
    return m


def test_llff_inward_facing(tmp_path: Path) -> None:
    target = np.array([0.1, 0.2, 0.15])
    cameras = made.orbit(12, 4.0, target)
    dataset = open_dataset(made.llff(tmp_path, cameras, (64, 64), world=GIVEN, bounds=(2.5, 8.0)))
    assert dataset.ray_space.kind == "world"
    assert any("inward" in note for note in dataset.notes)
    # Recentred: seen from the average camera, lengths over 0.75 * 2.5.
    back, up = (np.sum([c[:3, k] for c in cameras], 0) for k in (2, 1))
    back = back / np.linalg.norm(back)
    side = np.cross(up, back)
    side /= np.linalg.norm(side)
    middle = np.mean([c[:3, 3] for c in cameras], 0)
    recentre = np.eye(4)
    recentre[:3, :3] = np.stack([side, np.cross(back, side), back])
    recentre[:3, 3] = -recentre[:3, :3] @ middle
    shrink = np.diag([1 / 1.875, 1 / 1.875, 1 / 1.875, 1])
    # Scaling about the origin of the stored world and recentring commute, up to where the origin lies.
    first = shrink @ recentre
    whole = spherical_world([first @ c for c in cameras], first[:3, :3] @ target + first[:3, 3]) @ first
    expect_seen(dataset, BALLS @ whole[:3, :3].T + whole[:3, 3])
    reach = [float(np.linalg.norm(f.camera.position)) for s in dataset.splits.values() for f in s]
    np.testing.assert_allclose(reach, 1.0, atol=1e-9)
    assert [dataset.near, dataset.far] == pytest.approx([0.9 * 2.5 / 4, 8.0 / 4])


def test_llff_takes_the_folder_of_the_size(tmp_path: Path) -> None:
    made.llff(tmp_path, facing(), (128, 96), factor=4, also=(8,))
    for downscale, folder, width in ((1, "images_4", 128), (2, "images_8", 64), (4, "images_8", 32)):
        dataset = open_dataset(tmp_path, downscale=downscale)
        assert dataset.split("train")[0].camera.width == width
        assert any(f"{folder}/" in note for note in dataset.notes)
        expect_seen(dataset, (BALLS - (0, 0, 4)) / 1.5)


@pytest.mark.parametrize("tanks", [True, False])
def test_nsvf(tmp_path: Path, tanks: bool) -> None:
    dataset = open_dataset(made.nsvf(tmp_path, SPLITS, tanks=tanks, alpha=not tanks))
    assert (dataset.kind, counts(dataset)) == ("nsvf", {"train": 5, "val": 2, "test": 3})
    assert dataset.box == Box((-1.0, -1.1, -1.2), (1.0, 1.1, 1.2))
    assert dataset.background == (None if tanks else (1.0, 1.0, 1.0))
    assert dataset.near is None
    expect_seen(dataset)


def test_nsvf_without_test_pictures_tests_on_the_second(tmp_path: Path) -> None:
    made.nsvf(tmp_path, {"train": SPLITS["train"], "val": SPLITS["val"]})
    (tmp_path / "near_far.txt").write_text("0.5 6\n")
    dataset = open_dataset(tmp_path, downscale=2)
    assert counts(dataset) == {"train": 5, "test": 2}
    assert (dataset.near, dataset.far) == (0.5, 6.0)
    expect_seen(dataset)


def test_nsvf_without_prefixes_holds_out(tmp_path: Path) -> None:
    made.nsvf(tmp_path, {"train": made.orbit(10)})
    for folder in ("pose", "rgb"):
        for file in (tmp_path / folder).iterdir():
            file.rename(file.with_name(file.name.replace("0_train_", "")))
    (tmp_path / "bbox.txt").unlink()
    dataset = open_dataset(tmp_path)
    assert counts(dataset) == {"train": 8, "test": 2}
    assert any("no splits" in n for n in dataset.notes)
    assert any("no bbox.txt" in n for n in dataset.notes)
    expect_seen(dataset)


def test_nsvf_of_train_pictures_alone_holds_out(tmp_path: Path) -> None:
    assert counts(open_dataset(made.nsvf(tmp_path, {"train": made.orbit(9)}))) == {"train": 7, "test": 2}


def test_transforms(tmp_path: Path) -> None:
    k = np.array([[61.0, 0, 25.5], [0, 57.0, 18.0], [0, 0, 1]])
    dataset = open_dataset(made.transforms(tmp_path, made.orbit(17), k=k, aabb_scale=2))
    assert (dataset.kind, counts(dataset)) == ("transforms", {"train": 14, "test": 3})
    # In order of numbers, not of letters: frame_10 comes after frame_9.
    assert [f.name for f in dataset.split("test")] == ["frame_1", "frame_9", "frame_17"]
    assert dataset.box == Box.cube(1 / 0.33)
    expect_seen(dataset)


def test_intrinsics_of_a_frame_win(tmp_path: Path) -> None:
    cameras, size = made.orbit(4), (60, 44)
    made.transforms(tmp_path, cameras)
    k = np.array([[81.0, 0, 30.0], [0, 83.0, 21.0], [0, 0, 1]])
    made.save(tmp_path / "images" / "frame_3.png", made.picture(cameras[2], size, k))
    own = {"fl_x": 81.0, "fl_y": 83.0, "cx": 30.0, "cy": 21.0, "w": 60, "h": 44}
    made.change(tmp_path / "transforms.json", lambda d: d["frames"][2].update(own))
    expect_seen(open_dataset(tmp_path))


def test_angles_in_degrees_and_a_copied_axis(tmp_path: Path) -> None:
    made.transforms(tmp_path, made.orbit(3), fl_x=None, fl_y=None, w=None, h=None, cx=None, cy=None)
    degrees = math.degrees(2 * math.atan(20 / 56))
    made.change(tmp_path / "transforms.json", lambda d: d.update(y_fov=degrees, camera_angle_y=1.0))
    expect_seen(open_dataset(tmp_path))


@pytest.mark.parametrize(
    ("extra", "box"),
    [
        ({"aabb_scale": 1}, Box.cube(0.5 / 0.33)),
        ({"aabb_scale": 4, "scale": 0.5, "offset": [0.5, 0.25, 0.5]}, Box.cube(4.0, (0.0, 0.5, 0.0))),
        ({"aabb": [[-1, -2, -3], [1, 2, 4]]}, Box((-1, -2, -3), (1, 2, 4))),
        ({"aabb_scale": 3, "scale": 1.0, "offset": 0.0}, Box.cube(1.5)),
    ],
)
def test_the_cube_of_instant_ngp(tmp_path: Path, extra: dict[str, Any], box: Box) -> None:
    """p_cube = p * scale + offset, and the cube has side aabb_scale around 0.5; 3 is no side that the program has."""
    got = open_dataset(made.transforms(tmp_path, made.orbit(3), **extra)).box
    assert got is not None
    np.testing.assert_allclose([got.min, got.max], [box.min, box.max])


def test_a_scene_that_is_looked_at_from_one_side_has_no_guessed_box(tmp_path: Path) -> None:
    dataset = open_dataset(made.transforms(tmp_path, facing(0.0)))
    assert dataset.box is None
    assert any("the box is unknown" in note for note in dataset.notes)


def test_mitsuba_cameras_look_the_other_way(tmp_path: Path) -> None:
    made.transforms(tmp_path, made.orbit(3), from_mitsuba=True)

    def turn(data: dict[str, list[dict[str, object]]]) -> None:
        for f in data["frames"]:
            f["transform_matrix"] = (np.array(f["transform_matrix"]) @ np.diag([-1, 1, -1, 1])).tolist()

    made.change(tmp_path / "transforms.json", turn)
    expect_seen(open_dataset(tmp_path))


def test_nerfstudio_splits_by_names_and_says_where_its_world_came_from(tmp_path: Path) -> None:
    names = [f"images/frame_{n}.png" for n in range(1, 8)]
    applied = [[0, 1, 0, 0.5], [1, 0, 0, 0], [0, 0, -1, 0]]
    made.transforms(
        tmp_path,
        made.orbit(7),
        train_filenames=names[:4],
        val_filenames=names[4:5],
        test_filenames=["./" + n for n in names[5:6]],
        applied_transform=applied,
        camera_model="PINHOLE",
    )
    dataset = open_dataset(tmp_path)
    assert counts(dataset) == {"train": 4, "val": 1, "test": 1}
    assert any("1 pictures are in no split" in n for n in dataset.notes)
    expect_seen(dataset)
    # (x, y, z) of the original world is (y + 0.5, x, -z) here.
    np.testing.assert_allclose(np.array(dataset.world) @ (5.0, 7.0, -3.0, 1.0), (7.0, 4.5, 3.0, 1.0))


def test_tiny_nerf(tmp_path: Path) -> None:
    dataset = open_dataset(made.tiny_nerf(tmp_path / "some.npz", made.orbit(106), (24, 20)))
    assert (dataset.kind, counts(dataset)) == ("tiny-nerf", {"train": 100, "test": 6})
    assert dataset.background is None
    assert dataset.box == Box.cube(1.5)
    assert dataset.split("test")[0].name == "100"
    few = open_dataset(made.tiny_nerf(tmp_path / "some.npz", made.orbit(9)), downscale=2)
    assert counts(few) == {"train": 7, "test": 2}
    expect_seen(few)
    assert open_dataset(tmp_path).splits.keys() == {"train", "test"}, "the folder of one such file"


def test_bytes_are_those_of_the_picture(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    k, cameras = made.matrix((6, 5)), made.orbit(2)
    made.transforms(tmp_path, cameras, (6, 5), k=k)
    for n, mode in ((1, "RGBA"), (2, "RGB")):
        pixels = rng.integers(0, 256, (5, 6, len(mode)), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/frame_{n}.png")
        (frame,) = [f for s in open_dataset(tmp_path).splits.values() for f in s if f.name == f"frame_{n}"]
        np.testing.assert_array_equal(frame.read(), pixels)


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("L", 77, (77, 77, 77)),
        ("LA", (77, 9), (77, 77, 77, 9)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 40000, (156, 156, 156)),
        ("P", 0, (0, 0, 0)),
        ("CMYK", (0, 0, 0, 255), (0, 0, 0)),
    ],
)
def test_other_pictures_become_colours(tmp_path: Path, mode: str, value: object, expected: tuple[int, ...]) -> None:
    made.transforms(tmp_path, made.orbit(1), (6, 5))
    name = "frame_1.tif" if mode == "CMYK" else "frame_1.png"
    Image.new(mode, (6, 5), value).save(tmp_path / "images" / name)  # type: ignore[arg-type]
    made.change(tmp_path / "transforms.json", lambda d: d["frames"][0].update(file_path=f"images/{name}"))
    pixels = open_dataset(tmp_path).split("train")[0].read()
    assert tuple(int(v) for v in pixels[2, 3]) == expected


def test_reducing_weighs_colours_by_alpha(tmp_path: Path) -> None:
    """Opaque red beside clear green: half the alpha, and red, not brown."""
    made.blender(tmp_path, {"train": made.orbit(2)}, (2, 2))
    pixels = np.array([[[200, 0, 0, 255], [0, 200, 0, 0]]] * 2, dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "train/r_0.png")
    got = open_dataset(tmp_path, downscale=2).split("train")[0].read()
    assert got.shape == (1, 1, 4)
    np.testing.assert_allclose(got[0, 0].astype(int), (200, 0, 0, 128), atol=1)


def test_masks_of_both_programs(tmp_path: Path) -> None:
    made.transforms(tmp_path, made.orbit(3), (6, 4))
    kept = np.zeros((4, 6), dtype=np.uint8)
    kept[1:3, 2:5] = 255
    Image.fromarray(kept).save(tmp_path / "kept.png")
    Image.fromarray(255 - kept).save(tmp_path / "images/dynamic_mask_frame_2.png")
    made.change(tmp_path / "transforms.json", lambda d: d["frames"][0].update(mask_path="kept.png"))
    one, two, three = open_dataset(tmp_path, holdout=0).split("train")
    assert one.mask is not None
    assert two.mask is not None
    assert three.mask is None
    np.testing.assert_array_equal(one.mask(), kept > 0)
    np.testing.assert_array_equal(two.mask(), kept > 0)
    half = open_dataset(tmp_path, holdout=0, downscale=2).split("train")[0].mask
    assert half is not None
    assert not half().any(), "a pixel of the reduced picture counts where all of it does"


def test_alpha_in_a_file_of_its_own(tmp_path: Path) -> None:
    made.transforms(tmp_path, made.orbit(2), (6, 4))
    alpha = np.arange(24, dtype=np.uint8).reshape(4, 6)
    Image.fromarray(alpha).save(tmp_path / "images/frame_1.alpha.png")
    dataset = open_dataset(tmp_path, holdout=0)
    np.testing.assert_array_equal(dataset.split("train")[0].read()[..., 3], alpha)
    assert dataset.background == (1.0, 1.0, 1.0)


# -------------------------------------------------------------------------------------------------------- splits


def test_a_picture_belongs_to_one_split(tmp_path: Path) -> None:
    made.blender(tmp_path, {"train": SPLITS["train"], "test": SPLITS["test"]})
    train = json.loads((tmp_path / "transforms_train.json").read_text())
    made.change(tmp_path / "transforms_test.json", lambda d: d["frames"].extend(train["frames"][:2]))
    made.change(tmp_path / "transforms_train.json", lambda d: d["frames"].append(train["frames"][0]))
    dataset = open_dataset(tmp_path)
    assert counts(dataset) == {"train": 5, "test": 3}
    assert "split train: 1 picture is twice in it: counted once" in dataset.notes
    assert "split test: 2 pictures are in train as well: left out of test" in dataset.notes


def test_every_eighth_is_held_out_and_said(tmp_path: Path) -> None:
    made.transforms(tmp_path, made.orbit(9))
    dataset = open_dataset(tmp_path)
    assert any("every 8th picture is held out as test (2 of 9)" in n for n in dataset.notes)
    assert counts(open_dataset(tmp_path, holdout=3)) == {"train": 6, "test": 3}
    with pytest.raises(UsageError, match=r"no frames in split 'val' \(splits: train \(7\), test \(2\)\)"):
        dataset.split("val")


def test_missing_pictures_of_transforms_are_named_once(tmp_path: Path) -> None:
    made.transforms(tmp_path, made.orbit(12))
    for n in (2, 5, 11):
        (tmp_path / f"images/frame_{n}.png").unlink()
    dataset = open_dataset(tmp_path)
    (note,) = [n for n in dataset.notes if "missing" in n]
    assert note == ("3 pictures are missing and left out: images/frame_2.png, images/frame_5.png, images/frame_11.png")
    assert sum(counts(dataset).values()) == 9


def test_several_files_of_instant_ngp_are_one_scene(tmp_path: Path) -> None:
    made.transforms(tmp_path, made.orbit(6))
    data = json.loads((tmp_path / "transforms.json").read_text())
    for name, part in (("a", data["frames"][:2]), ("b", data["frames"][2:])):
        (tmp_path / f"{name}.json").write_text(json.dumps({**data, "frames": part}))
    (tmp_path / "transforms.json").unlink()
    (tmp_path / "base_cam.json").write_text('{"path": []}')
    dataset = open_dataset(tmp_path, holdout=0)
    assert [f.name for f in dataset.split("train")] == [f"frame_{n}" for n in range(1, 7)]
    expect_seen(dataset)


def test_almost_rotations_are_made_so_and_said(tmp_path: Path) -> None:
    cameras = made.orbit(4)
    made.transforms(tmp_path, cameras)
    bent = cameras[2] @ np.diag([1.004, 0.998, 1.0, 1.0])
    made.change(tmp_path / "transforms.json", lambda d: d["frames"][2].update(transform_matrix=bent.tolist()))
    dataset = open_dataset(tmp_path, holdout=0)
    assert any("1 pose was not quite orthonormal (off by up to 0.008)" in n for n in dataset.notes)
    m = np.array(dataset.split("train")[2].camera.c2w)
    np.testing.assert_allclose(m, cameras[2][:3], atol=1e-12)


# -------------------------------------------------------------------------------------------------------- memory


def test_long_sets_of_large_pictures_need_the_memory_of_one(tmp_path: Path) -> None:
    """400 frames of 1920 x 1080, 2.5 GB unpacked: opened, and 40 of them read."""
    made.transforms(tmp_path, made.orbit(400)[:1], (1920, 1080), aabb_scale=1)
    data = json.loads((tmp_path / "transforms.json").read_text())
    first = tmp_path / "images/frame_1.png"
    for n in range(2, 401):
        try:
            os.link(first, tmp_path / f"images/frame_{n}.png")
        except OSError:
            shutil.copy(first, tmp_path / f"images/frame_{n}.png")
    data["frames"] = [
        {"file_path": f"images/frame_{n}.png", "transform_matrix": c.tolist()}
        for n, c in enumerate(made.orbit(400), start=1)
    ]
    (tmp_path / "transforms.json").write_text(json.dumps(data))
    code = f"""
from pathlib import Path
import numpy
from PIL import Image, PngImagePlugin
from pvdconvert.data.opening import open_cameras, open_dataset
before = peak()
frames = open_dataset(Path({str(tmp_path)!r})).split("train")
assert len(frames) == 350
for frame in frames[:40]:
    assert frame.read().shape == (1080, 1920, 3)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", PEAK + code], capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) < 80 << 20


# ------------------------------------------------------------------------------------------------------- cameras


def test_cameras_of_any_dataset(tmp_path: Path) -> None:
    """Of a json all, pictures or not, with their lenses; of a folder those that train."""
    made.transforms(tmp_path / "a", made.orbit(9), k1=0.1)
    cameras = open_cameras(tmp_path / "a/transforms.json")
    assert len(cameras) == 9
    assert cameras[0].lens == Lens(radial=(0.1, 0.0, 0.0))
    shutil.rmtree(tmp_path / "a/images")
    assert open_cameras(tmp_path / "a/transforms.json") == cameras
    made.nsvf(tmp_path / "b", SPLITS)
    assert len(open_cameras(tmp_path / "b")) == 5
    made.blender(tmp_path / "c", {"test": made.orbit(2)})
    assert len(open_cameras(tmp_path / "c")) == 2
