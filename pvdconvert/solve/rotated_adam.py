"""Adam in the eigenbasis of Shampoo's preconditioner (SOAP, Vyas et al. 2024): for the matrices of small networks.

The networks behind a grid and the layers of a perceptron bound a short distillation by their conditioning; matrices of
a few hundred rows pay for a basis of their own in which Adam's diagonal is a good one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LARGEST = 512
"""A side longer than this keeps its own basis: the work of turning it grows with its cube."""

EVERY = 10
"""Steps between two corrections of the bases."""

MEMORY = 0.95
"""What the running mean of a side's second moments keeps a step."""

FAINT = 1e-5
"""Axes whose gradient is this share of the largest are held back: turning leaves rounding errors on them."""

State = dict[str, Any]


@torch.no_grad()
def update(p: Tensor, state: State, lr: float, betas: tuple[float, float], eps: float) -> None:
    """One step of ``p`` by ``p.grad``: SOAP for matrices, Adam for everything else.

    The first step of a matrix only looks: its bases come from its first gradient. ``state`` is a parameter's entry of
    an optimiser; what stands in it is tensors and one number, so it can be saved.
    """
    assert p.grad is not None
    grad = p.grad
    sides = _sides(grad) if grad.ndim == 2 else ()
    if not state:
        state["steps"] = 0
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        for side in sides:
            moment = _moment(grad, side)
            state[f"moment_{side}"] = moment
            state[f"basis_{side}"] = torch.linalg.eigh(moment)[1].flip(1).contiguous()
        if sides:
            return
    state["steps"] += 1
    t = int(state["steps"])
    turned = _turn(grad, state, sides)
    state["exp_avg"].lerp_(turned, 1 - betas[0])
    state["exp_avg_sq"].lerp_(turned * turned, 1 - betas[1])
    root = (state["exp_avg_sq"] / (1 - betas[1] ** t)).sqrt_()
    root += eps + (FAINT * root.amax() if sides else 0.0)
    p.add_(_back(state["exp_avg"] / root, state, sides), alpha=-lr / (1 - betas[0] ** t))
    for side in sides:
        state[f"moment_{side}"].lerp_(_moment(grad, side), 1 - MEMORY)
    if sides and t % EVERY == 0:
        _correct(state, sides)


def _sides(grad: Tensor) -> tuple[str, ...]:
    """Which sides of a matrix get a basis of their own."""
    return tuple(s for s, n in zip(("rows", "columns"), grad.shape, strict=True) if n <= LARGEST)


def _moment(grad: Tensor, side: str) -> Tensor:
    return grad @ grad.T if side == "rows" else grad.T @ grad


def _turn(x: Tensor, state: State, sides: tuple[str, ...]) -> Tensor:
    x = state["basis_rows"].T @ x if "rows" in sides else x
    return x @ state["basis_columns"] if "columns" in sides else x


def _back(x: Tensor, state: State, sides: tuple[str, ...]) -> Tensor:
    x = state["basis_rows"] @ x if "rows" in sides else x
    return x @ state["basis_columns"].T if "columns" in sides else x


def _correct(state: State, sides: tuple[str, ...]) -> None:
    """A step of power iteration on each basis; the mean gradient is carried over, its squares follow the order."""
    mean = _back(state["exp_avg"], state, sides)
    for side in sides:
        moment, basis = state[f"moment_{side}"], state[f"basis_{side}"]
        order = torch.argsort((basis * (moment @ basis)).sum(0), descending=True)
        squares = state["exp_avg_sq"]
        state["exp_avg_sq"] = squares[order] if side == "rows" else squares[:, order]
        state[f"basis_{side}"] = torch.linalg.qr(moment @ basis[:, order])[0].contiguous()
    state["exp_avg"] = _turn(mean, state, sides)
