"""megvii-research/AAAI2023-PVD ``.pth`` with ``args.txt``: hash, mlp, vm, tensors (layouts section 8). No torch.

All four clip the log-density to [-2, 7], so that space is full of fog of density 0.135 that ``density_bitfield`` alone
hides: it is part of the function.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pvdconvert.containers import Manifest, torch_zip_writer
from pvdconvert.errors import InputError
from pvdconvert.plugin import Config, FormatBase, FormatSpec, LazyTensor, Limits, Match, Parts, ReadOptions
from pvdconvert.scene import Box, Scene
from pvdconvert_formats import _pvd_kinds as kinds
from pvdconvert_formats import _pvd_writer as writer
from pvdconvert_formats import _torch_ngp_grid as grids
from pvdconvert_formats import _torch_ngp_state as torch_ngp_state
from pvdconvert_formats._nerf_layers import assume, assumption_note
from pvdconvert_formats._pvd_args import SIGMA_CLIP, Args, read_args
from pvdconvert_formats._pvd_writer import EXTRA, LEVELS

SPEC = FormatSpec(
    name="aaai2023-pvd",
    title="megvii-research/AAAI2023-PVD: .pth with args.txt",
    probe="pvdconvert_formats.aaai2023_pvd:probe",
    code="pvdconvert_formats.aaai2023_pvd:Aaai2023Pvd",
    architectures=("ngp", "nerf", "tensorf", "plenoxels"),
    suffixes=(".pth",),
    can_write=True,
    writes=("ngp", "tensorf"),
    versions="hash, mlp, vm and tensors, of just_train_tea and distill_mutual; writes hash and vm",
    verified="vm: a file of the program's own code with its oracle; hash, mlp, tensors: known answers in the tests",
    program="megvii-research/AAAI2023-PVD",
    licence="MIT",
)
STEP = 2 * math.sqrt(3) / 1024
MIN_NEAR = 0.2
_BUFFERS = {"aabb_train", "aabb_infer", "density_grid", "density_bitfield", "step_counter", "encoder.offsets"}
_MARKS = {
    "hash": ("encoder.embeddings", "encoder.offsets", "sigma_net.0.weight", "color_net.0.weight"),
    "mlp": ("nerf_mlp.0.weight", "nerf_mlp.0.bias", "sigma_net.0.weight", "color_net.0.weight"),
    "vm": ("sigma_mat.0", "sigma_vec.0", "color_mat.0", "basis_mat.weight", "color_net.0.weight"),
    "tensors": ("tensor_volume.0",),
}
_OWN = {
    "hash": r"(sigma_net|color_net)\.\d+\.weight|encoder\.embeddings",
    "mlp": r"(sigma_net|color_net)\.\d+\.weight|nerf_mlp\.\d+\.(weight|bias)",
    "vm": r"(sigma|color)_(mat|vec)\.\d|color_net\.\d+\.weight|basis_mat\.weight",
    "tensors": r"tensor_volume\.0",
}


def _state(manifest: Manifest) -> dict[str, LazyTensor]:
    """The state_dict's tensors: under "model", or bare."""
    prefix = "model." if any(k.startswith("model.") for k in manifest.tensors) else ""
    return {k.removeprefix(prefix): t for k, t in manifest.tensors.items() if k.startswith(prefix)}


def _kind(state: Mapping[str, LazyTensor]) -> str | None:
    """Which of the four models ``state`` is, or None."""
    if "tensor_volume.0" in state:
        return "tensors" if len(state["tensor_volume.0"].shape) == 5 else None
    if "nerf_mlp.0.weight" in state:
        return "mlp"
    if "sigma_mat.0" in state and "basis_mat.weight" in state and "color_net.0.weight" in state:
        # torch-ngp's own VM shows its colour network encoded features and no harmonics.
        shapes = (state["basis_mat.weight"].shape, state["color_net.0.weight"].shape)
        fits = all(len(s) == 2 for s in shapes) and shapes[1][1] == shapes[0][0] + kinds.SH_BANDS**2
        return "vm" if fits else None
    if all(k in state for k in _MARKS["hash"]) and state["encoder.offsets"].shape == (LEVELS + 1,):
        return "hash" if state["sigma_net.0.weight"].shape[1:] == (2 * LEVELS,) else None
    return None


def probe(manifest: Manifest) -> Match | None:
    if not manifest.kind.startswith("torch-"):
        return None
    state = _state(manifest)
    kind = _kind(state)
    if kind is None:
        return None
    missing = [k for k in (*_MARKS[kind], "aabb_train") if k not in state]
    if missing:
        return Match(0.25, f"looks like PVD's {kind} model, but {missing[0]!r} is missing")
    odd = _surplus(state, kind)
    if odd:
        return Match(0.25, f"looks like PVD's {kind} model, but has {odd[0]!r}")
    return Match(0.96, f"PVD's {kind} model: {_MARKS[kind][0]} with {_MARKS[kind][-1]} and aabb_train")


def _surplus(state: Mapping[str, LazyTensor], kind: str) -> list[str]:
    own = re.compile(_OWN[kind] + r"|bg_net\.\d+\.weight|encoder_bg\.(embeddings|offsets)")
    return sorted(k for k in state if k not in _BUFFERS and not own.fullmatch(k))


