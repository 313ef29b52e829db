"""Rays through the pixels of posed pictures, in bounded memory, drawn at random and yet the same for the same seed.

Pictures are read once and kept as bytes. Where they exceed the bound, each keeps a random share of its pixels, which is
replaced, picture after picture, as fast as it is used: nothing is ever held but the bound.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pvdconvert.cameras import Camera
from pvdconvert.data import Dataset, Frame, Pixels
from pvdconvert.errors import InputError, RequestError
from pvdconvert.progress import Progress, Silent

if TYPE_CHECKING:
    from pvdconvert.prepare import Prepared

CHUNK = 1 << 15
"""Rays drawn in one go; the number of the chunk is part of their seed."""

MOST_BYTES = 400_000_000
"""Bytes of pixels that are kept, 8 each (colour, opacity, place)."""
EACH = 8

HELD = 2048
"""Pixels that are set aside to measure with and never trained on."""


@dataclasses.dataclass(frozen=True)
class Rays:
    """R rays: origins and unit directions [R, 3] of the world; rgb [R, 3] in [0, 1], straight; alpha [R] or None."""

    o: Tensor
    d: Tensor
    rgb: Tensor
    alpha: Tensor | None

    def __len__(self) -> int:
        return int(self.o.shape[0])

    def __getitem__(self, part: slice) -> Rays:
        return Rays(self.o[part], self.d[part], self.rgb[part], None if self.alpha is None else self.alpha[part])

    def over(self, backdrop: Tensor) -> Tensor:
        """[R, 3]: the colours composited over ``backdrop`` [3]."""
        return self.rgb if self.alpha is None else self.rgb * self.alpha[:, None] + (1 - self.alpha[:, None]) * backdrop

    @classmethod
    def joined(cls, parts: Sequence[Rays]) -> Rays:
        """All rays of ``parts``, in order."""
        if len(parts) == 1:
            return parts[0]
        alpha = [p.alpha for p in parts if p.alpha is not None]
        return cls(
            torch.cat([p.o for p in parts]),
            torch.cat([p.d for p in parts]),
            torch.cat([p.rgb for p in parts]),
            torch.cat(alpha) if alpha else None,
        )


class RayBank:
    """Pixels of ``frames`` and the rays through them.

    held    pictures to measure with; without any, :data:`HELD` pixels of ``frames`` are set aside
    most    bytes of pixels to keep

    Raises InputError naming the picture: not bytes, of another size than its camera says, without a pixel that counts.
    """

    def __init__(
        self,
        frames: Sequence[Frame],
        *,
        held: Sequence[Frame] = (),
        seed: int = 0,
        most: int = MOST_BYTES,
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
    ) -> None:
        if not frames:
            raise InputError("there are no pictures to train on")
        self.frames, self.seed, self.device = tuple(frames), seed, torch.device(device)
        sizes = np.array([f.camera.width * f.camera.height for f in frames], dtype=np.int64)
        share = min(1.0, most / (EACH * int(sizes.sum())))
        self.whole = share == 1.0
        self.shares = np.maximum(1, (sizes * share).astype(np.int64))
        self.aside = np.zeros(len(frames), dtype=np.int64)
        if not held:
            self.aside += -(-min(HELD, int(sizes.sum()) // 10) // len(frames))
        self.rounds = np.zeros(len(frames), dtype=np.int64)
        self.table = _Cameras([f.camera for f in frames])
        progress = progress or Silent()
        progress.stage("pictures", len(frames))
        # Room for all of them at once: parts that are joined later would be held twice.
        room = int(np.minimum(self.shares, sizes).sum())
        self.pixels, self.place = np.empty((room, 4), dtype=np.uint8), np.empty(room, dtype=np.int32)
        self.offsets = np.zeros(len(frames) + 1, dtype=np.int64)
        apart: list[tuple[int, Pixels, NDArray[np.int32]]] = []
        channels: dict[int, str] = {}
        clear = False
        for k in range(len(frames)):
            pixels, valid = _pixels(frames[k])
            aside, rest = self._split(k, valid)
            low, high = int(self.offsets[k]), int(self.offsets[k]) + len(rest)
            self.pixels[low:high], self.place[low:high] = _opaque(pixels[rest]), rest
            self.offsets[k + 1] = high
            apart.append((k, _opaque(pixels[aside]), aside))
            channels[pixels.shape[1]] = frames[k].name
            clear |= bool(pixels.shape[1] == 4 and (pixels[:, 3] < 255).any())
            progress.advance(k + 1)
        if len(channels) > 1:
            raise InputError(f"picture {channels[4]!r} has opacity and picture {channels[3]!r} has none")
        self.alpha = clear  # pictures that are opaque everywhere say nothing about what lies behind
        count = int(self.offsets[-1])
        self.pixels, self.place = self.pixels[:count], self.place[:count]
        if not count:
            raise InputError("no pixel of any picture counts", hint="look at the masks")
        if self.alpha and not self.pixels[:, 3].any():
            raise RequestError("the pictures show nothing but background", hint="look at their alpha")
        self.refreshed = 0
        self.latest: tuple[int, Rays] | None = None
        self.held = self._held(held) if held else self._gather_apart(apart)

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def bytes(self) -> int:
        """What the pixels take."""
        return int(self.pixels.nbytes + self.place.nbytes)

    @property
    def cameras(self) -> tuple[Camera, ...]:
        return tuple(f.camera for f in self.frames)

    # -- reading -----------------------------------------------------------------------------------------------------

    def _split(self, k: int, valid: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """(set aside for measuring, kept for training), both deterministic in seed, picture and round."""
        count = int(self.aside[k])
        first = np.random.default_rng([self.seed, 11, k]).permutation(len(valid))
        aside, rest = valid[first[:count]], valid[first[count:]]
        if len(rest) > self.shares[k]:
            pick = np.random.default_rng([self.seed, 13, k, int(self.rounds[k])])
            rest = pick.choice(rest, size=int(self.shares[k]), replace=False, shuffle=False)
        return aside, rest

    def _refresh(self, until: int) -> None:
        """Replace the pixels of one picture after another, until ``until`` of them have been replaced."""
        while self.refreshed < until:
            k = self.refreshed % len(self.frames)
            self.rounds[k] += 1
            pixels, valid = _pixels(self.frames[k])
            _, rest = self._split(k, valid)
            low, high = int(self.offsets[k]), int(self.offsets[k + 1])
            self.pixels[low:high], self.place[low:high] = _opaque(pixels[rest[: high - low]]), rest[: high - low]
            self.refreshed += 1

    # -- drawing -----------------------------------------------------------------------------------------------------

    def chunk(self, number: int) -> Rays:
        """Chunk ``number`` = 0, 1, ... of :data:`CHUNK` rays through random pixels."""
        if not self.whole:
            # A picture is replaced once as many rays were drawn as it has pixels here.
            self._refresh(number * CHUNK // max(1, len(self.pixels) // len(self.frames)))
        pick = np.random.default_rng([self.seed, 17, number]).integers(0, len(self.pixels), size=CHUNK)
        frame = np.searchsorted(self.offsets, pick, side="right") - 1
        return self._rays(frame, self.place[pick], self.pixels[pick])

    def take(self, at: int, count: int) -> Rays:
        """``count`` rays of the endless sequence from ray ``at`` on."""
        parts: list[Rays] = []
        while count > 0:
            number, low = divmod(at, CHUNK)
            if self.latest is None or self.latest[0] != number:
                self.latest = (number, self.chunk(number))
            part = self.latest[1][low : low + count]
            parts.append(part)
            at, count = at + len(part), count - len(part)
        return Rays.joined(parts)

    def _rays(self, frame: NDArray[np.int64], place: NDArray[np.int32], pixels: Pixels) -> Rays:
        o, d = self.table.rays(frame, place)
        return self._bytes(o, d, pixels)

    def _bytes(self, o: NDArray[np.float32], d: NDArray[np.float32], pixels: Pixels) -> Rays:
        values = torch.from_numpy(np.ascontiguousarray(pixels)).to(self.device).float() / 255
        where = [torch.from_numpy(v).to(self.device) for v in (o, d)]
        return Rays(where[0], where[1], values[:, :3].contiguous(), values[:, 3].contiguous() if self.alpha else None)

    # -- measuring ---------------------------------------------------------------------------------------------------

    def _gather_apart(self, apart: list[tuple[int, Pixels, NDArray[np.int32]]]) -> Rays:
        frame = np.concatenate([np.full(len(place), k, dtype=np.int64) for k, _, place in apart])
        place, pixels = np.concatenate([p for _, _, p in apart]), np.concatenate([p for _, p, _ in apart])
        return self._rays(frame, place, pixels)

    def _held(self, frames: Sequence[Frame]) -> Rays:
        """Pixels of other pictures, a few of each."""
        rng = np.random.default_rng([self.seed, 19])
        chosen = rng.permutation(len(frames))[:16]
        parts = []
        for k in chosen:
            pixels, valid = _pixels(frames[k])
            place = rng.choice(valid, size=min(len(valid), -(-HELD // len(chosen))), replace=False)
            o, d = _Cameras([frames[k].camera]).rays(np.zeros(len(place), dtype=np.int64), place)
            parts.append(self._bytes(o, d, _opaque(pixels[place])))
        return Rays.joined(parts)

    @classmethod
    def from_teacher(cls, prepared: Prepared, cameras: Sequence[Camera], **options: Any) -> RayBank:
        """Pixels that a teacher renders through ``cameras``, with opacity (options of :class:`RayBank`)."""
        return cls(teacher_frames(prepared, cameras), **options)


def teacher_frames(prepared: Prepared, cameras: Sequence[Camera]) -> tuple[Frame, ...]:
    """What a teacher shows through ``cameras`` as pictures [H, W, 4], straight alpha, rendered when they are read.

    Reading raises RequestError where the teacher's colours are no numbers.
    """
    from pvdconvert.render.images import render_camera, to_uint8

    def read(camera: Camera) -> Pixels:
        image = render_camera(prepared.field, prepared.scene, camera, prepared.occupancy, prepared.step)
        if not np.isfinite(image.rgb).all():
            raise RequestError("the teacher's colours are not numbers", hint="its weights are damaged")
        behind = (1 - image.opacity[..., None]) * np.asarray(prepared.scene.backdrop, dtype=np.float32)
        straight = (image.rgb - behind) / np.maximum(image.opacity[..., None], 1e-3)
        color = to_uint8(straight, prepared.scene.color_space)
        return np.concatenate([color, to_uint8(image.opacity[..., None])], axis=-1)

    def frame(k: int, camera: Camera) -> Frame:
        return Frame(f"teacher-{k:03d}", camera, lambda: read(camera))

    return tuple(frame(k, camera) for k, camera in enumerate(cameras))


def teacher_dataset(prepared: Prepared, cameras: Sequence[Camera]) -> Dataset:
    """Pictures that a teacher shows through ``cameras``, as a dataset: training from scratch on them is the baseline
    that distillation is compared with. Rendered when they are read."""
    scene = prepared.scene
    return Dataset(
        Path("teacher"),
        "teacher",
        {"train": teacher_frames(prepared, cameras)},
        box=scene.box,
        near=scene.near if scene.ray_space.kind == "ndc" else None,
        far=scene.far if scene.ray_space.kind == "ndc" else None,
        ray_space=scene.ray_space,
        background=scene.backdrop,
    )


def _pixels(frame: Frame) -> tuple[Pixels, NDArray[np.int32]]:
    picture = np.asarray(frame.read())
    camera = frame.camera
    if picture.dtype != np.uint8:
        bad = np.issubdtype(picture.dtype, np.floating) and not np.isfinite(picture).all()
        what = "holds values that are not numbers" if bad else f"holds {picture.dtype}"
        raise InputError(f"picture {frame.name!r} {what}, bytes were expected")
    if picture.ndim != 3 or picture.shape[2] not in (3, 4) or picture.shape[:2] != (camera.height, camera.width):
        raise InputError(
            f"picture {frame.name!r} is {'x'.join(map(str, picture.shape))} (rows, columns, channels), "
            f"its camera says {camera.height}x{camera.width}"
        )
    count = camera.width * camera.height
    valid = np.arange(count, dtype=np.int32)
    if frame.mask is not None:
        mask = np.asarray(frame.mask())
        if mask.shape != picture.shape[:2]:
            raise InputError(f"the mask of picture {frame.name!r} is {mask.shape}, the picture {picture.shape[:2]}")
        valid = valid[mask.reshape(-1).astype(bool)]
    return picture.reshape(count, -1), valid


def _opaque(pixels: Pixels) -> Pixels:
    """[N, 4]: pictures without opacity are opaque."""
    if pixels.shape[1] == 4:
        return pixels
    return np.concatenate([pixels, np.full_like(pixels[:, :1], 255)], axis=1)


class _Cameras:
    """Rays through pixels of many cameras at once; those that are not plain pinholes are asked one by one."""

    def __init__(self, cameras: Sequence[Camera]) -> None:
        self.cameras = cameras
        self.width = np.array([c.width for c in cameras], dtype=np.int64)
        self.numbers = np.array([(c.fx, c.fy, c.cx, c.cy, c.offset) for c in cameras], dtype=np.float64)
        self.pose = np.array([np.asarray(c.c2w, dtype=np.float64)[:3, :4] for c in cameras])
        self.bent = np.array([not self._plain(k) for k in range(len(cameras))])

    def _plain(self, k: int) -> bool:
        camera = self.cameras[k]
        i = np.array([0.0, camera.width - 1.0, camera.width / 2, 0.0, camera.width - 1.0])
        j = np.array([0.0, 0.0, camera.height / 2, camera.height - 1.0, camera.height - 1.0])
        theirs = camera.rays_at(i, j)
        ours = self._pinhole(np.full(5, k), i, j)
        return all(bool(np.allclose(a, b, atol=1e-6)) for a, b in zip(ours, theirs))

    def _pinhole(
        self, frame: NDArray[np.int64], i: NDArray[np.float64], j: NDArray[np.float64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        fx, fy, cx, cy, offset = self.numbers[frame].T
        local = np.stack([(i + offset - cx) / fx, -(j + offset - cy) / fy, -np.ones_like(i)], axis=-1)
        pose = self.pose[frame]
        d = np.einsum("nij,nj->ni", pose[:, :, :3], local)
        d /= np.linalg.norm(d, axis=-1, keepdims=True)
        return pose[:, :, 3].astype(np.float32), d.astype(np.float32)

    def rays(
        self, frame: NDArray[np.int64], place: NDArray[np.int32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Origins and unit directions [N, 3] through pixel ``place`` = row * width + column of camera ``frame``."""
        j, i = np.divmod(place.astype(np.int64), self.width[frame])
        i, j = i.astype(np.float64), j.astype(np.float64)
        o, d = self._pinhole(frame, i, j)
        if self.bent.any():
            for k in np.unique(frame[self.bent[frame]]):
                mine = frame == k
                o[mine], d[mine] = self.cameras[k].rays_at(i[mine], j[mine])
        return o, d
