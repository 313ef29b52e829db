"""Writes TensoRF's ``.th``, so that ``eval(model_name)(**kwargs)`` and ``load`` open it (layouts 3.6). No torch."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvdconvert.containers import torch_zip_writer
from pvdconvert.errors import RequestError
from pvdconvert.plugin import Config, Parts
from pvdconvert.scene import Box

EXTRA = "pvdconvert"
"""A top-level entry of our own, ignored by the program, for what the layout cannot say."""
PROGRAM: Mapping[str, Any] = {
    "density_activation": "softplus",
    "density_scale": 25.0,
    "color_activation": "relu",
    "view_space": "ray",
}
"""What a student has unless its user says otherwise."""
USUAL: Mapping[str, Any] = {
    "view_pe": 2,
    "fea_pe": 2,
    "pos_pe": 0,
    "mlp_width": 128,
    "mlp_layers": 3,
    "mlp_bias": True,
    "view_space": "world",
    "wave_scale": 1.0,
    "wave_step": 1.0,
    "padding": "none",
}
"""The architectures' own defaults, for configurations that do not say."""
MAX_VERTICES = 1 << 28
MODELS = {"tensorf": "TensorVMSplit", "tensorf-cp": "TensorCP"}


def write(parts: Parts, path: Path) -> None:
    """Raises RequestError naming what the layout cannot hold."""
    where = f"{path}: apchenstu-tensorf"
    if parts.architecture not in MODELS:
        raise RequestError(f"{where}: holds tensorf and tensorf-cp, not {parts.architecture}", hint="add --to tensorf")
    config = parts.config
    box = parts.scene.box if config.get("box") is None else Box.from_json(config["box"])
    kwargs = _kwargs(parts, box, where)
    arrays = {k: t.numpy() for k, t in parts.tensors.items()}
    own: dict[str, Any] = {"scene": parts.scene.to_json()}
    top: dict[str, Any] = {"kwargs": kwargs}
    bits, alpha = arrays.pop("mask.bits", None), arrays.pop("alphaMask.mask", None)
    if bits is not None and alpha is not None:
        raise RequestError(f"{where}: holds one mask, this field has a mask and an alpha_mask")
    if bits is not None:
        volume, low, high = _volume(config["mask"], bits, where)
        own["mask"] = {**config["mask"], "bits": bits}
        alpha, shape, aabb = np.packbits(volume.reshape(-1)), volume.shape, np.array([low, high], np.float32)
    elif alpha is not None:
        shape = tuple(config["alpha_mask"]["shape"][::-1])
        aabb = _aabb(Box.from_json(config["alpha_mask"]["box"]))
    if alpha is not None:
        said = {"shape": (1, 1, *(int(v) for v in shape)), "mask": torch_zip_writer.Numpy(alpha), "aabb": aabb}
        top |= {f"alphaMask.{key}": value for key, value in said.items()}
    if kwargs["aabb"].astype(np.float64).tolist() != [list(box.min), list(box.max)]:
        own["box"] = box.to_json()
    state: OrderedDict[str, Any] = OrderedDict((k, np.asarray(v, np.float32)) for k, v in arrays.items())
    torch_zip_writer.write(path, {**top, "state_dict": state, EXTRA: own})


def _kwargs(parts: Parts, box: Box, where: str) -> dict[str, Any]:
    """Arguments of the program's constructor, all but the device."""
    c, scene = {**USUAL, **parts.config}, parts.scene
    _check(c, box, parts, where)
    n = [int(v) for v in c["resolution"]]
    cp = parts.architecture == "tensorf-cp"
    density, color = ([c["density_rank"]], [c["color_rank"]]) if cp else (c["density_ranks"], c["color_ranks"])
    spacing = sum(s / (k - 1) for s, k in zip(box.size, n)) / 3
    said = _earlier(parts.provenance)
    ratio = 0.5 if scene.step is None else round(scene.step / spacing, 6)
    diagonal = scene.box.diagonal
    near, far = (0.0, 1.0) if scene.ray_space.kind == "ndc" else (scene.near, scene.far)
    return {
        "aabb": _aabb(box),
        "gridSize": n,
        "density_n_comp": [int(v) for v in density],
        "appearance_n_comp": [int(v) for v in color],
        "app_dim": int(c["color_features"]),
        "density_shift": float(c["density_shift"]),
        "alphaMask_thres": float(said.get("alphaMask_thres", 1e-4)),
        "distance_scale": float(c["density_scale"]),
        "rayMarch_weight_thres": float(said.get("rayMarch_weight_thres", 1e-4)),
        "fea2denseAct": c["density_activation"],
        # It only clamps where rays enter the box: wide is harmless.
        "near_far": [0.05 if near is None else near, 100.0 * diagonal if far is None else far],
        "step_ratio": max(ratio, 0.05),
        "shadingMode": {"mlp": "MLP_Fea", "sh": "SH", "rgb": "RGB"}[c["shading"]],
        "pos_pe": int(said.get("pos_pe", 6)),
        "view_pe": int(c["view_pe"]),
        "fea_pe": int(c["fea_pe"]),
        "featureC": int(c["mlp_width"]),
    }


