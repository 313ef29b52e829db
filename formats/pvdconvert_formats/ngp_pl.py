"""kwea123/ngp_pl ``epoch=N.ckpt`` and ``epoch=N_slim.ckpt`` (layouts section 2.5). Imports no torch.

The colour network's columns are put into instant-ngp's order (density outputs first), so that such a field is also one
that instant-ngp's layout holds. Poses and sizes are those that the program gave the data set; how it moved and scaled
them is in no file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from pvdconvert.cameras import Camera
from pvdconvert.containers import Manifest
from pvdconvert.errors import InputError
from pvdconvert.plugin import (
    ArrayTensor,
    Config,
    FormatBase,
    FormatSpec,
    LazyTensor,
    Match,
    Parts,
    ReadOptions,
)
from pvdconvert.scene import Box, Scene
from pvdconvert_formats import _tcnn as tcnn
from pvdconvert_formats._nerf_layers import assume
from pvdconvert_formats._torch_ngp_grid import GRID, morton

SPEC = FormatSpec(
    name="ngp-pl",
    title="kwea123/ngp_pl: epoch=N.ckpt and epoch=N_slim.ckpt",
    probe="pvdconvert_formats.ngp_pl:probe",
    code="pvdconvert_formats.ngp_pl:NgpPl",
    architectures=("ngp",),
    suffixes=(".ckpt",),
    versions="full and slim checkpoints; not those with learned exposure (use_exposure)",
    verified="known answers of the networks, the grid and the bitfield in float64; the layout's parameter counts",
    program="kwea123/ngp_pl",
    licence="MIT",
)
STEP = math.sqrt(3) / 1024
NEAR = 0.01
LEVELS, FEATURES, TABLE, BASE, DESIRED = 16, 2, 19, 16, 2048
DENSITY, COLOR = tcnn.Mlp(32, 64, 1, 16), tcnn.Mlp(32, 64, 2, 16)
_IGNORED = {"center", "half_size", "density_grid", "grid_coords", "dir_encoder.params"}
_OUTSIDE = {"directions", "poses", "dR", "dT"}


def _split(manifest: Manifest) -> tuple[dict[str, LazyTensor], dict[str, LazyTensor]]:
    """(the network's tensors without "model.", those beside it), of a full or a slim checkpoint."""
    prefix = "state_dict." if "state_dict.model.xyz_encoder.params" in manifest.tensors else ""
    own = {k.removeprefix(prefix): t for k, t in manifest.tensors.items() if k.startswith(prefix)}
    inner = {k.removeprefix("model."): t for k, t in own.items() if k.startswith("model.")}
    return inner, {k: t for k, t in own.items() if not k.startswith("model.")}


def probe(manifest: Manifest) -> Match | None:
    if not manifest.kind.startswith("torch-"):
        return None
    own, _ = _split(manifest)
    if "xyz_encoder.params" not in own:
        return None
    missing = [k for k in ("rgb_net.params", "xyz_min", "xyz_max", "density_bitfield") if k not in own]
    if missing:
        return Match(0.2, f"has model.xyz_encoder.params but not model.{missing[0]}")
    return Match(0.95, "model.xyz_encoder.params, model.rgb_net.params and model.density_bitfield")


def half_sides(scale: float) -> list[float]:
    """Half the side of every cascade of the bitfield."""
    count = max(1 + math.ceil(math.log2(2 * scale)), 1)
    return [min(2.0 ** (c - 1), scale) for c in range(count)]


class NgpPl(FormatBase):
    """Reads full and slim checkpoints."""

    def read(self, manifest: Manifest, options: ReadOptions) -> Parts:
        where = f"{manifest.path}: ngp-pl"
        own, beside = _split(manifest)
        for key in ("xyz_encoder.params", "rgb_net.params", "xyz_min", "xyz_max"):
            if key not in own:
                raise InputError(f"{where}: tensor 'model.{key}' is missing")
        if any(k.startswith("tonemapper_net") for k in own):
            raise InputError(f"{where}: trained with use_exposure: its tone mapper (tonemapper_net) is not supported")
        known = {"xyz_encoder.params", "rgb_net.params", "xyz_min", "xyz_max", "density_bitfield", *_IGNORED}
        for key in sorted(own.keys() - known)[:1]:
            raise InputError(f"{where}: tensor 'model.{key}' has no place in its network")
        box = self._box(own, where)
        scale = box.longest / 2
        growth = float(np.float32(np.exp(np.log(DESIRED * scale / BASE) / (LEVELS - 1))))
        entries = sum(tcnn.level_entries(LEVELS, BASE, growth, TABLE))
        for key, size in (("xyz_encoder", DENSITY.size + entries * FEATURES), ("rgb_net", COLOR.size)):
            if own[f"{key}.params"].shape != (size,):
                raise InputError(
                    f"{where}: model.{key}.params holds {list(own[f'{key}.params'].shape)} numbers, the network "
                    f"of scale {scale:g} has [{size}]"
                )
        vector = tcnn.Vector(own["xyz_encoder.params"])
        tensors: dict[str, LazyTensor] = {}
        for k, piece in enumerate(vector.mlp(DENSITY, 16)):
            tensors[f"sigma_net.{k}.weight"] = piece
        tensors["encoder.embeddings"] = vector.grid(entries, FEATURES)
        directions_last = [*range(16, 32), *range(16)]
        for k, piece in enumerate(tcnn.Vector(own["rgb_net.params"]).mlp(COLOR, 3, directions_last)):
            tensors[f"color_net.{k}.weight"] = piece
        config: Config = {
            "index_rule": "tcnn",
            "levels": LEVELS,
            "features": FEATURES,
            "log2_table": TABLE,
            "base_resolution": BASE,
            "per_level_scale": growth,
            "offsets": None,
            "interpolation": "linear",
            "hidden": 64,
            "density_layers": 1,
            "geo_features": 15,
            "color_hidden": 64,
            "color_layers": 2,
            "sh_bands": 4,
            "color_input": "h+sh",
            "density_activation": "exp",
            "color_activation": "sigmoid",
            "density_scale": 1.0,
            "box": [list(box.min), list(box.max)],
            "mask": None,
        }
        notes: list[str] = []
        if "density_bitfield" in own:
            self._mask(own["density_bitfield"], box, config, tensors, where, notes)
        left = [k for k in beside if k not in _OUTSIDE and not k.startswith(("val_lpips", "optimizer", "lr_sched"))]
        notes += [f"tensor {k} is left out" for k in sorted(left)[:8]]
        # Its test renderer: white where the step is constant (synthetic scenes), else black.
        white = scale <= 0.5
        scene = Scene(
            box,
            background=(1.0, 1.0, 1.0) if white else (0.0, 0.0, 0.0),
            near=NEAR,
            step=STEP,
            cameras=_cameras(beside, notes),
        )
        scene = assume(scene, options, ("background", "near", "step"))
        step = {k: manifest.meta[k] for k in ("epoch", "global_step") if k in manifest.meta}
        return Parts("ngp", config, tensors, scene, {"program": "kwea123/ngp_pl", **step}, tuple(notes))

    @staticmethod
    def _box(own: Mapping[str, LazyTensor], where: str) -> Box:
        ends = []
        for key in ("xyz_min", "xyz_max"):
            if math.prod(own[key].shape) != 3:
                raise InputError(f"{where}: model.{key} is {list(own[key].shape)}, expected [1, 3]")
            ends.append([float(v) for v in own[key].numpy().reshape(-1)])
        (a, b, c), (d, e, f) = ends
        try:
            box = Box((a, b, c), (d, e, f))
        except InputError as error:
            raise InputError(f"{where}: model.xyz_min, model.xyz_max: {error}") from error
        if max(box.size) - min(box.size) > 1e-5 * box.longest or not 1e-3 < box.longest < 1e5:
            raise InputError(f"{where}: its box {box.min} .. {box.max} is no cube of a sensible size")
        return box

    @staticmethod
    def _mask(
        bitfield: LazyTensor,
        box: Box,
        config: Config,
        tensors: dict[str, LazyTensor],
        where: str,
        notes: list[str],
    ) -> None:
        halves = half_sides(box.longest / 2)
        size = len(halves) * GRID**3 // 8
        if bitfield.shape != (size,) or bitfield.dtype != "uint8":
            raise InputError(
                f"{where}: model.density_bitfield is {bitfield.dtype} {list(bitfield.shape)}, expected uint8 [{size}]"
            )
        bits = bitfield.numpy()
        if not bits.any():
            notes.append("density_bitfield is all zero (never updated): ignored")
            return
        if bool((bits == 255).all()):
            return
        cubes = [np.unpackbits(part, bitorder="little")[morton()] for part in bits.reshape(len(halves), -1)]
        if len(halves) == 1:
            origin = [c - halves[0] for c in box.center]
            config["mask"] = {"shape": [GRID] * 3, "origin": origin, "cell": 2 * halves[0] / GRID}
        else:
            config["mask"] = {"shape": [len(halves), *[GRID] * 3], "center": list(box.center), "halves": halves}
        tensors["mask.bits"] = ArrayTensor(np.packbits(np.stack(cubes).reshape(-1), bitorder="little"))


def _cameras(beside: Mapping[str, LazyTensor], notes: list[str]) -> tuple[Camera, ...]:
    """The training cameras: ``poses`` [N, 3, 4] (right, down, forward), and ``directions`` [H * W, 3] of the pixels."""
    poses, rays = beside.get("poses"), beside.get("directions")
    if poses is None or rays is None or poses.shape[1:] != (3, 4) or len(rays.shape) != 2 or rays.shape[1] != 3:
        return ()
    d: Any = rays.numpy().astype(np.float64)
    turns = np.flatnonzero(d[:, 1] != d[0, 1])
    width = int(turns[0]) if len(turns) else 0
    if width < 2 or len(d) % width or d[1, 0] <= d[0, 0] or d[width, 1] <= d[0, 1]:
        notes.append("the pixels' directions are those of no pinhole: cameras left out")
        return ()
    height = len(d) // width
    fx = (width - 1) / (d[width - 1, 0] - d[0, 0])
    fy = (height - 1) / (d[-1, 1] - d[0, 1])
    cx, cy = 0.5 - d[0, 0] * fx, 0.5 - d[0, 1] * fy
    matrices = poses.numpy().astype(np.float64) * [1, -1, -1, 1]
    if not np.isfinite(matrices).all():
        return ()
    return tuple(
        Camera(width, height, fx, fy, cx, cy, tuple(tuple(float(v) for v in row) for row in m)) for m in matrices
    )
