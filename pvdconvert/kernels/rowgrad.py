"""Gradients that touch few rows of a large table: written in place instead of through a dense tensor.

A parameter [R, F] under :class:`pvdconvert.solve.lazy_adam.LazyAdam` carries ``param.touched``, a uint8 mask [R], and
a persistent ``param.grad`` that is all zero between steps. The backward pass of a kernel then adds into ``param.grad``,
sets ``touched[row] = 1`` for every row it adds to, and returns no gradient to autograd. That saves a memset, an
addition and an optimiser pass over the whole table in every step.
"""

from __future__ import annotations

from torch import Tensor


def sink_of(param: Tensor) -> tuple[Tensor, Tensor] | None:
    """(gradient [R, F] to add to, mask [R] to set), or None: then return a dense gradient as usual.

    Call it in the backward pass with the very parameter object that the forward pass was given.
    """
    touched: Tensor | None = getattr(param, "touched", None)
    if touched is None or not param.is_leaf:
        return None
    if param.grad is None:
        param.grad = param.detach().new_zeros(param.shape)
        touched.zero_()
    return param.grad, touched
