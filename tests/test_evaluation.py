"""Judging against pictures whose truth is computed here, in float64, by nothing of pvdconvert.

The field is an opaque slab under the plane z = 0 whose colour is linear in x and y, so what a camera sees of it, and
what half a pixel, a clipped ray or a wrong background cost, have closed forms.
"""

from __future__ import annotations

import dataclasses
import json
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from pvdconvert.cameras import Camera
from pvdconvert.data import Dataset, Frame
from pvdconvert.errors import InputError, PvdError, RequestError, UsageError
from pvdconvert.evaluation import Judged, evaluate, truth_of
from pvdconvert.field import FunctionField
from pvdconvert.metrics import CAP
from pvdconvert.placing import choose, pixel_offset, placed
from pvdconvert.prepare import Prepared
from pvdconvert.registry import default
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.scene import Box, RaySpace, Scene

SIDE, FOCAL, HEIGHT, SLOPE = 16, 32.0, 3.0, 0.3
PIXEL = HEIGHT / FOCAL
"""World units between the points of the plane that neighbouring pixels see."""
BOX = Box((-1.5, -1.5, -0.5), (1.5, 1.5, 0.5))


def slab(to_data: NDArray[np.float64] | None = None) -> FunctionField:
    """Opaque below z = 0, colour (0.5 + 0.3 x, 0.5 + 0.3 y, 0.5); ``to_data`` [4, 4] leads from its world to these."""
    m = torch.from_numpy(np.eye(4) if to_data is None else to_data).float()

    def at(x: Tensor) -> Tensor:
        return x @ m[:3, :3].T + m[:3, 3]

    def color(x: Tensor, d: Tensor) -> Tensor:
        p = at(x)
        return torch.stack([0.5 + SLOPE * p[:, 0], 0.5 + SLOPE * p[:, 1], 0.5 + 0 * p[:, 0]], -1)

    return FunctionField(lambda x: torch.where(at(x)[:, 2] < 0, 1e5, 0.0), color)


def prepared(scene: Scene, field: FunctionField | None = None, cells: int = 48) -> Prepared:
    cell = scene.box.longest / cells
    grid = torch.ones([math.ceil(s / cell - 1e-6) for s in scene.box.size], dtype=torch.uint8)
    occupancy = Occupancy(torch.tensor(scene.box.min), cell, grid)
    return Prepared(field or slab(), scene, occupancy, scene.box, 0.004 * scene.box.longest, "", torch.device("cpu"))


def camera(x: float = 0.0, offset: float = 0.5) -> Camera:
    """Above the plane at height 3, looking straight down; +x is right and +y is up in the picture."""
    pose = ((1.0, 0.0, 0.0, x), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, HEIGHT))
    return Camera(SIDE, SIDE, FOCAL, FOCAL, SIDE / 2, SIDE / 2, pose, offset)


def plane(x: float = 0.0, shift: int = 0) -> NDArray[np.uint8]:
    """What :func:`camera` sees through pixel centres, rounded, and ``shift`` added to every byte."""
    j, i = np.mgrid[0:SIDE, 0:SIDE] + 0.5
    u, v = x + (i - SIDE / 2) * PIXEL, -(j - SIDE / 2) * PIXEL
    colors = np.stack([0.5 + SLOPE * u, 0.5 + SLOPE * v, 0.5 + 0 * u], -1)
    return (np.round(255 * colors) + shift).astype(np.uint8)


def frame(name: str = "r_0", pixels: NDArray[np.uint8] | None = None, x: float = 0.0, **more: Any) -> Frame:
    shown = plane(x) if pixels is None else pixels
    return Frame(name, camera(x), lambda: shown, **more)


def dataset(*frames: Frame, **more: Any) -> Dataset:
    return Dataset(Path("folder"), "hand-made", {"train": (frame("t_0"),), "test": frames}, **more)


SCENE = Scene(BOX, background=(1.0, 1.0, 1.0))


