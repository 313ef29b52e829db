"""LLFF's ``poses_bounds.npy`` (layouts 9.2): forward-facing scenes in NDC, and inward-facing ones. No torch.

[N, 17]: a 3x5 matrix [R | t | (height, width, focal)] whose rotation columns are down, right, back, then the nearest
and farthest depth. As in the LLFF programs: divided by 0.75 of the nearest depth, recentred on the average pose; then
NDC with the near plane at 1, or, for cameras that look inward, a sphere of radius 1 around what they look at.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pvdconvert.cameras import Array, Camera
from pvdconvert.containers import open_manifest
from pvdconvert.data import Dataset, Frame
from pvdconvert.data.common import MAX_FRAMES, Fit, Options, Shot, finished, hold_out, refuse_one_point
from pvdconvert.data.documents import folder_files
from pvdconvert.data.pictures import SUFFIXES, Header, Picture, expect_size, header
from pvdconvert.data.poses import Hints, Straightener, rows
from pvdconvert.errors import InputError, PvdError, UsageError
from pvdconvert.scene import Box, RaySpace

NAME = "poses_bounds.npy"
BD_FACTOR = 0.75
ONE_WAY = 0.5
"""Least cosine between a camera and the average one of a forward-facing scene."""


class Llff:
    """A folder of ``poses_bounds.npy`` and ``images`` or ``images_N``; or that file."""

    name = "llff"
    title = "LLFF: poses_bounds.npy, images/ or images_8/"

    def probe(self, path: Path) -> Fit | None:
        file = path / NAME if path.is_dir() else path
        if file.name != NAME or not file.is_file():
            return None
        try:
            tensors = open_manifest(file).tensors
        except PvdError:
            return Fit(0.5, f"{NAME}, damaged")
        shape = next(iter(tensors.values())).shape if len(tensors) == 1 else ()
        if len(shape) == 2 and shape[1] == 17:
            return Fit(0.93, f"{NAME}: {shape[0]} poses with bounds")
        return Fit(0.5, f"{NAME}, but of shape {list(shape)}")

    def load(self, path: Path, options: Options) -> Dataset:
        folder = path if path.is_dir() else path.absolute().parent
        file = folder / NAME
        table = _table(file)
        straighten = Straightener()
        stored = table[:, :15].reshape(-1, 3, 5)
        poses = np.stack([straighten(m, f"{file}: pose {k}") for k, m in enumerate(_opengl(stored[:, :, :4]))])
        refuse_one_point(poses[:, :, 3], f"{path}: {self.name}")
        chosen = _pictures(folder, len(poses), options.downscale)
        near = float(table[:, 15].min())
        if near <= 0 or float(table[:, 16].max()) <= near:
            raise InputError(f"{file}: depths from {near:.4g} to {table[:, 16].max():.4g}: not those of a scene")
        scale = 1.0 / (near * BD_FACTOR)
        poses[:, :, 3] *= scale
        bounds = table[:, 15:] * scale
        poses = recentred(poses)
        shots = self._shots(stored, poses, chosen, options, file)
        cameras = [s.frame.camera for s in shots]
        forward = bool((poses[:, 2, 2] >= ONE_WAY).all())
        able = all((_corners(c)[1][:, 2] < -1e-3).all() for c in cameras)
        if options.ndc and not able:
            raise UsageError(f"{path}: llff: NDC was asked for, but the cameras do not look one way", hint="ndc=False")
        ndc = forward and able if options.ndc is None else options.ndc
        notes = [*chosen.notes, *straighten.notes()]
        if not forward and not ndc:
            poses, bounds = spherified(poses, bounds)
            shots = self._shots(stored, poses, chosen, options, file)
            cameras = [s.frame.camera for s in shots]
            notes.append("the cameras look inward: recentred on what they look at, at a mean distance of 1")
        splits, held = hold_out(shots, options)
        if ndc:
            c = cameras[0]
            space = RaySpace("ndc", float(c.width), float(c.height), c.fx, 1.0)
            hints = Hints(ndc_box(cameras), 0.0, 1.0)
        else:
            space = RaySpace()
            box = Box.cube(1.0) if not forward else _seen(cameras, float(bounds.max()))
            hints = Hints(box, 0.9 * float(bounds.min()), float(bounds.max()))
        return finished(path, self.name, splits, options, hints, [*held, *notes], space)

    def _shots(self, stored: Array, poses: Array, chosen: _Chosen, options: Options, file: Path) -> list[Shot]:
        shots = []
        for k, (picture, m) in enumerate(zip(chosen.files, poses)):
            size = header(picture)
            height, width, focal = (float(v) for v in stored[k, :, 4])
            if not (0 < focal < 1e9 and 1 <= width < 1e6 and 1 <= height < 1e6):
                raise InputError(f"{file}: pose {k}: a picture of {width} x {height} and focal length {focal}")
            expect_size(picture, (size.width, size.height), (chosen.first.width, chosen.first.height))
            factor = _reduction(picture, (width, height), size, chosen.factor)
            f = focal / factor
            camera = Camera(size.width, size.height, f, f, size.width / 2, size.height / 2, rows(m), options.offset)
            read = Picture(picture, (size.width, size.height), chosen.shrink)
            shots.append(
                Shot(Frame(picture.stem, camera.reduced(chosen.shrink), read), str(picture.resolve()), size.alpha)
            )
        return shots


class _Chosen(NamedTuple):
    """The pictures: the folder's factor, how much they are still to be reduced, and the first one's header."""

    files: list[Path]
    factor: int
    shrink: int
    first: Header
    notes: list[str]


def _table(file: Path) -> Array:
    tensors = open_manifest(file).tensors
    shape = next(iter(tensors.values())).shape if len(tensors) == 1 else ()
    if len(shape) != 2 or shape[1] != 17 or not 0 < shape[0] <= MAX_FRAMES:
        raise InputError(f"{file}: llff: an array of {list(shape)}, not [N, 17] poses with bounds")
    table = np.array(next(iter(tensors.values())).numpy(), dtype=np.float64)
    if not np.isfinite(table).all():
        raise InputError(f"{file}: llff: not all numbers are finite")
    return table


def _opengl(stored: Array) -> Array:
    """right, up, back, t of down, right, back, t."""
    return np.stack([stored[:, :, 1], -stored[:, :, 0], stored[:, :, 2], stored[:, :, 3]], -1)


def _pictures(folder: Path, count: int, downscale: int) -> _Chosen:
    """The folder of pictures to read. ``downscale`` counts from the largest pictures that are there."""
    there: dict[int, Path] = {}
    for entry in folder.iterdir():
        match = re.fullmatch(r"images(?:_(\d{1,3}))?", entry.name)
        if match and entry.is_dir() and int(match[1] or 1) > 0 and folder_files(entry, SUFFIXES):
            there[int(match[1] or 1)] = entry
    if not there:
        raise InputError(f"{folder}: llff: no pictures in images/ or images_N/")
    largest = min(there)
    factor = max(f for f in there if largest * downscale % f == 0)
    shrink = largest * downscale // factor
    files = folder_files(there[factor], SUFFIXES)
    if len(files) != count:
        raise InputError(
            f"{there[factor]}: {len(files)} pictures, but {NAME} has {count} poses", hint="one picture a pose, by name"
        )
    first = header(files[0])
    notes = [f"pictures of {there[factor].name}/" + (f", reduced {shrink} times" if shrink > 1 else "")]
    return _Chosen(files, factor, shrink, first, notes)


def _reduction(picture: Path, full: tuple[float, float], size: Header, factor: int) -> float:
    """How many times smaller than the posed picture this one is: the folder's factor, if the sizes agree with it."""
    across, down = full[0] / size.width, full[1] / size.height
    if abs(across / down - 1) > 0.02 + 1.0 / min(size.width, size.height):
        raise InputError(
            f"{picture}: the picture is {size.width} x {size.height}, its pose is of one {full[0]:g} x {full[1]:g}",
            hint="another shape: the poses belong to other pictures",
        )
    return float(factor) if abs(across / factor - 1) < 0.02 + 1.0 / min(size.width, size.height) else across


