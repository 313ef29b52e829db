"""What is wrong with a dataset is said in one line that names the file: damage, contradictions, sizes, names."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pvdconvert.data import documents
from pvdconvert.data.opening import open_dataset
from pvdconvert.errors import InputError, PvdError, UnknownError, UnsafeError, UsageError
from tests import datasets as made

Make = Callable[[Path], Path]
Harm = Callable[[Path], None]
SPLITS = {"train": made.orbit(3), "test": made.orbit(2, 4.2)}


def refused(path: Path, error: type[PvdError], message: str, **options: Any) -> None:
    """Opened and read through, it is refused in one line that names a file of it."""

    def through() -> None:
        for frames in open_dataset(path, **options).splits.values():
            for frame in frames:
                frame.read()
                if frame.mask is not None:
                    frame.mask()

    with pytest.raises(error, match=message) as caught:
        through()
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value) or path.name in str(caught.value)


def blender(path: Path) -> Path:
    return made.blender(path, SPLITS, (12, 10))


def transforms(path: Path) -> Path:
    return made.transforms(path, made.orbit(4), (12, 10))


def llff(path: Path) -> Path:
    return made.llff(path, made.orbit(4), (12, 10))


def nsvf(path: Path) -> Path:
    return made.nsvf(path, SPLITS, (12, 10))


def edit(name: str, **changes: Any) -> Harm:
    """Change entries of a json file; of its frame 1 where the name ends with "/1"."""
    file, _, frame = name.partition("/")

    def apply(data: dict[str, Any]) -> None:
        target = data["frames"][int(frame)] if frame else data
        for key, value in changes.items():
            if value is None:
                del target[key]
            else:
                target[key] = value

    return lambda path: made.change(path / file, apply)


def write(name: str, content: str | bytes) -> Harm:
    def apply(path: Path) -> None:
        (path / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return apply


def resize(name: str, size: tuple[int, int]) -> Harm:
    return lambda path: Image.new("RGB", size).save(path / name)


def remove(name: str) -> Harm:
    return lambda path: shutil.rmtree(path / name) if (path / name).is_dir() else (path / name).unlink()


def bounds(change: Callable[[Any], Any]) -> Harm:
    def apply(path: Path) -> None:
        table = np.load(path / "poses_bounds.npy")
        np.save(path / "poses_bounds.npy", change(table))

    return apply


def column(table: Any, k: int, value: float) -> Any:
    table[:, k] = value
    return table


def bomb(width: int, height: int) -> bytes:
    """A PNG that claims a size, by hand."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


HERE = np.eye(4).tolist()
STRETCHED = np.diag([1.2, 1.0, 1.0, 1.0]).tolist()
MIRRORED = np.diag([1.0, 1.0, -1.0, 1.0]).tolist()
TRAIN, JSON = "transforms_train.json", "transforms.json"

