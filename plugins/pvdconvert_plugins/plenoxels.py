"""Plenoxels: sparse voxels whose vertices hold density and spherical-harmonic colour."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from pvdconvert.errors import InputError, RequestError
from pvdconvert.field import RadianceField
from pvdconvert.nn.sh import sh_basis
from pvdconvert.nn.voxels import Shape, SparseVoxels, cover, lattice_shape, trunc_exp
from pvdconvert.plugin import ArchitectureBase, Budget, Config, Limits, TeacherFacts
from pvdconvert.scene import Box, Scene
from pvdconvert.solve.voxels import Level, fit_color, fit_scalar, order, pyramid
from pvdconvert_plugins.plenoxels_spec import PlenoxelsOptions, as_config, checked, plain

if TYPE_CHECKING:
    from pvdconvert.distill.store import Store
    from pvdconvert.render.occupancy import Occupancy

PRESETS = {"fast": 144, "balanced": 256, "best": 384}
SMALLEST = 16
DENSE_START = 1 << 18
"""A fresh lattice of at most so many vertices starts full; a larger one starts empty, and ``restrict`` allocates it."""
LEVELS = 3
CLEAR, OPAQUE = 1e-3, 20.0
"""Projected densities lie between these optical thicknesses of a cell."""
FLOPS = 5e10
START_THICKNESS = 0.01
"""Optical thickness of a cell of a fresh field: nearly clear, yet with a gradient."""


class PlenoxelsField(RadianceField):
    """Density and colour by trilinear interpolation; the latent is the position itself."""

    flops_per_point = 100.0

    def __init__(self, options: PlenoxelsOptions, scene: Scene, seed: int = 0) -> None:
        super().__init__()
        self.options, self.seed = options, seed
        box = Box.from_json(options.box) if options.box is not None else scene.box
        shape = options.shape or lattice_shape(box, options.resolution)
        self.voxels = SparseVoxels(box, shape, options.bands, cast(Literal["cell", "zero"], options.missing))
        self.clip = scene.box if options.missing == "zero" else None
        if math.prod(shape) <= DENSE_START:
            zero = torch.zeros(1, 3, dtype=torch.long)
            self.allocate(cover(zero, torch.tensor([shape]) - 1, shape))

    def allocate(self, vertices: Tensor) -> None:
        """Start afresh on these vertices: nearly clear and grey, deterministic in the seed."""
        thin = START_THICKNESS / (sum(self.voxels.cell) / 3) / self.options.density_scale
        start = math.log(thin) if self.options.density_activation == "exp" else thin
        generator = torch.Generator().manual_seed(self.seed)
        sh = 0.01 * torch.randn(len(vertices), 3 * self.options.bands**2, generator=generator)
        self.voxels.assign(
            vertices, torch.full((len(vertices), 1), start, device=vertices.device), sh.to(vertices.device)
        )

    def restrict(self, occupancy: Occupancy) -> None:
        """Allocate the vertices of every cell that shares volume with an occupied one. Makes new parameters."""
        device = self.voxels.origin.device
        low = occupancy.origin.to(device) + occupancy.grid.nonzero().to(device) * occupancy.cell
        self.allocate(self.voxels.touching(low, low + occupancy.cell))

    def support(self) -> Occupancy | None:
        """The complete cells, gathered into cubes so that the grid stays within 128 along the longest side."""
        from pvdconvert.render.occupancy import Occupancy

        cell, shape = self.voxels.cell, self.voxels.shape
        if self.voxels.missing != "cell" or max(cell) > min(cell) * 1.0001:
            return None
        group = -(-(max(shape) - 1) // 128)
        grid = torch.zeros([-(-(n - 1) // group) for n in shape], dtype=torch.uint8, device=self.voxels.origin.device)
        i = torch.div(self.voxels.cells().long(), group, rounding_mode="floor")
        grid[i[:, 0], i[:, 1], i[:, 2]] = 1
        return Occupancy(self.voxels.origin.clone(), group * max(cell), grid)

    def encode(self, x: Tensor) -> Tensor:
        return x

    def density(self, latent: Tensor) -> Tensor:
        if self.options.density_activation == "exp":
            sigma = trunc_exp(self.voxels.raw_density(latent, fill=-math.inf))
        else:
            sigma = torch.relu(self.voxels.raw_density(latent))
        if self.clip is not None:
            low, high = latent.new_tensor(self.clip.min), latent.new_tensor(self.clip.max)
            sigma = torch.where(((latent >= low) & (latent <= high)).all(-1), sigma, 0.0)
        return sigma * self.options.density_scale if self.options.density_scale != 1.0 else sigma

    def color(self, latent: Tensor, d: Tensor) -> Tensor:
        raw = self.voxels.raw_color(latent, sh_basis(d, self.options.bands))
        return torch.sigmoid(raw) if self.options.color_activation == "sigmoid" else (raw + 0.5).clamp_min(0.0)


class Plenoxels(ArchitectureBase):
    """The architecture ``plenoxels``."""

    def plan(self, facts: TeacherFacts, budget: Budget, limits: Limits, overrides: Mapping[str, Any]) -> Config:
        """Resolution by preset over the occupied box; halves the colours' storage, then shrinks, to keep ``max_mb``."""
        for key, value in overrides.items():
            if key in limits.fixed and plain(limits.fixed[key]) != plain(value):
                raise RequestError(
                    f"plenoxels: {key}={value} cannot be had: the output layout needs {key}={limits.fixed[key]}",
                    hint=f"drop --set {key}, or write another layout",
                )
        given = {**limits.fixed, **overrides}
        checked(given, RequestError)
        box = Box.from_json(given["box"]) if given.get("box") is not None else facts.occupied_box
        fitted = given.get("box") is None and given.get("shape") is None

        def config(resolution: int, dtype: str) -> Config:
            chosen = {"resolution": resolution, "store_dtype": dtype, **given}
            if given.get("shape") is None:
                b, s = _cubic(box, int(chosen["resolution"])) if fitted else (box, None)
                chosen.update(box=b.to_json(), shape=list(s or lattice_shape(b, int(chosen["resolution"]))))
            else:
                chosen.update(box=box.to_json(), shape=list(given["shape"]))
            return as_config(checked(chosen, RequestError))

        resolution = PRESETS.get(budget.preset, PRESETS["balanced"])
        plan = config(resolution, "float32")
        if budget.max_mb is None or estimate_mb(plan, facts) <= budget.max_mb:
            return plan
        steps = [resolution, *range(resolution - resolution % 8, SMALLEST, -8), SMALLEST]
        for smaller in steps:
            plan = config(smaller, "float16")
            if estimate_mb(plan, facts) <= budget.max_mb:
                return plan
        least = math.ceil(estimate_mb(plan, facts) * 100) / 100
        raise RequestError(
            f"plenoxels does not fit into {budget.max_mb:g} MB: the least that this request needs is {least:g} MB",
            hint=f"--max-mb {least:g}, or fewer --set keys",
        )

    def build(self, config: Config, scene: Scene, seed: int) -> PlenoxelsField:
        return PlenoxelsField(checked(config, RequestError), scene, seed)

    def load(self, config: Config, tensors: Mapping[str, Tensor], scene: Scene) -> PlenoxelsField:
        options = checked(config, InputError)
        names = ("vertices", "density_data", "sh_data")
        for name in names:
            if name not in tensors:
                raise InputError(f"plenoxels: tensor {name!r} is missing")
        for name in tensors:
            if name not in names:
                raise InputError(f"plenoxels: unexpected tensor {name!r}; it holds {', '.join(names)}")
        vertices, density, sh = (tensors[name].detach() for name in names)
        count = len(vertices) if vertices.ndim else 0
        for name, tensor, width in (
            ("vertices", vertices, 3),
            ("density_data", density, 1),
            ("sh_data", sh, 3 * options.bands**2),
        ):
            if tuple(tensor.shape) != (count, width):
                raise InputError(f"plenoxels: {name!r} has shape {list(tensor.shape)}, expected {[count, width]}")
        if vertices.is_floating_point() or vertices.dtype == torch.bool:
            raise InputError(f"plenoxels: 'vertices' must be integers, not {vertices.dtype}")
        field = PlenoxelsField(options, scene)
        try:
            field.voxels.assign(vertices.clone(), density.clone(), sh.clone())
        except ValueError as error:
            raise InputError(f"plenoxels: 'vertices': {error}") from error
        return field

    def save(self, field: RadianceField) -> tuple[Config, dict[str, Tensor]]:
        f = _own(field)
        v = f.voxels
        options = dataclasses.replace(f.options, box=v.box.to_json(), shape=v.shape)
        small = max(v.shape) <= 1 << 15
        half = f.options.store_dtype == "float16"
        return as_config(options), {
            "vertices": v.vertices.to(torch.int16 if small else torch.int32),
            "density_data": v.density.detach().clone(),
            "sh_data": v.sh.detach().to(torch.float16 if half else torch.float32, copy=True),
        }

    def param_groups(self, field: RadianceField) -> list[dict[str, Any]]:
        """``sparse_rows``: a step touches few rows; see ``pvdconvert.solve.lazy_adam``."""
        v = _own(field).voxels
        return [
            {"params": [v.density], "lr": 5e-2, "name": "density", "sparse_rows": True},
            {"params": [v.sh], "lr": 2e-2, "name": "sh", "sparse_rows": True},
        ]

    @torch.no_grad()
    def project(self, field: RadianceField, store: Store, seconds: float) -> str | None:
        """Log-density at the vertices asked of the teacher, or fitted where that is too dear; SH colour fitted."""
        f = _own(field)
        v, o = f.voxels, f.options
        if not len(v.vertices):
            return None
        levels = pyramid(v.vertices, v.grid, LEVELS)
        how = self._project_density(f, store, levels, seconds)
        x, d, rgb, weight = store.colored_samples()
        keep = v.inside(x).nonzero().squeeze(1)
        if not len(keep):
            return f"{how}; no colour was sampled inside"
        keep = keep[order(v.coordinates(x[keep]), v.grid)]
        x, d, rgb, weight = x[keep], d[keep], rgb[keep], weight[keep]
        basis = sh_basis(d, o.bands)[:, None]
        xg = v.coordinates(x)
        iterations = affordable(len(x), len(v.vertices), 3 * o.bands**2, 0.4 * seconds, passes=LEVELS + 2)
        sh = fit_color(
            levels, xg, basis, rgb, weight, activation=o.color_activation, iterations=iterations, missing=v.missing
        )
        v.sh.data.copy_(sh)
        error = (f.color(x, d[:, None])[:, 0] - rgb).square().mean(1)
        rms = math.sqrt(float((error * weight).sum() / weight.sum()))
        return f"{how}; SH colour fitted to {len(x)} samples ({iterations} CG iterations a level), rms {rms:.4f}"

    def _project_density(self, f: PlenoxelsField, store: Store, levels: list[Level], seconds: float) -> str:
        v, o = f.voxels, f.options
        cell = sum(v.cell) / 3
        low, high = math.log(CLEAR / cell), math.log(OPAQUE / cell)

        def log(sigma: Tensor) -> Tensor:
            return torch.log(sigma.clamp_min(1e-30)).clamp(low, high)

        count = len(v.vertices)
        x, sigma = torch.cat([store.x, store.free_x]), torch.cat([store.sigma, store.free_sigma])
        keep = v.inside(x).nonzero().squeeze(1)
        keep = keep[order(v.coordinates(x[keep]), v.grid)]
        xg, target = v.coordinates(x[keep]), log(sigma[keep])
        iterations = affordable(len(keep), count, 1, 0.1 * seconds, passes=LEVELS)
        ones = torch.ones_like(target)
        if count * store.teacher.flops_per_point <= 0.5 * seconds * FLOPS:
            # Asked everywhere: the rim of the cells, such as the inside of a wall, lies outside of the occupancy.
            h = log(v.resample(lambda x: store.teacher.density(store.teacher.encode(x)), 1 << 16))[:, None]
            how = f"density asked at {count} vertices"
            if len(keep):
                h = fit_scalar(levels, xg, target, ones, h, iterations=iterations, share=1.0, missing=v.missing)
                how += f" and refined on {len(keep)} samples"
        elif len(keep):
            h = fit_scalar(levels, xg, target, ones, low, iterations=iterations, missing=v.missing)
            how = f"density at {count} vertices fitted to {len(keep)} samples"
        else:
            return "density not projected: no sample lies inside"
        h = h.clamp(low, high)
        if o.density_activation == "exp":
            v.density.data.copy_(h - math.log(o.density_scale))
        else:
            v.density.data.copy_(torch.where(h > low, torch.exp(h) / o.density_scale, 0.0))
        rms = float((log(f.density(x[keep])) - target).square().mean().sqrt())
        return f"{how}, rms {rms:.3f} in log-density"


