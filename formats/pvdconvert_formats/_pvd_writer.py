"""Writes AAAI2023-PVD's hash and vm checkpoints (layouts section 8.6). Imports no torch."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvdconvert.errors import RequestError
from pvdconvert.plugin import Config, Parts
from pvdconvert.scene import Box
from pvdconvert_formats import _torch_ngp_grid as grids
from pvdconvert_formats._pvd_args import SCALE, SIGMA_CLIP
from pvdconvert_formats._pvd_kinds import MODES, SH_BANDS

EXTRA = "pvdconvert"
"""A top-level entry of our own, ignored by the program, for what the layout cannot say."""
LEVELS = 14
OCCUPIED = 11.0
"""Above the program's density_thresh: what density_grid holds where density_bitfield is set."""

HASH: Mapping[str, Any] = {
    "index_rule": "torch-ngp", "interpolation": "linear", "color_input": "sh+geo", "view_input": "unit",
    "density_activation": "exp", "color_activation": "sigmoid", "density_scale": 1.0, "bias": False,
    "levels": LEVELS, "features": 2, "log2_table": 19, "base_resolution": grids.BASE, "hidden": 64,
    "density_layers": 1, "geo_features": 15, "color_hidden": 64, "color_layers": 2, "sh_bands": SH_BANDS,
}  # fmt: skip
VM: Mapping[str, Any] = {
    "density_ranks": [16, 16, 16], "color_ranks": [48, 48, 48], "color_features": 15, "shading": "mlp",
    "color_activation": "sigmoid", "fea_pe": 0, "pos_pe": 0, "view_encoding": "sh", "view_bands": SH_BANDS,
    "view_space": "world", "mlp_width": 64, "mlp_layers": 3, "mlp_bias": False, "density_activation": "exp",
    "density_shift": 0.0, "density_scale": 1.0, "padding": "zero", "alpha_mask": None,
}  # fmt: skip
"""What the program's code fixes; its arguments change none of it."""


