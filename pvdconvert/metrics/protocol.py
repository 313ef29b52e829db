"""The protocol ``fidelity/1`` (docs/conventions.md): how close one field is to another, on views nobody has learned."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvdconvert.cameras import Camera, inside_cameras, sphere_cameras
from pvdconvert.field import RadianceField
from pvdconvert.metrics.pictures import CAP, psnr, ssim
from pvdconvert.progress import Progress
from pvdconvert.render.images import Bytes, Floats, render_camera, to_uint8
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.render.trace import default_step
from pvdconvert.scene import Box, Scene

PROTOCOL = "fidelity/1"
SEED = 20_160
"""Seed of the held-out cameras; nothing else may use it."""
COUNT, SIZE = 16, 200
QUICK_COUNT, QUICK_SIZE = 4, 100
"""Views and pixels of the numbers shown while a conversion runs."""
_OBJECT, _SOLID = 0.05, 0.5


def held_out_cameras(
    scene: Scene, box: Box, count: int = COUNT, size: int = SIZE, seed: int = SEED
) -> tuple[Camera, ...]:
    """The cameras of ``fidelity/1``: ``count`` views, ``size`` pixels along the longer side.

    On the full sphere around ``box`` (the occupied box, which fills two thirds of the height); for a scene with cameras
    of its own, or in NDC, :func:`between_cameras`; for a contracted scene, from inside of what is not moved.
    """
    space = scene.ray_space
    if scene.cameras:
        return between_cameras(scene.cameras, count, size, seed)
    if space.kind == "ndc" and space.width and space.height and space.focal:
        # A forward-facing scene is warped about the mean camera: the origin, looking along -z (layouts section 9.2).
        pose = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0))
        w, h, f = space.width, space.height, space.focal
        mean = Camera(round(w), round(h), f, f, w / 2, h / 2, pose, offset=0.0)
        return between_cameras((mean,), count, size, seed, shift=0.1 * (space.near or 1.0))
    if space.kind == "contracted":
        return inside_cameras(space, count, size, seed)
    return sphere_cameras(box, count, size, seed)


def between_cameras(
    cameras: Sequence[Camera], count: int, size: int, seed: int, *, shift: float = 0.0
) -> tuple[Camera, ...]:
    """Views between given ones: midpoints of random cameras and one of their four nearest neighbours, jittered.

    Nearness counts distance (relative to the median distance) plus the angle between the views (radians); position and
    rotation are averaged, then moved by a normal deviate of 5 % of the pair's distance plus ``shift``, and rotated by
    one of about 1 degree. Intrinsics are the first camera's, scaled so that the longer side has ``size`` pixels.
    """
    rng = np.random.default_rng(seed)
    poses = np.asarray([c.c2w for c in cameras], dtype=np.float64)[:, :3, :4]
    apart = np.linalg.norm(poses[:, None, :, 3] - poses[None, :, :, 3], axis=-1)
    angle = np.arccos(np.clip(np.einsum("ik,jk->ij", poses[:, :, 2], poses[:, :, 2]), -1.0, 1.0))
    distinct = apart[apart > 0]
    near = apart / (np.median(distinct) if distinct.size else 1.0) + angle
    np.fill_diagonal(near, np.inf)
    views = []
    for _ in range(count):
        a = int(rng.integers(len(cameras)))
        b = int(rng.choice(np.argsort(near[a], kind="stable")[: min(4, len(cameras) - 1)])) if len(cameras) > 1 else a
        turn = _rotation(rng.normal(0.0, math.radians(1.0), 3))
        u, _s, vt = np.linalg.svd(poses[a, :, :3] + poses[b, :, :3])
        rotation = turn @ (u @ np.diag([1.0, 1.0, float(np.linalg.det(u @ vt))]) @ vt)
        position = 0.5 * (poses[a, :, 3] + poses[b, :, 3]) + rng.normal(0.0, 1.0, 3) * (0.05 * apart[a, b] + shift)
        scale = size / max(cameras[a].width, cameras[a].height)
        view = cameras[a].resized(max(1, round(cameras[a].width * scale)), max(1, round(cameras[a].height * scale)))
        c2w = np.concatenate([rotation, position[:, None]], axis=1)
        views.append(dataclasses.replace(view, c2w=tuple(tuple(map(float, row)) for row in c2w)))
    return tuple(views)


def _rotation(v: NDArray[np.float64]) -> NDArray[np.float64]:
    """The rotation about the axis ``v`` by its length in radians (Rodrigues)."""
    angle = float(np.linalg.norm(v))
    x, y, z = v / angle if angle > 0 else v
    k = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    return np.asarray(np.eye(3) + math.sin(angle) * k + (1.0 - math.cos(angle)) * (k @ k))


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """The answer of ``fidelity/1``. dB of views are capped at :data:`CAP`, so means are finite; None = no such pixels.

    psnr           mean over views, dB: *the* figure
    psnr_worst     the worst view
    psnr_upper     mean over views from above the box's centre
    psnr_object    mean over views, counting only pixels with opacity > 0.05 of either
    ssim           mean over views
    opacity_error  mean absolute difference of opacity             depth_error   mean absolute difference of distance,
                   relative to the box's diagonal, over pixels where both opacities exceed 0.5
    views          dB of each view                                 size          pixels of the longer side
    identical      every byte of every view agrees
    """

    psnr: float
    psnr_worst: float
    psnr_upper: float | None
    psnr_object: float | None
    ssim: float
    opacity_error: float
    depth_error: float | None
    views: tuple[float, ...]
    size: int
    identical: bool
    protocol: str = PROTOCOL

    def to_json(self) -> dict[str, Any]:
        """A JSON object without NaN or infinity."""
        return {**dataclasses.asdict(self), "views": list(self.views)}

    def __str__(self) -> str:
        return f"{self.psnr:.2f} dB (worst view {self.psnr_worst:.2f}, {len(self.views)} views, {self.size} px)"


Drawn = tuple[Bytes, Floats, Floats]
"""A view of a field: (bytes [H, W, 3], opacity [H, W], distance [H, W])."""


@dataclasses.dataclass(frozen=True)
class ReferenceViews:
    """A teacher's answers to ``fidelity/1``, rendered once and compared with as often as wanted.

    images [H, W, 3] bytes, opacity [H, W], depth [H, W] (distance; 0 where transparent), one entry a camera.
    """

    scene: Scene
    box: Box
    cameras: tuple[Camera, ...]
    images: tuple[Bytes, ...]
    opacity: tuple[Floats, ...]
    depth: tuple[Floats, ...]
    step: float
    protocol: str

    def compare(
        self,
        student: RadianceField,
        occupancy: Occupancy,
        *,
        step: float | None = None,
        progress: Progress | None = None,
        keep: Keep | None = None,
    ) -> Fidelity:
        """Render ``student`` through the same cameras and measure. ``step`` None = the teacher's.

        ``keep`` is told these views and the student's pictures, for a report that shows some.
        """
        if progress:
            progress.stage("validate", len(self.cameras))
        pictures = []
        for n, camera in enumerate(self.cameras):
            pictures.append(_view(student, self.scene, camera, occupancy, self.step if step is None else step))
            if progress:
                progress.advance(n + 1)
        if keep:
            keep(self, pictures)
        return self.measure(pictures)

    def rows(self, pictures: Sequence[Drawn]) -> list[dict[str, Any]]:
        """The figures of each view: psnr, psnr_object, ssim, opacity_error, depth_error (as in :class:`Fidelity`;
        None = no such pixels), and upper, whether it is one from above."""
        return [self._row(n, drawn)[0] for n, drawn in enumerate(pictures)]

    def _row(self, n: int, drawn: Drawn) -> tuple[dict[str, Any], NDArray[np.float64]]:
        """The figures of view ``n``, and how far each solid pixel is off relative to the box's diagonal."""
        image, opacity, depth = drawn
        thing = (self.opacity[n] > _OBJECT) | (opacity > _OBJECT)
        solid = (self.opacity[n] > _SOLID) & (opacity > _SOLID)
        away = np.abs(self.depth[n].astype(np.float64) - depth)[solid] / self.box.diagonal
        row = {
            "psnr": min(CAP, psnr(self.images[n], image)),
            "psnr_object": min(CAP, psnr(self.images[n], image, thing)) if thing.any() else None,
            "ssim": ssim(self.images[n], image),
            "opacity_error": float(np.abs(self.opacity[n].astype(np.float64) - opacity).mean()),
            "depth_error": float(away.mean()) if away.size else None,
            "upper": bool(self.cameras[n].position[2] > self.box.center[2]),
        }
        return row, away

    def measure(self, pictures: Sequence[Drawn]) -> Fidelity:
        """The figures for ready (bytes, opacity, distance) of every camera."""
        rows, deep = zip(*(self._row(n, drawn) for n, drawn in enumerate(pictures)))
        decibels = [row["psnr"] for row in rows]
        upper = [row["psnr"] for row in rows if row["upper"]]
        objects = [row["psnr_object"] for row in rows if row["psnr_object"] is not None]
        away = np.concatenate(deep)
        return Fidelity(
            psnr=float(np.mean(decibels)),
            psnr_worst=min(decibels),
            psnr_upper=float(np.mean(upper)) if upper else None,
            psnr_object=float(np.mean(objects)) if objects else None,
            ssim=float(np.mean([row["ssim"] for row in rows])),
            opacity_error=float(np.mean([row["opacity_error"] for row in rows])),
            depth_error=float(away.mean()) if away.size else None,
            views=tuple(decibels),
            size=max(self.cameras[0].width, self.cameras[0].height),
            identical=all(np.array_equal(a, p[0]) for a, p in zip(self.images, pictures)),
            protocol=self.protocol,
        )


