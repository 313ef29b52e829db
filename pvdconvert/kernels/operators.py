"""How operators become known to torch: ``torch.ops.pvdconvert.NAME``, with autograd and a fake for tracing.

An operator picks its twin when it runs, so a compiled graph serves every device and backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY: Any = torch.library.Library("pvdconvert", "FRAGMENT")  # type: ignore[no-untyped-call]


def define(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    save: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register the operator of ``schema`` ("name(arguments) -> results"); returns what calls it.

    run       the implementation, for all devices
    fake      empty results of the right shape, type and strides
    save      ``save(ctx, inputs, output)``: what the backward pass needs
    backward  ``backward(ctx, *grads)``: a gradient or None for each argument; without it, differentiating raises
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pvdconvert::{name}", fake, lib=_LIBRARY)
    if "!" not in schema:  # what changes its arguments is not differentiable to torch

        def refuse(ctx: Any, *_: Any) -> None:
            raise RuntimeError(f"pvdconvert::{name} is not differentiable" + " twice" * name.endswith("_backward"))

        torch.library.register_autograd(
            f"pvdconvert::{name}", backward or refuse, setup_context=save or _nothing, lib=_LIBRARY
        )
    call: Callable[..., Any] = getattr(torch.ops.pvdconvert, name).default
    return call


def _nothing(ctx: Any, inputs: Any, output: Any) -> None:
    pass
