"""creiser/kilonerf checkpoints: thousands of tiny networks, or the one it starts from (layouts section 5.5).

``model_state_dict`` of pts_linears.i, alpha_linear, feature_linear, direction_layer, rgb_linear, each [N, out, in], or
[N, in, out] with the program's grouped products (rgb_linear tells); encodings per coordinate, cosines before sines.
The lattice (resolution, domain) stands in its YAML, the occupancy grid in occupancy.pth. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvdconvert.containers import Manifest
from pvdconvert.errors import InputError
from pvdconvert.plugin import ArrayTensor, Config, FormatBase, FormatSpec, LazyTensor, Match, Parts, ReadOptions
from pvdconvert.scene import Box, Scene
from pvdconvert_formats import _nerf_layers as nerf
from pvdconvert_formats import nerf_pytorch
from pvdconvert_formats._lazy import yaml_near

SPEC = FormatSpec(
    name="kilonerf",
    title="creiser/kilonerf: checkpoint*.pth of fine-tuned and pretrained runs",
    probe="pvdconvert_formats.kilonerf:probe",
    code="pvdconvert_formats.kilonerf:KiloNerf",
    architectures=("kilonerf", "nerf"),
    suffixes=(".pth",),
    versions="fine-tuned and end-to-end (resolution and domain from --config YAML), pretrained single networks",
    verified="known answers derived in the tests",
    program="creiser/kilonerf",
    pixel_offset=0.0,
)
PREFIX = "model_state_dict."
MARGIN = 1e-3
"""World units inside of the domain's faces in which the program renders nothing."""


def _own(manifest: Manifest) -> dict[str, LazyTensor]:
    return {k.removeprefix(PREFIX): t for k, t in manifest.tensors.items() if k.startswith(PREFIX)}


def probe(manifest: Manifest) -> Match | None:
    own = _own(manifest)
    first = own.get("pts_linears.0.weight")
    if first is None or not manifest.kind.startswith("torch-"):
        return None
    if len(first.shape) == 3 and "direction_layer.weight" in own:
        return Match(
            0.95, f"model_state_dict of {first.shape[0]} networks: pts_linears with three axes, direction_layer"
        )
    if len(first.shape) == 2 and "alpha_linear.weight" in own and "views_linears.0.weight" in own:
        return Match(0.9, "model_state_dict of one network: pts_linears, alpha_linear, views_linears")
    return Match(0.2, "model_state_dict with pts_linears, but of another model class")


class KiloNerf(FormatBase):
    """Reads the lattice as `kilonerf`, and the network that it is distilled from as `nerf`."""

    def read(self, manifest: Manifest, options: ReadOptions) -> Parts:
        where = f"{manifest.path}: kilonerf"
        own = _own(manifest)
        first = own.get("pts_linears.0.weight")
        if first is None:
            raise InputError(f"{where}: tensor 'model_state_dict.pts_linears.0.weight' is missing")
        settings = _settings(manifest, options)
        step = manifest.meta.get("global_step")
        provenance = {"program": "creiser/kilonerf", **({"step": step} if type(step) is int else {})}
        notes = []
        if any(k.startswith("optimizer_state_dict.") for k in manifest.tensors):
            notes.append("optimizer_state_dict and the random states are training state and left out")
        if len(first.shape) == 2:
            config, tensors, _ = nerf_pytorch.network(own, PREFIX, "fine", where)
            box = _domain(manifest, options, settings)
            scene = _scene(settings, options, box or Box.cube(nerf.SYNTHETIC_BOX), () if box else ("box",))
            notes += nerf.assumption_note(scene)
            config = nerf.two_networks(config, None, where)
            return Parts("nerf", config, tensors, scene, provenance, tuple(notes))
        config, tensors = _lattice(own, where)
        count = first.shape[0]
        config["resolution"] = _resolution(options, settings, count, where)
        domain = _domain(manifest, options, settings)
        if domain is None:
            raise InputError(
                f"{where}: the domain of the lattice is in no file",
                hint="add --bounds (six numbers) or --config FILE.yaml",
            )
        config |= {"box": domain.to_json(), "margin": MARGIN}
        notes += _occupancy(manifest, options, config, tensors, where)
        scene = _scene(settings, options, domain, ())
        return Parts("kilonerf", config, tensors, scene, provenance, (*notes, *nerf.assumption_note(scene)))


@dataclasses.dataclass(frozen=True, slots=True)
class _Layer:
    """Layers [N, in, out] (or [in, out]) with their inputs in our order."""

    source: LazyTensor
    shape: tuple[int, ...]
    dtype: str
    turned: bool
    order: NDArray[np.int64] | None

    def numpy(self) -> NDArray[Any]:
        a = self.source.numpy()
        a = np.swapaxes(a, -1, -2) if self.turned else a
        a = a if self.order is None else a[..., self.order, :]
        return np.ascontiguousarray(a, dtype=np.float32 if self.dtype == "float32" else a.dtype)


