"""ashawkey/torch-ngp's own TensoRF, ``ngp*.pth`` of main_tensoRF.py: VM and CP (layouts section 2.4). Reads; no torch.

The vertices span ``aabb_train``, which shrinks in training; rays are clipped to ``aabb_infer``. In between the factors
fade to 0, where density is exp(0) = 1: only ``density_bitfield`` hides it, so that is part of the function.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np

from pvdconvert.containers import Manifest
from pvdconvert.errors import InputError
from pvdconvert.plugin import Config, FormatBase, FormatSpec, LazyTensor, Match, Parts, ReadOptions
from pvdconvert.scene import Box, Scene
from pvdconvert_formats import _torch_ngp_state as state_dict
from pvdconvert_formats._nerf_layers import Changed, Tensors, assume, assumption_note, float32

SPEC = FormatSpec(
    name="torch-ngp-tensorf",
    title="ashawkey/torch-ngp: its TensoRF, VM and CP",
    probe="pvdconvert_formats.torch_ngp_tensorf:probe",
    code="pvdconvert_formats.torch_ngp_tensorf:TorchNgpTensorf",
    architectures=("tensorf", "tensorf-cp"),
    suffixes=(".pth",),
    versions="VM and CP, best and full checkpoints, bare state_dicts; relu density of before 2022-05-03 by "
    "--extra density_activation=relu",
    verified="known answers of both kinds, derived in the tests",
    program="ashawkey/torch-ngp",
    licence="MIT",
)
STEP = 2 * math.sqrt(3) / 1024
MIN_NEAR = 0.2
_BUFFERS = {"aabb_train", "aabb_infer", "density_grid", "density_bitfield", "step_counter"}
_BACKGROUND = re.compile(r"bg_mat|bg_net\.\d+\.weight")
_OWN = re.compile(r"(sigma|color)_(mat|vec)\.[0-2]|basis_mat\.weight|color_net\.\d+\.weight")
PLANES = ((0, 1, 2), (0, 2, 1), (1, 2, 0))
"""Axes of matrix i along its width and height, and of vector i."""


def _state(manifest: Manifest) -> Tensors:
    """The state_dict's tensors: under "model", or bare."""
    prefix = "model." if "model.sigma_vec.0" in manifest.tensors else ""
    return {k.removeprefix(prefix): t for k, t in manifest.tensors.items() if k.startswith(prefix)}


def _octaves(state: Mapping[str, LazyTensor]) -> int | None:
    """Octaves of both frequency encodings, by the width of the colour network; None = it is another network."""
    shapes = [state[k].shape if k in state else () for k in ("basis_mat.weight", "color_net.0.weight")]
    if any(len(s) != 2 for s in shapes):
        return None
    blocks, rest = divmod(shapes[1][1], shapes[0][0] + 3)
    return None if rest or blocks % 2 == 0 else (blocks - 1) // 2


def probe(manifest: Manifest) -> Match | None:
    if not manifest.kind.startswith("torch-"):
        return None
    if any(k.endswith("U_vec_density.0") for k in manifest.tensors):
        return Match(0.2, "torch-ngp's CCNeRF, whose groups of ranks are not supported")
    state = _state(manifest)
    if "sigma_vec.0" not in state:
        return None
    if _octaves(state) is None:
        return Match(
            0.2, "vectors as in torch-ngp's TensoRF, but color_net takes no frequency encodings of basis_mat's"
        )
    kind = "VM" if "sigma_mat.0" in state else "CP"
    return Match(0.95, f"sigma_vec and color_net of torch-ngp's TensoRF, {kind}")


class TorchNgpTensorf(FormatBase):
    """Reads VM as ``tensorf`` and CP as ``tensorf-cp``."""

    def read(self, manifest: Manifest, options: ReadOptions) -> Parts:
        where = f"{manifest.path}: torch-ngp-tensorf"
        state = _state(manifest)
        planes = "sigma_mat.0" in state
        for key in [k for k in state if not (k in _BUFFERS or _OWN.fullmatch(k) or _BACKGROUND.fullmatch(k))][:1]:
            raise InputError(f"{where}: tensor {key!r} has no place in its TensoRF network")
        notes: list[str] = []
        if any(_BACKGROUND.fullmatch(k) for k in state):
            notes.append("its background network (bg_mat, bg_net) is left out: rays end on a white background")
        train, infer = _boxes(state, options, where)
        activation = options.extra.get("density_activation", "exp")
        if activation not in ("exp", "relu"):
            raise InputError(f"{where}: density_activation={activation!r}", hint="exp, or relu for old files")
        tensors: Tensors = {}
        config: Config = {
            **_factors(state, planes, tensors, where),
            **_network(state, tensors, where),
            "density_activation": activation,
            "density_shift": 0.0,
            "density_scale": 1.0,
            "box": train.to_json(),
            "padding": "none" if train == infer else "zero",
            "mask": None,
        }
        if "density_bitfield" in state:
            bound = infer.max[0]
            if any(abs(v) != bound for v in (*infer.min, *infer.max)) or bound <= 0:
                raise InputError(f"{where}: aabb_infer is {infer.min} .. {infer.max}, which is no cube around 0")
            state_dict.read_mask(state["density_bitfield"], bound, config, tensors, where, notes)
        scene = Scene(infer, background=(1.0, 1.0, 1.0), near=MIN_NEAR, step=STEP)
        guessed = () if "density_activation" in options.extra else ("density_activation",)
        scene = assume(scene, options, ("near", "step", "background", *guessed))
        step = {k: manifest.meta[k] for k in ("epoch", "global_step") if k in manifest.meta}
        provenance = {"program": "ashawkey/torch-ngp", "model": "tensoRF", **step}
        architecture = "tensorf" if planes else "tensorf-cp"
        return Parts(architecture, config, tensors, scene, provenance, (*notes, *assumption_note(scene)))


