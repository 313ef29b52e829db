"""sxyu/svox2 ``ckpt.npz``: Plenoxels (layouts section 4.1). Reads and writes; imports no torch.

Voxel centres carry the values, so the outer vertices of our lattice lie half a voxel inside of the file's box; empty
voxels count as 0, and border values reach to the faces. Positions are in the file's own world: svox2's loader of
Blender scenes scales cameras by 2/3 before training. Density is per unit of that world.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvdconvert.containers import Manifest, npz_writer
from pvdconvert.errors import InputError, RequestError
from pvdconvert.plugin import Config, FormatBase, FormatSpec, LazyTensor, Limits, Match, Parts, ReadOptions
from pvdconvert.scene import Box, Scene, Vec3
from pvdconvert_formats._nerf_layers import assumption_note

SPEC = FormatSpec(
    name="svox2",
    title="sxyu/svox2: ckpt.npz of Plenoxels",
    probe="pvdconvert_formats.svox2:probe",
    code="pvdconvert_formats.svox2:Svox2",
    architectures=("plenoxels",),
    suffixes=(".npz",),
    can_write=True,
    versions="spherical harmonics, any resolution; legacy `data`; the background layers of 360 scenes are left out",
    verified="a file written by svox2 itself, points and views; the formula in float64 on hand-made files",
    program="sxyu/svox2",
    licence="BSD-2-Clause",
)
FIXED: dict[str, Any] = {
    "density_activation": "relu",
    "color_activation": "shift",
    "density_scale": 1.0,
    "missing": "zero",
    "store_dtype": "float16",
}
MAX_BANDS = 3
"""svox2's kernels hold ten coefficients a colour at most."""
EXTRA = "pvdconvert"
"""A member of our own, ignored by svox2, for what the layout cannot say."""
STEP = 0.5
"""Voxels between samples, by the program's default."""
MAX_SIDE = 1 << 14
_BACKGROUND = ("background_links", "background_data")
_KNOWN = {"radius", "center", "links", "density_data", "sh_data", "data", "basis_type", EXTRA, *_BACKGROUND}
_BASES = {4: "a learned texture (basis_data)", 255: "a small network (basis_mlp)"}


def probe(manifest: Manifest) -> Match | None:
    if manifest.kind != "npz" or "links" not in manifest.tensors:
        return None
    t = manifest.tensors
    tables = [k for k in ("density_data", "sh_data") if k in t] or [k for k in ("data",) if k in t]
    if tables not in (["density_data", "sh_data"], ["data"]) or len(t["links"].shape) != 3:
        return Match(0.1, "links, but without density_data and sh_data")
    if any(len(t[k].shape) != 2 for k in tables):
        return Match(0.1, f"links, but {tables[0]} is not a table")
    return Match(0.95, f"links {list(t['links'].shape)} with {' and '.join(tables)}")


@dataclasses.dataclass
class Links:
    """The index grid, read once: which voxels exist and in which row each one's values stand."""

    where: str
    tensor: LazyTensor
    rows: int

    @functools.cached_property
    def used(self) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        """(places in C order, their rows or None if those count up from 0 to the end)."""
        flat = self.tensor.numpy().reshape(-1)
        places = np.flatnonzero(flat >= 0)
        rows = flat[places].astype(np.int64)
        if len(rows) and rows.max() >= self.rows:
            raise InputError(f"{self.where}: 'links' names row {rows.max()}, the tables have {self.rows}")
        if len(rows) == self.rows and np.array_equal(rows, np.arange(self.rows)):
            return places, None
        return places, rows

    def vertices(self) -> NDArray[Any]:
        shape = self.tensor.shape
        small = np.int16 if max(shape) <= 1 << 15 else np.int32
        return np.stack(np.unravel_index(self.used[0], shape), -1).astype(small)

    def gather(self, table: NDArray[Any]) -> NDArray[Any]:
        rows = self.used[1]
        return table if rows is None else table[rows]


@dataclasses.dataclass(frozen=True)
class Lazy:
    """``make()`` on demand. ``shape`` is that of the file's table: rows that no voxel links are left out on reading."""

    shape: tuple[int, ...]
    dtype: str
    make: Callable[[], NDArray[Any]]

    def numpy(self) -> NDArray[Any]:
        return self.make()


