"""ashawkey/torch-ngp ``ngp*.pth``: hash grid and tiny MLPs (layouts sections 2.1 to 2.3). Imports no torch.

The file lacks the grid's resolutions: they are told from ``encoder.offsets``, or given (``desired_resolution``,
``per_level_scale`` in ``ReadOptions.extra``). ``density_bitfield`` is part of the function: the renderer
skips the rest.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pvdconvert.containers import Manifest, torch_zip_writer
from pvdconvert.errors import InputError, RequestError
from pvdconvert.plugin import (
    Config,
    FormatBase,
    FormatSpec,
    LazyTensor,
    Limits,
    Match,
    Parts,
    ReadOptions,
)
from pvdconvert.scene import Box, Scene
from pvdconvert_formats import _torch_ngp_background as background
from pvdconvert_formats import _torch_ngp_grid as grids
from pvdconvert_formats import _torch_ngp_state as state_dict
from pvdconvert_formats import _torch_ngp_variants as variants
from pvdconvert_formats._nerf_layers import assume

SPEC = FormatSpec(
    name="torch-ngp",
    title="ashawkey/torch-ngp: ngp*.pth, hash grid",
    probe="pvdconvert_formats.torch_ngp:probe",
    code="pvdconvert_formats.torch_ngp:TorchNgp",
    architectures=("ngp",),
    suffixes=(".pth",),
    versions="main network, --tcnn and --ff; full and best checkpoints, bare weights; writes the main network",
    verified="known answers of the grid's index rule and of the networks, derived in the tests",
    can_write=True,
    program="ashawkey/torch-ngp",
    licence="MIT",
)
STEP = 2 * math.sqrt(3) / 1024
MIN_NEAR = 0.2
EXTRA = "pvdconvert"
"""A top-level entry of our own, ignored by the program, for what the layout cannot say."""
FIXED = {
    "index_rule": "torch-ngp",
    "interpolation": "linear",
    "color_input": "sh+geo",
    "density_activation": "exp",
    "color_activation": "sigmoid",
    "density_scale": 1.0,
    "grid_type": None,
    "color_constants": None,
    "view_input": "unit",
    "bias": False,
    "density_clip": None,
}
_MARKS = ("encoder.embeddings", "encoder.offsets", "sigma_net.0.weight", "color_net.0.weight")
_BUFFERS = {"aabb_train", "aabb_infer", "density_grid", "density_bitfield", "step_counter", "encoder.offsets"}


def _state(manifest: Manifest) -> dict[str, LazyTensor]:
    """The state_dict's tensors: under "model", or bare."""
    inner = any(k.startswith("model.encoder.") for k in manifest.tensors)
    prefix = "model." if inner else ""
    return {k.removeprefix(prefix): t for k, t in manifest.tensors.items() if k.startswith(prefix)}


def probe(manifest: Manifest) -> Match | None:
    if not manifest.kind.startswith("torch-"):
        return None
    state = _state(manifest)
    if (kind := variants.kind_of(state)) is not None:
        odd = _surplus(state, kind)
        if not odd:
            return Match(0.95, f"encoder, sigma_net and color_net as flat vectors: the {kind} network")
        return Match(0.2, f"torch-ngp's {kind} network, but with {odd[0]!r}, which its NeRF network does not have")
    missing = [k for k in _MARKS if k not in state]
    if len(missing) == len(_MARKS):
        return None
    if missing:
        return Match(0.1, f"has {next(k for k in _MARKS if k in state)!r} but not {missing[0]!r}")
    if state["encoder.offsets"].shape == (15,) and state["sigma_net.0.weight"].shape == (64, 28):
        return Match(0.2, "a torch-ngp grid, but of 14 levels: AAAI2023-PVD, whose density is clamped")
    odd = _surplus(state)
    if odd:
        return Match(0.2, f"a torch-ngp hash grid, but with {odd[0]!r}, which its NeRF network does not have")
    return Match(0.95, "encoder.embeddings with encoder.offsets, sigma_net and color_net")


