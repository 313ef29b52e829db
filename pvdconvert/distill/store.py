"""The teacher's answers, asked once and replayed by every later step.

A store is a bank of rays through pseudo-views, with every sample on them that matters, and a share of points anywhere
in occupied space. Volume stages draw single samples from it; the render stage draws whole rays; projections read it
whole.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from pvdconvert.field import RadianceField
from pvdconvert.render.contracted import stretch
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.scene import Scene


@dataclasses.dataclass
class Store:
    """Teacher's answers at M samples on R rays and at P free points. All tensors on one device; float32.

    x [M,3]        sample positions, world            d [R,3]          unit ray directions
    dt [M]         length each sample stands for      offsets [R+1]    int64: ray r owns samples offsets[r]:offsets[r+1]
    sigma [M]      density per world unit             ray_rgb [R,3]    composited colour over the scene's backdrop
    weight [M]     compositing weight on its ray      ray_opacity [R]  sum of weights
    rgb [M,3]      colour along the ray's direction   ray_depth [R]    sum of weight * t
    colored [M]    bool: rgb was asked (weight above the threshold); elsewhere rgb is 0 and means nothing
    t [M]          distance along the ray
    free_x [P,3], free_sigma [P]   points drawn anywhere in occupied cells, density only
    whole_space    the student has no mask: free points lie in empty space too, around the box, where the answer is 0
    many [Q]            int64: samples asked from several sides; many_d, many_rgb [Q,K,3]: directions and colours
    """

    scene: Scene
    occupancy: Occupancy
    step: float
    x: Tensor
    t: Tensor
    dt: Tensor
    sigma: Tensor
    weight: Tensor
    rgb: Tensor
    colored: Tensor
    d: Tensor
    offsets: Tensor
    ray_rgb: Tensor
    ray_opacity: Tensor
    ray_depth: Tensor
    free_x: Tensor
    free_sigma: Tensor
    teacher: RadianceField
    whole_space: bool = False
    many: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    many_d: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0, 1, 3))
    many_rgb: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0, 1, 3))

    def __len__(self) -> int:
        return int(self.x.shape[0])

    @property
    def rays(self) -> int:
        return int(self.d.shape[0])

    def clear(self) -> None:
        """Let go of everything it holds; what others hold of it stays."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                setattr(self, field.name, value[:0].clone())

    def ray_of(self) -> Tensor:
        """[M] int64: the ray of each sample."""
        counts = self.offsets[1:] - self.offsets[:-1]
        return torch.repeat_interleave(torch.arange(self.rays, device=self.d.device), counts)

    def lengths(self, x: Tensor) -> Tensor:
        """[N] world length of a step at ``x`` [N, 3]."""
        if self.scene.ray_space.kind != "contracted":
            return torch.full_like(x[:, 0], self.step)
        return self.step * stretch(x, self.scene.ray_space)

    def colored_samples(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(x [C,3], d [C,3], rgb [C,3], weight [C]) of the samples whose colour was asked, and from another side."""
        keep = self.colored.nonzero().squeeze(1)
        x, d, rgb, weight = self.x[keep], self.d[self.ray_of()[keep]], self.rgb[keep], self.weight[keep]
        if not len(self.many):
            return x, d, rgb, weight
        return (
            torch.cat([x, self.x[self.many]]),
            torch.cat([d, self.many_d[:, 0]]),
            torch.cat([rgb, self.many_rgb[:, 0]]),
            torch.cat([weight, self.weight[self.many]]),
        )

    @torch.no_grad()
    def ask_density(self, x: Tensor, chunk: int = 1 << 16) -> Tensor:
        """The teacher's density [N] at ``x`` [N, 3]: costs teacher time, zero outside occupied cells at no cost."""
        out = torch.zeros(x.shape[0], dtype=torch.float32, device=x.device)
        inside = self.occupancy.contains(x).nonzero().squeeze(1)
        for part in torch.split(inside, chunk):
            out[part] = self.teacher.density(self.teacher.encode(x[part]))
        return out
