"""What `nerf` is and how it is configured. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any

from pvdconvert.errors import InputError
from pvdconvert.plugin import ArchitectureSpec, Config
from pvdconvert.scene import Box

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
    frequency_scale: float = _option(1.0, "lowest frequency of both encodings (2 pi in nerfstudio)")
    position_step: float = _option(1.0, "octaves from one frequency of the position to the next")
    direction_step: float = _option(1.0, "octaves from one frequency of the direction to the next")
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
    direction_space: str = _option(
        "ray", "the direction that is encoded: ray (of the scene's ray), or ndc (of the warped ray, not of length 1)"
    )
    first_activation: bool = _option(True, "whether trunk layer 0 ends in ReLU (krrish94: it does not)")
    bottleneck_width: int | None = _option(256, "units between trunk and direction layers; none = no such layer")
    bottleneck_activation: str = _option("none", "none or relu, after the bottleneck")
    direction_layers: tuple[int, ...] = _option((128,), "units of the layers after [bottleneck, encoded direction]")
    density_activation: str = _option("relu", "relu, softplus or exp")
    density_bias: float = _option(0.0, "added before the density activation")
    density_scale: float = _option(1.0, "density per world unit = this times the activated value")
    density_clip: tuple[float, float] | None = _option(
        None, "for density_activation=exp: bounds to which the log-density is cut first"
    )
    color_activation: str = _option("sigmoid", "sigmoid")
    has_coarse: bool = _option(False, "whether the coarse network is kept too; the fine one is the field")
    coarse: Mapping[str, Any] | None = _option(
        None, "keys of the network's shape (depth, width, ...) in which the coarse network differs"
    )
    input: str = _option(
        "world", "what is encoded: world positions, or box (its centre at 0, its longest side from -1 to 1)"
    )
    box: Mapping[str, Any] | None = _option(None, "{min, max}: density is 0 outside; none = the scene's box")
    masked: bool = _option(True, "whether a student keeps its cells as a mask; false = its weights alone make it empty")
    mask: Mapping[str, Any] | None = _option(None, "{shape, origin, cell} of the cells outside of which density is 0")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NerfOptions:
        """Read a configuration; absent keys take their defaults. Raises InputError naming the key that is wrong."""
        known = {f.name: f for f in dataclasses.fields(cls)}
        for key in config:
            if key not in known:
                raise InputError(f"nerf: config has no key {key!r}", hint=f"known: {', '.join(known)}")
        values = {key: _parse(key, value) for key, value in config.items()}
        options = cls(**values)
        for layer in options.skips:
            if not 0 <= layer < options.depth - 1:
                raise InputError(
                    f"nerf: config 'skips' names layer {layer}; it must be below depth - 1 = {options.depth - 1}"
                )
        if options.density_clip is not None and options.density_activation != "exp":
            raise InputError("nerf: config 'density_clip' needs density_activation exp")
        if options.coarse is not None:
            options.network("coarse")
        return options

    def to_config(self) -> Config:
        """JSON values; the inverse of :meth:`from_config`."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            key: list(v) if isinstance(v, tuple) else dict(v) if isinstance(v, Mapping) else v
            for key, v in values.items()
        }

    def network(self, name: str) -> NerfOptions:
        """The options of network ``name``, "fine" or "coarse"."""
        if name == "fine" or not self.coarse:
            return self
        for key in self.coarse:
            if key not in SHAPE_KEYS:
                raise InputError(f"nerf: config 'coarse' may not set {key!r}", hint=f"known: {', '.join(SHAPE_KEYS)}")
        return NerfOptions.from_config({**self.to_config(), "coarse": None, **self.coarse})

    @property
    def networks(self) -> tuple[str, ...]:
        """Names of the networks kept: the field's first."""
        return ("fine", "coarse") if self.has_coarse else ("fine",)

    @property
    def position_width(self) -> int:
        """Columns of the encoded position."""
        return 3 * (2 * self.position_frequencies + int(self.include_input))

    @property
    def direction_width(self) -> int:
        """Columns of the encoded direction."""
        if self.direction_encoding == "none":
            return 0
        if self.direction_encoding == "sh":
            return self.direction_bands**2
        return 3 * (2 * self.direction_frequencies + int(self.include_input))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight and bias of every network kept, by tensor name (``mask.bits`` is not among them)."""
        out: dict[str, tuple[int, ...]] = {}

        def layer(name: str, wide: int, units: int) -> None:
            out[f"{name}.weight"], out[f"{name}.bias"] = (units, wide), (units,)

        for name in self.networks:
            net = self.network(name)
            for i in range(net.depth):
                wide = net.position_width if i == 0 else net.width + (net.position_width if i - 1 in net.skips else 0)
                layer(f"{name}.trunk.{i}", wide, net.width)
            layer(f"{name}.density", net.width, 1)
            wide = net.width
            if net.bottleneck_width is not None:
                layer(f"{name}.bottleneck", wide, net.bottleneck_width)
                wide = net.bottleneck_width
            wide += net.direction_width
            for j, units in enumerate(net.direction_layers):
                layer(f"{name}.direction.{j}", wide, units)
                wide = units
            layer(f"{name}.rgb", wide, 3)
        return out


SHAPE_KEYS = (
    "depth",
    "width",
    "skips",
    "position_frequencies",
    "direction_frequencies",
    "bottleneck_width",
    "direction_layers",
)
"""Keys in which the coarse network may differ from the fine one."""

_CHOICES: dict[str, tuple[str, ...]] = {
    "encoding_order": ("interleaved", "per-coordinate", "channel-major"),
    "direction_encoding": ("frequency", "sh", "none"),
    "direction_space": ("ray", "ndc"),
    "bottleneck_activation": ("none", "relu"),
    "density_activation": ("relu", "softplus", "exp"),
    "color_activation": ("sigmoid",),
    "input": ("world", "box"),
}
FREQUENCY_KEYS = ("frequency_scale", "position_step", "direction_step")
_RANGES = {
    "depth": (1, 64),
    "width": (1, 4096),
    "position_frequencies": (0, 20),
    "direction_frequencies": (0, 20),
    "direction_bands": (1, 5),
    "bottleneck_width": (1, 4096),
}


def _parse(key: str, value: Any) -> Any:
    """``value`` of configuration key ``key``, checked. Raises InputError."""
    if key in _CHOICES:
        if value not in _CHOICES[key]:
            raise InputError(f"nerf: config {key!r} is {value!r}", hint=f"one of {', '.join(_CHOICES[key])}")
        return value
    if key in _RANGES:
        low, high = _RANGES[key]
        if key == "bottleneck_width" and value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise InputError(f"nerf: config {key!r} is {value!r}", hint=f"a whole number from {low} to {high}")
        return value
    if key in ("skips", "direction_layers"):
        low = 0 if key == "skips" else 1
        whole = isinstance(value, Sequence) and not isinstance(value, str)
        if not whole or not all(isinstance(v, int) and low <= v <= 4096 for v in value) or len(value) > 64:
            raise InputError(f"nerf: config {key!r} is {value!r}", hint="a list of whole numbers")
        return tuple(value)
    if key in ("include_input", "first_activation", "has_coarse", "masked"):
        if not isinstance(value, bool):
            raise InputError(f"nerf: config {key!r} is {value!r}", hint="true or false")
        return value
    if key == "density_clip" and value is not None:
        two = isinstance(value, Sequence) and [type(v) in (int, float) for v in value] == [True, True]
        if not two or not -100 <= value[0] < value[1] <= 80:
            raise InputError(f"nerf: config {key!r} is {value!r}", hint="two rising numbers, such as -2,7")
        return (float(value[0]), float(value[1]))
    if key in ("direction_length", "density_bias", "density_scale", *FREQUENCY_KEYS):
        positive = key != "density_bias"
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30
        if not number or (positive and value <= 0):
            raise InputError(f"nerf: config {key!r} is {value!r}", hint="a finite number" + " above 0" * positive)
        return float(value)
    if value is not None and not isinstance(value, Mapping):
        raise InputError(f"nerf: config {key!r} is {value!r}", hint="an object or null")
    if key == "box" and value is not None:
        try:
            return Box.from_json(value).to_json()
        except (KeyError, TypeError) as error:
            raise InputError(
                f"nerf: config 'box' is malformed: {error}", hint="{min: [x, y, z], max: [x, y, z]}"
            ) from error
    return value
