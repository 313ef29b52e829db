"""Configuration and tensors of `tensorf` and `tensorf-cp` out of TensoRF's ``kwargs`` and ``state_dict``. No torch.

Layouts sections 3.1 to 3.3.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from pvdconvert.containers import Manifest
from pvdconvert.errors import InputError
from pvdconvert.plugin import Config, LazyTensor
from pvdconvert.scene import Box
from pvdconvert_formats._nerf_layers import Changed, Tensors, float32

SHADINGS = ("MLP_Fea", "MLP_PE", "MLP", "SH", "RGB")


@dataclasses.dataclass
class File:
    """Tensors and constructor's arguments of a file; ``where`` names it in errors."""

    where: str
    state: Tensors
    kwargs: Mapping[str, Any]

    def number(self, key: str) -> float:
        value = _plain(self.kwargs[key])
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(f"{self.where}: kwargs.{key} is {value!r:.60}, not a number")
        return float(value)

    def count(self, key: str) -> int:
        value = self.number(key)
        if not value.is_integer() or not 0 <= value <= 4096:
            raise InputError(f"{self.where}: kwargs.{key} is {value:g}, not a small whole number")
        return int(value)

    def pair(self, key: str) -> tuple[float, float]:
        value = _plain(self.kwargs[key])
        if not isinstance(value, list | tuple) or len(value) != 2 or not all(isinstance(v, int | float) for v in value):
            raise InputError(f"{self.where}: kwargs.{key} is {value!r:.60}, not two numbers")
        return float(value[0]), float(value[1])

    def box(self, tensor: LazyTensor | None, key: str) -> Box:
        if tensor is None or tensor.shape != (2, 3):
            raise InputError(
                f"{self.where}: {key} is {'missing' if tensor is None else list(tensor.shape)}, not [2, 3]"
            )
        low, high = tensor.numpy().astype(np.float64).tolist()
        try:
            return Box(tuple(low), tuple(high))
        except InputError as error:
            raise InputError(f"{self.where}: {key}: {error}") from error

    def shape(self, key: str, pattern: tuple[int | None, ...]) -> tuple[int, ...]:
        """The shape of ``key``; None in ``pattern`` is any size."""
        tensor = self.state.get(key)
        if tensor is None:
            raise InputError(f"{self.where}: tensor {key!r} is missing", hint="is the file complete?")
        fits = len(tensor.shape) == len(pattern) and all(p in (None, s) for p, s in zip(pattern, tensor.shape))
        if not fits or not tensor.dtype.startswith(("float", "bfloat")):
            wanted = ["*" if p is None else p for p in pattern]
            raise InputError(f"{self.where}: tensor {key!r} is {tensor.dtype} {list(tensor.shape)}, expected {wanted}")
        return tensor.shape

    def _resolution(self, found: list[int]) -> list[int]:
        said = _plain(self.kwargs.get("gridSize"))
        if said is not None and (not isinstance(said, list | tuple) or list(said) != found):
            raise InputError(f"{self.where}: kwargs.gridSize is {said!r:.60}, the tensors are of {found}")
        return found

    def split(self) -> tuple[Config, Tensors]:
        """Planes and lines under their own names."""
        _, _, height, width = self.shape("density_plane.0", (1, None, None, None))
        n = [width, height, self.shape("density_line.0", (1, None, None, 1))[2]]
        config: Config = {"resolution": self._resolution(n)}
        for name, key in (("density", "density_ranks"), ("app", "color_ranks")):
            config[key] = []
            for i, (a, b, c) in enumerate(((0, 1, 2), (0, 2, 1), (1, 2, 0))):
                rank = self.shape(f"{name}_plane.{i}", (1, None, n[b], n[a]))[1]
                self.shape(f"{name}_line.{i}", (1, rank, n[c], 1))
                config[key].append(rank)
        return config, self._with_basis(sum(config["color_ranks"]))

    def cp(self) -> tuple[Config, Tensors]:
        """Lines under their own names."""
        n = [self.shape(f"density_line.{2 - axis}", (1, None, None, 1))[2] for axis in range(3)]
        config: Config = {"resolution": self._resolution(n)}
        for name, key in (("density", "density_rank"), ("app", "color_rank")):
            config[key] = self.shape(f"{name}_line.0", (1, None, n[2], 1))[1]
            for i in (1, 2):
                self.shape(f"{name}_line.{i}", (1, config[key], n[2 - i], 1))
        return config, self._with_basis(config["color_rank"])

    def vm(self) -> tuple[Config, Tensors]:
        """One tensor each of planes and lines: the first channels are colour's, the last are density's."""
        _, total, side, _ = self.shape("plane_coef", (3, None, None, None))
        self.shape("plane_coef", (3, total, side, side))
        self.shape("line_coef", (3, total, side, 1))
        wide = self.shape("basis_mat.weight", (None, None))[1]
        color = wide // 3
        if wide % 3 or not 0 < color < total:
            raise InputError(
                f"{self.where}: basis_mat mixes {wide} products, plane_coef has {total} components a plane"
            )
        tensors = self._with_basis(wide)
        for what in ("plane", "line"):
            coef = tensors.pop(f"{what}_coef")
            for i in range(3):
                tensors[f"density_{what}.{i}"] = _slice(coef, i, color, total)
                tensors[f"app_{what}.{i}"] = _slice(coef, i, 0, color)
        ranks = {"density_ranks": [total - color] * 3, "color_ranks": [color] * 3}
        return {"resolution": [side] * 3, **ranks}, tensors

    def _with_basis(self, products: int) -> Tensors:
        self.shape("basis_mat.weight", (None, products))
        return {k: float32(t) for k, t in self.state.items()}

    def shading(self, tensors: Tensors) -> Config:
        """The colour network out of shadingMode and the shapes of its layers."""
        mode = self.kwargs["shadingMode"]
        features = self.shape("basis_mat.weight", (None, None))[0]
        layers = sorted(k for k in self.state if k.startswith("renderModule."))
        config: Config = {"color_features": features, "view_encoding": "frequency", "mlp_layers": 3}
        config["mlp_bias"] = True
        if mode not in SHADINGS:
            raise InputError(f"{self.where}: kwargs.shadingMode is {mode!r:.40}", hint=f"known: {', '.join(SHADINGS)}")
        if mode in ("SH", "RGB"):
            if layers:
                raise InputError(f"{self.where}: tensor {layers[0]!r} has no place with shadingMode {mode}")
            if features != (wanted := 27 if mode == "SH" else 3):
                raise InputError(f"{self.where}: basis_mat.weight makes {features} features, {mode} needs {wanted}")
            return {**config, "shading": mode.lower(), "color_activation": "relu" if mode == "SH" else "none"}
        config |= {"shading": "mlp", "view_pe": self.count("view_pe")}
        config["fea_pe"] = self.count("fea_pe") if mode == "MLP_Fea" else 0
        config["pos_pe"] = self.count("pos_pe") if mode == "MLP_PE" else 0
        wide = features * (1 + 2 * config["fea_pe"]) + 6 * config["pos_pe"] + 3 + 6 * config["view_pe"]
        first = self.shape("renderModule.mlp.0.weight", (None, None))
        if mode == "MLP_PE" and first[1] == wide + 3:
            raise InputError(
                f"{self.where}: renderModule.mlp.0.weight takes 3 numbers more than shadingMode MLP_PE gives it: "
                "TensoRF itself cannot evaluate this file"
            )
        config["mlp_width"] = first[0]
        for j, shape in ((0, (first[0], wide)), (2, (first[0], first[0])), (4, (3, first[0]))):
            self.shape(f"renderModule.mlp.{j}.weight", shape)
            self.shape(f"renderModule.mlp.{j}.bias", shape[:1])
        if len(layers) != 6:
            raise InputError(f"{self.where}: the colour network has {len(layers)} tensors, not 6: {', '.join(layers)}")
        return config

    def density(self) -> Config:
        act = self.kwargs["fea2denseAct"]
        if act not in ("softplus", "relu"):
            raise InputError(f"{self.where}: kwargs.fea2denseAct is {act!r:.40}", hint="known: softplus, relu")
        scale = {"density_shift": self.number("density_shift"), "density_scale": self.number("distance_scale")}
        return {"density_activation": act, **scale}

    def alpha_mask(self, manifest: Manifest, config: Config, tensors: Tensors) -> None:
        """alphaMask.* as they are: bits in the order z, y, x."""
        shape, bits = manifest.tree.get("alphaMask.shape"), manifest.tensors["alphaMask.mask"]
        fits = isinstance(shape, list | tuple) and len(shape) >= 3 and all(type(v) is int and v > 1 for v in shape[-3:])
        if not fits or any(v != 1 for v in shape[:-3]):
            raise InputError(f"{self.where}: alphaMask.shape is {shape!r:.60}, not (1, 1, z, y, x)")
        sizes = list(shape[-3:])[::-1]
        if bits.dtype != "uint8" or bits.shape != ((math.prod(sizes) + 7) // 8,):
            raise InputError(f"{self.where}: alphaMask.mask is {bits.dtype} {list(bits.shape)}, for {sizes} vertices")
        box = self.box(manifest.tensors.get("alphaMask.aabb"), "alphaMask.aabb")
        config["alpha_mask"] = {"shape": sizes, "box": box.to_json()}
        tensors["alphaMask.mask"] = bits


def _slice(coef: LazyTensor, i: int, start: int, stop: int) -> Changed:
    """Components ``start``..``stop`` of mode ``i``: [3, C, ...] -> [1, stop - start, ...]."""
    shape = (1, stop - start, *coef.shape[2:])
    return Changed(coef, shape, coef.dtype, lambda a: np.ascontiguousarray(a[i : i + 1, start:stop]))


def _plain(value: Any) -> Any:
    """A number or list out of what may be a tensor or numpy's."""
    value = getattr(value, "tensor", value)
    return value.numpy().tolist() if hasattr(value, "numpy") and math.prod(value.shape) <= 16 else value
