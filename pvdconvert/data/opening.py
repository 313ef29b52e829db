"""A dataset of whatever layout, recognised by what is in it. No torch.

dataset = open_dataset(Path("lego"), downscale=2)
for frame in dataset.split("train"): frame.camera, frame.read()
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pvdconvert.cameras import Camera, load_transforms
from pvdconvert.data import Dataset
from pvdconvert.data.blender import Blender
from pvdconvert.data.common import Fit, Loader, Options
from pvdconvert.data.llff import Llff
from pvdconvert.data.nsvf import Nsvf
from pvdconvert.data.tiny_nerf import TinyNerf
from pvdconvert.data.transforms import Transforms
from pvdconvert.errors import InputError, UnknownError, UsageError
from pvdconvert.scene import Box, Vec3

LOADERS: tuple[Loader, ...] = (Blender(), Llff(), Nsvf(), Transforms(), TinyNerf())
"""Every layout; the order does not matter."""


def open_dataset(
    path: str | Path,
    *,
    kind: str | None = None,
    background: Vec3 | None = None,
    downscale: int = 1,
    holdout: int = 8,
    bounds: Box | None = None,
    offset: float = 0.5,
    ndc: bool | None = None,
) -> Dataset:
    """Open the dataset at ``path``, a folder or a file. Pictures are measured by their headers, not read.

    kind        the layout's name; None = recognise it by content
    background  what lies behind alpha, RGB in [0, 1]; None = white. Not used where the pictures have no alpha
    downscale   1 = as they are; n averages blocks of n x n pixels (2: half resolution). LLFF takes the folder
                ``images_n`` where there is one
    holdout     where the layout has no splits: every so many pictures one is held out as test; 0 = none
    bounds      where the scene is, instead of what the layout says
    offset      where in a pixel its ray passes: 0.5, the centre, in which the pictures were made; 0 for fields of the
                vanilla-NeRF programs, which learned it so (layouts 9.1)
    ndc         LLFF: forward-facing in NDC, or (False) the world; None = NDC where all cameras look one way

    Raises InputError (missing, damaged, contradictory), UnsafeError (names that leave the folder), UnknownError (no
    layout fits, or several do) and UsageError (the arguments).
    """
    path = Path(path)
    if downscale < 1 or downscale > 1024:
        raise UsageError(f"downscale {downscale}: not a number from 1 to 1024")
    if holdout < 0 or holdout == 1:
        raise UsageError(f"holdout {holdout}: every so many pictures one is held out", hint="2 or more, or 0 for none")
    if not 0.0 <= offset <= 1.0:
        raise UsageError(f"offset {offset}: a place in a pixel is from 0 to 1")
    if background is not None and not all(0.0 <= v <= 1.0 for v in background):
        raise UsageError(f"background {background}: colours are from 0 to 1")
    loader = chosen(path, kind)
    try:
        return loader.load(path, Options(background, downscale, holdout, bounds, offset, ndc))
    except OSError as error:
        raise InputError(f"{path}: {loader.name}: {error.strerror or error}") from error


def open_cameras(path: str | Path) -> tuple[Camera, ...]:
    """The cameras to look through at ``path``: all of a transforms file, whose pictures need not be there, or those of
    the train split of a dataset (of all splits where it has none). Raises as :func:`open_dataset` does."""
    path = Path(path)
    if path.suffix.lower() == ".json":
        return load_transforms(path)
    splits = open_dataset(path).splits
    frames = splits.get("train") or tuple(f for frames in splits.values() for f in frames)
    return tuple(f.camera for f in frames)


def fits(path: Path, loaders: Sequence[Loader] = LOADERS) -> list[tuple[Loader, Fit]]:
    """The layouts that fit ``path``, best first."""
    try:
        seen = [(loader, fit) for loader in loaders if (fit := loader.probe(path)) is not None]
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    return sorted(seen, key=lambda pair: -pair[1].score)


def chosen(path: Path, kind: str | None) -> Loader:
    """The loader of ``kind``, or the one that fits best. Raises InputError or UnknownError."""
    try:
        there = path.exists()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}") from error
    if not there:
        raise InputError(f"{path}: no such file or folder", hint="check the path")
    if kind is not None:
        for loader in LOADERS:
            if loader.name == kind:
                return loader
        raise UnknownError(f"{kind}: unknown kind of dataset", hint=f"known: {', '.join(x.name for x in LOADERS)}")
    seen = fits(path)
    if not seen:
        known = "; ".join(loader.title for loader in LOADERS)
        raise UnknownError(f"{path}: no layout of posed pictures fits it", hint=f"known: {known}")
    if len(seen) > 1 and seen[0][1].score == seen[1][1].score:
        equal = [loader for loader, fit in seen if fit.score == seen[0][1].score]
        raise UnknownError(
            f"{path}: is {' or '.join(x.name for x in equal)}, equally well", hint="say which kind it is"
        )
    return seen[0][0]
