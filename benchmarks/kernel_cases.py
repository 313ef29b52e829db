"""The operators that benchmarks/kernels.py measures: inputs, twins, and the naive torch forms they stand in for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pvdconvert.kernels import backend, hashgrid, lines, occupancy, planes, voxels
from pvdconvert.kernels.composite import ray_sum, render_weights
from pvdconvert.kernels.march import march
from pvdconvert.render.occupancy import Occupancy

Case = tuple[list[Tensor], dict[str, tuple[str, Callable[[], Tensor]]]]
"""Leaves that want gradients, and variant -> (backend, forward)."""


def uniform(*shape: int, grad: bool = False, device: str, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=g).to(device).requires_grad_(grad)


# ------------------------------------------------------------------------------------------------------- the operators


def naive_hash(x: Tensor, table: Tensor, spec: hashgrid.HashGridSpec) -> Tensor:
    """As one writes it in torch: eight corners at a time, indexing, a sum."""
    steps = torch.tensor([[k & 1, k >> 1 & 1, k >> 2 & 1] for k in range(8)], device=x.device)
    out = []
    for level in spec.levels:
        pos = x * level.scale + spec.shift
        low = pos.floor()
        corner = low.long()[:, None] + steps
        weight = torch.where(steps.bool(), (pos - low)[:, None], 1 - (pos - low)[:, None]).prod(-1)
        a, b, c = corner.unbind(-1)
        if level.hashed:
            index = (a ^ b * 2654435761 ^ c * 805459861) % level.entries
        else:
            index = (a + b * level.stride + c * level.stride**2) % level.entries
        out.append((weight[..., None] * table[level.offset + index]).sum(1))
    return torch.cat(out, 1)


def hash_case(device: str, points: int) -> Case:
    growth = hashgrid.growth(16, 16, 2048, "tcnn")
    spec = hashgrid.HashGridSpec.make(16, 2, 19, 16, growth, "tcnn")
    x, table = uniform(points, 3, device=device), uniform(spec.entries, 2, grad=True, device=device)
    variants = {"naive torch": ("torch", lambda: naive_hash(x, table, spec))}
    names = ["truth:torch", "numba"] if device == "cpu" else ["truth:torch", "triton", "tinycudann"]
    for name in names:
        if backend.obstacle(name.split(":")[-1]) is None:
            variants[name.split(":")[0]] = (name.split(":")[-1], lambda: hashgrid.hash_encode(x, table, spec))
    return [table], variants


def twins(device: str, forward: Callable[[], Tensor]) -> dict[str, tuple[str, Callable[[], Tensor]]]:
    fast = "numba" if device == "cpu" else "triton"
    found = {"truth": ("torch", forward)}
    return found | {fast: (fast, forward)} if backend.obstacle(fast) is None else found


def vm_case(device: str, points: int, side: int = 300, rank: int = 64) -> Case:
    x = uniform(points, 3, device=device)
    ps = [uniform(side, side, rank, grad=True, device=device, seed=i) for i in range(3)]
    ls = [uniform(side, rank, grad=True, device=device, seed=3 + i) for i in range(3)]
    # The naive form keeps its parameters as grid_sample wants them.
    deep = [p.detach().permute(2, 0, 1)[None].contiguous().requires_grad_() for p in ps]
    thin = [v.detach().t()[None, :, :, None].contiguous().requires_grad_() for v in ls]

    def naive() -> Tensor:
        u, out = x * 2 - 1, []
        for (a, b), c, plane, line in zip(planes.PAIRS, planes.AXES, deep, thin):
            at = torch.stack([torch.zeros_like(u[:, c]), u[:, c]], -1)[None, :, None]
            p = functional.grid_sample(plane, u[None, :, None][..., [a, b]], align_corners=True)
            out.append((p * functional.grid_sample(line, at, align_corners=True))[0, :, :, 0].t())
        return torch.cat(out, 1)

    return [*ps, *ls, *deep, *thin], {
        "naive grid_sample": ("torch", naive),
        **twins(device, lambda: planes.vm_features(x, ps, ls)),
    }


def cp_case(device: str, points: int, side: int = 300, rank: int = 96) -> Case:
    x = uniform(points, 3, device=device)
    ls = [uniform(side, rank, grad=True, device=device, seed=i) for i in range(3)]
    thin = [v.detach().t()[None, :, :, None].contiguous().requires_grad_() for v in ls]

    def naive() -> Tensor:
        u, out = x * 2 - 1, torch.ones(1, device=device)
        for c, line in zip(lines.AXES, thin):
            at = torch.stack([torch.zeros_like(u[:, c]), u[:, c]], -1)[None, :, None]
            out = out * functional.grid_sample(line, at, align_corners=True)[0, :, :, 0]
        return out.t()

    return [*ls, *thin], {
        "naive grid_sample": ("torch", naive),
        **twins(device, lambda: lines.cp_features(x, ls)),
    }


def voxel_case(device: str, points: int, side: int = 128, width: int = 28) -> Case:
    vertices = torch.cartesian_prod(*[torch.arange(side, device=device)] * 3)
    grid = voxels.BrickMap.from_vertices(vertices, (side, side, side))
    x = uniform(points, 3, device=device)
    values = uniform(side**3, width, grad=True, device=device)
    cube = values.detach().view(side, side, side, width).permute(3, 0, 1, 2)[None].contiguous().requires_grad_()

    def naive() -> Tensor:
        at = (x * 2 - 1).flip(-1)[None, :, None, None]
        return functional.grid_sample(cube, at, align_corners=True)[0, :, :, 0, 0].t()

    return [values, cube], {
        "naive grid_sample": ("torch", naive),
        **twins(device, lambda: voxels.voxel_interp(x * (side - 1), grid, values)),
    }


def sparse_case(device: str, points: int, side: int = 256, width: int = 28) -> Case:
    """One cell in eight exists, in cubes of 16; the points lie in them."""
    some = torch.cartesian_prod(*[torch.arange(0, side // 16, 2)] * 3) * 16
    block = torch.cartesian_prod(*[torch.arange(16)] * 3)
    grid = voxels.BrickMap.from_vertices((some[:, None] + block).view(-1, 3).to(device), (side, side, side))
    values = uniform(len(some) * 4096, width, grad=True, device=device)
    pick = torch.randint(len(some), (points,), generator=torch.Generator().manual_seed(2))
    x = some[pick].to(device) + uniform(points, 3, device=device) * 15
    return [values], twins(device, lambda: voxels.voxel_interp(x, grid, values))


def scene(device: str, rays: int, side: int = 128) -> tuple[Any, ...]:
    """A shell of occupied cells, and rays from a sphere around it."""
    c = (torch.arange(side) + 0.5) / side * 2 - 1
    r = torch.stack(torch.meshgrid(c, c, c, indexing="ij"), -1).norm(dim=-1)
    occ = Occupancy(torch.full((3,), -1.0, device=device), 2 / side, ((r > 0.6) & (r < 0.7)).to(torch.uint8).to(device))
    g = torch.Generator().manual_seed(0)
    o = torch.nn.functional.normalize(torch.randn(rays, 3, generator=g), dim=-1) * 3
    d = torch.nn.functional.normalize(torch.rand(rays, 3, generator=g) - 0.5 - o, dim=-1)
    return (
        o.to(device),
        d.to(device),
        torch.full((rays,), 1.2, device=device),
        torch.full((rays,), 4.8, device=device),
        occ,
    )


def march_case(device: str, rays: int = 16384) -> Case:
    o, d, t0, t1, occ = scene(device, rays)
    step = 1 / 128

    def naive() -> Tensor:
        kept = []
        for part in torch.split(torch.arange(rays, device=device), 4096):
            t = t0[part, None] + (torch.arange(int(3.6 / step), device=device) + 0.5) * step
            i = ((o[part, None] + t[..., None] * d[part, None] - occ.origin) / occ.cell).floor().long()
            inside = ((i >= 0) & (i < 128)).all(-1)
            i = torch.where(inside[..., None], i, 0)
            kept.append(t[inside & (occ.grid[i[..., 0], i[..., 1], i[..., 2]] > 0)])
        return torch.cat(kept)

    return [], {"naive torch": ("torch", naive), **twins(device, lambda: march(o, d, t0, t1, occ, step)[1])}


def packed(device: str) -> tuple[Tensor, Tensor]:
    o, d, t0, t1, occ = scene(device, 16384)
    offsets, t = march(o, d, t0, t1, occ, 1 / 256)
    return offsets, uniform(len(t), grad=True, device=device)


def composite_case(device: str) -> Case:
    offsets, tau = packed(device)
    rgb = uniform(len(tau), 3, grad=True, device=device)
    counts = offsets.diff()

    def naive() -> Tensor:
        total = torch.cumsum(tau.double(), 0)
        before = total - tau - torch.repeat_interleave((total - tau)[offsets[:-1].clamp(max=len(tau) - 1)], counts)
        w = (torch.exp(-before) * (1 - torch.exp(-tau))).float()
        ray = torch.repeat_interleave(torch.arange(len(counts), device=device), counts)
        return torch.zeros(len(counts), 3, device=device).index_add(0, ray, w[:, None] * rgb)

    variants = {
        "naive torch": ("torch", naive),
        **twins(device, lambda: ray_sum(rgb, offsets, render_weights(tau, offsets)[0])),
    }
    nerfacc = importable("nerfacc")
    if device == "cuda" and nerfacc is not None:
        ray = torch.repeat_interleave(torch.arange(len(counts), device=device), counts)
        zero, one = torch.zeros_like(tau), torch.ones_like(tau)

        def theirs() -> Tensor:
            w, _, _ = nerfacc.render_weight_from_density(zero, one, tau, ray_indices=ray, n_rays=len(counts))
            return nerfacc.accumulate_along_rays(w, rgb, ray, len(counts))  # type: ignore[no-any-return]

        variants["nerfacc"] = ("auto", theirs)
    return [tau, rgb], variants


def update_case(device: str, cells: int = 128**3, points: int = 1 << 18) -> Case:
    peak = uniform(cells, device=device)
    index = torch.randint(cells, (points,), generator=torch.Generator().manual_seed(0)).to(device)
    sigma = uniform(points, device=device, seed=1)

    def ours() -> Tensor:
        occupancy.occupancy_update(peak, index, sigma, 0.95)
        return peak

    return [], twins(device, ours)


def importable(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception:
        return None


def cases(device: str, points: int) -> dict[str, Callable[[], Case]]:
    return {
        "hashgrid": lambda: hash_case(device, points),
        "vm": lambda: vm_case(device, points),
        "cp": lambda: cp_case(device, points),
        "voxels": lambda: voxel_case(device, points),
        "sparse voxels": lambda: sparse_case(device, points),
        "march": lambda: march_case(device),
        "composite": lambda: composite_case(device),
        "occupancy update": lambda: update_case(device),
    }
