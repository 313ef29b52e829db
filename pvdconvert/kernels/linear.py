"""Matrix products of perceptrons. On a CPU, oneDNN's convolution of size one is often about twice as fast as the BLAS
that torch's ``linear`` calls (measured on an AMD CPU with AVX-512: 2.1x forward, 1.7x with gradients).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

MIN_ROWS = 64
MIN_OUT = 16
"""Below these the plain product wins."""


def row_chunks(n: int, rows: int) -> Iterator[slice]:
    """Slices that cover ``n`` rows, of ``rows`` (a multiple of 16) rows or fewer; all but the last a multiple of 16."""
    even = n - n % 16
    for start in range(0, even, rows):
        yield slice(start, min(start + rows, even))
    if even < n:
        yield slice(even, n)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``: x [N, I], weight [O, I], bias [O] -> [N, O]. Differentiable."""
    n, wide = x.shape
    if (
        n < MIN_ROWS
        or weight.shape[0] < MIN_OUT
        or x.device.type != "cpu"
        or x.dtype != torch.float32
        or weight.dtype != torch.float32
        or not torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    ):
        return functional.linear(x, weight, bias)
    # [N, I] rows are the memory of a channels-last picture of N pixels: no copy on the way in or out. With one thread
    # torch takes oneDNN for a convolution of size one only from 16 pictures on.
    batch = 16 if n % 16 == 0 else 1
    image = x.contiguous().view(batch, n // batch, 1, wide).permute(0, 3, 1, 2)
    out = functional.conv2d(image, weight[:, :, None, None], bias)
    return out.permute(0, 2, 3, 1).reshape(n, weight.shape[0])
