"""The four kinds of an AAAI2023-PVD state_dict, each as the architecture that it is (layouts section 8). No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvdconvert.errors import InputError
from pvdconvert.plugin import ArrayTensor, Config, LazyTensor
from pvdconvert.scene import Box
from pvdconvert_formats import _torch_ngp_grid as grids
from pvdconvert_formats._lazy import Made, need, zeros
from pvdconvert_formats._nerf_layers import frequencies_of, hidden_last, rows

Tensors = dict[str, LazyTensor]
State = Mapping[str, LazyTensor]
SH_BANDS = 4
MODES = ("sigma", "density"), ("color", "app")


def chain(state: State, net: str, where: str, wide: int | None = None) -> list[int]:
    """Widths of the bias-free layers ``net``.0.weight, ...: input, hidden, ..., output."""
    count = sum(re.fullmatch(rf"{net}\.\d+\.weight", key) is not None for key in state)
    widths: list[int] = []
    for k in range(max(1, count)):
        layer = need(state, f"{net}.{k}.weight", (None, wide), where)
        widths += [layer.shape[1]] if not widths else []
        wide = layer.shape[0]
        widths.append(wide)
    if len(set(widths[1:-1])) > 1:
        raise InputError(f"{where}: {net} has hidden layers of unequal width {widths[1:-1]}")
    return widths


def color_chain(state: State, features: int, where: str) -> list[int]:
    """Widths of color_net, whose input is [16 harmonics, features] and whose output is rgb."""
    widths = chain(state, "color_net", where, SH_BANDS**2 + features)
    if widths[-1] != 3 or len(widths) < 3:
        raise InputError(f"{where}: color_net has widths {widths}, which do not lead to 3 colours")
    return widths


def vm(state: State, box: Box, where: str) -> tuple[Config, Tensors]:
    """Planes and lines -> ``tensorf``; the direction's columns of color_net.0 move behind the features'."""
    tensors: Tensors = {}
    ranks: dict[str, list[int]] = {}
    size = [0, 0, 0]
    for (a, b), c, i in (((0, 1), 2, 0), ((0, 2), 1, 1), ((1, 2), 0, 2)):
        for theirs, ours in MODES:
            plane = need(state, f"{theirs}_mat.{i}", (1, None, size[b] or None, size[a] or None), where)
            size[b], size[a] = plane.shape[2:]
            line = need(state, f"{theirs}_vec.{i}", (1, plane.shape[1], size[c] or None, 1), where)
            size[c] = line.shape[2]
            tensors |= {f"{ours}_plane.{i}": plane, f"{ours}_line.{i}": line}
            ranks.setdefault(ours, []).append(plane.shape[1])
    basis = need(state, "basis_mat.weight", (None, sum(ranks["app"])), where)
    widths = color_chain(state, basis.shape[0], where)
    tensors["basis_mat.weight"] = basis
    for k in range(len(widths) - 1):
        weight = state[f"color_net.{k}.weight"]
        tensors[f"renderModule.mlp.{2 * k}.weight"] = weight if k else hidden_last(weight, SH_BANDS**2)
    return {
        "resolution": size,
        "density_ranks": ranks["density"],
        "color_ranks": ranks["app"],
        "color_features": basis.shape[0],
        "shading": "mlp",
        "fea_pe": 0,
        "view_encoding": "sh",
        "view_bands": SH_BANDS,
        "mlp_width": widths[1],
        "mlp_layers": len(widths) - 1,
        "mlp_bias": False,
        "density_activation": "exp",
        "density_shift": 0.0,
        "density_scale": 1.0,
        "box": box.to_json(),
        # grid_sample pads with zeros: beyond aabb_train density is exp(0) wherever the bitfield lets it show.
        "padding": "zero",
    }, tensors


def _padded(tensor: LazyTensor, out: int, wide: int) -> LazyTensor:
    """Weight [a, b] or bias [a] with zero rows and columns up to ``out`` and ``wide``: units that stay 0."""
    grow = (out - tensor.shape[0], wide - tensor.shape[1]) if len(tensor.shape) == 2 else (out - tensor.shape[0],)
    if not any(grow):
        return tensor
    shape = tuple(n + g for n, g in zip(tensor.shape, grow))
    return Made(shape, lambda: np.pad(tensor.numpy(), [(0, g) for g in grow]))


def mlp(state: State, where: str) -> tuple[Config, Tensors]:
    """nerf_mlp, sigma_net and color_net -> ``nerf``.

    The last layer of nerf_mlp and the first of sigma_net are linear with nothing between them: one layer, their
    product. Layers narrower than the widest get units that stay 0.
    """
    count = sum(re.fullmatch(r"nerf_mlp\.\d+\.weight", key) is not None for key in state)
    if count < 2:
        raise InputError(f"{where}: nerf_mlp has {count} layers")
    wide, encoded = need(state, "nerf_mlp.0.weight", (None, None), where).shape
    octaves, plain = frequencies_of(encoded, where, "nerf_mlp.0.weight")
    sigma = chain(state, "sigma_net", where, need(state, f"nerf_mlp.{count - 1}.weight", (None, None), where).shape[0])
    if len(sigma) != 3 or sigma[-1] < 1:
        raise InputError(f"{where}: sigma_net has {len(sigma) - 1} layers, 2 are supported")
    width, geo = max(wide, sigma[1]), sigma[2] - 1
    color = color_chain(state, geo, where)
    tensors: Tensors = {}
    skips = []
    for k in range(count):
        weight = need(state, f"nerf_mlp.{k}.weight", (None, None), where)
        bias = need(state, f"nerf_mlp.{k}.bias", (weight.shape[0],), where)
        skip = bool(k) and weight.shape[1] == wide + encoded
        if not skip and weight.shape[1] != (wide if k else encoded):
            raise InputError(f"{where}: tensor 'nerf_mlp.{k}.weight' is {list(weight.shape)}, expected [*, {wide}]")
        if k < count - 1 and weight.shape[0] != wide:
            raise InputError(f"{where}: tensor 'nerf_mlp.{k}.weight' is {list(weight.shape)}, expected [{wide}, *]")
        skips += [k - 1] if skip else []
        if k == count - 1:
            weight, bias = _product(state["sigma_net.0.weight"], weight), _product(state["sigma_net.0.weight"], bias)
        inside = encoded if k == 0 else width + encoded * skip
        tensors[f"fine.trunk.{k}.weight"] = _padded(weight, width, inside)
        tensors[f"fine.trunk.{k}.bias"] = _padded(bias, width, 0)
    last = state["sigma_net.1.weight"]
    tensors["fine.density.weight"] = _padded(rows(last, 0, 1), 1, width)
    tensors["fine.bottleneck.weight"] = _padded(rows(last, 1, 1 + geo), geo, width)
    for k in range(len(color) - 1):
        name = "fine.rgb" if k == len(color) - 2 else f"fine.direction.{k}"
        weight = state[f"color_net.{k}.weight"]
        tensors[f"{name}.weight"] = weight if k else hidden_last(weight, SH_BANDS**2)
        tensors[f"{name}.bias"] = zeros(color[k + 1])
    tensors |= {"fine.density.bias": zeros(1), "fine.bottleneck.bias": zeros(geo)}
    return {
        "depth": count,
        "width": width,
        "skips": skips,
        "position_frequencies": octaves,
        "include_input": plain,
        "direction_encoding": "sh",
        "direction_bands": SH_BANDS,
        "bottleneck_width": geo,
        "bottleneck_activation": "none",
        "direction_layers": color[1:-1],
        "density_activation": "exp",
    }, tensors


def _product(left: LazyTensor, right: LazyTensor) -> LazyTensor:
    """``left @ right`` in float64, rounded once."""
    shape = (left.shape[0], *right.shape[1:])
    return Made(shape, lambda: left.numpy().astype(np.float64) @ right.numpy().astype(np.float64))


def volume(state: State, box: Box, scene: Box, config: Config, tensors: Tensors, where: str) -> tuple[Config, Tensors]:
    """tensor_volume -> ``plenoxels``: the vertices of every cell that the mask in ``config`` lets show.

    Beyond aabb_train the program's grid_sample fades to 0, that is to density exp(0): vertices of value 0 stand there.
    """
    source = need(state, "tensor_volume.0", (1, None, None, None, None), where)
    channels, *zyx = source.shape[1:]
    degree = math.isqrt((channels - 1) // 3)
    if channels != 3 * degree**2 + 1 or not 1 <= degree <= 5 or min(zyx) < 2:
        raise InputError(f"{where}: tensor 'tensor_volume.0' is {list(source.shape)}: 3 n^2 + 1 channels are expected")
    shape = np.array(zyx[::-1])
    low, cell = np.array(box.min), np.array(box.size) / (shape - 1)
    shown = _shown(config.get("mask"), tensors, scene)
    before = np.maximum(0, np.ceil((low - shown[0]) / cell - 1e-5)).astype(int)
    after = np.maximum(0, np.ceil((shown[1] - np.array(box.max)) / cell - 1e-5)).astype(int)
    grown = shape + before + after
    if grown.max() > 1 << 14 or grown.prod() > 1 << 30:
        raise InputError(f"{where}: aabb_train {box.min} .. {box.max} is too small a part of the bound")
    origin = low - before * cell
    keep = _vertices(config.get("mask"), tensors, origin, cell, grown)
    vertices = np.argwhere(keep)

    def gather(first: int, last: int) -> NDArray[np.float32]:
        at = vertices - before
        inside = ((at >= 0) & (at < shape)).all(1)
        out = np.zeros((len(vertices), last - first), np.float32)
        x, y, z = at[inside].T
        out[inside] = source.numpy()[0, first:last, z, y, x]
        return out

    small = max(grown) <= 1 << 15
    out: Tensors = {
        "vertices": ArrayTensor(vertices.astype(np.int16 if small else np.int32)),
        "density_data": Made((len(vertices), 1), lambda: gather(0, 1)),
        "sh_data": Made((len(vertices), channels - 1), lambda: gather(1, channels)),
    }
    high = origin + cell * (grown - 1)
    whole = Box(_three(origin), _three(high)) if (grown != shape).any() else box
    config = {
        "bands": degree,
        "density_activation": "exp",
        "color_activation": "sigmoid",
        "missing": "cell",
        "box": whole.to_json(),
        "shape": [int(n) for n in grown],
        "resolution": int(grown.max()),
    }
    return config, out


def _three(values: NDArray[np.float64]) -> tuple[float, float, float]:
    x, y, z = (float(v) for v in values)
    return x, y, z


def _shown(mask: Mapping[str, Any] | None, tensors: Tensors, scene: Box) -> tuple[NDArray[Any], NDArray[Any]]:
    """The corners of what is rendered: the set cells of the mask within the scene's box."""
    low, high = np.array(scene.min), np.array(scene.max)
    if mask is None or "halves" in mask:  # nested cubes reach to the bound
        return low, high
    shape = [int(n) for n in mask["shape"]]
    cells = np.unpackbits(tensors["mask.bits"].numpy(), count=math.prod(shape), bitorder="little").reshape(shape)
    at = np.argwhere(cells)
    if not len(at):
        return low, high
    return (
        np.maximum(low, mask["origin"] + mask["cell"] * at.min(0)),
        np.minimum(high, mask["origin"] + mask["cell"] * (at.max(0) + 1)),
    )


def _vertices(
    mask: Mapping[str, Any] | None, tensors: Tensors, origin: NDArray[Any], cell: NDArray[Any], shape: NDArray[Any]
) -> NDArray[np.bool_]:
    """bool [nx, ny, nz]: the corners of lattice cells that share volume with a set cell of the mask."""
    if mask is None:
        return np.ones(tuple(shape), bool)
    edges = [o + c * np.arange(n) for o, c, n in zip(origin, cell, shape)]
    out = grids.covered(mask, tensors["mask.bits"].numpy(), edges)
    for axis in range(3):
        padded = np.pad(out, [(1, 1) if a == axis else (0, 0) for a in range(3)])
        n = padded.shape[axis]
        out = padded.take(range(n - 1), axis) | padded.take(range(1, n), axis)
    return out