def test_a_known_error_has_its_closed_form() -> None:
    """Ten bytes of 255 everywhere: 20 log10(25.5) dB; rounding may move single bytes by one."""
    one, two = frame("a", plane(0.2, shift=10), 0.2), frame("b", plane(-0.1, shift=-5), -0.1)
    got = evaluate(prepared(SCENE), dataset(one, two))
    expected = [20 * math.log10(255 / 10), 20 * math.log10(255 / 5)]
    assert [v["psnr"] for v in got.views] == pytest.approx(expected, abs=0.05)
    assert got.mean["psnr"] == pytest.approx(np.mean([v["psnr"] for v in got.views]))
    assert [v["name"] for v in got.views] == ["a", "b"]
    assert [v["pixels"] for v in got.views] == [SIDE * SIDE] * 2
    assert 0.9 < got.mean["ssim"] < 1
    assert 0 < got.mean["flip"] < 0.2
    assert (got.split, got.frames, got.kind) == ("test", 2, "hand-made")
    data = json.loads(json.dumps(got.to_json(), allow_nan=False))
    assert data["dataset"] == {"path": "folder", "format": "hand-made", "split": "test", "frames": 2}
    assert data["metrics"].keys() == {"psnr", "ssim", "flip"}
    assert "2 of 2 test views" in str(got)


def test_half_a_pixel_costs_what_it_must() -> None:
    """Rays through corners see the plane half a pixel to the left and above: red and green are off by 0.15 PIXEL."""
    got = evaluate(prepared(SCENE), dataset(frame()), metrics=("psnr",), offset=0.0)
    expected = -10 * math.log10(2 / 3 * (SLOPE * PIXEL / 2) ** 2)
    assert got.mean["psnr"] == pytest.approx(expected, abs=0.15)  # bytes: 3.6 of 255, rounded
    assert got.offset == 0.0
    right = evaluate(prepared(SCENE), dataset(frame()), metrics=("psnr",))
    assert right.offset == 0.5
    assert right.mean["psnr"] > 50