class Svox2(FormatBase):
    """Reads files with spherical harmonics; writes what ``SparseGrid.load`` opens."""

    def read(self, manifest: Manifest, options: ReadOptions) -> Parts:
        where = f"{manifest.path}: svox2"
        t = manifest.tensors
        _refuse_bases(where, manifest)
        density, sh = _tables(where, t)
        links = t.get("links")
        if links is None or len(links.shape) != 3 or not links.dtype.startswith("int"):
            raise InputError(f"{where}: 'links' is missing or no grid of integers")
        shape = (links.shape[0], links.shape[1], links.shape[2])
        if not all(2 <= n <= MAX_SIDE for n in shape):
            raise InputError(f"{where}: 'links' has shape {list(shape)}: sides of 2..{MAX_SIDE} are possible")
        bands = round((sh.shape[1] / 3) ** 0.5)
        if sh.shape[1] != 3 * bands**2 or not 1 <= bands <= 5:
            raise InputError(f"{where}: {sh.shape[1]} coefficients a voxel are no spherical harmonics of three colours")
        radius, center = _vector(where, t, "radius", 1.0), _vector(where, t, "center", 0.0)
        if min(radius) <= 0:
            raise InputError(f"{where}: 'radius' is {list(radius)}: expected positive numbers")
        box, scene = _space(radius, center, shape)
        scene, box = _unsaid(where, manifest, scene, box)
        given = {"background": options.background, "near": options.near, "far": options.far}
        changes: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        scene = dataclasses.replace(scene, **changes, assumed=tuple(a for a in scene.assumed if a not in changes))
        half = sh.dtype == "float16"
        grid = Links(where, links, density.shape[0])
        count = density.shape[0]
        tensors: dict[str, LazyTensor] = {
            "vertices": Lazy((count, 3), "int16", grid.vertices),
            "density_data": Lazy((count, 1), "float32", lambda: grid.gather(density.numpy()).astype(np.float32)),
            "sh_data": Lazy(
                (count, sh.shape[1]),
                "float16" if half else "float32",
                lambda: grid.gather(sh.numpy()).astype(np.float16 if half else np.float32, copy=False),
            ),
        }
        config: Config = {
            **FIXED,
            "store_dtype": "float16" if half else "float32",
            "resolution": max(shape),
            "bands": bands,
            "box": box.to_json(),
            "shape": list(shape),
        }
        return Parts("plenoxels", config, tensors, scene, {"program": "sxyu/svox2"}, _notes(t, radius, scene))

    def limits(self, architecture: str) -> Limits:
        # No more bands than svox2's kernels hold: the planner's own default (3) fits; fewer are possible.
        return Limits(FIXED, {"bands": MAX_BANDS})

    def write(self, parts: Parts, path: Path) -> None:
        """The scene's box must hold the lattice with half a voxel around it: that is svox2's box."""
        where = f"{path}: svox2"
        config = parts.config
        if parts.architecture != "plenoxels":
            raise RequestError(f"{where}: holds plenoxels, not {parts.architecture}", hint="add --to plenoxels")
        for key, value in FIXED.items():
            if config.get(key) != value:
                raise RequestError(
                    f"{where}: the layout only holds {key} = {value}, this field has {config.get(key)}",
                    hint="convert --to plenoxels --as svox2 trains one that fits",
                )
        if not 1 <= config["bands"] <= MAX_BANDS:
            raise RequestError(
                f"{where}: svox2 holds up to {MAX_BANDS} bands of harmonics, this field has {config['bands']}",
                hint=f"--set bands={MAX_BANDS}",
            )
        shape, box = tuple(int(n) for n in config["shape"]), Box.from_json(config["box"])
        radius = np.array([s / 2 * n / (n - 1) for s, n in zip(box.size, shape)], np.float32)
        center = np.array(box.center, np.float32)
        derived, scene = _space(_vec(radius), _vec(center), (shape[0], shape[1], shape[2]))
        slack = 1e-5 * scene.box.longest
        mine, theirs = parts.scene.box, scene.box
        if any(a < b - slack for a, b in zip(theirs.min, mine.min)) or any(
            a > b + slack for a, b in zip(theirs.max, mine.max)
        ):
            raise RequestError(
                f"{where}: the lattice with half a voxel around it, {theirs.min} .. {theirs.max}, leaves the scene's "
                f"box {mine.min} .. {mine.max}",
                hint="convert --to plenoxels --as svox2 plans one that fits",
            )
        arrays = {k: t.numpy() for k, t in parts.tensors.items()}
        vertices = arrays["vertices"].astype(np.int64)
        links = np.full(shape, -1, np.int32)
        links[vertices[:, 0], vertices[:, 1], vertices[:, 2]] = np.arange(len(vertices), dtype=np.int32)
        out: dict[str, NDArray[Any]] = {
            "radius": radius,
            "center": center,
            "links": links,
            "density_data": arrays["density_data"].astype(np.float32),
            "sh_data": arrays["sh_data"].astype(np.float16),
            "basis_type": np.array(1),
        }
        if (derived, scene) != (box, parts.scene):
            said = {"box": box.to_json(), "scene": parts.scene.to_json()}
            out[EXTRA] = np.array(json.dumps(said, sort_keys=True).encode("ascii"))
        npz_writer.write(path, out, deflate={"links"})


