"""kwea123/nerf_pl ``epoch=N.ckpt`` of PyTorch Lightning, or its bare weights (layouts section 5.3). Imports no torch.

Keys ``nerf_coarse.`` and ``nerf_fine.`` of xyz_encoding_1.0 .. xyz_encoding_D.0 (ReLU; a skip's input is [encoded,
hidden]), xyz_encoding_final (no activation), dir_encoding.0, sigma, rgb.0. The picture's size and the data set stand in
the hyper-parameters. In NDC the program hands the warped ray's direction to the network, not of length 1.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from pvdconvert.containers import Manifest, Stub, as_mapping
from pvdconvert.errors import InputError
from pvdconvert.plugin import Config, FormatBase, FormatSpec, LazyTensor, Match, Parts, ReadOptions
from pvdconvert.scene import Scene
from pvdconvert_formats import _nerf_layers as nerf

SPEC = FormatSpec(
    name="nerf-pl",
    title="kwea123/nerf_pl: epoch=N.ckpt",
    probe="pvdconvert_formats.nerf_pl:probe",
    code="pvdconvert_formats.nerf_pl:NerfPl",
    architectures=("nerf",),
    suffixes=(".ckpt",),
    versions="master branch: full checkpoints and bare weights; Blender and LLFF scenes (NDC needs --extra focal=)",
    verified="known answers derived in the tests",
    program="kwea123/nerf_pl",
    licence="MIT",
    pixel_offset=0.0,
)
_KEY = re.compile(r"(?:.*\.)?nerf_(coarse|fine)\.(.+)")
_SIZE = (504, 378)
"""Pixels of LLFF pictures that the program assumes."""


def _own(manifest: Manifest, name: str) -> dict[str, LazyTensor]:
    """The tensors of network ``name`` under whatever the checkpoint puts before them, optimiser states aside."""
    found = ((_KEY.fullmatch(k), t) for k, t in manifest.tensors.items() if not k.startswith("optimizer_states."))
    return {m[2]: t for m, t in found if m and m[1] == name}


def probe(manifest: Manifest) -> Match | None:
    coarse, fine = (_own(manifest, name) for name in ("coarse", "fine"))
    first = "xyz_encoding_1.0.weight"
    if first not in coarse and first not in fine:
        return None
    odd = sorted(k for k in {**coarse, **fine} if k.startswith(("transient_", "static_")))
    if odd:
        return Match(0.2, f"nerf_pl's networks, but with {odd[0]!r} of its branch for photographs in the wild (NeRF-W)")
    return Match(0.95, "nerf_coarse or nerf_fine with xyz_encoding_1, xyz_encoding_final, dir_encoding")


def _network(own: Mapping[str, LazyTensor], name: str, where: str) -> tuple[Config, nerf.Tensors]:
    layers = nerf.Layers(where, own)
    config: Config = layers.trunk(nerf.numbered(own, r"xyz_encoding_(\d+)\.0", where), name)
    width = config["width"]
    layers.take("sigma", f"{name}.density", width, 1)
    _, bottleneck = layers.take("xyz_encoding_final", f"{name}.bottleneck", width)
    wide, units = layers.take("dir_encoding.0", f"{name}.direction.0")
    octaves = layers.direction_frequencies(wide - bottleneck, config["include_input"], "dir_encoding.0.weight")
    layers.take("rgb.0", f"{name}.rgb", units, 3)
    for key in sorted(own.keys() - layers.used)[:1]:
        raise InputError(f"{where}: tensor {key!r} has no place in nerf_pl's NeRF")
    heads = {"direction_frequencies": octaves, "bottleneck_width": bottleneck, "direction_layers": [units]}
    return {**config, **heads}, layers.tensors


class NerfPl(FormatBase):
    """Reads both networks; a file with one of them makes it the field."""

    def read(self, manifest: Manifest, options: ReadOptions) -> Parts:
        where = f"{manifest.path}: nerf-pl"
        found = {name: own for name in ("fine", "coarse") if (own := _own(manifest, name))}
        if not found:
            raise InputError(f"{where}: no tensor 'nerf_fine.xyz_encoding_1.0.weight'", hint="is the file complete?")
        notes: list[str] = []
        if len(found) == 2:
            fine, tensors = _network(found["fine"], "fine", f"{where}: nerf_fine")
            coarse, more = _network(found["coarse"], "coarse", f"{where}: nerf_coarse")
            config, tensors = nerf.two_networks(fine, coarse, where), {**tensors, **more}
        else:
            ((name, own),) = found.items()
            fine, tensors = _network(own, "fine", f"{where}: nerf_{name}")
            config = nerf.two_networks(fine, None, where)
            notes.append(f"only nerf_{name} is in the file: it is the field")
        known = {id(t) for own in found.values() for t in own.values()}
        left = [k for k, t in manifest.tensors.items() if id(t) not in known and not k.startswith("optimizer_states.")]
        if left:
            notes.append(f"not part of the networks and left out: {', '.join(left[:4])}{', ...' * (len(left) > 4)}")
        if isinstance(manifest.tree, dict) and manifest.tree.get("optimizer_states"):
            notes.append("optimizer_states are training state and left out")
        scene = _scene(_hyper_parameters(manifest), options, where)
        if scene.ray_space.kind == "ndc":
            config["direction_space"] = "ndc"
        step = {k: manifest.meta[k] for k in ("epoch", "global_step") if type(manifest.meta.get(k)) is int}
        provenance = {"program": "kwea123/nerf_pl", **step}
        return Parts("nerf", config, tensors, scene, provenance, (*notes, *nerf.assumption_note(scene)))


def _hyper_parameters(manifest: Manifest) -> Mapping[str, Any]:
    """What Lightning saved of the command line: a dict, an AttributeDict or a Namespace; {} if there is nothing."""
    for key in ("hyper_parameters", "hparams"):
        value = manifest.tree.get(key) if isinstance(manifest.tree, dict) else None
        if isinstance(value, Stub) and not value.entries:
            value = value.state
        found = as_mapping(value)
        if found:
            return found
    return {}


def _scene(hyper: Mapping[str, Any], options: ReadOptions, where: str) -> Scene:
    """The data set's own constants; what the file does not say is asked for or marked as assumed."""
    kind = options.extra.get("dataset_name", hyper.get("dataset_name"))
    if kind in ("blender", None):
        assumed = ("box",) if kind else ("box", "background", "near", "far")
        return nerf.assume(nerf.synthetic_scene((1.0, 1.0, 1.0)), options, assumed)
    background = (0.0, 0.0, 0.0)
    if kind == "llff" and hyper.get("spheric_poses", False) is not True:
        size = hyper.get("img_wh")
        pair = size if isinstance(size, (list, tuple)) and len(size) == 2 else _SIZE
        known = {k: str(v) for k, v in zip(("width", "height"), pair)}
        full = dataclasses.replace(options, extra={**known, **options.extra})
        if "focal" not in full.extra:
            raise InputError(
                f"{where}: the network sees directions of the NDC warp, whose focal length is in no file",
                hint=f"--extra focal=PIXELS of the {known['width']} x {known['height']} pictures",
            )
        return nerf.assume(nerf.ndc_scene(full, background, where), options, ("box",))
    if options.bounds is None or options.near is None or options.far is None:
        raise InputError(
            f"{where}: box and distances of dataset {kind!r:.40} are in no file",
            hint="add --bounds (six numbers), --near and --far",
        )
    return nerf.assume(Scene(options.bounds, background=background), options, ())
