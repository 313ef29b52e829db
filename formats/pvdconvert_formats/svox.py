"""sxyu/svox ``tree.npz``: PlenOctree, an N^3-tree (layouts section 4.2). Reads and writes; imports no torch.

Leaves hold constant values: density (relu, per world unit) last, colours before a sigmoid. The softplus and the padding
of colours that svox's renderer offers are options of its user and not in the file: they are off here, as in volrend.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
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
    name="svox",
    title="sxyu/svox and PlenOctree: tree.npz, an octree of constant leaves",
    probe="pvdconvert_formats.svox:probe",
    code="pvdconvert_formats.svox:Svox",
    architectures=("plenoctree",),
    suffixes=(".npz",),
    can_write=True,
    versions="SH, SG, ASG, RGBA leaves, any branching; old files without format or with one radius; not quantised",
    verified="a file written by svox itself, points and views; the formula in float64 on hand-made files",
    program="sxyu/svox",
    licence="BSD-2-Clause",
    pixel_offset=0.0,
)
EXTRA = "pvdconvert"
"""A member of our own, ignored by svox, for what the layout cannot say."""
DEPTH_LIMIT = 10
"""svox's own default."""
_VECTORS = ("invradius3", "invradius", "offset")
_UNUSED = {"data_dim", "parent_depth", "n_internal", "n_free", "depth_limit", "geom_resize_fact"}
"""What follows from the tree, or does nothing to what it answers."""
_KNOWN = {"child", "data", "data_format", "extra_data", EXTRA, *_VECTORS, *_UNUSED}
_QUANTISED = ("quant_colors", "quant_map", "data_retained")


def probe(manifest: Manifest) -> Match | None:
    if manifest.kind != "npz" or "child" not in manifest.tensors:
        return None
    t = manifest.tensors
    if any(k in t for k in _QUANTISED):
        return Match(0.8, "child with quantised colours: a compressed PlenOctree")
    if "data" not in t or len(t["child"].shape) != 4 or len(t["data"].shape) != 5:
        return Match(0.1, "child, but without data [n, N, N, N, D]")
    return Match(0.95, f"child {list(t['child'].shape)} with data {list(t['data'].shape)}")


class Svox(FormatBase):
    """Reads trees of any of svox's data formats; writes what ``N3Tree.load`` opens."""

    def read(self, manifest: Manifest, options: ReadOptions) -> Parts:
        where = f"{manifest.path}: svox"
        t = manifest.tensors
        for key in _QUANTISED:
            if key in t:
                raise InputError(
                    f"{where}: {key!r}: its colours are quantised for volrend: not read", hint="use the tree before it"
                )
        for key in ("child", "data"):
            if key not in t:
                raise InputError(f"{where}: {key!r} is missing", hint="is the file complete?")
        for key in manifest.tree if isinstance(manifest.tree, dict) else t:
            if key not in _KNOWN:
                raise InputError(f"{where}: member {key!r} has no place in a PlenOctree file")
        child, data = t["child"], t["data"]
        shape = child.shape
        cube = len(shape) == 4 and len({*shape[1:]}) == 1 and shape[0] >= 1 and shape[1] >= 2
        if not cube or not child.dtype.startswith("int"):
            raise InputError(f"{where}: 'child' is {child.dtype} {list(shape)}, expected integers [n, N, N, N]")
        if len(data.shape) != 5 or data.shape[:4] != shape or not data.dtype.startswith("float"):
            raise InputError(f"{where}: 'data' is {data.dtype} {list(data.shape)}, expected numbers {[*shape, 'D']}")
        kind = _data_format(where, manifest, data.shape[4])
        invradius, offset = _placement(where, t)
        box = _box(invradius, offset)
        half = data.dtype == "float16"
        config: Config = {
            "resolution": shape[1] ** _levels(where, t, shape),
            "data_format": kind,
            "store_dtype": "float16" if half else "float32",
            "branching": shape[1],
            "offset": list(offset),
            "invradius3": list(invradius),
        }
        tensors: dict[str, LazyTensor] = {"child": child, "data": data}
        if kind.startswith(("SG", "ASG")):
            if "extra_data" not in t:
                raise InputError(f"{where}: 'extra_data' is missing: {kind} leaves need their lobes")
            tensors["extra_data"] = t["extra_data"]
        scene = Scene(box, background=(1.0, 1.0, 1.0), assumed=("background",))
        scene = _unsaid(where, manifest, scene)
        given = {"background": options.background, "near": options.near, "far": options.far}
        changes: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        scene = dataclasses.replace(scene, **changes, assumed=tuple(a for a in scene.assumed if a not in changes))
        return Parts("plenoctree", config, tensors, scene, {"program": "sxyu/svox"}, assumption_note(scene))

    def limits(self, architecture: str) -> Limits:
        return Limits({"store_dtype": "float16"})

    def write(self, parts: Parts, path: Path) -> None:
        where = f"{path}: svox"
        config = parts.config
        if parts.architecture != "plenoctree":
            raise RequestError(f"{where}: holds plenoctree, not {parts.architecture}", hint="add --to plenoctree")
        if config["store_dtype"] != "float16":
            raise RequestError(
                f"{where}: svox stores float16, this field has {config['store_dtype']}",
                hint="convert --to plenoctree --as svox makes one that fits",
            )
        arrays = {k: t.numpy() for k, t in parts.tensors.items()}
        child = arrays["child"].astype(np.int32)
        parent_depth, depth = hang(child)
        invradius, offset = (np.array(config[k], np.float32) for k in ("invradius3", "offset"))
        free = int((parent_depth[:, 0] == -1).sum())
        out: dict[str, NDArray[Any]] = {
            "data_dim": np.array(arrays["data"].shape[4]),
            "child": child,
            "parent_depth": parent_depth,
            "n_internal": np.array(len(child)),
            "n_free": np.array(free),
            "invradius3": invradius,
            "offset": offset,
            "depth_limit": np.array(max(DEPTH_LIMIT, depth)),
            "geom_resize_fact": np.array(1.0),
            "data": arrays["data"].astype(np.float16),
            "data_format": np.array(config["data_format"]),
        }
        if "extra_data" in arrays:
            out["extra_data"] = arrays["extra_data"].astype(np.float32)
        derived = Scene(_box(_vec(invradius), _vec(offset)), background=(1.0, 1.0, 1.0), assumed=("background",))
        if derived != parts.scene:
            out[EXTRA] = np.array(json.dumps(parts.scene.to_json(), sort_keys=True).encode("ascii"))
        npz_writer.write(path, out, deflate={"child", "data", "parent_depth"})


