"""What ``hybrid`` is and how it is configured: encoders, how they are joined, and a decoder. Imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any

from pvdconvert.errors import InputError, RequestError
from pvdconvert.kernels.hashgrid_spec import HashGridSpec, growth
from pvdconvert.plugin import ArchitectureSpec
from pvdconvert.scene import Box

SPEC = ArchitectureSpec(
    name="hybrid",
    title="A composition: any of hash, VM, CP, planes, voxels, frequency, joined, with an MLP or SH decoder",
    code="pvdconvert_plugins.hybrid:Hybrid",
    options="pvdconvert_plugins.hybrid_spec:HybridOptions",
    licence="MIT",
)

ENCODERS = ("hash", "vm", "cp", "planes", "voxels", "frequency")
JOINS = ("concat", "sum", "product")
NONE = "none"
SIZES: dict[str, tuple[str, ...]] = {
    "hash": ("hash_levels", "hash_features"),
    "vm": ("vm_rank",),
    "cp": ("cp_rank",),
    "planes": ("planes_channels", "planes_join"),
    "voxels": ("voxels_channels",),
    "frequency": ("frequencies", "frequency_input"),
}
"""The keys that decide the width of each encoder."""


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True, kw_only=True)
class HybridOptions:
    """Every configuration key; those of encoders that are not part of the composition mean nothing."""

    encoders: str = _option(
        "hash+vm", "any of hash, vm, cp, planes, voxels, frequency, with + between them (a*b: their product); or none"
    )
    join: str = _option("concat", "concat | sum | product of the encodings; sum and product need equal widths")
    decoder: str = _option(
        "mlp", "mlp: density MLP and colour MLP; sh: linear in the encoding, to density and SH colour"
    )
    hash_levels: int = _option(16, "levels of the hash grid; its width is hash_levels * hash_features")
    hash_features: int = _option(2, "features per level")
    hash_log2_table: int = _option(18, "no level holds more than 2^this entries")
    hash_base: int = _option(16, "resolution of the coarsest level")
    hash_finest: int = _option(1024, "resolution of the finest level")
    hash_offsets: Sequence[int] | None = _option(None, "first row of each level and the end, as stored; none = by rule")
    vm_resolution: int = _option(288, "vertices of planes and lines along the longest side of the box")
    vm_rank: int = _option(16, "components of each of the three modes; the width is 3 * vm_rank")
    cp_resolution: int = _option(288, "vertices of the lines along the longest side of the box")
    cp_rank: int = _option(96, "components; the width is cp_rank")
    planes_resolution: int = _option(128, "vertices of the three planes along the longest side of the box")
    planes_channels: int = _option(32, "channels of each plane")
    planes_join: str = _option(
        "product", "product | sum of the three planes (width planes_channels), or concat (three times that)"
    )
    voxels_resolution: int = _option(176, "vertices along the longest side of the box; only occupied ones are stored")
    voxels_channels: int = _option(12, "features of a vertex; the width is voxels_channels")
    frequencies: int = _option(10, "octaves; the width is 6 * frequencies, and 3 with frequency_input")
    frequency_input: bool = _option(True, "whether the position itself stands before its sines and cosines")
    mlp_width: int = _option(64, "width of the hidden layers of both MLPs")
    mlp_layers: int = _option(1, "hidden layers of the density MLP")
    color_layers: int = _option(2, "hidden layers of the colour MLP")
    geo_features: int = _option(15, "outputs of the density MLP that the colour MLP sees")
    view_bands: int = _option(4, "bands of the view direction's harmonics that the colour MLP sees: 4 are 16 numbers")
    mlp_bias: bool = _option(False, "whether both MLPs have biases")
    sh_bands: int = _option(3, "bands of the sh decoder's colours: 3 are 9 coefficients a channel")
    density_activation: str = _option("exp", "density = density_scale * exp | softplus | relu (value + density_shift)")
    density_shift: float = _option(0.0, "added before the activation")
    density_scale: float = _option(1.0, "multiplies the activated value; world units")
    box: Mapping[str, Any] | None = _option(None, "{min, max} of the encoders, world; none = the scene's box")
    mask: Mapping[str, Any] | None = _option(None, "{shape, origin, cell} of the cells outside of which density is 0")

    @property
    def names(self) -> tuple[str, ...]:
        """The encoders in their order."""
        return () if self.encoders == NONE else tuple(self.encoders.split("+"))


_RANGES: dict[str, tuple[int, int]] = {
    "hash_levels": (1, 32),
    "hash_features": (1, 32),
    "hash_log2_table": (3, 26),
    "hash_base": (2, 4096),
    "hash_finest": (2, 1 << 20),
    "vm_resolution": (2, 4096),
    "vm_rank": (1, 1024),
    "cp_resolution": (2, 4096),
    "cp_rank": (1, 4096),
    "planes_resolution": (2, 4096),
    "planes_channels": (1, 1024),
    "voxels_resolution": (2, 2048),
    "voxels_channels": (1, 1024),
    "frequencies": (0, 32),
    "mlp_width": (1, 4096),
    "mlp_layers": (0, 16),
    "color_layers": (0, 16),
    "geo_features": (1, 4096),
    "view_bands": (1, 5),
    "sh_bands": (1, 5),
}
_CHOICES = {
    "join": JOINS,
    "planes_join": JOINS,
    "decoder": ("mlp", "sh"),
    "density_activation": ("exp", "softplus", "relu"),
}


def as_config(options: HybridOptions) -> dict[str, Any]:
    """The options as a JSON configuration."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(options).items()}