CASES: list[tuple[Make, Harm, str]] = [
    # -- json
    (blender, write(TRAIN, "{"), "transforms_train.json: not JSON"),
    (blender, write(TRAIN, "[" * 100_000), "transforms_train.json: not JSON"),
    (blender, write(TRAIN, "[1, 2]"), "not an object with 'frames'"),
    (blender, write(TRAIN, b"\xff\xfe{}"), "transforms_train.json: not a text"),
    (blender, edit(TRAIN, frames=None), "no list 'frames'"),
    (blender, edit(TRAIN, frames=[]), "'frames' is empty"),
    (blender, edit(TRAIN, frames=["r_0"]), r"frames\[0\]: no 'file_path'"),
    (blender, edit(f"{TRAIN}/1", file_path=3), r"frames\[1\]: no 'file_path'"),
    (blender, edit(f"{TRAIN}/1", transform_matrix=None), r"frames\[1\]: no 'transform_matrix'"),
    (blender, edit(f"{TRAIN}/1", transform_matrix=[[1, 2], [3]]), r"frames\[1\]: the pose is not 4x4"),
    (blender, edit(f"{TRAIN}/1", transform_matrix="no"), r"frames\[1\]: the pose is not 4x4"),
    (blender, edit(f"{TRAIN}/1", transform_matrix=STRETCHED), r"frames\[1\]: the pose is not a rotation .*0.44"),
    (blender, edit(f"{TRAIN}/1", transform_matrix=MIRRORED), r"frames\[1\]: the pose mirrors"),
    (blender, edit(f"{TRAIN}/1", transform_matrix=np.full((4, 4), 1e300).tolist()), r"frames\[1\]: the pose holds"),
    (blender, edit(TRAIN, camera_angle_x=None), r"frames\[0\]: no focal length"),
    (blender, edit(TRAIN, camera_angle_x=3.5), r"frames\[0\]: an angle of view of 3.5"),
    (blender, edit(TRAIN, camera_angle_x="wide"), "'camera_angle_x' is 'wide', not a number"),
    (blender, edit(TRAIN, cx=1e9), "principal point 1000000000.0, .* far outside"),
    (transforms, edit(JSON, fl_x=-4.0), "'fl_x' is -4.0, not positive"),
    (transforms, edit(JSON, fl_x=True), "'fl_x' is True, not a number"),
    (transforms, edit(JSON, fl_x=int("9" * 400)), "'fl_x' is 999.*not a number"),
    (transforms, edit(JSON, aabb=[1, 2]), "'aabb'"),
    (transforms, edit(JSON, aabb_scale=0), "'aabb_scale' is 0.0, not positive"),
    (transforms, edit(JSON, aabb_scale=1, offset=[1, 2]), r"'offset' is \[1, 2\], not three"),
    (transforms, edit(JSON, applied_transform=[[1, 0], [0]]), "'applied_transform' is not 3x4"),
    (transforms, edit(JSON, applied_transform=np.zeros((3, 4)).tolist()), "'applied_transform' cannot be inverted"),
    (transforms, edit(f"{JSON}/1", transform_matrix=None, transform_matrix_start=HERE), "rolling shutter"),
    (transforms, edit(f"{JSON}/1", mask_path="none.png"), r"frames\[1\]: the mask 'none.png' is missing"),
    # -- pictures
    (blender, remove("train/r_1.png"), "transforms_train.json: 1 picture is missing: ./train/r_1"),
    (transforms, remove("images"), "none of its 4 pictures is there"),
    (blender, resize("train/r_1.png", (13, 10)), "r_1.png: the picture is 13 x 10, its camera 12 x 10"),
    (transforms, resize("images/frame_2.png", (6, 5)), "frame_2.png: the picture is 6 x 5, its camera 12 x 10"),
    (
        transforms,
        lambda p: (edit(f"{JSON}/1", file_path="a.exr")(p), write("a.exr", "v/1")(p), None)[2],
        "a.exr: not a r",
    ),
    (blender, write("train/r_1.png", "no picture"), "r_1.png: not a readable picture"),
    (blender, write("train/r_1.png", "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "r_1.png: not a readable"),
    (blender, write("train/r_1.png", bomb(12, 10)), "r_1.png: the picture is truncated"),
    (blender, write("train/r_1.png", bomb(60_000, 50_000)), "r_1.png: .*refused as a bomb"),
    (blender, write("train/r_1.png", bomb(10_000, 10_000)), "r_1.png: .*refused as a bomb"),
    # -- cameras
    (llff, bounds(lambda t: column(column(column(t, 3, 1.0), 8, 2.0), 13, 3.0)), "all 4 cameras stand at one point"),
    # -- LLFF
    (llff, bounds(lambda t: t[:, :16]), r"\[4, 16\], not \[N, 17\]"),
    (llff, bounds(lambda t: t[:0]), r"\[0, 17\], not \[N, 17\]"),
    (llff, bounds(lambda t: column(t, 3, np.nan)), "not all numbers are finite"),
    (llff, bounds(lambda t: column(t, 15, 0.0)), "depths from 0 to 9"),
    (llff, bounds(lambda t: column(t, 14, 0.0)), "focal length 0"),
    (llff, bounds(lambda t: column(t, 0, 3.0)), "pose 0: the pose is not a rotation"),
    (llff, bounds(lambda t: column(t, 9, 300.0)), "image000.png: .* its pose is of one 300 x 80"),
    (llff, bounds(lambda t: t[:3]), "4 pictures, but poses_bounds.npy has 3 poses"),
    (llff, resize("images_8/image002.png", (11, 10)), "image002.png: the picture is 11 x 10"),
    (llff, remove("images_8"), "no pictures in images/"),
    (llff, write("poses_bounds.npy", b"\x93NUMPY\x01\x00"), "poses_bounds.npy: the npy header is truncated"),
    # -- NSVF
    (nsvf, remove("rgb/0_train_0001.png"), "rgb: 1 of 5 pictures missing: 0_train_0001"),
    (nsvf, remove("intrinsics.txt"), "intrinsics.txt: no such file"),
    (nsvf, write("intrinsics.txt", "focal"), "intrinsics.txt: not numbers"),
    (nsvf, write("intrinsics.txt", ""), "intrinsics.txt: no finite numbers"),
    (nsvf, write("intrinsics.txt", "-3 6 5"), "intrinsics.txt: focal length -3"),
    (nsvf, write("intrinsics.txt", "14 400 400"), "principal point is that of a picture some 800 .*not 12"),
    (nsvf, write("intrinsics.txt", "14 1 6 0  0 14 5 0  0 0 1 0  0 0 0 1"), "intrinsics.txt: a sheared camera"),
    (nsvf, write("bbox.txt", "0 0 0 1 1"), "bbox.txt: 5 numbers"),
    (nsvf, write("bbox.txt", "0 0 0 1 1 0"), "bbox.txt: box .* is empty"),
    (nsvf, write("near_far.txt", "6 2"), "near_far.txt: not a near and a far"),
    (nsvf, write("pose/0_train_0001.txt", "1 2 3"), "0_train_0001.txt: 3 numbers, not a 4x4"),
    (nsvf, write("pose/0_train_0001.txt", "1 0 0 0 " * 4), "0_train_0001.txt: the pose is not a rotation"),
    (nsvf, resize("rgb/0_train_0001.png", (9, 9)), "0_train_0001.png: the picture is 9 x 9, its camera 12 x 10"),
]


@pytest.mark.parametrize(("make", "harm", "message"), CASES, ids=[c[2][:40] for c in CASES])
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, make: Make, harm: Harm, message: str) -> None:
    path = make(tmp_path / "set")
    harm(path)
    refused(path, InputError, message)


def test_all_cameras_at_one_point(tmp_path: Path) -> None:
    for name, make in (("a", blender), ("b", transforms), ("c", nsvf)):
        path = make(tmp_path / name)
        for file in path.glob("*.json"):
            made.change(file, lambda d: [f.update(transform_matrix=HERE) for f in d["frames"]] and None)
        for file in path.glob("pose/*.txt"):
            np.savetxt(file, np.eye(4))
        refused(path, InputError, r"all \d cameras stand at one point")


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/hosts.png", "a/../../secret.png", "C:/secret.png", "..\\s.png"]
)
def test_names_that_leave_the_folder(tmp_path: Path, name: str) -> None:
    Image.new("RGB", (12, 10)).save(tmp_path / "secret.png")
    for key in ("file_path", "mask_path"):
        path = transforms(tmp_path / key)
        made.change(path / JSON, lambda d, key=key: d["frames"][1].update({key: name}))  # type: ignore[misc]
        refused(path, UnsafeError, r"frames\[1\]: .*leads out of the folder")


