"""The bank of rays: pixels and rays by hand, bounds on memory, the same rays for the same seed, bad pictures."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pvdconvert.cameras import Camera
from pvdconvert.data import Frame, Pixels
from pvdconvert.distill.framing import border_color, box_of_cameras, footprint
from pvdconvert.distill.raybank import CHUNK, RayBank, teacher_dataset
from pvdconvert.errors import InputError, RequestError
from pvdconvert.prepare import Prepared
from pvdconvert.scene import Box, RaySpace
from pvdconvert.testing.analytic import AnalyticScene
from tests import posed

# Looks from (0, 0, 5) along -z: pixel (i, j) of 4 x 2 passes ((i + 0.5 - 2) / 2, -(j + 0.5 - 1) / 2, -1).
POSE = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 5.0))
CAMERA = Camera(4, 2, 2.0, 2.0, 2.0, 1.0, POSE)


def numbered(width: int = 4, height: int = 2, channels: int = 3, name: str = "a", first: int = 0) -> Frame:
    """Red counts pixels, green is the picture's."""
    camera = dataclasses.replace(CAMERA, width=width, height=height)

    def read() -> Pixels:
        out = np.zeros((height, width, channels), np.uint8)
        out[..., 0] = np.arange(height * width).reshape(height, width) % 251
        out[..., 1] = first
        out[..., 3:] = 128
        return out

    return Frame(name, camera, read)


def test_pixels_and_rays_belong_together() -> None:
    bank = RayBank([numbered()], held=[numbered(name="b")])
    rays = bank.chunk(0)
    assert len(rays) == CHUNK
    assert rays.alpha is None
    index = (rays.rgb[:, 0] * 255).round().long()
    assert sorted(set(index.tolist())) == list(range(8))
    i, j = index % 4, index // 4
    d = torch.stack([(i + 0.5 - 2) / 2, -(j + 0.5 - 1) / 2, -torch.ones(len(i))], -1)
    assert torch.allclose(rays.d, d / d.norm(dim=-1, keepdim=True), atol=1e-6)
    assert torch.equal(rays.o, torch.tensor([0.0, 0.0, 5.0]).expand(len(rays), 3))


