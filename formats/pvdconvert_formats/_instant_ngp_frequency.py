"""instant-ngp's configuration ``frequency`` -> ``nerf``: perceptrons over sines of the box (layouts 0.5, 1.3).

tiny-cuda-nn encodes u in [0, 1] as sin and cos of 2^k pi u, per coordinate. With u = (v + 1) / 2 the phases are
2^k (pi/2) v + 2^k pi/2: columns of frequencies 0 and 1 change places or signs, the others stay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvdconvert.errors import InputError
from pvdconvert.plugin import Config, LazyTensor
from pvdconvert_formats import _instant_ngp_model as model
from pvdconvert_formats import _tcnn as tcnn
from pvdconvert_formats._lazy import Made, zeros


def read(
    root: Mapping[str, Any], vector: tcnn.Vector, extra: tuple[float, ...], hdr: bool, where: str
) -> tuple[Config, dict[str, LazyTensor]]:
    """(configuration, tensors) of ``nerf``; its box and mask are the caller's. Raises InputError."""
    encoding = model.section(root, "encoding", where)
    octaves = model.whole(encoding, "n_frequencies", 12, f"{where}: encoding 'Frequency'", 1, 20)
    if hdr:
        raise InputError(f"{where}: a Frequency encoding with HDR colours (is_hdr) is not supported")
    encoded = 6 * octaves
    shapes = model.fit_shapes(root, encoded, 0, extra, vector.left, where)
    density, color, direction = shapes.density, shapes.color, shapes.direction
    if density.hidden == 0:
        raise InputError(f"{where}: a density network without a hidden layer is not supported")
    *trunk, last = vector.mlp(density, density.outputs)
    heads = vector.mlp(color, 3)
    tensors: dict[str, LazyTensor] = {}

    def layer(name: str, weight: LazyTensor, bias: LazyTensor | None = None) -> None:
        tensors[f"{name}.weight"] = weight
        tensors[f"{name}.bias"] = bias or zeros(weight.shape[0])

    for i, piece in enumerate(trunk):
        if i == 0:  # what is fed with the padding's ones is a bias
            ones = [(at, 1.0) for at in range(encoded, density.inputs)]
            layer("fine.trunk.0", _waves(piece, 0, octaves), _bias(piece, ones))
        else:
            layer(f"fine.trunk.{i}", piece)
    layer("fine.density", Made((1, density.width), lambda: last.numpy()[:1]))
    layer("fine.bottleneck", last)
    for j, piece in enumerate(heads):
        name = "fine.rgb" if j == len(heads) - 1 else f"fine.direction.{j}"
        if j:
            layer(name, piece)
            continue
        columns = list(enumerate(direction.columns, start=density.outputs))
        seen = [at for at, (kind, _) in columns if kind == "sh"]
        fed = [(at, 1.0 if kind == "one" else direction.constants[k]) for at, (kind, k) in columns if kind != "sh"]
        layer(name, _head(piece, density.outputs, seen, direction.frequencies), _bias(piece, fed))
    config: Config = {
        "depth": density.hidden,
        "width": density.width,
        "skips": [],
        "position_frequencies": octaves,
        "direction_frequencies": direction.frequencies or 0,
        "include_input": False,
        "frequency_scale": math.pi / 2,
        "encoding_order": "per-coordinate",
        "direction_encoding": "sh" if direction.frequencies is None else "frequency",
        "direction_bands": direction.bands or 1,
        "bottleneck_width": density.outputs,
        "direction_layers": [color.width] * color.hidden,
        "density_activation": "exp",
        "input": "box",
        "mask": None,
    }
    return config, tensors


def _shifted(weight: NDArray[Any], octaves: int) -> NDArray[Any]:
    """Columns for sin, cos of 2^k pi u -> columns for sin, cos of 2^k (pi/2) (2 u - 1), per coordinate."""
    pairs = weight.reshape(len(weight), 3, octaves, 2).copy()
    if octaves > 0:
        pairs[:, :, 0] = np.stack(
            [-weight.reshape(pairs.shape)[:, :, 0, 1], weight.reshape(pairs.shape)[:, :, 0, 0]], -1
        )
    if octaves > 1:
        pairs[:, :, 1] *= -1
    return pairs.reshape(len(weight), -1)


def _waves(piece: tcnn.Piece, start: int, octaves: int) -> LazyTensor:
    shape = (piece.shape[0], 6 * octaves)
    return Made(shape, lambda: _shifted(piece.numpy()[:, start : start + 6 * octaves], octaves), piece.dtype)


def _head(piece: tcnn.Piece, outputs: int, seen: list[int], octaves: int | None) -> LazyTensor:
    """Columns [density outputs, direction] of the colour network's first matrix."""

    def make() -> NDArray[Any]:
        weight = piece.numpy()
        view = weight[:, seen] if octaves is None else _shifted(weight[:, seen], octaves)
        return np.concatenate([weight[:, :outputs], view], axis=1)

    return Made((piece.shape[0], outputs + len(seen)), make, piece.dtype)


def _bias(piece: tcnn.Piece, fed: list[tuple[int, float]]) -> LazyTensor | None:
    """What the constant inputs ``fed``, (column, value), add."""
    if not fed:
        return None
    columns, values = [at for at, _ in fed], np.array([v for _, v in fed])
    return Made((piece.shape[0],), lambda: piece.numpy()[:, columns].astype(np.float64) @ values)
