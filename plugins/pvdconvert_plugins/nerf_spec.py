"""What `nerf` is and how it is configured. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from pvdconvert.plugin import ArchitectureSpec

SPEC = ArchitectureSpec(
    name="nerf",
    title="NeRF: one multilayer perceptron over frequency encodings (small files, slow to ask)",
    code="pvdconvert_plugins.nerf:Nerf",
    options="pvdconvert_plugins.nerf_spec:NerfOptions",
    paper="Mildenhall et al. 2020, arXiv:2003.08934",
    licence="MIT",
)


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True, slots=True)
class NerfOptions:
    """Every configuration key. The defaults are the network of the paper (bmild/nerf, nerf-pytorch).

    Tensors, for net = "fine" (the field) and, with ``has_coarse``, "coarse"; weights are [out, in]:

    ``{net}.trunk.{i}.weight``      i < depth; input of layer 0: the encoded position; after a layer listed in ``skips``
                                    the next layer's input is [encoded position, hidden]
    ``{net}.density.weight``        [1, width], from the last hidden layer
    ``{net}.bottleneck.weight``     [bottleneck_width, width], if ``bottleneck_width`` is not None
    ``{net}.direction.{j}.weight``  j < len(direction_layers), each with ReLU; input of layer 0:
                                    [bottleneck, encoded direction]
    ``{net}.rgb.weight``            [3, width of the last of these]

    each with its ``.bias``; and, with ``mask``, ``mask.bits`` (uint8).
    """

    depth: int = _option(8, "hidden layers of the position trunk")
    width: int = _option(256, "units of each hidden layer")
    skips: tuple[int, ...] = _option((4,), "layers (from 0) after which [encoded position, hidden] is concatenated")
    position_frequencies: int = _option(10, "octaves of the position encoding: sin, cos of 2^k x, k below this")
    direction_frequencies: int = _option(4, "octaves of the direction encoding, for direction_encoding=frequency")
    include_input: bool = _option(True, "whether the encodings start with the plain coordinates")
    encoding_order: str = _option(
        "interleaved",
        "column order: interleaved [x, sin f0, cos f0, ...] over xyz, or per-coordinate [x, sin, cos, ...] of x, y, z",
    )
    direction_encoding: str = _option("frequency", "frequency, sh (spherical harmonics), or none (no view dependence)")
    direction_bands: int = _option(
        4, "bands of spherical harmonics, for direction_encoding=sh (columns: bands squared)"
    )
    direction_length: float = _option(
        1.0, "length of the directions handed to the encoding; not 1 for programs that do not normalise ray directions"
    )
    first_activation: bool = _option(True, "whether trunk layer 0 ends in ReLU (krrish94: it does not)")
    bottleneck_width: int | None = _option(256, "units between trunk and direction layers; none = no such layer")
    bottleneck_activation: str = _option("none", "none or relu, after the bottleneck")
    direction_layers: tuple[int, ...] = _option((128,), "units of the layers after [bottleneck, encoded direction]")
    density_activation: str = _option("relu", "relu, softplus or exp")
    density_bias: float = _option(0.0, "added before the density activation")
    density_scale: float = _option(1.0, "density per world unit = this times the activated value")
    color_activation: str = _option("sigmoid", "sigmoid")
    has_coarse: bool = _option(False, "whether the coarse network is kept too; the fine one is the field")
    coarse: Mapping[str, Any] | None = _option(
        None, "keys of the network's shape (depth, width, ...) in which the coarse network differs"
    )
    input: str = _option("world", "what is encoded: world positions, or box (the box mapped to [-1, 1] on each axis)")
    box: Mapping[str, Any] | None = _option(None, "{min, max}: density is 0 outside; none = the scene's box")
    mask: Mapping[str, Any] | None = _option(None, "{shape, origin, cell} of the cells outside of which density is 0")
