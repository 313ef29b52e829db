"""yenchenlin/nerf-pytorch ``XXXXXX.tar``: coarse and fine network of one checkpoint (layouts section 5.1).

Keys ``network_fn_state_dict`` (coarse) and ``network_fine_state_dict`` (or None) of pts_linears.i, feature_linear (no
activation), views_linears.j, rgb_linear, alpha_linear; without view directions output_linear [4 or 5] = (r, g, b,
density[, unused]). Encodings [x, sin 2^k x, cos 2^k x], density relu. Depth, width, skips and octaves are told by the
shapes. Reads and writes; imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from pvdconvert.containers import Manifest, as_mapping
from pvdconvert.errors import InputError
from pvdconvert.plugin import Config, FormatBase, FormatSpec, LazyTensor, Limits, Match, Parts, ReadOptions
from pvdconvert.scene import Scene
from pvdconvert_formats import _nerf_layers as nerf
from pvdconvert_formats import _nerf_pytorch_write as writer
from pvdconvert_formats import _nerf_settings as texts

SPEC = FormatSpec(
    name="nerf-pytorch",
    title="yenchenlin/nerf-pytorch: XXXXXX.tar",
    probe="pvdconvert_formats.nerf_pytorch:probe",
    code="pvdconvert_formats.nerf_pytorch:NerfPytorch",
    architectures=("nerf",),
    suffixes=(".tar",),
    versions="legacy torch streams and zip files; coarse and fine or one network; with or without view directions",
    can_write=True,
    verified="a file of the program's own (official lego weights) with its answers and its pictures",
    program="yenchenlin/nerf-pytorch",
    licence="MIT",
    pixel_offset=0.0,
)
COARSE, FINE, OPTIMIZER = "network_fn_state_dict.", "network_fine_state_dict.", "optimizer_state_dict."


def probe(manifest: Manifest) -> Match | None:
    names = [n for n in manifest.tensors if n.startswith((COARSE, FINE))]
    if not names:
        return None
    own = _own(manifest.tensors, COARSE)
    if "pts_linears.0.weight" in own and ("alpha_linear.weight" in own or "output_linear.weight" in own):
        return Match(0.95, "network_fn_state_dict with pts_linears and alpha_linear or output_linear")
    return Match(0.2, "network_fn_state_dict, but of another model class than nerf-pytorch's")


def _own(tensors: Mapping[str, LazyTensor], prefix: str) -> dict[str, LazyTensor]:
    """The tensors under ``prefix``, without it and without DataParallel's "module."."""
    own = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    if own and all(k.startswith("module.") for k in own):
        own = {k.removeprefix("module."): t for k, t in own.items()}
    return own


def network(own: Mapping[str, LazyTensor], prefix: str, name: str, where: str) -> tuple[Config, nerf.Tensors, bool]:
    """Configuration and tensors of one network, and whether it has view directions."""
    layers = nerf.Layers(f"{where}: {prefix.rstrip('.')}", own)
    config = layers.trunk(nerf.numbered(own, r"pts_linears\.(\d+)", layers.where), name)
    width = config["width"]
    views = nerf.numbered(own, r"views_linears\.(\d+)", layers.where)
    if "output_linear.weight" in own:
        layers.head("output_linear", f"{name}.rgb", f"{name}.density", width)
        config |= layers.no_view()
        # Made by the program in any case, and never asked without view directions.
        layers.used |= {f"{key}.{part}" for key in views for part in ("weight", "bias")}
    else:
        layers.take("alpha_linear", f"{name}.density", width, 1)
        _, bottleneck = layers.take("feature_linear", f"{name}.bottleneck", width)
        if not views:
            raise InputError(
                f"{layers.where}: tensor 'views_linears.0.weight' is missing", hint="is the file complete?"
            )
        units: list[int] = []
        for j, key in enumerate(views):
            wide, out = layers.take(key, f"{name}.direction.{j}", units[-1] if units else None)
            if j == 0:
                octaves = layers.direction_frequencies(wide - bottleneck, config["include_input"], f"{key}.weight")
            units.append(out)
        layers.take("rgb_linear", f"{name}.rgb", units[-1], 3)
        config |= {"bottleneck_width": bottleneck, "direction_layers": units, "direction_frequencies": octaves}
    for key in sorted(own.keys() - layers.used)[:1]:
        raise InputError(f"{layers.where}: tensor {key!r} has no place in this program's NeRF")
    return config, layers.tensors, "output_linear.weight" not in own


