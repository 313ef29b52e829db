"""google-research/jaxnerf ``checkpoint_N``: flax msgpack, coarse MLP_0 and fine MLP_1 (layouts section 5.4).

``Dense_k`` of kernels [in, out]: the trunk (a skip's input is [hidden, encoded]), density, and with view directions
bottleneck (no activation), condition layers on [bottleneck, encoded direction], rgb. The encodings' column order is
not in the file: [x, sin of all octaves, cos of all] since the option exists, interleaved before. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from pvdconvert.containers import Manifest
from pvdconvert.errors import InputError
from pvdconvert.plugin import Config, FormatBase, FormatSpec, LazyTensor, Match, Parts, ReadOptions
from pvdconvert.scene import Scene
from pvdconvert_formats import _nerf_layers as nerf
from pvdconvert_formats._lazy import yaml_near

SPEC = FormatSpec(
    name="jaxnerf",
    title="google-research/jaxnerf: checkpoint_N (flax)",
    probe="pvdconvert_formats.jaxnerf:probe",
    code="pvdconvert_formats.jaxnerf:JaxNerf",
    architectures=("nerf",),
    versions="optimizer.target and bare params; --config FILE.yaml or --extra posenc=legacy for encodings of 2020",
    verified="known answers derived in the tests",
    program="google-research/jaxnerf",
    licence="Apache-2.0",
    pixel_offset=0.0,
)
_FIRST = re.compile(r"((?:.*\.)?)MLP_0\.Dense_0\.kernel")
ORDERS = ("scale-major", "legacy")


def _prefix(manifest: Manifest) -> str | None:
    """What stands before "MLP_0"; optimiser states hold leaves of other names."""
    return next((m[1] for k in manifest.tensors if (m := _FIRST.fullmatch(k))), None)


def probe(manifest: Manifest) -> Match | None:
    prefix = _prefix(manifest)
    if manifest.kind != "msgpack" or prefix is None:
        return None
    own = _own(manifest, prefix, "MLP_0")
    first = own["0.weight"].shape
    if len(first) != 2 or first[1] % 6 != 3:
        return Match(
            0.2, f"flax MLP_0, but {list(first)[1:]} inputs are no encoded position (mip-NeRF's are integrated)"
        )
    if not any(t.shape[:1] == (1,) for k, t in own.items() if k.endswith(".weight")):
        return Match(0.2, "flax MLP_0, but without a layer of one output for density")
    return Match(0.95, "flax parameters MLP_0 with Dense_0, Dense_1, ... and a layer of one output for density")


def _own(manifest: Manifest, prefix: str, net: str) -> dict[str, LazyTensor]:
    """ "k.weight" [out, in] and "k.bias" of ``net``."""
    out: dict[str, LazyTensor] = {}
    for key, tensor in manifest.tensors.items():
        found = re.fullmatch(r"Dense_(\d+)\.(kernel|bias)", key.removeprefix(f"{prefix}{net}."))
        if found is None or not key.startswith(f"{prefix}{net}."):
            continue
        kernel = found[2] == "kernel"
        if kernel and len(tensor.shape) != 2:
            raise InputError(f"{manifest.path}: jaxnerf: tensor {key!r} has {len(tensor.shape)} axes, not 2")
        out[f"{found[1]}.{'weight' if kernel else 'bias'}"] = nerf.transposed(tensor) if kernel else tensor
    return out


def _interleaved(weight: LazyTensor, start: int, octaves: int) -> LazyTensor:
    """Input columns from ``start`` on, [x, sin of all octaves, cos of all], as [x, sin, cos, sin 2x, cos 2x, ...]."""
    k, wave, axis = np.meshgrid(np.arange(octaves), np.arange(2), np.arange(3), indexing="ij")
    source = 3 + wave * 3 * octaves + 3 * k + axis
    order = np.concatenate([np.arange(start + 3), start + source.reshape(-1)])
    return nerf.Changed(weight, weight.shape, weight.dtype, lambda a: np.ascontiguousarray(a[:, order]))


def _network(own: Mapping[str, LazyTensor], name: str, legacy: bool, where: str) -> tuple[Config, nerf.Tensors]:
    keys = nerf.numbered(own, r"(\d+)", where)
    depth = next((i for i, k in enumerate(keys) if own[f"{k}.weight"].shape[0] == 1), 0)
    if depth == 0 or "0.weight" not in own:
        raise InputError(f"{where}: no layer of one output for density after the trunk")
    width, encoded = own["0.weight"].shape
    octaves, plain = nerf.frequencies_of(encoded, where, "Dense_0.kernel")
    if not plain:
        raise InputError(
            f"{where}: 'Dense_0.kernel': {encoded} inputs without the plain position: mip-NeRF is not supported"
        )
    source = dict(own)
    conditions = keys[depth + 2 : -1]
    if not legacy:
        for k in keys[:depth]:
            inside = own[f"{k}.weight"].shape[1]
            if k == "0" or inside == width + encoded:
                source[f"{k}.weight"] = _interleaved(own[f"{k}.weight"], inside - encoded, octaves)
    layers = nerf.Layers(where, source)
    config: Config = layers.trunk(keys[:depth], name, hidden_first=True)
    layers.take(keys[depth], f"{name}.density", width, 1)
    if len(keys) == depth + 2:
        layers.take(keys[-1], f"{name}.rgb", width, 3)
        config |= layers.no_view()
    elif not conditions:
        raise InputError(f"{where}: {len(keys)} layers of which {depth} are the trunk: no NeRF of this program")
    else:
        _, bottleneck = layers.take(keys[depth + 1], f"{name}.bottleneck", width)
        inside = own[f"{conditions[0]}.weight"].shape[1]
        count = layers.direction_frequencies(inside - bottleneck, True, f"Dense_{conditions[0]}.kernel")
        if not legacy:
            key = f"{conditions[0]}.weight"
            source[key] = _interleaved(own[key], bottleneck, count)
        units: list[int] = []
        for j, k in enumerate(conditions):
            units.append(layers.take(k, f"{name}.direction.{j}", units[-1] if units else None)[1])
        layers.take(keys[-1], f"{name}.rgb", units[-1], 3)
        config |= {"bottleneck_width": bottleneck, "direction_layers": units, "direction_frequencies": count}
    for key in sorted(own.keys() - layers.used)[:1]:
        raise InputError(f"{where}: Dense_{key} has no place in this program's NeRF")
    return config, layers.tensors


class JaxNerf(FormatBase):
    """Reads both networks; with MLP_0 alone it is the field."""

    def read(self, manifest: Manifest, options: ReadOptions) -> Parts:
        where = f"{manifest.path}: jaxnerf"
        prefix = _prefix(manifest)
        if prefix is None:
            raise InputError(f"{where}: no tensor 'MLP_0.Dense_0.kernel'", hint="is the file complete?")
        settings = yaml_near(manifest, (), options.config)  # configs/blender.yaml, ...
        order = options.extra.get("posenc", "legacy" if settings.get("legacy_posenc_order") is True else ORDERS[0])
        if order not in ORDERS:
            raise InputError(f"{where}: posenc={order!r}", hint=f"--extra posenc= one of {', '.join(ORDERS)}")
        fine, coarse = (_own(manifest, prefix, net) for net in ("MLP_1", "MLP_0"))
        notes: list[str] = []
        if "posenc" not in options.extra and "legacy_posenc_order" not in settings:
            notes.append(
                "the encodings' order is not in the file: that of today's program is assumed "
                "(--extra posenc=legacy for checkpoints of 2020)"
            )
        config, tensors = _network(
            fine or coarse, "fine", order == "legacy", f"{where}: {'MLP_1' if fine else 'MLP_0'}"
        )
        if fine:
            other, more = _network(coarse, "coarse", order == "legacy", f"{where}: MLP_0")
            config, tensors = nerf.two_networks(config, other, where), {**tensors, **more}
        else:
            config = nerf.two_networks(config, None, where)
            notes.append("only MLP_0 is in the file: it is the field")
        config |= _activations(settings, where)
        other_nets = {m[1] for k in manifest.tensors if (m := re.match(re.escape(prefix) + r"([^.]+)\.", k))}
        if odd := sorted(other_nets - {"MLP_0", "MLP_1"}):
            raise InputError(f"{where}: {odd[0]!r} beside MLP_0 and MLP_1 has no place in this program")
        if any(k.startswith("optimizer.state.") for k in manifest.tensors):
            notes.append("optimizer.state is training state and left out")
        scene = _scene(settings, options, where)
        step = next((manifest.meta[k] for k in ("step", "optimizer.state.step") if k in manifest.meta), None)
        provenance = {"program": "google-research/jaxnerf", **({"step": step} if type(step) is int else {})}
        return Parts("nerf", config, tensors, scene, provenance, (*notes, *nerf.assumption_note(scene)))


def _activations(settings: Mapping[str, Any], where: str) -> Config:
    for key, known in (("net_activation", ("relu",)), ("rgb_activation", ("sigmoid",)), ("min_deg_point", (0,))):
        if settings.get(key, known[0]) not in known:
            raise InputError(f"{where}: {key} {settings[key]!r:.30} is not supported", hint=f"only {known[0]}")
    density = settings.get("sigma_activation", "relu")
    if density not in ("relu", "softplus"):
        raise InputError(f"{where}: sigma_activation {density!r:.30} is not supported", hint="only relu and softplus")
    return {"density_activation": density}


def _scene(settings: Mapping[str, Any], options: ReadOptions, where: str) -> Scene:
    """The program's own defaults, NeRF-Synthetic, unless its YAML says otherwise."""
    kind = settings.get("dataset")
    white = settings.get("white_bkgd", True) is not False
    background = (1.0, 1.0, 1.0) if white else (0.0, 0.0, 0.0)
    if kind == "llff" and settings.get("spherify", False) is not True:
        scene = nerf.ndc_scene(options, background, where)
        return nerf.assume(scene, options, ("box",) if scene.ray_space.focal else ("box", "ray_space"))
    near: Any = settings.get("near")
    far: Any = settings.get("far")
    stated = isinstance(near, (int, float)) and isinstance(far, (int, float)) and 0 <= near < far
    if kind in ("blender", None):
        scene = nerf.synthetic_scene(background, **({"near": float(near), "far": float(far)} if stated else {}))
        left = (
            ()
            if kind
            else (*(() if "white_bkgd" in settings else ("background",)), *(() if stated else ("near", "far")))
        )
        return nerf.assume(scene, options, ("box", *left))
    if options.bounds is None:
        raise InputError(f"{where}: the box of dataset {kind!r:.40} is in no file", hint="add --bounds (six numbers)")
    scene = Scene(options.bounds, background=background, near=near if stated else None, far=far if stated else None)
    return nerf.assume(scene, options, ())