def _boxes(state: Mapping[str, LazyTensor], options: ReadOptions, where: str) -> tuple[Box, Box]:
    """(where the vertices lie, what rays are clipped to)."""
    found = []
    for key in ("aabb_train", "aabb_infer"):
        if key not in state:
            if options.bounds is None:
                raise InputError(f"{where}: tensor {key!r} is missing", hint="add --bounds (six numbers)")
            found.append(options.bounds)
            continue
        if state[key].shape != (6,):
            raise InputError(f"{where}: tensor {key!r} is {list(state[key].shape)}, not [6]")
        values = [float(v) for v in state[key].numpy()]
        try:
            found.append(Box((values[0], values[1], values[2]), (values[3], values[4], values[5])))
        except InputError as error:
            raise InputError(f"{where}: {key}: {error}") from error
    return found[0], found[1]


def _shape(state: Mapping[str, LazyTensor], key: str, pattern: tuple[int | None, ...], where: str) -> tuple[int, ...]:
    """The shape of ``key``; None in ``pattern`` is any size."""
    tensor = state.get(key)
    if tensor is None:
        raise InputError(f"{where}: tensor {key!r} is missing", hint="is the file complete?")
    fits = len(tensor.shape) == len(pattern) and all(p in (None, s) for p, s in zip(pattern, tensor.shape))
    if not fits or not tensor.dtype.startswith(("float", "bfloat")):
        wanted = ["*" if p is None else p for p in pattern]
        raise InputError(f"{where}: tensor {key!r} is {tensor.dtype} {list(tensor.shape)}, expected {wanted}")
    return tensor.shape


def _factors(state: Mapping[str, LazyTensor], planes: bool, tensors: Tensors, where: str) -> Config:
    """Matrices and vectors under the names of TensoRF, whose shapes they have."""
    n = [0, 0, 0]
    for i, (_, _, axis) in enumerate(PLANES):
        n[axis] = _shape(state, f"sigma_vec.{i}", (1, None, None, 1), where)[2]
    config: Config = {"resolution": n}
    for theirs, ours, key in (("sigma", "density", "density_rank"), ("color", "app", "color_rank")):
        ranks = []
        for i, (a, b, c) in enumerate(PLANES):
            ranks.append(_shape(state, f"{theirs}_vec.{i}", (1, None, n[c], 1), where)[1])
            tensors[f"{ours}_line.{i}"] = float32(state[f"{theirs}_vec.{i}"])
            if planes:
                _shape(state, f"{theirs}_mat.{i}", (1, ranks[i], n[b], n[a]), where)
                tensors[f"{ours}_plane.{i}"] = float32(state[f"{theirs}_mat.{i}"])
        if not planes and len(set(ranks)) != 1:
            raise InputError(f"{where}: vectors of {theirs} have the ranks {ranks}, products need equal ones")
        config[f"{key}s" if planes else key] = ranks if planes else ranks[0]
    mixed = sum(config["color_ranks"]) if planes else config["color_rank"]
    config["color_features"] = _shape(state, "basis_mat.weight", (None, mixed), where)[0]
    tensors["basis_mat.weight"] = float32(state["basis_mat.weight"])
    return config


def _network(state: Mapping[str, LazyTensor], tensors: Tensors, where: str) -> Config:
    """The colour network; the columns of its first layer in TensoRF's order."""
    octaves = _octaves(state)
    layers = sum(k.startswith("color_net.") for k in state)
    if octaves is None:
        _shape(state, "color_net.0.weight", (None, None), where)
        raise InputError(f"{where}: color_net.0.weight takes no frequency encodings of features and direction")
    features = state["basis_mat.weight"].shape[0]
    wide, width = (features + 3) * (1 + 2 * octaves), state["color_net.0.weight"].shape[0]
    for j in range(layers):
        out = 3 if j == layers - 1 else width
        _shape(state, f"color_net.{j}.weight", (out, wide if j == 0 else width), where)
        tensors[f"renderModule.mlp.{2 * j}.weight"] = float32(state[f"color_net.{j}.weight"])
    first, order = tensors["renderModule.mlp.0.weight"], _columns(features, octaves)
    tensors["renderModule.mlp.0.weight"] = Changed(
        first, first.shape, first.dtype, lambda a: np.ascontiguousarray(a[:, order])
    )
    return {
        "shading": "mlp",
        "fea_pe": octaves,
        "view_encoding": "frequency",
        "view_pe": octaves,
        "mlp_width": width if layers > 1 else 128,
        "mlp_layers": layers,
        "mlp_bias": False,
    }


def _columns(features: int, octaves: int) -> list[int]:
    """Which column of torch-ngp's input stands at each place of TensoRF's.

    torch-ngp: [f, sin f, cos f, sin 2f, cos 2f, ...] then the same of the direction (FE-A); TensoRF: [f, d, sines of f
    channel by channel, cosines of f, sines of d, cosines of d] (FE-C).
    """

    def waves(start: int, count: int) -> list[int]:
        return [start + count * (1 + 2 * k + cos) + c for cos in (0, 1) for c in range(count) for k in range(octaves)]

    at = features * (1 + 2 * octaves)
    return [*range(features), *range(at, at + 3), *waves(0, features), *waves(at, 3)]
