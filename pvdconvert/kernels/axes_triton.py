"""Interpolation along one axis, for the Triton twins of planes and lines."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def cell(x, n, live, AXIS: tl.constexpr, sides):  # type: ignore[no-untyped-def]
    """Lower and upper vertex (int64) and fraction of points ``n`` on ``sides`` vertices; outside or NaN is clamped."""
    u = tl.load(x + n * 3 + AXIS, mask=live, other=0.0)
    pos = tl.where(u > 0.0, tl.minimum(u, 1.0), 0.0) * (sides - 1)
    i = tl.maximum(tl.minimum(pos.to(tl.int64), sides - 2), 0)
    return i, tl.minimum(i + 1, sides - 1), pos - i.to(tl.float32)


@triton.jit
def mix(rows, low, high, f, r, mask, RANK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Columns ``r`` of a line's rows ``low`` and ``high``, interpolated: [points, columns]."""
    a = tl.load(rows + low[:, None] * RANK + r[None, :], mask=mask, other=0.0)
    b = tl.load(rows + high[:, None] * RANK + r[None, :], mask=mask, other=0.0)
    return a + f[:, None] * (b - a)


@triton.jit
def spread(rows, low, high, f, r, value, mask, RANK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The transpose of :func:`mix`: add ``value`` to the rows."""
    tl.atomic_add(rows + low[:, None] * RANK + r[None, :], (1.0 - f)[:, None] * value, mask=mask, sem="relaxed")
    tl.atomic_add(rows + high[:, None] * RANK + r[None, :], f[:, None] * value, mask=mask, sem="relaxed")