def _check(c: Config, box: Box, parts: Parts, where: str) -> None:
    """What the program cannot evaluate is said, with what to type."""
    train = f"convert --to {parts.architecture} --as apchenstu-tensorf"
    wrong = [
        (c["density_activation"] == "exp", "density_activation = softplus or relu", "density_activation=softplus"),
        (c.get("density_clip") is not None, "density without a density_clip", "density_clip=none"),
        (c.get("feature_clip") is not None, "features without a feature_clip", "feature_clip=none"),
        (c["padding"] == "zero" and box != parts.scene.box, "padding = none", "padding=none"),
    ]
    ndc = parts.scene.ray_space.kind == "ndc"
    if c["shading"] == "mlp":
        plain = c["wave_scale"] == c["wave_step"] == 1.0 or c["fea_pe"] == c["view_pe"] == 0
        wrong += [
            (c["view_encoding"] != "frequency", "view_encoding = frequency", "view_encoding=frequency"),
            (c["mlp_layers"] != 3, "mlp_layers = 3", "mlp_layers=3"),
            (not c["mlp_bias"], "a colour network with biases", "mlp_bias=true"),
            (c["pos_pe"] > 0, "pos_pe = 0 (the program cannot evaluate its MLP_PE)", "pos_pe=0"),
            (not plain, "octaves from 1 on (wave_scale = 1, wave_step = 1)", "wave_scale=1 --set wave_step=1"),
        ]
    elif c["shading"] == "sh":
        wrong += [
            (c["color_features"] != 27, "color_features = 27 with shading = sh", "color_features=27"),
            (c["color_activation"] != "relu", "color_activation = relu with shading = sh", "color_activation=relu"),
        ]
    else:
        wrong += [
            (c["color_activation"] != "none", "color_activation = none with shading = rgb", "color_activation=none")
        ]
    if c["shading"] != "rgb":
        space = "ndc" if ndc else "world"
        wrong += [(c["view_space"] != space, f"view_space = {space} here", f"view_space={space}")]
    for bad, holds, type_this in wrong:
        if bad:
            raise RequestError(f"{where}: the layout only holds {holds}", hint=f"{train} --set {type_this} trains one")


def _volume(
    mask: Mapping[str, Any], bits: NDArray[np.uint8], where: str
) -> tuple[NDArray[np.bool_], list[float], list[float]]:
    """(vertices [z, y, x], low, high) whose interpolation is > 0 exactly inside of the mask's cells.

    The vertices lie twice as densely as the cells' corners; only those in the middle of a set cell are set.
    """
    if "halves" in mask:
        raise RequestError(
            f"{where}: the layout only holds a mask of equal cells, this field's are nested cubes",
            hint="convert with --as apchenstu-tensorf --set resolution=300, which makes a mask of its own",
        )
    shape = [int(v) for v in mask["shape"]]
    grid = np.unpackbits(bits, count=math.prod(shape), bitorder="little").reshape(shape).astype(bool)
    used = [np.flatnonzero(grid.any(tuple(k for k in range(3) if k != axis))) for axis in range(3)]
    if not len(used[0]):
        raise RequestError(f"{where}: the field's mask has no cell set: nothing would be visible")
    first, last = [int(u[0]) for u in used], [int(u[-1]) + 1 for u in used]
    grid = grid[tuple(slice(a, b) for a, b in zip(first, last))]
    sizes = [2 * n + 1 for n in grid.shape]
    if math.prod(sizes) > MAX_VERTICES:
        raise RequestError(
            f"{where}: a mask of {shape} cells needs an alphaMask of {sizes} vertices, more than the program can hold",
            hint="convert with --as apchenstu-tensorf, which plans a coarser mask",
        )
    volume = np.zeros(sizes[::-1], bool)
    volume[1::2, 1::2, 1::2] = grid.transpose(2, 1, 0)
    cell, origin = mask["cell"], mask["origin"]
    low, high = ([o + cell * k for o, k in zip(origin, ends)] for ends in (first, last))
    return volume, low, high


def _aabb(box: Box) -> NDArray[np.float32]:
    return np.array([box.min, box.max], np.float32)


def _earlier(provenance: Mapping[str, Any]) -> Mapping[str, Any]:
    """The constructor's arguments of the TensoRF file that a field came from, through any number of rewrites."""
    for _ in range(8):
        kwargs = provenance.get("kwargs")
        if provenance.get("program") == "apchenstu/TensoRF" and isinstance(kwargs, Mapping):
            return kwargs
        earlier = provenance.get("earlier")
        if not isinstance(earlier, Mapping):
            break
        provenance = earlier
    return {}
