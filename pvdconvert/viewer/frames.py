"""Pictures of rising resolution: the first at once, the last as sharp as the screen, none longer than it is wanted.

pace = Pace.measured(fields, camera)
for frame in frames(fields, camera, Layout("split"), pace, cancelled=lambda: moved):
    ...
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from pvdconvert.cameras import Camera
from pvdconvert.field import RadianceField
from pvdconvert.prepare import FLOPS, Prepared
from pvdconvert.render.images import Bytes, Image, render_camera
from pvdconvert.viewer.layout import Channel, Layout, depth_span, paint

FIRST = 0.1
"""Seconds that the first picture may take: about as late as a hand notices."""
SMALLEST = 16
"""Pixels along the longer side of the coarsest picture."""
_CHUNK, _SMALL = 1 << 16, 1 << 10
_PATIENCE = 0.1


@dataclasses.dataclass
class Pace:
    """How long pictures of each field take: so many seconds a ray, and ``overhead`` seconds however few there are."""

    seconds_per_ray: list[float]
    overhead: list[float]

    @classmethod
    def measured(cls, fields: Sequence[Prepared], camera: Camera, small: int = 16, large: int = 56) -> Pace:
        """Render ``camera``'s view ``small`` and ``large`` pixels wide, after a first call that may compile kernels."""
        rates, fixed = [], []
        for prepared in fields:
            times = []
            for size in (small, small, large):
                begin = time.perf_counter()
                _render(prepared, camera.resized(size, size), _never)
                times.append(time.perf_counter() - begin)
            rate = max(times[2] - times[1], 0.2 * times[2]) / (large**2 - small**2)
            rates.append(rate)
            fixed.append(max(times[1] - rate * small**2, 1e-4))
        return cls(rates, fixed)

    def expected(self, panels: Sequence[tuple[int, Camera]]) -> float:
        """Seconds that these panels are likely to take."""
        return sum(self.overhead[k] + self.seconds_per_ray[k] * view.width * view.height for k, view in panels)

    def allowed(self, panels: Sequence[tuple[int, Camera]], first: float) -> float:
        """Seconds that a first picture may take: ``first``, but fewer rays than cost the overhead gain nothing."""
        return max(first, 2.0 * sum(self.overhead[k] for k, _ in panels))

    def note(self, index: int, rays: int, seconds: float) -> None:
        """Half way (by ratios) to what was measured, as views differ and machines have moods; what made up most of the
        time is corrected most."""
        fixed, rate = self.overhead[index], self.seconds_per_ray[index]
        guess = fixed + rate * rays
        ratio, share = max(seconds, 1e-6) / guess, fixed / guess
        self.overhead[index] = fixed * ratio ** (0.5 * share)
        self.seconds_per_ray[index] = rate * ratio ** (0.5 * (1.0 - share))


@dataclasses.dataclass(frozen=True)
class Frame:
    """What one step drew.

    images         one a panel of ``layout.panels(camera)``
    camera         of the whole picture, at this frame's resolution
    final          whether it has the resolution that was asked for
    seconds        what drawing it took
    samples        points at which fields were asked
    """

    images: tuple[Image, ...]
    camera: Camera
    layout: Layout
    final: bool
    seconds: float
    samples: int

    def picture(self, fields: Sequence[Prepared], channel: Channel = "color") -> Bytes:
        """The frame [H, W, 3] as bytes. Depths are those between which the first field's box lies."""
        first = fields[0]
        parts = []
        for image, (_, view) in zip(self.images, self.layout.panels(self.camera), strict=True):
            parts.append(paint(image, channel, first.scene, depth_span(view, first.scene, first.box)))
        return self.layout.compose(parts)


def sizes(width: int, height: int, halvings: int) -> tuple[tuple[int, int], ...]:
    """Resolutions, each about twice the last, that end in ``width`` x ``height``."""
    return tuple((max(1, round(width / 2**k)), max(1, round(height / 2**k))) for k in range(halvings, -1, -1))