def _interleaved(start: int, octaves: int, total: int) -> NDArray[np.int64]:
    """Order of ``total`` inputs of which those from ``start`` on are, per coordinate, [c, cos 2^k c.., sin 2^k c..]."""
    each = 2 * octaves + 1
    plain = [axis * each for axis in range(3)]
    waves = [axis * each + 1 + k + octaves * sine for k in range(octaves) for sine in (1, 0) for axis in range(3)]
    middle = [start + i for i in plain + waves]
    return np.array([*range(start), *middle, *range(start + 3 * each, total)], dtype=np.int64)


def _lattice(own: Mapping[str, LazyTensor], where: str) -> tuple[Config, nerf.Tensors]:
    """Configuration and tensors of N networks, without the lattice's shape."""
    tensors: nerf.Tensors = {}
    used: set[str] = set()

    def shape(key: str) -> tuple[int, ...]:
        if key not in own:
            raise InputError(f"{where}: tensor {PREFIX + key!r} is missing", hint="is the file complete?")
        return own[key].shape

    rgb = shape("rgb_linear.weight")
    units, first = shape("rgb_linear.bias")[-1:], shape("pts_linears.0.weight")
    if units != (3,) or len(rgb) not in (2, 3) or not first or not shape("pts_linears.0.bias"):
        raise InputError(f"{where}: tensor 'rgb_linear.weight' is {list(rgb)}: not three colours")
    shared = len(rgb) == 2
    turned = rgb[-1] != 3 if not shared else first[-1] != shape("pts_linears.0.bias")[-1]
    count = first[0]

    def take(key: str, wide: int | None, out: int | None, common: bool = False) -> tuple[int, int, bool]:
        """(inputs, outputs, turned) of layer ``key``, checked; a common layer is an ordinary one, [out, in]."""
        found, flip = shape(f"{key}.weight"), True if common else turned
        inside, units = (
            (found[-1], found[-2]) if flip and len(found) > 1 else (found[-2:] if len(found) > 1 else (0, 0))
        )
        lead = () if common else (count,)
        good = found[:-2] == lead and len(found) == len(lead) + 2 and shape(f"{key}.bias") == (*lead, units)
        if not good or (wide is not None and inside != wide) or (out is not None and units != out):
            raise InputError(
                f"{where}: tensor '{key}.weight' is {list(found)}, its bias {list(shape(f'{key}.bias'))}: no fit"
            )
        used.update((f"{key}.weight", f"{key}.bias"))
        return inside, units, flip

    def put(key: str, name: str, flip: bool, order: NDArray[np.int64] | None = None) -> None:
        weight = own[f"{key}.weight"]
        size = (*weight.shape[:-2], weight.shape[-1], weight.shape[-2]) if flip else weight.shape
        tensors[f"{name}.weight"] = _Layer(
            weight, size, "float32" if weight.dtype == "float64" else weight.dtype, flip, order
        )
        tensors[f"{name}.bias"] = nerf.float32(own[f"{key}.bias"])

    keys = nerf.numbered(own, r"pts_linears\.(\d+)", where)
    encoded, width, flip = take(keys[0], None, None)
    octaves, plain = nerf.frequencies_of(encoded, where, f"{keys[0]}.weight")
    if not plain:
        raise InputError(f"{where}: {keys[0]}: {encoded} inputs are no encoding of this program")
    put(keys[0], "trunk.0", flip, _interleaved(0, octaves, encoded))
    refeed: list[int] = []
    for i, key in enumerate(keys[1:], 1):
        inside, _, flip = take(key, None, width)
        if inside == width + encoded:
            refeed.append(i - 1)
        elif inside != width:
            raise InputError(f"{where}: tensor '{key}.weight' takes {inside} inputs, expected {width}")
        put(key, f"trunk.{i}", flip, _interleaved(0, octaves, inside) if inside != width else None)
    if len(refeed) > 1:
        raise InputError(f"{where}: the position is fed again after layers {refeed}: once is supported")
    _, features, flip = take("feature_linear", width, None)
    independent = "alpha_linear.weight" not in own
    if independent:
        features -= 4
        for name, part in (("diffuse", (0, 3)), ("density", (3, 4)), ("feature", (4, 4 + features))):
            put("feature_linear", name, flip)
            for kind in ("weight", "bias"):
                tensors[f"{name}.{kind}"] = _last(tensors[f"{name}.{kind}"], *part)
    else:
        put("feature_linear", "feature", flip)
        take("alpha_linear", width, 1)
        put("alpha_linear", "density", flip)
    inside, units_, flip = take("direction_layer", None, None, shared)
    views, plain = nerf.frequencies_of(inside - features, where, "direction_layer.weight")
    if not plain:
        raise InputError(f"{where}: direction_layer: {inside - features} inputs are no encoding of this program")
    put("direction_layer", "direction", flip, _interleaved(features, views, inside))
    _, _, flip = take("rgb_linear", units_, 3, shared)
    put("rgb_linear", "rgb", flip)
    for key in sorted(own.keys() - used)[:1]:
        raise InputError(f"{where}: tensor {PREFIX + key!r} has no place in this program's networks")
    config: Config = {
        "depth": len(keys), "width": width, "refeed": refeed[0] if refeed else None, "feature_width": features,
        "direction_width": units_, "position_frequencies": octaves, "direction_frequencies": views,
        "view_independent": independent, "shared_color": shared,
    }  # fmt: skip
    return config, tensors


