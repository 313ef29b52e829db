"""A snapshot that instant-ngp opens (layouts section 1.8). Imports no torch.

The program's space is the scene's, moved and scaled by ``density_scale`` (its networks answer density per its own
unit), with the axes kept: that is a data set with ``from_mitsuba``. What the layout cannot say stands in
``snapshot.pvdconvert``, which the program does not look at.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from pvdconvert.containers import Manifest
from pvdconvert.errors import InputError, OutputError, RequestError
from pvdconvert.plugin import Config, LazyTensor, Limits, Parts
from pvdconvert.scene import Box, Scene
from pvdconvert_formats import _instant_ngp_scene as surroundings
from pvdconvert_formats import _tcnn as tcnn
from pvdconvert_formats._torch_ngp_grid import GRID, covered, morton

OWN = "pvdconvert"
"""A key of the snapshot, ignored by the program, for what the layout cannot say."""
FIXED: dict[str, Any] = {
    "index_rule": "tcnn",
    "offsets": None,
    "color_input": "h+sh",
    "color_constants": None,
    "geo_features": 15,
    "sh_bands": 4,
    "view_input": "unit",
    "bias": False,
    "density_clip": None,
    "density_activation": "exp",
    "color_activation": "sigmoid",
}
WIDER = {"color_activation": ("sigmoid", "exp"), "geo_features": range(15, 256, 16)}
"""Of these the layout holds other values too, which a student does without."""
FUSED = (16, 32, 64, 128)
FEATURES = (1, 2, 4, 8)
_FIT = "convert --to ngp --as instant-ngp trains one that fits"
_OPTIMIZER = {
    "otype": "Ema", "decay": 0.95,
    "nested": {
        "otype": "ExponentialDecay", "decay_start": 20000, "decay_interval": 10000, "decay_base": 0.33,
        "nested": {"otype": "Adam", "learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.99, "epsilon": 1e-15,
                   "l2_reg": 1e-6},
    },
}  # fmt: skip


def limits(architecture: str) -> Limits:
    defaults = {
        "hidden": 64,
        "color_hidden": 64,
        "box": "cube",
        "density_scale": "per box",
        "dtype": "float16",
        "allowed": {"features": FEATURES, "hidden": range(16, 4097, 16), "color_hidden": range(16, 4097, 16)},
    }
    return Limits(FIXED, defaults, cells=GRID)


def write(parts: Parts, path: Path) -> None:
    """Raw msgpack where the name says ``.msgpack``, gzip otherwise. float16 where that is exact, else float32."""
    where = f"{path}: instant-ngp"
    if parts.architecture != "ngp":
        raise RequestError(f"{where}: holds ngp, not {parts.architecture}", hint="add --to ngp")
    config = parts.config
    for key, value in FIXED.items():
        have = config.get(key, value)
        if have != value and have not in WIDER.get(key, ()):
            raise RequestError(
                f"{where}: the layout only holds {key} = {value}, this field has {have!r:.60}", hint=_FIT
            )
    box, aabb_scale, unit = _placed(parts, where)
    params = _params(parts, where)
    bits, mask = _density_grid(parts, box, aabb_scale, unit)
    snapshot = surroundings.snapshot_of(parts, box, aabb_scale, unit)
    snapshot["params_binary"] = params.tobytes()
    snapshot["params_type"] = "__half" if params.dtype == np.float16 else "float"
    snapshot["n_params"] = params.size
    snapshot["density_grid_binary"] = bits
    own: dict[str, Any] = {"scene": parts.scene.to_json(), "box": config.get("box"), "density_scale": unit}
    if float(np.float32(config["per_level_scale"])) != config["per_level_scale"]:
        own["per_level_scale"] = float(config["per_level_scale"])
    snapshot[OWN] = {**own, **({"mask": mask} if mask else {})}
    raw = msgpack.packb(_sorted({**_network(config), "snapshot": snapshot}), use_bin_type=True)
    try:
        with path.open("wb") as file:
            if ".msgpack" in path.suffixes:
                file.write(raw)
            else:
                with gzip.GzipFile("", "wb", 6, file, mtime=0) as packed:
                    packed.write(raw)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


def _sorted(value: Any) -> Any:
    """Keys in alphabetical order, as the program's own writer has them."""
    if isinstance(value, dict):
        return {k: _sorted(value[k]) for k in sorted(value)}
    return [_sorted(v) for v in value] if isinstance(value, (list, tuple)) else value


def _placed(parts: Parts, where: str) -> tuple[Box, float, float]:
    """(the grid's cube in the scene, aabb_scale, program's units per unit of the scene)."""
    stored = parts.config.get("box")
    box = parts.scene.box if stored is None else Box(tuple(stored[0]), tuple(stored[1]))
    unit = float(parts.config.get("density_scale", 1.0))
    if max(box.size) - min(box.size) > 1e-6 * box.longest:
        raise RequestError(
            f"{where}: the layout only holds a cube, the grid's box is {box.min} .. {box.max}", hint=_FIT
        )
    scale = box.longest * unit
    power = round(math.log2(scale)) if 0 < scale < math.inf else -1
    if not 0 <= power <= 7 or abs(scale - 2.0**power) > 1e-5 * scale:
        raise RequestError(
            f"{where}: density is per {1 / unit:g} units in a box of {box.longest:g}: {scale:g} is no power "
            "of two up to 128",
            hint=_FIT,
        )
    return box, 2.0**power, unit


