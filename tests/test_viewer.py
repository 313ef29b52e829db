"""The viewer: cameras by known answers, layouts, pictures of rising resolution, who may connect, two fields at once."""

from __future__ import annotations

import io
import json
import math
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image as Pillow

from pvdconvert import viewer
from pvdconvert.cameras import Camera, load_transforms, look_at
from pvdconvert.errors import PluginError, RequestError, UsageError
from pvdconvert.field import FunctionField
from pvdconvert.metrics import held_out_cameras
from pvdconvert.prepare import Prepared
from pvdconvert.render.images import Image, render_camera, to_uint8
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.render.trace import default_step
from pvdconvert.scene import Box, RaySpace, Scene
from pvdconvert.viewer import address, poses
from pvdconvert.viewer.frames import Pace, Refinement, frames, sizes
from pvdconvert.viewer.layout import Layout, depth_span, paint
from pvdconvert.viewer.server import Shown, Viewer
from tests.browser import visit

if TYPE_CHECKING:
    from playwright.sync_api import Browser

H = math.sqrt(0.5)
IDENTITY = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0))


def ball(color: tuple[float, float, float], radius: float = 0.5) -> Prepared:
    """A nearly opaque ball at the origin, of one colour, in the cube of half side 1."""
    field = FunctionField(
        lambda x: 400.0 * (x.norm(dim=-1) < radius), lambda x, d: torch.tensor(color).expand(x.shape[0], 3)
    )
    box = Box.cube(1.0)
    occupancy = Occupancy(torch.full((3,), -1.0), 0.125, torch.ones(16, 16, 16, dtype=torch.uint8))
    return Prepared(field, Scene(box), occupancy, Box.cube(radius), default_step(occupancy), "", torch.device("cpu"))


@pytest.fixture(scope="module")
def balls() -> tuple[Prepared, Prepared]:
    return ball((1.0, 0.0, 0.0)), ball((0.0, 0.0, 1.0))


def front(width: int, height: int, focal: float | None = None) -> Camera:
    """A camera at (0, 0, 3) that looks along -z."""
    f = focal or 1.2 * height
    return Camera(width, height, f, f, width / 2, height / 2, (*IDENTITY[:2], (0.0, 0.0, 1.0, 3.0)))


# ---------------------------------------------------------------------------------------------- cameras

# viser's rotation takes OpenCV's camera axes (right, down, forward) to the world; by hand: where they point, as right,
# up (minus down) and back (minus forward).
KNOWN = [
    ((1.0, 0.0, 0.0, 0.0), (1, 0, 0), (0, -1, 0), (0, 0, -1)),  # no rotation: down is +y, forward +z
    ((0.0, 1.0, 0.0, 0.0), (1, 0, 0), (0, 1, 0), (0, 0, 1)),  # half a turn about x: OpenGL's own frame
    ((H, H, 0.0, 0.0), (1, 0, 0), (0, 0, -1), (0, 1, 0)),  # 90 degrees about x: y -> z, z -> -y
    ((H, -H, 0.0, 0.0), (1, 0, 0), (0, 0, 1), (0, -1, 0)),  # -90 about x: level, looks along +y, up is +z
    ((H, 0.0, H, 0.0), (0, 0, -1), (0, -1, 0), (-1, 0, 0)),  # 90 about y: z -> x, x -> -z
    ((H, 0.0, 0.0, H), (0, 1, 0), (1, 0, 0), (0, 0, -1)),  # 90 about z: x -> y, y -> -x
    ((0.5, 0.5, 0.5, 0.5), (0, 1, 0), (0, 0, -1), (-1, 0, 0)),  # 120 about (1, 1, 1): x -> y -> z -> x
]


@pytest.mark.parametrize(("wxyz", "right", "up", "back"), KNOWN)
def test_a_camera_of_viser_in_our_axes(
    wxyz: tuple[float, ...], right: tuple[int, ...], up: tuple[int, ...], back: tuple[int, ...]
) -> None:
    camera = poses.camera_of(wxyz, (4.0, 5.0, 6.0), math.pi / 2, 80, 60)
    m = np.asarray(camera.c2w)
    assert np.allclose(m, np.stack([right, up, back, (4, 5, 6)], axis=1), atol=1e-12)
    # tan(45 degrees) = 1: half of the height is the focal length.
    assert (camera.fx, camera.fy, camera.cx, camera.cy) == pytest.approx((30.0, 30.0, 40.0, 30.0))
    back_again = poses.wxyz_of(camera)
    assert np.allclose(back_again, wxyz, atol=1e-12) or np.allclose(back_again, -np.asarray(wxyz), atol=1e-12)


