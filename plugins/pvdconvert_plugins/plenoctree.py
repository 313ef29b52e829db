"""PlenOctree: the octree of svox, as a teacher exactly, as a student fitted leaf by leaf."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pvdconvert.errors import InputError, RequestError
from pvdconvert.field import RadianceField
from pvdconvert.kernels.octree import reach
from pvdconvert.nn.voxels import count_touched
from pvdconvert.plugin import ArchitectureBase, Budget, Config, Limits, TeacherFacts
from pvdconvert.scene import Box, Scene
from pvdconvert.solve.leaves import fit_leaves, mean_leaves
from pvdconvert_plugins.plenoctree_field import PlenoctreeField, lattice, placed
from pvdconvert_plugins.plenoctree_spec import EXTRA_WIDTH, PlenoctreeOptions, as_config, checked, plain

if TYPE_CHECKING:
    from pvdconvert.distill.store import Store

PRESETS = {"fast": 192, "balanced": 320, "best": 512}
SMALLEST = 8
LEAVES_A_SECOND = 1.2e4
"""Leaves a second of the whole budget: more would hardly be seen."""
FLOPS = 5e10
ASKED = 8
"""Points of a leaf at which a fast teacher's density is asked."""
OPAQUE = 20.0
"""Optical thickness of a leaf beyond which density is cut: float16 holds 65504."""


class Plenoctree(ArchitectureBase):
    """The architecture ``plenoctree``."""

    def plan(self, facts: TeacherFacts, budget: Budget, limits: Limits, overrides: Mapping[str, Any]) -> Config:
        """Leaves by preset over the occupied box, fewer where the time is short or ``max_mb`` asks for it."""
        for key, value in overrides.items():
            if key in limits.fixed and plain(limits.fixed[key]) != plain(value):
                raise RequestError(
                    f"plenoctree: {key}={value} cannot be had: the output layout needs {key}={limits.fixed[key]}",
                    hint=f"drop --set {key}, or write another layout",
                )
        given = {**limits.defaults, **limits.fixed, **overrides}
        asked = checked(given, RequestError)
        if asked.kind in EXTRA_WIDTH:
            raise RequestError(
                f"plenoctree: data_format={asked.data_format} has lobes that nothing fits: such trees are only read",
                hint="--set data_format=SH9",
            )
        options = checked({"resolution": PRESETS.get(budget.preset, PRESETS["balanced"]), **given}, RequestError)
        most, megabytes = budget.max_mb or math.inf, math.inf
        leaves = math.inf if "resolution" in given or budget.seconds is None else budget.seconds * LEAVES_A_SECOND
        for resolution in [options.resolution] if "resolution" in given else _steps(options.resolution):
            options = _placed(checked({**given, "resolution": resolution}, RequestError), facts)
            count, megabytes = size(options, facts)
            if count <= leaves and megabytes <= most:
                return as_config(options)
        if megabytes <= most:  # the smallest; the time is too short for any
            return as_config(options)
        least = math.ceil(megabytes * 100) / 100
        raise RequestError(
            f"plenoctree does not fit into {most:g} MB: this request needs {least:g} MB at least",
            hint=f"--max-mb {least:g}, or fewer --set keys",
        )

    def build(self, config: Config, scene: Scene, seed: int) -> PlenoctreeField:
        return PlenoctreeField(checked(config, RequestError), scene, seed)

    def load(self, config: Config, tensors: Mapping[str, Tensor], scene: Scene) -> PlenoctreeField:
        options = checked(config, InputError)
        width = EXTRA_WIDTH.get(options.kind)
        names = ("child", "data", *(("extra_data",) if width else ()))
        for name in names:
            if name not in tensors:
                raise InputError(f"plenoctree: tensor {name!r} is missing")
        for name in tensors:
            if name not in names:
                raise InputError(f"plenoctree: unexpected tensor {name!r}; it holds {', '.join(names)}")
        child, data = tensors["child"].detach(), tensors["data"].detach()
        node = (options.branching,) * 3
        if child.ndim != 4 or tuple(child.shape[1:]) != node or not len(child):
            raise InputError(f"plenoctree: 'child' has shape {list(child.shape)}, expected {['n', *node]}")
        if child.is_floating_point() or child.dtype == torch.bool:
            raise InputError(f"plenoctree: 'child' must be integers, not {child.dtype}")
        expected = (*child.shape, 3 * options.coefficients + 1)
        if tuple(data.shape) != expected:
            raise InputError(f"plenoctree: 'data' has shape {list(data.shape)}, expected {list(expected)}")
        extra = tensors["extra_data"].detach().clone() if width else None
        if extra is not None and tuple(extra.shape) != (options.coefficients, width):
            raise InputError(
                f"plenoctree: 'extra_data' has shape {list(extra.shape)}, expected {[options.coefficients, width]}"
            )
        try:
            reach(child)
        except ValueError as error:
            raise InputError(f"plenoctree: 'child': {error}") from error
        field = PlenoctreeField(options, scene)
        field.assign(child.clone(), data.reshape(-1, data.shape[-1]).clone(), extra)
        return field

    def save(self, field: RadianceField) -> tuple[Config, dict[str, Tensor]]:
        f = _own(field)
        o = f.options
        half = o.store_dtype == "float16"
        data = torch.cat([f.colour.detach(), f.sigma.detach()], 1)
        if half and f.open is not None:
            data.clamp_(-65504.0, 65504.0)
        if f.open is not None:  # what a student never filled is empty
            data[~f.open & (f.child.reshape(-1) == 0)] = 0.0
        data = data.view(*f.child.shape, -1).to(torch.float16 if half else torch.float32)
        extra = {"extra_data": f.extra.clone()} if o.kind in EXTRA_WIDTH else {}
        exact = {key: [float(v) for v in t.double()] for key, t in (("offset", f.offset), ("invradius3", f.invradius))}
        return {**as_config(o), **exact}, {"child": f.child.clone(), "data": data, **extra}

    def param_groups(self, field: RadianceField) -> list[dict[str, Any]]:
        """``sparse_rows``: a step touches few rows. Density is linear: its rate is a share of an opaque leaf's."""
        f = _own(field)
        return [
            # Pixels contradict each other in a leaf: at the rate for answers of a teacher all of space is fog.
            {
                "params": [f.sigma],
                "lr": 0.1 / f.leaf,
                "photometric": 0.005 / f.leaf,
                "name": "density",
                "sparse_rows": True,
            },
            {"params": [f.colour], "lr": 2e-2, "name": "colour", "sparse_rows": True},
        ]

    @torch.no_grad()
    def project(self, field: RadianceField, store: Store, seconds: float) -> str | None:
        """Mean density of each leaf, asked where the teacher is fast; colours by a ridge regression in each leaf."""
        f = _own(field)
        if f.open is None or not bool(f.open.any()):
            return None
        x, sigma = torch.cat([store.x, store.free_x]), torch.cat([store.sigma, store.free_sigma])
        rows = f.rows(x)
        keep = rows >= 0
        total = [torch.zeros(len(f.sigma), device=x.device) for _ in range(2)]
        total[0].index_add_(0, rows[keep], sigma[keep])
        total[1].index_add_(0, rows[keep], torch.ones_like(sigma[keep]))
        centers = f.centers()
        how = f"density: mean of {int(keep.sum())} samples"
        cost = max(1.0, len(centers[0]) * store.teacher.flops_per_point)
        points = min(ASKED, int(0.5 * seconds * FLOPS / cost))
        generator = torch.Generator().manual_seed(f.seed)
        for _ in range(points):
            for place, row in zip(torch.split(centers[0], 1 << 16), torch.split(centers[1], 1 << 16)):
                jitter = (torch.rand(len(place), 3, generator=generator) - 0.5).to(x.device) * 0.98
                at = place + jitter / f.invradius / lattice(f.options)
                total[0].index_add_(0, row, store.teacher.density(store.teacher.encode(at)))
                total[1].index_add_(0, row, torch.ones(len(row), device=x.device))
        if points:
            how += f" and {points} points asked in each of {len(centers[0])} leaves"
        mean = mean_leaves(total[0][:, None], total[1], f.child, f.open)
        f.sigma.data.copy_(torch.where(f.open[:, None], mean.clamp(0.0, OPAQUE / f.leaf), 0.0))
        x, d, rgb, weight = store.colored_samples()
        rows = f.rows(x)
        keep = (rows >= 0).nonzero().squeeze(1)
        if not len(keep):
            return f"{how}; no colour was sampled inside"
        x, d, rgb, weight, rows = x[keep], d[keep], rgb[keep], weight[keep], rows[keep]
        f.colour.data.copy_(fit_leaves(rows, f.basis(d), rgb, weight, f.child, f.open))
        error = (f.color(x, d[:, None])[:, 0] - rgb).square().mean(1)
        rms = math.sqrt(float((error * weight).sum() / weight.sum()))
        return f"{how}; colour fitted in each leaf to {len(x)} samples, rms {rms:.4f}"


