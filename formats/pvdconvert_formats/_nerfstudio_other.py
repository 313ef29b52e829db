"""nerfstudio's tensorf and vanilla-nerf as ``tensorf`` and ``nerf`` (layouts 7.3 and 7.4). Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from pvdconvert.errors import InputError
from pvdconvert.plugin import Config, LazyTensor
from pvdconvert.scene import Box
from pvdconvert_formats._lazy import need
from pvdconvert_formats._nerf_layers import Changed, numbered, rows

Tensors = dict[str, LazyTensor]
State = Mapping[str, LazyTensor]
POSITION, DIRECTION = (10, 8.0), (4, 4.0)
"""Frequencies and last exponent of vanilla-nerf's two encodings: 2 pi 2^linspace(0, last, n)."""
ENCODED, VIEW = 3 * (2 * POSITION[0] + 1), 3 * (2 * DIRECTION[0] + 1)
VANILLA: Config = {
    "encoding_order": "channel-major",
    "include_input": True,
    "frequency_scale": 2 * math.pi,
    "position_frequencies": POSITION[0],
    "position_step": POSITION[1] / (POSITION[0] - 1),
    "direction_encoding": "frequency",
    "direction_frequencies": DIRECTION[0],
    "direction_step": DIRECTION[1] / (DIRECTION[0] - 1),
    "first_activation": True,
    "bottleneck_width": None,
    "density_activation": "softplus",
    "density_scale": 1.0,
    "density_bias": 0.0,
    "input": "world",
}
FREQUENCIES, LAST = 2, 2.0
"""Of tensorf's two encodings: 2 pi and 8 pi."""


def tensorf(state: State, box: Box, where: str) -> tuple[str, Config, Tensors]:
    """(architecture, configuration, tensors): stacked planes and lines, one after the other, or (cp) lines alone.

    Shapes and axes are TensoRF's own.
    """
    cp = not any(k.endswith("_encoding.plane_coef") for k in state)
    tensors: Tensors = {}
    ranks: dict[str, int] = {}
    size: int | None = None
    for theirs, ours in (("density", "density"), ("color", "app")):
        if f"field.{theirs}_encoding.line_coef" not in state:
            raise InputError(f"{where}: the triplane encoding of tensorf is not supported", hint="vm and cp are")
        line = need(state, f"field.{theirs}_encoding.line_coef", (3, None, size, 1), where)
        rank, size = line.shape[1], line.shape[2]
        ranks[ours] = rank
        tensors |= {f"{ours}_line.{i}": rows(line, i, i + 1) for i in range(3)}
        if not cp:
            plane = need(state, f"field.{theirs}_encoding.plane_coef", (3, rank, size, size), where)
            tensors |= {f"{ours}_plane.{i}": rows(plane, i, i + 1) for i in range(3)}
    basis = need(state, "field.B.weight", (None, ranks["app"] if cp else 3 * ranks["app"]), where)
    tensors["basis_mat.weight"] = basis
    features = basis.shape[0]
    config: Config = {
        "resolution": [size] * 3,
        "color_features": features,
        "density_activation": "relu",
        "density_scale": 1.0,
        "density_shift": 0.0,
        "box": box.to_json(),
    }
    if cp:
        config |= {"density_rank": ranks["density"], "color_rank": ranks["app"]}
    else:
        config |= {"density_ranks": [ranks["density"]] * 3, "color_ranks": [ranks["app"]] * 3}
    wide = (features + 3) * (1 + 2 * FREQUENCIES)
    keys = [*numbered(state, r"field\.mlp_head\.layers\.(\d+)", where), "field.field_output_rgb.net"]
    units = 0
    for j, key in enumerate(keys):
        weight = need(state, f"{key}.weight", (3 if j == len(keys) - 1 else units or None, wide), where)
        wide = units = weight.shape[0]
        tensors[f"renderModule.mlp.{2 * j}.weight"] = weight
        tensors[f"renderModule.mlp.{2 * j}.bias"] = need(state, f"{key}.bias", (wide,), where)
    config |= {
        "shading": "mlp",
        "fea_pe": FREQUENCIES,
        "view_encoding": "frequency",
        "view_pe": FREQUENCIES,
        "wave_scale": 2 * math.pi,
        "wave_step": LAST / (FREQUENCIES - 1),
        "mlp_width": need(state, f"{keys[0]}.weight", (None, None), where).shape[0] if len(keys) > 1 else 128,
        "mlp_layers": len(keys),
    }
    return "tensorf-cp" if cp else "tensorf", config, tensors


def input_first(tensor: LazyTensor, width: int, start: int = 0) -> Changed:
    """Columns [.., waves, x, ..] of an encoding of ``width`` columns from ``start`` -> [.., x, waves, ..]."""
    order = np.arange(tensor.shape[1])
    order[start : start + width] = np.roll(order[start : start + width], 3)
    return Changed(tensor, tensor.shape, tensor.dtype, lambda a: np.ascontiguousarray(a[:, order]))


def view_last(tensor: LazyTensor) -> Changed:
    """Columns [direction's waves, d, hidden] -> [hidden, d, direction's waves]."""
    order = np.concatenate([np.arange(VIEW, tensor.shape[1]), np.roll(np.arange(VIEW), 3)])
    return Changed(tensor, tensor.shape, tensor.dtype, lambda a: np.ascontiguousarray(a[:, order]))


def vanilla(state: State, name: str, ours: str, where: str) -> tuple[Config, Tensors]:
    """Network ``name`` (field_coarse, field_fine) -> ``ours`` (coarse, fine)."""
    tensors: Tensors = {}

    def take(key: str, target: str, units: int | None, wide: int | None) -> LazyTensor:
        weight = need(state, f"{name}.{key}.weight", (units, wide), where)
        tensors[f"{ours}.{target}.weight"] = weight
        tensors[f"{ours}.{target}.bias"] = need(state, f"{name}.{key}.bias", (weight.shape[0],), where)
        return weight

    trunk = numbered(state, rf"{name}\.mlp_base\.layers\.(\d+)", where)
    width, skips = 0, []
    for i in range(max(1, len(trunk))):
        key = f"mlp_base.layers.{i}"
        weight = need(state, f"{name}.{key}.weight", (width or None, None), where)
        width = weight.shape[0]
        skip = i > 0 and weight.shape[1] == width + ENCODED
        skips += [i - 1] if skip else []
        take(key, f"trunk.{i}", width, ENCODED if i == 0 else width + ENCODED * skip)
        if i == 0 or skip:
            tensors[f"{ours}.trunk.{i}.weight"] = input_first(weight, ENCODED)
    take("field_output_density.net", "density", 1, width)
    wide, units = width + VIEW, []
    for j, _ in enumerate(numbered(state, rf"{name}\.mlp_head\.layers\.(\d+)", where)):
        weight = take(f"mlp_head.layers.{j}", f"direction.{j}", None, wide)
        if j == 0:
            tensors[f"{ours}.direction.0.weight"] = view_last(weight)
        wide = weight.shape[0]
        units.append(wide)
    if not units:
        raise InputError(f"{where}: tensor '{name}.mlp_head.layers.0.weight' is missing")
    take("field_heads.0.net", "rgb", 3, wide)
    return {**VANILLA, "depth": max(1, len(trunk)), "width": width, "skips": skips, "direction_layers": units}, tensors