def test_the_ray_of_a_corner_is_where_viser_has_it() -> None:
    # Identity in OpenCV: pixel (0, 0) of 4 x 2 at 90 degrees (focal 1) lies 1.5 left and 0.5 above: (-1.5, -0.5, 1).
    _, d = poses.camera_of((1, 0, 0, 0), (0, 0, 0), math.pi / 2, 4, 2).rays()
    assert np.allclose(d[0], np.array([-1.5, -0.5, 1.0]) / math.sqrt(1.5**2 + 0.5**2 + 1), atol=1e-7)


def test_quaternions_of_random_rotations_come_back() -> None:
    rng = np.random.default_rng(0)
    for q in rng.normal(size=(200, 4)):
        q /= np.linalg.norm(q) * math.copysign(1.0, q[0])
        assert np.allclose(poses.quaternion(poses.rotation(q)), q, atol=1e-9)
        assert np.allclose(poses.rotation(3.0 * q), poses.rotation(q))
    for axis in np.eye(3):  # half turns, where w is 0
        q = np.array([0.0, *axis])
        assert np.allclose(np.abs(poses.quaternion(poses.rotation(q))), q, atol=1e-12)


def test_a_pose_looks_where_its_camera_does() -> None:
    box, scene = Box((0, 0, 0), (2, 2, 2)), Scene(Box.cube(3.0))
    c2w = look_at((1.0, -5.0, 1.0), (1.0, 1.0, 1.0))
    pose = poses.pose_of(Camera(100, 50, 25.0, 25.0, 50.0, 25.0, poses.rows(c2w)), scene, box)
    assert np.allclose(pose.target, (1, 1, 1))
    assert np.allclose(pose.up, (0, 0, 1))
    assert pose.fov == pytest.approx(math.pi / 2)
    rolled = c2w[:, [1, 0, 2, 3]] * (1, -1, 1, 1)  # turned by a right angle about its axis
    up = poses.pose_of(Camera(9, 9, 9.0, 9.0, 4.5, 4.5, poses.rows(rolled)), scene, box).up
    assert np.allclose(up, rolled[:, 1])


def test_up_is_z_unless_the_cameras_of_the_file_agree_on_another() -> None:
    box = Box.cube(1.0)

    def around(up: tuple[float, float, float], ring: list[tuple[float, float, float]]) -> Scene:
        cameras = [Camera(8, 8, 9.0, 9.0, 4.0, 4.0, poses.rows(look_at(p, (0, 0, 0), up=up))) for p in ring]
        return Scene(box, cameras=tuple(cameras))

    flat = [(3.0, 1.0, 0.0), (0.0, 1.0, 3.0), (-3.0, 1.0, 0.0), (0.0, 1.0, -3.0)]
    assert np.allclose(poses.up_axis(Scene(box)), (0, 0, 1))
    assert np.allclose(poses.up_axis(around((0, 1, 0), flat)), (0, 1, 0), atol=1e-9)
    tilted = [(3.0, 0.0, 1.0), (0.0, 3.0, 1.2), (-3.0, 0.0, 0.8), (0.0, -3.0, 1.0)]
    assert np.allclose(poses.up_axis(around((0, 0, 1), tilted)), (0, 0, 1))
    assert np.allclose(poses.up_axis(Scene(box, ray_space=RaySpace("ndc", 8, 8, 9, 1))), (0, 1, 0))
    camera = poses.first_view(around((0, 1, 0), flat), box, 100)
    assert camera.c2w[1][0] == pytest.approx(0.0, abs=1e-9)  # level: right is perpendicular to +y
    assert camera.position[1] == pytest.approx(np.linalg.norm(camera.position) * 0.5)  # 30 degrees above the horizon


