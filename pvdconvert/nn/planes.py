"""Planes and lines as parameters, and the activations of the fields made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pvdconvert.kernels.planes import AXES, PAIRS, vm_features, vm_sum

EXP_LIMIT = 15.0
"""Exponents above this are clamped: e^15 = 3.3e6 per world unit is opaque within any step."""


class VectorMatrix(nn.Module):
    """Three planes and three lines (the VM decomposition of TensoRF).

    ``planes[i]`` [n[b], n[a], R_i] and ``lines[i]`` [n[c], R_i], channel-last: a vertex's components share cache lines.
    """

    def __init__(
        self,
        resolution: Sequence[int],
        ranks: Sequence[int],
        *,
        scale: float = 0.1,
        generator: torch.Generator | None = None,
    ) -> None:
        """Components start normal with standard deviation ``scale``."""
        super().__init__()
        self.planes = nn.ParameterList()
        self.lines = nn.ParameterList()
        for (a, b), c, rank in zip(PAIRS, AXES, ranks, strict=True):
            plane = scale * torch.randn(resolution[b], resolution[a], rank, generator=generator)
            line = scale * torch.randn(resolution[c], rank, generator=generator)
            self.planes.append(nn.Parameter(plane))
            self.lines.append(nn.Parameter(line))

    def sum(self, x01: Tensor) -> Tensor:
        """[N] at ``x01`` [N, 3] in the unit cube."""
        return vm_sum(x01, list(self.planes), list(self.lines))

    def features(self, x01: Tensor) -> Tensor:
        """[N, sum of ranks] at ``x01`` [N, 3] in the unit cube."""
        return vm_features(x01, list(self.planes), list(self.lines))

    def variation(self) -> Tensor:
        """Total variation of the planes: mean square differences of neighbours along both axes, summed (TensoRF)."""
        parts = [torch.diff(p, dim=k).square().mean() for p in self.planes for k in range(2) if p.shape[k] > 1]
        return 2 * torch.stack(parts).sum()

    def export(self, name: str) -> dict[str, Tensor]:
        """``{name}_plane.i`` [1, R, H, W] and ``{name}_line.i`` [1, R, L, 1]: TensoRF's layout (layouts 3.2)."""
        out = {f"{name}_plane.{i}": p.detach().permute(2, 0, 1)[None].contiguous() for i, p in enumerate(self.planes)}
        for i, line in enumerate(self.lines):
            out[f"{name}_line.{i}"] = line.detach().t()[None, :, :, None].contiguous()
        return out

    @torch.no_grad()
    def assign(self, planes: Sequence[Tensor], lines: Sequence[Tensor]) -> None:
        """Take values in place; shapes must be those of :attr:`planes` and :attr:`lines`."""
        for mine, other in zip([*self.planes, *self.lines], [*planes, *lines], strict=True):
            if mine.shape != other.shape:
                raise ValueError(f"shape {tuple(other.shape)}, expected {tuple(mine.shape)}")
            mine.copy_(other)

    @torch.no_grad()
    def resample(self, resolution: Sequence[int]) -> None:
        """Interpolate linearly to another ``resolution``; the outermost vertices stay where they are."""
        for i, ((a, b), c) in enumerate(zip(PAIRS, AXES)):
            plane, line = resample_mode(self.planes[i], self.lines[i], resolution[a], resolution[b], resolution[c])
            self.planes[i] = nn.Parameter(plane)
            self.lines[i] = nn.Parameter(line)


def resample_mode(plane: Tensor, line: Tensor, width: int, height: int, length: int) -> tuple[Tensor, Tensor]:
    """A plane [H, W, R] and its line [L, R] interpolated linearly to other sizes."""
    p = F.interpolate(plane.permute(2, 0, 1)[None], (height, width), mode="bilinear", align_corners=True)[0]
    q = F.interpolate(line.t()[None], length, mode="linear", align_corners=True)[0]
    return p.permute(1, 2, 0).contiguous(), q.t().contiguous()


class _TruncatedExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.clamp(max=EXP_LIMIT).exp()
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        result: Tensor = grad * out
        return result


def truncated_exp(x: Tensor) -> Tensor:
    """exp(min(x, EXP_LIMIT)) whose gradient does not die above the limit, so that a value there can come back."""
    result: Tensor = _TruncatedExp.apply(x)  # type: ignore[no-untyped-call]
    return result