class Aaai2023Pvd(FormatBase):
    """Reads all four; writes hash (``ngp``) and vm (``tensorf``), with a density_bitfield as evaluation needs it."""

    def read(self, manifest: Manifest, options: ReadOptions) -> Parts:
        where = f"{manifest.path}: aaai2023-pvd"
        state = _state(manifest)
        kind = _kind(state)
        if kind is None:
            raise InputError(f"{where}: none of hash, mlp, vm, tensors", hint="see pvdconvert inspect for the keys")
        for key in _surplus(state, kind)[:1]:
            raise InputError(f"{where}: tensor {key!r} has no place in its {kind} model")
        own = manifest.tree.get(EXTRA) if isinstance(manifest.tree, dict) else None
        own = own if isinstance(own, dict) else {}
        args = read_args(manifest, options, own, where)
        trained, infer = (_box(state, key, where) for key in ("aabb_train", "aabb_infer"))
        bound = infer.max[0]
        if bound <= 0 or any(abs(v) != bound for v in (*infer.min, *infer.max)):
            raise InputError(f"{where}: aabb_infer is {infer.min} .. {infer.max}, which is no cube around 0")
        notes: list[str] = []
        config: Config = {}
        tensors: dict[str, LazyTensor] = {}
        exact, bits = own.get("mask"), manifest.tensors.get(f"{EXTRA}.mask.bits")
        if isinstance(exact, dict) and bits is not None:
            config["mask"] = {key: exact.get(key) for key in ("shape", "origin", "cell")}
            tensors["mask.bits"] = bits
        elif "density_bitfield" in state:
            torch_ngp_state.read_mask(state["density_bitfield"], bound, config, tensors, where, notes)
        else:
            notes.append("no density_bitfield: its fog shows wherever log-density is at its lower bound")
        architecture, made, found = self._model(kind, state, trained, infer, config, tensors, options, own, args, where)
        tensors |= found
        if any(k.startswith("bg_net.") for k in state):
            notes.append("its background network (bg_net) is left out, as the program's own renderer does")
        assumed = tuple(f"{name}" for name in args.assumed)
        if "sigma_clip" in assumed:
            notes.append(
                f"sigma_clip is not in the file: the program's default {args.clip} assumed (--config args.txt)"
            )
        if kind == "vm" and args.distill is None:
            notes.append("which program wrote it is not in the file: colour features are not cut (--config args.txt)")
        s = 1 / args.scale
        world = ((0.0, 0.0, s, 0.0), (s, 0.0, 0.0, 0.0), (0.0, s, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0))
        white = tuple(own.get("background", (1.0, 1.0, 1.0)))
        scene = Scene(infer, world=world, background=white, near=MIN_NEAR, step=STEP)
        guessed = ("near", "step", *(() if "background" in own else ("background",)), *assumed)
        scene = assume(scene, options, guessed)
        step = {k: manifest.meta[k] for k in ("epoch", "global_step") if k in manifest.meta}
        provenance = {"program": "megvii-research/AAAI2023-PVD", "model_type": kind, **step}
        return Parts(architecture, made, tensors, scene, provenance, (*notes, *assumption_note(scene)))

    def _model(
        self,
        kind: str,
        state: Mapping[str, LazyTensor],
        trained: Box,
        infer: Box,
        config: Config,
        tensors: dict[str, LazyTensor],
        options: ReadOptions,
        own: Mapping[str, Any],
        args: Args,
        where: str,
    ) -> tuple[str, Config, dict[str, LazyTensor]]:
        clip = {**config, "density_clip": list(args.clip)}
        if kind == "vm":
            exact = own.get("box")
            found, out = kinds.vm(state, Box.from_json(exact) if isinstance(exact, dict) else trained, where)
            cut = {"feature_clip": list(args.clip)} if args.distill else {}
            return "tensorf", found | clip | cut, out
        if kind == "mlp":
            found, out = kinds.mlp(state, where)
            return "nerf", found | clip, out
        if kind == "tensors":
            found, out = kinds.volume(state, trained, infer, config, tensors, where)
            return "plenoxels", found | clip, out
        bound = infer.max[0]
        notes: list[str] = []
        grid, _ = torch_ngp_state.read_grid(state, bound, options, own, where, notes)
        nets = torch_ngp_state.read_networks(state, grid, where)
        out = {k: t for k, t in state.items() if re.fullmatch(_OWN["hash"], k)}
        box = {"box": [[-bound] * 3, [bound] * 3], "index_rule": "torch-ngp"}
        return "ngp", {**box, **grid, **nets, **clip}, out

    def limits(self, architecture: str) -> Limits:
        clip = {"density_clip": list(SIGMA_CLIP)}
        if architecture == "ngp":
            # box: the scene's own, a cube around 0.
            return Limits({**writer.HASH, "box": None}, {"finest_per_unit": 1024, **clip}, cells=grids.GRID)
        if architecture == "tensorf":
            # distill_mutual, which opens such files, cuts the colour features as well.
            return Limits(writer.VM, {**clip, "feature_clip": list(SIGMA_CLIP)}, cells=grids.GRID)
        return Limits()

    def write(self, parts: Parts, path: Path) -> None:
        torch_zip_writer.write(path, writer.build(parts, f"{path}: aaai2023-pvd"))


def _box(state: Mapping[str, LazyTensor], key: str, where: str) -> Box:
    if key not in state or state[key].shape != (6,):
        shape = list(state[key].shape) if key in state else "missing"
        raise InputError(f"{where}: tensor {key!r} is {shape}, expected [6]", hint="is the file complete?")
    a, b, c, d, e, f = (float(v) for v in state[key].numpy())
    try:
        return Box((a, b, c), (d, e, f))
    except InputError as error:
        raise InputError(f"{where}: {key}: {error}") from error
