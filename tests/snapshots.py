"""Hand-made instant-ngp snapshots and their evaluation in float64, both from layouts section 1 alone."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
GRID = {"otype": "HashGrid", "n_levels": 4, "n_features_per_level": 2, "log2_hashmap_size": 9, "base_resolution": 5}
NET = {"otype": "FullyFusedMLP", "activation": "ReLU", "output_activation": "None", "n_neurons": 16}
SH = {"otype": "Composite", "nested": [{"n_dims_to_encode": 3, "otype": "SphericalHarmonics", "degree": 4},
                                       {"otype": "Identity", "n_bins": 4, "degree": 4}]}  # fmt: skip


def up(n: int, align: int) -> int:
    return (n + align - 1) // align * align


def levels_of(encoding: dict[str, Any], aabb_scale: int) -> list[tuple[float, int, int]]:
    """(scale, resolution, entries) of every level: layouts section 1.3."""
    kind = {"hashgrid": "hash", "densegrid": "dense", "tiledgrid": "tiled"}[encoding["otype"].lower()]
    count, table = encoding.get("n_levels", 16), encoding.get("log2_hashmap_size", 19)
    base = encoding.get("base_resolution") or 1 << (encoding.get("log2_hashmap_size", 15) // 3)
    b = encoding.get("per_level_scale") or np.exp(np.log(2048 * aabb_scale / base) / max(1, count - 1))
    out = []
    for level in range(count):
        scale = float(np.float32(np.exp2(level * np.log2(float(np.float32(b)))) * base - 1))
        res = int(np.ceil(scale)) + 1
        n = up(res**3, 8)
        n = min(n, 2**table) if kind == "hash" else min(n, base**3) if kind == "tiled" else n
        out.append((scale, res, n))
    return out


def network_shapes(root: dict[str, Any], encoded: int, seen: int, align: int) -> tuple[list[Any], list[Any]]:
    """[out, in] matrices of the density and of the colour network."""
    both = []
    outputs = up(root["network"].get("n_output_dims", 16), align)
    for key, wide, last in (("network", up(encoded, align), outputs), ("rgb_network", outputs + seen, up(3, align))):
        w, h = root[key]["n_neurons"], root[key]["n_hidden_layers"]
        both.append([(last, wide)] if h == 0 else [(w, wide), *[(w, w)] * (h - 1), (last, w)])
    return both[0], both[1]


def seen_width(root: dict[str, Any], extra: int, align: int) -> int:
    direction = root["dir_encoding"]
    if direction["otype"] == "Frequency":
        return up(6 * direction["n_frequencies"], align)
    first = direction["nested"][0] if direction["otype"] == "Composite" else direction
    return up(first.get("degree", 4) ** 2 + extra, align)


def make(
    encoding: dict[str, Any] | None = None,
    aabb_scale: int = 1,
    align: int = 16,
    codes: list[list[float]] | None = None,
    direction: dict[str, Any] | None = None,
    hidden: tuple[int, int] = (1, 2),
    half: bool = True,
    seed: int = 0,
    **snapshot: Any,
) -> dict[str, Any]:
    """The tree of a snapshot with random weights, in the program's keys."""
    root: dict[str, Any] = {
        "encoding": encoding or GRID,
        "network": {**NET, "n_hidden_layers": hidden[0]},
        "rgb_network": {**NET, "n_hidden_layers": hidden[1]},
        "dir_encoding": direction or SH,
        "loss": {"otype": "Huber"},
        "optimizer": {"otype": "Adam"},
    }
    extra = len(codes[0]) if codes else 0
    frequency = root["encoding"]["otype"] == "Frequency"
    features = root["encoding"].get("n_features_per_level", 2)
    levels = [] if frequency else levels_of(root["encoding"], aabb_scale)
    encoded = 6 * root["encoding"]["n_frequencies"] if frequency else len(levels) * features
    shapes = network_shapes(root, encoded, seen_width(root, extra, align), align)
    rng = np.random.default_rng(seed)
    parts = [rng.normal(0, (2 / i) ** 0.5, o * i) for net in shapes for o, i in net]
    parts.append(rng.uniform(-1, 1, sum(n for _, _, n in levels) * features))
    params = np.concatenate(parts).astype(np.float16 if half else np.float32)
    nerf: dict[str, Any] = {
        "aabb_scale": aabb_scale,
        "rgb": {"rays_per_batch": 4096, "measured_batch_size": 0, "measured_batch_size_before_compaction": 0},
        "dataset": {
            "n_images": 0,
            "scale": 0.33,
            "offset": [0.5, 0.5, 0.5],
            "aabb_scale": aabb_scale,
            "from_mitsuba": False,
            "is_hdr": False,
            "n_extra_learnable_dims": extra,
            "envmap_resolution": [0, 0],
        },
    }
    if codes:
        nerf["extra_dims_opt"] = [{"iter": 3, "variable": c, "learning_rate": 1e-4} for c in codes]
    root["snapshot"] = {
        "version": 1,
        "mode": "nerf",
        "n_params": len(params),
        "params_type": "__half" if half else "float",
        "params_binary": params.tobytes(),
        "nerf": nerf,
        "training_step": 1000,
        "loss": 0.001,
        "background_color": [0.0, 0.0, 0.0, 1.0],
        **snapshot,
    }
    return root