class NerfPytorch(FormatBase):
    """Reads both networks; without a fine one the coarse one is the field. Training state is left out."""

    def read(self, manifest: Manifest, options: ReadOptions) -> Parts:
        where = f"{manifest.path}: nerf-pytorch"
        for key in sorted(k for k in manifest.tensors if not k.startswith((COARSE, FINE, OPTIMIZER)))[:1]:
            raise InputError(f"{where}: tensor {key!r} has no place in this program's checkpoint")
        own, fine = (_own(manifest.tensors, prefix) for prefix in (COARSE, FINE))
        ours = as_mapping(manifest.tree.get(writer.OWN)) if isinstance(manifest.tree, dict) else None
        if not own:
            raise InputError(f"{where}: 'network_fn_state_dict' is missing or empty", hint="is the file complete?")
        notes: list[str] = []
        if fine and ours is not None and ours.get("one_network") is True:
            config, tensors, views = network(fine, FINE, "fine", where)
            config = nerf.two_networks(config, None, where)
            notes.append("a field of one network, written twice: as coarse and as fine")
        elif fine:
            config, tensors, views = network(fine, FINE, "fine", where)
            other, more, _ = network(own, COARSE, "coarse", where)
            config, tensors = nerf.two_networks(config, other, where), {**tensors, **more}
        else:
            config, tensors, views = network(own, COARSE, "fine", where)
            config = nerf.two_networks(config, None, where)
            notes.append("only one network in the file: it is the field")
        if not views:
            notes.append("trained without view directions: its views_linears are unused and left out")
        if isinstance(manifest.tree, dict) and manifest.tree.get("optimizer_state_dict") and ours is None:
            notes.append("optimizer_state_dict is training state and left out")
        settings = texts.read_settings(manifest, options)
        notes += _lies(settings, config, views)
        said = as_mapping(ours.get("scene")) if ours is not None and options.config is None else None
        if said is not None:
            scene = Scene.from_json(said)
            scene = nerf.assume(scene, options, scene.assumed)
            scene_notes = nerf.assumption_note(scene)
        else:
            scene, scene_notes = texts.scene_of(settings, options, where)
        step = manifest.meta.get("global_step")
        provenance = {"program": "yenchenlin/nerf-pytorch", **({"step": step} if type(step) is int else {})}
        return Parts("nerf", config, tensors, scene, provenance, (*notes, *scene_notes))

    def limits(self, architecture: str) -> Limits:
        return Limits(writer.FIXED, writer.PROGRAM)

    def write(self, parts: Parts, path: Path) -> None:
        writer.write(parts, path)


def _lies(settings: Mapping[str, str], config: Config, views: bool) -> list[str]:
    """Where the settings contradict the shapes, which win."""
    both = config["has_coarse"]
    stated = {"netdepth_fine" if both else "netdepth": "depth", "netwidth_fine" if both else "netwidth": "width"}
    if settings.get("i_embed", "0") != "-1":
        stated["multires"] = "position_frequencies"
        stated |= {"multires_views": "direction_frequencies"} if views else {}
    wrong = [
        f"{name} {settings[name]!r:.20} is {config[key]}"
        for name, key in stated.items()
        if re.fullmatch(r"\d{1,6}", settings.get(name, "")) and int(settings[name]) != config[key]
    ]
    if "use_viewdirs" in settings and texts.flag(settings, "use_viewdirs") != views:
        wrong.append(f"use_viewdirs {settings['use_viewdirs']!r:.20} is {views}")
    return [f"the settings do not fit the file, whose shapes win: {', '.join(wrong)}"] if wrong else []
