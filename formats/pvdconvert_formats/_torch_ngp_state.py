"""Configuration of torch-ngp's network out of its state_dict's tensors. Imports no torch. Layouts section 2.1."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

from pvdconvert.errors import InputError
from pvdconvert.plugin import ArrayTensor, Config, LazyTensor, ReadOptions
from pvdconvert.scene import Box
from pvdconvert_formats import _torch_ngp_grid as grids
from pvdconvert_formats._nerf_layers import positive


def read_boxes(state: Mapping[str, LazyTensor], options: ReadOptions, where: str) -> tuple[float, Box]:
    """(bound, the box that the renderer clips to)."""
    sides = {}
    for key in ("aabb_train", "aabb_infer"):
        if key in state:
            if state[key].shape != (6,):
                raise InputError(f"{where}: tensor {key!r} is {list(state[key].shape)}, not [6]")
            values = [float(v) for v in state[key].numpy()]
            try:
                sides[key] = Box(tuple(values[:3]), tuple(values[3:]))  # type: ignore[arg-type]
            except InputError as error:
                raise InputError(f"{where}: {key}: {error}") from error
    if not sides:
        if options.bounds is None:
            raise InputError(
                f"{where}: no aabb_infer in the file, so its bound is unknown", hint="add --bounds (six numbers)"
            )
        sides["--bounds"] = options.bounds
    key, cube = next(iter(sides.items()))
    bound = cube.max[0]
    if bound <= 0 or any(abs(v) != bound for v in (*cube.min, *cube.max)):
        raise InputError(f"{where}: {key} is {cube.min} .. {cube.max}, which is no cube around 0")
    return bound, sides.get("aabb_infer", cube)


def read_grid(
    state: Mapping[str, LazyTensor],
    bound: float,
    options: ReadOptions,
    own: Mapping[str, Any],
    where: str,
    notes: list[str],
) -> tuple[Config, tuple[str, ...]]:
    """(configuration of the grid, what of it is assumed)."""
    stored, table = state["encoder.offsets"], state["encoder.embeddings"]
    if len(stored.shape) != 1 or not 2 <= stored.shape[0] <= 65 or "int" not in stored.dtype:
        raise InputError(f"{where}: encoder.offsets is {stored.dtype} {list(stored.shape)}")
    offsets = [int(v) for v in stored.numpy()]
    sizes = [b - a for a, b in itertools.pairwise(offsets)]
    if offsets[0] != 0 or min(sizes) < 1 or max(sizes) > 1 << 30:
        raise InputError(f"{where}: encoder.offsets {offsets[:3]} .. {offsets[-1]} do not grow from 0")
    if len(table.shape) != 2 or table.shape[0] != offsets[-1] or not 1 <= table.shape[1] <= 32:
        raise InputError(f"{where}: encoder.embeddings is {list(table.shape)}, expected [{offsets[-1]}, features]")
    levels, log2_table = len(sizes), grids.table_of(sizes)
    assumed: tuple[str, ...] = ()
    base = grids.base_of(sizes[0]) if sizes[0] != 1 << log2_table else None
    if base is None:
        base, assumed = grids.BASE, ("base_resolution",)
        notes.append(f"base resolution is not in the file: {base} assumed")
    desired = positive(options, "desired_resolution", where)
    scale = positive(options, "per_level_scale", where) or own.get("per_level_scale")
    if desired is not None:
        scale = grids.scale_of(levels, base, desired)
    elif not isinstance(scale, float):
        finest, dense, others = grids.finest_of(sizes, base, bound)
        if finest is None:
            raise InputError(
                f"{where}: encoder.offsets fit no usual finest resolution, so the grid's scale is unknown",
                hint="give the program's desired_resolution, e.g. 2048 times its bound",
            )
        usual = finest == grids.DESIRED * bound
        if not usual and (len(others) > 1 or dense < 3):
            several = ", ".join(f"{v:g}" for v in others)
            raise InputError(
                f"{where}: encoder.offsets do not pin the finest resolution: {several} would fit",
                hint="give the program's desired_resolution",
            )
        scale = grids.scale_of(levels, base, finest)
        if not usual or (dense < 2 and levels > 1):
            assumed = (*assumed, "desired_resolution")
            notes.append(
                f"desired_resolution is not in the file: {finest:g} assumed; {dense} dense levels agree with it"
            )
    config = {
        "levels": levels,
        "features": table.shape[1],
        "log2_table": log2_table,
        "base_resolution": base,
        "per_level_scale": scale,
        "offsets": offsets,
    }
    return config, assumed


def read_networks(state: Mapping[str, LazyTensor], config: Config, where: str) -> Config:
    """Widths out of the weights [out, in] of both networks."""

    def chain(net: str, wide: int | None) -> list[int]:
        widths: list[int] = []
        for k in range(sum(key.startswith(f"{net}.") for key in state)):
            tensor = state.get(f"{net}.{k}.weight")
            if tensor is None or len(tensor.shape) != 2 or (wide is not None and tensor.shape[1] != wide):
                shape = "missing" if tensor is None else list(tensor.shape)
                raise InputError(f"{where}: tensor '{net}.{k}.weight' is {shape}, expected [*, {wide}]")
            widths += [tensor.shape[1]] if not widths else []
            wide = tensor.shape[0]
            widths.append(wide)
        if len(set(widths[1:-1])) > 1:
            raise InputError(f"{where}: {net} has hidden layers of unequal width {widths[1:-1]}")
        return widths

    density = chain("sigma_net", config["levels"] * config["features"])
    color = chain("color_net", None)
    geo = density[-1] - 1
    bands = math.isqrt(max(0, color[0] - geo))
    if geo < 0 or bands**2 + geo != color[0] or not 1 <= bands <= 8 or color[-1] != 3:
        raise InputError(
            f"{where}: color_net maps {color[0]} to {color[-1]}, which is no harmonics and {geo} features to 3 colours"
        )
    hidden = density[1] if len(density) > 2 else 64
    return {
        "hidden": hidden,
        "density_layers": len(density) - 2,
        "geo_features": geo,
        "color_hidden": color[1] if len(color) > 2 else hidden,
        "color_layers": len(color) - 2,
        "sh_bands": bands,
    }


def read_mask(
    bitfield: LazyTensor, bound: float, config: Config, tensors: dict[str, LazyTensor], where: str, notes: list[str]
) -> None:
    """Take the bitfield into ``config`` and ``tensors``, or say why not."""
    size = grids.cascades(bound) * grids.GRID**3 // 8
    if bitfield.shape != (size,) or bitfield.dtype != "uint8":
        raise InputError(
            f"{where}: density_bitfield is {bitfield.dtype} {list(bitfield.shape)}, expected uint8 [{size}]"
        )
    bits = bitfield.numpy()
    if not bits.any():
        notes.append("density_bitfield is all zero (never updated): ignored")
    elif bool((bits == 255).all()):
        pass  # everything may be filled: no mask
    else:
        config["mask"], packed = grids.read_bitfield(bits, bound)
        tensors["mask.bits"] = ArrayTensor(packed)