class Refinement:
    """One view, drawn coarsely and then ever finer: a step a resolution.

    fields   what is looked at; :class:`Layout` says which of them where
    camera   the whole picture, at the resolution to end with
    first    seconds that the first step may take, by ``pace``
    """

    def __init__(
        self, fields: Sequence[Prepared], camera: Camera, layout: Layout, pace: Pace, first: float = FIRST
    ) -> None:
        self._fields, self._layout, self._pace = fields, layout, pace
        halvings = 0
        longest = max(camera.width, camera.height)
        views = camera
        limit = pace.allowed(layout.panels(camera), first)
        while pace.expected(layout.panels(views)) > limit and longest / 2 ** (halvings + 1) >= SMALLEST:
            halvings += 1
            views = camera.resized(*sizes(camera.width, camera.height, halvings)[0])
        self._cameras = [camera.resized(w, h) for w, h in sizes(camera.width, camera.height, halvings)]
        self._cameras[-1] = camera
        self._next = 0

    @property
    def done(self) -> bool:
        return self._next == len(self._cameras)

    def step(self, cancelled: Callable[[], bool] | None = None) -> Frame | None:
        """The next picture, or None where ``cancelled`` came true before it was there: it can then be asked for again.

        The first picture is never cancelled: who moves all the time would see nothing.
        """
        if self.done:
            raise ValueError("nothing is left to refine")
        give_up = cancelled if cancelled is not None and self._next else _never
        camera = self._cameras[self._next]
        begin, samples, images = time.perf_counter(), 0, []
        try:
            for index, view in self._layout.panels(camera):
                if give_up():
                    return None
                start = time.perf_counter()
                image, asked = _render(self._fields[index], view, give_up)
                self._pace.note(index, view.width * view.height, time.perf_counter() - start)
                images.append(image)
                samples += asked
        except _Cancelled:
            return None
        self._next += 1
        return Frame(tuple(images), camera, self._layout, self.done, time.perf_counter() - begin, samples)


def frames(
    fields: Sequence[Prepared],
    camera: Camera,
    layout: Layout,
    pace: Pace,
    *,
    cancelled: Callable[[], bool] | None = None,
    deadline: float | None = None,
    first: float = FIRST,
) -> Iterator[Frame]:
    """Pictures of rising resolution, until the last, until ``cancelled``, or for ``deadline`` seconds; at least one."""
    end = None if deadline is None else time.monotonic() + deadline

    def over() -> bool:
        return (cancelled is not None and cancelled()) or (end is not None and time.monotonic() >= end)

    work = Refinement(fields, camera, layout, pace, first)
    while not work.done:
        frame = work.step(over)
        if frame is None:
            return
        yield frame


class _Cancelled(Exception):
    """Raised out of a rendering that nobody waits for any more."""


class _Watched(RadianceField):
    """A field that counts the points at which it is asked, and stops answering when told to."""

    def __init__(self, field: RadianceField, give_up: Callable[[], bool]) -> None:
        super().__init__()
        self._field, self._give_up = field, give_up
        self.flops_per_point = field.flops_per_point
        self.asked = 0

    def encode(self, x: Tensor) -> Tensor:
        if self._give_up():
            raise _Cancelled
        self.asked += x.shape[0]
        return self._field.encode(x)

    def density(self, latent: Tensor) -> Tensor:
        return self._field.density(latent)

    def color(self, latent: Tensor, d: Tensor) -> Tensor:
        return self._field.color(latent, d)


def _never() -> bool:
    return False


def _render(prepared: Prepared, camera: Camera, give_up: Callable[[], bool]) -> tuple[Image, int]:
    """The view, and how many points it took. Slow fields are asked in smaller portions, to stop in time."""
    field = _Watched(prepared.field, give_up)
    portion = _PATIENCE * FLOPS / max(field.flops_per_point, 1.0)
    chunk = int(min(_CHUNK, max(_SMALL, portion)))
    image = render_camera(field, prepared.scene, camera, prepared.occupancy, prepared.step, chunk_points=chunk)
    return image, field.asked