def build(parts: Parts, where: str) -> dict[str, Any]:
    """What ``torch.save`` would be given. Raises RequestError where the layout cannot hold the field."""
    config, box = parts.config, parts.scene.box
    kinds = {"ngp": HASH, "tensorf": VM}
    if parts.architecture not in kinds:
        raise RequestError(f"{where}: writes ngp and tensorf, not {parts.architecture}", hint="add --to ngp")
    for key, value in kinds[parts.architecture].items():
        have = config.get(key, value)
        if (list(have) if isinstance(have, (tuple, list)) else have) != value:
            raise RequestError(
                f"{where}: the program's code fixes {key} = {value}, this field has {have}",
                hint=f"convert --to {parts.architecture} --as aaai2023-pvd trains one that fits",
            )
    clip = config.get("density_clip")
    if clip is None:
        raise RequestError(
            f"{where}: the program always clips log-density, this field does not",
            hint=f"convert --to {parts.architecture} --as aaai2023-pvd trains one that fits",
        )
    bound = float(np.float32(max(abs(v) for v in (*box.min, *box.max))))
    cube = all(abs(v) == bound for v in (*box.min, *box.max))
    if not cube and config.get("mask") is None:
        raise RequestError(
            f"{where}: the program renders a cube around 0, the scene's box is {list(box.min)} .. {list(box.max)}",
            hint="convert with --bounds of such a cube",
        )
    arrays = {k: t.numpy() for k, t in parts.tensors.items()}
    bits = arrays.pop("mask.bits", None)
    model: OrderedDict[str, Any] = OrderedDict()
    model["aabb_train"] = np.array([-bound] * 3 + [bound] * 3, np.float32)
    model["aabb_infer"] = model["aabb_train"].copy()
    field = np.full(grids.cascades(bound) * grids.GRID**3 // 8, 255, np.uint8)
    if bits is not None:
        field = grids.write_bitfield(config["mask"], bits, bound)
    set_ = np.unpackbits(field, bitorder="little").reshape(grids.cascades(bound), -1)
    model["density_grid"] = (OCCUPIED * set_).astype(np.float32)
    model["density_bitfield"] = field
    model["step_counter"] = np.zeros((16, 2), np.int32)
    extra: dict[str, Any] = {} if list(clip) == list(SIGMA_CLIP) else {"sigma_clip": [float(v) for v in clip]}
    top = _top(parts, float(model["density_grid"].mean()))
    if parts.architecture == "ngp":
        _hash(model, arrays, config, box, bound, where)
    else:
        top["resolution"] = [int(n) for n in config["resolution"]]
        extra |= _vm(model, arrays, config, box, clip, where)
    extra |= _scene(parts)
    if bits is not None:
        held = grids.read_bitfield(field, bound)
        if held is None or held[0] != config["mask"] or not np.array_equal(held[1], bits):
            extra["mask"] = {**config["mask"], "bits": bits}
    return {**top, **({EXTRA: extra} if extra else {}), "model": model}


def _top(parts: Parts, mean: float) -> dict[str, Any]:
    said = parts.provenance
    return {
        "epoch": said["epoch"] if type(said.get("epoch")) is int else 0,
        "global_step": said["global_step"] if type(said.get("global_step")) is int else 0,
        "stats": {"loss": [], "valid_loss": [], "results": [], "checkpoints": [], "best_result": None},
        "mean_count": 0,
        "mean_density": mean,
    }


def _scene(parts: Parts) -> dict[str, Any]:
    """What our own reader could not tell from the layout."""
    out: dict[str, Any] = {}
    if parts.scene.background not in (None, (1.0, 1.0, 1.0)):
        out["background"] = list(parts.scene.background or ())
    s = parts.scene.world[0][2]
    if s > 0 and parts.scene.world[1][0] == s and 1 / s != SCALE:
        out["scale"] = 1 / s
    return out


def _hash(
    model: OrderedDict[str, Any],
    arrays: dict[str, NDArray[Any]],
    config: Config,
    box: Box,
    bound: float,
    where: str,
) -> None:
    low, high = config.get("box") or (box.min, box.max)
    if any(float(np.float32(v)) != bound for v in high) or any(float(np.float32(v)) != -bound for v in low):
        raise RequestError(
            f"{where}: the program's hash grid covers the cube of {bound:g}, this one {list(low)} .. {list(high)}",
            hint="convert with --as aaai2023-pvd and --bounds of such a cube",
        )
    scale = grids.scale_of(LEVELS, grids.BASE, grids.DESIRED * bound)
    if not math.isclose(float(config["per_level_scale"]), scale, rel_tol=1e-12):
        raise RequestError(
            f"{where}: the program's grid grows by {scale:.6f} a level, this one by {config['per_level_scale']:.6f}",
            hint=f"--set finest_resolution={grids.DESIRED * bound:g}",
        )
    sizes = grids.level_sizes(LEVELS, grids.BASE, scale, int(config["log2_table"]))
    offsets = [sum(sizes[:k]) for k in range(LEVELS + 1)]
    if list(config.get("offsets") or offsets) != offsets:
        raise RequestError(f"{where}: the rows of this hash grid start elsewhere than the program's")
    model["encoder.embeddings"] = arrays.pop("encoder.embeddings")
    model["encoder.offsets"] = np.array(offsets, np.int32)
    model.update(arrays)


def _vm(
    model: OrderedDict[str, Any],
    arrays: dict[str, NDArray[Any]],
    config: Config,
    scene: Box,
    clip: Any,
    where: str,
) -> dict[str, Any]:
    """Fill ``model``; returns what the layout cannot say."""
    cut = config.get("feature_clip")
    if cut is not None and list(cut) != list(clip):
        raise RequestError(f"{where}: feature_clip {cut} must be density_clip {clip} or none")
    box = Box.from_json(config["box"]) if config.get("box") is not None else scene
    trained = np.array([*box.min, *box.max], np.float32)
    model["aabb_train"] = trained
    for theirs, ours in MODES:
        for part in ("mat", "vec"):
            for i in range(3):
                model[f"{theirs}_{part}.{i}"] = arrays[f"{ours}_{'plane' if part == 'mat' else 'line'}.{i}"]
    model["basis_mat.weight"] = arrays["basis_mat.weight"]
    for k in range(int(VM["mlp_layers"])):
        weight = arrays[f"renderModule.mlp.{2 * k}.weight"]
        features = int(VM["color_features"])
        # The program shows the direction first.
        weight = weight if k else np.concatenate([weight[:, features:], weight[:, :features]], axis=1)
        model[f"color_net.{k}.weight"] = np.ascontiguousarray(weight)
    out: dict[str, Any] = {"distill": cut is not None}
    if trained.astype(np.float64).tolist() != [*box.min, *box.max]:
        out["box"] = box.to_json()
    return out
