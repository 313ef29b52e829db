"""What the loaders of datasets share: the request, how well a layout fits, hold-out, and the last checks. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from pvdconvert.cameras import Array
from pvdconvert.data import Dataset, Frame
from pvdconvert.data.poses import Hints
from pvdconvert.errors import InputError
from pvdconvert.scene import IDENTITY, Box, RaySpace, Vec3

WHITE: Vec3 = (1.0, 1.0, 1.0)
MAX_FRAMES = 100_000
SPLITS = ("train", "val", "test")


class Fit(NamedTuple):
    """How well a layout fits: score in (0, 1], and what was seen."""

    score: float
    reason: str


@dataclasses.dataclass(frozen=True)
class Options:
    """What :func:`pvdconvert.data.opening.open_dataset` was asked for; its docstring says what each entry means."""

    background: Vec3 | None = None
    downscale: int = 1
    holdout: int = 8
    bounds: Box | None = None
    offset: float = 0.5
    ndc: bool | None = None


class Loader(Protocol):
    """One layout. ``probe`` looks and never raises for what it does not know; ``load`` raises the errors."""

    name: str
    title: str

    def probe(self, path: Path) -> Fit | None: ...

    def load(self, path: Path, options: Options) -> Dataset: ...


@dataclasses.dataclass(frozen=True)
class Shot:
    """A frame, what tells its picture from all others (a path, or a number in a file), whether it has alpha, and its
    name as the dataset writes it."""

    frame: Frame
    key: str
    alpha: bool = False
    name: str = ""


def hold_out(shots: Sequence[Shot], options: Options) -> tuple[dict[str, list[Shot]], list[str]]:
    """train and test, every ``holdout``-th to test beginning with the first, as the LLFF programs do; and a note."""
    every = options.holdout
    if every == 0 or len(shots) < 2:
        return {"train": list(shots)}, ["no pictures are held out: there is no test split"]
    test = [s for i, s in enumerate(shots) if i % every == 0]
    train = [s for i, s in enumerate(shots) if i % every]
    note = f"the layout has no splits: every {every}th picture is held out as test ({len(test)} of {len(shots)})"
    return {"train": train, "test": test}, [note]


def finished(
    path: Path,
    kind: str,
    splits: Mapping[str, Sequence[Shot]],
    options: Options,
    hints: Hints,
    notes: Sequence[str] = (),
    ray_space: RaySpace | None = None,
    world: tuple[tuple[float, ...], ...] = IDENTITY,
) -> Dataset:
    """The dataset, after the checks that hold for every layout.

    A picture belongs to one split: train has precedence, then val. Raises InputError where nothing is left, or where
    all cameras stand at one point.
    """
    said = list(notes)
    kept: dict[str, list[Shot]] = {}
    owner: dict[str, str] = {}
    for name in SPLITS:
        shots: list[Shot] = []
        lost: dict[str, int] = {}
        for shot in splits.get(name, ()):
            if shot.key in owner:
                lost[owner[shot.key]] = lost.get(owner[shot.key], 0) + 1
                continue
            owner[shot.key] = name
            shots.append(shot)
        for other, count in lost.items():
            where = "twice in it: counted once" if other == name else f"in {other} as well: left out of {name}"
            said.append(f"split {name}: {_pictures(count)} {where}")
        if name in splits:
            kept[name] = shots
    everything = [s for shots in kept.values() for s in shots]
    if not everything:
        raise InputError(f"{path}: {kind}: there are no pictures in it")
    refuse_one_point(np.stack([s.frame.camera.position for s in everything]), f"{path}: {kind}")
    alpha = any(s.alpha for s in everything)
    if options.background is not None and not alpha:
        said.append("the pictures have no alpha: the background that was asked for is not used")
    return Dataset(
        path,
        kind,
        {name: tuple(s.frame for s in shots) for name, shots in kept.items()},
        options.bounds or hints.box,
        hints.near,
        hints.far,
        ray_space or RaySpace(),
        (options.background or WHITE) if alpha else None,
        tuple(said),
        world,
    )


def refuse_one_point(positions: Array, where: str) -> None:
    """Raise InputError where several cameras have no baseline: ``positions`` [N, 3]."""
    if len(positions) > 1 and np.ptp(positions, axis=0).max() <= 1e-7 * max(1.0, float(np.abs(positions).max())):
        raise InputError(
            f"{where}: all {len(positions)} cameras stand at one point: no depth can be seen from there",
            hint="check the translations of the poses",
        )


def _pictures(count: int) -> str:
    return "1 picture is" if count == 1 else f"{count} pictures are"
