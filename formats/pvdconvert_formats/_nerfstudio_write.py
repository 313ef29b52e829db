"""A ``nerf`` field as a checkpoint of nerfstudio's vanilla-nerf (layouts sections 7.0 and 7.4). Imports no torch.

``ns-train vanilla-nerf --load-checkpoint FILE`` opens it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvdconvert.errors import RequestError
from pvdconvert.plugin import Config, Parts
from pvdconvert_formats._nerfstudio_other import ENCODED, VANILLA, VIEW
from pvdconvert_formats._nerfstudio_run import EXTRA

FIXED: Config = {
    **VANILLA,
    "depth": 8,
    "width": 256,
    "skips": [3],
    "direction_layers": [128, 128],
    "direction_length": 1.0,
    "direction_space": "ray",
    "density_clip": None,
    "color_activation": "sigmoid",
    "masked": False,
    "mask": None,
    "box": None,
}
"""What the program's code builds, whatever its settings."""
HINT = "--to nerf --as nerfstudio trains one that fits"
Arrays = Mapping[str, NDArray[Any]]


def build(parts: Parts, where: str) -> dict[str, Any]:
    """What ``torch.save`` would be given. Raises RequestError where the program's code cannot hold the field."""
    if parts.architecture != "nerf":
        raise RequestError(f"{where}: writes nerf, not {parts.architecture}", hint="add --to nerf")
    config, scene = parts.config, parts.scene
    for key, value in FIXED.items():
        found = config.get(key, value)
        found = list(found) if isinstance(found, tuple) else found
        if found != value and key != "masked":
            raise RequestError(f"{where}: vanilla-nerf has {key} = {value}, this field {found!r:.60}", hint=HINT)
    if config.get("coarse"):
        raise RequestError(f"{where}: vanilla-nerf's two networks are alike, this field's are not", hint=HINT)
    if scene.ray_space.kind != "world":
        raise RequestError(f"{where}: vanilla-nerf knows no NDC scenes", hint="write another layout")
    arrays = {name: t.numpy() for name, t in parts.tensors.items()}
    both = bool(config.get("has_coarse"))
    model: OrderedDict[str, Any] = OrderedDict()
    model["_model.device_indicator_param"] = np.zeros(0, np.float32)
    for name, ours in (("field_coarse", "coarse" if both else "fine"), ("field_fine", "fine")):
        for key, source in _layers():
            for part in ("weight", "bias"):
                model[f"_model.{name}.{key}.{part}"] = _arranged(arrays[f"{ours}.{source}.{part}"], source, part)
    settings: dict[str, Any] = {"_target": "nerfstudio.models.vanilla_nerf.NeRFModel"}
    named = {(1.0, 1.0, 1.0): "white", (0.0, 0.0, 0.0): "black"}
    settings["background_color"] = named.get(scene.backdrop, list(scene.backdrop))
    if scene.near is not None and scene.far is not None:
        settings["collider_params"] = {"near_plane": scene.near, "far_plane": scene.far}
    step = parts.provenance.get("step")
    own = {"one_network": not both, "model": settings, "box": scene.box.to_json()}
    return {
        "step": step if type(step) is int else 0,
        "pipeline": model,
        "optimizers": {},
        "schedulers": {},
        "scalers": {},
        EXTRA: {**own, "world": [list(row) for row in scene.world]},
    }


def _layers() -> list[tuple[str, str]]:
    """(the program's name, ours) of every layer of a network, in the program's order."""
    return [
        *((f"mlp_base.layers.{i}", f"trunk.{i}") for i in range(FIXED["depth"])),
        ("field_output_density.net", "density"),
        *((f"mlp_head.layers.{j}", f"direction.{j}") for j in range(len(FIXED["direction_layers"]))),
        ("field_heads.0.net", "rgb"),
    ]


def _arranged(array: NDArray[Any], source: str, part: str) -> NDArray[Any]:
    """Columns in the program's order: waves before the plain coordinates, the direction before the hidden units."""
    order = np.arange(array.shape[-1])
    if part == "weight" and source in ("trunk.0", *(f"trunk.{i + 1}" for i in FIXED["skips"])):
        order[:ENCODED] = np.roll(order[:ENCODED], -3)
    elif part == "weight" and source == "direction.0":
        hidden = array.shape[1] - VIEW
        order = np.concatenate([np.roll(order[hidden:], -3), order[:hidden]])
    return np.ascontiguousarray(array[..., order]) if part == "weight" else array