def test_views_of_an_ndc_scene_stay_before_it() -> None:
    space = RaySpace("ndc", 100, 50, 50.0, 2.0)
    home = poses.first_view(Scene(Box.cube(1.0), ray_space=space), Box.cube(1.0), 50)
    assert home.c2w == IDENTITY
    assert home.fy == pytest.approx(50.0)  # 2 atan(25 / 50) at 50 pixels
    assert poses.confined(home, space) == (home, False)

    away = Camera(50, 50, 50.0, 50.0, 25.0, 25.0, poses.rows(look_at((9.0, -1.0, -7.0), (-9.0, -1.0, -7.0))))
    held, moved = poses.confined(away, space)
    assert moved
    # Within 0.35 near distances; turned from -z towards -x by 12 degrees and no further.
    assert np.allclose(held.position, (0.7, -0.7, -0.7))
    assert np.allclose(-np.asarray(held.c2w)[:, 2], (-0.2079117, 0.0, -0.9781476))
    assert (held.rays()[1][:, 2] < 0).all()
    wide = Camera(50, 50, 10.0, 10.0, 25.0, 25.0, away.c2w)  # corners at atan(3.54) = 74.2 degrees: swing 10.8 at most
    assert (poses.confined(wide, space)[0].rays()[1][:, 2] < 0).all()
    behind = Camera(50, 50, 50.0, 50.0, 25.0, 25.0, poses.rows(np.diag([-1.0, 1.0, -1.0, 0.0])[:3]))
    assert poses.confined(behind, space)[0].c2w[2][2] == pytest.approx(0.9781476)
    assert poses.confined(away, RaySpace()) == (away, False)


def test_a_saved_camera_is_what_render_reads(tmp_path: Path) -> None:
    camera = poses.camera_of((0.5, 0.5, -0.5, 0.5), (1.0, 2.0, 3.0), 0.7, 64, 48)
    path = tmp_path / "transforms.json"
    path.write_text(json.dumps(poses.transforms(camera)), encoding="utf-8")
    assert load_transforms(path) == (camera,)


# ---------------------------------------------------------------------------------------------- layouts


def test_a_split_has_the_rays_of_the_whole() -> None:
    camera = front(40, 10)
    (a, left), (b, right) = Layout("split", 0.3).panels(camera)
    assert (a, left.width, b, right.width) == (0, 12, 1, 28)
    whole = camera.rays()[1].reshape(10, 40, 3)
    assert np.array_equal(left.rays()[1].reshape(10, 12, 3), whole[:, :12])
    assert np.array_equal(right.rays()[1].reshape(10, 28, 3), whole[:, 12:])
    assert [(k, v.width) for k, v in Layout("split", 0.0).panels(camera)] == [(1, 40)]
    assert [(k, v.width) for k, v in Layout("split", 1.0).panels(camera)] == [(0, 40)]


def test_side_by_side_both_show_the_middle() -> None:
    for width in (40, 41):
        (_, left), (_, right) = Layout("side by side").panels(front(width, 30, focal=36.0))
        assert (left.width, right.width) == (20, width - 20)
        for view in (left, right):  # 20 columns for what is 30 high: at two thirds of the size
            assert (view.fx, view.cx, view.cy) == pytest.approx((24.0, view.width / 2, 15.0))
    wide = Layout("side by side").panels(front(80, 30, focal=36.0))[0][1]
    assert (wide.width, wide.fx) == (40, 36.0)


