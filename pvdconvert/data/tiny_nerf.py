"""``tiny_nerf_data.npz`` (layouts 9.1): images [N,H,W,3 or 4], poses [N,4,4] OpenGL, focal. No torch, no pickles.

The first 100 views train and the rest test, as in the program; where there are no more than 100, every 8th is held out.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np

from pvdconvert.cameras import Camera
from pvdconvert.containers import open_manifest
from pvdconvert.containers.manifest import sniff
from pvdconvert.data import Dataset, Frame, Pixels
from pvdconvert.data.common import MAX_FRAMES, Fit, Options, Shot, finished, hold_out
from pvdconvert.data.pictures import reduced
from pvdconvert.data.poses import Hints, Straightener, rows, subject, synthetic
from pvdconvert.errors import InputError, PvdError
from pvdconvert.plugin import LazyTensor

TRAIN = 100
MAX_BYTES = 4 << 30
NAMES = ("images", "poses", "focal")


class _Stack:
    """The pictures of the file: unpacked at the first call, kept as bytes."""

    def __init__(self, tensor: LazyTensor, where: str) -> None:
        self.tensor, self.where = tensor, where

    @functools.cached_property
    def pixels(self) -> Pixels:
        raw = self.tensor.numpy()
        if raw.dtype == np.uint8:
            return np.ascontiguousarray(raw)
        out = np.empty(raw.shape, np.uint8)
        for k, image in enumerate(raw):
            if not (np.isfinite(image).all() and image.min() >= -1e-3 and image.max() <= 1 + 1e-3):
                raise InputError(f"{self.where}: images[{k}] leaves [0, 1]")
            out[k] = np.floor(np.clip(image, 0.0, 1.0) * 255.0 + 0.5)
        return out


@dataclasses.dataclass(frozen=True)
class _Slice:
    """One picture of the stack, reduced if asked."""

    stack: _Stack
    index: int
    downscale: int

    def __call__(self) -> Pixels:
        pixels: Pixels = self.stack.pixels[self.index]
        if self.downscale == 1:
            return pixels.copy()
        from PIL import Image

        return np.asarray(reduced(Image.fromarray(pixels), self.downscale))


class TinyNerf:
    """An ``.npz`` file of images, poses and focal, or a folder that holds one."""

    name = "tiny-nerf"
    title = "tiny_nerf_data.npz: images, poses, focal"

    def probe(self, path: Path) -> Fit | None:
        for file in _candidates(path):
            try:
                with file.open("rb") as opened:
                    if sniff(memoryview(opened.read(64))) != "zip":
                        continue
                there = set(open_manifest(file).tensors)
            except (OSError, PvdError):
                continue
            if set(NAMES) <= there:
                return Fit(0.95 if path.is_file() else 0.7, f"{file.name}: arrays images, poses and focal")
        return None

    def load(self, path: Path, options: Options) -> Dataset:
        if path.is_dir():
            able = [f for f in _candidates(path) if self.probe(f)]
            if len(able) != 1:
                raise InputError(f"{path}: tiny-nerf: {len(able)} files of images, poses and focal", hint="name one")
            return dataclasses.replace(self.load(able[0], options), path=path)
        tensors = open_manifest(path).tensors
        for name in NAMES:
            if name not in tensors:
                raise InputError(f"{path}: tiny-nerf: no array {name!r}")
        images, where = tensors["images"], f"{path}: tiny-nerf"
        shape = images.shape
        if len(shape) != 4 or shape[3] not in (3, 4) or images.dtype not in ("float32", "float64", "uint8"):
            raise InputError(f"{where}: images are {images.dtype} {list(shape)}, not [N, H, W, 3]")
        count, height, width = shape[:3]
        if not 0 < count <= MAX_FRAMES or min(height, width) < 1:
            raise InputError(f"{where}: images are {list(shape)}: there are no pictures in it")
        if int(np.prod(shape, dtype=np.float64)) * 8 > MAX_BYTES:
            raise InputError(f"{where}: images of {list(shape)} are too many for one file")
        poses = _array(tensors["poses"], where)
        if poses.ndim != 3 or len(poses) != count:
            raise InputError(f"{where}: {count} images, but poses are {list(poses.shape)}")
        focal = _array(tensors["focal"], where).reshape(-1)
        if focal.size != 1 or not 0 < focal[0] < 1e9:
            raise InputError(f"{where}: focal is no positive number")
        straighten, stack = Straightener(), _Stack(images, where)
        small, f = options.downscale, float(focal[0])
        shots = []
        for k in range(count):
            m = straighten(poses[k], f"{where}: poses[{k}]")
            camera = Camera(width, height, f, f, width / 2, height / 2, rows(m), options.offset)
            shots.append(Shot(Frame(f"{k:03d}", camera.reduced(small), _Slice(stack, k, small)), str(k), shape[3] == 4))
        if count > TRAIN:
            splits = {"train": shots[:TRAIN], "test": shots[TRAIN:]}
            notes = [f"the first {TRAIN} views train, the other {count - TRAIN} test"]
        else:
            splits, notes = hold_out(shots, options)
        cameras = [s.frame.camera for s in shots]
        hints = synthetic(cameras) or Hints(subject(cameras))
        return finished(path, self.name, splits, options, hints, [*notes, *straighten.notes()])


def _candidates(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    try:
        return sorted(p for p in path.iterdir() if p.suffix.lower() == ".npz" and p.is_file())[:16]
    except OSError:
        return []


def _array(tensor: LazyTensor, where: str) -> Any:
    if np.prod(tensor.shape, dtype=np.float64) > 16 * MAX_FRAMES:
        raise InputError(f"{where}: an array of {list(tensor.shape)} where poses were expected")
    return np.asarray(tensor.numpy(), dtype=np.float64)