def widths(o: HybridOptions) -> dict[str, int]:
    """Width of the encoding of every encoder in the composition, in its order."""
    every = {
        "hash": o.hash_levels * o.hash_features,
        "vm": 3 * o.vm_rank,
        "cp": o.cp_rank,
        "planes": o.planes_channels * (3 if o.planes_join == "concat" else 1),
        "voxels": o.voxels_channels,
        "frequency": 3 * (2 * o.frequencies + int(o.frequency_input)),
    }
    return {name: every[name] for name in o.names}


def joined_width(o: HybridOptions) -> int:
    """Width of the joined encoding; without encoders the position itself, 3."""
    found = list(widths(o).values())
    return 3 if not found else sum(found) if o.join == "concat" else found[0]


def decoder_widths(o: HybridOptions) -> dict[str, list[int]]:
    """Widths from input to output of the decoder's networks by name."""
    width = joined_width(o)
    if o.decoder == "sh":
        return {"sh_net": [width, 1 + 3 * o.sh_bands**2]}
    return {
        "sigma_net": [width, *[o.mlp_width] * o.mlp_layers, 1 + o.geo_features],
        "color_net": [o.view_bands**2 + o.geo_features, *[o.mlp_width] * o.color_layers, 3],
    }


def sides(box: Box, longest: int) -> list[int]:
    """Vertices along each axis at one spacing, ``longest`` along the longest."""
    return [max(2, round(s / box.longest * (longest - 1)) + 1) for s in box.size]


def shapes(o: HybridOptions, box: Box) -> dict[str, tuple[int, ...]]:
    """Every tensor of a file but those of voxels and mask, whose rows are known to the file alone."""
    out: dict[str, tuple[int, ...]] = {}
    for name in o.names:
        if name == "hash":
            out["hash.embeddings"] = (grid_spec(o).entries, o.hash_features)
        elif name in ("vm", "planes"):
            n = sides(box, o.vm_resolution if name == "vm" else o.planes_resolution)
            for i, (a, b, c) in enumerate(((0, 1, 2), (0, 2, 1), (1, 2, 0))):
                out[f"{name}.planes.{i}"] = (n[b], n[a], o.vm_rank if name == "vm" else o.planes_channels)
                if name == "vm":
                    out[f"vm.lines.{i}"] = (n[c], o.vm_rank)
        elif name == "cp":
            n = sides(box, o.cp_resolution)
            out |= {f"cp.lines.{i}": (n[axis], o.cp_rank) for i, axis in enumerate((2, 1, 0))}
    for name, layers in decoder_widths(o).items():
        for i, (wide, units) in enumerate(itertools.pairwise(layers)):
            out[f"{name}.{i}.weight"] = (units, wide)
            if o.mlp_bias or name == "sh_net":
                out[f"{name}.{i}.bias"] = (units,)
    return out


