"""ashawkey/torch-ngp ``ngp*.pth``: hash grid and tiny MLPs (layouts section 2.1). Reads and writes; imports no torch.

The file lacks the grid's resolutions: they are told from ``encoder.offsets``, or given (``desired_resolution``,
``per_level_scale`` in ``ReadOptions.extra``). ``density_bitfield`` is part of the function: the renderer skips the rest.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pvdconvert.containers import Manifest, torch_zip_writer
from pvdconvert.errors import InputError, RequestError
from pvdconvert.plugin import (
    ArrayTensor,
    Config,
    FormatBase,
    FormatSpec,
    LazyTensor,
    Limits,
    Match,
    Parts,
    ReadOptions,
)
from pvdconvert.scene import Box, Scene
from pvdconvert_formats import _torch_ngp_grid as grids
from pvdconvert_formats._nerf_layers import assume, positive

SPEC = FormatSpec(
    name="torch-ngp",
    title="ashawkey/torch-ngp: ngp*.pth, hash grid",
    probe="pvdconvert_formats.torch_ngp:probe",
    code="pvdconvert_formats.torch_ngp:TorchNgp",
    architectures=("ngp",),
    suffixes=(".pth",),
    can_write=True,
    program="ashawkey/torch-ngp",
    licence="MIT",
)
STEP = 2 * math.sqrt(3) / 1024
MIN_NEAR = 0.2
EXTRA = "pvdconvert"
"""A top-level entry of our own, ignored by the program, for what the layout cannot say."""
FIXED = {
    "index_rule": "torch-ngp",
    "interpolation": "linear",
    "color_input": "sh+geo",
    "density_activation": "exp",
    "color_activation": "sigmoid",
    "density_scale": 1.0,
}
_MARKS = ("encoder.embeddings", "encoder.offsets", "sigma_net.0.weight", "color_net.0.weight")
_BUFFERS = {"aabb_train", "aabb_infer", "density_grid", "density_bitfield", "step_counter", "encoder.offsets"}


def _state(manifest: Manifest) -> dict[str, LazyTensor]:
    """The state_dict's tensors: under "model", or bare."""
    prefix = "model." if f"model.{_MARKS[0]}" in manifest.tensors else ""
    return {k.removeprefix(prefix): t for k, t in manifest.tensors.items() if k.startswith(prefix)}


def probe(manifest: Manifest) -> Match | None:
    if not manifest.kind.startswith("torch-"):
        return None
    state = _state(manifest)
    missing = [k for k in _MARKS if k not in state]
    if len(missing) == len(_MARKS):
        return None
    if missing:
        return Match(0.1, f"has {next(k for k in _MARKS if k in state)!r} but not {missing[0]!r}")
    if state["encoder.offsets"].shape == (15,) and state["sigma_net.0.weight"].shape == (64, 28):
        return Match(
            0.2, "a torch-ngp grid, but of 14 levels: AAAI2023-PVD, whose density is clamped (not yet supported)"
        )
    odd = _surplus(state)
    if odd:
        return Match(0.2, f"a torch-ngp hash grid, but with {odd[0]!r}, which its NeRF network does not have")
    return Match(0.95, "encoder.embeddings with encoder.offsets, sigma_net and color_net")


def _surplus(state: Mapping[str, Any]) -> list[str]:
    own = re.compile(r"(sigma_net|color_net|bg_net)\.\d+\.weight|encoder(_bg)?\.(embeddings|offsets)")
    return sorted(k for k in state if k not in _BUFFERS and not own.fullmatch(k))