Keep = Callable[[ReferenceViews, Sequence[Drawn]], None]
"""Told a comparison's two sides."""


def views(
    teacher: RadianceField,
    scene: Scene,
    *,
    occupancy: Occupancy,
    box: Box,
    step: float | None = None,
    cameras: Sequence[Camera] | None = None,
    size: int = SIZE,
    count: int = COUNT,
    seed: int = SEED,
    progress: Progress | None = None,
) -> ReferenceViews:
    """Render the teacher's side of ``fidelity/1``; ``box`` is the occupied box.

    Other cameras, counts or sizes than the protocol's are marked in ``protocol``: "fidelity/1 (4 views, 100 px)".
    """
    chosen = held_out_cameras(scene, box, count, size, seed) if cameras is None else tuple(cameras)
    if not chosen:
        raise ValueError("no cameras to compare through")
    pace = default_step(occupancy) if step is None else step
    if progress:
        progress.stage("reference views", len(chosen))
    pictures = []
    for n, camera in enumerate(chosen):
        pictures.append(_view(teacher, scene, camera, occupancy, pace))
        if progress:
            progress.advance(n + 1)
    standard = cameras is None and (count, size, seed) == (COUNT, SIZE, SEED)
    name = (
        PROTOCOL
        if standard
        else f"{PROTOCOL} ({len(chosen)} {'views' if cameras is None else 'given views'}, {size} px)"
    )
    images, opacity, depth = zip(*pictures)
    return ReferenceViews(scene, box, chosen, images, opacity, depth, pace, name)


