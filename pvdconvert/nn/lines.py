"""Lines as parameters: the CP decomposition of TensoRF."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pvdconvert.kernels.lines import AXES, cp_features, cp_sum


class CpLines(nn.Module):
    """Three lines [n[axis], R], channel-last, whose products are the components (:mod:`pvdconvert.kernels.lines`)."""

    def __init__(
        self,
        resolution: Sequence[int],
        rank: int,
        *,
        scale: float = 0.2,
        generator: torch.Generator | None = None,
    ) -> None:
        """Entries start normal with standard deviation ``scale``."""
        super().__init__()
        self.lines = nn.ParameterList()
        for axis in AXES:
            self.lines.append(nn.Parameter(scale * torch.randn(resolution[axis], rank, generator=generator)))

    def sum(self, x01: Tensor) -> Tensor:
        """[N] at ``x01`` [N, 3] in the unit cube."""
        return cp_sum(x01, list(self.lines))

    def features(self, x01: Tensor) -> Tensor:
        """[N, R] at ``x01`` [N, 3] in the unit cube."""
        return cp_features(x01, list(self.lines))

    def export(self, name: str) -> dict[str, Tensor]:
        """``{name}_line.i`` [1, R, L, 1]: TensoRF's layout (layouts 3.2)."""
        return {f"{name}_line.{i}": p.detach().t()[None, :, :, None].contiguous() for i, p in enumerate(self.lines)}

    @torch.no_grad()
    def assign(self, lines: Sequence[Tensor]) -> None:
        """Take values in place; shapes must be those of :attr:`lines`."""
        for mine, other in zip(self.lines, lines, strict=True):
            if mine.shape != other.shape:
                raise ValueError(f"shape {tuple(other.shape)}, expected {tuple(mine.shape)}")
            mine.copy_(other)

    @torch.no_grad()
    def resample(self, resolution: Sequence[int]) -> None:
        """Interpolate linearly to another ``resolution``; the outermost vertices stay where they are."""
        for i, axis in enumerate(AXES):
            self.lines[i] = nn.Parameter(resample_line(self.lines[i], resolution[axis]))


def resample_line(line: Tensor, length: int) -> Tensor:
    """A line [L, R] interpolated linearly to ``length`` vertices."""
    return F.interpolate(line.t()[None], length, mode="linear", align_corners=True)[0].t().contiguous()