def average(poses: Array) -> Array:
    """The average pose [3, 4]: mean position, summed back vectors, up as nearly as can be the summed up vectors."""
    back = poses[:, :, 2].sum(0)
    up = poses[:, :, 1].sum(0)
    side = np.cross(up, back)
    if np.linalg.norm(back) < 1e-9 or np.linalg.norm(side) < 1e-9:
        raise InputError("llff: the cameras have no average direction")
    back = back / np.linalg.norm(back)
    side = side / np.linalg.norm(side)
    return np.stack([side, np.cross(back, side), back, poses[:, :, 3].mean(0)], -1)


def _seen_from(frame: Array, poses: Array) -> Array:
    """``poses`` in the coordinates of the camera ``frame``: its inverse times each."""
    out = np.einsum("ji,njk->nik", frame[:, :3], poses)
    out[:, :, 3] -= frame[:, :3].T @ frame[:, 3]
    return np.asarray(out)


def recentred(poses: Array) -> Array:
    """[N, 3, 4]: the average pose becomes the identity."""
    return _seen_from(average(poses), poses)


def spherified(poses: Array, bounds: Array) -> tuple[Array, Array]:
    """Poses and bounds around the point that the cameras look at, up along +z, root mean square distance 1."""
    o, d = poses[:, :, 3], poses[:, :, 2]
    planes = np.eye(3) - d[:, :, None] * d[:, None, :]
    total = planes.sum(0)
    if np.linalg.eigvalsh(total)[0] < 1e-6 * len(poses):
        raise InputError("llff: the cameras look at no common point", hint="ndc=True for a forward-facing scene")
    center = np.linalg.solve(total, np.einsum("nij,nj->i", planes, o))
    up = (o - center).mean(0)
    if np.linalg.norm(up) < 1e-9:
        up = np.array([0.0, 0.0, 1.0])
    up = up / np.linalg.norm(up)
    # An arbitrary vector, the same as in the programs, so that fields trained by them lie in the same world.
    first = np.cross((0.1, 0.2, 0.3), up)
    if np.linalg.norm(first) < 1e-6:
        first = np.cross((0.3, 0.1, 0.2), up)
    first = first / np.linalg.norm(first)
    moved = _seen_from(np.stack([first, np.cross(up, first), up, center], -1), poses)
    scale = 1.0 / float(np.sqrt((moved[:, :, 3] ** 2).sum(-1).mean()))
    moved[:, :, 3] *= scale
    return moved, bounds * scale


