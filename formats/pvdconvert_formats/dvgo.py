"""sunset1995/DirectVoxGO ``coarse_last.tar``, ``fine_last.tar``: torch files (layouts 6.1, 10.2 to 10.4).

``model_kwargs`` holds what the constructor takes, ``model_state_dict`` the grids; background and step stand in the
run's ``config.py``, which is read as data where it lies beside. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvdconvert.containers import Manifest, as_mapping
from pvdconvert.errors import InputError
from pvdconvert.plugin import Config, FormatBase, FormatSpec, LazyTensor, Match, Parts, ReadOptions
from pvdconvert.scene import Box, Scene
from pvdconvert_formats._nerf_layers import Changed, assume, assumption_note, float32
from pvdconvert_formats._python_config import assignments, read_text

SPEC = FormatSpec(
    name="dvgo",
    title="sunset1995/DirectVoxGO: coarse_last.tar, fine_last.tar",
    probe="pvdconvert_formats.dvgo:probe",
    code="pvdconvert_formats.dvgo:DirectVoxGo",
    architectures=("dvgo",),
    suffixes=(".tar",),
    versions="coarse files, fine ones since 2022; dense and TensoRF grids; not the NDC and unbounded models",
    verified="a coarse file of the program's own code with its oracle (points, views); known answers of the others",
    program="sunset1995/DirectVoxGO",
    licence="GPL-3.0 (the program; only facts about its files are used)",
)
STEPSIZE = 0.5
"""Step of the program's default configurations, in voxels."""
_ALSO = {"xyz_min", "xyz_max", "act_shift", "viewfreq", "posfreq", "nonempty_mask"}
_ALSO |= {f"{grid}.{corner}" for grid in ("density", "k0") for corner in ("xyz_min", "xyz_max")}
_FACTORS = (("xy_plane", "z_vec"), ("xz_plane", "y_vec"), ("yz_plane", "x_vec"))
_TRICKS = ("nearest", "pre_act_density", "in_act_density")


def _state(manifest: Manifest) -> dict[str, LazyTensor]:
    mark = "model_state_dict."
    return {k.removeprefix(mark): t for k, t in manifest.tensors.items() if k.startswith(mark)}


def probe(manifest: Manifest) -> Match | None:
    top = as_mapping(manifest.tree)
    if not manifest.kind.startswith("torch-") or top is None or "model_state_dict" not in top:
        return None
    state = _state(manifest)
    grid = next((k for k in ("density.grid", "density.xy_plane", "density") if k in state), None)
    if as_mapping(top.get("model_kwargs")) is None or grid is None:
        return Match(0.1, "has model_state_dict, but not both model_kwargs and a density grid")
    shape = "x".join(str(n) for n in state[grid].shape[2:])
    return Match(0.95, f"model_kwargs and model_state_dict with {grid} ({shape})")


class DirectVoxGo(FormatBase):
    """Read-only."""

    def read(self, manifest: Manifest, options: ReadOptions) -> Parts:
        where = f"{manifest.path}: dvgo"
        top = as_mapping(manifest.tree) or {}
        kwargs, state = as_mapping(top.get("model_kwargs")), _state(manifest)
        if kwargs is None or not state:
            raise InputError(f"{where}: has no model_kwargs and model_state_dict", hint="is it a DirectVoxGO file?")
        _refuse_others(kwargs, state, where)
        used: set[str] = set()
        low, high = (_three(state, key, where) for key in ("xyz_min", "xyz_max"))
        box = Box(low, high)
        for key in (k for k in state if re.fullmatch(r"(density|k0)\.xyz_(min|max)", k)):
            if _three(state, key, where) != (low if key.endswith("min") else high):
                raise InputError(f"{where}: tensor {key!r} is not the box of the model")
        density, k0 = (_grid(state, name, used, where) for name in ("density", "k0"))
        if density.shape[1] != 1 or density.shape[2:] != k0.shape[2:]:
            raise InputError(f"{where}: density is {list(density.shape)} and k0 {list(k0.shape)}: not one lattice")
        base = _count(kwargs, "num_voxels_base", where)
        config: Config = {
            "box": box.to_json(),
            "shape": list(k0.shape[2:]),
            "channels": k0.shape[1],
            "act_shift": _act_shift(top, kwargs, state, where),
            "density_scale": (base / math.prod(box.size)) ** (1 / 3),
        }
        tensors: dict[str, LazyTensor] = {"density": density, "k0": k0}
        config |= _network(kwargs, state, k0.shape[1], tensors, used, where)
        notes: list[str] = []
        config |= _mask(state, tensors, used, where, notes)
        for key in sorted(state.keys() - used - _ALSO):
            raise InputError(f"{where}: tensor {key!r} has no place in this model")
        scene, scene_notes = _scene(manifest, options, box, kwargs, fine=config["mlp_depth"] > 0)
        step = top.get("global_step")
        provenance = {"program": "sunset1995/DirectVoxGO", **({"step": step} if type(step) is int else {})}
        return Parts("dvgo", config, tensors, scene, provenance, (*notes, *scene_notes))


