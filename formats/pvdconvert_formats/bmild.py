"""bmild/nerf (the paper's code): ``model_*.npy`` and ``model_fine_*.npy``, lists of Keras weights (layouts 5.2).

Arrays alternate kernel [in, out] and bias: D position layers, bottleneck, view layer, rgb, density; without view
directions the D layers and one output [W, 4]. Encoding [x, sin 2^k x, cos 2^k x], density relu, bottleneck linear.
Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from pvdconvert.containers import Manifest
from pvdconvert.errors import InputError
from pvdconvert.plugin import Config, FormatBase, FormatSpec, LazyTensor, Match, Parts, ReadOptions
from pvdconvert_formats import _nerf_layers as nerf
from pvdconvert_formats import _nerf_settings as texts

SPEC = FormatSpec(
    name="bmild",
    title="the paper's own code (TensorFlow): model_*.npy, coarse and fine",
    probe="pvdconvert_formats.bmild:probe",
    code="pvdconvert_formats.bmild:Bmild",
    architectures=("nerf",),
    suffixes=(".npy",),
    versions="with or without view directions, coarse and fine",
    verified="real files (official lego weights) and TensorFlow's own answers",
    program="bmild/nerf",
    licence="MIT",
    pixel_offset=0.0,
)
NAME = re.compile(r"model_(fine_)?(\d+)\.npy")


def probe(manifest: Manifest) -> Match | None:
    if manifest.kind == "folder":
        found = [c for c in manifest.children if _fits(c)]
        return Match(0.9, f"a folder with {len(found)} lists of Keras weights") if found else None
    if manifest.kind != "npy" or not isinstance(manifest.tree, list):
        return None
    named = _layers(manifest)
    if named is None:
        return Match(0.05, "an object array, but not of alternating kernels and biases")
    try:
        _network(named, "fine", "")
    except InputError as error:
        return Match(0.1, f"alternating kernels and biases, but{error}")
    return Match(0.9, f"{len(named)} alternating kernels [in, out] and biases that chain as a NeRF")


def _fits(child: Manifest) -> bool:
    match = probe(child)
    return match is not None and match.score > 0.5


def _layers(manifest: Manifest) -> dict[str, LazyTensor] | None:
    """ "k.weight" [out, in] and "k.bias" by layer, or None if this is something else."""
    values = [manifest.tensors.get(str(k)) for k in range(len(manifest.tree))]
    ranks = [None if t is None else len(t.shape) for t in values]
    if not values or ranks != [2, 1] * (len(values) // 2):
        return None
    named: dict[str, LazyTensor] = {}
    for k, tensor in enumerate(values):
        assert tensor is not None
        named[f"{k // 2}.{'bias' if k % 2 else 'weight'}"] = tensor if k % 2 else nerf.transposed(tensor)
    return named


def _network(named: Mapping[str, LazyTensor], name: str, where: str) -> tuple[Config, nerf.Tensors]:
    layers = nerf.Layers(where, named)
    count = len(named) // 2
    with_views = count > 0 and named[f"{count - 1}.bias"].shape == (1,)
    depth = count - 4 if with_views else count - 1
    config = layers.trunk([str(k) for k in range(depth)], name)
    if not with_views:
        layers.head(str(depth), f"{name}.rgb", f"{name}.density", config["width"])
        return {**config, **layers.no_view()}, layers.tensors
    _, bottleneck = layers.take(str(depth), f"{name}.bottleneck", config["width"])
    wide, units = layers.take(str(depth + 1), f"{name}.direction.0")
    octaves = layers.direction_frequencies(wide - bottleneck, config["include_input"], f"{depth + 1}.weight")
    layers.take(str(depth + 2), f"{name}.rgb", units, 3)
    layers.take(str(depth + 3), f"{name}.density", config["width"], 1)
    heads = {"bottleneck_width": bottleneck, "direction_layers": [units], "direction_frequencies": octaves}
    return {**config, **heads}, layers.tensors


class Bmild(FormatBase):
    """Reads a pair, or a single network, which then is the field."""

    def read(self, manifest: Manifest, options: ReadOptions) -> Parts:
        fine, coarse, notes = _pair(manifest)
        config, tensors = self._read(fine, "fine")
        if coarse is not None:
            coarse_config, coarse_tensors = self._read(coarse, "coarse")
            config, tensors = nerf.two_networks(config, coarse_config, str(coarse.path)), {**tensors, **coarse_tensors}
        else:
            config = nerf.two_networks(config, None, str(fine.path))
            notes.append(f"only one network found ({fine.path.name}): it is the field")
        settings = texts.read_settings(fine, options)
        scene, scene_notes = texts.scene_of(settings, options, f"{fine.path}: bmild")
        step = NAME.fullmatch(fine.path.name)
        provenance = {"program": "bmild/nerf", **({"step": int(step[2])} if step else {})}
        return Parts("nerf", config, tensors, scene, provenance, (*notes, *scene_notes))

    def _read(self, manifest: Manifest, name: str) -> tuple[Config, nerf.Tensors]:
        where = f"{manifest.path}: bmild"
        named = _layers(manifest) if isinstance(manifest.tree, list) else None
        if named is None:
            raise InputError(f"{where}: not a list of alternating kernels [in, out] and biases")
        return _network(named, name, where)


def _pair(manifest: Manifest) -> tuple[Manifest, Manifest | None, list[str]]:
    """(fine, coarse or None, notes): of a folder the pair of the latest step, of a file itself and its sibling."""
    if manifest.kind == "folder":
        files = {c.path.name: c for c in manifest.children if _fits(c)}
        steps = sorted({int(m[2]) for n in files if (m := NAME.fullmatch(n))})
        if not steps:
            if len(files) == 1:
                return next(iter(files.values())), None, []
            raise InputError(
                f"{manifest.path}: bmild: {len(files)} networks, none named model_*.npy", hint="name one file"
            )
        chosen = [c for n, c in files.items() if (m := NAME.fullmatch(n)) and int(m[2]) == steps[-1]]
        chosen.sort(key=lambda c: "fine" not in c.path.name)
        notes = [f"step {steps[-1]} of {', '.join(map(str, steps))} was taken"] if len(steps) > 1 else []
        return chosen[0], chosen[1] if len(chosen) > 1 else None, notes
    match = NAME.fullmatch(manifest.path.name)
    if match is None:
        return manifest, None, []
    other = f"model_{'' if match[1] else 'fine_'}{match[2]}.npy"
    if other not in manifest.siblings():
        return manifest, None, []
    sibling = manifest.open_sibling(other)
    return (manifest, sibling, []) if match[1] else (sibling, manifest, [])
