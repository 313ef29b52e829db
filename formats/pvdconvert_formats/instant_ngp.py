"""NVlabs/instant-ngp snapshots: ``.ingp`` (gzip), ``.msgpack``, JSON (layouts section 1). Imports no torch.

The scene's world is the program's own space: the model fills a cube of side aabb_scale around (0.5, 0.5, 0.5);
``Scene.world`` leads to the data set's coordinates. The density grid is part of the function: the program draws nothing
where it is free. Colours are sRGB unless the data set is HDR (or ``linear_colors=true`` is given).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pvdconvert.containers import Manifest
from pvdconvert.containers.values import ITEM_SIZE, RawTensor
from pvdconvert.errors import InputError
from pvdconvert.plugin import (
    ArrayTensor,
    Config,
    FormatBase,
    FormatSpec,
    LazyTensor,
    Limits,
    Match,
    Parts,
    ReadOptions,
)
from pvdconvert.scene import Scene
from pvdconvert_formats import _instant_ngp_frequency as frequency
from pvdconvert_formats import _instant_ngp_model as model
from pvdconvert_formats import _instant_ngp_scene as surroundings
from pvdconvert_formats import _instant_ngp_write as writer
from pvdconvert_formats import _tcnn as tcnn
from pvdconvert_formats._nerf_layers import assume
from pvdconvert_formats._torch_ngp_grid import GRID

SPEC = FormatSpec(
    name="instant-ngp",
    title="NVlabs/instant-ngp: snapshots of the NeRF mode",
    probe="pvdconvert_formats.instant_ngp:probe",
    code="pvdconvert_formats.instant_ngp:InstantNgp",
    architectures=("ngp",),
    suffixes=(".ingp", ".msgpack"),
    can_write=True,
    versions=(
        "v0 and v1, .msgpack, .ingp (gzip or zlib), JSON; FullyFusedMLP and CutlassMLP; Hash, Dense and Tiled grids, "
        "and Frequency encodings (read as nerf); writes v1"
    ),
    verified=(
        "known answers on hand-made snapshots, from the layout's formulas in float64; its tables of parameter counts; "
        "no file of the program itself"
    ),
    program="NVlabs/instant-ngp",
    licence="MIT",
)
_MODES = ("sdf", "image", "volume")
_KNOWN_BLOBS = ("params_binary", "density_grid_binary")


def _root(manifest: Manifest) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """(network configuration, snapshot), or None where this is no snapshot."""
    tree = manifest.tree
    snapshot = tree.get("snapshot") if isinstance(tree, dict) else None
    return (tree, snapshot) if isinstance(snapshot, dict) and "params_binary" in snapshot else None


def probe(manifest: Manifest) -> Match | None:
    if manifest.kind not in ("msgpack", "gzip", "zlib", "json"):
        return None
    found = _root(manifest)
    if found is None:
        return None
    mode = found[1].get("mode", "nerf")
    version = found[1].get("version", 0)
    return Match(1.0, f"a snapshot of version {version!s:.10} with params_binary, mode {mode!s:.20}")


def _table(parent: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = parent.get(key)
    return value if isinstance(value, dict) else {}


def _blob(value: Any, key: str, where: str) -> LazyTensor:
    """The bytes ``key``, uint8 [n]: msgpack's bin, or JSON's {"bytes": [...], "subtype": ...}."""
    if isinstance(value, RawTensor) and value.dtype == "uint8":
        return value
    if isinstance(value, dict) and isinstance(value.get("bytes"), list):
        try:
            return ArrayTensor(np.array(value["bytes"], dtype=np.uint8))
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{where}: {key} holds what is no byte: {error}") from error
    raise InputError(f"{where}: {key} is no binary")


def _params(snapshot: Mapping[str, Any], where: str) -> LazyTensor:
    """The parameter vector, float16 or float32."""
    blob = _blob(snapshot["params_binary"], "params_binary", where)
    size, count = blob.shape[0], snapshot.get("n_params")
    said = snapshot.get("params_type")
    names = {"__half": "float16", "half": "float16", "float": "float32"}
    if said is None:  # before 2022-09-22
        each = size // count if isinstance(count, int) and count > 0 else 0
        dtype = {2: "float16", 4: "float32"}.get(each, "")
    else:
        dtype = names.get(str(said), "")
    if not dtype:
        raise InputError(
            f"{where}: params_type {said!r:.40}, n_params {count!r:.20}: the type of its weights is unknown"
        )
    if size % ITEM_SIZE[dtype] or count not in (None, size // ITEM_SIZE[dtype]):
        raise InputError(f"{where}: params_binary holds {size} bytes, {count} {dtype} were expected")
    if isinstance(blob, RawTensor):
        return RawTensor((size // ITEM_SIZE[dtype],), dtype, blob.load)
    return ArrayTensor(blob.numpy().view(np.dtype(dtype).newbyteorder("<")))


def _extra_dims(nerf: Mapping[str, Any], dataset: Mapping[str, Any], options: ReadOptions, where: str) -> list[float]:
    """What the network is told of an image beside the direction: its latent code and light."""
    stored = nerf.get("extra_dims_opt")
    found = [c.get("variable") for c in stored if isinstance(c, dict)] if isinstance(stored, list) else []
    codes = [c for c in found if isinstance(c, list) and c]
    learned = dataset.get("n_extra_learnable_dims") or 0
    if not codes and not learned:
        return []
    text = options.extra.get("image", "0")
    image = int(text) if text.isdecimal() else -1
    if not 0 <= image < len(codes):
        raise InputError(
            f"{where}: image={text!r:.20}: the snapshot has the codes of {len(codes)} images",
            hint=f"--extra image=0 .. {len(codes) - 1}" if codes else "it was saved without its training images",
        )
    if not all(isinstance(v, (int, float)) for v in codes[image]):
        raise InputError(f"{where}: nerf.extra_dims_opt[{image}].variable holds what is no number")
    return [float(v) for v in codes[image]]


class InstantNgp(FormatBase):
    """Reads every snapshot of the NeRF mode; writes version 1."""

    def read(self, manifest: Manifest, options: ReadOptions) -> Parts:
        where = f"{manifest.path}: instant-ngp"
        found = _root(manifest)
        if found is None:
            raise InputError(f"{where}: no map with 'snapshot' and 'params_binary' in it")
        root, snapshot = found
        notes: list[str] = []
        nerf = _table(snapshot, "nerf")
        if (mode := str(snapshot.get("mode", "nerf" if nerf or "mode" not in snapshot else "")).lower()) != "nerf":
            hint = "only radiance fields can be converted" if mode in _MODES else ""
            raise InputError(f"{where}: a snapshot of the mode {mode!r:.20}, not of a radiance field", hint=hint)
        dataset = _table(nerf, "dataset")
        aabb_scale = self._aabb_scale(dataset, nerf, where)
        extra = tuple(_extra_dims(nerf, dataset, options, where))
        if extra:
            notes.append(
                f"seen as image {options.extra.get('image', '0')} sees it (latent code of {len(extra)} numbers)"
            )
        vector = tcnn.Vector(_params(snapshot, where))
        config: Config
        tensors: dict[str, LazyTensor]
        hdr = bool(dataset.get("is_hdr"))
        encoding = model.section(root, "encoding", where)
        if model.otype(encoding) == "frequency":
            architecture = "nerf"
            config, tensors = frequency.read(root, vector, extra, hdr, where)
        else:
            architecture = "ngp"
            config, tensors = self._grid(root, encoding, vector, extra, hdr, aabb_scale, where)
        own = writer.read_extra(snapshot)
        box = surroundings.model_box(aabb_scale)
        if architecture == "ngp":
            config["box"] = [list(box.min), list(box.max)]
        else:
            config["box"] = box.to_json()
        if "density_grid_binary" in snapshot:
            blob = _blob(snapshot["density_grid_binary"], "density_grid_binary", where)
            size = snapshot.get("density_grid_size", GRID)
            if size != GRID:
                raise InputError(f"{where}: density_grid_size is {size!r:.20}, not {GRID}")
            try:
                surroundings.read_mask(blob, not snapshot.get("version"), aabb_scale, config, tensors, notes)
            except InputError as error:
                raise InputError(f"{where}: {error}") from error
        scene = self._scene(snapshot, dataset, box, hdr, options, where, notes)
        self._left_out(manifest, snapshot, dataset, notes)
        if own:
            config, scene = writer.restore(own, config, tensors, scene, manifest, where)
        scene = assume(scene, options, tuple(a for a in scene.assumed))
        said = {k: snapshot[k] for k in ("training_step", "loss", "version") if type(snapshot.get(k)) in (int, float)}
        provenance = {"program": "NVlabs/instant-ngp", **{k: v for k, v in said.items() if math.isfinite(v)}}
        return Parts(architecture, config, tensors, scene, provenance, tuple(notes))

    @staticmethod
    def _aabb_scale(dataset: Mapping[str, Any], nerf: Mapping[str, Any], where: str) -> float:
        value = dataset.get("aabb_scale", nerf.get("aabb_scale", 1))
        if not isinstance(value, (int, float)) or value not in [2**k for k in range(8)]:
            raise InputError(f"{where}: aabb_scale is {value!r:.20}, not a power of two up to 128")
        return float(value)

    @staticmethod
    def _grid(
        root: Mapping[str, Any],
        encoding: Mapping[str, Any],
        vector: tcnn.Vector,
        extra: tuple[float, ...],
        hdr: bool,
        aabb_scale: float,
        where: str,
    ) -> tuple[Config, dict[str, LazyTensor]]:
        """(configuration, tensors) of ``ngp``."""
        grid = model.read_grid(encoding, aabb_scale, where)
        rows, encoded = model.grid_entries(grid, where), grid["levels"] * grid["features"]
        shapes = model.fit_shapes(root, encoded, rows * grid["features"], extra, vector.left, where)
        if shapes.direction.frequencies is not None:
            raise InputError(f"{where}: dir_encoding Frequency beside a grid is not supported")
        tensors, constants = model.take_networks(vector, shapes, encoded)
        tensors["encoder.embeddings"] = vector.grid(rows, grid["features"])
        config = {
            **grid,
            "hidden": shapes.density.width,
            "density_layers": shapes.density.hidden,
            "geo_features": shapes.density.outputs - 1,
            "color_hidden": shapes.color.width,
            "color_layers": shapes.color.hidden,
            "sh_bands": shapes.direction.bands,
            "color_input": "h+sh",
            "color_constants": constants or None,
            "density_activation": "exp",
            "color_activation": "exp" if hdr else "sigmoid",
            "density_scale": 1.0,
            "mask": None,
        }
        return config, tensors

    @staticmethod
    def _scene(
        snapshot: Mapping[str, Any],
        dataset: Mapping[str, Any],
        box: Any,
        hdr: bool,
        options: ReadOptions,
        where: str,
        notes: list[str],
    ) -> Scene:
        crops = [snapshot.get("render_aabb"), dataset.get("render_aabb")]
        turned = snapshot.get("render_aabb_to_local") or dataset.get("render_aabb_to_local")
        clipped = surroundings.clip_box(box, crops, notes)
        if clipped != box and surroundings.turned(turned):
            notes.append("its crop box is turned (render_aabb_to_local): left out")
            clipped = box
        linear = options.extra.get("linear_colors", "true" if hdr else "false").lower()
        if linear not in ("true", "false"):
            raise InputError(f"{where}: linear_colors={linear!r:.20} is neither true nor false")
        color = surroundings.background(snapshot.get("background_color"))
        assumed = ("step",) if color is not None else ("background", "step")
        black = (0.0, 0.0, 0.0)
        return Scene(
            clipped,
            world=surroundings.to_dataset(dataset),
            background=black if color is None else (float(color[0]), float(color[1]), float(color[2])),
            color_space="linear" if linear == "true" else "srgb",
            step=surroundings.STEP,
            cameras=surroundings.read_cameras(dataset, notes),
            assumed=assumed,
        )

    @staticmethod
    def _left_out(
        manifest: Manifest, snapshot: Mapping[str, Any], dataset: Mapping[str, Any], notes: list[str]
    ) -> None:
        """Say what is not taken over."""
        others = [k for k in manifest.tensors if k.rpartition(".")[2] not in _KNOWN_BLOBS]
        others = [k for k in others if not k.startswith("snapshot.pvdconvert.")]
        if any(k.startswith("snapshot.optimizer") for k in others):
            notes.append("the optimizer's state is left out")
        notes += [f"{k} is left out" for k in others if not k.startswith("snapshot.optimizer")]
        size = dataset.get("envmap_resolution")
        if isinstance(size, list) and any(isinstance(v, (int, float)) and v > 0 for v in size):
            notes.append("its environment map is in no snapshot: rays end on the background")

    def limits(self, architecture: str) -> Limits:
        return writer.limits(architecture)

    def write(self, parts: Parts, path: Path) -> None:
        writer.write(parts, path)