def _refuse_others(kwargs: Mapping[str, Any], state: Mapping[str, LazyTensor], where: str) -> None:
    if "scene_center" in state:
        raise InputError(
            f"{where}: an unbounded model (DCVGO): its density is defined per contracted step, not per length, so that "
            "no radiance field equals it",
            hint="only bounded models can be read",
        )
    if "act_shift.grid" in state or "mpi_depth" in kwargs:
        raise InputError(
            f"{where}: a forward-facing model (DMPIGO): its density is opacity per plane of a multiplane image, not "
            "per length, so that no radiance field equals it",
            hint="only bounded models can be read",
        )
    for key in _TRICKS:
        if kwargs.get(key):
            raise InputError(f"{where}: model_kwargs has {key}=True: only post-activated trilinear grids can be read")
    if kwargs.get("rgbnet_full_implicit"):
        raise InputError(f"{where}: model_kwargs has rgbnet_full_implicit=True, which the program itself cannot render")
    if "mask_cache.density" in state:
        raise InputError(
            f"{where}: a fine file from before 2022: the threshold of its 'mask_cache.density' is not in it",
            hint="the coarse_last.tar of that run can be read",
        )


def _three(state: Mapping[str, LazyTensor], key: str, where: str) -> tuple[float, float, float]:
    if key not in state or state[key].shape != (3,):
        raise InputError(f"{where}: tensor {key!r} of three numbers is missing")
    x, y, z = (float(v) for v in state[key].numpy())
    return (x, y, z)


def _count(kwargs: Mapping[str, Any], key: str, where: str) -> int:
    value = kwargs.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value < 1e12:
        raise InputError(f"{where}: model_kwargs.{key} is {value!r:.40}, not a number of voxels")
    return int(value)


@dataclasses.dataclass(frozen=True, slots=True)
class Factored:
    """TensoRFGrid as the dense grid [1, C, X, Y, Z] that it equals: products of (bi)linear interpolations are the
    trilinear interpolation of the products at the vertices."""

    planes: tuple[LazyTensor, ...]
    lines: tuple[LazyTensor, ...]
    mix: LazyTensor | None
    shape: tuple[int, ...]
    dtype: str = "float32"

    def numpy(self) -> NDArray[Any]:
        xy, xz, yz = (t.numpy()[0] for t in self.planes)
        z, y, x = (t.numpy()[0, :, :, 0] for t in self.lines)
        mix = None if self.mix is None else self.mix.numpy()
        out = np.empty(self.shape[1:], np.float32)
        for i in range(self.shape[2]):  # a slab at a time: the products of all ranks are many times the result
            parts = (xy[:, i, :, None] * z[:, None, :], xz[:, i, None, :] * y[:, :, None], yz * x[:, i, None, None])
            products = np.concatenate(parts)
            out[:, i] = products.sum(0)[None] if mix is None else np.einsum("ryz,rc->cyz", products, mix, optimize=True)
        return out[None]


