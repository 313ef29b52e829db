"""Compositing of packed samples along rays (layouts section 0.4): weights, and sums over the samples of a ray.

Samples of all rays stand in one array; ray r owns rows ``offsets[r]:offsets[r+1]``, front to back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pvdconvert.kernels.backend import twin
from pvdconvert.kernels.operators import define

OPAQUE = 100.0
"""Optical thickness beyond which a sample is opaque: exp(-100) is 4e-44. Bounds sums, so inf is a legal ``tau``."""


def render_weights(tau: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Compositing weights ``w_i = T_i (1 - exp(-tau_i))`` and what is left behind the last sample of each ray.

    tau [S] = density * length, >= 0; offsets [R+1] int64 -> w [S], T_end [R] (1 for a ray without samples).
    ``T_i = exp(-sum of tau_j before i on the ray)``. Both outputs are differentiable in ``tau``.
    """
    if not torch.compiler.is_compiling() and twin(tau, offsets) == "torch":
        return render_weights_torch(tau, offsets)
    w, end = _render_weights(tau, offsets)
    return w, end


def render_weights_torch(tau: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """The truth of :func:`render_weights`."""
    counts = offsets[1:] - offsets[:-1]
    # One running sum over all rays, in double: rays are told apart by differences, which single precision would eat.
    thick = tau.double().clamp(max=OPAQUE)
    total = torch.cat([thick.new_zeros(1), torch.cumsum(thick, 0)])
    start = total[offsets[:-1]]
    before = total[:-1] - torch.repeat_interleave(start, counts)
    w = torch.exp(-before) * -torch.expm1(-thick)
    end = torch.exp(start - total[offsets[1:]])
    return w.to(tau.dtype), end.to(tau.dtype)


def ray_sum(values: Tensor, offsets: Tensor, weight: Tensor | None = None) -> Tensor:
    """Sums over the samples of each ray: values [S, C] (or [S]), offsets [R+1] int64 -> [R, C] (or [R]).

    With ``weight`` [S], sums of ``weight * values`` (as for colours), without storing the products. Differentiable in
    ``values`` and ``weight``; each ray is summed front to back, so equal inputs give equal bits.
    """
    flat = values.dim() == 1
    table = (values[:, None] if flat else values).contiguous()
    tracing = torch.compiler.is_compiling()
    result: Tensor
    if weight is not None and (tracing or twin(values, weight, offsets) != "torch"):
        result = _ray_blend(weight, table, offsets)
    else:
        table = table if weight is None else weight[:, None] * table
        if tracing or twin(table, offsets) == "triton":
            result = _ray_sum(table, offsets)
        else:  # on the CPU torch's segmented sum serves: about 1 ns a number on a core
            result = torch.segment_reduce(table, "sum", offsets=offsets, axis=0, initial=0)
    return result[:, 0] if flat else result


# ------------------------------------------------------------------------------------ the operators that torch knows


def _run(tau: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    which = twin(tau, offsets)
    if which == "numba":
        from pvdconvert.kernels import composite_numba

        return composite_numba.forward(tau, offsets)
    if which == "triton":
        from pvdconvert.kernels import composite_triton

        return composite_triton.forward(tau, offsets)
    return render_weights_torch(tau, offsets)


def _run_backward(w: Tensor, end: Tensor, offsets: Tensor, grad_w: Tensor, grad_end: Tensor) -> Tensor:
    which = twin(w, end, offsets, grad_w, grad_end)
    if which == "numba":
        from pvdconvert.kernels import composite_numba

        return composite_numba.backward(w, end, offsets, grad_w, grad_end)
    if which == "triton":
        from pvdconvert.kernels import composite_triton

        return composite_triton.backward(w, end, offsets, grad_w, grad_end)
    ray = torch.repeat_interleave(torch.arange(len(end), device=w.device), offsets[1:] - offsets[:-1])
    # d w_i / d tau_i is what is left behind sample i; d w_j / d tau_i = -w_j for all j behind it.
    parts = []
    for value, last in ((w.double(), end.double()), (w.double() * grad_w.double(), (end * grad_end).double())):
        total = torch.cat([value.new_zeros(1), torch.cumsum(value, 0)])
        parts.append(last[ray] + total[offsets[1:]][ray] - total[1:])
    left, behind = parts
    return (left * grad_w - behind).to(w.dtype)


def _run_sum(values: Tensor, offsets: Tensor) -> Tensor:
    if twin(values, offsets) == "triton":
        from pvdconvert.kernels import composite_triton

        return composite_triton.ray_sum(values, offsets)
    return torch.segment_reduce(values.contiguous(), "sum", offsets=offsets, axis=0, initial=0)


def _run_sum_backward(grad: Tensor, offsets: Tensor, samples: int) -> Tensor:
    if twin(grad, offsets) == "triton":
        from pvdconvert.kernels import composite_triton

        return composite_triton.ray_sum_backward(grad, offsets, samples)
    return torch.repeat_interleave(grad, offsets[1:] - offsets[:-1], dim=0, output_size=samples)


def _run_blend(weight: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
    if twin(weight, values, offsets) == "numba":
        from pvdconvert.kernels import composite_numba

        return composite_numba.ray_blend(weight, values, offsets)
    return _run_sum(weight[:, None] * values, offsets)


def _run_blend_backward(grad: Tensor, weight: Tensor, values: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    if twin(grad, weight, values, offsets) == "numba":
        from pvdconvert.kernels import composite_numba

        return composite_numba.ray_blend_backward(grad, weight, values, offsets)
    each = _run_sum_backward(grad, offsets, len(weight))
    return (each * values).sum(1), each * weight[:, None]


def _save_blend(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _blend_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return (*_ray_blend_backward(grad, *ctx.saved_tensors), None)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, inputs[1])


def _backward(ctx: Any, grad_w: Tensor, grad_end: Tensor) -> tuple[Tensor, None]:
    return _render_weights_backward(*ctx.saved_tensors, grad_w, grad_end), None


def _save_sum(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.samples = inputs[0].shape[0]


def _sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _ray_sum_backward(grad, *ctx.saved_tensors, ctx.samples), None


_render_weights_backward = define(
    "render_weights_backward(Tensor w, Tensor end, Tensor offsets, Tensor grad_w, Tensor grad_end) -> Tensor",
    _run_backward,
    lambda w, *_: w.new_empty(w.shape),
)
_render_weights = define(
    "render_weights(Tensor tau, Tensor offsets) -> (Tensor, Tensor)",
    _run,
    lambda tau, offsets: (tau.new_empty(tau.shape), tau.new_empty(offsets.shape[0] - 1)),
    save=_save,
    backward=_backward,
)
_ray_sum_backward = define(
    "ray_sum_backward(Tensor grad, Tensor offsets, SymInt samples) -> Tensor",
    _run_sum_backward,
    lambda grad, offsets, samples: grad.new_empty(samples, grad.shape[1]),
)
_ray_sum = define(
    "ray_sum(Tensor values, Tensor offsets) -> Tensor",
    _run_sum,
    lambda values, offsets: values.new_empty(offsets.shape[0] - 1, values.shape[1]),
    save=_save_sum,
    backward=_sum_backward,
)
_ray_blend_backward = define(
    "ray_blend_backward(Tensor grad, Tensor weight, Tensor values, Tensor offsets) -> (Tensor, Tensor)",
    _run_blend_backward,
    lambda grad, weight, values, offsets: (weight.new_empty(weight.shape), values.new_empty(values.shape)),
)
_ray_blend = define(
    "ray_blend(Tensor weight, Tensor values, Tensor offsets) -> Tensor",
    _run_blend,
    lambda weight, values, offsets: values.new_empty(offsets.shape[0] - 1, values.shape[1]),
    save=_save_blend,
    backward=_blend_backward,
)