def hang(child: NDArray[np.int32]) -> tuple[NDArray[np.int32], int]:
    """(svox's ``parent_depth`` [n, 2], the deepest): the row of the cell on which each node hangs, and its depth.

    The root has 0, 0; nodes that hang on nothing -1, -1. The tree must be sound.
    """
    count = len(child)
    flat = child.reshape(count, -1).astype(np.int64)
    out = np.full((count, 2), -1, np.int32)
    out[0] = 0
    level, depth = np.zeros(1, np.int64), 0
    while True:
        where, cell = np.nonzero(flat[level])
        if not len(where):
            return out, depth
        depth += 1
        parent = level[where]
        below = parent + flat[parent, cell]
        out[below, 0] = parent * flat.shape[1] + cell
        out[below, 1] = depth
        level = below


def _vec(values: Any) -> Vec3:
    x, y, z = (float(v) for v in values)
    return (x, y, z)


def _box(invradius: Vec3, offset: Vec3) -> Box:
    low = _vec(-o / i for o, i in zip(offset, invradius))
    return Box(low, _vec((1 - o) / i for o, i in zip(offset, invradius)))


def _placement(where: str, t: Mapping[str, LazyTensor]) -> tuple[Vec3, Vec3]:
    """(invradius3, offset); old files have one number for the former."""
    key = "invradius3" if "invradius3" in t else "invradius"
    for name in (key, "offset"):
        if name not in t:
            raise InputError(f"{where}: {name!r} is missing", hint="is the file complete?")
    inverse = t[key].numpy().astype(np.float32).reshape(-1)
    offset = t["offset"].numpy().astype(np.float32).reshape(-1)
    inverse = np.broadcast_to(inverse, (3,)) if inverse.shape == (1,) else inverse
    if inverse.shape != (3,) or not (np.isfinite(inverse).all() and (inverse > 0).all()):
        raise InputError(f"{where}: {key!r} is not three positive numbers")
    offset = np.broadcast_to(offset, (3,)) if offset.shape == (1,) else offset
    if offset.shape != (3,) or not np.isfinite(offset).all():
        raise InputError(f"{where}: 'offset' is not three finite numbers")
    return _vec(inverse), _vec(offset)


def _data_format(where: str, manifest: Manifest, width: int) -> str:
    """As svox names it; told from the width where an old file does not say."""
    said = manifest.tree.get("data_format") if isinstance(manifest.tree, dict) else None
    if said is None:
        said = "RGBA" if width == 4 else f"SH{(width - 1) // 3}"
    match = re.fullmatch(r"(RGBA)|(?:SH|SG|ASG)([1-9]\d{0,2})", said) if isinstance(said, str) else None
    if match is None:
        raise InputError(f"{where}: 'data_format' {said!r:.40} is unknown: RGBA, SH#, SG# and ASG# are read")
    expected = 4 if match[1] else 3 * int(match[2]) + 1
    if width != expected:
        raise InputError(f"{where}: leaves of {width} numbers are not {said}, which has {expected}")
    if said.startswith("SH") and said not in ("SH1", "SH4", "SH9", "SH16", "SH25"):
        raise InputError(f"{where}: 'data_format' {said!r}: harmonics come in 1, 4, 9, 16 or 25")
    return str(said)


def _levels(where: str, t: Mapping[str, LazyTensor], shape: tuple[int, ...]) -> int:
    """Levels of the tree, from the small table of depths where there is one: for information only."""
    if "parent_depth" in t and t["parent_depth"].shape == (shape[0], 2) and "int" in t["parent_depth"].dtype:
        depth = int(t["parent_depth"].numpy()[:, 1].max())
    else:
        depth = 0
        while shape[1] ** (3 * depth) < shape[0]:
            depth += 1
    return int(min(max(depth + 1, 1), 13 // (shape[1] - 1).bit_length()))


def _unsaid(where: str, manifest: Manifest, scene: Scene) -> Scene:
    """What our own writer added."""
    if not isinstance(manifest.tree, dict) or EXTRA not in manifest.tree:
        return scene
    try:
        return Scene.from_json(json.loads(manifest.tree[EXTRA]))
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError, InputError) as error:
        raise InputError(f"{where}: member {EXTRA!r} is damaged: {error}") from error
