"""krrish94/nerf-pytorch ``checkpoint*.ckpt`` with ``config.yml``: FlexibleNeRFModel, coarse and fine.

Keys ``model_{coarse,fine}_state_dict`` of layer1 (no ReLU after it), layers_xyz.i (a skip's input is [hidden, encoded]
), fc_feat (ReLU after it), fc_alpha, layers_dir.i, fc_rgb; or fc_out without view directions. The shapes in the file
win over config.yml, which often belongs to another run. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pvdconvert.containers import Manifest
from pvdconvert.errors import InputError
from pvdconvert.plugin import Config, FormatBase, FormatSpec, LazyTensor, Match, Parts, ReadOptions
from pvdconvert.scene import Scene
from pvdconvert_formats import _nerf_layers as nerf
from pvdconvert_formats._lazy import yaml_near

SPEC = FormatSpec(
    name="krrish94",
    title="krrish94/nerf-pytorch: checkpoint*.ckpt with config.yml",
    probe="pvdconvert_formats.krrish94:probe",
    code="pvdconvert_formats.krrish94:Krrish94",
    architectures=("nerf",),
    suffixes=(".ckpt",),
    versions="legacy torch streams and zip files; world and NDC scenes",
    verified="real files (lego, fern); lego's PSNR on held-out views",
    program="krrish94/nerf-pytorch",
    licence="MIT",
    pixel_offset=0.0,
)
_COARSE, _FINE = "model_coarse_state_dict.", "model_fine_state_dict."


def probe(manifest: Manifest) -> Match | None:
    names = manifest.tensors
    if f"{_COARSE}layer1.weight" not in names:
        return None
    if f"{_COARSE}fc_alpha.weight" in names or f"{_COARSE}fc_out.weight" in names:
        return Match(0.95, "model_coarse_state_dict of a FlexibleNeRFModel (layer1, layers_xyz, fc_alpha or fc_out)")
    return Match(0.2, "model_coarse_state_dict with layer1, but of another model class")


def _network(tensors: Mapping[str, LazyTensor], prefix: str, name: str, where: str) -> tuple[Config, nerf.Tensors]:
    own = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    layers = nerf.Layers(f"{where}: {prefix.rstrip('.')}", own)
    keys = ["layer1", *nerf.numbered(own, r"layers_xyz\.(\d+)", layers.where)]
    config: Config = {**layers.trunk(keys, name, hidden_first=True), "first_activation": False}
    width = config["width"]
    if "fc_out.weight" in own:
        layers.head("fc_out", f"{name}.rgb", f"{name}.density", width)
        config.update(layers.no_view())
    else:
        layers.take("fc_alpha", f"{name}.density", width, 1)
        _, bottleneck = layers.take("fc_feat", f"{name}.bottleneck", width)
        units: list[int] = []
        for j, key in enumerate(nerf.numbered(own, r"layers_dir\.(\d+)", layers.where)):
            wide, out = layers.take(key, f"{name}.direction.{j}", units[-1] if units else None)
            if j == 0:
                octaves = layers.direction_frequencies(wide - bottleneck, config["include_input"], f"{key}.weight")
                config["direction_frequencies"] = octaves
            units.append(out)
        if not units:
            raise InputError(f"{layers.where}: tensor 'layers_dir.0.weight' is missing")
        layers.take("fc_rgb", f"{name}.rgb", units[-1], 3)
        config |= {"bottleneck_width": bottleneck, "bottleneck_activation": "relu", "direction_layers": units}
    surplus = sorted(own.keys() - layers.used)
    if surplus:
        raise InputError(f"{layers.where}: tensor {surplus[0]!r} has no place in a FlexibleNeRFModel")
    return config, layers.tensors


class Krrish94(FormatBase):
    """Reads both networks; a run without a fine one makes the coarse one the field."""

    def read(self, manifest: Manifest, options: ReadOptions) -> Parts:
        where = f"{manifest.path}: krrish94"
        settings = yaml_near(manifest, ("config.yml",), options.config)
        notes: list[str] = []
        if any(name.startswith(_FINE) for name in manifest.tensors):
            fine, tensors = _network(manifest.tensors, _FINE, "fine", where)
            coarse, coarse_tensors = _network(manifest.tensors, _COARSE, "coarse", where)
            config, tensors = nerf.two_networks(fine, coarse, where), {**tensors, **coarse_tensors}
        else:
            fine, tensors = _network(manifest.tensors, _COARSE, "fine", where)
            config = nerf.two_networks(fine, None, where)
            notes.append("only one network in the file: it is the field")
        notes += _lies(settings, config, where)
        scene, scene_notes = _scene(settings, options, where)
        provenance = {"program": "krrish94/nerf-pytorch", "step": manifest.meta.get("iter")}
        return Parts("nerf", config, tensors, scene, provenance, (*notes, *scene_notes))


def _get(settings: Mapping[str, Any], path: str, default: Any) -> Any:
    value: Any = settings
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return default if value is None else value


def _lies(settings: Mapping[str, Any], config: Config, where: str) -> list[str]:
    """Where config.yml contradicts the shapes; raises where it says something that shapes cannot show nor we hold."""
    for part in ("xyz", "dir"):
        if _get(settings, f"models.fine.log_sampling_{part}", True) is False:
            raise InputError(f"{where}: log_sampling_{part} false: linearly spaced frequencies are not supported")
    stated = {"width": "hidden_size", "depth": "num_layers", "position_frequencies": "num_encoding_fn_xyz"}
    wrong = []
    for key, name in stated.items():
        said = _get(settings, f"models.fine.{name}", config[key])
        if said != config[key]:
            wrong.append(f"{name} {said!r:.20} is {config[key]}")
    return [f"config.yml does not fit the file, whose shapes win: {', '.join(wrong)}"] if wrong else []


def _scene(settings: Mapping[str, Any], options: ReadOptions, where: str) -> tuple[Scene, tuple[str, ...]]:
    white = _get(settings, "nerf.validation.white_background", True) is True
    background = (1.0, 1.0, 1.0) if white else (0.0, 0.0, 0.0)
    kind = _get(settings, "dataset.type", None)
    near, far = (_get(settings, f"dataset.{key}", None) for key in ("near", "far"))
    assumed: tuple[str, ...]
    if kind == "llff" and _get(settings, "dataset.no_ndc", False) is not True:
        scene = nerf.ndc_scene(options, background, where)
        assumed = ("box",) if scene.ray_space.focal else ("box", "ray_space")
    elif kind in ("blender", None):
        known = isinstance(near, (int, float)) and isinstance(far, (int, float)) and 0 <= near < far
        scene = (
            nerf.synthetic_scene(background, near=float(near), far=float(far))
            if known
            else nerf.synthetic_scene(background)
        )
        assumed = ("box", *(() if kind else ("background",)), *(() if known else ("near", "far")))
    else:
        if options.bounds is None:
            raise InputError(
                f"{where}: the box of dataset type {kind!r:.20} is in no file", hint="add --bounds (six numbers)"
            )
        scene = Scene(options.bounds, background=background, near=near, far=far)
        assumed = ()
    scene = nerf.assume(scene, options, assumed)
    return scene, nerf.assumption_note(scene)