def put(path: Path, root: dict[str, Any], packed: bool = True) -> Path:
    raw = msgpack.packb(root)
    path.write_bytes(gzip.compress(raw) if packed else raw)
    return path


def harmonics(v: Array, degree: int) -> Array:
    """The first rows of layouts section 0.3, spelled out for degree <= 4."""
    x, y, z = v
    rows = [0.28209479177387814, -0.48860251190291987 * y, 0.48860251190291987 * z, -0.48860251190291987 * x,
            1.0925484305920792 * x * y, -1.0925484305920792 * y * z, 0.94617469575755997 * z * z - 0.31539156525251999,
            -1.0925484305920792 * x * z, 0.54627421529603959 * (x * x - y * y),
            0.59004358992664352 * y * (-3 * x * x + y * y), 2.8906114426405538 * x * y * z,
            0.45704579946446572 * y * (1 - 5 * z * z), 0.3731763325901154 * z * (5 * z * z - 3),
            0.45704579946446572 * x * (1 - 5 * z * z), 1.4453057213202769 * z * (x * x - y * y),
            0.59004358992664352 * x * (-x * x + 3 * y * y)]  # fmt: skip
    return np.array(rows[: degree**2])


def waves(v: Array, octaves: int) -> Array:
    """tiny-cuda-nn's Frequency: per coordinate, per octave sin and cos of 2^k pi v."""
    return np.array([f(2.0**k * np.pi * c) for c in v for k in range(octaves) for f in (np.sin, np.cos)])


def evaluate(
    root: dict[str, Any], x: Array, d: Array, align: int = 16, code: list[float] | None = None
) -> tuple[float, Array]:
    """(density, colour) at one point of the program's space: layouts sections 1.3 and 1.4, in float64."""
    snapshot = root["snapshot"]
    data = snapshot["nerf"]["dataset"]
    side = data["aabb_scale"]
    itype = np.float16 if snapshot["params_type"] == "__half" else np.float32
    params = np.frombuffer(snapshot["params_binary"], itype).astype(np.float64)
    u = (x - (0.5 - side / 2)) / side
    encoding = root["encoding"]
    frequency = encoding["otype"] == "Frequency"
    features = encoding.get("n_features_per_level", 2)
    levels = [] if frequency else levels_of(encoding, side)
    encoded = 6 * encoding["n_frequencies"] if frequency else len(levels) * features
    nets = []
    at = 0
    for net in network_shapes(root, encoded, seen_width(root, len(code or []), align), align):
        matrices = []
        for o, i in net:
            matrices.append(params[at : at + o * i].reshape(o, i))
            at += o * i
        nets.append(matrices)
    table = params[at:].reshape(-1, features) if levels else params[at:]
    assert frequency <= (len(table) == 0)
    e = waves(u, encoding["n_frequencies"]) if frequency else look_up(u, table, levels, encoding)
    fill = np.ones if frequency else np.zeros
    h = run(nets[0], np.concatenate([e, fill(nets[0][0].shape[1] - len(e))]))
    direction = root["dir_encoding"]
    v = (d + 1) / 2
    if direction["otype"] == "Frequency":
        seen = waves(v, direction["n_frequencies"])
        seen = np.concatenate([seen, np.ones(up(len(seen), align) - len(seen))])
    else:
        first = direction["nested"][0] if direction["otype"] == "Composite" else direction
        sh = harmonics(2 * v - 1, first.get("degree", 4))
        if code:
            seen = np.concatenate([sh, code, np.ones(up(len(sh) + len(code), align) - len(sh) - len(code))])
        else:
            seen = np.concatenate([np.ones(up(len(sh), align) - len(sh)), sh])
    raw = run(nets[1], np.concatenate([h, seen]))[:3]
    rgb = np.exp(np.clip(raw, -10, 10)) if data["is_hdr"] else 1 / (1 + np.exp(-raw))
    return float(np.exp(h[0])), rgb


def run(matrices: list[Array], x: Array) -> Array:
    for k, m in enumerate(matrices):
        x = m @ x
        x = np.maximum(x, 0) if k < len(matrices) - 1 else x
    return x


def look_up(u: Array, table: Array, levels: list[tuple[float, int, int]], encoding: dict[str, Any]) -> Array:
    out, offset = [], 0
    for scale, res, count in levels:
        pos = u * scale + 0.5
        cell = np.floor(pos).astype(int)
        f = pos - cell
        f = f * f * (3 - 2 * f) if encoding.get("interpolation") == "Smoothstep" else f
        f = 0 * f if encoding.get("interpolation") == "Nearest" else f
        total = np.zeros(table.shape[1])
        for corner in range(8):
            far = np.array([corner & 1, corner >> 1 & 1, corner >> 2 & 1])
            cx, cy, cz = (int(v) for v in cell + far)
            index = cx + cy * res + cz * res * res
            if encoding["otype"] == "HashGrid" and (res > 1625 or count < res**3):
                index = cx ^ cy * 2654435761 % 2**32 ^ cz * 805459861 % 2**32
            total += np.prod(np.where(far, f, 1 - f)) * table[offset + index % 2**32 % count]
        out.append(total)
        offset += count
    assert offset == len(table)
    return np.concatenate(out)