def _network(config: Config) -> dict[str, Any]:
    """The root's tables."""
    kinds = {None: "HashGrid", "hash": "HashGrid", "dense": "DenseGrid", "tiled": "TiledGrid"}
    modes = {"linear": "Linear", "smoothstep": "Smoothstep", "nearest": "Nearest"}
    encoding = {
        "otype": kinds[config.get("grid_type")],
        "n_levels": int(config["levels"]),
        "n_features_per_level": int(config["features"]),
        "log2_hashmap_size": int(config["log2_table"]),
        "base_resolution": int(config["base_resolution"]),
        "per_level_scale": float(np.float32(config["per_level_scale"])),
        "interpolation": modes[config.get("interpolation", "linear")],
    }

    def network(width: int, hidden: int) -> dict[str, Any]:
        kind = "FullyFusedMLP" if width in FUSED and hidden > 0 else "CutlassMLP"
        return {
            "otype": kind,
            "activation": "ReLU",
            "output_activation": "None",
            "n_neurons": int(width),
            "n_hidden_layers": int(hidden),
        }

    direction = [
        {"n_dims_to_encode": 3, "otype": "SphericalHarmonics", "degree": 4},
        {"otype": "Identity", "n_bins": 4, "degree": 4},
    ]
    return {
        "loss": {"otype": "Huber"},
        "optimizer": _OPTIMIZER,
        "encoding": encoding,
        "network": {
            **network(config["hidden"], config["density_layers"]),
            "n_output_dims": 1 + int(config["geo_features"]),
        },
        "dir_encoding": {"otype": "Composite", "nested": direction},
        "rgb_network": network(config.get("color_hidden") or config["hidden"], config["color_layers"]),
    }


def _params(parts: Parts, where: str) -> NDArray[Any]:
    """The parameter vector: density network, colour network, grid."""
    config = parts.config
    features, outputs = int(config["features"]), 1 + int(config["geo_features"])
    encoded = int(config["levels"]) * features
    widths = config["hidden"], config.get("color_hidden") or config["hidden"]
    if features not in FEATURES or outputs % 16 or any(w % 16 for w in widths):
        raise RequestError(
            f"{where}: features = {features}, geo_features = {outputs - 1}, hidden = {widths[0]}, color_hidden = "
            f"{widths[1]}: the program has 1, 2, 4 or 8 features, and widths in multiples of 16",
            hint=_FIT,
        )
    grid = (config["levels"], config["base_resolution"], config["per_level_scale"], config["log2_table"])
    try:
        entries = sum(tcnn.level_entries(*grid, config.get("grid_type") or "hash"))
    except InputError as error:
        raise RequestError(f"{where}: {error}") from error
    density = tcnn.Mlp(tcnn.padded(encoded, 16), widths[0], config["density_layers"], outputs)
    color = tcnn.Mlp(outputs + 16, widths[1], config["color_layers"], 16)
    pieces: list[NDArray[Any]] = []
    for net, mlp in (("sigma_net", density), ("color_net", color)):
        for k, (rows, columns) in enumerate(mlp.shapes):
            array = parts.tensors[f"{net}.{k}.weight"].numpy()
            full = np.zeros((rows, columns), array.dtype)
            full[: array.shape[0], : array.shape[1]] = array
            pieces.append(full.reshape(-1))
    table = parts.tensors["encoder.embeddings"].numpy()
    if table.shape != (entries, features):
        raise RequestError(
            f"{where}: the program's grid has {entries} entries, the field's {list(table.shape)}", hint=_FIT
        )
    whole = np.concatenate([*pieces, table.reshape(-1)]).astype(np.float32)
    with np.errstate(over="ignore"):
        half = whole.astype(np.float16)
    return half.astype("<f2") if np.array_equal(half.astype(np.float32), whole) else whole.astype("<f4")


def _density_grid(parts: Parts, box: Box, aabb_scale: float, unit: float) -> tuple[bytes, dict[str, Any] | None]:
    """(``density_grid_binary``: 1 in every cell that the mask reaches into, the mask itself where cells differ)."""
    count = surroundings.cascades_of(aabb_scale)
    mask = parts.config.get("mask")
    if mask is None:
        return np.ones(count * GRID**3, "<f2").tobytes(), None
    bits = parts.tensors["mask.bits"].numpy()
    steps = (np.arange(GRID + 1) / GRID - 0.5) / unit
    cubes = np.stack([covered(mask, bits, [2.0**c * steps + v for v in box.center]) for c in range(count)])
    values = np.zeros((count, GRID**3), "<f2")
    values[:, morton().reshape(-1)] = cubes.reshape(count, -1)
    exact = {**mask, "bits": bits.tobytes()}
    return values.tobytes(), exact


def read_extra(snapshot: Mapping[str, Any]) -> Mapping[str, Any]:
    """What :func:`write` added, or {}."""
    own = snapshot.get(OWN)
    return own if isinstance(own, dict) and isinstance(own.get("scene"), dict) else {}


def restore(
    own: Mapping[str, Any], config: Config, tensors: dict[str, LazyTensor], scene: Scene, manifest: Manifest, where: str
) -> tuple[Config, Scene]:
    """``config`` and ``scene`` as they were before :func:`write`; a mask into ``tensors``. Raises InputError."""
    try:
        back = Scene.from_json(own["scene"])
        config = {**config, "box": own["box"], "density_scale": float(own["density_scale"])}
        if "per_level_scale" in own:
            config["per_level_scale"] = float(own["per_level_scale"])
    except (InputError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where}: snapshot.{OWN}: {error}") from error
    bits, mask = manifest.tensors.get(f"snapshot.{OWN}.mask.bits"), own.get("mask")
    tensors.pop("mask.bits", None)
    config["mask"] = None
    if bits is not None and isinstance(mask, dict):
        config["mask"] = {k: v for k, v in mask.items() if k != "bits"}
        tensors["mask.bits"] = bits
    return config, back
