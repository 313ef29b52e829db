"""The hash grid as a module: a trainable table and the geometry that reads it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pvdconvert.kernels.hashgrid import HashGridSpec, hash_encode

INITIAL_RANGE = 1e-4
"""Tables start uniform in +- this (Mueller et al. 2022, section 4)."""


class HashGrid(nn.Module):
    """``x01`` [N, 3] in box units -> [N, levels * features]; see :func:`pvdconvert.kernels.hashgrid.hash_encode`."""

    def __init__(self, spec: HashGridSpec, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.spec = spec
        table = torch.empty(spec.entries, spec.features)
        table.uniform_(-INITIAL_RANGE, INITIAL_RANGE, generator=generator)
        self.embeddings = nn.Parameter(table)

    def forward(self, x01: Tensor) -> Tensor:
        return hash_encode(x01, self.embeddings, self.spec)
