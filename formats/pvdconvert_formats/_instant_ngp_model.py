"""instant-ngp's network configuration -> what its ``params_binary`` holds (layouts sections 1.2 to 1.4). No torch."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from pvdconvert.errors import InputError
from pvdconvert.plugin import Config, LazyTensor
from pvdconvert_formats import _tcnn as tcnn

DESIRED = 2048
"""Finest resolution of the grid over a unit of aabb_scale, unless the configuration says per_level_scale."""
_GRIDS = {"hashgrid": "hash", "densegrid": "dense", "tiledgrid": "tiled"}
ALIGNMENTS = ((16, 16), (8, 8), (8, 16), (16, 8))
"""Of the density and the colour network, in the order of trust: 8 is CutlassMLP's before 2022-09-22."""
FULLY_FUSED = (16, 32, 64, 128)


@dataclasses.dataclass(frozen=True)
class Direction:
    """The direction encoding: its outputs in their order, as ("sh", k), ("one", 0) or ("extra", k); or frequencies."""

    bands: int
    columns: tuple[tuple[str, int], ...]
    constants: tuple[float, ...] = ()
    frequencies: int | None = None


def section(root: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """The table ``key`` of the configuration. Raises InputError where it is missing."""
    value = root.get(key)
    if not isinstance(value, dict):
        raise InputError(f"{where}: {key!r} is {'missing' if value is None else 'no table'}: its shapes are unknown")
    return value


def whole(table: Mapping[str, Any], key: str, default: int, what: str, low: int = 0, high: int = 1 << 16) -> int:
    """The whole number ``key`` of ``table``. Raises InputError where it is none or out of bounds."""
    value = table.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value % 1 != 0:
        raise InputError(f"{what}: {key} is {value!r:.40}, not a whole number")
    if not low <= value <= high:
        raise InputError(f"{what}: {key} = {int(value)} is not in {low}..{high}")
    return int(value)


def otype(table: Mapping[str, Any]) -> str:
    return str(table.get("otype", "")).lower()


def read_grid(encoding: Mapping[str, Any], aabb_scale: float, where: str) -> Config:
    """The position grid's configuration as the program completes it. Raises InputError for what it cannot be."""
    name = f"{where}: encoding {encoding.get('otype')!r:.40}"
    kind = _GRIDS.get(otype(encoding)) or (
        str(encoding.get("type", "hash")).lower() if otype(encoding) == "grid" else ""
    )
    if kind not in _GRIDS.values():
        raise InputError(
            f"{name} of the position is not supported", hint="supported: HashGrid, DenseGrid, TiledGrid, Frequency"
        )
    for key in ("stochastic_interpolation", "fixed_point_pos"):
        if encoding.get(key):
            raise InputError(f"{name}: {key} is on, which is not supported")
    if str(encoding.get("hash", "CoherentPrime")).lower() != "coherentprime":
        raise InputError(f"{name}: hash {encoding['hash']!r:.40} is not supported", hint="only CoherentPrime is")
    features = whole(encoding, "n_features_per_level", 2, name, 1, 32)
    total = whole(encoding, "n_features", 0, name)
    levels = total // features if total else whole(encoding, "n_levels", 16, name, 1, tcnn.MAX_LEVELS)
    table = whole(encoding, "log2_hashmap_size", 19, name, 0, 30)
    base = whole(encoding, "base_resolution", 0, name, 0, 1 << 22)
    base = base or 1 << (whole(encoding, "log2_hashmap_size", 15, name, 0, 30) // 3)
    scale = encoding.get("per_level_scale") or 0.0
    if not isinstance(scale, (int, float)):
        raise InputError(f"{name}: per_level_scale is {scale!r:.40}")
    scale = float(np.float32(scale)) if scale > 0 else tcnn.growth(levels, base, DESIRED * aabb_scale)
    interpolation = str(encoding.get("interpolation", "Linear")).lower()
    if interpolation not in ("linear", "smoothstep", "nearest"):
        raise InputError(f"{name}: interpolation {encoding['interpolation']!r:.40} is not supported")
    return {
        "index_rule": "tcnn",
        "grid_type": None if kind == "hash" else kind,
        "levels": levels,
        "features": features,
        "log2_table": max(3, table),
        "base_resolution": base,
        "per_level_scale": scale,
        "interpolation": interpolation,
        "offsets": None,
    }


def grid_entries(config: Config, where: str) -> int:
    """Rows of the table of the grid that :func:`read_grid` described."""
    try:
        return sum(
            tcnn.level_entries(
                config["levels"],
                config["base_resolution"],
                config["per_level_scale"],
                config["log2_table"],
                config["grid_type"] or "hash",
            )
        )
    except InputError as error:
        raise InputError(f"{where}: encoding: {error}") from error


def read_network(root: Mapping[str, Any], key: str, where: str) -> tuple[int, int, int]:
    """(width, hidden layers, outputs) of ``network`` or ``rgb_network``."""
    table, name = section(root, key, where), f"{where}: {key}"
    if otype(table) not in ("fullyfusedmlp", "cutlassmlp", "mlp", "megakernelmlp"):
        raise InputError(f"{name}: otype {table.get('otype')!r:.40} is not supported")
    for which, wanted in (("activation", "relu"), ("output_activation", "none")):
        if str(table.get(which, wanted)).lower() != wanted:
            raise InputError(f"{name}: {which} {table[which]!r:.40} is not supported", hint=f"only {wanted} is")
    outputs = whole(table, "n_output_dims", 16, name, 1, 256) if key == "network" else 3
    return whole(table, "n_neurons", 128, name, 1, 4096), whole(table, "n_hidden_layers", 5, name, 0, 64), outputs


def read_direction(root: Mapping[str, Any], extra: tuple[float, ...], align: int, where: str) -> Direction:
    """The direction encoding of 3 + len(extra) numbers, padded to a multiple of ``align`` with ones."""
    table = section(root, "dir_encoding", where)
    name, nested = f"{where}: dir_encoding", [table]
    if otype(table) == "composite":
        inner = table.get("nested")
        nested = list(inner) if isinstance(inner, list) else []
        if str(table.get("reduction", "Concatenation")).lower() != "concatenation" or not nested:
            raise InputError(f"{name}: a Composite that does not concatenate is not supported")
    left, columns, parts = 3 + len(extra), [], []
    for k, part in enumerate(nested):
        if not isinstance(part, dict) or "dims_to_encode_begin" in part:
            raise InputError(f"{name}: nested encoding {k} is not supported: dims_to_encode_begin or no table")
        dims = min(left, whole(part, "n_dims_to_encode", left, name)) if k < len(nested) - 1 or left else 0
        left -= dims
        if dims:
            parts.append((part, dims))
    bands, frequencies, seen = 0, None, 0
    constants: list[float] = []
    for part, dims in parts:
        kind = otype(part)
        if seen == 0 and dims == 3 and kind == "sphericalharmonics":
            bands = whole(part, "degree", 4, name, 1, 8)
            if bands > 5:
                raise InputError(f"{name}: spherical harmonics of degree {bands} are not supported", hint="up to 5 are")
            columns += [("sh", i) for i in range(bands**2)]
        elif seen == 0 and dims == 3 and kind == "frequency":
            frequencies = whole(part, "n_frequencies", 12, name, 0, 20)
            columns += [("sh", i) for i in range(6 * frequencies)]
        elif seen >= 3 and kind == "identity":
            factor, offset = float(part.get("scale", 1.0)), float(part.get("offset", 0.0))
            columns += [("extra", len(constants) + i) for i in range(dims)]
            constants += [v * factor + offset for v in extra[seen - 3 : seen - 3 + dims]]
        else:
            raise InputError(f"{name}: {part.get('otype')!r:.40} of {dims} numbers from {seen} is not supported")
        seen += dims
    if seen != 3 + len(extra):
        raise InputError(f"{name}: encodes {seen} numbers, the network is given {3 + len(extra)}")
    ones = [("one", 0)] * (tcnn.padded(len(columns), align) - len(columns))
    # Spherical harmonics alone put their padding first, every other encoding puts it last.
    alone = bands > 0 and not constants
    columns = [*ones, *columns] if alone else [*columns, *ones]
    return Direction(bands, tuple(columns), tuple(constants), frequencies)


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Everything that lies in ``params_binary``: density network, colour network, ``encoding`` numbers."""

    density: tcnn.Mlp
    color: tcnn.Mlp
    direction: Direction
    encoding: int

    @property
    def size(self) -> int:
        return self.density.size + self.color.size + self.encoding


def fit_shapes(
    root: Mapping[str, Any], encoded: int, encoding: int, extra: tuple[float, ...], count: int, where: str
) -> Shapes:
    """The shapes, with the padding by which they add up to ``count`` numbers.

    ``encoded`` is the width of the position encoding before padding. Raises InputError where no padding fits.
    """
    width, hidden, outputs = read_network(root, "network", where)
    color_width, color_hidden, color_outputs = read_network(root, "rgb_network", where)
    tried = []
    for align, color_align in ALIGNMENTS:
        direction = read_direction(root, extra, color_align, where)
        out = tcnn.padded(outputs, align)
        density = tcnn.Mlp(tcnn.padded(encoded, align), width, hidden, out)
        color_in = tcnn.padded(out + len(direction.columns), color_align)
        color = tcnn.Mlp(color_in, color_width, color_hidden, tcnn.padded(color_outputs, color_align))
        if out + len(direction.columns) != color_in:
            continue
        shapes = Shapes(density, color, direction, encoding)
        if shapes.size == count:
            return shapes
        tried.append(shapes.size)
    raise InputError(
        f"{where}: its configuration makes {tried[0] if tried else 'impossibly many'} parameters, params_binary holds "
        f"{count}",
        hint="was the file's aabb_scale or per_level_scale changed after training?",
    )


def take_networks(vector: tcnn.Vector, shapes: Shapes, encoded: int) -> tuple[dict[str, LazyTensor], list[float]]:
    """(tensors of both networks in the names of ``ngp``, what is appended to the colour network's input).

    The colour network's columns become [all density outputs, harmonics, constants]; columns of padding zeros go.
    """
    tensors: dict[str, LazyTensor] = {}
    outputs = shapes.density.outputs
    for k, piece in enumerate(vector.mlp(shapes.density, outputs, range(encoded))):
        tensors[f"sigma_net.{k}.weight"] = piece
    columns = list(enumerate(shapes.direction.columns, start=outputs))
    harmonics = [at for at, (kind, _) in columns if kind == "sh"]
    rest = [(at, 1.0 if kind == "one" else shapes.direction.constants[k]) for at, (kind, k) in columns if kind != "sh"]
    order = itertools.chain(range(outputs), harmonics, (at for at, _ in rest))
    for k, piece in enumerate(vector.mlp(shapes.color, 3, list(order))):
        tensors[f"color_net.{k}.weight"] = piece
    return tensors, [value for _, value in rest]
