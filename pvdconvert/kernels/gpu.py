"""What the Triton twins share: launching on the tensors' device, block sizes. Imported only when one of them runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two >= ``n`` >= 1: sides of blocks must be one."""
    return 1 << (n - 1).bit_length()


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, *arguments: Any, **meta: Any) -> None:
    """Run ``kernel`` on the device of ``like``, which need not be the current one."""
    with torch.cuda.device_of(like):  # type: ignore[no-untyped-call]
        kernel[grid](*arguments, **meta)


def blocks(width: int) -> tuple[int, int]:
    """(points, channels) of a program that reads rows of ``width`` channels: about 2048 values at a time."""
    channels = min(64, power_of_two(max(1, width)))
    return 2048 // channels if channels > 8 else 256, channels


def copies(points: int) -> int:
    """Among how many copies of a small table many ``points`` share out their additions."""
    return 8 if points >= 1 << 16 else 1