def test_names_that_stay_in_the_folder(tmp_path: Path) -> None:
    path = transforms(tmp_path / "set")
    name = str(path / "images/frame_1.png")
    made.change(path / JSON, lambda d: d["frames"][0].update(file_path=name))
    made.change(path / JSON, lambda d: d["frames"][1].update(file_path="images/../images/frame_2.png"))
    assert len(open_dataset(path, holdout=0).split("train")) == 4


def test_a_picture_that_changes_later(tmp_path: Path) -> None:
    path = transforms(tmp_path)
    frame = open_dataset(path).split("test")[0]
    whole = (path / "images/frame_1.png").read_bytes()
    (path / "images/frame_1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"frame_1.png: the picture is truncated"):
        frame.read()
    (path / "images/frame_1.png").unlink()
    with pytest.raises(InputError, match=r"frame_1.png: no such picture"):
        frame.read()


def test_a_text_beyond_the_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = blender(tmp_path)
    monkeypatch.setattr(documents, "MAX_JSON", 100)
    refused(path, InputError, "transforms_train.json: more than 100 bytes")


# -------------------------------------------------------------------------------------------------------- tiny-nerf


def arrays(count: int = 3, **changes: Any) -> dict[str, Any]:
    poses = np.stack(made.orbit(count)).astype(np.float32)
    data = {"images": np.zeros((count, 4, 5, 3), np.float32), "poses": poses, "focal": np.float64(5.0)}
    return {**data, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.zeros((3, 4, 5), np.float32)}, r"images are float32 \[3, 4, 5\], not"),
        ({"images": np.zeros((3, 4, 5, 3), np.int64)}, "images are int64"),
        ({"images": np.zeros((0, 4, 5, 3), np.float32)}, "there are no pictures"),
        ({"images": np.full((3, 4, 5, 3), 255.0, np.float32)}, r"images\[0\] leaves \[0, 1\]"),
        ({"images": np.full((3, 4, 5, 3), np.nan, np.float32)}, r"images\[0\] leaves \[0, 1\]"),
        ({"poses": np.zeros((2, 4, 4))}, r"3 images, but poses are \[2, 4, 4\]"),
        ({"poses": np.zeros((3, 4, 4))}, r"poses\[0\]: the pose is not a rotation"),
        ({"poses": np.stack([np.eye(4)] * 3)}, "all 3 cameras stand at one point"),
        ({"focal": np.float64(0)}, "focal is no positive number"),
        ({"focal": np.ones(2)}, "focal is no positive number"),
    ],
)
def test_bad_arrays(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "some.npz"
    np.savez(path, **arrays(**changes))
    refused(path, InputError, message)


def test_arrays_of_objects_are_not_unpickled(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    path = tmp_path / "some.npz"
    np.savez(path, **arrays(images=np.array([Harm()], dtype=object)), allow_pickle=True)
    assert b"touch" in pickle.dumps(Harm())
    with pytest.raises(PvdError, match=r"some\.npz"):
        open_dataset(path)
    with pytest.raises(PvdError, match=r"some\.npz"):
        open_dataset(path, kind="tiny-nerf")
    assert not (tmp_path / "ran").exists()


def test_a_folder_of_two_npz(tmp_path: Path) -> None:
    for name in ("a.npz", "b.npz"):
        np.savez(tmp_path / name, **arrays())
    refused(tmp_path, InputError, "2 files of images, poses and focal")


# --------------------------------------------------------------------------------------------- paths and arguments


def test_nothing_there_and_nothing_known(tmp_path: Path) -> None:
    refused(tmp_path / "none", InputError, "no such file or folder")
    refused(tmp_path, UnknownError, "no layout of posed pictures fits it .*poses_bounds.npy")
    (tmp_path / "x.json").write_text('{"snapshot": {}}')
    refused(tmp_path / "x.json", UnknownError, "no layout")


def test_two_layouts_in_a_folder(tmp_path: Path) -> None:
    llff(tmp_path)
    nsvf(tmp_path)
    refused(tmp_path, UnknownError, "is llff or nsvf, equally well .*which kind")
    assert open_dataset(tmp_path, kind="nsvf").kind == "nsvf"
    refused(transforms(tmp_path / "b"), InputError, "llff: |no such", kind="llff")


@pytest.mark.parametrize("kind", ["blender", "llff", "nsvf", "transforms", "tiny-nerf"])
def test_a_kind_that_it_is_not(tmp_path: Path, kind: str) -> None:
    (tmp_path / "readme.txt").write_text("nothing")
    refused(tmp_path, InputError, kind if kind != "llff" else "poses_bounds.npy", kind=kind)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kind": "colmap"}, UnknownError, "unknown kind of dataset .*known: blender, llff"),
        ({"downscale": 0}, UsageError, "downscale 0"),
        ({"downscale": 11}, InputError, "12 x 10 pixels cannot be reduced 11 times"),
        ({"holdout": 1}, UsageError, "holdout 1"),
        ({"offset": 2.0}, UsageError, "offset 2.0"),
        ({"background": (0.0, 2.0, 0.0)}, UsageError, "background"),
    ],
)
def test_bad_arguments(tmp_path: Path, options: dict[str, Any], error: type[PvdError], message: str) -> None:
    path = transforms(tmp_path)
    with pytest.raises(error, match=message):
        open_dataset(path, **options)


def test_ndc_needs_cameras_that_look_one_way(tmp_path: Path) -> None:
    refused(llff(tmp_path), UsageError, "NDC was asked for, but the cameras do not look one way", ndc=True)


def test_a_background_without_alpha_is_said(tmp_path: Path) -> None:
    dataset = open_dataset(transforms(tmp_path), background=(0.0, 0.0, 0.0))
    assert dataset.background is None
    assert any("have no alpha" in n for n in dataset.notes)


def test_nested_json_frames_are_looked_at_before_use(tmp_path: Path) -> None:
    """A json of another purpose beside the pictures is not taken for a dataset."""
    (tmp_path / "a.json").write_text(json.dumps({"frames": [{"timestamp": 3}]}))
    refused(tmp_path, UnknownError, "no layout")
