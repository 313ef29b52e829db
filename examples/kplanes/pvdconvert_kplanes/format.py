"""sarafridov/K-Planes ``model.pth`` with the ``config.py`` beside it. Imports no torch; nothing in a file is run.

Networks are tiny-cuda-nn's: one vector of matrices [out, in], inputs padded to a multiple of 16 by ones, outputs by
rows that mean nothing. The padding's columns act as a bias.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvdconvert.containers import Manifest
from pvdconvert.errors import InputError
from pvdconvert.plugin import Config, FormatBase, LazyTensor, Match, Parts, ReadOptions
from pvdconvert.scene import Box, Scene, Vec3

MARK = "field.grids.0.0"
HIDDEN, GEO = 64, 15
BASIS = 128
LLFF = (((-3.0, -1.67, -1.2), (3.0, 1.67, 1.2)), ((-1.5, -1.67, -1.0), (1.5, 1.67, 1.0)))
"""Boxes of forward-facing scenes, which the program has in NDC."""
REACH = 2.0
"""The program does not clip rays to ``field.aabb``: beyond it the planes' borders count. Cameras of its bounded scenes
stand 4 units away and sample from 2 to 6; twice the usual box of half side 1.5 holds what they see."""
ASSUMED = {
    "box": f"a box {REACH:g} times field.aabb, to which the program does not clip (--bounds)",
    "background": "a white background (--background)",
    "density_activation": "density exp(x - 1), as in all published settings (--config)",
}
_SKIPPED = re.compile(r"proposal_networks\..*|field\.direction_encoder\.params")


def probe(manifest: Manifest) -> Match | None:
    if not manifest.kind.startswith("torch-"):
        return None
    state = _state(manifest)
    if MARK not in state:
        return None
    decoder = next((k for k in ("color_net", "color_basis") if f"field.{k}.params" in state), None)
    if decoder is None or "field.aabb" not in state:
        return Match(0.2, f"has {MARK}, but no field.aabb or no decoder of K-Planes")
    return Match(0.95, f"field.aabb, {MARK} and field.{decoder}.params")


def _state(manifest: Manifest) -> dict[str, LazyTensor]:
    prefix = "model." if f"model.{MARK}" in manifest.tensors else ""
    return {k.removeprefix(prefix): t for k, t in manifest.tensors.items() if k.startswith(prefix)}


class KPlanesFile(FormatBase):
    """Read-only."""

    def read(self, manifest: Manifest, options: ReadOptions) -> Parts:
        where = f"{manifest.path}: kplanes"
        state = _state(manifest)
        settings, said = _settings(manifest, options)
        for key in ("field.aabb", MARK):
            if key not in state:
                raise InputError(f"{where}: tensor {key!r} is missing", hint="is it a model.pth of K-Planes?")
        box = _box(state["field.aabb"], where)
        _refuse_others(state, settings, box, where)
        resolutions, channels, tensors = _planes(state, where)
        config: Config = {"box": box.to_json(), "resolutions": resolutions, "channels": channels}
        config["scales"] = [max(1, round(r[0] / resolutions[0][0])) for r in resolutions]
        config["density_activation"], config["density_shift"] = _activation(settings, where)
        config |= _decoder(state, settings, channels, len(resolutions), tensors, where)
        for key in sorted(state):
            known = key == "field.aabb" or re.fullmatch(r"field\.(grids\..*|\w+\.params|appearance_embedding.*)", key)
            if not known and not _SKIPPED.fullmatch(key):
                raise InputError(f"{where}: tensor {key!r} has no place in this model")
        notes = ["the proposal networks are left out: they only place samples"]
        if "field.appearance_embedding.weight" in state:
            notes.append("the mean of the appearance embeddings is used, as the program does for new views")
        given = {"box": options.bounds, "background": options.background, "density_activation": said or None}
        assumed = tuple(key for key, value in given.items() if value is None)
        notes += [f"not in the file, assumed: {ASSUMED[key]}" for key in assumed]
        scene = Scene(
            options.bounds or Box(*_scaled(box, REACH)),
            background=options.background or (1.0, 1.0, 1.0),
            near=options.near,
            far=options.far,
            assumed=assumed,
        )
        step = manifest.meta.get("global_step")
        provenance = {"program": "sarafridov/K-Planes", **({"step": step} if step is not None else {})}
        return Parts("kplanes", config, tensors, scene, provenance, tuple(notes))


def _settings(manifest: Manifest, options: ReadOptions) -> tuple[dict[str, Any], bool]:
    """``config = {...}`` of --config FILE or of the config.py beside the model, as data; whether there was one."""
    if options.config is not None:
        path = options.config
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read: {error}") from error
    elif "config.py" in manifest.siblings():
        path, text = manifest.folder / "config.py", manifest.sibling_text("config.py")
    else:
        return {}, False
    try:
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == ["config"]:
                found = ast.literal_eval(node.value)
                if isinstance(found, dict):
                    return found, True
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise InputError(f"{path}: kplanes: its settings are not plain values: {error}") from error
    raise InputError(f"{path}: kplanes: holds no config = {{...}}", hint="--config names the config.py of the run")


def _box(aabb: LazyTensor, where: str) -> Box:
    if aabb.shape != (2, 3):
        raise InputError(f"{where}: tensor 'field.aabb' is {list(aabb.shape)}, expected [2, 3]")
    low, high = (tuple(float(v) for v in row) for row in aabb.numpy())
    return Box((low[0], low[1], low[2]), (high[0], high[1], high[2]))


def _scaled(box: Box, factor: float) -> tuple[Vec3, Vec3]:
    """Corners of ``box`` grown about its centre."""
    (x, y, z), (a, b, c) = box.center, (0.5 * factor * s for s in box.size)
    return (x - a, y - b, z - c), (x + a, y + b, z + c)


def _refuse_others(state: Mapping[str, Any], settings: Mapping[str, Any], box: Box, where: str) -> None:
    if any(re.fullmatch(r"field\.grids\.\d+\.[3-9]", k) for k in state):
        raise InputError(f"{where}: a dynamic scene (planes over time): only static ones can be read")
    contracted = settings.get("contract") or settings.get("is_contracted")
    if contracted or any(k.startswith("spatial_distortion.") for k in state):
        raise InputError(f"{where}: a contracted scene (spatial_distortion): only bounded ones can be read")
    told = settings.get("ndc", settings.get("is_ndc"))
    forward = any(np.allclose([box.min, box.max], known, atol=1e-5) for known in LLFF)
    if told or (told is None and forward):
        raise InputError(
            f"{where}: a forward-facing scene (NDC): its colours depend on warped directions, which fields do not get",
            hint="only scenes in world coordinates can be read",
        )


def _planes(state: Mapping[str, LazyTensor], where: str) -> tuple[list[list[int]], int, dict[str, LazyTensor]]:
    """(vertices along x, y, z of each scale, channels, planes [1, C, H, W]): plane (a, b) is [1, C, n[b], n[a]]."""
    tensors: dict[str, LazyTensor] = {}
    resolutions: list[list[int]] = []
    channels = state[MARK].shape[1] if len(state[MARK].shape) == 4 else 0
    while f"field.grids.{len(resolutions)}.0" in state:
        s = len(resolutions)
        keys = [f"field.grids.{s}.{p}" for p in range(3)]
        for key in keys:
            if key not in state or len(state[key].shape) != 4 or state[key].dtype != "float32":
                raise InputError(f"{where}: tensor {key!r} is no plane of float32 [1, C, H, W]")
        (_, _, y, x), (_, _, z, _), _ = (state[key].shape for key in keys)
        for key, size in zip(keys, ((y, x), (z, x), (z, y)), strict=True):
            if state[key].shape != (1, channels, *size):
                raise InputError(
                    f"{where}: tensor {key!r} is {list(state[key].shape)}, expected {[1, channels, *size]}"
                )
            tensors[key.removeprefix("field.")] = state[key]
        resolutions.append([x, y, z])
    return resolutions, channels, tensors


def _activation(settings: Mapping[str, Any], where: str) -> tuple[str, float]:
    name = settings.get("density_activation", "trunc_exp")
    if name not in ("trunc_exp", "relu"):
        raise InputError(f"{where}: density_activation {name!r} is unknown", hint="known: trunc_exp, relu")
    return ("exp", -1.0) if name == "trunc_exp" else ("relu", 0.0)


@dataclasses.dataclass(frozen=True)
class Layer:
    """Weight or bias of a layer whose matrix [rows, columns] begins at ``start`` of a vector; read on demand.

    The weight is [units, wide]. The columns beyond meet ``constants``: with those given this is the bias [units].
    """

    source: LazyTensor
    start: int
    rows: int
    columns: int
    units: int
    wide: int
    constants: NDArray[Any] | None = None
    dtype: str = "float32"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.units, self.wide) if self.constants is None else (self.units,)

    def numpy(self) -> NDArray[Any]:
        flat = self.source.numpy()[self.start : self.start + self.rows * self.columns]
        matrix = flat.reshape(self.rows, self.columns)[: self.units].astype(np.float32)
        if self.constants is None:
            return np.ascontiguousarray(matrix[:, : self.wide])
        return np.asarray(matrix[:, self.wide :] @ self.constants, np.float32)


def _network(
    params: LazyTensor, name: str, widths: list[int], last: int, extra: NDArray[Any] | None = None
) -> dict[str, LazyTensor]:
    """Layers of a network of tiny-cuda-nn without biases, ``last`` rows in its last matrix -> weights and biases.

    The columns beyond the input meet ``extra`` numbers, then ones: constants, so that they become the first bias.
    """
    out: dict[str, LazyTensor] = {}
    start = 0
    for i, (wide, units) in enumerate(itertools.pairwise(widths)):
        rows = last if i == len(widths) - 2 else units
        constants = np.zeros(0, np.float32)
        if i == 0:
            given = constants if extra is None else extra
            constants = np.concatenate([given, np.ones(_padded(wide + len(given)) - wide - len(given), np.float32)])
        layer = Layer(params, start, rows, wide + len(constants), units, wide)
        out[f"{name}.{i}.weight"] = layer
        out[f"{name}.{i}.bias"] = dataclasses.replace(layer, constants=constants)
        start += rows * layer.columns
    return out


def _padded(n: int) -> int:
    return -(-n // 16) * 16


def _decoder(
    state: Mapping[str, LazyTensor],
    settings: Mapping[str, Any],
    channels: int,
    scales: int,
    tensors: dict[str, LazyTensor],
    where: str,
) -> Config:
    """The networks' shapes, told from the lengths of their vectors."""
    length = {k.split(".")[1]: math.prod(t.shape) for k, t in state.items() if re.fullmatch(r"field\.\w+\.params", k)}
    linear = "color_basis" in length
    if ("color_net" in length) == linear or "sigma_net" not in length:
        raise InputError(f"{where}: expected field.sigma_net and either field.color_net or field.color_basis")
    embedding = state.get("field.appearance_embedding.weight")
    extra = None if embedding is None else embedding.numpy().mean(axis=0).astype(np.float32).reshape(-1)
    more = 0 if extra is None else len(extra)
    told = settings.get("concat_features_across_scales")
    for concat in (told,) if isinstance(told, bool) else (True, False):
        width = channels * (scales if concat else 1)
        sigma = state["field.sigma_net.params"]
        if linear:
            rows = next((r for r in (16, 8) if r * _padded(width) == length["sigma_net"]), None)
            depth, left = divmod(
                length["color_basis"] - BASIS * _padded(3 + more) - BASIS * _padded(3 * width), BASIS**2
            )
            if rows is None or left or depth < 0:
                continue
            basis = [3, *[BASIS] * (depth + 1), 3 * width]
            tensors |= _network(sigma, "sigma_net", [width, 1], rows)
            tensors |= _network(state["field.color_basis.params"], "color_basis", basis, _padded(3 * width), extra)
            return {"decoder": "linear", "concat": concat, "basis_width": BASIS, "basis_layers": depth + 1}
        color = HIDDEN * _padded(16 + GEO + more) + HIDDEN**2 + 16 * HIDDEN
        if length["sigma_net"] == HIDDEN * _padded(width) + 16 * HIDDEN and length["color_net"] == color:
            tensors |= _network(sigma, "sigma_net", [width, HIDDEN, GEO + 1], 16)
            widths = [16 + GEO, HIDDEN, HIDDEN, 3]
            tensors |= _network(state["field.color_net.params"], "color_net", widths, 16, extra)
            return {"decoder": "hybrid", "concat": concat, "hidden": HIDDEN, "geo_features": GEO, "color_layers": 2}
    raise InputError(
        f"{where}: {length} parameters do not fit {scales} scales of {channels} channels in any decoder of K-Planes"
    )
