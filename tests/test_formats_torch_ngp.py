"""torch-ngp: the layout's tables, Morton bitfields, what is told from offsets, errors, and writing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pvdconvert.cameras import Camera
from pvdconvert.containers import open_manifest
from pvdconvert.errors import InputError, PvdError, RequestError
from pvdconvert.pipeline import convert
from pvdconvert.plugin import ArrayTensor, Parts, ReadOptions
from pvdconvert.scene import Box, Scene
from pvdconvert_formats import _torch_ngp_grid as grids
from pvdconvert_formats.torch_ngp import TorchNgp, probe

FORMAT = TorchNgp()


def state(
    bound: float = 1.0, levels: int = 16, table: int = 10, finest: float | None = None, rounded: bool = True
) -> dict[str, Any]:
    """A state_dict of the program's shape, with torch's own random weights."""
    scale = grids.scale_of(levels, 16, finest or 2048 * bound)
    sizes = grids.level_sizes(levels, 16, scale, table, rounded=rounded)
    offsets = torch.tensor([sum(sizes[:k]) for k in range(levels + 1)], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    shapes = {"encoder.embeddings": (int(offsets[-1]), 2), "sigma_net.0.weight": (64, 2 * levels),
              "sigma_net.1.weight": (16, 64), "color_net.0.weight": (64, 31), "color_net.1.weight": (64, 64),
              "color_net.2.weight": (3, 64)}  # fmt: skip
    aabb = torch.tensor([-bound] * 3 + [bound] * 3)
    weights = {k: torch.randn(shape, generator=generator) for k, shape in shapes.items()}
    return {"aabb_train": aabb, "aabb_infer": aabb.clone(), "encoder.offsets": offsets, **weights}


def saved(tmp_path: Path, model: Mapping[str, Any], top: Mapping[str, Any] | None = None, bare: bool = False) -> Path:
    path = tmp_path / "ngp.pth"
    full = {
        "epoch": 7,
        "global_step": 700,
        "stats": {"loss": [0.1], "best_result": None},
        "model": model,
        **(top or {}),
    }
    torch.save(dict(model) if bare else full, path)
    return path


def read(path: Path, **extra: str) -> Parts:
    return FORMAT.read(open_manifest(path), ReadOptions(extra=extra))


@pytest.mark.parametrize(
    ("bound", "sixteen", "fourteen"),
    [
        (1, 6119864, 5303704),
        (2, 6328848, 5530080),
        (4, 6554024, 5675512),
        (8, 6664784, 5907072),
        (16, 6837544, 5947968),
    ],
)
def test_entry_counts_of_the_layout(bound: int, sixteen: int, fourteen: int) -> None:
    """The totals printed in layouts section 2.1, counted there from files of the program."""
    for levels, expected in ((16, sixteen), (14, fourteen)):
        sizes = grids.level_sizes(levels, 16, grids.scale_of(levels, 16, 2048 * bound), 19)
        assert sum(sizes) == expected
        assert grids.table_of(sizes) == 19
        assert grids.base_of(sizes[0]) == 16
        finest, dense, _ = grids.finest_of(sizes, 16, float(bound))
        assert finest == 2048 * bound
        assert dense >= 2


@pytest.mark.parametrize("bare", [False, True])
def test_read(tmp_path: Path, bare: bool) -> None:
    model = state(table=14)
    path = saved(tmp_path, model, bare=bare)
    match = probe(open_manifest(path))
    assert match is not None
    assert match.score > 0.9
    parts = read(path)
    assert parts.architecture == "ngp"
    c = parts.config
    assert (c["levels"], c["features"], c["log2_table"], c["base_resolution"]) == (16, 2, 14, 16)
    assert (c["hidden"], c["density_layers"], c["geo_features"], c["color_layers"], c["sh_bands"]) == (64, 1, 15, 2, 4)
    assert c["per_level_scale"] == pytest.approx(128 ** (1 / 15), rel=1e-15)
    assert c["offsets"] == model["encoder.offsets"].tolist()
    assert c["index_rule"] == "torch-ngp"
    assert parts.scene.box == Box.cube(1.0)
    assert parts.scene.step == pytest.approx(2 * 3**0.5 / 1024)
    assert "background" in parts.scene.assumed
    weights = {k for k in model if k.endswith((".weight", ".embeddings"))}
    assert set(parts.tensors) == weights
    for key in weights:
        np.testing.assert_array_equal(parts.tensors[key].numpy(), model[key].numpy())
    assert parts.provenance.get("epoch") == (None if bare else 7)


def test_offsets_from_before_rounding(tmp_path: Path) -> None:
    parts = read(saved(tmp_path, state(table=14, rounded=False)))
    assert parts.config["offsets"][1] == 17**3
    assert parts.config["per_level_scale"] == pytest.approx(128 ** (1 / 15))


def test_an_unusual_resolution_is_solved_asked_or_given(tmp_path: Path) -> None:
    path = saved(tmp_path, state(finest=512.0, table=19, levels=8))
    parts = read(path)  # five dense levels pin it
    assert parts.config["per_level_scale"] == pytest.approx(32 ** (1 / 7))
    assert "desired_resolution" in parts.scene.assumed
    path = saved(tmp_path, state(finest=40.0, table=19, levels=4))
    assert read(path).config["per_level_scale"] == pytest.approx(2.5 ** (1 / 3))  # all levels dense: known exactly
    path = saved(tmp_path, state(finest=777.0, table=14))
    with pytest.raises(InputError, match="desired_resolution"):
        read(path)
    assert read(path, desired_resolution="777").config["per_level_scale"] == pytest.approx((777 / 16) ** (1 / 15))
    assert read(path, per_level_scale="1.3").config["per_level_scale"] == 1.3
    with pytest.raises(InputError, match="not a positive number"):
        read(path, desired_resolution="many")


def test_one_capped_level_is_assumed_and_said(tmp_path: Path) -> None:
    parts = read(saved(tmp_path, state(table=10)))
    assert {"base_resolution", "desired_resolution"} <= set(parts.scene.assumed)
    assert any("2048 assumed" in note for note in parts.notes)


# ------------------------------------------------------------------------------------------------- bitfield


def bits_of(cells: list[tuple[int, int, int, int]], cascades: int = 1) -> NDArray[np.uint8]:
    """A bitfield with the cells (cascade, x, y, z) set, by the definition of Morton order, bit by bit."""
    field = np.zeros(cascades * 128**3 // 8, np.uint8)
    for cascade, *cell in cells:
        index = cascade * 128**3
        for axis, value in enumerate(cell):
            for bit in range(7):
                index += (value >> bit & 1) << (3 * bit + axis)
        field[index // 8] |= 1 << (index % 8)
    return field


def grid_of(parts: Parts) -> NDArray[np.uint8]:
    mask = parts.config["mask"]
    shape = mask["shape"]
    bits = parts.tensors["mask.bits"].numpy()
    return np.unpackbits(bits, count=int(np.prod(shape)), bitorder="little").reshape(shape)


def test_morton_order(tmp_path: Path) -> None:
    cells = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (5, 77, 101), (127, 127, 127)]
    assert bits_of([(0, 1, 0, 0)])[0] == 2  # x is the lowest bit
    assert bits_of([(0, 0, 0, 1)])[0] == 16
    model = state() | {"density_bitfield": torch.from_numpy(bits_of([(0, *c) for c in cells]))}
    parts = read(saved(tmp_path, model))
    assert parts.config["mask"] == {"shape": [128] * 3, "origin": [-1.0] * 3, "cell": 2 / 128}
    assert sorted(map(tuple, np.argwhere(grid_of(parts)).tolist())) == sorted(cells)


def test_cascades_become_one_grid(tmp_path: Path) -> None:
    """Every point looks up the finest cascade that contains it (layouts 8.4): compared point by point."""
    rng = np.random.default_rng(0)
    fields = (rng.random((2, 128, 128, 128)) < 0.3).astype(np.uint8)
    n = np.arange(128)
    spread = np.sum([(n >> b & 1) << (3 * b) for b in range(7)], axis=0)
    index = (spread[:, None, None] + 2 * spread[None, :, None] + 4 * spread[None, None, :]).reshape(-1)
    flat = np.zeros((2, 128**3), np.uint8)
    flat[:, index] = fields.reshape(2, -1)
    model = state(bound=2.0) | {"density_bitfield": torch.from_numpy(np.packbits(flat, bitorder="little"))}
    parts = read(saved(tmp_path, model))
    grid, mask = grid_of(parts), parts.config["mask"]
    for p in rng.uniform(-2, 2, (2000, 3)):
        level = 0 if np.abs(p).max() < 1 else 1
        i = np.clip((0.5 * (p / 2.0**level + 1) * 128).astype(int), 0, 127)
        j = np.floor((p - mask["origin"]) / mask["cell"]).astype(int)
        assert grid[tuple(j)] == fields[(level, *i)]
    again = grids.write_bitfield(mask, parts.tensors["mask.bits"].numpy(), 2.0).reshape(2, -1)
    inner = np.unpackbits(again, axis=1, bitorder="little")[:, index].reshape(fields.shape)
    np.testing.assert_array_equal(inner[0], fields[0])
    outside = np.ones((128,) * 3, bool)
    outside[32:96, 32:96, 32:96] = False  # the part of cascade 1 that is ever looked up
    np.testing.assert_array_equal(inner[1][outside], fields[1][outside])


def test_a_bitfield_that_says_nothing(tmp_path: Path) -> None:
    size = 128**3 // 8
    zero = read(saved(tmp_path, state() | {"density_bitfield": torch.zeros(size, dtype=torch.uint8)}))
    assert zero.config["mask"] is None
    assert any("all zero" in note for note in zero.notes)
    ones = read(saved(tmp_path, state() | {"density_bitfield": torch.full((size,), 255, dtype=torch.uint8)}))
    assert ones.config["mask"] is None
    assert not any("bitfield" in note for note in ones.notes)


@pytest.mark.parametrize(("bound", "cascades"), [(1.5, 2), (16.0, 5)])
def test_wide_scenes_keep_their_cascades(tmp_path: Path, bound: float, cascades: int) -> None:
    cells = [(0, 1, 2, 3), (1, 5, 0, 127), (cascades - 1, 126, 3, 64)]
    model = state(bound=bound) | {"density_bitfield": torch.from_numpy(bits_of(cells, cascades))}
    parts = read(saved(tmp_path, model))
    mask = parts.config["mask"]
    halves = [min(2.0**c, bound) for c in range(cascades)]
    assert mask == {"shape": [cascades, 128, 128, 128], "center": [0.0] * 3, "halves": halves}
    assert sorted(map(tuple, np.argwhere(grid_of(parts)).tolist())) == sorted(cells)
    FORMAT.write(parts, tmp_path / "out.pth")
    back = read(tmp_path / "out.pth")
    assert back.config["mask"] == mask
    np.testing.assert_array_equal(back.tensors["mask.bits"].numpy(), parts.tensors["mask.bits"].numpy())


# ------------------------------------------------------------------------------------------------- refusals


def changed(**changes: Any) -> dict[str, Any]:
    model = state()
    for key, value in changes.items():
        name = key.replace("__", ".")
        if value is None:
            del model[name]
        else:
            model[name] = value
    return model


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"encoder__embeddings": None}, "encoder.embeddings.*missing"),
        ({"encoder__embeddings": torch.zeros(5, 2)}, r"encoder\.embeddings is \[5, 2\]"),
        ({"encoder__offsets": torch.zeros(17, dtype=torch.int32)}, "do not grow"),
        ({"encoder__offsets": torch.zeros(3, 3, dtype=torch.int32)}, r"encoder\.offsets is int32 \[3, 3\]"),
        ({"encoder__offsets": torch.arange(17.0)}, r"encoder\.offsets is float32"),
        ({"sigma_net__0__weight": torch.zeros(64, 31)}, r"sigma_net\.0\.weight.*\[\*, 32\]"),
        ({"sigma_net__1__weight": torch.zeros(16, 63)}, r"sigma_net\.1\.weight.*\[\*, 64\]"),
        ({"color_net__1__weight": None}, r"color_net\.1\.weight.* missing"),
        ({"color_net__0__weight": torch.zeros(64, 30)}, "color_net maps 30"),
        ({"color_net__2__weight": torch.zeros(4, 64)}, "to 4"),
        ({"sigma_net__0__bias": torch.zeros(64)}, "sigma_net.0.bias"),
        ({"deform_net__0__weight": torch.zeros(64, 3)}, "deform_net"),
        ({"aabb_infer": None, "aabb_train": None}, "--bounds"),
        ({"aabb_train": torch.tensor([-1.0, -1, -1, 1, 1, 2])}, "no cube"),
        ({"aabb_train": torch.full((6,), float("nan"))}, "aabb_train"),
        ({"aabb_train": torch.zeros(3)}, r"aabb_train.*\[3\]"),
        ({"density_bitfield": torch.zeros(100, dtype=torch.uint8)}, r"density_bitfield is uint8 \[100\]"),
    ],
)
def test_malformed_files(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    path = saved(tmp_path, changed(**changes))
    with pytest.raises(InputError, match=match) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "torch-ngp" in str(caught.value)


def test_probe_leaves_relatives_alone(tmp_path: Path) -> None:
    pvd = probe(open_manifest(saved(tmp_path, state(levels=14))))
    assert pvd is not None
    assert pvd.score < 0.3
    assert "PVD" in pvd.reason
    dnerf = probe(open_manifest(saved(tmp_path, changed(deform_net__0__weight=torch.zeros(2, 2)))))
    assert dnerf is not None
    assert dnerf.score < 0.3
    assert probe(open_manifest(saved(tmp_path, {"w": torch.zeros(2)}))) is None


def test_bounds_and_background(tmp_path: Path) -> None:
    path = saved(tmp_path, changed(aabb_infer=None, aabb_train=None))
    parts = FORMAT.read(open_manifest(path), ReadOptions(bounds=Box.cube(1.0), background=(0.0, 0.0, 0.0)))
    assert parts.scene.box == Box.cube(1.0)
    assert parts.scene.background == (0.0, 0.0, 0.0)
    assert "background" not in parts.scene.assumed


# ------------------------------------------------------------------------------------------------- writing


def test_write_and_read_are_inverse(tmp_path: Path) -> None:
    cells = [(0, 3, 4, 5), (0, 127, 0, 64)]
    model = state(table=14) | {"density_bitfield": torch.from_numpy(bits_of(cells))}
    first = read(saved(tmp_path, model))
    FORMAT.write(first, tmp_path / "out.pth")
    FORMAT.write(first, tmp_path / "again.pth")
    assert (tmp_path / "out.pth").read_bytes() == (tmp_path / "again.pth").read_bytes()
    back = torch.load(tmp_path / "out.pth", weights_only=True)
    assert back["epoch"] == 7
    assert back["global_step"] == 700
    assert set(back["stats"]) == {"loss", "valid_loss", "results", "checkpoints", "best_result"}
    assert set(back) == {"epoch", "global_step", "stats", "model"}
    assert set(back["model"]) == set(model)
    for key, value in model.items():
        assert torch.equal(back["model"][key], value), key
        assert back["model"][key].dtype == value.dtype
    second = read(tmp_path / "out.pth")
    assert second.config == first.config
    assert second.scene == first.scene


def test_what_the_layout_cannot_say_is_kept_aside(tmp_path: Path) -> None:
    parts = read(saved(tmp_path, state(finest=777.0, table=14)), desired_resolution="777")
    parts = Parts(parts.architecture, parts.config, parts.tensors, Scene(parts.scene.box, background=(0.0, 0.5, 1.0)))
    FORMAT.write(parts, tmp_path / "out.pth")
    torch.load(tmp_path / "out.pth", weights_only=True)
    back = read(tmp_path / "out.pth")
    assert back.config["per_level_scale"] == parts.config["per_level_scale"]
    assert back.scene.background == (0.0, 0.5, 1.0)


def test_a_mask_of_other_cells_is_covered(tmp_path: Path) -> None:
    """Every set cell lies inside of the written one's: nothing that was visible is cut."""
    parts = read(saved(tmp_path, state()))
    grid = np.zeros((7, 9, 11), np.uint8)
    grid[2, 3, 4] = grid[6, 8, 10] = 1
    mask: dict[str, Any] = {"shape": [7, 9, 11], "origin": [-0.9, -0.8, -0.7], "cell": 0.13}
    bits = ArrayTensor(np.packbits(grid.reshape(-1), bitorder="little"))
    given = Parts("ngp", {**parts.config, "mask": mask}, {**parts.tensors, "mask.bits": bits}, parts.scene)
    FORMAT.write(given, tmp_path / "out.pth")
    back = read(tmp_path / "out.pth")  # our own reader gets the mask itself
    assert back.config["mask"] == mask
    np.testing.assert_array_equal(back.tensors["mask.bits"].numpy(), bits.numpy())
    bitfield = torch.load(tmp_path / "out.pth", weights_only=True)["model"]["density_bitfield"].numpy()
    found = grids.read_bitfield(bitfield, 1.0)
    assert found is not None
    out = np.unpackbits(found[1], bitorder="little").reshape(128, 128, 128)
    rng = np.random.default_rng(0)
    for cell in ((2, 3, 4), (6, 8, 10)):
        p = mask["origin"] + (np.array(cell) + rng.random((500, 3))) * mask["cell"]
        i = np.floor((p + 1) * 64).astype(int)
        assert out[tuple(i.T)].all()
    assert out.sum() <= 2 * 11**3


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"index_rule": "tcnn"}, "index_rule = torch-ngp"),
        ({"interpolation": "smoothstep"}, "interpolation"),
        ({"color_input": "h+sh"}, "color_input"),
        ({"density_scale": 2.0}, "density_scale = 1.0"),
        ({"box": [[-1, -1, -1], [1, 1, 2]]}, "cube around 0"),
        ({"box": [[0, 0, 0], [1, 1, 1]]}, "cube around 0"),
    ],
)
def test_what_the_layout_cannot_hold_is_refused(tmp_path: Path, config: dict[str, Any], match: str) -> None:
    parts = read(saved(tmp_path, state()))
    with pytest.raises(RequestError, match=match) as caught:
        FORMAT.write(Parts("ngp", {**parts.config, **config}, parts.tensors, parts.scene), tmp_path / "out.pth")
    assert isinstance(caught.value, PvdError)
    assert not (tmp_path / "out.pth").exists()
    with pytest.raises(RequestError, match="not tensorf"):
        FORMAT.write(Parts("tensorf", {}, {}, parts.scene), tmp_path / "out.pth")