def _surplus(state: Mapping[str, Any], kind: str | None = None) -> list[str]:
    if kind is not None:
        return sorted(set(state) - {*variants.TCNN, *variants.FF, *_BUFFERS, "encoder_dir.params"})
    own = re.compile(r"(sigma_net|color_net|bg_net)\.\d+\.weight|encoder(_bg)?\.(embeddings|offsets)")
    return sorted(k for k in state if k not in _BUFFERS and not own.fullmatch(k))


class TorchNgp(FormatBase):
    """Reads best and full checkpoints and bare state_dicts; writes the best checkpoint's layout."""

    def read(self, manifest: Manifest, options: ReadOptions) -> Parts:
        where = f"{manifest.path}: torch-ngp"
        state = _state(manifest)
        kind = variants.kind_of(state)
        if kind is None:
            for key in _MARKS:
                if key not in state:
                    raise InputError(f"{where}: tensor {key!r} is missing")
        for key in _surplus(state, kind)[:1]:
            raise InputError(f"{where}: tensor {key!r} has no place in its NeRF network")
        notes: list[str] = []
        behind = False
        own = manifest.tree.get(EXTRA) if isinstance(manifest.tree, dict) else None
        own = own if isinstance(own, dict) else {}
        bound, box = state_dict.read_boxes(state, options, where)
        config: Config = {**FIXED, "box": [[-bound] * 3, [bound] * 3], "mask": None}
        if kind is not None:
            more, tensors, assumed = variants.read(kind, state, bound, options, own, where, notes)
            config |= more
        else:
            grid, assumed = state_dict.read_grid(state, bound, options, own, where, notes)
            config |= grid | state_dict.read_networks(state, config | grid, where)
            weights = [k for k in state if k not in _BUFFERS]
            tensors = {k: state[k] for k in weights if not k.startswith(("encoder_bg.", "bg_net."))}
            behind = len(tensors) != len(weights)
        exact, bits = own.get("mask"), manifest.tensors.get(f"{EXTRA}.mask.bits")
        if isinstance(exact, dict) and bits is not None:
            config["mask"] = {key: value for key, value in exact.items() if key != "bits"}
            tensors["mask.bits"] = bits
        elif "density_bitfield" in state:
            state_dict.read_mask(state["density_bitfield"], bound, config, tensors, where, notes)
        scene = _usual(box)
        if behind:
            color, spread = background.mean_color(state, where)
            scene = dataclasses.replace(scene, background=color)
            notes.append(
                f"its background network (bg_net) is replaced by its mean colour {color[0]:.3f}, {color[1]:.3f}, "
                f"{color[2]:.3f}, from which it deviates by {spread:.3f}"
            )
        if isinstance(own.get("scene"), dict):
            try:
                scene, assumed = Scene.from_json(own["scene"]), ()
            except InputError as error:
                raise InputError(f"{where}: {EXTRA}: {error}") from error
        scene = assume(scene, options, (*scene.assumed, *assumed))
        step = {k: manifest.meta[k] for k in ("epoch", "global_step") if k in manifest.meta}
        return Parts("ngp", config, tensors, scene, {"program": "ashawkey/torch-ngp", **step}, tuple(notes))

    def limits(self, architecture: str) -> Limits:
        # The program rebuilds its network from its own defaults: a student keeps to them unless its user knows better.
        program = {
            "levels": 16,
            "features": 2,
            "log2_table": 19,
            "base_resolution": grids.BASE,
            "hidden": 64,
            "density_layers": 1,
            "geo_features": 15,
            "color_hidden": 64,
            "color_layers": 2,
            "sh_bands": 4,
            "finest_per_unit": 1024,
        }
        # box: the scene's own, a cube around 0.
        return Limits({**FIXED, "box": None}, program, cells=128)

    def write(self, parts: Parts, path: Path) -> None:
        """A mask of other cells than the program's covers slightly more there; our own reader gets it back exactly."""
        where = f"{path}: torch-ngp"
        config = parts.config
        if parts.architecture != "ngp":
            raise RequestError(f"{where}: holds ngp, not {parts.architecture}", hint="add --to ngp")
        for key, value in FIXED.items():
            if config.get(key, value) != value:
                raise RequestError(
                    f"{where}: the layout only holds {key} = {value}, this field has {config[key]}",
                    hint="convert --to ngp --as torch-ngp trains one that fits",
                )
        bound = _bound_of(parts, where)
        arrays = {k: t.numpy() for k, t in parts.tensors.items()}
        bits = arrays.pop("mask.bits", None)
        offsets = _offsets_of(config)
        if arrays["encoder.embeddings"].shape[0] != offsets[-1]:
            raise RequestError(
                f"{where}: offsets end at {offsets[-1]}, the table has {len(arrays['encoder.embeddings'])} rows"
            )
        model: OrderedDict[str, Any] = OrderedDict()
        model["aabb_train"] = np.array([-bound] * 3 + [bound] * 3, np.float32)
        model["aabb_infer"] = np.array([*parts.scene.box.min, *parts.scene.box.max], np.float32)
        if bits is not None:
            model["density_bitfield"] = grids.write_bitfield(config["mask"], bits, bound)
        model["encoder.embeddings"] = arrays.pop("encoder.embeddings")
        model["encoder.offsets"] = np.array(offsets, np.int32)
        model.update(arrays)
        said = parts.provenance
        top: dict[str, Any] = {
            "epoch": said["epoch"] if type(said.get("epoch")) is int else 0,
            "global_step": said["global_step"] if type(said.get("global_step")) is int else 0,
            "stats": {"loss": [], "valid_loss": [], "results": [], "checkpoints": [], "best_result": None},
        }
        extra = _unsaid(parts, offsets, bound)
        if dataclasses.replace(parts.scene, assumed=()) != dataclasses.replace(_usual(_boxed(model)), assumed=()):
            extra["scene"] = parts.scene.to_json()
        if bits is not None:
            held = grids.read_bitfield(model["density_bitfield"], bound)
            if held[0] != config["mask"] or not np.array_equal(held[1], bits):
                extra["mask"] = {**config["mask"], "bits": bits}
        if extra:
            top[EXTRA] = extra
        torch_zip_writer.write(path, {**top, "model": model})


