"""Gaussian blobs: a radiance field that is a sum of isotropic Gaussians with a colour in spherical harmonics each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pvdconvert.errors import InputError, RequestError
from pvdconvert.plugin import Architecture, ArchitectureBase, ArchitectureSpec, Budget, Config, Limits, TeacherFacts
from pvdconvert.scene import Scene

if TYPE_CHECKING:
    from torch import Tensor

    from pvdconvert.field import RadianceField
    from pvdconvert.render.occupancy import Occupancy

SPEC = ArchitectureSpec(
    name="blobs",
    title="A sum of Gaussian blobs, each with a view-dependent colour",
    code="pvdconvert_blobs:architecture",
    options="pvdconvert_blobs:BlobsOptions",
    licence="MIT",
)


@dataclasses.dataclass(frozen=True)
class BlobsOptions:
    """The configuration: what ``--set key=value`` takes and what stands in the file."""

    count: int = dataclasses.field(default=256, metadata={"help": "blobs"})
    bands: int = dataclasses.field(default=2, metadata={"help": "bands of spherical harmonics of a colour, 1 to 5"})
    mask: Mapping[str, Any] | None = dataclasses.field(default=None, metadata={"help": "cells that may hold density"})


def options_of(config: Mapping[str, Any]) -> BlobsOptions:
    """Read a configuration. Raises InputError naming what is wrong."""
    known = [f.name for f in dataclasses.fields(BlobsOptions)]
    for key in config:
        if key not in known:
            raise InputError(f"blobs: config has no key {key!r}", hint=f"known: {', '.join(known)}")
    options = BlobsOptions(**config)
    for key, value, high in (("count", options.count, 1 << 20), ("bands", options.bands, 5)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
            raise InputError(f"blobs: config {key!r} is {value!r}", hint=f"a whole number from 1 to {high}")
    return options


def architecture() -> Architecture:
    """The code, made on first use: torch is imported in here, so that listing plugins stays quick."""
    import torch
    from torch import nn

    from pvdconvert.field import RadianceField
    from pvdconvert.nn.mask import Mask
    from pvdconvert.nn.sh import sh_basis

    class BlobsField(RadianceField):
        """Density is the sum of ``exp(log_peak - |x - center|^2 / (2 radius^2))``; colours mix by their share of it."""

        def __init__(self, options: BlobsOptions, scene: Scene) -> None:
            super().__init__()
            self.options, self.box = options, scene.box
            count = options.count
            self.flops_per_point, self.batch_points = 20.0 * count, 4096
            self.center = nn.Parameter(torch.zeros(count, 3))
            self.log_radius = nn.Parameter(torch.zeros(count))
            self.log_peak = nn.Parameter(torch.zeros(count))
            self.sh = nn.Parameter(torch.zeros(count, 3 * options.bands**2))

        def restrict(self, occupancy: Occupancy) -> None:
            """Keep the cells as a mask, and spread the blobs over them."""
            super().restrict(occupancy)
            cells = occupancy.centers()
            with torch.no_grad():
                self.center.copy_(cells[torch.linspace(0, len(cells) - 1, len(self.center)).long()])
                self.log_radius.fill_(float(torch.tensor(occupancy.cell).log()))

        def encode(self, x: Tensor) -> Tensor:  # [N, 3] -> [N, count + 1]
            # |x - c|^2 by one matrix product: [N, count, 3] would be three times the memory.
            near, far = self.center.square().sum(-1), x.square().sum(-1, keepdim=True)
            square = (near + far - 2 * x @ self.center.T).clamp_min(0.0)
            shares = torch.exp(self.log_peak - 0.5 * square * torch.exp(-2 * self.log_radius))
            low, high = x.new_tensor(self.box.min), x.new_tensor(self.box.max)
            inside = ((x >= low) & (x <= high)).all(-1)
            if self.mask is not None:
                inside = inside & self.mask.inside(x)
            return torch.cat([shares, inside[:, None].to(x.dtype)], dim=1)

        def density(self, latent: Tensor) -> Tensor:
            return torch.where(latent[:, -1] > 0, latent[:, :-1].sum(-1), 0.0)

        def color(self, latent: Tensor, d: Tensor) -> Tensor:  # d [N, K, 3] -> [N, K, 3]
            shares = latent[:, :-1] / (latent[:, :-1].sum(-1, keepdim=True) + 1e-12)
            coefficients = (shares @ self.sh).view(len(d), 1, 3, self.options.bands**2)
            basis = sh_basis(d, self.options.bands)[:, :, None, :]  # [N, K, 1, bands^2]
            return torch.sigmoid((coefficients * basis).sum(-1))

    class Blobs(ArchitectureBase):
        def plan(self, facts: TeacherFacts, budget: Budget, limits: Limits, overrides: Mapping[str, Any]) -> Config:
            given = {**limits.fixed, **overrides}
            count = {"fast": 128, "balanced": 256}.get(budget.preset, 512)
            try:
                options = options_of({"count": count, **given})
            except InputError as error:
                raise RequestError(str(error)) from error
            if budget.max_mb is not None:
                cells = [round(side / facts.cell) + 1 for side in facts.scene.box.size]
                room = budget.max_mb * 1e6 - cells[0] * cells[1] * cells[2] / 8 - 1024
                most = int(room / (4 * (5 + 3 * options.bands**2)))
                if most < 1 or ("count" in given and most < options.count):
                    raise RequestError(f"blobs: no {options.count} blobs in {budget.max_mb} MB", hint="raise --max-mb")
                options = dataclasses.replace(options, count=min(options.count, most))
            return dataclasses.asdict(options)

        def build(self, config: Config, scene: Scene, seed: int) -> BlobsField:
            field = BlobsField(options_of({**config, "mask": None}), scene)
            generator = torch.Generator().manual_seed(seed)
            box = scene.box
            with torch.no_grad():
                field.center.uniform_(0, 1, generator=generator)
                field.center.mul_(torch.tensor(box.size)).add_(torch.tensor(box.min))
                field.log_radius.fill_(float(torch.tensor(0.05 * box.longest).log()))
                field.sh.normal_(0, 0.1, generator=generator)
            return field

        def load(self, config: Config, tensors: Mapping[str, Tensor], scene: Scene) -> BlobsField:
            options = options_of(config)
            field = BlobsField(options, scene)
            expected = dict(field.named_parameters())
            masked = {"mask.bits"} if options.mask is not None else set()
            for key in [*expected, *masked, *tensors]:
                if key not in tensors:
                    raise InputError(f"blobs: tensor {key!r} is missing")
                if key not in expected and key not in masked:
                    raise InputError(f"blobs: tensor {key!r} is not part of this configuration")
                if key in expected and tensors[key].shape != expected[key].shape:
                    raise InputError(f"blobs: tensor {key!r} is {list(tensors[key].shape)}")
            with torch.no_grad():
                for key, p in expected.items():
                    p.copy_(tensors[key])
            if options.mask is not None:
                field.mask = Mask.from_parts(options.mask, tensors["mask.bits"])
            return field

        def save(self, field: RadianceField) -> tuple[Config, dict[str, Tensor]]:
            assert isinstance(field, BlobsField)
            config = dataclasses.asdict(field.options)
            tensors = {name: p.detach() for name, p in field.named_parameters()}
            if field.mask is not None:
                config["mask"] = field.mask.to_config()
                tensors["mask.bits"] = field.mask.bits
            return config, tensors

        def param_groups(self, field: RadianceField) -> list[dict[str, Any]]:
            return [{"params": list(field.parameters()), "lr": 2e-2, "name": "blobs"}]

    return Blobs()
