"""apchenstu/TensoRF ``.th``: VMSplit, VM and CP (layouts section 3). Reads and writes; imports no torch.

The class is not in the file: the keys of ``state_dict`` tell. ``kwargs`` are the arguments of its constructor; what is
missing there has the constructor's default. ``alphaMask`` is part of the function: the renderer skips the rest.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pvdconvert.containers import Manifest
from pvdconvert.errors import InputError
from pvdconvert.plugin import Config, FormatBase, FormatSpec, Limits, Match, Parts, ReadOptions
from pvdconvert.scene import Box, RaySpace, Scene
from pvdconvert_formats import _tensorf_write as writer
from pvdconvert_formats._nerf_layers import Tensors, assume, assumption_note, positive
from pvdconvert_formats._tensorf_file import File

SPEC = FormatSpec(
    name="apchenstu-tensorf",
    title="apchenstu/TensoRF: .th, VM and CP decompositions",
    probe="pvdconvert_formats.apchenstu_tensorf:probe",
    code="pvdconvert_formats.apchenstu_tensorf:ApchenstuTensorf",
    architectures=("tensorf", "tensorf-cp"),
    suffixes=(".th",),
    versions="VMSplit, VM (one tensor), CP; shading MLP_Fea, MLP_PE, MLP, SH, RGB; alphaMask",
    verified="two files of the program (VMSplit; MLP_Fea, SH; alphaMask) with oracles of points and views; "
    "the other kinds: known answers derived in the tests",
    can_write=True,
    program="apchenstu/TensoRF",
    licence="MIT",
)
DEFAULTS: Mapping[str, Any] = {
    "shadingMode": "MLP_PE",
    "near_far": [2.0, 6.0],
    "density_shift": -10.0,
    "distance_scale": 25.0,
    "pos_pe": 6,
    "view_pe": 6,
    "fea_pe": 6,
    "step_ratio": 2.0,
    "fea2denseAct": "softplus",
    "alphaMask_thres": 0.001,
    "rayMarch_weight_thres": 0.0001,
}
"""Arguments of the constructor that a file may lack."""
_OWN = re.compile(r"(density|app)_(plane|line)\.[0-2]|(plane|line)_coef|basis_mat\.weight|renderModule\.mlp\.\d+\.\w+")
_TOP = {"kwargs", "state_dict", "alphaMask.shape", "alphaMask.mask", "alphaMask.aabb", writer.EXTRA}


def _state(manifest: Manifest) -> Tensors:
    return {k[11:]: t for k, t in manifest.tensors.items() if k.startswith("state_dict.")}


def _kind(state: Mapping[str, Any]) -> str | None:
    if "density_plane.0" in state:
        return "TensorVMSplit"
    if "density_line.0" in state:
        return "TensorCP"
    return "TensorVM" if "plane_coef" in state else None


def probe(manifest: Manifest) -> Match | None:
    if not manifest.kind.startswith("torch-") or not isinstance(manifest.tree, dict):
        return None
    kind = _kind(_state(manifest))
    if kind is None:
        return None
    if not isinstance(manifest.tree.get("kwargs"), dict):
        return Match(0.1, f"keys of a {kind}, but no kwargs of its constructor")
    return Match(0.95, f"kwargs and the state_dict of a {kind}")


class ApchenstuTensorf(FormatBase):
    """Reads every shading mode that the program can evaluate; writes VMSplit and CP."""

    def read(self, manifest: Manifest, options: ReadOptions) -> Parts:
        where = f"{manifest.path}: apchenstu-tensorf"
        tree = manifest.tree
        kwargs = tree.get("kwargs") if isinstance(tree, dict) else None
        state = _state(manifest)
        kind = _kind(state)
        if not isinstance(kwargs, dict) or kind is None:
            raise InputError(f"{where}: it has no kwargs with the state_dict of a TensoRF model")
        for key in [k for k in state if not _OWN.fullmatch(k)][:1]:
            raise InputError(f"{where}: tensor {key!r} has no place in a {kind}")
        file = File(where, state, {**DEFAULTS, **kwargs})
        own = tree.get(writer.EXTRA)
        own = own if isinstance(own, dict) else {}
        box = file.box(manifest.tensors.get("kwargs.aabb"), "kwargs.aabb")
        factors, tensors = {"TensorVMSplit": file.split, "TensorCP": file.cp, "TensorVM": file.vm}[kind]()
        resolution = factors["resolution"]
        config: Config = {**factors, **file.shading(tensors), **file.density(), "mask": None}
        config["box"] = box.to_json()
        notes: list[str] = []
        if "alphaMask.mask" in manifest.tensors and not isinstance(own.get("mask"), dict):
            file.alpha_mask(manifest, config, tensors)
        elif isinstance(own.get("mask"), dict):
            config["mask"] = {key: own["mask"].get(key) for key in ("shape", "origin", "cell")}
            bits = manifest.tensors.get(f"{writer.EXTRA}.mask.bits")
            if bits is None:
                raise InputError(f"{where}: {writer.EXTRA}.mask.bits is missing", hint="is the file complete?")
            tensors["mask.bits"] = bits
        if isinstance(own.get("box"), dict):
            config["box"] = own["box"]
        scene = self._scene(file, box, resolution, options, own)
        if scene.ray_space.kind == "ndc" and config["shading"] != "rgb":
            config["view_space"] = "ndc"  # as the program does with --ndc_ray
        unknown = [k for k in tree if k not in _TOP]
        if unknown:
            notes.append(f"left out, the program does not read it: {', '.join(sorted(map(str, unknown)))}")
        plain = {k: v for k, v in file.kwargs.items() if type(v) in (int, float, str, bool)}
        scalars = {k: v for k, v in plain.items() if not isinstance(v, float) or math.isfinite(v)}
        provenance = {"program": "apchenstu/TensoRF", "model": kind, "kwargs": scalars}
        architecture = "tensorf-cp" if kind == "TensorCP" else "tensorf"
        return Parts(architecture, config, tensors, scene, provenance, (*notes, *assumption_note(scene)))

    def _scene(
        self, file: File, box: Box, resolution: list[int], options: ReadOptions, own: Mapping[str, Any]
    ) -> Scene:
        if isinstance(own.get("scene"), dict):
            try:
                scene = Scene.from_json(own["scene"])
            except (InputError, AttributeError) as error:
                raise InputError(f"{file.where}: {writer.EXTRA}.scene: {error}") from error
            return assume(scene, options, scene.assumed)
        near, far = file.pair("near_far")
        if (near, far) == (0.0, 1.0) and box.min[2] >= -1.001 and box.max[2] <= 1.001:
            # Only the program's loader of forward-facing scenes samples from 0 to 1: in NDC, on black.
            width, height, focal = (positive(options, key, file.where) for key in ("width", "height", "focal"))
            space = RaySpace("ndc", width=width, height=height, focal=focal, near=1.0)
            assumed = ("background", *(("ray_space",) if None in (width, height, focal) else ()))
            return assume(Scene(box, background=(0.0,) * 3, near=near, far=far, ray_space=space), options, assumed)
        spacing = sum(s / (n - 1) for s, n in zip(box.size, resolution)) / 3
        step = spacing * file.number("step_ratio")
        scene = Scene(box, background=(1.0, 1.0, 1.0), near=near, far=far, step=step if step > 0 else None)
        return assume(scene, options, ("background",))

    def limits(self, architecture: str) -> Limits:
        # The rest of what the layout fixes has several values that files of the program use; write() names the misfit.
        fixed = {"view_encoding": "frequency", "mlp_layers": 3, "mlp_bias": True}
        return Limits(fixed, writer.PROGRAM, cells=128)

    def write(self, parts: Parts, path: Path) -> None:
        """A student's mask becomes an alphaMask of twice as many vertices, which cuts exactly the same cells."""
        writer.write(parts, path)