def _usual(box: Box) -> Scene:
    """The scene of a file that says nothing but its box."""
    assumed = ("near", "step", "background")
    return Scene(box, background=(1.0, 1.0, 1.0), near=MIN_NEAR, step=STEP, assumed=assumed)


def _boxed(model: Mapping[str, Any]) -> Box:
    a, b, c, d, e, f = (float(v) for v in model["aabb_infer"])
    return Box((a, b, c), (d, e, f))


def _bound_of(parts: Parts, where: str) -> float:
    """The bound of the grid's box. Raises RequestError unless that is a cube around 0."""
    box = parts.config.get("box")
    low, high = box if box is not None else (parts.scene.box.min, parts.scene.box.max)
    bound = float(np.float32(high[0]))
    if any(float(np.float32(v)) != bound for v in high) or any(float(np.float32(v)) != -bound for v in low):
        raise RequestError(
            f"{where}: the layout only holds a cube around 0, the grid's box is {list(low)} .. {list(high)}",
            hint="convert with --as torch-ngp and --bounds of such a cube",
        )
    return bound


def _offsets_of(config: Config) -> list[int]:
    """First row of each level and their end, as stored or by the rule."""
    if config.get("offsets") is not None:
        return [int(v) for v in config["offsets"]]
    sizes = grids.level_sizes(
        config["levels"], config["base_resolution"], config["per_level_scale"], config["log2_table"]
    )
    return [sum(sizes[:k]) for k in range(len(sizes) + 1)]


def _unsaid(parts: Parts, offsets: list[int], bound: float) -> dict[str, Any]:
    """What our own reader could not tell from the layout alone."""
    out: dict[str, Any] = {}
    scale = float(parts.config["per_level_scale"])
    if grids.scale_of(len(offsets) - 1, int(parts.config["base_resolution"]), grids.DESIRED * bound) != scale:
        out["per_level_scale"] = scale
    return out
