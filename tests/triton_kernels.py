"""Kernels of the tests: Triton finds what a kernel calls among the globals of its module."""

from __future__ import annotations

import triton
import triton.language as tl

from pvdconvert.kernels.hashgrid_triton import address


@triton.jit  # type: ignore[untyped-decorator]
def write_addresses(rows, out, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """out[i, c]: the address of column c of rows[i], four by four."""
    i = tl.arange(0, 4)
    tl.store(out + i[:, None] * 4 + i[None, :], address(tl.load(rows + i), WIDTH, i))
