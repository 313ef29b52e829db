"""LPIPS, version 0.1: how far two pictures are apart in the layers of a network that has learned to see.

Zhang, Isola, Efros, Shechtman, Wang: "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR
2018. Nothing is downloaded: the weights come from a file, by path (docs/evaluation.md says how to make one).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pvdconvert.containers import open_manifest
from pvdconvert.errors import InputError, RequestError
from pvdconvert.metrics.pictures import Picture, unit

HINT = "save lpips.LPIPS(net='alex').state_dict(); docs/evaluation.md"
MAX_NUMBERS = 1 << 25
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
# Per network: layers of the original feature extractor, in five slices. ("conv", number in it, shape, stride, padding)
_CONV = tuple[int, tuple[int, int, int, int], int, int]
_ALEX: tuple[tuple[_CONV, ...], ...] = (
    ((0, (64, 3, 11, 11), 4, 2),),
    ((3, (192, 64, 5, 5), 1, 2),),
    ((6, (384, 192, 3, 3), 1, 1),),
    ((8, (256, 384, 3, 3), 1, 1),),
    ((10, (256, 256, 3, 3), 1, 1),),
)


def _vgg() -> Iterator[tuple[_CONV, ...]]:
    inside = 3
    for numbers, width in (((0, 2), 64), ((5, 7), 128), ((10, 12, 14), 256), ((17, 19, 21), 512), ((24, 26, 28), 512)):
        widths = [inside, *([width] * len(numbers))]
        yield tuple((n, (width, w, 3, 3), 1, 1) for n, w in zip(numbers, widths, strict=False))
        inside = width


# name -> (slices, side and stride of the pooling, slices that begin with it, smallest side of a picture)
_NETS: dict[str, tuple[tuple[tuple[_CONV, ...], ...], int, tuple[int, ...], int]] = {
    "alex": (_ALEX, 3, (1, 2), 31),
    "vgg": (tuple(_vgg()), 2, (1, 2, 3, 4), 16),
}


class _Array(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...
    def numpy(self) -> NDArray[Any]: ...


class Lpips:
    """LPIPS of a pair of pictures. ``net`` is "alex" or "vgg", as the weights are."""

    def __init__(self, tensors: Mapping[str, _Array], where: str = "lpips", device: str = "cpu") -> None:
        """``tensors`` by the names of ``lpips.LPIPS(net=...).state_dict()``, which may have a common prefix. Raises
        InputError naming the key."""
        first = "net.slice1.0.weight"
        prefix = min((k.removesuffix(first) for k in tensors if k.endswith(first)), key=len, default=None)
        if prefix is None:
            raise InputError(f"{where}: no {first!r}: not the weights of LPIPS", hint=HINT)
        # torchmetrics keeps the linear layers within its net, beside the slices' own net.
        heads = prefix.removesuffix("net.") if f"{prefix}lin0.model.1.weight" not in tensors else prefix
        self.net = "alex" if tuple(tensors[prefix + first].shape[2:]) == (11, 11) else "vgg"
        slices = _NETS[self.net][0]

        def take(key: str, shape: tuple[int, ...]) -> Tensor:
            found = tensors.get(key)
            if found is None or tuple(found.shape) != shape:
                what = "is missing" if found is None else f"has the shape {tuple(found.shape)}, not {shape}"
                raise InputError(f"{where}: {key!r} {what}", hint=HINT)
            array = np.array(found.numpy(), dtype=np.float32)
            if not np.isfinite(array).all():
                raise InputError(f"{where}: {key!r} holds NaN or infinity")
            return torch.from_numpy(array).to(device)

        self._slices = [
            [
                (
                    take(f"{prefix}net.slice{k}.{n}.weight", shape),
                    take(f"{prefix}net.slice{k}.{n}.bias", shape[:1]),
                    stride,
                    padding,
                )
                for n, shape, stride, padding in convolutions
            ]
            for k, convolutions in enumerate(slices, 1)
        ]
        self._heads = []
        for k, convolutions in enumerate(slices):
            names = [f"{heads}lin{k}.model.{n}.weight" for n in (1, 0)]
            name = next((n for n in names if n in tensors), names[0])
            self._heads.append(take(name, (1, convolutions[-1][1][0], 1, 1)))

    @classmethod
    def load(cls, path: Path, device: str = "cpu") -> Lpips:
        """The weights in ``path``: a state_dict saved by torch, or safetensors. Runs nothing that is in it. Raises
        InputError or UnsafeError."""
        manifest = open_manifest(path)
        wanted = {k: v for k, v in manifest.tensors.items() if ".slice" in k or ".model." in k or k.startswith("lin")}
        if sum(int(np.prod(v.shape, dtype=np.float64)) for v in wanted.values()) > MAX_NUMBERS:
            raise InputError(f"{path}: more numbers than LPIPS has weights", hint=HINT)
        return cls(wanted, str(path), device)

    def __call__(self, a: Picture, b: Picture) -> float:
        """LPIPS of two pictures [H, W, 3] (bytes, or floats in [0, 1]); 0 for equal ones."""
        x, y = (self._layers(unit(v)) for v in (a, b))
        total = 0.0
        for one, two, head in zip(x, y, self._heads):
            total += float(functional.conv2d((one - two) ** 2, head).mean())
        return total

    @torch.no_grad()
    def _layers(self, picture: NDArray[np.float64]) -> Iterator[Tensor]:
        """The output of each slice, of unit length in every pixel."""
        _, pool, pooled, smallest = _NETS[self.net]
        if min(picture.shape[:2]) < smallest:
            raise RequestError(f"LPIPS by {self.net} needs {smallest} pixels a side, here are {picture.shape[:2]}")
        device = self._heads[0].device
        x = torch.from_numpy(2.0 * picture - 1.0).float().to(device).movedim(-1, 0)[None]
        shift, scale = (torch.tensor(v, device=device)[None, :, None, None] for v in (_SHIFT, _SCALE))
        x = (x - shift) / scale
        for k, convolutions in enumerate(self._slices):
            x = functional.max_pool2d(x, pool, 2) if k in pooled else x
            for weight, bias, stride, padding in convolutions:
                x = functional.relu(functional.conv2d(x, weight, bias, stride, padding))
            yield x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
