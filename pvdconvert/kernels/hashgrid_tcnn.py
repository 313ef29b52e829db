"""CUDA twin of the hash encoding by tiny-cuda-nn's torch extension, where that can hold the very same grid.

Its parameters are the levels one after another, each of [entries, F] with the entries of a dense level rounded up to 8
(layouts section 1.3): the table of a spec by the rule ``tcnn`` as it is. So nothing is converted; what it would lay out
otherwise is not given to it.
"""

from __future__ import annotations

import functools
import importlib
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pvdconvert.errors import DeviceError
from pvdconvert.kernels import backend
from pvdconvert.kernels.hashgrid_spec import GRID_TYPES, HashGridSpec

FEATURES = (1, 2, 4, 8)
"""Features a level that its kernels are compiled for."""


@functools.lru_cache(maxsize=64)
def config(spec: HashGridSpec) -> dict[str, Any] | None:
    """tiny-cuda-nn's encoding configuration that lays out exactly ``spec``; None where there is none."""
    if spec.index_rule != "tcnn" or spec.features not in FEATURES:
        return None
    count, first, last = len(spec.levels), spec.levels[0], spec.levels[-1]
    base = round(first.scale + 1)
    growth = np.float32(((last.scale + 1) / base) ** (1 / max(1, count - 1)))
    # The scales were rounded to float32: the growth that they came from is within a few steps of this one.
    nearby = [growth]
    for toward in (np.float32(0), np.float32(math.inf)):
        value = growth
        for _ in range(16):
            value = np.nextafter(value, toward, dtype=np.float32)
            nearby.append(value)
    log2 = max(3, math.ceil(math.log2(max(level.entries for level in spec.levels))))
    for b in nearby:
        for grid_type in GRID_TYPES:
            try:
                found = HashGridSpec.make(
                    count, spec.features, log2, base, float(b), "tcnn", None, spec.interpolation, grid_type
                )
            except ValueError:
                continue
            if found == spec:
                return {
                    "otype": "Grid",
                    "type": grid_type.capitalize(),
                    "n_levels": count,
                    "n_features_per_level": spec.features,
                    "log2_hashmap_size": log2,
                    "base_resolution": base,
                    "per_level_scale": float(b),
                    "interpolation": spec.interpolation.capitalize(),
                }
    return None


def represents(spec: HashGridSpec) -> bool:
    """Whether tinycudann runs ``spec``. Raises DeviceError where it was forced and cannot."""
    if config(spec) is not None:
        return True
    if backend.get_backend() == "tinycudann":
        raise DeviceError(
            f"backend 'tinycudann' cannot represent this hash grid: index rule {spec.index_rule},"
            f" {spec.features} features a level, or levels that no growth factor gives",
            hint="--backend auto or triton",
        )
    return False


@functools.lru_cache(maxsize=16)
def _encoding(spec: HashGridSpec, device: torch.device) -> Any:
    module: Any = importlib.import_module("tinycudann")
    encoding = module.Encoding(n_input_dims=3, encoding_config=config(spec), dtype=torch.float32)
    if encoding.params.numel() != spec.entries * spec.features:
        raise DeviceError(
            f"this tinycudann lays the hash grid out in {encoding.params.numel()} parameters,"
            f" not in {spec.entries * spec.features}",
            hint="--backend triton",
        )
    encoding.params.requires_grad_(False)
    encoding.params.data = encoding.params.data.new_empty(0)  # the caller's table takes its place in every call
    return encoding


def hash_encode_tcnn(x01: Tensor, table: Tensor, spec: HashGridSpec) -> Tensor:
    """:func:`pvdconvert.kernels.hashgrid.hash_encode` for float32 on CUDA; differentiable in ``table`` only."""
    if not len(x01):
        return table.sum() * 0 + table.new_zeros(0, spec.width)
    low, high = spec.domain
    inside = ((x01 >= low) & (x01 <= high)).all(-1, keepdim=True)
    x = torch.where(inside, x01, 0).detach()
    with torch.cuda.device_of(table):  # type: ignore[no-untyped-call]
        encoding = _encoding(spec, x01.device)
    out: Tensor = torch.func.functional_call(encoding, {"params": table.reshape(-1)}, (x,))
    return torch.where(inside, out, 0)
