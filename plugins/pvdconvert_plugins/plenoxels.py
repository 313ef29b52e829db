"""Plenoxels: sparse voxels whose vertices hold density and spherical-harmonic colour."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pvdconvert.errors import InputError, RequestError
from pvdconvert.field import RadianceField
from pvdconvert.nn.mask import Mask
from pvdconvert.nn.sh import sh_basis
from pvdconvert.plugin import ArchitectureBase, Budget, Config, Limits, TeacherFacts
from pvdconvert.scene import Scene
from pvdconvert.solve.voxels import Level, affordable, fit_color, fit_scalar, order, pyramid
from pvdconvert_plugins import plenoxels_plan
from pvdconvert_plugins.plenoxels_field import PlenoxelsField
from pvdconvert_plugins.plenoxels_plan import estimate_mb
from pvdconvert_plugins.plenoxels_spec import as_config, checked

if TYPE_CHECKING:
    from pvdconvert.distill.store import Store

__all__ = ["Plenoxels", "PlenoxelsField", "estimate_mb"]

LEVELS = 3
CLEAR, OPAQUE = 1e-3, 20.0
"""Projected densities lie between these optical thicknesses of a cell."""
DENSITY, COLOR = 0.2, 0.8
"""Shares of a projection's time, which is reckoned with room to spare. A density that is left on coarser cells
costs most: at a tenth, lego in a minute had 26.0 dB on test views, at this 28.2."""
FLOPS = 5e10
PER_VERTEX = 32
"""Samples a vertex that are enough for the projection, which reads less than twice as many: a vertex has 28 unknowns,
and a sample eight vertices."""
VARIATION, SPARSE = (2e-2, 1e-2), 5e-4
"""Weights of what training from pictures adds to the loss: total variation of a cell's opacity and of colours, and the
mean opacity (arXiv 2112.05131, section 3.4, there of raw values)."""
PAIRS = 1 << 14
"""Neighbouring points that are compared in a step."""


class Plenoxels(ArchitectureBase):
    """The architecture ``plenoxels``."""

    def plan(self, facts: TeacherFacts, budget: Budget, limits: Limits, overrides: Mapping[str, Any]) -> Config:
        return plenoxels_plan.plan(facts, budget, limits, overrides)

    def build(self, config: Config, scene: Scene, seed: int) -> PlenoxelsField:
        return PlenoxelsField(checked(config, RequestError), scene, seed)

    def load(self, config: Config, tensors: Mapping[str, Tensor], scene: Scene) -> PlenoxelsField:
        options = checked(config, InputError)
        names = ("vertices", "density_data", "sh_data", *(() if options.mask is None else ("mask.bits",)))
        for name in names:
            if name not in tensors:
                raise InputError(f"plenoxels: tensor {name!r} is missing")
        for name in tensors:
            if name not in names:
                raise InputError(f"plenoxels: unexpected tensor {name!r}; it holds {', '.join(names)}")
        vertices, density, sh = (tensors[name].detach() for name in names[:3])
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
        if options.mask is not None:
            field.mask = Mask.from_parts(options.mask, tensors["mask.bits"])
        return field

    def save(self, field: RadianceField) -> tuple[Config, dict[str, Tensor]]:
        f = _own(field)
        v = f.voxels
        mask = None if f.mask is None else f.mask.to_config()
        options = dataclasses.replace(f.options, box=v.box.to_json(), shape=v.shape, mask=mask)
        small = max(v.shape) <= 1 << 15
        half = f.options.store_dtype == "float16"
        bits = {} if f.mask is None else {"mask.bits": f.mask.bits}
        return as_config(options), {
            **bits,
            "vertices": v.vertices.to(torch.int16 if small else torch.int32),
            "density_data": v.density.detach().clone(),
            "sh_data": v.sh.detach().to(torch.float16 if half else torch.float32, copy=True),
        }

    def param_groups(self, field: RadianceField) -> list[dict[str, Any]]:
        """``sparse_rows``: a step touches few rows; see ``pvdconvert.solve.lazy_adam``.

        Log-density moves by its logarithm; a linear one by a share of an opaque cell's.
        """
        f = _own(field)
        v = f.voxels
        linear = f.options.density_activation == "relu"
        rate = 0.1 / (sum(v.cell) / 3) / f.options.density_scale if linear else 5e-2
        return [
            {"params": [v.density], "lr": rate, "name": "density", "sparse_rows": True},
            {"params": [v.sh], "lr": 6e-2, "photometric": 2e-2, "name": "sh", "sparse_rows": True},
        ]

    def regularizer(self, field: RadianceField, generator: torch.Generator) -> Tensor | None:
        """Total variation between points a cell apart, and sparsity, on random points of the cells that are stored.

        Opacity and colour, not raw values: logarithms of density differ most where nothing is.
        """
        f = _own(field)
        v = f.voxels
        if not len(v.vertices):
            return None
        device, cell = v.vertices.device, sum(v.cell) / 3
        pick = torch.randint(len(v.vertices), (PAIRS,), generator=generator).to(device)
        inner = torch.rand(PAIRS, 3, generator=generator).to(device) * torch.tensor(v.cell, device=device)
        axis = torch.randint(3, (PAIRS,), generator=generator).to(device)
        d = torch.nn.functional.normalize(torch.randn(PAIRS, 1, 3, generator=generator), dim=-1).to(device)
        x = v.positions(v.vertices[pick]) + inner
        y = x + torch.diag(torch.tensor(v.cell, device=device))[axis]
        both = (v.inside(x) & v.inside(y)).nonzero().squeeze(1)
        if not len(both):
            return None
        x, y, d = x[both], y[both], d[both]
        a, b = (1 - torch.exp(-f.density(p) * cell) for p in (x, y))
        rough = (f.color(x, d) - f.color(y, d)).square().mean()
        return VARIATION[0] * (a - b).square().mean() + VARIATION[1] * rough + SPARSE * a.mean()

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
        keep = _enough(keep[order(v.coordinates(x[keep]), v.grid)], len(v.vertices))
        x, d, rgb, weight = x[keep], d[keep], rgb[keep], weight[keep]
        basis = sh_basis(d, o.bands)[:, None]
        xg = v.coordinates(x)
        again = 2 if o.color_activation == "sigmoid" else 0
        finest, iterations, again = affordable(len(x), levels, 3 * o.bands**2, COLOR * seconds, rounds=again)
        v.sh.data.copy_(
            fit_color(
                levels,
                xg,
                basis,
                rgb,
                weight,
                activation=o.color_activation,
                iterations=iterations,
                rounds=again,
                missing=v.missing,
                finest=finest,
            )
        )
        error = (f.color(x, d[:, None])[:, 0] - rgb).square().mean(1)
        rms = math.sqrt(float((error * weight).sum() / weight.sum()))
        coarse = f", on cells {levels[finest].factor} times as large: the time is short" if finest else ""
        return (
            f"{how}; SH colour fitted to {len(x)} samples ({iterations} CG iterations a level{coarse}), rms {rms:.4f}"
        )

    def _project_density(self, f: PlenoxelsField, store: Store, levels: list[Level], seconds: float) -> str:
        v, o = f.voxels, f.options
        cell = sum(v.cell) / 3
        low, high = math.log(CLEAR / cell), math.log(OPAQUE / cell)

        def log(sigma: Tensor) -> Tensor:
            return torch.log(sigma.clamp_min(1e-30)).clamp(low, high)

        count = len(v.vertices)
        x, sigma = torch.cat([store.x, store.free_x]), torch.cat([store.sigma, store.free_sigma])
        keep = v.inside(x).nonzero().squeeze(1)
        keep = _enough(keep[order(v.coordinates(x[keep]), v.grid)], len(v.vertices))
        xg, target = v.coordinates(x[keep]), log(sigma[keep])
        finest, iterations, _ = affordable(len(keep), levels, 1, DENSITY * seconds)
        ones = torch.ones_like(target)
        if count * store.teacher.flops_per_point <= 0.5 * seconds * FLOPS:
            # Asked everywhere: the rim of the cells, such as the inside of a wall, lies outside of the occupancy.
            h = log(v.resample(lambda x: store.teacher.density(store.teacher.encode(x)), 1 << 16))[:, None]
            how = f"density asked at {count} vertices"
            if len(keep) and finest == 0:
                h = fit_scalar(levels, xg, target, ones, h, iterations=iterations, share=1.0, missing=v.missing)
                how += f" and refined on {len(keep)} samples"
        elif len(keep):
            h = fit_scalar(levels, xg, target, ones, low, iterations=iterations, missing=v.missing, finest=finest)
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


def _enough(ordered: Tensor, vertices: int) -> Tensor:
    """Of samples ``ordered`` by cell, evenly spread, as many as tell the unknowns apart many times over."""
    return ordered[:: max(1, len(ordered) // (PER_VERTEX * vertices))]


def _own(field: RadianceField) -> PlenoxelsField:
    if not isinstance(field, PlenoxelsField):
        raise TypeError(f"expected a PlenoxelsField, got {type(field).__name__}")
    return field