def _grid(state: Mapping[str, LazyTensor], name: str, used: set[str], where: str) -> LazyTensor:
    """A grid [1, C, X, Y, Z] from its dense or factored keys."""
    for key in (f"{name}.grid", name):
        if key in state:
            used.add(key)
            if len(state[key].shape) != 5 or state[key].shape[0] != 1 or min(state[key].shape) < 1:
                raise InputError(f"{where}: tensor {key!r} is {list(state[key].shape)}, expected [1, C, X, Y, Z]")
            return float32(state[key])
    pairs = [(f"{name}.{plane}", f"{name}.{line}") for plane, line in _FACTORS]
    for key in (k for pair in pairs for k in pair):
        if key not in state:
            raise InputError(f"{where}: tensor '{name}.grid' is missing, and so is {key!r}", hint="is it complete?")
        used.add(key)
        if len(state[key].shape) != 4:
            raise InputError(f"{where}: tensor {key!r} is {list(state[key].shape)}, expected four axes")
    planes, lines = (tuple(state[p[i]] for p in pairs) for i in (0, 1))
    (_, rank, nx, ny), nz = planes[0].shape, planes[1].shape[3]
    other = planes[1].shape[1]
    fits = [t.shape for t in (*planes, *lines)] == [
        (1, rank, nx, ny), (1, other, nx, nz), (1, other, ny, nz),
        (1, rank, nz, 1), (1, other, ny, 1), (1, other, nx, 1),
    ]  # fmt: skip
    mix = state.get(f"{name}.f_vec")
    if mix is not None:
        used.add(f"{name}.f_vec")
        fits = fits and len(mix.shape) == 2 and mix.shape[0] == rank + 2 * other
    if not fits:
        raise InputError(f"{where}: planes, lines and f_vec of {name!r} do not fit each other")
    return Factored(planes, lines, mix, (1, 1 if mix is None else mix.shape[1], nx, ny, nz))


def _act_shift(top: Mapping[str, Any], kwargs: Mapping[str, Any], state: Mapping[str, LazyTensor], where: str) -> float:
    """The stored value: scaling steps lower it, so that ``alpha_init`` alone is not enough in newer files."""
    if "act_shift" in state and state["act_shift"].shape in ((), (1,)):
        return float(np.asarray(state["act_shift"].numpy(), np.float64).reshape(-1)[0])
    for source in (kwargs, as_mapping(top.get("MaskCache_kwargs")) or {}):
        value = source.get("act_shift")
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    alpha = kwargs.get("alpha_init")
    if not isinstance(alpha, int | float) or not 0 < alpha < 1:
        raise InputError(f"{where}: neither act_shift nor a fit alpha_init is in the file")
    return math.log(1 / (1 - alpha) - 1)


def _octaves(state: Mapping[str, LazyTensor], key: str, where: str) -> int | None:
    if key not in state:
        return None
    values = state[key].numpy().reshape(-1)
    if values.tolist() != [2.0**k for k in range(len(values))]:
        raise InputError(f"{where}: tensor {key!r} does not hold the powers of two")
    return len(values)


