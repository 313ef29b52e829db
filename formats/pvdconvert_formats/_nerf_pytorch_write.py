"""A `nerf` field as yenchenlin/nerf-pytorch's own checkpoint (layouts section 5.1). Imports no torch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvdconvert.containers import torch_zip_writer
from pvdconvert.errors import RequestError
from pvdconvert.plugin import Parts

OWN = "pvdconvert"
"""A top-level entry of ours, ignored by the program, for what the layout cannot say."""
FIXED: dict[str, Any] = {
    "encoding_order": "interleaved",
    "include_input": True,
    "frequency_scale": 1.0,
    "position_step": 1.0,
    "direction_step": 1.0,
    "direction_encoding": "frequency",
    "direction_length": 1.0,
    "direction_space": "ray",
    "first_activation": True,
    "bottleneck_activation": "none",
    "density_activation": "relu",
    "density_clip": None,
    "density_bias": 0.0,
    "density_scale": 1.0,
    "color_activation": "sigmoid",
    "input": "world",
    "box": None,
    "mask": None,
}
"""What the program's code does, whatever its settings."""
PROGRAM: dict[str, Any] = {
    "depth": 8,
    "width": 256,
    "skips": [4],
    "position_frequencies": 10,
    "direction_frequencies": 4,
    "bottleneck_width": 256,
    "direction_layers": [128],
    "masked": False,
}
"""Its settings where its user says nothing: netdepth, netwidth, multires and multires_views change them."""
SKIP = 4
HINT = "--to nerf --as nerf-pytorch trains one that fits"

Arrays = Mapping[str, NDArray[Any]]


def write(parts: Parts, path: Path) -> None:
    """Both networks under the program's names, and the optimiser's groups that it insists on (N_importance > 0).

    A field of one network is written as coarse and fine alike, which samples as well as its own coarse one would.
    Raises RequestError naming what the program's code cannot hold.
    """
    where = f"{path}: nerf-pytorch"
    if parts.architecture != "nerf":
        raise RequestError(f"{where}: holds nerf, not {parts.architecture}", hint="add --to nerf")
    config = parts.config
    for key, value in FIXED.items():
        found = config.get(key, value)
        if found != value and (key, found) != ("direction_encoding", "none"):
            raise RequestError(
                f"{where}: the program only knows {key} = {value}, this field has {found!r:.60}", hint=HINT
            )
    arrays = {name: t.numpy() for name, t in parts.tensors.items()}
    both = bool(config.get("has_coarse"))
    names = {"network_fn_state_dict": "coarse" if both else "fine", "network_fine_state_dict": "fine"}
    states = {key: _state(arrays, name, config, where) for key, name in names.items()}
    step = parts.provenance.get("step")
    torch_zip_writer.write(
        path,
        {
            "global_step": step if type(step) is int else 0,
            **states,
            "optimizer_state_dict": _optimizer(sum(len(s) for s in states.values())),
            OWN: {"one_network": not both, "scene": parts.scene.to_json()},
        },
    )


def _state(arrays: Arrays, name: str, config: Mapping[str, Any], where: str) -> OrderedDict[str, NDArray[Any]]:
    """One network's state_dict. Raises RequestError where the program would build other shapes."""
    own = {**config, **((config.get("coarse") or {}) if name == "coarse" else {})}
    depth, width = own.get("depth", 8), own.get("width", 256)
    if depth == SKIP + 1:
        raise RequestError(
            f"{where}: a trunk of {depth} layers cannot run in the program: it concatenates after the last"
        )
    views = own.get("direction_encoding", "frequency") != "none"
    wanted: dict[str, Any] = {"skips": [SKIP] if depth > SKIP else []}
    if views:
        wanted |= {"bottleneck_width": width, "direction_layers": [width // 2]}
    else:
        wanted |= {"bottleneck_width": None, "direction_layers": []}
    for key, value in wanted.items():
        found = own.get(key, PROGRAM[key])
        found = list(found) if isinstance(found, tuple) else found
        if found != value:
            raise RequestError(
                f"{where}: of {depth} layers of {width} the program makes {key} = {value}, this field has {found}",
                hint=HINT,
            )
    out: OrderedDict[str, NDArray[Any]] = OrderedDict()

    def put(key: str, source: str) -> None:
        for part in ("weight", "bias"):
            out[f"{key}.{part}"] = arrays[f"{name}.{source}.{part}"]

    for i in range(depth):
        put(f"pts_linears.{i}", f"trunk.{i}")
    if views:
        put("views_linears.0", "direction.0")
        put("feature_linear", "bottleneck")
        put("alpha_linear", "density")
        put("rgb_linear", "rgb")
        return out
    like = arrays[f"{name}.rgb.weight"].dtype
    out["views_linears.0.weight"] = np.zeros((width // 2, width), like)  # made by the program, never asked
    out["views_linears.0.bias"] = np.zeros(width // 2, like)
    for part in ("weight", "bias"):
        rgb, density = arrays[f"{name}.rgb.{part}"], arrays[f"{name}.density.{part}"]
        out[f"output_linear.{part}"] = np.concatenate([rgb, density, np.zeros_like(density)])
    return out


def _optimizer(count: int) -> dict[str, Any]:
    """A fresh Adam over ``count`` parameters: the program loads it before the weights."""
    group = {"lr": 5e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "amsgrad": False}
    return {"state": {}, "param_groups": [{**group, "params": list(range(count))}]}