class TorchNgp(FormatBase):
    """Reads best and full checkpoints and bare state_dicts; writes the best checkpoint's layout."""

    def read(self, manifest: Manifest, options: ReadOptions) -> Parts:
        where = f"{manifest.path}: torch-ngp"
        state = _state(manifest)
        for key in _MARKS:
            if key not in state:
                raise InputError(f"{where}: tensor {key!r} is missing")
        for key in _surplus(state)[:1]:
            raise InputError(f"{where}: tensor {key!r} has no place in its NeRF network")
        notes: list[str] = []
        own = manifest.tree.get(EXTRA) if isinstance(manifest.tree, dict) else None
        own = own if isinstance(own, dict) else {}
        bound, box = _boxes(state, options, where)
        config: Config = {**FIXED, "box": [[-bound] * 3, [bound] * 3], "mask": None}
        grid, assumed = _grid(state, bound, options, own, where, notes)
        config |= grid | _networks(state, config | grid, where)
        tensors = {k: t for k, t in state.items() if k not in _BUFFERS and not k.startswith(("encoder_bg.", "bg_net."))}
        if len(tensors) != len([k for k in state if k not in _BUFFERS]):
            notes.append("its background network (bg_net) is left out: rays end on a white background")
        if "density_bitfield" in state:
            _mask(state["density_bitfield"], bound, config, tensors, where, notes)
        white = own.get("background", [1.0, 1.0, 1.0])
        scene = Scene(box, background=tuple(white), near=MIN_NEAR, step=STEP)  # type: ignore[arg-type]
        scene = assume(scene, options, ("near", "step", *(() if "background" in own else ("background",)), *assumed))
        step = {k: manifest.meta[k] for k in ("epoch", "global_step") if k in manifest.meta}
        return Parts("ngp", config, tensors, scene, {"program": "ashawkey/torch-ngp", **step}, tuple(notes))

    def limits(self, architecture: str) -> Limits:
        # The rest are the defaults that the program rebuilds its network with; box: the scene's, a cube around 0.
        program = {"levels": 16, "features": 2, "log2_table": 19, "base_resolution": 16, "hidden": 64, "density_layers": 1,
                   "geo_features": 15, "color_hidden": 64, "color_layers": 2, "sh_bands": 4, "box": None}  # fmt: skip
        return Limits({**FIXED, **program})

    def write(self, parts: Parts, path: Path) -> None:
        where = f"{path}: torch-ngp"
        config = parts.config
        if parts.architecture != "ngp":
            raise RequestError(f"{where}: holds ngp, not {parts.architecture}", hint="add --to ngp")
        for key, value in FIXED.items():
            if config.get(key, value) != value:
                raise RequestError(
                    f"{where}: the layout only holds {key} = {value}, this field has {config[key]}",
                    hint="convert --to ngp --as torch-ngp trains one that fits",
                )
        bound = _bound_of(parts, where)
        arrays = {k: t.numpy() for k, t in parts.tensors.items()}
        bits = arrays.pop("mask.bits", None)
        offsets = _offsets_of(config)
        if arrays["encoder.embeddings"].shape[0] != offsets[-1]:
            raise RequestError(
                f"{where}: offsets end at {offsets[-1]}, the table has {len(arrays['encoder.embeddings'])} rows"
            )
        model: OrderedDict[str, Any] = OrderedDict()
        model["aabb_train"] = np.array([-bound] * 3 + [bound] * 3, np.float32)
        model["aabb_infer"] = np.array([*parts.scene.box.min, *parts.scene.box.max], np.float32)
        if bits is not None:
            model["density_bitfield"] = grids.write_bitfield(config["mask"], bits, bound)
        model["encoder.embeddings"] = arrays.pop("encoder.embeddings")
        model["encoder.offsets"] = np.array(offsets, np.int32)
        model.update(arrays)
        said = parts.provenance
        top: dict[str, Any] = {
            "epoch": said["epoch"] if type(said.get("epoch")) is int else 0,
            "global_step": said["global_step"] if type(said.get("global_step")) is int else 0,
            "stats": {"loss": [], "valid_loss": [], "results": [], "checkpoints": [], "best_result": None},
        }
        extra = _unsaid(parts, offsets, bound)
        if extra:
            top[EXTRA] = extra
        torch_zip_writer.write(path, {**top, "model": model})


def _boxes(state: Mapping[str, LazyTensor], options: ReadOptions, where: str) -> tuple[float, Box]:
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


def _grid(
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
    sizes = [b - a for a, b in zip(offsets, offsets[1:])]
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
        scale = grids.scale_of(levels, base, finest)
        if len(others) > 1 or (dense < 2 and levels > 1):
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


def _networks(state: Mapping[str, LazyTensor], config: Config, where: str) -> Config:
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


def _mask(
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
    elif (found := grids.read_bitfield(bits, bound)) is None:
        notes.append(f"density_bitfield of bound {bound:g} is too large to apply: cells that it hides may show")
    else:
        config["mask"], packed = found
        tensors["mask.bits"] = ArrayTensor(packed)


def _bound_of(parts: Parts, where: str) -> float:
    """The bound of the grid's box. Raises RequestError unless that is a cube around 0."""
    box = parts.config.get("box")
    low, high = box if box is not None else (parts.scene.box.min, parts.scene.box.max)
    bound = float(np.float32(high[0]))
    if any(float(np.float32(v)) != bound for v in high) or any(float(np.float32(v)) != -bound for v in low):
        raise RequestError(
            f"{where}: the layout only holds a cube around 0, the grid's box is {list(low)} .. {list(high)}",
            hint="convert with --as torch-ngp and --bounds of such a cube",
        )
    return bound


def _offsets_of(config: Config) -> list[int]:
    """First row of each level and their end, as stored or by the rule."""
    if config.get("offsets") is not None:
        return [int(v) for v in config["offsets"]]
    sizes = grids.level_sizes(
        config["levels"], config["base_resolution"], config["per_level_scale"], config["log2_table"]
    )
    return [sum(sizes[:k]) for k in range(len(sizes) + 1)]


def _unsaid(parts: Parts, offsets: list[int], bound: float) -> dict[str, Any]:
    """What our own reader could not tell from the layout alone."""
    out: dict[str, Any] = {}
    sizes = [b - a for a, b in zip(offsets, offsets[1:])]
    scale = float(parts.config["per_level_scale"])
    finest, _, others = grids.finest_of(sizes, int(parts.config["base_resolution"]), bound)
    if finest is None or grids.scale_of(len(sizes), int(parts.config["base_resolution"]), finest) != scale:
        out["per_level_scale"] = scale
    if parts.scene.background not in (None, (1.0, 1.0, 1.0)):
        out["background"] = list(parts.scene.background or ())
    return out