def _last(tensor: LazyTensor, start: int, stop: int) -> LazyTensor:
    """``tensor[..., start:stop]``."""
    shape = (*tensor.shape[:-1], stop - start)
    return nerf.Changed(tensor, shape, tensor.dtype, lambda a: np.ascontiguousarray(a[..., start:stop]))


def _settings(manifest: Manifest, options: ReadOptions) -> Mapping[str, Any]:
    """The program's YAML, from --config; {} without."""
    settings = yaml_near(manifest, (), options.config)
    for key in ("no_color_sigmoid", "use_global_coordinates"):
        if settings.get(key):
            raise InputError(f"{options.config}: {key} is not supported")
    return settings


def _three(value: Any) -> tuple[int, ...] | None:
    """Three positive whole numbers, from a list or "9,16,10"; None where it is something else."""
    parts: Sequence[Any] = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else ()
    try:
        numbers = tuple(int(v) for v in parts)
    except (TypeError, ValueError):
        return None
    return numbers if len(numbers) == 3 and all(0 < n <= 4096 for n in numbers) else None


def _resolution(options: ReadOptions, settings: Mapping[str, Any], count: int, where: str) -> list[int]:
    found = _three(options.extra.get("resolution", settings.get("fixed_resolution")))
    if found is None or math.prod(found) != count:
        said = "is in no file" if found is None else f"{list(found)} does not make {count} networks"
        raise InputError(
            f"{where}: fixed_resolution of the {count} networks {said}",
            hint="--extra resolution=9,16,10, or --config with the YAML of the distillation",
        )
    return list(found)


def _domain(manifest: Manifest, options: ReadOptions, settings: Mapping[str, Any]) -> Box | None:
    """--bounds, the YAML's global_domain, or bbox.txt beside the file."""
    if options.bounds is not None:
        return options.bounds
    if "global_domain_min" in settings and "global_domain_max" in settings:
        return Box(tuple(settings["global_domain_min"]), tuple(settings["global_domain_max"]))
    if "bbox.txt" in manifest.siblings():
        numbers = [float(v) for v in manifest.sibling_text("bbox.txt").split()[:6]]
        if len(numbers) == 6:
            return Box((numbers[0], numbers[1], numbers[2]), (numbers[3], numbers[4], numbers[5]))
    return None


def _occupancy(
    manifest: Manifest, options: ReadOptions, config: Config, tensors: nerf.Tensors, where: str
) -> list[str]:
    """The grid of occupancy.pth beside the file, as bits; a note where there is none."""
    if "occupancy.pth" not in manifest.siblings():
        return ["no occupancy.pth beside the file: the networks answer in all of their domain"]
    beside = manifest.open_sibling("occupancy.pth")
    if len(beside.tensors) != 1:
        raise InputError(f"{beside.path}: not the occupancy grid of kilonerf: {len(beside.tensors)} tensors")
    grid = next(iter(beside.tensors.values()))
    count, lattice = math.prod(grid.shape), config["resolution"]
    shape = _three(options.extra.get("occupancy")) or (grid.shape if len(grid.shape) == 3 else None)
    if shape is None:  # flat: the paper's grids have 16 cells a network and axis
        finer = round((count / math.prod(lattice)) ** (1 / 3))
        shape = tuple(n * finer for n in lattice)
    if math.prod(shape) != count or len(shape) != 3:
        raise InputError(
            f"{where}: occupancy.pth has {count} cells, not {list(shape)}", hint="--extra occupancy=144,256,160"
        )
    config["occupancy"] = list(shape)
    bits = np.packbits(np.asarray(grid.numpy() != 0).reshape(-1), bitorder="little")
    tensors["occupancy.bits"] = ArrayTensor(bits)
    return []


def _scene(settings: Mapping[str, Any], options: ReadOptions, box: Box, assumed: tuple[str, ...]) -> Scene:
    """White behind, as the program has it without a background_color.txt."""
    white = settings.get("blender_white_background", True) is not False
    scene = Scene(box, background=(1.0, 1.0, 1.0) if white else (0.0, 0.0, 0.0))
    said = "blender_white_background" in settings
    return nerf.assume(scene, options, assumed if said else (*assumed, "background"))
