"""The architecture ``dvgo``: plans, files and projection of :class:`DvgoField`."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from pvdconvert.errors import InputError, RequestError
from pvdconvert.field import RadianceField
from pvdconvert.nn.head import carry, solve_last
from pvdconvert.nn.mask import Mask
from pvdconvert.nn.sh import sh_basis
from pvdconvert.nn.voxels import Shape, lattice_shape
from pvdconvert.plugin import ArchitectureBase, Budget, Config, Limits, TeacherFacts
from pvdconvert.scene import Box, Scene
from pvdconvert.solve.voxels import DC, EDGE, Level, fit_color, fit_scalar, order, pyramid
from pvdconvert_plugins.dvgo_field import EMPTY, DvgoField, VertexMask, all_vertices
from pvdconvert_plugins.dvgo_spec import DvgoOptions, as_config, checked, mlp_widths, plain
from pvdconvert_plugins.plenoxels_plan import cubic

if TYPE_CHECKING:
    from pvdconvert.distill.store import Store

PRESETS = {"fast": 128, "balanced": 176, "best": 224}
"""Vertices along the longest side of the occupied box: the lattice is dense, so files grow with the cube."""
SMALLEST = 12
START_THICKNESS = 0.01
"""Optical thickness of a voxel of a fresh field: nearly clear, yet with a gradient (the program's alpha_init)."""
CLEAR, OPAQUE = 1e-3, 15.0
"""Projected densities lie between these optical thicknesses of a voxel."""
FLOPS = 5e10
LEVELS = 3
SAMPLES = 4
"""Samples a vertex that projections use, of those that there are."""
HEAD_SAMPLES = 1 << 17


class Dvgo(ArchitectureBase):
    """The architecture ``dvgo``."""

    def plan(self, facts: TeacherFacts, budget: Budget, limits: Limits, overrides: Mapping[str, Any]) -> Config:
        """Resolution by preset over the occupied box; for ``max_mb`` features are halved, then the lattice shrinks."""
        for key, value in overrides.items():
            if key in limits.fixed and plain(limits.fixed[key]) != plain(value):
                raise RequestError(
                    f"dvgo: {key}={value} cannot be had: the output layout needs {key}={limits.fixed[key]}",
                    hint=f"drop --set {key}, or write another layout",
                )
        given = {**limits.defaults, **limits.fixed, **overrides}
        if given.get("mlp_depth") == 0:
            given.setdefault("channels", 3)
        checked(given, RequestError)
        box = Box.from_json(given["box"]) if given.get("box") is not None else facts.occupied_box
        fitted = given.get("box") is None and given.get("shape") is None

        def config(resolution: int, dtype: str) -> Config:
            chosen = {"resolution": resolution, "store_dtype": dtype, **given}
            b, shape = cubic(box, int(chosen["resolution"])) if fitted else (box, chosen.get("shape"))
            chosen.update(box=b.to_json(), shape=list(shape or lattice_shape(b, int(chosen["resolution"]))))
            voxel = math.prod(s / (n - 1) for s, n in zip(b.size, chosen["shape"])) ** (1 / 3)
            if given.get("density_scale") is None:
                chosen["density_scale"] = round(1 / voxel, 6)
            if given.get("act_shift") is None:
                thin = START_THICKNESS / (voxel * float(chosen["density_scale"]))
                chosen["act_shift"] = round(math.log(math.expm1(thin)), 4)
            return as_config(checked(chosen, RequestError))

        resolution = PRESETS.get(budget.preset, PRESETS["balanced"])
        plan = config(resolution, "float32")
        if budget.max_mb is None or megabytes(plan, facts) <= budget.max_mb:
            return plan
        for smaller in [resolution, *range(resolution - resolution % 4, SMALLEST, -4), SMALLEST]:
            plan = config(smaller, "float16")
            if megabytes(plan, facts) <= budget.max_mb:
                return plan
        least = math.ceil(megabytes(plan, facts) * 100) / 100
        raise RequestError(
            f"dvgo does not fit into {budget.max_mb:g} MB: the least that this request needs is {least:g} MB",
            hint=f"--max-mb {least:g}, or fewer --set keys",
        )

    def build(self, config: Config, scene: Scene, seed: int) -> DvgoField:
        return DvgoField(checked({**config, "mask": None, "mask_cache": None}, RequestError), scene, seed)

    def load(self, config: Config, tensors: Mapping[str, Tensor], scene: Scene) -> DvgoField:
        o = checked(config, InputError)
        shape = o.shape or lattice_shape(scene.box if o.box is None else Box.from_json(o.box), o.resolution)
        wanted: dict[str, tuple[int, ...]] = {"density": (1, 1, *shape), "k0": (1, o.channels, *shape)}
        widths = mlp_widths(o)
        for i, (wide, units) in enumerate(itertools.pairwise(widths)):
            wanted[f"rgbnet.{i}.weight"], wanted[f"rgbnet.{i}.bias"] = (units, wide), (units,)
        for name, mask in (("mask.bits", o.mask), ("mask_cache.bits", o.mask_cache)):
            if mask is not None:
                wanted[name] = tuple(tensors[name].shape) if name in tensors else ()
        for name in sorted(wanted.keys() ^ tensors.keys()):
            raise InputError(
                f"dvgo: tensor {name!r} is {'missing' if name in wanted else 'not part of this configuration'}"
            )
        for name, size in wanted.items():
            if tuple(tensors[name].shape) != size:
                raise InputError(f"dvgo: {name!r} has shape {list(tensors[name].shape)}, {list(size)} was expected")
        field = DvgoField(o, scene)
        rows = tensors["k0"].detach().float().reshape(o.channels, -1).t().contiguous()
        field.voxels.assign(all_vertices(shape), tensors["density"].detach().float().reshape(-1, 1).clone(), rows)
        with torch.no_grad():
            for name, parameter in _head(field).items():
                parameter.copy_(tensors[name])
        if o.mask is not None:
            field.mask = Mask.from_parts(o.mask, tensors["mask.bits"])
        if o.mask_cache is not None:
            field.cache = VertexMask.from_parts(o.mask_cache, tensors["mask_cache.bits"])
        return field

    def save(self, field: RadianceField) -> tuple[Config, dict[str, Tensor]]:
        f = _own(field)
        v, half = f.voxels, f.options.store_dtype == "float16"
        index = v.vertices.long()
        at = (index[:, 0], index[:, 1], index[:, 2])
        density = torch.full((1, 1, *v.shape), EMPTY, device=v.density.device)
        density[0, 0][at] = v.density.detach().squeeze(1)
        k0 = torch.zeros(1, f.options.channels, *v.shape, device=v.density.device)
        k0.permute(0, 2, 3, 4, 1)[0][at] = v.sh.detach()
        tensors = {"density": density, "k0": k0.half() if half else k0}
        tensors |= {name: p.detach().clone() for name, p in _head(f).items()}
        config = as_config(dataclasses.replace(f.options, box=f.box.to_json(), shape=v.shape))
        if f.mask is not None:
            config["mask"], tensors["mask.bits"] = f.mask.to_config(), f.mask.bits
        if f.cache is not None:
            config["mask_cache"], tensors["mask_cache.bits"] = f.cache.to_config(), f.cache.bits
        return config, tensors

    def param_groups(self, field: RadianceField) -> list[dict[str, Any]]:
        """``sparse_rows``: a step touches few rows; see ``pvdconvert.solve.lazy_adam``."""
        f = _own(field)
        groups = [
            {"params": [f.voxels.density], "lr": 5e-2, "name": "density", "sparse_rows": True},
            {"params": [f.voxels.sh], "lr": 2e-2, "name": "features", "sparse_rows": True},
        ]
        if f.head is not None:
            head = {"params": list(f.head.parameters()), "name": "colour network"}
            groups.append({**head, "lr": 1e-2, "rotated": True, "betas": (0.9, 0.95)})
        return groups

    def distortion(self, scene: Scene) -> float:
        """As its authors have it (arXiv 2206.05085): where rays have far to go."""
        return 0.0 if scene.ray_space.kind == "world" else 0.01

    @torch.no_grad()
    def project(self, field: RadianceField, store: Store, seconds: float) -> str | None:
        """Density and colours by least squares on the vertices; the network's last layer by ridge regression.

        The features start as spherical harmonics of the colour's logit: the mean first, then the linear band.
        """
        f = _own(field)
        v = f.voxels
        if not len(v.vertices):
            return None
        levels = pyramid(v.vertices, v.grid, LEVELS)
        how = _project_density(f, store, levels, seconds)
        x, d, rgb, weight = store.colored_samples()
        keep = v.inside(x).nonzero().squeeze(1)
        if not len(keep) or f.options.channels < 3:
            return f"{how}; colour not projected"
        keep = _thinned(keep[order(v.coordinates(x[keep]), v.grid)], len(v.vertices))
        x, d, rgb, weight = x[keep], d[keep], rgb[keep], weight[keep]
        bands = 2 if f.options.channels >= 12 else 1
        iterations = _affordable(len(x), len(v.vertices), 3 * bands**2, 0.3 * seconds, LEVELS + 2)
        sh = fit_color(
            levels, v.coordinates(x), sh_basis(d, bands)[:, None], rgb, weight,
            activation="sigmoid", iterations=iterations,
        ).view(-1, 3, bands**2)  # fmt: skip
        f.voxels.sh.data[:, :3] = DC * sh[:, :, 0]
        f.voxels.sh.data[:, 3 : 3 * bands**2] = sh[:, :, 1:].flatten(1)
        if f.head is not None:
            _solve_last_layer(f, x, d, rgb, weight)
        error = (f.color(x, d[:, None])[:, 0] - rgb).square().mean(1)
        rms = math.sqrt(float((error * weight).sum() / weight.sum()))
        return f"{how}; colour fitted to {len(x)} samples ({iterations} CG iterations a level), rms {rms:.4f}"


def _project_density(f: DvgoField, store: Store, levels: list[Level], seconds: float) -> str:
    """Raw values, log-density below a voxel's optical thickness of about one: asked of the teacher, then refined."""
    v = f.voxels
    cell = sum(v.cell) / 3
    low, high = f.inverse(torch.tensor([CLEAR / cell, OPAQUE / cell])).tolist()

    def raw(sigma: Tensor) -> Tensor:
        return f.inverse(sigma.clamp(CLEAR / cell, OPAQUE / cell))

    x, sigma = torch.cat([store.x, store.free_x]), torch.cat([store.sigma, store.free_sigma])
    keep = v.inside(x).nonzero().squeeze(1)
    keep = _thinned(keep[order(v.coordinates(x[keep]), v.grid)], len(v.vertices))
    xg, target = v.coordinates(x[keep]), raw(sigma[keep])
    iterations = _affordable(len(keep), len(v.vertices), 1, 0.1 * seconds, LEVELS)
    ones = torch.ones_like(target)
    if len(v.vertices) * store.teacher.flops_per_point <= 0.5 * seconds * FLOPS:
        h = raw(v.resample(lambda p: store.teacher.density(store.teacher.encode(p)), 1 << 16))[:, None]
        how = f"density asked at {len(h)} vertices"
        if len(keep):
            h = fit_scalar(levels, xg, target, ones, h, iterations=iterations, share=1.0)
            how += f" and refined on {len(keep)} samples"
    elif len(keep):
        h = fit_scalar(levels, xg, target, ones, low, iterations=iterations)
        how = f"density at {len(h)} vertices fitted to {len(keep)} samples"
    else:
        return "density not projected: no sample lies inside"
    v.density.data.copy_(h.clamp(low, high))
    return how


def _solve_last_layer(f: DvgoField, x: Tensor, d: Tensor, rgb: Tensor, weight: Tensor) -> None:
    """The hidden layers stay random; the last one is the ridge solution for the logits that the voxels leave open."""
    assert f.head is not None
    if f.options.direct:
        carry(f.head)
    last = f.head.layers[-1]
    assert isinstance(last, nn.Linear)
    stride = -(-len(x) // HEAD_SAMPLES)
    x, d, weight, inner = x[::stride], d[::stride, None], weight[::stride], rgb[::stride].clamp(EDGE, 1 - EDGE)
    features = f.k0(x)
    given = torch.zeros_like(inner) if f.options.direct else features[:, :3]
    # A logit counts by what it does to the colour.
    w = (weight[:, None] * (inner * (1 - inner)).clamp_min(0.02) ** 2).mean(1)
    solve_last(last, f.hidden(x, features, d), torch.logit(inner) - given, w)


def _thinned(ordered: Tensor, vertices: int) -> Tensor:
    """Every n-th of samples in the order of the lattice: enough for each vertex."""
    return ordered[:: -(-len(ordered) // max(1 << 16, SAMPLES * vertices))] if len(ordered) else ordered


def _affordable(samples: int, vertices: int, width: int, seconds: float, passes: int) -> int:
    """CG iterations for a time, by a fixed estimate of their cost: the same request gives the same result."""
    cost = samples * (60 + 32 * width) * 1e-9 + vertices * width * 1.5e-8
    return max(4, min(12, int(seconds / max(cost, 1e-9) / passes)))


def megabytes(config: Config, facts: TeacherFacts) -> float:
    """Megabytes (10^6) of the file: the dense lattice, the network and the mask."""
    o: DvgoOptions = checked(config, RequestError)
    widths = mlp_widths(o)
    network = sum(4 * (a + 1) * b for a, b in itertools.pairwise(widths))
    cells = math.prod(s / facts.cell + 2 for s in facts.scene.box.size)
    vertex = 4 + o.channels * (2 if o.store_dtype == "float16" else 4)
    return (math.prod(cast(Shape, o.shape)) * vertex + network + cells / 8) / 1e6 + 0.01


def _head(field: DvgoField) -> dict[str, Tensor]:
    """Parameters of the network under the names of files."""
    layers = [] if field.head is None else list(field.head.layers)
    return {f"rgbnet.{i}.{k}": layer.get_parameter(k) for i, layer in enumerate(layers) for k in ("weight", "bias")}


def _own(field: RadianceField) -> DvgoField:
    if not isinstance(field, DvgoField):
        raise TypeError(f"expected a DvgoField, got {type(field).__name__}")
    return field