def test_limits_hold_what_is_planned_inside_them() -> None:
    limits = FORMAT.limits("ngp")
    assert limits.fixed["index_rule"] == "torch-ngp"
    program = limits.defaults
    assert (program["levels"], program["log2_table"], program["hidden"]) == (16, 19, 64)


def test_scene_beyond_the_layout_comes_back(tmp_path: Path) -> None:
    """Cameras, the way to the data set and all else that the program's file has no place for."""
    parts = read(saved(tmp_path, state(table=14)))
    camera = Camera(64, 48, 50.0, 55.0, 30.0, 20.0, ((0.0, 1.0, 0.0, 3.0), (0.0, 0.0, 1.0, -2.0), (1.0, 0.0, 0.0, 1.0)))
    world = ((2.0, 0, 0, 1.0), (0, 2.0, 0, 0.0), (0, 0, 2.0, -1.0), (0, 0, 0, 1.0))
    scene = dataclasses.replace(parts.scene, cameras=(camera,), world=world, near=0.5, far=9.0, color_space="linear")
    FORMAT.write(dataclasses.replace(parts, scene=scene), tmp_path / "out.pth")
    torch.load(tmp_path / "out.pth", weights_only=True)
    assert read(tmp_path / "out.pth").scene == scene
    tree = {"model": state(), "pvdconvert": {"scene": {"box": 3}}}
    torch.save(tree, tmp_path / "bad.pth")
    with pytest.raises(InputError, match="scene"):
        read(tmp_path / "bad.pth")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_through_the_native_layout_and_back(tmp_path: Path, dtype: torch.dtype) -> None:
    """torch-ngp -> safetensors -> torch-ngp: the same bits, types and scene; nothing is trained."""
    cells = [(0, 3, 4, 5), (0, 127, 0, 64)]
    model = {k: v.to(dtype) if k.endswith((".weight", ".embeddings")) else v for k, v in state(table=12).items()}
    path = saved(tmp_path, model | {"density_bitfield": torch.from_numpy(bits_of(cells))})
    first, second = tmp_path / "a.safetensors", tmp_path / "b.pth"
    convert(path, to="ngp", out=first, exact=True)
    convert(first, to="ngp", as_="torch-ngp", out=second, exact=True)
    back = torch.load(second, weights_only=True)["model"]
    for key, value in model.items():
        assert back[key].dtype == value.dtype, key
        assert torch.equal(back[key], value), key
    assert read(second).scene == read(path).scene
    assert read(second).config == read(path).config
