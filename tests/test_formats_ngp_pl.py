"""ngp_pl, and torch-ngp's tcnn and ff: files in the programs' shapes, against the formulas in float64."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pvdconvert import registry
from pvdconvert.containers import open_manifest
from pvdconvert.errors import InputError
from pvdconvert.identify import identify
from pvdconvert.loading import to_torch
from pvdconvert.plugin import FormatBase, Parts, ReadOptions
from pvdconvert.scene import Box
from pvdconvert_formats import ngp_pl, torch_ngp
from pvdconvert_formats.instant_ngp import InstantNgp
from tests.snapshots import harmonics, levels_of, look_up, run

Array = NDArray[np.float64]
GRID: dict[str, Any] = {"otype": "HashGrid", "n_levels": 16, "log2_hashmap_size": 19, "base_resolution": 16}


def grid_of(finest: float) -> dict[str, Any]:
    return {**GRID, "per_level_scale": float(np.exp(np.log(finest / 16) / 15))}


def normal(count: int, fan_in: int, seed: int) -> Array:
    return np.random.default_rng(seed).normal(0, (2 / fan_in) ** 0.5, count)


def table_of(grid: dict[str, Any], seed: int = 5) -> Array:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, 2 * sum(n for _, _, n in levels_of(grid, 1)))


def tensor(x: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(x, np.float32))


def agree(parts: Parts, truth: Any, count: int = 16) -> None:
    """The loaded field against ``truth(x, d) -> (density, colour)`` at points of its box."""
    rng = np.random.default_rng(7)
    low, high = np.array(parts.config["box"])
    x = rng.uniform(low, high, (count, 3)).astype(np.float32)
    d = rng.normal(size=(count, 3))
    d = (d / np.linalg.norm(d, axis=1, keepdims=True)).astype(np.float32)
    field = registry.default().architecture("ngp").load(dict(parts.config), to_torch(parts.tensors, "x"), parts.scene)
    field.mask = None
    with torch.no_grad():
        sigma, rgb = field(torch.from_numpy(x), torch.from_numpy(d))
    for k in range(count):
        density, color = truth(x[k].astype(np.float64), d[k].astype(np.float64))
        assert abs(float(sigma[k]) - density) < 1e-3 * (1 + density)
        np.testing.assert_allclose(rgb[k].double().numpy(), color, atol=2e-3)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def matrices(flat: Any, *shapes: tuple[int, int]) -> list[Array]:
    flat, out, at = np.asarray(flat, np.float64), [], 0
    for rows, columns in shapes:
        out.append(flat[at : at + rows * columns].reshape(rows, columns))
        at += rows * columns
    assert at == len(flat)
    return out


# ------------------------------------------------------------------------------------------------- ngp_pl


def state(scale: float = 0.5) -> dict[str, Any]:
    """A slim checkpoint of ngp_pl."""
    table = table_of(grid_of(2048 * scale))
    count = max(1 + int(np.ceil(np.log2(2 * scale))), 1)
    return {
        "model.center": torch.zeros(1, 3),
        "model.xyz_min": -torch.ones(1, 3) * scale,
        "model.xyz_max": torch.ones(1, 3) * scale,
        "model.half_size": torch.ones(1, 3) * scale,
        "model.density_bitfield": torch.full((count * 128**3 // 8,), 255, dtype=torch.uint8),
        "model.xyz_encoder.params": tensor(np.concatenate([normal(3072, 48, 0), table])),
        "model.dir_encoder.params": torch.zeros(0),
        "model.rgb_net.params": tensor(normal(7168, 48, 1)),
    }


def read(fmt: FormatBase, path: Path) -> Parts:
    return fmt.read(open_manifest(path), ReadOptions())  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize(("scale", "count"), [(0.5, 11_448_112), (2.0, 12_602_992)])
def test_ngp_pl(tmp_path: Path, scale: float, count: int) -> None:
    """Section 2.5, with the layout's parameter counts."""
    own = state(scale)
    assert own["model.xyz_encoder.params"].shape == (count,)
    torch.save(own, tmp_path / "slim.ckpt")
    assert identify(tmp_path / "slim.ckpt").format == "ngp-pl"
    parts = read(ngp_pl.NgpPl(), tmp_path / "slim.ckpt")
    assert parts.scene.box == Box.cube(scale)
    assert parts.scene.background == ((1.0, 1.0, 1.0) if scale == 0.5 else (0.0, 0.0, 0.0))
    flat = own["model.xyz_encoder.params"].double().numpy()
    sigma_net = matrices(flat[:3072], (64, 32), (16, 64))
    color_net = matrices(own["model.rgb_net.params"].numpy(), (64, 32), (64, 64), (16, 64))
    grid = grid_of(2048 * scale)

    def truth(x: Array, d: Array) -> tuple[float, Array]:
        u = (x + scale) / (2 * scale)
        h = run(sigma_net, look_up(u, flat[3072:].reshape(-1, 2), levels_of(grid, 1), grid))
        raw = run(color_net, np.concatenate([harmonics(2 * ((d + 1) / 2) - 1, 4), h]))
        return float(np.exp(h[0])), sigmoid(raw[:3])

    agree(parts, truth)
    # Such a field is one of instant-ngp's too: its file holds the same weights.
    InstantNgp().write(parts, tmp_path / "x.ingp")
    back = read(InstantNgp(), tmp_path / "x.ingp")
    for key, value in parts.tensors.items():
        np.testing.assert_array_equal(back.tensors[key].numpy(), value.numpy())
    agree(back, truth)