def fidelity(
    teacher: RadianceField,
    student: RadianceField,
    scene: Scene,
    *,
    teacher_occupancy: Occupancy,
    student_occupancy: Occupancy,
    box: Box,
    step: float | None = None,
    cameras: Sequence[Camera] | None = None,
    size: int = SIZE,
    count: int = COUNT,
    seed: int = SEED,
    progress: Progress | None = None,
    teacher_cache: ReferenceViews | None = None,
) -> Fidelity:
    """``fidelity/1`` of ``student`` against ``teacher``; ``teacher_cache`` of :func:`views` spares its side."""
    reference = teacher_cache or views(
        teacher,
        scene,
        occupancy=teacher_occupancy,
        box=box,
        step=step,
        cameras=cameras,
        size=size,
        count=count,
        seed=seed,
        progress=progress,
    )
    return reference.compare(student, student_occupancy, step=step, progress=progress)


def _view(
    field: RadianceField, scene: Scene, camera: Camera, occupancy: Occupancy, step: float
) -> tuple[Bytes, Floats, Floats]:
    """(display bytes, opacity, distance) of one view."""
    image = render_camera(field, scene, camera, occupancy, step)
    distance = np.where(image.opacity > 0, image.depth / np.maximum(image.opacity, 1e-6), 0.0)
    return to_uint8(image.rgb, scene.color_space), image.opacity, distance.astype(np.float32)
