"""Which twin of an operator runs: plain torch (the truth, any device), numba (CPU), Triton or tiny-cuda-nn (CUDA).

The environment variable ``PVDCONVERT_BACKEND`` names a twin where :func:`set_backend` has not.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from pvdconvert.errors import DeviceError

Backend = Literal["auto", "torch", "numba", "triton", "tinycudann"]
Twin = Literal["torch", "numba", "triton"]
NAMES: tuple[Backend, ...] = get_args(Backend)
VARIABLE = "PVDCONVERT_BACKEND"
_forced: Backend | None = None


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # kept from being imported
        return False


@functools.cache
def has_numba() -> bool:
    """Whether numba can be imported (it is not imported here: that costs about a second)."""
    return _found("numba")


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed: it comes with torch's CUDA builds."""
    return _found("triton")


@functools.cache
def has_tinycudann() -> bool:
    """Whether tinycudann can be imported: it is compiled for one torch and one kind of GPU, so only trying tells."""
    if not _found("tinycudann") or not torch.cuda.is_available():
        return False
    try:
        importlib.import_module("tinycudann")
    except Exception:
        return False
    return True


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter: slow, on any device, for tests (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def obstacle(name: str) -> tuple[str, str] | None:
    """Why the twin ``name`` cannot run on this machine, and what to do; None if it can."""
    if name not in NAMES:
        return f"unknown backend {name!r}", f"known: {', '.join(NAMES)}"
    if name == "numba" and not has_numba():
        return "backend 'numba' is not installed", "pip install numba, or --backend torch"
    if name == "triton" and not has_triton():
        return "backend 'triton' is not installed", "pip install 'pvdconvert[triton]', or --backend auto"
    if name in ("triton", "tinycudann") and not torch.cuda.is_available() and not (name == "triton" and interpreted()):
        return f"backend {name!r} needs a CUDA device and there is none", "--backend auto"
    if name == "tinycudann" and not has_tinycudann():
        return "backend 'tinycudann' cannot be imported", "install tiny-cuda-nn's torch extension, or --backend auto"
    return None


def set_backend(name: Backend) -> None:
    """Force a twin for the whole process. Raises DeviceError where it cannot run.

    Operators that this twin does not have run as with "auto".
    """
    global _forced
    found = obstacle(name)
    if found:
        raise DeviceError(found[0], hint=found[1])
    _forced = name


def get_backend() -> Backend:
    """What was forced, or the environment's choice, or "auto". Raises DeviceError if the environment's cannot run."""
    if _forced is None:
        set_backend(cast("Backend", os.environ.get(VARIABLE) or "auto"))
    assert _forced is not None
    return _forced


def twin(*tensors: Tensor) -> Twin:
    """The twin of an operator that has all of them for these arguments; other floats than float32 go to plain torch."""
    name = get_backend()
    if name == "torch" or any(t.dtype != torch.float32 and t.is_floating_point() for t in tensors):
        return "torch"
    kinds = {t.device.type for t in tensors}
    if kinds == {"cpu"}:
        if name == "triton" and interpreted():
            return "triton"
        return "numba" if has_numba() else "torch"
    return "triton" if kinds == {"cuda"} and name != "numba" and has_triton() else "torch"


def use_numba(*tensors: Tensor) -> bool:
    """Whether an operator that has only a numba twin runs it: CPU, float32 (integers may be anything), not torch."""
    if get_backend() == "torch" or not has_numba():
        return False
    return all(t.device.type == "cpu" and (not t.is_floating_point() or t.dtype == torch.float32) for t in tensors)


def lost(cuda: bool) -> str | None:
    """One line on what runs slower here than it could, on a GPU or on the CPU; None where nothing does."""
    if get_backend() == "torch" or (has_triton() if cuda else has_numba()):
        return None
    if cuda:
        return (
            "Triton is not installed: hash grids, planes, voxels and marching run as plain torch, several times slower"
            " (pip install 'pvdconvert[triton]')"
        )
    return (
        "numba is not installed: plain torch runs instead, several times slower"
        " (hash grids about 10x, planes 5x, marching 17x; pip install numba)"
    )


def caches() -> list[Path]:
    """Where numba keeps compiled kernels: the folder that the user named; else beside the code, or the user's own."""
    named = os.environ.get("NUMBA_CACHE_DIR")
    if named:
        return [Path(named)]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    beside = Path(__file__).parent / "__pycache__"
    return [beside, *(p for p in [home / "numba"] if p.is_dir() and not os.access(Path(__file__).parent, os.W_OK))]


def compiling() -> str | None:
    """One line for the first use on a machine, before kernels have been compiled; None where some are there."""
    if get_backend() in ("torch", "triton") or not has_numba():
        return None
    if any(next(folder.rglob("*.nbi"), None) for folder in caches() if folder.is_dir()):
        return None
    return "first use: kernels are compiled as needed, some 15 s in all beyond the budget; later runs find them"