def grid_spec(o: HybridOptions) -> HashGridSpec:
    """The hash grid, by torch-ngp's rule. Raises ValueError where there is none."""
    scale = growth(o.hash_levels, o.hash_base, float(o.hash_finest), "torch-ngp")
    return HashGridSpec.make(
        o.hash_levels, o.hash_features, o.hash_log2_table, o.hash_base, scale, "torch-ngp", o.hash_offsets
    )


def _near(word: str, known: Sequence[str]) -> str:
    found = difflib.get_close_matches(word, known, 1, 0.5)
    return f"did you mean {found[0]!r}? " if found else ""


def composition(config: Mapping[str, Any], error: type[InputError] | type[RequestError]) -> tuple[str, str]:
    """(encoders, join) in their canonical spelling: ``a*b`` is ``a+b`` joined by product. Raises ``error``."""
    text, join = config.get("encoders", HybridOptions.encoders), config.get("join", HybridOptions.join)
    if not isinstance(text, str):
        raise error(f"hybrid: encoders={text!r} is not a string", hint="such as encoders=hash+vm")
    if "*" in text:
        if "+" in text or config.get("join", "product") != "product":
            raise error(f"hybrid: encoders={text} mixes joins", hint="one join for all: a+b with join=..., or a*b")
        join = "product"
    names = [word.strip().lower() for word in text.replace("*", "+").split("+")]
    if names in ([NONE], [""]):
        return NONE, join
    for name in names:
        if name not in ENCODERS:
            raise error(
                f"hybrid: unknown encoder {name!r}", hint=f"{_near(name, ENCODERS)}known: {', '.join(ENCODERS)}"
            )
        if names.count(name) > 1:
            raise error(f"hybrid: encoder {name!r} is listed twice", hint="encoders is a set: each at most once")
    return "+".join(names), join


def checked(config: Mapping[str, Any], error: type[InputError] | type[RequestError]) -> HybridOptions:
    """Checked options. Raises ``error`` naming the key."""
    known = [f.name for f in dataclasses.fields(HybridOptions)]
    for key in config:
        if key not in known:
            raise error(f"hybrid has no option {key!r}", hint=f"{_near(key, known)}known: {', '.join(known)}")
    encoders, join = composition(config, error)
    values = {**config, "encoders": encoders, "join": join}
    for key, value in values.items():
        if key in _RANGES:
            low, high = _RANGES[key]
            if type(value) is not int or not low <= value <= high:
                raise error(f"hybrid: {key}={value!r} is not a whole number in {low}..{high}")
        elif key in _CHOICES and value not in _CHOICES[key]:
            raise error(f"hybrid: {key}={value!r} is not supported", hint=f"one of {', '.join(_CHOICES[key])}")
        elif key in ("frequency_input", "mlp_bias") and not isinstance(value, bool):
            raise error(f"hybrid: {key}={value!r} is neither true nor false")
    try:
        for key in ("density_shift", "density_scale"):
            values[key] = float(values.get(key, getattr(HybridOptions, key)))
        if values.get("hash_offsets") is not None:
            values["hash_offsets"] = [int(v) for v in values["hash_offsets"]]
        o = HybridOptions(**values)
        if o.box is not None:
            Box.from_json(o.box)
        if "hash" in o.names:
            grid_spec(o)
    except (TypeError, ValueError, KeyError, IndexError, OverflowError, InputError) as wrong:
        raise error(f"hybrid: malformed option: {wrong}") from wrong
    if not math.isfinite(o.density_shift) or not 0 < o.density_scale < math.inf:
        raise error(f"hybrid: density_shift={o.density_shift} or density_scale={o.density_scale} is impossible")
    found = widths(o)
    if o.join != "concat" and len(set(found.values())) > 1:
        shown = ", ".join(f"{name} {width}" for name, width in found.items())
        keys = ", ".join(key for name in found for key in SIZES[name])
        raise error(f"hybrid: join={o.join} needs encodings of one width, not {shown}", hint=f"they follow from {keys}")
    if 0 in found.values():
        raise error("hybrid: the encoder 'frequency' is empty", hint="frequencies=1 or more, or frequency_input=true")
    if o.decoder == "sh" and not found:
        raise error(
            "hybrid: decoder=sh needs an encoder: it is linear in the encoding", hint="encoders=voxels or others"
        )
    return o
