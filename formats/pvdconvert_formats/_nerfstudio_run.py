"""A nerfstudio run: its checkpoint, config.yml, dataparser_transforms.json (layouts 7.0 and 7.5). Imports no torch."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from pvdconvert.containers import Manifest
from pvdconvert.containers.yaml_config import load, lookup
from pvdconvert.errors import InputError
from pvdconvert.plugin import LazyTensor, ReadOptions
from pvdconvert.scene import IDENTITY, Box
from pvdconvert_formats._lazy import text_near

EXTRA = "pvdconvert"
"""A top-level entry of our own: what config.yml would say, for files that we wrote."""
METHODS = {
    "gauss_params.": "splatfacto",
    "field.density_encoding.": "tensorf",
    "field_coarse.": "vanilla-nerf",
    "field.mlp_base": "nerfacto",
}
_COLORS = {"white": (1.0, 1.0, 1.0), "black": (0.0, 0.0, 0.0), "random": (0.0, 0.0, 0.0), "last_sample": None}


def state_of(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The model's tensors under their names in the model; wrappers of distributed training are stripped."""
    out = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"pipeline\.(?:module\.)?_model\.(?:module\.)?(.+)", name)
        if found:
            out[found[1]] = tensor
    return out


def method_of(state: Mapping[str, LazyTensor]) -> str | None:
    """Which of nerfstudio's methods the keys belong to."""
    for prefix, method in METHODS.items():
        if any(k.startswith(prefix) for k in state):
            if method == "nerfacto" and any(k.startswith("occupancy_grid.") for k in state):
                return "instant-ngp"
            return method
    return None


def checkpoint_of(manifest: Manifest) -> Manifest | None:
    """The checkpoint itself: the file, or of a run folder the one of the latest step, which nerfstudio opens."""
    if manifest.kind != "folder":
        return manifest if manifest.kind.startswith("torch-") and is_checkpoint(manifest) else None
    steps = {}
    for child in manifest.children:
        found = re.fullmatch(r"step-(\d{1,12})\.ckpt", child.path.name)
        if found and is_checkpoint(child):
            steps[int(found[1])] = child
    return steps[max(steps)] if steps else None


def is_checkpoint(manifest: Manifest) -> bool:
    """Whether there are a pipeline with a model, and the step."""
    return "step" in manifest.meta and any(re.match(r"pipeline\.(module\.)?_model\.", k) for k in manifest.tensors)


@dataclasses.dataclass(frozen=True)
class Run:
    """What stands beside the weights.

    model    the method's settings (``pipeline.model`` of config.yml)
    tree     all of config.yml
    world    4x4, the scene's coordinates -> the data set's; None where no file says
    own      our own entry in files that we wrote
    """

    where: str
    model: Mapping[str, Any]
    tree: Mapping[str, Any]
    world: tuple[tuple[float, ...], ...] | None
    own: Mapping[str, Any]

    def get(self, key: str, default: Any) -> Any:
        """A setting of the method, of the type of ``default``. Raises InputError where it has another."""
        value = self.model.get(key)
        if value is None:
            return default
        number = isinstance(default, (int, float)) and not isinstance(default, bool)
        fits = isinstance(value, (int, float)) if number else isinstance(value, type(default))
        if not fits or (number and (isinstance(value, bool) or not math.isfinite(value))):
            raise InputError(f"{self.where}: config.yml says {key}: {value!r:.60}, unlike {default!r}")
        return type(default)(value)

    def background(self) -> tuple[tuple[float, float, float] | None, tuple[str, ...]]:
        """(rgb, what is assumed)."""
        said = self.model.get("background_color")
        if isinstance(said, (list, tuple)) and len(said) == 3 and all(type(v) in (int, float) for v in said):
            return (float(said[0]), float(said[1]), float(said[2])), ()
        if said in _COLORS:
            return _COLORS[said], ()
        return (1.0, 1.0, 1.0), ("background",)

    def span(self, keys: tuple[str, str]) -> tuple[float | None, float | None]:
        """near and far: of the method's planes ``keys``, else of its collider."""
        pairs: list[list[Any]] = [[self.model.get(k) for k in keys]]
        pairs += [[lookup(self.model, f"collider_params.{k}_plane") for k in ("near", "far")]]
        for near, far in pairs:
            if isinstance(near, (int, float)) and isinstance(far, (int, float)) and 0 <= near < far < math.inf:
                return float(near), float(far)
        return None, None

    def box(self) -> Box | None:
        """The data set's box, for methods whose checkpoint lacks it: +-1.5 (Blender) or +-scene_scale."""
        parser = lookup(self.tree, "pipeline.datamanager.dataparser")
        target = lookup(parser, "_target", "")
        if isinstance(target, str) and target.endswith("blender_dataparser.Blender"):
            return Box.cube(1.5)
        scale = lookup(parser, "scene_scale")
        return Box.cube(float(scale)) if type(scale) in (int, float) and 0 < scale < 1e6 else None


def open_run(checkpoint: Manifest, options: ReadOptions, where: str) -> Run:
    """Settings and transform beside the checkpoint, in the folder above (as nerfstudio has it), or as given.

    Raises InputError that asks for config.yml where there is none: the density's unit stands in it alone.
    """
    own = checkpoint.tree.get(EXTRA) if isinstance(checkpoint.tree, dict) else None
    own = own if isinstance(own, dict) else {}
    found = text_near(checkpoint, ("config.yml",), options.config)
    tree: Any = {"pipeline": {"model": own.get("model")}} if isinstance(own.get("model"), dict) else None
    if found is not None and (tree is None or options.config is not None):
        tree = load(found[1], found[0])
    if tree is None:
        raise InputError(
            f"{where}: no config.yml beside the checkpoint or in the folder above: density's unit "
            "(average_init_density), contraction and background stand in it alone",
            hint="add --config FILE",
        )
    model = lookup(tree, "pipeline.model")
    if not isinstance(model, dict):
        raise InputError(f"{found[0] if found else where}: not a nerfstudio config.yml: it has no pipeline.model")
    return Run(where, model, tree, _world(checkpoint, own), own)


def _world(checkpoint: Manifest, own: Mapping[str, Any]) -> tuple[tuple[float, ...], ...] | None:
    """The inverse of p_ns = scale * (transform [p; 1])."""
    if isinstance(own.get("world"), list):
        rows: Any = np.array(own["world"], np.float64)
    else:
        found = text_near(checkpoint, ("dataparser_transforms.json",), None)
        if found is None:
            return None
        try:
            data = json.loads(found[1])
            forward = np.eye(4)
            forward[:3] = np.array(data["transform"], np.float64)[:3] * float(data["scale"])
            rows = np.linalg.inv(forward)
        except (ValueError, KeyError, TypeError, IndexError, RecursionError, np.linalg.LinAlgError) as error:
            raise InputError(f"{found[0]}: not a transform of nerfstudio: {type(error).__name__}: {error}") from error
    if rows.shape != (4, 4) or not np.isfinite(rows).all():
        raise InputError(f"{checkpoint.path}: its transform to the data set is not finite")
    same = np.array_equal(rows, np.eye(4))
    return IDENTITY if same else tuple(tuple(float(v) + 0.0 for v in row) for row in rows)