def _vec(values: Any) -> Vec3:
    x, y, z = (float(v) for v in values)
    return (x, y, z)


def _space(radius: Vec3, center: Vec3, shape: tuple[int, int, int]) -> tuple[Box, Scene]:
    """(box between the outer voxel centres, scene) of a file."""
    half = _vec(r * (1 - 1 / n) for r, n in zip(radius, shape))
    box = Box(_vec(c - h for c, h in zip(center, half)), _vec(c + h for c, h in zip(center, half)))
    outer = Box(_vec(c - r for c, r in zip(center, radius)), _vec(c + r for c, r in zip(center, radius)))
    step = STEP * sum(2 * r / n for r, n in zip(radius, shape)) / 3
    return box, Scene(outer, background=(1.0, 1.0, 1.0), step=step, assumed=("background", "step"))


def _unsaid(where: str, manifest: Manifest, scene: Scene, box: Box) -> tuple[Scene, Box]:
    """What our own writer added."""
    if not isinstance(manifest.tree, dict) or EXTRA not in manifest.tree:
        return scene, box
    try:
        said = json.loads(manifest.tree[EXTRA])
        return Scene.from_json(said["scene"]), Box.from_json(said["box"])
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError, InputError) as error:
        raise InputError(f"{where}: member {EXTRA!r} is damaged: {error}") from error


def _vector(where: str, tensors: Mapping[str, LazyTensor], key: str, default: float) -> Vec3:
    if key not in tensors:
        return (default, default, default)
    values = tensors[key].numpy().reshape(-1).astype(np.float64)
    if values.shape != (3,) or not np.isfinite(values).all():
        raise InputError(f"{where}: {key!r} is not three finite numbers")
    return _vec(values)


def _refuse_bases(where: str, manifest: Manifest) -> None:
    """Only spherical harmonics can be held; what has no place in the layout is no svox2 file."""
    t = manifest.tensors
    kind = 4 if "basis_data" in t else 1
    if "basis_type" in t and kind == 1:
        value = t["basis_type"].numpy()
        if value.size != 1 or not np.isfinite(value).all():
            raise InputError(f"{where}: 'basis_type' is not one number")
        kind = int(value.reshape(-1)[0])
    if kind != 1:
        raise InputError(
            f"{where}: its colours are in the basis of {_BASES.get(kind, f'type {kind}')}: only spherical harmonics "
            "are read",
            hint="train it with --basis_type sh",
        )
    names = manifest.tree if isinstance(manifest.tree, dict) else t
    for key in names:
        if key not in _KNOWN:
            raise InputError(f"{where}: member {key!r} has no place in a Plenoxels file")


def _tables(where: str, t: Mapping[str, LazyTensor]) -> tuple[LazyTensor, LazyTensor]:
    """(density [N, 1], harmonics [N, 3 B]); old files hold both in one table, density first."""
    if "data" in t:
        both = t["data"]
        if len(both.shape) != 2 or both.shape[1] < 4:
            raise InputError(f"{where}: 'data' has shape {list(both.shape)}, expected [N, 1 + 3 B]")
        n, width = both.shape
        return (
            Lazy((n, 1), both.dtype, lambda: both.numpy()[:, :1]),
            Lazy((n, width - 1), both.dtype, lambda: both.numpy()[:, 1:]),
        )
    for key in ("density_data", "sh_data"):
        if key not in t:
            raise InputError(f"{where}: {key!r} is missing", hint="is the file complete?")
        if len(t[key].shape) != 2 or not t[key].dtype.startswith("float"):
            raise InputError(f"{where}: {key!r} is {t[key].dtype} {list(t[key].shape)}, expected a table of numbers")
    density, sh = t["density_data"], t["sh_data"]
    if density.shape != (sh.shape[0], 1):
        raise InputError(f"{where}: 'density_data' has shape {list(density.shape)}, expected {[sh.shape[0], 1]}")
    return density, sh


def _notes(t: Mapping[str, LazyTensor], radius: Vec3, scene: Scene) -> tuple[str, ...]:
    notes = list(assumption_note(scene))
    if "background_data" in t:
        layers = t["background_data"].shape[1] if len(t["background_data"].shape) == 3 else "some"
        notes.append(f"its background ({layers} layers around the box) is left out: only the inside of the box is read")
    if radius[2] == 1.0 and radius[0] > 1.0 and radius[1] > 1.0:
        notes.append(
            f"a box of half sides {[round(r, 3) for r in radius]} is that of a forward-facing scene: its space is then "
            "NDC, which is treated as an ordinary world"
        )
    return tuple(notes)
