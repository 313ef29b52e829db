"""The twins of the kernels as test parameters: the same tests run on each.

``triton`` runs in Triton's interpreter on the CPU (tests/conftest.py asks for it where there is no GPU). ``cuda`` runs
what "auto" chooses on a GPU: the functions under test get their tensors moved there, and their results come back.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pvdconvert.kernels import backend

TWINS = ("torch", "numba", "triton", pytest.param("cuda", marks=pytest.mark.requires_cuda))


def choose(name: str, monkeypatch: pytest.MonkeyPatch, module: Any, *functions: str) -> None:
    """Make ``functions`` of ``module`` run on the twin ``name``; skips where it is not there."""
    if name == "cuda":
        for function in functions:
            monkeypatch.setattr(module, function, on_cuda(getattr(module, function)))
        backend.set_backend("auto")
        return
    if name == "numba" and not backend.has_numba():
        pytest.skip("numba is not installed")
    if name == "triton" and not backend.has_triton():
        pytest.skip("triton is not installed: the extra [triton] brings it")
    if name == "triton" and not backend.interpreted():
        pytest.skip("TRITON_INTERPRET is not set: Triton's kernels run compiled, on CUDA")
    backend.set_backend(name)  # type: ignore[arg-type]


def on_cuda(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with tensors moved to the GPU, alone, in sequences or in dataclasses, and back on the way out."""

    def move(value: Any, device: str) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        if isinstance(value, (list, tuple)):
            return type(value)(move(v, device) for v in value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            inner = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
            tensors = {k: move(v, device) for k, v in inner.items() if isinstance(v, Tensor)}
            return dataclasses.replace(value, **tensors) if tensors else value
        return value

    @functools.wraps(function)
    def moved(*arguments: Any, **options: Any) -> Any:
        given = {k: move(v, "cuda") for k, v in options.items()}
        return move(function(*move(arguments, "cuda"), **given), "cpu")

    return moved


def check(name: str, *arguments: Any) -> None:
    """torch's own tests of an operator: schema, autograd, fake, and tracing with dynamic shapes."""
    results = torch.library.opcheck(getattr(torch.ops.pvdconvert, name).default, arguments)
    assert set(results.values()) == {"SUCCESS"}
