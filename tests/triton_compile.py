"""Compile every Triton kernel for a GPU that need not be there: run as a program, prints a line for each launch.

The twins' own functions run on small tensors of the CPU; instead of being launched, a kernel is compiled for compute
capability 9.0 with the very arguments that it would have got.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {torch.float32: "*fp32", torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8"}
_seen: set[tuple[Any, ...]] = set()
OPTIONS = ("num_warps", "enable_fp_fusion")


def compile_instead(kernel: Any, grid: tuple[int, ...], like: Tensor, *arguments: Any, **meta: Any) -> None:
    """In place of :func:`pvdconvert.kernels.gpu.launch`."""
    options = {k: meta.pop(k) for k in OPTIONS if k in meta}
    given = dict(zip(kernel.arg_names, arguments)) | meta
    signature, constants = {}, {}
    for name in kernel.arg_names:
        value = given[name]
        if isinstance(value, Tensor):
            signature[name] = TYPES[value.dtype]
        elif name in meta or (isinstance(value, int) and value == 1):  # Triton makes a constant of every 1
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    key = (kernel, *signature.items(), *((k, v) for k, v in constants.items() if k not in ("A", "B", "C")))
    if key in _seen:  # modes of planes differ in their axes only
        return
    _seen.add(key)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    sys.stdout.write(f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__} {len(compiled.asm['ptx'])}\n")


def main() -> None:
    from pvdconvert.kernels import (
        composite_triton,
        hashgrid_triton,
        lines_triton,
        march_triton,
        occupancy_triton,
        planes_triton,
        voxels_triton,
    )
    from pvdconvert.kernels.hashgrid import HashGridSpec
    from pvdconvert.kernels.voxels import BrickMap
    from pvdconvert.render.occupancy import Occupancy

    modules = (composite_triton, hashgrid_triton, lines_triton, march_triton)
    for module in (*modules, occupancy_triton, planes_triton, voxels_triton):
        vars(module)["launch"] = compile_instead
    x = torch.rand(50, 3)
    for features, interpolation in ((2, "linear"), (3, "smoothstep")):
        spec = HashGridSpec.make(4, features, 8, 4, 1.7, "tcnn", interpolation=interpolation)
        geometry = (spec.scales, spec.ints, *spec.domain, spec.mode, spec.shift)
        hashgrid_triton.forward(x, torch.rand(spec.entries, features), *geometry)
        hashgrid_triton.backward(x, torch.rand(50, spec.width), spec.entries, *geometry)
    for summed, n in ((True, 5), (False, 1)):  # an axis of one vertex: its length becomes a constant
        planes, lines = [torch.rand(n, n, 20) for _ in range(3)], [torch.rand(n, 20) for _ in range(3)]
        a, b, c = lines
        up = torch.rand(50) if summed else torch.rand(50, 60)
        planes_triton.forward(x, planes, lines, summed)
        planes_triton.backward(x, up, planes, lines, summed)
        up = up if summed else up[:, :20]
        lines_triton.forward(x, a, b, c, summed)
        lines_triton.backward(x, up, a, b, c, summed)
    grid = BrickMap.from_vertices(torch.cartesian_prod(*[torch.arange(9)] * 3), (9, 9, 9))
    for whole in (True, False):
        rows, weights = voxels_triton.locate(x * 8, grid.shape, grid.top, grid.bricks, whole)
    values, sh, basis = torch.rand(729, 28), torch.rand(729, 27), torch.rand(50, 2, 9)
    voxels_triton.gather(rows, weights, values, 0.0)
    voxels_triton.gather_sh(rows, weights, basis, sh)
    for touched in (None, torch.zeros(729, dtype=torch.uint8)):
        voxels_triton.scatter(rows, weights, torch.rand(50, 28), values, touched)
        voxels_triton.scatter_sh(rows, weights, basis, torch.rand(50, 2, 3), sh, touched)
    tau, offsets = torch.rand(9), torch.tensor([0, 3, 3, 9])
    w, end = composite_triton.forward(tau, offsets)
    composite_triton.backward(w, end, offsets, w, end)
    composite_triton.ray_sum(torch.rand(9, 3), offsets)
    composite_triton.ray_sum_backward(torch.rand(3, 3), offsets, 9)
    occupancy_triton.update(torch.rand(9), torch.arange(3), torch.rand(3), 0.5)
    occ = Occupancy(torch.zeros(3), 0.1, torch.ones(9, 9, 9, dtype=torch.uint8))
    flat = torch.zeros(50)
    march_triton.march_triton(x, x, flat, flat + 1, occ, 0.1, flat)
    whole_launch = vars(march_triton)["launch"]

    def pretend(kernel: Any, grid_: tuple[int, ...], like: Tensor, *arguments: Any, **meta: Any) -> None:
        if meta["WRITE"]:
            whole_launch(kernel, grid_, like, *arguments, **meta)
        else:
            arguments[-2][1:] = 1  # a sample on every ray, so that the second pass follows

    vars(march_triton)["launch"] = pretend
    march_triton.march_triton(x, x, flat, flat + 1, occ, 0.1, flat)


if __name__ == "__main__":
    main()
