"""Which twin of an operator runs: plain torch (the truth, any device) or numba (CPU, all cores)."""

from __future__ import annotations

import functools
import importlib.util
from typing import Literal

import torch
from torch import Tensor

from pvdconvert.errors import DeviceError

Backend = Literal["auto", "torch", "numba"]
NAMES: tuple[Backend, ...] = ("auto", "torch", "numba")
_forced: Backend = "auto"


@functools.cache
def has_numba() -> bool:
    """Whether numba can be imported (it is not imported here: that costs about a second)."""
    return importlib.util.find_spec("numba") is not None


def set_backend(name: Backend) -> None:
    """Force a twin for the whole process. Raises DeviceError where it is not there."""
    global _forced
    if name not in NAMES:
        raise DeviceError(f"unknown backend {name!r}; known: {', '.join(NAMES)}")
    if name == "numba" and not has_numba():
        raise DeviceError("backend 'numba' is not installed", hint="pip install numba, or --backend torch")
    _forced = name


def get_backend() -> Backend:
    """What was forced, or "auto"."""
    return _forced


def use_numba(*tensors: Tensor) -> bool:
    """Whether the numba twin runs for these arguments: CPU, float32 (integers may be anything), not forced to torch."""
    if _forced == "torch" or not has_numba():
        return False
    return all(t.device.type == "cpu" and (not t.is_floating_point() or t.dtype == torch.float32) for t in tensors)
