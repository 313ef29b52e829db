"""The same architecture in another layout: weights are laid out anew, bit for bit, and nothing is trained.

Imports no torch. What a layout can hold exactly is answered by its writer, and proven by reading back.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pvdconvert import __version__
from pvdconvert.errors import OutputError, RequestError
from pvdconvert.plugin import ArrayTensor, Config, LazyTensor, Parts, option_help
from pvdconvert.registry import Registry
from pvdconvert.writing import plain, write_checked

if TYPE_CHECKING:
    from torch import Tensor

NUMBERS = ("same", "float32")
"""Types that a transcoded file may store weights in: those of the source, or float32 throughout."""


def obstacle(parts: Parts, to: str, sets: Mapping[str, Any], max_mb: float | None, registry: Registry) -> str:
    """Why ``parts`` as architecture ``to`` needs training, in words that follow "because"; "" if it does not."""
    if parts.architecture != to:
        return f"{parts.architecture} weights are not {to} weights"
    config = _full(parts.config, to, registry)
    for key, value in sets.items():
        if plain(config.get(key)) != plain(value):
            return f"the source's {key} is {config.get(key)!r:.40}, and --set asks for {value!r:.40}"
    size = sum(_nbytes(t) for t in parts.tensors.values())
    if max_mb is not None and size > max_mb * 1e6:
        return f"its weights take {size / 1e6:.1f} MB, more than --max-mb {max_mb:g}"
    return ""


def transcode(
    source: Parts,
    config: Config,
    tensors: Mapping[str, Tensor],
    out: Path | None,
    layout: str,
    registry: Registry,
    origin: Mapping[str, Any],
    numbers: str = "same",
) -> int:
    """Write what was loaded from ``source`` in ``layout``; the bytes of the file. Without ``out`` it is only tried.

    ``config`` and ``tensors`` are what the architecture saves of the loaded field, ``origin`` names the source's format
    and digest: provenance stays, because the weights do. ``numbers`` "same": an array that a narrower tensor of the
    source holds exactly is stored in that type. Raises RequestError naming what the layout cannot hold, OutputError
    where the disk refuses.
    """
    arrays = {k: v.detach().cpu().contiguous().numpy() for k, v in tensors.items()}
    hands = {"by": f"pvdconvert {__version__}", "format": origin.get("format"), "sha256": origin.get("sha256")}
    provenance = {**source.provenance, "laid_out": hands}
    wide = {name: ArrayTensor(array) for name, array in arrays.items()}
    narrow = {name: _narrow(array, source.tensors.get(name)) for name, array in arrays.items()}
    parts = Parts(source.architecture, dict(config), wide, source.scene, provenance, source.notes)
    fixed, full = registry.format(layout).limits(parts.architecture).fixed, _full(config, parts.architecture, registry)
    doubtful = [k for k, v in fixed.items() if v is not None and plain(full.get(k)) != plain(v)]
    if numbers == "same" and any(narrow[name] is not array for name, array in arrays.items()):
        kept = {name: ArrayTensor(array) for name, array in narrow.items()}
        try:
            return _write(dataclasses.replace(parts, tensors=kept), out, layout, registry, doubtful)
        except OutputError:
            pass  # a layout of one type only: its values come back, or the second attempt says why not
    return _write(parts, out, layout, registry, doubtful)


def _full(config: Mapping[str, Any], architecture: str, registry: Registry) -> Config:
    """``config`` with the defaults of what it does not say."""
    return {**{name: default for name, default, _ in option_help(registry.options(architecture))}, **config}


def _write(parts: Parts, out: Path | None, layout: str, registry: Registry, same: list[str]) -> int:
    if out is not None:
        return write_checked(parts, out, layout, registry, same)
    with tempfile.TemporaryDirectory(prefix="pvdconvert-") as folder:
        return write_checked(parts, Path(folder) / "tried", layout, registry, same)


def _narrow(array: np.ndarray[Any, Any], source: LazyTensor | None) -> np.ndarray[Any, Any]:
    """``array`` in the narrower floating-point type that ``source`` has, if that loses nothing."""
    if source is None or array.dtype.kind != "f" or source.dtype not in ("float16", "float32"):
        return array
    if np.dtype(source.dtype).itemsize >= array.dtype.itemsize:
        return array
    with np.errstate(over="ignore"):
        small = array.astype(source.dtype)
    return small if np.array_equal(small, array) else array


def _nbytes(tensor: LazyTensor) -> int:
    return math.prod(tensor.shape) * (2 if tensor.dtype == "bfloat16" else np.dtype(tensor.dtype).itemsize)


def refused(path: object, why: str) -> RequestError:
    """What ``--exact`` ends in where something would have to be trained."""
    return RequestError(
        f"{path}: --exact: this conversion would train, because {why}", hint="leave out --exact to have it trained"
    )
