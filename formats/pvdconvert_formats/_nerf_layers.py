"""What the vanilla-NeRF family's layouts share: layers out of shapes, lazy changes, scenes. Imports no torch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvdconvert.errors import InputError
from pvdconvert.plugin import Config, LazyTensor, ReadOptions
from pvdconvert.scene import Box, RaySpace, Scene

Tensors = dict[str, LazyTensor]
SYNTHETIC_BOX = 1.5
"""Half side of the cube that every program uses for the NeRF-Synthetic scenes."""
NDC_BOX = Box((-1.5, -1.67, -1.0), (1.5, 1.67, 1.0))
"""What forward-facing scenes fill in NDC (TensoRF's choice, layouts section 3.5)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Changed:
    """A LazyTensor that is another one under ``change``."""

    source: LazyTensor
    shape: tuple[int, ...]
    dtype: str
    change: Callable[[NDArray[Any]], NDArray[Any]]

    def numpy(self) -> NDArray[Any]:
        return self.change(self.source.numpy())


def transposed(tensor: LazyTensor) -> Changed:
    """[in, out] -> [out, in]."""
    rows, columns = tensor.shape
    return Changed(tensor, (columns, rows), tensor.dtype, lambda a: np.ascontiguousarray(a.T))


def rows(tensor: LazyTensor, start: int, stop: int) -> Changed:
    """``tensor[start:stop]``."""
    shape = (stop - start, *tensor.shape[1:])
    return Changed(tensor, shape, tensor.dtype, lambda a: np.ascontiguousarray(a[start:stop]))


def hidden_last(tensor: LazyTensor, hidden: int) -> Changed:
    """[out, hidden + pe] whose input is [hidden, pe] -> the same layer for [pe, hidden]."""
    return Changed(
        tensor,
        tensor.shape,
        tensor.dtype,
        lambda a: np.ascontiguousarray(np.concatenate([a[:, hidden:], a[:, :hidden]], axis=1)),
    )


def float32(tensor: LazyTensor) -> LazyTensor:
    """``tensor`` rounded to float32 where it is wider."""
    if tensor.dtype != "float64":
        return tensor
    return Changed(tensor, tensor.shape, "float32", lambda a: a.astype(np.float32))


@dataclasses.dataclass
class Layers:
    """Layers taken out of a file one by one; collects them under the names of the ``nerf`` architecture.

    ``where`` names file and network in errors.
    """

    where: str
    source: Mapping[str, LazyTensor]
    tensors: Tensors = dataclasses.field(default_factory=dict)
    used: set[str] = dataclasses.field(default_factory=set)

    def shape(self, key: str, rank: int) -> tuple[int, ...]:
        """The shape of ``key``, which must have ``rank`` axes and floating-point elements."""
        if key not in self.source:
            raise InputError(f"{self.where}: tensor {key!r} is missing", hint="is the file complete?")
        tensor = self.source[key]
        if len(tensor.shape) != rank or not tensor.dtype.endswith(("float16", "float32", "float64")):
            raise InputError(
                f"{self.where}: tensor {key!r} is {tensor.dtype} {list(tensor.shape)}: expected {rank} axes"
            )
        return tensor.shape

    def take(
        self, key: str, name: str, wide: int | None = None, units: int | None = None, hidden_first: int | None = None
    ) -> tuple[int, int]:
        """Linear layer ``key``.weight [out, in] and bias -> ``name``; checks the given sizes; returns (in, out)."""
        out, inside = self.shape(f"{key}.weight", 2)
        if (wide is not None and inside != wide) or (units is not None and out != units):
            expected = f"[{'*' if units is None else units}, {'*' if wide is None else wide}]"
            raise InputError(f"{self.where}: tensor '{key}.weight' is {[out, inside]}, expected {expected}")
        if self.shape(f"{key}.bias", 1) != (out,):
            raise InputError(
                f"{self.where}: tensor '{key}.bias' is {list(self.source[f'{key}.bias'].shape)}, not {[out]}"
            )
        weight = float32(self.source[f"{key}.weight"])
        self.tensors[f"{name}.weight"] = weight if hidden_first is None else hidden_last(weight, hidden_first)
        self.tensors[f"{name}.bias"] = float32(self.source[f"{key}.bias"])
        self.used |= {f"{key}.weight", f"{key}.bias"}
        return inside, out

    def head(self, key: str, rgb: str, density: str, wide: int) -> None:
        """A single output layer [4 or 5, wide] = (r, g, b, density[, unused]) -> two layers."""
        out, inside = self.shape(f"{key}.weight", 2)
        if inside != wide or out not in (4, 5) or self.shape(f"{key}.bias", 1) != (out,):
            raise InputError(f"{self.where}: tensor '{key}.weight' is {[out, inside]}, expected [4, {wide}]")
        for part in ("weight", "bias"):
            tensor = float32(self.source[f"{key}.{part}"])
            self.tensors[f"{rgb}.{part}"], self.tensors[f"{density}.{part}"] = rows(tensor, 0, 3), rows(tensor, 3, 4)
            self.used.add(f"{key}.{part}")

    def trunk(self, keys: list[str], prefix: str, hidden_first: bool = False) -> Config:
        """Position layers ``keys`` -> ``prefix``.trunk.i; returns depth, width, skips, encoding."""
        if not keys:
            raise InputError(f"{self.where}: no position layers")
        encoded, width = self.take(keys[0], f"{prefix}.trunk.0")
        frequencies, plain = frequencies_of(encoded, self.where, f"{keys[0]}.weight")
        skips = []
        for i, key in enumerate(keys[1:], 1):
            skip = self.shape(f"{key}.weight", 2)[1] == width + encoded
            skips += [i - 1] if skip else []
            self.take(
                key,
                f"{prefix}.trunk.{i}",
                width + encoded * skip,
                width,
                hidden_first=width if skip and hidden_first else None,
            )
        return {
            "depth": len(keys),
            "width": width,
            "skips": skips,
            "position_frequencies": frequencies,
            "include_input": plain,
        }

    def no_view(self) -> Config:
        """The configuration of a network without view dependence."""
        return {
            "direction_encoding": "none",
            "bottleneck_width": None,
            "direction_layers": [],
            "direction_frequencies": 0,
        }

    def direction_frequencies(self, columns: int, plain: bool, key: str) -> int:
        """Octaves of the direction encoding of ``columns`` columns."""
        found, has_plain = frequencies_of(columns, self.where, key)
        if has_plain != plain:
            raise InputError(f"{self.where}: {key!r}: only one of the two encodings includes the plain input")
        return found


def frequencies_of(columns: int, where: str, key: str) -> tuple[int, bool]:
    """(octaves, whether the plain coordinates are included) of a frequency encoding of 3 numbers."""
    if columns >= 3 and (columns - 3) % 6 == 0:
        return (columns - 3) // 6, True
    if columns >= 6 and columns % 6 == 0:
        return columns // 6, False
    raise InputError(f"{where}: {key!r}: {columns} columns are no frequency encoding of three numbers")


def two_networks(fine: Config, coarse: Config | None, where: str) -> Config:
    """One configuration for both: the fine network's, and in what the coarse one differs."""
    if coarse is None:
        return {**fine, "has_coarse": False}
    differs = {k: v for k, v in coarse.items() if fine.get(k) != v}
    may = {
        "depth",
        "width",
        "skips",
        "position_frequencies",
        "direction_frequencies",
        "bottleneck_width",
        "direction_layers",
    }
    other = differs.keys() - may | fine.keys() - coarse.keys()
    if other:
        raise InputError(f"{where}: coarse and fine networks are of different kinds: {', '.join(sorted(other))}")
    return {**fine, "has_coarse": True, "coarse": differs or None}


def numbered(source: Mapping[str, Any], pattern: str, where: str) -> list[str]:
    """Keys of the layers that match ``pattern`` (one group: the number) without ".weight", in order, without a gap."""
    found = {
        int(m[1]): key.removesuffix(".weight") for key in source if (m := re.fullmatch(pattern + r"\.weight", key))
    }
    if sorted(found) != list(range(min(found, default=0), min(found, default=0) + len(found))):
        raise InputError(f"{where}: layers {sorted(found)} of {pattern!r} are not consecutive")
    return [found[k] for k in sorted(found)]


def synthetic_scene(background: tuple[float, float, float], *, near: float = 2.0, far: float = 6.0) -> Scene:
    """A NeRF-Synthetic scene; everything but what the caller knows is marked as assumed by :func:`assume`."""
    return Scene(Box.cube(SYNTHETIC_BOX), background=background, near=near, far=far)


def ndc_scene(options: ReadOptions, background: tuple[float, float, float], where: str) -> Scene:
    """A forward-facing scene in NDC; ``width``, ``height`` and ``focal`` come from ``options.extra`` if there."""
    width, height, focal = (positive(options, key, where) for key in ("width", "height", "focal"))
    space = RaySpace("ndc", width=width, height=height, focal=focal, near=1.0)
    return Scene(NDC_BOX, background=background, near=0.0, far=1.0, ray_space=space)


def positive(options: ReadOptions, key: str, where: str) -> float | None:
    """The number ``key`` that the user gave, or None. Raises InputError where it is not one."""
    text = options.extra.get(key)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise InputError(f"{where}: {key}={text!r} is not a positive number", hint=f"for example {key}=400")
    return value


def assume(scene: Scene, options: ReadOptions, assumed: tuple[str, ...]) -> Scene:
    """``scene`` with what the user gave; ``assumed`` names its entries that were in no file."""
    given = {"box": options.bounds, "background": options.background, "near": options.near, "far": options.far}
    changes: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    left = tuple(a for a in assumed if a not in changes)
    return dataclasses.replace(scene, **changes, assumed=left)


def assumption_note(scene: Scene) -> tuple[str, ...]:
    """One line that says what was assumed, for the report."""
    if not scene.assumed:
        return ()
    b = scene.box
    values = {
        "box": f"box {list(b.min)} .. {list(b.max)} (--bounds)",
        "background": f"background {scene.background} (--background)",
        "near": f"near {scene.near} (--near)",
        "far": f"far {scene.far} (--far)",
        "ray_space": "picture size and focal length of the NDC warp unknown (give width, height and focal)",
    }
    return ("not in the file, assumed: " + "; ".join(values.get(a, a) for a in scene.assumed),)