def test_a_full_checkpoint_with_cameras_and_bitfield(tmp_path: Path) -> None:
    scale, width, height, fx, fy = 2.0, 7, 5, 9.0, 8.0
    v, u = np.mgrid[:height, :width] + 0.5
    rays = np.stack([(u - 3.25) / fx, (v - 2.5) / fy, np.ones_like(u)], -1).reshape(-1, 3)
    pose = np.array([[1, 0, 0, 0.5], [0, 0, 1, 0.25], [0, -1, 0, -1.5]])
    bits = np.zeros(3 * 128**3 // 8, np.uint8)
    cells = [(0, 3, 4, 5), (1, 127, 0, 64), (2, 1, 2, 3)]
    for cascade, *cell in cells:
        index = cascade * 128**3 + sum((c >> b & 1) << (3 * b + axis) for axis, c in enumerate(cell) for b in range(7))
        bits[index // 8] |= 1 << index % 8
    own = state(scale) | {
        "model.density_bitfield": torch.from_numpy(bits),
        "model.grid_coords": torch.zeros(4, 3, dtype=torch.int32),
        "model.density_grid": torch.zeros(3, 128),
        "directions": tensor(rays),
        "poses": tensor(pose[None]),
        "val_lpips.net.weight": torch.zeros(2),
        "stray": torch.zeros(2),
    }
    top = {"epoch": 29, "global_step": 30000, "state_dict": own, "hyper_parameters": argparse.Namespace(scale=scale)}
    torch.save(top, tmp_path / "full.ckpt")
    parts = read(ngp_pl.NgpPl(), tmp_path / "full.ckpt")
    assert parts.config["mask"] == {"shape": [3, 128, 128, 128], "center": [0.0] * 3, "halves": [0.5, 1.0, 2.0]}
    grid = np.unpackbits(parts.tensors["mask.bits"].numpy(), bitorder="little").reshape(3, 128, 128, 128)
    assert sorted(map(tuple, np.argwhere(grid).tolist())) == sorted(cells)
    (camera,) = parts.scene.cameras
    assert (camera.width, camera.height) == (7, 5)
    assert (camera.fx, camera.fy, camera.cx, camera.cy) == pytest.approx((fx, fy, 3.25, 2.5), rel=1e-5)
    origin, directions = camera.rays()
    np.testing.assert_allclose(origin[0], pose[:, 3])
    world = rays @ pose[:, :3].T
    np.testing.assert_allclose(directions, world / np.linalg.norm(world, axis=1, keepdims=True), atol=1e-5)
    assert parts.provenance["epoch"] == 29
    assert [n for n in parts.notes if "stray" in n]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model.rgb_net.params": None}, "'model.rgb_net.params' is missing"),
        ({"model.rgb_net.params": torch.zeros(7000)}, r"model.rgb_net.params holds \[7000\]"),
        ({"model.xyz_encoder.params": torch.zeros(5)}, r"model.xyz_encoder.params holds \[5\]"),
        ({"model.tonemapper_net_0.params": torch.zeros(5)}, "use_exposure"),
        ({"model.extra.params": torch.zeros(5)}, "'model.extra.params' has no place"),
        ({"model.xyz_max": torch.ones(1, 2)}, "model.xyz_max"),
        ({"model.xyz_max": torch.tensor([[0.5, 0.5, 0.9]])}, "no cube"),
        ({"model.xyz_max": -torch.ones(1, 3)}, "empty"),
        ({"model.density_bitfield": torch.zeros(7, dtype=torch.uint8)}, "model.density_bitfield is"),
    ],
)
def test_malformed_ngp_pl(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    own = {k: v for k, v in (state() | changes).items() if v is not None}
    torch.save(own, tmp_path / "x.ckpt")
    with pytest.raises(InputError, match=match) as caught:
        read(ngp_pl.NgpPl(), tmp_path / "x.ckpt")
    assert "ngp-pl" in str(caught.value)


# ------------------------------------------------------------------------------------------------- torch-ngp's variants


def test_torch_ngp_tcnn(tmp_path: Path) -> None:
    """Section 2.2: [SH16, geo15], and 1.0 in the 32nd column."""
    bound, grid = 1.0, grid_of(2048.0)
    table, sigma, color = table_of(grid), normal(3072, 48, 0), normal(7168, 48, 1)
    assert len(table) == 12_196_240
    aabb = torch.tensor([-bound] * 3 + [bound] * 3)
    own = {
        "aabb_train": aabb,
        "aabb_infer": aabb,
        "encoder.params": tensor(table),
        "encoder_dir.params": torch.zeros(0),
        "sigma_net.params": tensor(sigma),
        "color_net.params": tensor(color),
    }
    torch.save({"epoch": 3, "model": own}, tmp_path / "ngp.pth")
    assert identify(tmp_path / "ngp.pth").format == "torch-ngp"
    nets = matrices(tensor(sigma), (64, 32), (16, 64)), matrices(tensor(color), (64, 32), (64, 64), (16, 64))
    rows = tensor(table).double().numpy().reshape(-1, 2)

    def truth(x: Array, d: Array) -> tuple[float, Array]:
        h = run(nets[0], look_up((x + bound) / (2 * bound), rows, levels_of(grid, 1), grid))
        raw = run(nets[1], np.concatenate([harmonics(d, 4), h[1:], [1.0]]))
        return float(np.exp(h[0])), sigmoid(raw[:3])

    agree(read(torch_ngp.TorchNgp(), tmp_path / "ngp.pth"), truth)
    own["encoder.params"] = torch.zeros(12)
    torch.save({"model": own}, tmp_path / "ngp.pth")
    with pytest.raises(InputError, match=r"encoder.params holds \[12\]"):
        read(torch_ngp.TorchNgp(), tmp_path / "ngp.pth")


def torch_ngp_features(x01: Array, table: Array, offsets: list[int], base: int, b: float) -> Array:
    """gridencoder's lookup (section 2.1): strides of res + 1, the walk stops beyond the level's size."""
    out = []
    for level in range(len(offsets) - 1):
        count = offsets[level + 1] - offsets[level]
        scale = float(np.float32(np.exp2(level * np.log2(b)) * base - 1))
        res = int(np.ceil(scale)) + 1
        pos = x01 * scale + 0.5
        cell = np.floor(pos).astype(int)
        f, total = pos - cell, np.zeros(2)
        for corner in range(8):
            far = np.array([corner & 1, corner >> 1 & 1, corner >> 2 & 1])
            at = [int(v) for v in cell + far]
            index, stride = 0, 1
            for axis in range(3):
                if stride > count:
                    break
                index, stride = index + at[axis] * stride, stride * (res + 1)
            if stride > count:
                index = at[0] ^ at[1] * 2654435761 % 2**32 ^ at[2] * 805459861 % 2**32
            total += np.prod(np.where(far, f, 1 - f)) * table[offsets[level] + index % count]
        out.append(total)
    return np.concatenate(out)


@pytest.mark.parametrize(("sigma_layers", "color_layers"), [(2, 3), (1, 2)])
def test_torch_ngp_ff(tmp_path: Path, sigma_layers: int, color_layers: int) -> None:
    """Section 2.3: ``num_layers`` hidden layers of 64; the colour network's input is padded with 0."""
    b = 128 ** (1 / 15)
    sizes = [min(2**14, -(-((int(np.ceil(16 * b**k)) + 1) ** 3) // 8) * 8) for k in range(16)]
    offsets = [sum(sizes[:k]) for k in range(17)]
    table = np.random.default_rng(0).uniform(-1, 1, (offsets[-1], 2))
    shapes = [[(64, 32), *[(64, 64)] * (n - 1), (16, 64)] for n in (sigma_layers, color_layers)]
    flats = [normal(sum(a * c for a, c in net), 48, k) for k, net in enumerate(shapes)]
    aabb = torch.tensor([-1.0] * 3 + [1.0] * 3)
    own = {"aabb_train": aabb, "aabb_infer": aabb, "encoder.embeddings": tensor(table),
           "encoder.offsets": torch.tensor(offsets, dtype=torch.int32), "sigma_net.weights": tensor(flats[0]),
           "color_net.weights": tensor(flats[1])}  # fmt: skip
    torch.save({"model": own}, tmp_path / "ngp.pth")
    assert identify(tmp_path / "ngp.pth").format == "torch-ngp"
    nets = [matrices(tensor(flat), *net) for flat, net in zip(flats, shapes)]
    rows = tensor(table).double().numpy()

    def truth(x: Array, d: Array) -> tuple[float, Array]:
        h = run(nets[0], torch_ngp_features((x + 1) / 2, rows, offsets, 16, b))
        raw = run(nets[1], np.concatenate([harmonics(d, 4), h[1:], [0.0]]))
        return float(np.exp(h[0])), sigmoid(raw[:3])

    agree(read(torch_ngp.TorchNgp(), tmp_path / "ngp.pth"), truth)
    own["sigma_net.weights"] = torch.zeros(77)
    torch.save({"model": own}, tmp_path / "ngp.pth")
    with pytest.raises(InputError, match=r"sigma_net.weights holds 77 numbers"):
        read(torch_ngp.TorchNgp(), tmp_path / "ngp.pth")


def test_variants_with_foreign_tensors_are_left_alone(tmp_path: Path) -> None:
    own = {"encoder.params": torch.zeros(8), "sigma_net.params": torch.zeros(8), "color_net.params": torch.zeros(8)}
    torch.save({"model": own | {"deform_net.params": torch.zeros(8)}}, tmp_path / "x.pth")
    match = torch_ngp.probe(open_manifest(tmp_path / "x.pth"))
    assert match is not None
    assert match.score < 0.3
    with pytest.raises(InputError, match=r"deform_net.params"):
        read(torch_ngp.TorchNgp(), tmp_path / "x.pth")