def test_cameras_follow_the_world_of_the_field() -> None:
    """A field at half the size, turned and moved: its file says so, and the picture is the same."""
    turn = np.array([[0.0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    world = turn @ np.diag([2.0, 2.0, 2.0, 1.0])
    world[:3, 3] = (0.4, -0.2, 0.1)
    away = np.linalg.inv(world)
    ends = np.array([BOX.min, BOX.max]) @ away[:3, :3].T + away[:3, 3]
    box = Box(tuple(ends.min(0)), tuple(ends.max(0)))
    scene = Scene(box, background=(1.0, 1.0, 1.0), world=tuple(map(tuple, world.tolist())))
    shown = dataset(frame(), near=1.0, far=5.0, box=BOX)
    got = evaluate(prepared(scene, slab(world)), shown, metrics=("psnr",))
    assert got.mean["psnr"] > 50
    assert any("scale 0.5" in note for note in got.notes)
    moved = placed(shown, scene)
    assert (moved.near, moved.far) == (0.5, 2.5)
    assert moved.box is not None
    np.testing.assert_allclose([moved.box.min, moved.box.max], [box.min, box.max], atol=1e-12)
    # Without that knowledge the two live in different worlds: here the box is behind every camera.
    lost = dataclasses.replace(scene, world=SCENE.world, box=Box((-1, -1, 4), (1, 1, 5)))
    with pytest.raises(RequestError, match=r"none of 1 cameras .*--world"):
        evaluate(prepared(lost, slab()), shown)


def test_rays_run_from_near_to_far() -> None:
    """The slab is seen from distance 3 on; a far of 2.9 or a near beyond its bottom leaves the background."""
    for near, far in ((None, 2.9), (4.5, None)):
        seen: list[Judged] = []
        scene = dataclasses.replace(SCENE, background=(0.0, 0.0, 1.0), near=near, far=far)
        got = evaluate(prepared(scene), dataset(frame()), metrics=("psnr",), keep=seen.append)
        assert (seen[0].picture == (0, 0, 255)).all()
        assert (seen[0].depth == 0).all()
        assert any("nothing of the field is seen" in note for note in got.notes)
        error = (plane() / 255.0 - (0, 0, 1)) ** 2
        assert got.mean["psnr"] == pytest.approx(-10 * math.log10(error.mean()))


def test_depth_and_opacity_are_handed_over() -> None:
    seen: list[Judged] = []
    evaluate(prepared(SCENE), dataset(frame()), metrics=("psnr",), keep=seen.append)
    assert seen[0].opacity.min() > 0.999
    j, i = np.mgrid[0:SIDE, 0:SIDE] + 0.5 - SIDE / 2
    expected = HEIGHT * np.sqrt(1 + (i**2 + j**2) / FOCAL**2)
    np.testing.assert_allclose(seen[0].depth, expected, atol=0.02)
    assert seen[0].figures["psnr"] > 50


@pytest.mark.parametrize(
    ("own", "theirs", "behind"),
    [((0.0, 0.0, 1.0), (1.0, 1.0, 1.0), (0, 0, 255)), (None, (1.0, 0.0, 0.0), (255, 0, 0)), (None, None, None)],
)
def test_alpha_is_laid_over_the_background_of_the_field(own: Any, theirs: Any, behind: Any) -> None:
    """The left half of the picture is clear, the right half has alpha 51 / 255 = 0.2 of black."""
    pixels = np.zeros((SIDE, SIDE, 4), np.uint8)
    pixels[:, SIDE // 2 :, 3] = 51
    nothing = FunctionField(lambda x: 0 * x[:, 0], lambda x, d: 0 * x)
    seen: list[Judged] = []
    scene = dataclasses.replace(SCENE, background=own)
    shown = dataset(frame(pixels=pixels if behind else plane()), background=theirs)
    got = evaluate(prepared(scene, nothing), shown, metrics=("psnr",), keep=seen.append)
    assert any("names no background" in note for note in got.notes) == (own is None)
    if behind is None:
        assert (seen[0].picture == 255).all()
        return
    back = np.array(behind)
    assert (seen[0].picture == back).all()
    assert (seen[0].truth[:, : SIDE // 2] == back).all()
    assert (seen[0].truth[:, SIDE // 2 :] == np.round(0.8 * back)).all()
    # Half of the pixels differ by 0.2 in one of three channels.
    assert got.mean["psnr"] == pytest.approx(-10 * math.log10(0.2**2 / 6), abs=1e-6)


def test_linear_colours_are_blended_before_they_are_displayed() -> None:
    """Half of linear black over linear 1 is 0.5, which is displayed as byte 188."""
    pixels = np.zeros((SIDE, SIDE, 4), np.uint8)
    pixels[..., 3] = 127
    scene = dataclasses.replace(SCENE, color_space="linear")
    assert set(truth_of(frame(pixels=pixels), scene)[1].reshape(-1).tolist()) == {188}
    assert set(truth_of(frame(pixels=pixels), SCENE)[1].reshape(-1).tolist()) == {128}


def test_smaller_pictures_are_averages() -> None:
    """Averages of 2 x 2 pixels of a linear picture are what the camera sees at half the size."""
    small, truth, mask = truth_of(frame(), SCENE, size=SIDE // 2)
    blocks = plane().reshape(SIDE // 2, 2, SIDE // 2, 2, 3).astype(np.float64).mean((1, 3))
    assert np.abs(truth - blocks).max() <= 0.5
    assert mask is None
    assert (small.width, small.height, small.fx) == (SIDE // 2, SIDE // 2, FOCAL / 2)
    got = evaluate(prepared(SCENE), dataset(frame()), metrics=("psnr",), size=SIDE // 2)
    assert got.mean["psnr"] > 48
    assert (got.size, got.views[0]["width"]) == (SIDE // 2, SIDE // 2)
    # Nothing is enlarged.
    assert truth_of(frame(), SCENE, size=4 * SIDE)[0].width == SIDE
    # A pixel counts where all that it averages does.
    half = np.zeros((SIDE, SIDE), bool)
    half[:, :7] = True
    mask = truth_of(frame(mask=lambda: half), SCENE, size=SIDE // 2)[2]
    assert mask is not None
    assert mask.sum(1).tolist() == [3] * (SIDE // 2)


def test_masks_hide_what_does_not_count() -> None:
    """Beyond the mask the picture is wrong by 100 bytes; within it by 10."""
    pixels, mask = plane(shift=10), np.ones((SIDE, SIDE), bool)
    mask[:, :8] = False
    pixels[:, :8] += 90
    got = evaluate(prepared(SCENE), dataset(frame(pixels=pixels, mask=lambda: mask)))
    assert got.mean["psnr"] == pytest.approx(20 * math.log10(25.5), abs=0.05)
    assert got.views[0]["pixels"] == SIDE * 8
    bare = evaluate(prepared(SCENE), dataset(frame(pixels=pixels)))
    assert bare.mean["psnr"] < got.mean["psnr"] - 10
    assert bare.mean["flip"] > got.mean["flip"]
    hidden = frame("dark", mask=lambda: np.zeros((SIDE, SIDE), bool))
    some = evaluate(prepared(SCENE), dataset(hidden, frame()), metrics=("psnr",))
    assert [v["name"] for v in some.views] == ["r_0"]
    assert any("dark: its mask leaves nothing" in note for note in some.notes)
    with pytest.raises(RequestError, match="leave nothing to judge"):
        evaluate(prepared(SCENE), dataset(hidden))


def test_equal_pictures_count_as_a_hundred_decibels() -> None:
    grey = FunctionField(lambda x: 1e5 + 0 * x[:, 0], lambda x, d: 0 * x + 0.2)
    pixels = np.full((SIDE, SIDE, 3), 51, np.uint8)
    got = evaluate(prepared(SCENE, grey), dataset(frame(pixels=pixels)))
    assert got.mean == {"psnr": CAP, "ssim": pytest.approx(1.0), "flip": 0.0}


def test_forward_facing_scenes_are_judged_in_their_ray_space() -> None:
    """In NDC x' is (i - cx) / (W / 2) and y' its like upwards: a wall at z' = 0 shows its colours linear in pixels."""
    space = RaySpace("ndc", SIDE, SIDE, FOCAL, 1.0)
    wall = FunctionField(
        lambda x: torch.where(x[:, 2] > 0, 1e5, 0.0),
        lambda x, d: torch.stack([0.5 + SLOPE * x[:, 0], 0.5 + SLOPE * x[:, 1], 0.5 + 0 * x[:, 0]], -1),
    )
    scene = Scene(Box.cube(1.2), background=(0.0, 0.0, 0.0), near=0.0, far=1.0, ray_space=space)
    j, i = np.mgrid[0:SIDE, 0:SIDE] + 0.5
    u, v = (i - SIDE / 2) / (SIDE / 2), -(j - SIDE / 2) / (SIDE / 2)
    pixels = np.round(255 * np.stack([0.5 + SLOPE * u, 0.5 + SLOPE * v, 0.5 + 0 * u], -1)).astype(np.uint8)
    pose = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0))
    view = Frame("f", dataclasses.replace(camera(), c2w=pose), lambda: pixels)
    shown = dataset(view, ray_space=space, near=0.0, far=1.0)
    got = evaluate(prepared(scene, wall), shown, metrics=("psnr",))
    assert got.mean["psnr"] > 50
    with pytest.raises(RequestError, match="lives in NDC, the hand-made pictures do not"):
        evaluate(prepared(scene, wall), dataset(view))
    other = dataclasses.replace(shown, ray_space=dataclasses.replace(space, focal=FOCAL * 1.5))
    assert any("focal lengths to a side" in note for note in placed(other, scene).notes)


def test_one_view_is_held_at_a_time() -> None:
    """Forty views: when the next is read, every array of those before is gone."""
    alive: list[int] = [0, 0]

    def watch(array: NDArray[Any]) -> None:
        alive[0] += 1
        weakref.finalize(array, gone)

    def gone() -> None:
        alive[0] -= 1

    def read() -> NDArray[np.uint8]:
        alive[1] = max(alive[1], alive[0])
        pixels = plane()
        watch(pixels)
        return pixels

    def keep(judged: Judged) -> None:
        for array in (judged.truth, judged.picture, judged.opacity, judged.depth):
            watch(array)

    frames = [Frame(f"r_{k}", camera(), read) for k in range(40)]
    got = evaluate(prepared(SCENE), dataset(*frames), metrics=("psnr",), keep=keep)
    assert len(got.views) == 40
    assert alive == [0, 0]


def test_views_are_chosen_evenly_or_by_name() -> None:
    frames = tuple(frame(f"./test/r_{k}") for k in range(10))
    assert [f.name[-1] for f in choose(frames, 4, "")] == ["0", "2", "5", "7"]
    assert len(choose(frames, 99, "")) == 10
    assert choose(frames, None, "") == frames
    assert [f.name for f in choose(frames, ("r_3", "./test/r_1"), "")] == ["./test/r_3", "./test/r_1"]


def test_the_first_teacher_decides_where_pixels_are() -> None:
    registry = default()
    assert pixel_offset("bmild", {"program": "bmild/nerf"}, registry) == (0.0, "bmild")
    assert pixel_offset("svox2", {}, registry)[0] == 0.5
    assert pixel_offset("pvdconvert", {"how": "trained from images"}, registry) == (0.5, "")
    student = {"teacher": {"format": "bmild"}, "earlier": {"program": "bmild/nerf"}}
    grandchild = {"teacher": {"format": "pvdconvert"}, "earlier": student}
    for provenance in (student, grandchild, {**student, "laid_out": {"format": "bmild"}}):
        assert pixel_offset("pvdconvert", provenance, registry) == (0.0, "bmild")
    assert pixel_offset("torch-ngp", {"teacher": "x", "earlier": 3}, registry)[0] == 0.5
    endless: dict[str, Any] = {"teacher": {"format": "bmild"}}
    endless["earlier"] = endless
    assert pixel_offset("pvdconvert", endless, registry) == (0.0, "bmild")


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda p, d: evaluate(p, d, "val"), UsageError, "no frames in split 'val'"),
        (lambda p, d: evaluate(p, d, views=["r_7"]), UsageError, "no view 'r_7'.*r_0"),
        (lambda p, d: evaluate(p, d, views=0), UsageError, "at least one"),
        (lambda p, d: evaluate(p, d, metrics=["vmaf"]), UsageError, "'vmaf': unknown.*known: psnr"),
        (lambda p, d: evaluate(p, d, metrics=[]), UsageError, "no metric"),
        (lambda p, d: evaluate(p, d, metrics=["lpips"]), UsageError, "--lpips-weights"),
        (lambda p, d: evaluate(p, d, size=8), RequestError, "SSIM needs 11 pixels a side, here are 8 x 8.*psnr,flip"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(call: Callable[..., Any], kind: type[PvdError], text: str) -> None:
    with pytest.raises(kind, match=text) as caught:
        call(prepared(SCENE), dataset(frame()))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (frame(pixels=np.zeros((SIDE, SIDE + 1, 3), np.uint8)), "r_0: 17 x 16 pixels, its camera has 16 x 16"),
        (frame(pixels=np.zeros((SIDE, SIDE), np.uint8)), "expected bytes"),
        (frame(mask=lambda: np.ones((3, 4), bool)), "its mask has 4 x 3"),
    ],
)
def test_pictures_must_be_as_their_camera_says(bad: Frame, text: str) -> None:
    with pytest.raises(InputError, match=text):
        evaluate(prepared(SCENE), dataset(bad))


@pytest.mark.parametrize("diagonal", [(1.0, 2.0, 1.0), (-1.0, 1.0, 1.0), (0.0, 1.0, 1.0)])
def test_worlds_that_no_camera_can_follow(diagonal: tuple[float, float, float]) -> None:
    world = tuple(map(tuple, np.diag([*diagonal, 1.0]).tolist()))
    with pytest.raises(RequestError, match="world"):
        placed(dataset(frame()), dataclasses.replace(SCENE, world=world))