def test_all_pixels_are_drawn_alike() -> None:
    frames = [numbered(20, 10, name="a"), numbered(40, 10, name="b", first=1)]
    rays = RayBank(frames, held=[numbered()]).chunk(3)
    second = rays.rgb[:, 1] > 0
    # 32768 draws of probability 2/3: a standard deviation of 85; six of them.
    assert abs(int(second.sum()) - CHUNK * 2 // 3) < 512


def test_alpha_is_straight_and_composited() -> None:
    rays = RayBank([numbered(channels=4)], held=[numbered(channels=4)]).chunk(0)
    assert rays.alpha is not None
    assert torch.allclose(rays.alpha, torch.tensor(128 / 255))
    over = rays.over(torch.tensor([1.0, 0.0, 0.0]))
    assert torch.allclose(over[:, 0], rays.rgb[:, 0] * 128 / 255 + 127 / 255, atol=1e-6)


def test_opaque_pictures_with_alpha_say_nothing_about_what_is_behind() -> None:
    def read() -> Pixels:
        return np.full((2, 4, 4), 255, np.uint8)

    assert RayBank([Frame("a", CAMERA, read)], held=[Frame("a", CAMERA, read)]).chunk(0).alpha is None


def test_masked_pixels_are_never_drawn() -> None:
    mask = np.zeros((2, 4), bool)
    mask[1, 2] = True
    frame = dataclasses.replace(numbered(), mask=lambda: mask)
    rays = RayBank([frame], held=[numbered()]).chunk(0)
    assert set((rays.rgb[:, 0] * 255).round().tolist()) == {6.0}


def test_pixels_set_aside_are_never_drawn() -> None:
    bank = RayBank([numbered(15, 10)])
    held = set((bank.held.rgb[:, 0] * 255).round().tolist())
    drawn = set((bank.chunk(0).rgb[:, 0] * 255).round().tolist())
    assert len(held) == 15
    assert len(drawn) == 135
    assert not held & drawn


def test_the_same_seed_draws_the_same_rays() -> None:
    frames = [numbered(30, 20)]
    a, b = RayBank(frames, seed=3), RayBank(frames, seed=3)
    a.chunk(0)
    taken = a.take(CHUNK - 10, 30)
    assert torch.equal(taken.rgb[10:], b.chunk(1).rgb[:20])
    assert torch.equal(taken.d[:10], b.chunk(0).d[-10:])
    assert not torch.equal(a.chunk(1).rgb, RayBank(frames, seed=4).chunk(1).rgb)


def test_memory_is_bounded_and_shares_are_replaced() -> None:
    frames = [numbered(300, 200, name=f"{k}", first=k) for k in range(4)]
    bank = RayBank(frames, held=[numbered()], most=8 * 4000)
    assert bank.bytes == 8 * 4000
    assert len(bank) == 4000
    assert not bank.whole
    first = bank.place.copy()
    rays = [bank.chunk(k) for k in range(3)]
    # One picture of 1000 pixels is replaced for each 1000 rays: 65 of them by the third chunk.
    assert bank.refreshed == 65
    assert bank.bytes == 8 * 4000
    assert (first == bank.place).mean() < 0.2
    # Of 60000 pixels a picture, 17 thousand shares of 1000 each are seen: many more than one share.
    green = (rays[-1].rgb[:, 1] * 255).round()
    assert [int((green == k).sum()) > CHUNK // 5 for k in range(4)] == [True] * 4
    again = RayBank(frames, held=[numbered()], most=8 * 4000)
    assert torch.equal(again.chunk(2).rgb, rays[2].rgb)


class Bent(Camera):
    """Not a pinhole: every ray leans to the right."""

    def rays_at(
        self, i: NDArray[np.float64], j: NDArray[np.float64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        o, d = super().rays_at(i, j)
        d = d + np.array([0.5, 0.0, 0.0], np.float32)
        return o, np.asarray(d / np.linalg.norm(d, axis=-1, keepdims=True), np.float32)


def test_cameras_that_bend_rays_are_asked() -> None:
    values = {f.name: getattr(CAMERA, f.name) for f in dataclasses.fields(Camera)}
    bent = dataclasses.replace(numbered(name="bent", first=9), camera=Bent(**values))
    rays = RayBank([bent, numbered()], held=[numbered()]).chunk(0)
    mine = (rays.rgb[:, 1] * 255).round() == 9
    ratio = rays.d[:, 0] / -rays.d[:, 2]
    index = (rays.rgb[:, 0] * 255).round()
    plain = (index % 4 + 0.5 - 2) / 2
    unit = (1 + plain**2 + 0.25**2).sqrt()  # |j + 0.5 - 1| / 2 = 0.25 for both rows
    assert torch.allclose(ratio[~mine], plain[~mine], atol=1e-5)
    assert torch.allclose(ratio[mine], (plain + 0.5 * unit)[mine], atol=1e-5)


def bad(pixels: object, name: str = "odd") -> Frame:
    return Frame(name, CAMERA, lambda: pixels)  # type: ignore[return-value, arg-type]


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (bad(np.full((2, 4, 3), np.nan, np.float32)), "'odd' holds values that are not numbers"),
        (bad(np.zeros((2, 4, 3), np.float32)), "'odd' holds float32, bytes were expected"),
        (bad(np.zeros((3, 4, 3), np.uint8)), "'odd' is 3x4x3 (rows, columns, channels), its camera says 2x4"),
        (bad(np.zeros((2, 4), np.uint8)), "'odd' is 2x4"),
        (dataclasses.replace(numbered(), mask=lambda: np.zeros((2, 4), bool)), "no pixel of any picture counts"),
        (dataclasses.replace(numbered(), mask=lambda: np.ones((4, 2), bool)), "the mask of picture 'a' is (4, 2)"),
    ],
)
def test_bad_pictures_are_named(frame: Frame, words: str) -> None:
    with pytest.raises(InputError) as error:
        RayBank([frame])
    assert words in str(error.value)


def test_mixed_and_missing_pictures_are_refused() -> None:
    with pytest.raises(InputError, match="'b' has opacity and picture 'a' has none"):
        RayBank([numbered(), numbered(channels=4, name="b")])
    with pytest.raises(InputError, match="no pictures"):
        RayBank([])


def test_a_teacher_shows_what_the_scene_looks_like() -> None:
    scene = AnalyticScene()
    occupancy = scene.occupancy(48)
    prepared = Prepared(scene, scene.scene, occupancy, occupancy.box, 0.01, "", torch.device("cpu"))
    camera = posed.frames(1, 24, 5)[0].camera
    frame = teacher_dataset(prepared, [camera]).split("train")[0]
    ours, theirs = frame.read().astype(float), posed.picture(camera).astype(float)
    seen = theirs[..., 3] > 64
    assert np.abs(ours[..., 3] - theirs[..., 3]).mean() < 1.0
    assert np.abs(ours - theirs)[seen].mean() < 1.5
    bank = RayBank.from_teacher(prepared, [camera])
    assert bank.alpha
    assert len(bank) + len(bank.held) == 24 * 24

    class Broken(AnalyticScene):
        def color(self, latent: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
            return super().color(latent, d) * torch.nan

    with pytest.raises(RequestError, match="not numbers"):
        RayBank.from_teacher(dataclasses.replace(prepared, field=Broken()), [camera])


def test_the_box_is_what_cameras_look_at() -> None:
    cameras = [f.camera for f in posed.frames(16, 32, 3)]
    box = box_of_cameras(cameras)
    # They fill about two thirds of their pictures with the cube of side 2 around the origin.
    assert all(-3.0 < a < -1.0 and 1.0 < b < 3.0 for a, b in zip(box.min, box.max)), box
    away = [dataclasses.replace(c, c2w=tuple((*r[:2], -r[2], r[3]) for r in c.c2w)) for c in cameras]
    with pytest.raises(RequestError, match="--bounds"):
        box_of_cameras(away)


def test_parallel_cameras_need_a_far_plane() -> None:
    cameras = [dataclasses.replace(CAMERA, c2w=((1, 0, 0, x), *POSE[1:])) for x in (0.0, 0.1, 0.2)]
    with pytest.raises(RequestError, match="do not meet"):
        box_of_cameras(cameras)
    box = box_of_cameras(cameras, 2.0, 6.0)
    assert box.min[2] < 1.5
    assert box.max[2] > 2.0


def test_a_warped_box_holds_all_corners() -> None:
    pose = ((1.0, 0.0, 0.0, 0.3), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0))
    camera = Camera(8, 4, 4.0, 4.0, 4.0, 2.0, pose, offset=0.0)
    box = box_of_cameras([camera], ray_space=RaySpace("ndc", 8, 4, 4.0, 1.0))
    # On the near plane z = -1 the left corner ray (i = 0: slope -1) starts at x = 0.3 - 1 = -0.7, warped 2 f / w * x =
    # -0.7; the right one (i = 7: slope 0.75) at 1.05. At infinity: -1 and 0.75.
    assert box.max[0] == pytest.approx(1.05 * 1.01, rel=1e-3)
    assert box.min[0] == -box.max[0]
    assert (box.min[2], box.max[2]) == (-1.0, 1.0)
    turned = ((-1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, -1.0, 0.0))
    with pytest.raises(RequestError, match="backwards"):
        box_of_cameras([dataclasses.replace(camera, c2w=turned)], ray_space=RaySpace("ndc", 8, 4, 4.0, 1.0))


def test_footprint_and_borders() -> None:
    assert footprint([CAMERA], Box.cube(1.0), RaySpace()) == pytest.approx(2.5)  # 5 away, focal length 2
    assert footprint([CAMERA], Box.cube(1.0), RaySpace("ndc", 4, 2, 2.0, 1.0)) == 0.5

    def read() -> Pixels:
        out = np.full((20, 20, 3), (0, 128, 255), np.uint8)
        out[4:16, 4:16] = np.random.default_rng(0).integers(0, 255, (12, 12, 3))
        return out

    camera = dataclasses.replace(CAMERA, width=20, height=20)
    assert border_color([Frame("a", camera, read)]) == (0.0, round(128 / 255, 4), 1.0)
    noise = np.random.default_rng(0).integers(0, 255, (20, 20, 3)).astype(np.uint8)
    assert border_color([Frame("a", camera, lambda: noise)]) == (0.0, 0.0, 0.0)