def _corners(camera: Camera) -> tuple[Array, Array]:
    edge = np.array([-0.5, camera.width - 0.5])
    i, j = np.meshgrid(edge, np.array([-0.5, camera.height - 0.5]))
    o, d = camera.rays_at(i.reshape(-1), j.reshape(-1))
    return o.astype(np.float64), d.astype(np.float64)


def ndc_box(cameras: list[Camera]) -> Box:
    """What the cameras see of the space warped by the first: all rays between the near plane at 1 and infinity."""
    across = np.array([-2 * cameras[0].fx / cameras[0].width, -2 * cameras[0].fx / cameras[0].height])
    ends = []
    for camera in cameras:
        o, d = _corners(camera)
        p = o - ((1.0 + o[:, 2]) / d[:, 2])[:, None] * d
        ends += [across * p[:, :2] / p[:, 2:], across * d[:, :2] / d[:, 2:]]
    reach = np.concatenate(ends)
    low, high = reach.min(0) - 1e-3, reach.max(0) + 1e-3
    return Box((float(low[0]), float(low[1]), -1.0), (float(high[0]), float(high[1]), 1.0))


def _seen(cameras: list[Camera], far: float) -> Box:
    """What the cameras see up to ``far``."""
    ends = [c.position[None] for c in cameras]
    for camera in cameras:
        o, d = _corners(camera)
        ends.append(o + far * d)
    reach = np.concatenate(ends)
    low, high = ([float(v) for v in e] for e in (reach.min(0), reach.max(0)))
    return Box((low[0], low[1], low[2]), (high[0], high[1], high[2]))
