"""``pvdconvert view`` as a process: where it listens, whom it answers, how it ends, and what a browser shows."""

from __future__ import annotations

import dataclasses
import http.client
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pvdconvert.cameras import Camera, load_transforms
from pvdconvert.cli.render import orbit
from pvdconvert.loading import open_field
from pvdconvert.metrics import psnr
from pvdconvert.prepare import Prepared, prepare
from pvdconvert.render.images import render_camera, to_uint8
from tests.browser import visit

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

REPO = Path(__file__).resolve().parents[1]
SAMPLE = REPO / "examples" / "ngp.ckpt"
WIDTH, HEIGHT = 800, 200
"""Pixels of the window; viser docks its panel beside the canvas in windows that are not narrow."""
PATIENCE = 300.0

pytestmark = pytest.mark.slow


@dataclasses.dataclass
class Served:
    process: subprocess.Popen[str]
    url: str

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])


def view(*args: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-m", "pvdconvert", "view", *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    process = view(SAMPLE, "--port", 0, "--progress", "none")
    assert process.stdout is not None
    url = process.stdout.readline().strip()  # printed only when it answers
    try:
        assert url, process.stderr and process.stderr.read()
        yield Served(process, url)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def sample() -> Prepared:
    loaded = open_field(SAMPLE)
    return prepare(loaded.field, loaded.scene)


def draw(prepared: Prepared, camera: Camera) -> NDArray[np.uint8]:
    """What ``pvdconvert render`` writes for this camera."""
    image = render_camera(prepared.field, prepared.scene, camera, prepared.occupancy, prepared.step)
    return to_uint8(image.rgb, prepared.scene.color_space)


def answers(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=10.0):
            return True
    except ConnectionRefusedError:
        return False


def test_it_answers_on_loopback_and_nowhere_else(served: Served) -> None:
    assert served.url.startswith("http://127.0.0.1:")
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    connection.request("GET", "/")
    answer = connection.getresponse()
    assert answer.status == 200
    assert b"<html" in answer.read(20_000).lower()
    connection.close()
    if sys.platform != "linux":
        pytest.skip("only Linux has all of 127.0.0.0/8 without being asked")
    with socket.create_server(("0.0.0.0", 0)) as everywhere:  # what would be seen of one that listens everywhere
        assert answers("127.0.0.2", everywhere.getsockname()[1])
    assert not answers("127.0.0.2", served.port)


def test_pages_of_other_servers_get_nothing(served: Served) -> None:
    import viser
    from websockets.exceptions import ConnectionClosed
    from websockets.sync.client import connect
    from websockets.typing import Origin, Subprotocol

    protocol = Subprotocol(f"viser-v{viser.__version__}")
    address = served.url.replace("http", "ws")
    with connect(address, subprotocols=[protocol], origin=Origin(served.url), compression=None) as own:
        assert own.recv(timeout=60)  # the panel, and where to look from
    with connect(address, subprotocols=[protocol], origin=Origin("https://evil.example"), compression=None) as foreign:
        with pytest.raises(ConnectionClosed) as closed:
            foreign.recv(timeout=60)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1008


def at_rest(page: Page) -> str:
    """Wait for the sharpest picture; the line of numbers."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        lines = [line for line in page.inner_text("body").splitlines() if "samples" in line]
        if lines and "refining" not in lines[0]:
            return lines[0]
        page.wait_for_timeout(200)
    raise AssertionError("the picture was never finished")


def eventually(page: Page, holds: Callable[[NDArray[np.uint8]], bool]) -> NDArray[np.uint8]:
    """The canvas once ``holds`` is true of it, which may take the browser a while on a busy machine; or as it is."""
    end = time.monotonic() + 60.0
    while not holds(picture := canvas(page)) and time.monotonic() < end:
        page.wait_for_timeout(300)
    return picture


def canvas(page: Page) -> NDArray[np.uint8]:
    """The canvas as it is on the screen [H, W, 3]."""
    box = page.locator("canvas").first.bounding_box()
    assert box is not None
    data = page.screenshot(clip=box)
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_the_browser_shows_what_render_draws(
    served: Served, sample: Prepared, browser: Browser, tmp_path: Path
) -> None:
    # One pixel of the canvas is one of the screen.
    with visit(browser, f"{served.url}/?fixedDpr=1", width=WIDTH, height=HEIGHT) as seen:
        page = seen.page
        page.add_style_tag(content=".mantine-Notifications-root {display: none}")  # "no GPU", over the picture
        page.get_by_text("samples").wait_for(timeout=1000 * PATIENCE)
        numbers = at_rest(page)
        height, width = canvas(page).shape[:2]
        assert height == HEIGHT
        assert HEIGHT < width < WIDTH
        assert f"{width} x {height}" in numbers
        (square,) = orbit(sample, 1, HEIGHT, 30.0)  # of render, without options
        camera = dataclasses.replace(square, width=width, cx=width / 2)  # the same view, more of it to the sides
        reference = draw(sample, camera)
        before = eventually(page, lambda picture: psnr(picture, reference) >= 25.0)
        assert psnr(before, reference) >= 25.0

        page.mouse.move(width / 2, height / 2)
        page.mouse.down()
        page.mouse.move(width / 2 + 60, height / 2 - 30, steps=4)
        page.mouse.up()
        after = eventually(page, lambda picture: psnr(picture, before) < 25.0)
        assert psnr(after, before) < 25.0
        page.wait_for_timeout(1500)  # the camera glides to its rest
        at_rest(page)
        with page.expect_download() as download:
            page.get_by_role("button", name="save camera").click()
        download.value.save_as(tmp_path / "transforms.json")
        (moved,) = load_transforms(tmp_path / "transforms.json")
        assert np.linalg.norm(moved.position - camera.position) > 0.1
        turned = draw(sample, moved)
        after = eventually(page, lambda picture: psnr(picture, turned) >= 25.0)
        assert psnr(after, turned) >= 25.0
        assert psnr(turned, reference) < 25.0

        # Another channel needs no new picture; black where nothing is, white where something is.
        page.get_by_role("combobox", name="as").click()
        page.get_by_role("option", name="opacity", exact=True).click()
        opacity = eventually(page, lambda picture: not picture[2, 2].any())
        assert opacity[2, 2].tolist() == [0, 0, 0]
        assert psnr(opacity, opacity[..., :1].repeat(3, axis=-1)) > 40.0
        covered = (opacity[..., 0] > 128).mean()
        assert covered == pytest.approx((np.abs(turned.astype(int) - 255).sum(-1) > 60).mean(), abs=0.05)

        with page.expect_download() as download:
            page.get_by_role("button", name="save picture").click()
        download.value.save_as(tmp_path / "view.png")
        saved = np.asarray(Image.open(tmp_path / "view.png"))
        assert psnr(saved, opacity) > 35.0
        assert all(request.startswith(served.url) for request in seen.requests)  # nothing from elsewhere
        assert [e for e in seen.errors if "deprecated" not in e and "GPU stall" not in e] == []


def test_ctrl_c_ends_it(served: Served) -> None:
    """Last: the process of the other tests."""
    served.process.send_signal(signal.SIGINT)
    out, err = served.process.communicate(timeout=60)
    assert served.process.returncode == 0
    assert out == ""
    (line,) = err.splitlines()
    assert line == f"pvdconvert: showing {SAMPLE}; Ctrl-C ends"
    assert not answers("127.0.0.1", served.port)


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["no-such-file"], 3, ["no such file"]),
        ([SAMPLE, "no-such-file"], 3, ["no such file"]),
        ([SAMPLE, "--host", "192.0.2.1"], 2, ["not an address of this machine"]),
        ([SAMPLE, "--from-b", "torch-ngp"], 2, ["--from-b", "FILE2"]),
        ([SAMPLE, "--port", "TAKEN"], 10, ["is in use", "--port 0"]),
        ([SAMPLE], 5, ["viser", "pip install 'pvdconvert[viewer]'"]),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_without_torch(args: list[object], code: int, words: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        missing = "torch viser" if code == 5 else "torch"
        program = f"import sys; sys.modules.update(dict.fromkeys({missing.split()}))\n"
        program += "from pvdconvert.cli.main import run; sys.exit(run(sys.argv[1:]))"
        told = [port if a == "TAKEN" else str(a) for a in args]
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", program, "view", *told],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={**os.environ, "NO_COLOR": "1"},
        )
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert all(word in line for word in words)