def test_compose_draws_a_seam_in_large_pictures_only() -> None:
    red, blue = np.zeros((2, 3, 3), np.uint8), np.zeros((2, 5, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    small = Layout("split").compose([red, blue])
    assert small.shape == (2, 8, 3)
    assert (small[:, :3] == red).all()
    assert (small[:, 3:] == blue).all()
    large = Layout("split").compose([np.repeat(red, 40, axis=1), np.repeat(blue, 40, axis=1)])
    assert (large[:, 119] == 128).all()
    assert (large[0, 118] == (255, 0, 0)).all()
    gray = np.full((2, 3, 3), 100, np.uint8)
    assert (Layout("difference").compose([gray, gray + np.uint8(3)]) == 24).all()
    assert (Layout("difference").compose([red, red]) == 0).all()


def test_channels_by_known_answers() -> None:
    # Four pixels: nothing, at the nearest distance, at the farthest, half transparent half way (depth = weight x t).
    opacity = np.array([[0.0, 1.0, 1.0, 0.5]], np.float32)
    depth = np.array([[0.0, 2.0, 4.0, 1.5]], np.float32)
    image = Image(np.full((1, 4, 3), 0.25, np.float32), opacity, depth)
    scene = Scene(Box.cube(1.0))
    assert (paint(image, "color", scene, (2, 4)) == 64).all()  # 63.75 rounds up
    assert paint(image, "opacity", scene, (2, 4))[0, :, 1].tolist() == [0, 255, 255, 128]
    seen = paint(image, "depth", scene, (2.0, 4.0))[0].tolist()
    # viridis: nearest (253, 231, 37), farthest (68, 1, 84), half way (33, 145, 140), here half over white.
    assert seen == [[255, 255, 255], [253, 231, 37], [68, 1, 84], [144, 200, 198]]
    linear = Scene(Box.cube(1.0), color_space="linear")
    assert (paint(image, "color", linear, (2, 4)) == 137).all()  # 1.055 * 0.25 ** (1 / 2.4) - 0.055 = 0.5371


def test_depths_span_the_box() -> None:
    low, high = depth_span(front(8, 8), Scene(Box.cube(1.0)), Box.cube(1.0))
    assert (low, high) == pytest.approx((3 - math.sqrt(3), 3 + math.sqrt(3)))
    assert depth_span(front(8, 8), Scene(Box.cube(9.0)), Box.cube(9.0))[0] == 0.0


# ---------------------------------------------------------------------------------------------- rising resolution


def test_sizes_double() -> None:
    assert sizes(100, 75, 2) == ((25, 19), (50, 38), (100, 75))
    assert sizes(7, 5, 0) == ((7, 5),)
    assert sizes(64, 1, 2) == ((16, 1), (32, 1), (64, 1))


def test_pictures_rise_to_exactly_what_render_draws(balls: tuple[Prepared, Prepared]) -> None:
    camera = front(64, 48)
    # 2 ms a ray: the first picture may have 0.1 s / 2 ms = 50 rays; 16 x 12 are too many, but no picture is smaller.
    seen = list(frames(balls, camera, Layout(), Pace([2e-3] * 2, [0.0] * 2)))
    assert [(f.camera.width, f.camera.height, f.final) for f in seen] == [
        (16, 12, False),
        (32, 24, False),
        (64, 48, True),
    ]
    assert all(f.samples > 0 and f.seconds > 0 for f in seen)
    assert seen[0].samples < seen[1].samples < seen[2].samples
    one = balls[0]
    whole = render_camera(one.field, one.scene, camera, one.occupancy, one.step)
    assert np.array_equal(seen[-1].images[0].rgb, whole.rgb)
    assert np.array_equal(seen[-1].images[0].depth, whole.depth)
    assert np.array_equal(seen[-1].picture(balls), to_uint8(whole.rgb))
    # The ball: red in the middle, the white background in the corner, at every resolution.
    for frame in seen:
        picture = frame.picture(balls)
        assert picture[frame.camera.height // 2, frame.camera.width // 2].tolist() == [255, 0, 0]
        assert picture[0, 0].tolist() == [255, 255, 255]
    distance = seen[-1].images[0].depth[24, 32] / seen[-1].images[0].opacity[24, 32]
    assert distance == pytest.approx(2.5, abs=2 * one.step)


def test_the_first_picture_is_as_sharp_as_time_allows(balls: tuple[Prepared, Prepared]) -> None:
    def first(seconds_per_ray: float, layout: Layout, seconds: float = 0.1, overhead: float = 0.0) -> tuple[int, int]:
        pace = Pace([seconds_per_ray] * 2, [overhead] * 2)
        frame = next(frames(balls, front(64, 64), layout, pace, first=seconds))
        return frame.camera.width, frame.camera.height

    assert first(1e-9, Layout()) == (64, 64)
    assert first(5e-5, Layout()) == (32, 32)  # 2000 rays: 64^2 = 4096 are too many, 32^2 = 1024 are not
    assert first(5e-5, Layout("split")) == (32, 32)
    assert first(6e-5, Layout("difference")) == (16, 16)  # 1666 rays, and each pixel takes two
    assert first(5e-5, Layout(), seconds=0.3) == (64, 64)
    # 80 ms before the first ray, 41 ms for 4096: late, but fewer rays would hardly be sooner; 164 ms are too late.
    assert first(1e-5, Layout(), overhead=0.08) == (64, 64)
    assert first(4e-5, Layout(), overhead=0.08) == (32, 32)


def test_pace_learns_from_what_it_sees() -> None:
    pace = Pace([1e-4], [0.0])
    pace.note(0, 100, 4e-2)  # 4e-4 a ray: half way, by ratios, is 2e-4
    assert pace.expected([(0, front(10, 10))]) == pytest.approx(2e-2)
    pace = Pace([1e-5], [0.03])  # 1000 rays: 0.04 s, three quarters of it overhead
    pace.note(0, 1000, 0.64)  # 16 times as long: by ratios, half way is 4 times, shared 3 : 1
    assert (pace.overhead[0], pace.seconds_per_ray[0]) == pytest.approx((0.03 * 4**0.75, 1e-5 * 4**0.25))


def test_a_moving_camera_cancels_all_but_the_first_picture(balls: tuple[Prepared, Prepared]) -> None:
    pace = Pace([1e-2] * 2, [0.0] * 2)
    assert [f.camera.width for f in frames(balls, front(64, 64), Layout(), pace, cancelled=lambda: True)] == [16]
    assert [
        f.camera.width for f in frames(balls, front(64, 64), Layout(), Pace([1e-2] * 2, [0.0] * 2), deadline=0.0)
    ] == [16]

    asked: list[int] = []

    def later() -> bool:  # in the middle of the second picture
        asked.append(1)
        return len(asked) > 1

    work = Refinement(balls, front(64, 64), Layout(), Pace([1e-2] * 2, [0.0] * 2))
    first = work.step(later)
    assert first is not None
    assert not asked  # the first picture does not even ask
    assert work.step(later) is None
    assert len(asked) == 2
    again = work.step()  # cancelled, not lost
    assert again is not None
    assert again.camera.width == 32
    last = work.step()
    assert last is not None
    assert last.final
    assert work.done
    with pytest.raises(ValueError, match="nothing is left"):
        work.step()


def test_two_fields_share_a_picture(balls: tuple[Prepared, Prepared]) -> None:
    def last(layout: Layout) -> NDArray[np.uint8]:
        *_, frame = frames(balls, front(64, 48), layout, Pace([1e-6] * 2, [0.0] * 2))
        return frame.picture(balls)

    red, blue = [255, 0, 0], [0, 0, 255]
    split = last(Layout("split", 0.5))
    assert (split[24, 30].tolist(), split[24, 33].tolist()) == (red, blue)
    both = last(Layout("side by side"))
    assert both.shape == (48, 64, 3)
    assert (both[24, 16].tolist(), both[24, 48].tolist(), both[24, 1].tolist()) == (red, blue, [255, 255, 255])
    assert last(Layout("second"))[24, 32].tolist() == blue
    apart = last(Layout("difference"))
    assert (apart[24, 32].tolist(), apart[0, 0].tolist()) == ([255, 0, 255], [0, 0, 0])


# ---------------------------------------------------------------------------------------------- addresses


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_addresses_are_resolved_before_anything_is_loaded(taken: int) -> None:
    assert address.resolve("localhost", 0) == address.Address("127.0.0.1", 0)
    assert address.resolve("127.0.0.1", 0).private
    with pytest.raises(RequestError, match=rf"port {taken} is in use .*--port 0"):
        address.resolve("127.0.0.1", taken)
    with pytest.raises(UsageError, match="no such host"):
        address.resolve("no such host.", 0)
    with pytest.raises(UsageError, match="not an address of this machine"):
        address.resolve("192.0.2.1", 0)  # TEST-NET-1, which belongs to nobody


def test_urls_are_for_this_machine() -> None:
    assert address.Address("127.0.0.1", 80).url == "http://127.0.0.1:80"
    assert address.Address("0.0.0.0", 80).url == "http://127.0.0.1:80"
    assert address.Address("::", 80).url == "http://[::1]:80"
    assert [address.Address(h, 1).private for h in ("127.0.0.1", "::1", "0.0.0.0", "::", "192.0.2.1")] == [
        True,
        True,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("listening", "host", "origin", "answer"),
    [
        ("127.0.0.1", "127.0.0.1:80", "http://127.0.0.1:80", True),
        ("127.0.0.1", "localhost:80", "http://localhost:80", True),
        ("127.0.0.1", "127.0.0.1:80", None, True),
        ("127.0.0.1", "127.0.0.1:80", "https://evil.example", False),
        ("127.0.0.1", "127.0.0.1:80", "http://127.0.0.1:81", False),
        ("127.0.0.1", "127.0.0.1:80", "null", False),
        ("127.0.0.1", "evil.example:80", "http://evil.example:80", False),  # a name that was made to point here
        ("127.0.0.1", None, None, False),
        ("::1", "[::1]:80", "http://[::1]:80", True),
        ("0.0.0.0", "box.example:80", "http://box.example:80", True),
        ("0.0.0.0", "box.example:80", "http://evil.example", False),
    ],
)
def test_who_may_connect(listening: str, host: str | None, origin: str | None, answer: bool) -> None:
    assert address.welcome(listening, host, origin) is answer


def test_without_viser_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    viewer.require()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PluginError, match=r"pip install 'pvdconvert\[viewer\]'") as caught:
        viewer.require()
    assert caught.value.exit_code == 5
    assert len(str(caught.value).splitlines()) == 1


def test_held_out_views_are_reached_as_poses() -> None:
    scene, box = Scene(Box.cube(1.0)), Box.cube(1.0)
    for camera in held_out_cameras(scene, box):
        pose = poses.pose_of(camera, scene, box)
        again = look_at(pose.position, pose.target, up=list(pose.up))
        assert np.allclose(again, np.asarray(camera.c2w), atol=1e-9)


def test_what_is_exposed_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    from pvdconvert.cli.view import _announce

    _announce(address.Address("0.0.0.0", 81), [Path("runs/a.pt"), Path("b.pt")], json=False, quiet=True)
    out, err = capsys.readouterr()
    assert out == "http://127.0.0.1:81\n"
    assert len(err.splitlines()) == 1
    assert "whoever reaches 0.0.0.0 port 81 can look at a.pt and b.pt" in err
    _announce(address.Address("127.0.0.1", 81), [Path("a.pt")], json=True, quiet=True)
    out, err = capsys.readouterr()
    assert err == ""
    assert json.loads(out) == {
        "schema": "pvdconvert/view/1",
        "url": "http://127.0.0.1:81",
        "host": "127.0.0.1",
        "port": 81,
        "files": ["a.pt"],
        "loopback": True,
    }


# ---------------------------------------------------------------------------------------------- two fields, served


@pytest.fixture
def serving(balls: tuple[Prepared, Prepared]) -> Iterator[Viewer]:
    running = Viewer([Shown("red", balls[0]), Shown("blue", balls[1])], address.resolve("localhost", 0))
    yield running
    running.stop()


def test_no_client_opens_a_tunnel_to_the_outside(serving: Viewer) -> None:
    assert serving._server.request_share_url() is None
    assert serving._server._share_tunnel is None


def test_a_port_taken_in_the_meantime_is_refused(balls: tuple[Prepared, Prepared], taken: int) -> None:
    with pytest.raises(RequestError, match="in use"):  # viser itself would go on to the next port
        Viewer([Shown("red", balls[0])], address.Address("127.0.0.1", taken))


def test_two_fields_in_a_browser(serving: Viewer, browser: Browser) -> None:
    red, blue, magenta = [255, 0, 0], [0, 0, 255], [255, 0, 255]
    with visit(browser, f"{serving.url}/?fixedDpr=1", width=800, height=300) as seen:
        page = seen.page
        page.add_style_tag(content=".mantine-Notifications-root {display: none}")
        page.get_by_text("samples").wait_for()

        def choose(name: str, value: str) -> None:
            page.get_by_role("combobox", name=name).click()
            page.get_by_role("option", name=value, exact=True).click()

        def shows(*wanted: tuple[float, list[int]]) -> None:
            """Pixels half way down, at shares of the canvas' width, within a minute."""
            for _ in range(120):
                box = page.locator("canvas").first.bounding_box()
                assert box is not None
                picture = np.asarray(Pillow.open(io.BytesIO(page.screenshot(clip=box))).convert("RGB"))
                found = [picture[picture.shape[0] // 2, round(x * picture.shape[1])].tolist() for x, _ in wanted]
                if found == [color for _, color in wanted]:
                    return
                page.wait_for_timeout(500)
            raise AssertionError(f"found {found}, wanted {wanted}")

        shows((0.45, red), (0.55, blue))  # the seam
        choose("show", "A and B")
        shows((0.25, red), (0.75, blue), (0.51, [255] * 3))
        choose("show", "8 x difference")
        shows((0.5, magenta), (0.01, [0] * 3))
        choose("show", "B")
        shows((0.5, blue), (0.01, [255] * 3))
        # A held-out view is closer to the ball's size than the first view; all of them look at its middle.
        choose("held-out view", "3")
        shows((0.5, blue), (0.01, [255] * 3))
        camera = next(iter(serving._server.get_clients().values())).camera
        third = held_out_cameras(serving.scene, serving.box)[2]
        for _ in range(120):
            if np.allclose(camera.position, third.position, atol=1e-3):
                break
            page.wait_for_timeout(250)
        assert np.allclose(camera.position, third.position, atol=1e-3)
        assert np.allclose(np.abs(poses.wxyz_of(third) @ camera.wxyz), 1.0, atol=1e-4)
        page.get_by_role("button", name="reset view").click()
        for _ in range(120):
            if np.allclose(camera.position, serving.home.position, atol=1e-3):
                break
            page.wait_for_timeout(250)
        assert np.allclose(camera.position, serving.home.position, atol=1e-3)
