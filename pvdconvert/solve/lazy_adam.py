"""Adam that pays only for what a step touched: for tables (voxels, hash grids) with millions of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adam import adam

from pvdconvert.kernels.backend import use_numba
from pvdconvert.solve import rotated_adam


class LazyAdam(Optimizer):
    """Adam (Kingma and Ba 2015), lazy on the rows of parameters in groups with ``sparse_rows=True``.

    A lazy parameter is [R, ...]. Only rows with a gradient in this step are updated, each with the bias correction of
    its own number of steps (as tiny-cuda-nn does it); the others keep their moments. If every step touches every row
    this is Adam exactly. Its gradient persists and is zero between steps; the contract with kernels stands in
    :mod:`pvdconvert.kernels.rowgrad`. Gradients that autograd delivers as dense tensors work too; they cost a scan.

    Groups with ``rotated=True`` get SOAP (:mod:`pvdconvert.solve.rotated_adam`), which suits the matrices of small
    networks. The other groups get torch's Adam (fused where torch has it). There is no weight decay and no AMSGrad. In
    the lazy groups results do not depend on the number of threads. Raises ValueError for impossible hyper-parameters.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-15,
    ) -> None:
        if not (lr >= 0 and 0 <= betas[0] < 1 and 0 <= betas[1] < 1 and eps >= 0):
            raise ValueError(f"impossible lr {lr}, betas {betas} or eps {eps}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "sparse_rows": False, "rotated": False})
        self._dense_gradient: set[int] = set()
        for p in self._lazy():
            p.touched = torch.zeros(len(p), dtype=torch.uint8, device=p.device)  # type: ignore[attr-defined]
            p.grad = torch.zeros_like(p, memory_format=torch.contiguous_format)
            # Fires only when autograd itself adds a gradient, which the mask does not know of.
            p.register_post_accumulate_grad_hook(self._came_dense)  # type: ignore[no-untyped-call]

    def _came_dense(self, p: Tensor) -> None:
        self._dense_gradient.add(id(p))

    def _lazy(self) -> Iterable[Tensor]:
        return [p for group in self.param_groups if group["sparse_rows"] for p in group["params"]]

    def marked(self) -> list[tuple[Tensor, Tensor]]:
        """The lazy parameters, and which of their rows have a gradient now (uint8 [R]): for who changes gradients."""
        out = []
        for p in self._lazy():
            touched = _touched(p)
            if id(p) in self._dense_gradient and p.grad is not None:
                touched |= (p.grad != 0).flatten(1).any(1)
                self._dense_gradient.discard(id(p))
            out.append((p, touched))
        return out

    def dense(self) -> list[Tensor]:
        """The other parameters."""
        return [p for group in self.param_groups if not group["sparse_rows"] for p in group["params"]]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients. Free for lazy parameters right after :meth:`step`, which leaves them zero."""
        for group in self.param_groups:
            for p in group["params"]:
                if group["sparse_rows"]:
                    self._clear(p)
                elif set_to_none:
                    p.grad = None
                elif p.grad is not None:
                    p.grad.zero_()

    def _clear(self, p: Tensor) -> None:
        touched = _touched(p)
        if p.grad is None:
            p.grad = torch.zeros_like(p, memory_format=torch.contiguous_format)
        elif id(p) in self._dense_gradient:
            p.grad.zero_()
        else:
            p.grad[touched.nonzero().squeeze(1)] = 0
        self._dense_gradient.discard(id(p))
        touched.zero_()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update, and leave the gradients of lazy parameters zero."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["rotated"]:
                for p in group["params"]:
                    if p.grad is not None:
                        rotated_adam.update(p, self.state[p], float(group["lr"]), group["betas"], group["eps"])
            elif group["sparse_rows"]:
                for p in group["params"]:
                    self._step_rows(p, float(group["lr"]), *cast("tuple[float, float]", group["betas"]), group["eps"])
            else:
                self._step_dense(group)
        return loss

    def _step_rows(self, p: Tensor, lr: float, b1: float, b2: float, eps: float) -> None:
        if p.grad is None or not len(p):
            return
        state = self.state[p]
        if not state:
            state["steps"] = torch.zeros(len(p), dtype=torch.float32, device=p.device)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.contiguous_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.contiguous_format)
        touched, scan = _touched(p), id(p) in self._dense_gradient
        self._dense_gradient.discard(id(p))
        m, v, steps = (cast(Tensor, state[k]) for k in ("exp_avg", "exp_avg_sq", "steps"))
        if use_numba(p) and p.is_contiguous() and p.grad.is_contiguous():
            from pvdconvert.kernels import lazy_adam_numba

            param, grad, m_, v_ = (t.detach().view(len(p), -1).numpy() for t in (p, p.grad, m, v))
            if scan:
                lazy_adam_numba.mark(grad, touched.numpy())
            lazy_adam_numba.step(param, grad, m_, v_, steps.numpy(), touched.numpy(), lr, b1, b2, eps)
            return
        if scan:
            touched |= (p.grad != 0).flatten(1).any(1)
        rows = touched.nonzero().squeeze(1)
        shape = (-1,) + (1,) * (p.ndim - 1)
        g = p.grad[rows]
        steps[rows] += 1
        t = steps[rows].double()
        m[rows] = m1 = m[rows].lerp(g, 1 - b1)
        v[rows] = v1 = v[rows].lerp(g * g, 1 - b2)
        scale = (lr / (1 - b1**t)).to(p.dtype).view(shape)
        root = (1 - b2**t).rsqrt().to(p.dtype).view(shape)
        p[rows] -= scale * m1 / (v1.sqrt() * root + eps)
        p.grad[rows] = 0
        touched[rows] = 0

    def _step_dense(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        if params:
            states = [self.state[p] for p in params]
            adam(
                params,
                [cast(Tensor, p.grad) for p in params],
                [s["exp_avg"] for s in states],
                [s["exp_avg_sq"] for s in states],
                [],
                [s["step"] for s in states],
                fused=all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in params),
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=0.0,
                eps=group["eps"],
                maximize=False,
            )


def _touched(p: Tensor) -> Tensor:
    return cast(Tensor, p.touched)  # type: ignore[attr-defined]