def _network(
    kwargs: Mapping[str, Any],
    state: Mapping[str, LazyTensor],
    channels: int,
    tensors: dict[str, LazyTensor],
    used: set[str],
    where: str,
) -> Config:
    """Layers 0, 2, 3, ... of ``rgbnet`` (the inner ones stand in a Sequential of their own) -> 0, 1, 2, ..."""
    found = {int(m[1]): m[0][:-7] for k in state if (m := re.fullmatch(r"rgbnet\.(\d+)(?:\.0)?\.weight", k))}
    if not found:
        if channels != 3:
            raise InputError(f"{where}: 'k0' has {channels} channels, but there is no 'rgbnet' to make colours of them")
        return {"mlp_depth": 0, "direct": False}
    depth = len(found)
    if sorted(found) != [0, *range(2, depth + 1)]:
        raise InputError(f"{where}: 'rgbnet' has the layers {sorted(found)}, expected 0, 2, 3, ...")
    wide = 0
    for i, index in enumerate(sorted(found)):
        weight, bias = f"{found[index]}.weight", f"{found[index]}.bias"
        shape = state[weight].shape
        if len(shape) != 2 or (i and shape[1] != wide) or bias not in state or state[bias].shape != shape[:1]:
            raise InputError(f"{where}: tensor {weight!r} is {list(shape)}, which does not follow the layer before")
        wide = shape[0]
        used |= {weight, bias}
        tensors[f"rgbnet.{i}.weight"], tensors[f"rgbnet.{i}.bias"] = float32(state[weight]), float32(state[bias])
    view, position = (_octaves(state, key, where) for key in ("viewfreq", "posfreq"))
    inputs = tensors["rgbnet.0.weight"].shape[1]
    rest = inputs - (3 + 6 * (view or 0)) - (0 if position is None else 3 + 6 * position)
    if view is None or wide != 3 or rest not in (channels, channels - 3):
        raise InputError(
            f"{where}: 'rgbnet' maps {inputs} numbers to {wide}: not features and encodings ('viewfreq') to a colour"
        )
    direct = rest == channels
    if isinstance(kwargs.get("rgbnet_direct"), bool) and kwargs["rgbnet_direct"] != direct:
        raise InputError(f"{where}: 'rgbnet.0.weight' takes {inputs} numbers, but rgbnet_direct is {not direct}")
    config: Config = {"mlp_depth": depth, "direct": direct, "view_frequencies": view}
    width = tensors["rgbnet.0.weight"].shape[0]
    if any(tensors[f"rgbnet.{i}.weight"].shape[0] != width for i in range(depth - 1)):
        raise InputError(f"{where}: the hidden layers of 'rgbnet' differ in width")
    return config | {"mlp_width": width, "position_frequencies": position}


def _mask(
    state: Mapping[str, LazyTensor], tensors: dict[str, LazyTensor], used: set[str], where: str, notes: list[str]
) -> Config:
    """mask_cache: the renderer skips what it does not hold, so it is part of the function."""
    if "nonempty_mask" in state:
        notes.append("nonempty_mask is left out: the program has already written it into the density")
    if "mask_cache.mask" not in state:
        notes.append("no mask_cache: density counts everywhere in the box")
        return {}
    mask = state["mask_cache.mask"]
    if len(mask.shape) != 3 or mask.dtype not in ("bool", "uint8"):
        raise InputError(f"{where}: tensor 'mask_cache.mask' is {mask.dtype} {list(mask.shape)}, expected bool [X,Y,Z]")
    used |= {f"mask_cache.{k}" for k in ("mask", "xyz2ijk_scale", "xyz2ijk_shift")}
    size = (math.prod(mask.shape) + 7) // 8
    tensors["mask_cache.bits"] = Changed(
        mask, (size,), "uint8", lambda a: np.packbits(a.reshape(-1).astype(bool), bitorder="little")
    )
    scale, shift = (list(_three(state, f"mask_cache.xyz2ijk_{k}", where)) for k in ("scale", "shift"))
    return {"mask_cache": {"shape": list(mask.shape), "scale": scale, "shift": shift}}


def _scene(
    manifest: Manifest, options: ReadOptions, box: Box, kwargs: Mapping[str, Any], *, fine: bool
) -> tuple[Scene, tuple[str, ...]]:
    """Background and step from ``--config`` or the run's own config.py beside the file, else as assumed."""
    settings: dict[str, Any] = {}
    if options.config is not None:
        settings = assignments(read_text(options.config), str(options.config))
    elif "config.py" in manifest.siblings():
        settings = assignments(manifest.sibling_text("config.py"), str(manifest.folder / "config.py"))
    data, model = settings.get("data"), settings.get(f"{'fine' if fine else 'coarse'}_model_and_render")
    white = data.get("white_bkgd") if isinstance(data, dict) else None
    stepsize = model.get("stepsize") if isinstance(model, dict) else None
    said = isinstance(stepsize, int | float) and 0 < stepsize < 100
    assumed = (*(() if isinstance(white, bool) else ("background",)), *(() if said else ("step",)))
    count = _count(kwargs, "num_voxels", f"{manifest.path}: dvgo")
    step = float(stepsize if said and stepsize else STEPSIZE) * (math.prod(box.size) / count) ** (1 / 3)
    scene = Scene(box, background=(0.0, 0.0, 0.0) if white is False else (1.0, 1.0, 1.0), step=step)
    scene = assume(scene, options, assumed)
    return scene, assumption_note(scene)
