"""exp of a clipped exponent: the density of programs that clip before they exponentiate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _ClippedExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        out = torch.exp(x.clamp(low, high))
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (out,) = ctx.saved_tensors
        return grads[0] * out, None, None


def clipped_exp(x: Tensor, low: float, high: float) -> Tensor:
    """``exp(min(max(x, low), high))`` (layouts section 8.3), with the gradient ``exp(min(max(x, low), high))``.

    Beyond the cuts the gradient stays alive and keeps its sign, so that a density that ran off can come back.
    """
    out: Tensor = _ClippedExp.apply(x, low, high)  # type: ignore[no-untyped-call]
    return out
