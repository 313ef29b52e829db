"""Jiayi-Pan/NeRF ``*.pt``: one network in float64, encodings ordered by coordinate. Imports no torch.

Keys ``model_state_dict`` of fc_1.0 .. fc_D.0 (ReLU; a skip's input is [encoded, hidden]), sigma, fc_noact, fc_dir.0,
rgb.0. The program hands ray directions to the network as the camera makes them, (x/f, y/f, -1), not of length 1; its
density is per unit of depth along the camera's axis.
"""

from __future__ import annotations

from pvdconvert.containers import Manifest
from pvdconvert.errors import InputError
from pvdconvert.plugin import Config, FormatBase, FormatSpec, Match, Parts, ReadOptions
from pvdconvert_formats import _nerf_layers as nerf

SPEC = FormatSpec(
    name="jiayi",
    title="Jiayi-Pan/NeRF: *.pt",
    probe="pvdconvert_formats.jiayi:probe",
    code="pvdconvert_formats.jiayi:Jiayi",
    architectures=("nerf",),
    suffixes=(".pt",),
    verified="a real file and its PSNR on a held-out view",
    program="Jiayi-Pan/NeRF",
    licence="GPL-3.0",
    pixel_offset=0.0,
)
_PREFIX = "model_state_dict."
_MARKS = ("fc_1.0.weight", "fc_noact.weight", "fc_dir.0.weight", "sigma.weight", "rgb.0.weight")
MEAN_LENGTH = 1.0424
"""Root mean square of |(x/f, y/f, -1)| over a picture whose half side is 0.36 f: NeRF-Synthetic's field of view."""


def probe(manifest: Manifest) -> Match | None:
    prefix = _prefix(manifest)
    found = sum(prefix + mark in manifest.tensors for mark in _MARKS)
    if found == len(_MARKS):
        return Match(0.9, "fc_1.0 .. fc_noact, fc_dir.0, sigma and rgb.0")
    return Match(0.1, f"{found} of its {len(_MARKS)} kinds of layers") if found > 1 else None


def _prefix(manifest: Manifest) -> str:
    return _PREFIX if any(name.startswith(_PREFIX) for name in manifest.tensors) else ""


class Jiayi(FormatBase):
    """Reads it. Weights are rounded to float32; the direction's length becomes its mean over a picture."""

    def read(self, manifest: Manifest, options: ReadOptions) -> Parts:
        where, prefix = f"{manifest.path}: jiayi", _prefix(manifest)
        own = {k.removeprefix(prefix): t for k, t in manifest.tensors.items() if k.startswith(prefix)}
        layers = nerf.Layers(where, own)
        config: Config = layers.trunk(nerf.numbered(own, r"fc_(\d+)\.0", where), "fine")
        width = config["width"]
        layers.take("sigma", "fine.density", width, 1)
        _, bottleneck = layers.take("fc_noact", "fine.bottleneck", width)
        wide, units = layers.take("fc_dir.0", "fine.direction.0")
        octaves = layers.direction_frequencies(wide - bottleneck, config["include_input"], "fc_dir.0.weight")
        layers.take("rgb.0", "fine.rgb", units, 3)
        for key in sorted(own.keys() - layers.used)[:1]:
            raise InputError(f"{where}: tensor {key!r} has no place in this network")
        length = nerf.positive(options, "direction_length", where)
        config |= {
            "direction_frequencies": octaves,
            "bottleneck_width": bottleneck,
            "direction_layers": [units],
            "encoding_order": "per-coordinate",
            "direction_length": length or MEAN_LENGTH,
            "density_scale": 1 / (length or MEAN_LENGTH),
        }
        notes = []
        if any(t.dtype == "float64" for t in own.values()):
            notes.append("float64 weights are rounded to float32")
        if length is None:
            notes.append(
                f"view directions and depths are not of length 1 in this program: the mean length {MEAN_LENGTH} at "
                "NeRF-Synthetic's field of view is used (direction_length)"
            )
        background = (0.0, 0.0, 0.0)
        scene = nerf.assume(nerf.synthetic_scene(background), options, ("box", "background", "near", "far"))
        provenance = {"program": "Jiayi-Pan/NeRF", "step": manifest.meta.get("epoch")}
        return Parts(
            "nerf", nerf.two_networks(config, None, where), layers.tensors, scene, provenance,
            (*notes, *nerf.assumption_note(scene)),
        )  # fmt: skip