def affordable(samples: int, vertices: int, width: int, seconds: float, *, passes: int) -> int:
    """CG iterations for a time, by a fixed estimate of their cost: the same request gives the same result."""
    cost = samples * (60 + 32 * width) * 1e-9 + vertices * width * 1.5e-8
    return max(4, min(12, int(seconds / max(cost, 1e-9) / passes)))


def estimate_mb(config: Config, facts: TeacherFacts) -> float:
    """Megabytes (10^6) of the file: visible occupied volume over the cell's, and the rim of cells that reach beyond."""
    o = checked(config, RequestError)
    box, shape = Box.from_json(cast("Mapping[str, Any]", o.box)), cast(Shape, o.shape)
    h = math.prod(s / (n - 1) for n, s in zip(shape, box.size)) ** (1 / 3)
    volume = (facts.surface_cells or facts.occupied_cells) * facts.cell**3
    vertices = min(volume / h**3 * (1 + 1.5 * h / facts.cell), float(math.prod(shape)))
    return vertices * (6 + 4 + 3 * o.bands**2 * (2 if o.store_dtype == "float16" else 4)) / 1e6 + 0.01


def _cubic(box: Box, resolution: int) -> tuple[Box, Shape]:
    """``box`` grown about its centre to whole cubic cells; the longest side keeps its length."""
    h = box.longest / (resolution - 1)
    n = [max(1, math.ceil(s / h - 1e-6)) for s in box.size]
    low = [c - 0.5 * h * k for c, k in zip(box.center, n)]
    x, y, z = (k + 1 for k in n)
    grown = Box((low[0], low[1], low[2]), (low[0] + h * n[0], low[1] + h * n[1], low[2] + h * n[2]))
    return grown, (x, y, z)


def _own(field: RadianceField) -> PlenoxelsField:
    if not isinstance(field, PlenoxelsField):
        raise TypeError(f"expected a PlenoxelsField, got {type(field).__name__}")
    return field