def _steps(resolution: int) -> Iterator[int]:
    """Resolutions from this one down, about 3 % apart."""
    while resolution > SMALLEST:
        yield resolution
        resolution = min(resolution - 1, int(resolution * 0.97))
    yield SMALLEST


def _placed(options: PlenoctreeOptions, facts: TeacherFacts) -> PlenoctreeOptions:
    if options.offset is not None:
        return options
    offset, invradius3 = placed(facts.occupied_box, options)
    return checked({**as_config(options), "offset": offset, "invradius3": invradius3}, RequestError)


def size(options: PlenoctreeOptions, facts: TeacherFacts) -> tuple[float, float]:
    """(leaves, megabytes of the tensors): counted where the visible cells are known, else an upper estimate."""
    assert options.offset is not None
    assert options.invradius3 is not None
    low = [-o / i for o, i in zip(options.offset, options.invradius3)]
    high = [(1 - o) / i for o, i in zip(options.offset, options.invradius3)]
    box = Box((low[0], low[1], low[2]), (high[0], high[1], high[2]))
    n, side = lattice(options), options.branching
    leaves = nodes = 0.0
    wide = n
    while wide >= 1:
        if facts.occupancy is not None:
            o = facts.occupancy
            count = float(count_touched(box, (wide + 1, wide + 1, wide + 1), o.origin, o.cell, o.grid, cells=True))
        else:
            h = box.longest / wide
            volume = (facts.surface_cells or facts.occupied_cells) * facts.cell**3
            count = min(volume / h**3 * (1 + 1.5 * h / facts.cell), float(wide) ** 3)
        if wide == n:
            leaves = count
        else:
            nodes += max(1.0, count)
        wide //= side
    row = 4 + (3 * options.coefficients + 1) * (2 if options.store_dtype == "float16" else 4)
    return leaves, nodes * side**3 * row / 1e6


def _own(field: RadianceField) -> PlenoctreeField:
    if not isinstance(field, PlenoctreeField):
        raise TypeError(f"expected a PlenoctreeField, got {type(field).__name__}")
    return field
