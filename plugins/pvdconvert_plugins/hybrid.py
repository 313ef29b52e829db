"""The architecture ``hybrid``: plans and files of :class:`HybridField`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pvdconvert.errors import InputError, RequestError
from pvdconvert.field import RadianceField
from pvdconvert.nn.mask import Mask
from pvdconvert.nn.voxels import count_touched, lattice_shape
from pvdconvert.plugin import ArchitectureBase, Budget, Config, Limits, TeacherFacts
from pvdconvert.scene import Box, Scene
from pvdconvert_plugins.hybrid_field import HybridField
from pvdconvert_plugins.hybrid_spec import (
    SIZES,
    HybridOptions,
    as_config,
    checked,
    composition,
    grid_spec,
    shapes,
    widths,
)

PRESETS: dict[str, dict[str, int]] = {
    "fast": {"hash_log2_table": 16, "resolution": 144, "planes_resolution": 96, "voxels_resolution": 128},
    "balanced": {"hash_log2_table": 18, "resolution": 288, "planes_resolution": 128, "voxels_resolution": 176},
    "best": {"hash_log2_table": 19, "resolution": 400, "planes_resolution": 192, "voxels_resolution": 224},
}
"""As the single architectures have it; ``resolution`` is that of vm and cp."""
FINEST = {"fast": 4.0, "balanced": 8.0, "best": 16.0}
"""Finest cells of the hash grid per occupancy cell."""
SMALLEST, SMALLEST_TABLE = 16, 8
EQUAL = 48
"""Width of encodings that are added or multiplied, unless a size is given."""
EMPTY = 0.01
"""Optical thickness of an occupancy cell of a fresh field: nearly clear, yet with a gradient that can fill it."""


class Hybrid(ArchitectureBase):
    """The architecture ``hybrid``."""

    def plan(self, facts: TeacherFacts, budget: Budget, limits: Limits, overrides: Mapping[str, Any]) -> Config:
        """Sizes by preset over the occupied box, of one width where the join needs it; shrunk to keep ``max_mb``."""
        for key, value in overrides.items():
            if key in limits.fixed and limits.fixed[key] != value:
                raise RequestError(
                    f"hybrid: {key}={value} cannot be had: the output layout needs {key}={limits.fixed[key]}",
                    hint=f"drop --set {key}, or write another layout",
                )
        given = {**limits.defaults, **limits.fixed, **overrides}
        given["encoders"], given["join"] = composition(given, RequestError)
        base = {**_equal_widths(given), **given}
        checked(base, RequestError)
        box = Box.from_json(given["box"]) if given.get("box") is not None else _margin(facts)
        base["box"] = box.to_json()
        if not {"hash", "vm", "cp", "planes", "voxels"} & set(given["encoders"].split("+")):
            base.setdefault("mlp_bias", True)
        activation = base.get("density_activation", "exp")
        if given.get("density_scale") is None:
            base["density_scale"] = 1.0 if activation == "exp" else round(1 / facts.cell, 6)
        if given.get("density_shift") is None:
            thin = EMPTY / (facts.cell * float(base["density_scale"]))
            shift = {"exp": math.log(thin), "softplus": math.log(math.expm1(min(thin, 50.0))), "relu": thin}
            base["density_shift"] = round(shift.get(activation, 0.0), 4)
        size = 0.0
        for smaller in _steps(facts, box, budget.preset):
            o = checked({**smaller, **base}, RequestError)
            if "hash" in o.names:
                # Said explicitly: they come from a float64 power that another machine may round differently.
                o = dataclasses.replace(o, hash_offsets=list(grid_spec(o).offsets))
            size = megabytes(o, facts)
            if budget.max_mb is None or size <= budget.max_mb:
                return as_config(o)
        least = math.ceil(size * 100) / 100
        raise RequestError(
            f"hybrid does not fit into {budget.max_mb:g} MB: the least that this request needs is {least:g} MB",
            hint=f"--max-mb {least:g}, or fewer encoders or --set keys",
        )

    def build(self, config: Config, scene: Scene, seed: int) -> HybridField:
        return HybridField(checked({**config, "mask": None}, InputError), scene, seed)

    def load(self, config: Config, tensors: Mapping[str, Tensor], scene: Scene) -> HybridField:
        o = checked(config, InputError)
        box = scene.box if o.box is None else Box.from_json(o.box)
        wanted = shapes(o, box)
        if "voxels" in o.names:
            rows = tensors["voxels.vertices"].shape[:1] if "voxels.vertices" in tensors else ()
            wanted |= {"voxels.vertices": (*rows, 3), "voxels.features": (*rows, o.voxels_channels)}
        if o.mask is not None:
            wanted["mask.bits"] = tuple(tensors["mask.bits"].shape) if "mask.bits" in tensors else ()
        for name in sorted(wanted.keys() ^ tensors.keys()):
            raise InputError(
                f"hybrid: tensor {name!r} is {'missing' if name in wanted else 'not part of this configuration'}"
            )
        for name, shape in wanted.items():  # before anything of that size is made
            value = tensors[name]
            whole = name in ("voxels.vertices", "mask.bits")
            if tuple(value.shape) != shape or value.is_floating_point() == whole or value.dtype == torch.bool:
                kind = "whole" if whole else "float"
                raise InputError(
                    f"hybrid: {name!r} is {value.dtype} {list(value.shape)}, expected {kind} {list(shape)}"
                )
        field = HybridField(dataclasses.replace(o, mask=None), scene)
        if field.voxels is not None:
            try:
                field.voxels.assign(tensors["voxels.vertices"].clone(), tensors["voxels.features"].detach().clone())
            except ValueError as error:
                raise InputError(f"hybrid: 'voxels.vertices': {error}") from error
        with torch.no_grad():
            for name, parameter in _weights(field).items():
                parameter.copy_(tensors[name])
        if o.mask is not None:
            field.mask = Mask.from_parts(o.mask, tensors["mask.bits"])
        return field

    def save(self, field: RadianceField) -> tuple[Config, dict[str, Tensor]]:
        f = _own(field)
        tensors = {name: parameter.detach().clone() for name, parameter in _weights(f).items()}
        if f.voxels is not None:
            small = max(f.voxels.shape) <= 1 << 15
            tensors["voxels.vertices"] = f.voxels.vertices.to(torch.int16 if small else torch.int32, copy=True)
        config = as_config(dataclasses.replace(f.options, box=f.box.to_json()))
        if f.mask is not None:
            config["mask"], tensors["mask.bits"] = f.mask.to_config(), f.mask.bits
        return config, tensors

    def param_groups(self, field: RadianceField) -> list[dict[str, Any]]:
        """The rates of the single architectures. ``sparse_rows``: see ``pvdconvert.solve.lazy_adam``."""
        f = _own(field)
        # eps: most rows see tiny gradients; Adam must still move them (Mueller et al. 2022, section 4).
        adam = {"betas": (0.9, 0.99), "eps": 1e-15}
        groups: list[dict[str, Any]] = []
        for name, encoder in f.encoders.items():
            parameters = list(encoder.parameters())
            if name == "hash":
                groups.append({"params": parameters, "lr": 1e-2, "name": "table", **adam})
            elif name == "voxels":
                groups.append({"params": parameters, "lr": 2e-2, "name": name, "sparse_rows": True})
            elif parameters:
                groups.append({"params": parameters, "lr": 2e-2, "name": name})
        # Wider and deeper networks need less, as those of `nerf` do.
        wide, deep = (f.options.mlp_width, f.options.mlp_layers) if f.options.decoder == "mlp" else (1, 1)
        rate = 2e-2 * min(1.0, 64 / wide) / max(1, deep) ** 0.5
        turned = {"rotated": True, "betas": (0.9, 0.95)}
        groups.append({"params": list(f.networks.parameters()), "lr": rate, "name": "networks", **turned})
        return groups


def _equal_widths(given: Mapping[str, Any]) -> Config:
    """Sizes that make added or multiplied encodings equally wide, of those encoders whose sizes are not given."""
    names = [] if given["encoders"] == "none" else given["encoders"].split("+")
    if given["join"] == "concat" or len(names) < 2:
        return {}
    free = [name for name in names if not set(SIZES[name]) & set(given)]
    known = checked({**given, "join": "concat"}, RequestError)
    w = next((width for name, width in widths(known).items() if name not in free), EQUAL)
    out: Config = {}
    for name in free:
        if name == "hash":
            shapes = [(w // f, f) for f in (1, 2, 4, 8, 16) if w % f == 0 and 1 <= w // f <= 32]
            if shapes:
                out["hash_levels"], out["hash_features"] = min(shapes, key=lambda s: abs(math.log(s[0] / 16)))
        elif name == "vm" and w % 3 == 0:
            out["vm_rank"] = w // 3
        elif name == "cp":
            out["cp_rank"] = w
        elif name in ("planes", "voxels"):
            out[f"{name}_channels"] = w
        elif name == "frequency" and w % 3 == 0:
            out["frequencies"], out["frequency_input"] = w // 6, w % 6 == 3
    return out


def _steps(facts: TeacherFacts, box: Box, preset: str) -> Iterator[Config]:
    """Sizes by preset, then ever smaller ones: about 14 % a step."""
    p = PRESETS.get(preset, PRESETS["balanced"])
    finest = min(max(box.longest / facts.cell * FINEST.get(preset, FINEST["balanced"]), 128.0), 4096.0)
    k, scale = 0, 1.0
    while True:
        scale = 0.93**k
        side = {key: max(SMALLEST, int(scale * p[key])) for key in ("resolution", "planes_resolution")}
        yield {
            "hash_log2_table": max(SMALLEST_TABLE, p["hash_log2_table"] + round(2 * math.log2(scale))),
            "hash_finest": round(finest),
            "vm_resolution": side["resolution"],
            "cp_resolution": side["resolution"],
            "planes_resolution": side["planes_resolution"],
            "voxels_resolution": max(SMALLEST, int(scale * p["voxels_resolution"])),
        }
        if scale * p["resolution"] < SMALLEST and p["hash_log2_table"] + 2 * math.log2(scale) < SMALLEST_TABLE:
            return
        k += 1


def megabytes(o: HybridOptions, facts: TeacherFacts) -> float:
    """Megabytes (10^6) of the file: encoders, networks, and the mask."""
    box = Box.from_json(o.box) if o.box is not None else facts.scene.box
    total = math.prod(side / facts.cell + 2 for side in facts.scene.box.size) / 8
    total += sum(4.0 * math.prod(shape) for shape in shapes(o, box).values())
    if "voxels" in o.names:
        total += (6 + 4.0 * o.voxels_channels) * _vertices(o, box, facts)
    return total / 1e6 + 0.002


def _vertices(o: HybridOptions, box: Box, facts: TeacherFacts) -> float:
    """Vertices that voxels will have: counted where the visible cells are known, else an upper estimate."""
    shape = lattice_shape(box, o.voxels_resolution)
    if facts.occupancy is not None:
        return float(count_touched(box, shape, facts.occupancy.origin, facts.occupancy.cell, facts.occupancy.grid))
    h = math.prod(s / (n - 1) for n, s in zip(shape, box.size)) ** (1 / 3)
    volume = (facts.surface_cells or facts.occupied_cells) * facts.cell**3
    return min(volume / h**3 * (1 + 1.5 * h / facts.cell), float(math.prod(shape)))


def _margin(facts: TeacherFacts) -> Box:
    """The occupied box and a cell around it, within the scene's; numbers that float32 holds."""
    low = [max(s, o - facts.cell) for s, o in zip(facts.scene.box.min, facts.occupied_box.min)]
    high = [min(s, o + facts.cell) for s, o in zip(facts.scene.box.max, facts.occupied_box.max)]
    a, b, c, d, e, f = torch.tensor([*low, *high], dtype=torch.float32).tolist()
    return Box((a, b, c), (d, e, f))


def _weights(field: HybridField) -> dict[str, Tensor]:
    """Parameters under the names of files: ``hash.embeddings``, ``vm.planes.0``, ``sigma_net.0.weight``, ..."""
    out: dict[str, Tensor] = {}
    for name, parameter in field.named_parameters():
        out[name.removeprefix("encoders.").removeprefix("networks.").replace(".layers.", ".")] = parameter
    return out


def _own(field: RadianceField) -> HybridField:
    if not isinstance(field, HybridField):
        raise TypeError(f"expected a HybridField, got {type(field).__name__}")
    return field
