"""The viewer itself: a viser server whose clients each look around in the fields by themselves.

One thread draws, for all clients in turn; a moving camera cancels whatever is being refined. Needs viser.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import viser
from numpy.typing import NDArray

from pvdconvert.cameras import Camera
from pvdconvert.errors import PvdError
from pvdconvert.metrics import COUNT, SIZE, held_out_cameras
from pvdconvert.prepare import Prepared
from pvdconvert.viewer import address
from pvdconvert.viewer.address import Address
from pvdconvert.viewer.frames import Frame, Pace, Refinement
from pvdconvert.viewer.layout import CHANNELS, Channel, Layout, Show, png
from pvdconvert.viewer.poses import Pose, camera_of, confined, first_view, pose_of, transforms, up_axis

LABEL = "pvdconvert"
SHOWN: dict[str, Show] = {
    "A | B": "split",
    "A and B": "side by side",
    "A": "first",
    "B": "second",
    "8 x difference": "difference",
}
LIMITS = {"full": None, "1024": 1024, "512": 512, "256": 256}
LOSSLESS = 1 << 16
"""Pixels up to which a passing picture is sent without loss, as the last one always is."""
QUALITY = 88


@dataclasses.dataclass(frozen=True)
class Shown:
    """A field to look at, and what to call it."""

    name: str
    prepared: Prepared


class Viewer:
    """Serves the fields until :meth:`stop`. With two, the second is drawn over the first one's background.

    Raises UsageError and RequestError as :func:`pvdconvert.viewer.address.resolve` does.
    """

    def __init__(self, shown: Sequence[Shown], where: Address) -> None:
        self._shown = tuple(shown)
        self._fields = [s.prepared for s in shown]
        for k in range(1, len(self._fields)):
            self._fields[k] = dataclasses.replace(self._fields[k], scene=self._fields[0].scene)
        self.scene, self.box = self._fields[0].scene, self._fields[0].box
        self.home = pose_of(first_view(self.scene, self.box, SIZE), self.scene, self.box)
        self._pace = Pace.measured(self._fields, first_view(self.scene, self.box, SIZE))
        self._clients: dict[int, _Client] = {}
        self._wake = threading.Condition()
        self._stopped = False
        with _silence():
            self._server = _Server(where.host, where.port, label=LABEL)
        self.address = Address(where.host, self._server.get_port())
        if where.port not in (0, self.address.port):  # viser takes the next port where one is taken
            self._end()
            raise address.in_use(where.port)
        self._furnish()
        self._painter = threading.Thread(target=self._paint, name="painter", daemon=True)
        self._painter.start()
        self._server.on_client_connect(self._arrive)
        self._server.on_client_disconnect(self._leave)

    @property
    def url(self) -> str:
        return self.address.url

    def stop(self) -> None:
        """Stop serving and drawing. Returns when both have ended."""
        with self._wake:
            self._stopped = True
            self._wake.notify_all()
        self._painter.join(10.0)
        self._end()

    def _end(self) -> None:
        with _silence():
            self._server.stop()

    def _furnish(self) -> None:
        self._server.gui.configure_theme(show_logo=False, show_share_button=False, control_width="medium")
        self._server.gui.main_panel.dock_right()  # beside the picture, not over it
        self._server.scene.set_up_direction(_triple(up_axis(self.scene)))
        camera = self._server.initial_camera
        camera.position, camera.look_at = self.home.position, self.home.target
        camera.up, camera.fov = self.home.up, self.home.fov

    def _arrive(self, handle: viser.ClientHandle) -> None:
        client = _Client(self, handle)
        with self._wake:
            self._clients[handle.client_id] = client
        client.changed()

    def _leave(self, handle: viser.ClientHandle) -> None:
        with self._wake:
            client = self._clients.pop(handle.client_id, None)
        if client is not None:
            client.gone = True

    def notify(self) -> None:
        """Somebody wants something else to be drawn."""
        with self._wake:
            self._wake.notify_all()

    def _urgent(self) -> bool:
        return self._stopped or any(c.stale for c in tuple(self._clients.values()))

    def _paint(self) -> None:
        """Serve whoever has waited longest for a first picture, then whoever has the coarsest."""
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._stopped or any(c.waiting for c in self._clients.values()))
                if self._stopped:
                    return
                client = min((c for c in self._clients.values() if c.waiting), key=lambda c: (not c.stale, c.turn))
                turn = 1 + max(c.turn for c in self._clients.values())
            client.turn = turn
            try:
                if client.stale:
                    client.begin(self._fields, self._pace)
                client.advance(lambda client=client: client.gone or self._urgent())  # type: ignore[misc]
            except Exception as error:  # one view that cannot be drawn must not end the others
                client.give_up(str(error) if isinstance(error, PvdError) else f"{type(error).__name__}: {error}")


class _Client:
    """One browser tab: its camera, its panel of controls, and the picture that it is waiting for."""

    def __init__(self, viewer: Viewer, handle: viser.ClientHandle) -> None:
        self._viewer, self._handle = viewer, handle
        self.turn = 0
        self.stale = self.gone = False
        self._work: Refinement | None = None
        self._frame: Frame | None = None
        self._channel: Channel = "color"
        self._goal: Camera | None = None
        self._moved = False
        self._fields: Sequence[Prepared] = ()
        self._views = held_out_cameras(viewer.scene, viewer.box, COUNT, SIZE)
        self._build()
        handle.camera.on_update(lambda _: self.changed())

    def _build(self) -> None:
        gui, shown = self._handle.gui, self._viewer._shown
        for letter, item in zip("AB", shown):
            gui.add_text(letter if len(shown) > 1 else "field", initial_value=item.name, disabled=True)
        self._status = gui.add_markdown("")
        self._show = gui.add_dropdown("show", tuple(SHOWN), visible=len(shown) > 1)
        self._split = gui.add_slider("seam", 0.0, 1.0, 0.01, 0.5, visible=len(shown) > 1)
        self._what = gui.add_dropdown("as", CHANNELS)
        self._limit = gui.add_dropdown("pixels", tuple(LIMITS), hint="Longer side of the sharpest picture.")
        home = gui.add_button("reset view", icon=viser.Icon.HOME, color="gray")
        numbers = [str(k + 1) for k in range(len(self._views))]
        held_out = gui.add_dropdown("held-out view", ("-", *numbers), hint="The cameras of fidelity/1.")
        picture, view = "What is shown, as PNG.", "A transforms.json for pvdconvert render --cameras."
        save = gui.add_button("save picture", icon=viser.Icon.PHOTO, color="gray", hint=picture)
        keep = gui.add_button("save camera", icon=viser.Icon.CAMERA, color="gray", hint=view)
        for control in (self._split, self._limit):
            control.on_update(lambda _: self.changed())
        self._show.on_update(lambda _: self._arranged())
        self._what.on_update(lambda _: self._repaint())
        home.on_click(lambda _: self._go(self._viewer.home))
        held_out.on_update(lambda _: self._visit(held_out.value))
        save.on_click(lambda _: self._save_picture())
        keep.on_click(lambda _: self._save_camera())

    @property
    def waiting(self) -> bool:
        return self.stale or (self._work is not None and not self._work.done)

    @property
    def layout(self) -> Layout:
        show: Show = SHOWN[self._show.value] if len(self._viewer._shown) > 1 else "first"
        return Layout(show, float(self._split.value))

    def changed(self) -> None:
        """What is to be drawn is another."""
        self.stale = True
        self._viewer.notify()

    def begin(self, fields: Sequence[Prepared], pace: Pace) -> None:
        """Start over with the camera and the settings of now."""
        self.stale = False
        state = self._handle.camera
        width, height = max(2, state.image_width), max(2, state.image_height)
        limit = LIMITS[self._limit.value] or max(width, height)
        scale = min(1.0, limit / max(width, height))
        size = max(2, round(width * scale)), max(2, round(height * scale))
        camera, self._moved = confined(
            camera_of(state.wxyz, state.position, state.fov, *size), self._viewer.scene.ray_space
        )
        self._goal, self._fields = camera, fields
        self._work = Refinement(fields, camera, self.layout, pace)

    def advance(self, urgent: Callable[[], bool]) -> None:
        """Draw the next picture and send it, unless something more urgent comes up."""
        assert self._work is not None
        frame = self._work.step(urgent)
        if frame is not None and not self.gone:
            self._frame = frame
            self._send(frame)

    def give_up(self, text: str) -> None:
        """Say why nothing is drawn; the next movement tries again."""
        self._work = None
        if not self.gone:
            self._status.content = f"cannot be drawn: {_plain(text)}"

    def _send(self, frame: Frame) -> None:
        picture = frame.picture(self._fields, self._channel)
        lossless = frame.final or picture.shape[0] * picture.shape[1] <= LOSSLESS
        self._handle.scene.set_background_image(
            picture, format="png" if lossless else "jpeg", jpeg_quality=None if lossless else QUALITY
        )
        self._handle.flush()
        self._status.content = self._words(frame)

    def _words(self, frame: Frame) -> str:
        assert self._goal is not None
        here, goal = frame.camera, self._goal
        size = f"{here.width} x {here.height}" + ("" if frame.final else f" of {goal.width} x {goal.height}")
        spent = f"{frame.seconds * 1e3:.0f} ms" if frame.seconds < 0.9995 else f"{frame.seconds:.1f} s"
        words = f"{spent}, {size}, {frame.samples / 1e6:.2f} M samples"
        words += "" if frame.final else ", refining"
        return words + ("; the view is held before this forward-facing scene" if self._moved else "")

    def _arranged(self) -> None:
        self._split.visible = self.layout.show == "split"
        self.changed()

    def _repaint(self) -> None:
        """Another channel of the picture that is there."""
        self._channel = self._what.value
        if self._frame is not None and not self.waiting:
            self._send(self._frame)

    def _go(self, pose: Pose) -> None:
        camera = self._handle.camera
        with self._handle.atomic():
            camera.up_direction = pose.up
            camera.position = pose.position
            camera.look_at = pose.target
            camera.fov = pose.fov
        self.changed()

    def _visit(self, number: str) -> None:
        if number.isdigit():
            self._go(pose_of(self._views[int(number) - 1], self._viewer.scene, self._viewer.box))

    def _save_picture(self) -> None:
        if self._frame is not None:
            content = png(self._frame.picture(self._fields, self._channel))
            self._handle.send_file_download("view.png", content, save_immediately=True)

    def _save_camera(self) -> None:
        if self._goal is not None:
            content = json.dumps(transforms(self._goal), indent=2).encode()
            self._handle.send_file_download("transforms.json", content, save_immediately=True)


class _Server(viser.ViserServer):
    """viser without its tunnel to the outside, and deaf to pages of other servers."""

    def __init__(self, host: str, port: int, *, label: str) -> None:
        # Without a handler, Python prints what probes and closed tabs make the library log.
        logging.getLogger("websockets").addHandler(logging.NullHandler())
        # A tab may be closed between the last look and the sending; viser says so by a warning.
        warnings.filterwarnings("ignore", r"Queued a \w+ on a closed connection", UserWarning)
        super().__init__(host=host, port=port, label=label, verbose=False)
        inner = self._websock_server

        @inner.on_client_connect
        async def _(connection: viser.infra.WebsockClientConnection) -> None:
            socket = inner._live_connections[connection.client_id]
            headers = socket.request.headers if socket.request is not None else {}
            if not address.welcome(host, headers.get("Host"), headers.get("Origin")):
                await socket.close(1008, "pages of other servers are not served")

    def request_share_url(self, verbose: bool = True) -> str | None:
        """viser would open a public tunnel for any client that asks; this never does."""
        return None


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """viser prints a banner on starting and a line on stopping."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _plain(text: str) -> str:
    """``text`` without what a Markdown or JSX reader would act on."""
    return "".join(c if c.isalnum() or c in " .,:;-+/()'" else " " for c in text)[:300]


def _triple(v: NDArray[np.float64]) -> tuple[float, float, float]:
    x, y, z = (float(c) for c in v)
    return x, y, z
