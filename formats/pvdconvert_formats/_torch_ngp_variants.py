"""torch-ngp's other two networks: tiny-cuda-nn's (layouts section 2.2) and ffmlp's (2.3). Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from pvdconvert.errors import InputError
from pvdconvert.plugin import Config, LazyTensor, ReadOptions
from pvdconvert_formats import _tcnn as tcnn
from pvdconvert_formats import _torch_ngp_state as state_dict

TCNN = ("encoder.params", "sigma_net.params", "color_net.params")
FF = ("encoder.embeddings", "encoder.offsets", "sigma_net.weights", "color_net.weights")
_GEO, _SH = 15, 16
_LEVELS, _FEATURES, _TABLE, _BASE, _DESIRED = 16, 2, 19, 16, 2048
_WIDTHS = (64, 32, 128, 16, 256)


def kind_of(state: Mapping[str, Any]) -> str | None:
    """ "tcnn", "ff", or None for the main network."""
    for name, marks in (("tcnn", TCNN), ("ff", FF)):
        if all(key in state for key in marks):
            return name
    return None


def read(
    kind: str,
    state: Mapping[str, LazyTensor],
    bound: float,
    options: ReadOptions,
    own: Mapping[str, Any],
    where: str,
    notes: list[str],
) -> tuple[Config, dict[str, LazyTensor], tuple[str, ...]]:
    """(configuration, tensors, what is assumed) of ``ngp``. Raises InputError."""
    if kind == "tcnn":
        return _read_tcnn(state, bound, where)
    grid, assumed = state_dict.read_grid(state, bound, options, own, where, notes)
    sigma = _ffmlp(state, "sigma_net.weights", grid["levels"] * grid["features"], where)
    color = _ffmlp(state, "color_net.weights", tcnn.padded(_SH + _GEO, 16), where)
    tensors: dict[str, LazyTensor] = {"encoder.embeddings": state["encoder.embeddings"]}
    for net, mlp, outputs, inputs in (
        ("sigma_net", sigma, 1 + _GEO, sigma.inputs),
        ("color_net", color, 3, _SH + _GEO),
    ):
        # The colour network's last column is fed with 0.
        for k, piece in enumerate(tcnn.Vector(state[f"{net}.weights"]).mlp(mlp, outputs, range(inputs))):
            tensors[f"{net}.{k}.weight"] = piece
    return {**grid, **_widths(sigma, color), "color_constants": None}, tensors, assumed


def _read_tcnn(
    state: Mapping[str, LazyTensor], bound: float, where: str
) -> tuple[Config, dict[str, LazyTensor], tuple[str, ...]]:
    scale = float(np.float32(np.exp2(np.log2(_DESIRED * bound / _BASE) / (_LEVELS - 1))))
    entries = sum(tcnn.level_entries(_LEVELS, _BASE, scale, _TABLE))
    sigma = tcnn.Mlp(_LEVELS * _FEATURES, 64, 1, 1 + _GEO)
    color = tcnn.Mlp(tcnn.padded(_SH + _GEO, 16), 64, 2, 16)
    for key, size in (("encoder", entries * _FEATURES), ("sigma_net", sigma.size), ("color_net", color.size)):
        if state[f"{key}.params"].shape != (size,):
            raise InputError(
                f"{where}: {key}.params holds {list(state[f'{key}.params'].shape)} numbers, the program's network for "
                f"bound {bound:g} has [{size}]"
            )
    tensors: dict[str, LazyTensor] = {
        "encoder.embeddings": tcnn.Vector(state["encoder.params"]).grid(entries, _FEATURES)
    }
    for net, mlp, outputs in (("sigma_net", sigma, 1 + _GEO), ("color_net", color, 3)):
        for k, piece in enumerate(tcnn.Vector(state[f"{net}.params"]).mlp(mlp, outputs)):
            tensors[f"{net}.{k}.weight"] = piece
    config = {
        "index_rule": "tcnn",
        "levels": _LEVELS,
        "features": _FEATURES,
        "log2_table": _TABLE,
        "base_resolution": _BASE,
        "per_level_scale": scale,
        "offsets": None,
        **_widths(sigma, color),
        "color_constants": [1.0],  # what pads the colour network's input to 32
    }
    return config, tensors, ("desired_resolution",)


def _widths(sigma: tcnn.Mlp, color: tcnn.Mlp) -> Config:
    return {
        "hidden": sigma.width,
        "density_layers": sigma.hidden,
        "geo_features": _GEO,
        "color_hidden": color.width,
        "color_layers": color.hidden,
        "sh_bands": math.isqrt(_SH),
    }


def _ffmlp(state: Mapping[str, LazyTensor], key: str, inputs: int, where: str) -> tcnn.Mlp:
    """The network of which ``key`` is the flat vector: the usual width, and as many layers as fit."""
    size = math.prod(state[key].shape)
    for width in _WIDTHS:
        inner = size - width * (inputs + 16)
        if inputs % 16 == 0 and inner >= 0 and inner % width**2 == 0 and inner // width**2 < 16:
            return tcnn.Mlp(inputs, width, 1 + inner // width**2, 16)
    raise InputError(f"{where}: {key} holds {size} numbers: no network of {inputs} inputs and 16 outputs has as many")
