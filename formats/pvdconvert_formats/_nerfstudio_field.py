"""nerfstudio's NerfactoField, of nerfacto and instant-ngp, as ``ngp`` (layouts 7.1 and 7.2). Imports no torch.

Two implementations are two functions: torch (every level hashed, biases, harmonics of (d + 1) / 2) and tiny-cuda-nn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from pvdconvert.errors import InputError
from pvdconvert.plugin import ArrayTensor, Config, LazyTensor
from pvdconvert_formats import _tcnn as tcnn
from pvdconvert_formats._lazy import need
from pvdconvert_formats._nerfstudio_run import Run

Tensors = dict[str, LazyTensor]
State = Mapping[str, LazyTensor]
HARMONICS = 16
GEO = 15
MAX_HIDDEN = 8
EMBEDDING = "field.embedding_appearance.embedding.weight"
_TABLES = ("mlp_base.model.0.hash_table", "mlp_base_grid.hash_table", "mlp_base.0.hash_table")
_LAYERS = ("mlp_base.model.1.layers", "mlp_base_mlp.layers", "mlp_base.1.layers")
_JOINED = ("mlp_base.model.params", "mlp_base.params")
_HEADS = ("mlp_head.tcnn_encoding.params", "mlp_head.params")


def grid_config(state: State, run: Run, where: str) -> Config:
    """The hash grid: sizes are buffers of newer files, else settings."""

    def size(name: str, default: int, low: int, high: int) -> int:
        stored = state.get(f"field.{name}")
        value = int(stored.numpy()) if stored is not None and stored.shape == () else run.get(name, default)
        if not low <= value <= high:
            raise InputError(f"{where}: {name} is {value}, not in {low}..{high}")
        return value

    levels, finest = size("num_levels", 16, 1, 64), size("max_res", 2048, 1, 1 << 22)
    base = run.get("base_res", 16)
    if not 1 <= base <= finest:
        raise InputError(f"{where}: base_res {base} is not in 1..{finest}")
    scale = float(np.exp((np.log(finest) - np.log(base)) / (levels - 1))) if levels > 1 else 1.0
    return {
        "levels": levels,
        "features": run.get("features_per_level", 2),
        "log2_table": size("log2_hashmap_size", 19, 3, 30),
        "base_resolution": base,
        "per_level_scale": scale,
    }


def constants(state: State, choice: str | None, average: bool, where: str) -> tuple[list[float], tuple[str, ...]]:
    """(what the colour network is shown in place of an image's appearance, notes)."""
    table = state.get(EMBEDDING)
    if table is None:
        if choice is not None:
            raise InputError(
                f"{where}: has no appearance embedding to choose from", hint="leave out --extra appearance"
            )
        return [], ()
    count, width = need(state, EMBEDDING, (None, None), where).shape
    choice = choice or ("mean" if average else "zero")
    if choice == "zero":
        return [0.0] * width, (f"appearance: zeros, one of {count} images with --extra appearance=N, or mean",)
    values = table.numpy().astype(np.float64)
    if choice == "mean":
        note = f"appearance: the mean of {count} images; one of them with --extra appearance=N, or zero"
        return [float(np.float32(v)) for v in values.mean(0)], (note,)
    if not re.fullmatch(r"\d{1,9}", choice) or int(choice) >= count:
        raise InputError(f"{where}: appearance={choice!r:.20}: not mean, zero, or an image in 0..{count - 1}")
    return [float(v) for v in values[int(choice)]], (f"appearance: that of image {choice} of {count}",)


def field(state: State, run: Run, shown: list[float], where: str) -> tuple[Config, Tensors]:
    """Configuration and tensors of ``ngp``; ``shown`` are the appearance's numbers."""
    grid = grid_config(state, run, where)
    table = next((k for k in _TABLES if f"field.{k}" in state), None)
    out, tensors = _torch(state, grid, table, shown, where) if table else _tcnn(state, grid, run, shown, where)
    return {**grid, **out, "color_input": "sh+geo", "color_constants": out.get("color_constants") or None}, tensors


def _torch(state: State, grid: Config, table: str, shown: list[float], where: str) -> tuple[Config, Tensors]:
    rows = grid["levels"] << grid["log2_table"]
    tensors: Tensors = {"encoder.embeddings": need(state, f"field.{table}", (rows, grid["features"]), where)}
    first = next((k for k in _LAYERS if f"field.{k}.0.weight" in state), _LAYERS[0])
    density = _layers(state, f"field.{first}", "sigma_net", grid["levels"] * grid["features"], tensors, where)
    color = _layers(
        state, "field.mlp_head.layers", "color_net", HARMONICS + density[-1] - 1 + len(shown), tensors, where
    )
    if color[-1] != 3:
        raise InputError(f"{where}: mlp_head has {color[-1]} outputs, not 3")
    return {
        "index_rule": "nerfstudio",
        "view_input": "half",
        "bias": True,
        **_widths(density, color),
        "color_constants": shown,
    }, tensors


def _layers(state: State, prefix: str, name: str, wide: int, tensors: Tensors, where: str) -> list[int]:
    """Linear layers ``prefix``.k -> ``name``.k; their widths."""
    widths, count = [wide], sum(re.fullmatch(re.escape(prefix) + r"\.\d+\.weight", k) is not None for k in state)
    for k in range(max(1, count)):
        weight = need(state, f"{prefix}.{k}.weight", (None, widths[-1]), where)
        tensors[f"{name}.{k}.weight"] = weight
        tensors[f"{name}.{k}.bias"] = need(state, f"{prefix}.{k}.bias", (weight.shape[0],), where)
        widths.append(weight.shape[0])
    if len(set(widths[1:-1])) > 1:
        raise InputError(f"{where}: {prefix} has hidden layers of unequal width {widths[1:-1]}")
    return widths


def _widths(density: list[int], color: list[int]) -> Config:
    hidden = density[1] if len(density) > 2 else 64
    return {
        "hidden": hidden,
        "density_layers": len(density) - 2,
        "geo_features": density[-1] - 1,
        "color_hidden": color[1] if len(color) > 2 else hidden,
        "color_layers": len(color) - 2,
        "sh_bands": 4,
    }


def _network(size: int, inputs: int, width: int, outputs: int, what: str, where: str) -> tcnn.Mlp:
    """The network of ``size`` parameters: how many hidden layers it has is told by them."""
    for hidden in range(1, MAX_HIDDEN + 1):
        mlp = tcnn.Mlp(tcnn.padded(inputs, 16), width, hidden, tcnn.padded(outputs, 16))
        if mlp.size == size:
            return mlp
    raise InputError(f"{where}: {what} has {size} parameters, which no network of width {width} has")


def _tcnn(state: State, grid: Config, run: Run, shown: list[float], where: str) -> tuple[Config, Tensors]:
    columns = grid["levels"] * grid["features"]
    grid["per_level_scale"] = float(np.float32(grid["per_level_scale"]))
    sizes = tcnn.level_entries(grid["levels"], grid["base_resolution"], grid["per_level_scale"], grid["log2_table"])
    entries = sum(sizes)
    joined = next((k for k in _JOINED if f"field.{k}" in state), None)
    if joined is not None:
        network = tcnn.Vector(need(state, f"field.{joined}", (None,), where))
        table = network
    else:
        network = tcnn.Vector(need(state, "field.mlp_base_mlp.tcnn_encoding.params", (None,), where))
        table = tcnn.Vector(need(state, "field.mlp_base_grid.tcnn_encoding.params", (None,), where))
        if columns % 16:
            raise InputError(f"{where}: a grid of {columns} features feeds its network ones, which is not supported")
    length = entries * grid["features"]
    if table.left < length or (table is not network and table.left != length):
        raise InputError(
            f"{where}: its grid has {table.left} parameters, {length} are expected",
            hint="does config.yml belong to this checkpoint?",
        )
    size = network.left - (length if table is network else 0)
    hidden, color_hidden = run.get("hidden_dim", 64), run.get("hidden_dim_color", 64)
    mlp = _network(size, columns, hidden, 1 + GEO, "mlp_base", where)
    head_key = next((k for k in _HEADS if f"field.{k}" in state), _HEADS[0])
    head = tcnn.Vector(need(state, f"field.{head_key}", (None,), where))
    inputs = HARMONICS + GEO + len(shown)
    color = _network(head.left, inputs, color_hidden, 3, "mlp_head", where)
    tensors: Tensors = {}
    for k, piece in enumerate(network.mlp(mlp, 1 + GEO, order=range(columns))):
        tensors[f"sigma_net.{k}.weight"] = piece
    tensors["encoder.embeddings"] = table.grid(entries, grid["features"])
    for k, piece in enumerate(head.mlp(color, 3)):
        tensors[f"color_net.{k}.weight"] = piece
    return {
        "index_rule": "tcnn",
        "hidden": hidden,
        "density_layers": mlp.hidden,
        "geo_features": GEO,
        "color_hidden": color_hidden,
        "color_layers": color.hidden,
        "sh_bands": 4,
        # tiny-cuda-nn pads the input of a network with ones.
        "color_constants": [*shown, *[1.0] * (color.inputs - inputs)],
    }, tensors


def occupancy(state: State, config: Config, tensors: Tensors, where: str) -> tuple[str, ...]:
    """nerfacc's grid of instant-ngp, which its sampler skips by, into ``config`` and ``tensors``; notes."""
    cells, boxes = state.get("occupancy_grid.binaries"), state.get("occupancy_grid.aabbs")
    if cells is None or boxes is None:
        return ("its occupancy grid is of an old layout and left out: cells that it hides may show",)
    if len(cells.shape) != 4 or boxes.shape != (cells.shape[0], 6) or cells.dtype not in ("bool", "uint8"):
        raise InputError(f"{where}: occupancy_grid.binaries is {cells.dtype} {list(cells.shape)}")
    bits, cubes = cells.numpy().astype(bool), boxes.numpy().astype(np.float64)
    if not bits.any():
        return ("its occupancy grid is empty (never updated): ignored",)
    sides = cubes[:, 3:] - cubes[:, :3]
    centers = (cubes[:, 3:] + cubes[:, :3]) / 2
    cubic = np.allclose(sides, sides[:, :1], rtol=1e-5) and np.allclose(centers, centers[:1], atol=1e-5 * sides.max())
    if not cubic or len(set(cells.shape[1:])) > 1:
        return ("its occupancy grid is not of cubes and left out: cells that it hides may show",)
    center, halves = [float(v) for v in centers[0]], [float(v) / 2 for v in sides[:, 0]]
    n = cells.shape[1]
    if len(halves) == 1:
        origin = [c - halves[0] for c in center]
        config["mask"] = {"shape": [n, n, n], "origin": origin, "cell": 2 * halves[0] / n}
    else:
        config["mask"] = {"shape": [int(v) for v in cells.shape], "center": center, "halves": halves}
    tensors["mask.bits"] = ArrayTensor(np.packbits(bits.reshape(-1), bitorder="little"))
    return ()
