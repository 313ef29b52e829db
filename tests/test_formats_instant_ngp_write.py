"""Written snapshots: evaluated in float64 from the layout's formulas, and read back exactly."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch

from pvdconvert import registry
from pvdconvert.cameras import Camera
from pvdconvert.containers import open_manifest
from pvdconvert.errors import InputError, RequestError
from pvdconvert.loading import to_torch
from pvdconvert.plugin import ArrayTensor, Budget, Parts, ReadOptions, TeacherFacts
from pvdconvert.scene import Box, Scene
from pvdconvert_formats.instant_ngp import InstantNgp
from pvdconvert_plugins.ngp import Ngp
from tests import snapshots
from tests.snapshots import make, put

FORMAT = InstantNgp()
BOX = Box((-1.0, -1.5, 0.5), (1.0, 0.5, 2.0))
CAMERA = Camera(64, 48, 50.0, 55.0, 30.0, 20.0, ((0.0, 1.0, 0.0, 3.0), (0.0, 0.0, 1.0, -2.0), (1.0, 0.0, 0.0, 1.0)))
FACTS = TeacherFacts(Scene(BOX), BOX, 9000, 3000, 2.0 / 128)


def student(dtype: str | None = "float16", scene: Scene | None = None, mask: bool = False, **sets: Any) -> Parts:
    """A planned and built student with weights large enough to show."""
    sets = {"log2_table": 8, "levels": 4, "dtype": dtype, **sets}
    config = Ngp().plan(FACTS, Budget("fast"), FORMAT.limits("ngp"), sets)
    field = Ngp().build(config, scene or Scene(BOX), 0)
    with torch.no_grad():
        field.encoder.embeddings.mul_(2e4)
    config, tensors = Ngp().save(field)
    arrays = {k: ArrayTensor(t.numpy()) for k, t in tensors.items()}
    if mask:
        grid = np.random.default_rng(0).random((20, 20, 15)) < 0.1
        config["mask"] = {"shape": [20, 20, 15], "origin": list(BOX.min), "cell": 0.1}
        arrays["mask.bits"] = ArrayTensor(np.packbits(grid.reshape(-1), bitorder="little"))
    return Parts("ngp", config, arrays, scene or Scene(BOX, background=(1.0, 1.0, 1.0)), {"training_step": 77})


def answers(parts: Parts, x: Any, d: Any) -> tuple[Any, Any]:
    field = registry.default().architecture("ngp").load(dict(parts.config), to_torch(parts.tensors, "x"), parts.scene)
    with torch.no_grad():
        sigma, rgb = field(torch.from_numpy(x), torch.from_numpy(d))
    return sigma.double().numpy(), rgb.double().numpy()


def rays(count: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(3)
    x = rng.uniform(BOX.min, BOX.max, (count, 3)).astype(np.float32)
    d = rng.normal(size=(count, 3))
    return x, (d / np.linalg.norm(d, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(
    "sets",
    [
        {},
        {"features": 4, "hidden": 32, "color_hidden": 48, "color_layers": 1},
        {"grid_type": "dense", "per_level_scale": 1.25},
        {"grid_type": "tiled", "per_level_scale": 1.25, "interpolation": "smoothstep"},
        {"density_layers": 0, "levels": 3},
        {"dtype": None},
    ],
)
def test_what_the_program_computes_of_it(tmp_path: Path, sets: dict[str, Any]) -> None:
    """The tree alone, by sections 1.3 to 1.5: positions moved by scale and offset, density per world unit = that per
    unit of the program times scale."""
    parts = student(**sets)
    FORMAT.write(parts, tmp_path / "x.ingp")
    root = msgpack.unpackb(gzip.decompress((tmp_path / "x.ingp").read_bytes()))
    data = root["snapshot"]["nerf"]["dataset"]
    assert data["from_mitsuba"] is True
    x, d = rays(24)
    sigma, rgb = answers(parts, x, d)
    for k in range(24):
        there = x[k].astype(np.float64) * data["scale"] + data["offset"]
        assert ((there >= 0) & (there <= 1)).all()
        expected = snapshots.evaluate(root, there, d[k].astype(np.float64))
        assert abs(sigma[k] - expected[0] * data["scale"]) < 1e-3 * (1 + sigma[k])
        np.testing.assert_allclose(rgb[k], expected[1], atol=2e-3)


def test_the_tree_that_the_program_needs(tmp_path: Path) -> None:
    """Section 1.8, key by key."""
    FORMAT.write(student(), tmp_path / "x.msgpack")
    root = msgpack.unpackb((tmp_path / "x.msgpack").read_bytes())
    assert list(root) == sorted(root)
    for key in ("encoding", "network", "dir_encoding", "rgb_network", "loss", "optimizer"):
        assert root[key]["otype"]
    assert root["network"]["n_neurons"] == root["rgb_network"]["n_neurons"] == 64
    assert (root["network"]["n_hidden_layers"], root["rgb_network"]["n_hidden_layers"]) == (1, 2)
    assert root["encoding"]["per_level_scale"] > 1
    s = root["snapshot"]
    assert (s["version"], s["mode"], s["density_grid_size"], s["training_step"], s["loss"]) == (1, "nerf", 128, 77, 0.0)
    assert s["params_type"] == "__half"
    assert len(s["params_binary"]) == 2 * s["n_params"]
    levels = sum(n for _, _, n in snapshots.levels_of(root["encoding"], 1))
    assert s["n_params"] == 64 * 16 + 16 * 64 + 64 * 32 + 64 * 64 + 16 * 64 + 2 * levels
    assert set(s["nerf"]["rgb"]) == {"rays_per_batch", "measured_batch_size", "measured_batch_size_before_compaction"}
    needed = {"n_images", "render_aabb", "up", "offset", "envmap_resolution", "scale", "aabb_scale", "from_mitsuba"}
    assert needed <= set(s["nerf"]["dataset"])
    grid = np.frombuffer(s["density_grid_binary"], np.float16)
    assert grid.shape == (128**3,)
    assert (grid > min(0.01, float(grid.mean()))).all()  # no mask: everything may be drawn


def test_the_density_grid_covers_the_mask(tmp_path: Path) -> None:
    """Every set cell of the mask lies in occupied cells of the program, and not much else does."""
    parts = student(mask=True)
    FORMAT.write(parts, tmp_path / "x.ingp")
    root = msgpack.unpackb(gzip.decompress((tmp_path / "x.ingp").read_bytes()))
    data, values = root["snapshot"]["nerf"]["dataset"], np.frombuffer(root["snapshot"]["density_grid_binary"], "<f2")
    occupied = values > min(0.01, float(np.maximum(values, 0).astype(float).mean()))
    inside = np.unpackbits(parts.tensors["mask.bits"].numpy(), count=6000, bitorder="little").reshape(20, 20, 15)
    x, _ = rays(3000)
    hits = 0
    for p in x.astype(np.float64):
        i, j, k = ((p - BOX.min) / 0.1).astype(int)
        cell = ((p * data["scale"] + data["offset"]) * 128).astype(int)
        index = sum((int(v) >> b & 1) << (3 * b + axis) for axis, v in enumerate(cell) for b in range(7))
        hits += occupied[index]
        assert occupied[index] or not inside[i, j, k]
    assert inside.mean() * 3000 <= hits < 2 * inside.mean() * 3000


def test_read_back_exactly(tmp_path: Path) -> None:
    scene = Scene(BOX, background=(0.2, 0.4, 0.6), near=0.1, step=0.01, cameras=(CAMERA,), assumed=("step",))
    parts = student(scene=scene, mask=True)
    FORMAT.write(parts, tmp_path / "x.ingp")
    back = FORMAT.read(open_manifest(tmp_path / "x.ingp"), ReadOptions())
    assert back.scene == scene
    assert back.config["mask"] == parts.config["mask"]
    assert set(back.tensors) == set(parts.tensors)
    for key, tensor in parts.tensors.items():
        np.testing.assert_array_equal(back.tensors[key].numpy(), tensor.numpy())
        assert back.tensors[key].dtype == tensor.dtype
    x, d = rays(200)
    for ours, theirs in zip(answers(parts, x, d), answers(back, x, d)):
        np.testing.assert_array_equal(ours, theirs)
    FORMAT.write(back, tmp_path / "y.ingp")
    assert (tmp_path / "y.ingp").read_bytes() == (tmp_path / "x.ingp").read_bytes()


@pytest.mark.parametrize("case", [{}, {"aabb_scale": 4, "half": False, "encoding": {**snapshots.GRID,
                         "per_level_scale": 1.5}}, {"encoding": {**snapshots.GRID, "otype":
                         "TiledGrid", "per_level_scale": 1.5}}])  # fmt: skip
def test_a_program_file_is_rewritten(tmp_path: Path, case: dict[str, Any]) -> None:
    """Weights, places and cascades of a snapshot survive reading and writing."""
    root = make(**case)
    side = case.get("aabb_scale", 1)
    cascades = 1 + int(np.log2(side))
    values = np.zeros(cascades * 128**3, np.float16)
    values[:: 128**3 // 8 + 5] = 1.0
    root["snapshot"] |= {"density_grid_binary": values.tobytes(), "density_grid_size": 128}
    root["snapshot"]["nerf"]["dataset"] |= {"scale": 0.25, "offset": [0.5, 0.6, 0.7]}
    first = FORMAT.read(open_manifest(put(tmp_path / "x.ingp", root)), ReadOptions())
    FORMAT.write(first, tmp_path / "y.ingp")
    tree = msgpack.unpackb(gzip.decompress((tmp_path / "y.ingp").read_bytes()))
    # Rows and columns of padding are zeros now; all that is used is what it was.
    assert len(tree["snapshot"]["params_binary"]) == len(root["snapshot"]["params_binary"])
    d = np.array([0.6, 0.0, -0.8])
    for x in np.random.default_rng(0).uniform(0, 1, (10, 3)):
        ours, theirs = snapshots.evaluate(tree, x, d), snapshots.evaluate(root, x, d)
        assert ours[0] == pytest.approx(theirs[0], rel=1e-3)  # the growth is float32 in one, float64 in the other
        np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-3)
    data = tree["snapshot"]["nerf"]["dataset"]
    assert (data["scale"], data["from_mitsuba"], data["aabb_scale"]) == (pytest.approx(0.25), False, side)
    assert data["offset"] == pytest.approx([0.5, 0.6, 0.7])
    again = np.frombuffer(tree["snapshot"]["density_grid_binary"], np.float16).reshape(cascades, -1)
    np.testing.assert_array_equal(again[0], values[: 128**3])
    back = FORMAT.read(open_manifest(tmp_path / "y.ingp"), ReadOptions())
    assert back.config == first.config
    assert back.scene == first.scene


def test_cameras_and_world_go_along(tmp_path: Path) -> None:
    """A data set at half the size, moved: scale and offset lead from it, cameras are where they were."""
    world = ((2.0, 0, 0, 1.0), (0, 2.0, 0, 0.0), (0, 0, 2.0, -1.0), (0, 0, 0, 1.0))
    scene = Scene(BOX, world=world, cameras=(CAMERA,))
    FORMAT.write(student(scene=scene), tmp_path / "x.msgpack")
    data = msgpack.unpackb((tmp_path / "x.msgpack").read_bytes())["snapshot"]["nerf"]["dataset"]
    p = np.array([0.3, -0.2, 1.0])
    there = (np.array(world) @ [*p, 1.0])[:3]
    placed = (p - BOX.min) / 2.0  # the cube of side 2 at the box's lowest corner becomes the unit cube
    np.testing.assert_allclose(there * data["scale"] + data["offset"], placed, atol=1e-9)
    rows = np.array(data["xforms"][0]["start"])
    np.testing.assert_allclose(rows[:, 3], (CAMERA.position - BOX.min) / 2.0, atol=1e-9)
    np.testing.assert_allclose(rows[:, 2], -np.array(CAMERA.c2w)[:, 2])  # forward
    meta = data["metadata"][0]
    assert (meta["resolution"], meta["focal_length"]) == ([64, 48], [50.0, 55.0])
    assert meta["principal_point"] == pytest.approx([30 / 64, 20 / 48])


def test_a_world_that_is_no_scale_and_offset_stays_aside(tmp_path: Path) -> None:
    turned = ((0.0, 1.0, 0, 0), (-1.0, 0.0, 0, 0), (0, 0, 1.0, 0), (0, 0, 0, 1.0))
    scene = Scene(BOX, world=turned)
    FORMAT.write(student(scene=scene), tmp_path / "x.ingp")
    assert FORMAT.read(open_manifest(tmp_path / "x.ingp"), ReadOptions()).scene.world == scene.world


def replaced(parts: Parts, **changes: Any) -> Parts:
    return Parts(parts.architecture, {**parts.config, **changes}, parts.tensors, parts.scene)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"index_rule": "torch-ngp"}, "only holds index_rule = tcnn"),
        ({"color_input": "sh+geo"}, "color_input"),
        ({"color_constants": [1.0]}, "color_constants"),
        ({"bias": True}, "bias"),
        ({"sh_bands": 3}, "sh_bands"),
        ({"density_clip": [-1.0, 2.0]}, "density_clip"),
        ({"box": [[0, 0, 0], [1, 1, 2]]}, "only holds a cube"),
        ({"box": [[0, 0, 0], [1.7, 1.7, 1.7]]}, "no power of two"),
        ({"density_scale": 1e6}, "no power of two"),
        ({"features": 3}, "1, 2, 4 or 8 features"),
        ({"hidden": 20}, "multiples of 16"),
        ({"log2_table": 7}, "entries"),
    ],
)
def test_what_the_layout_cannot_hold(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(RequestError, match=match) as caught:
        FORMAT.write(replaced(student(), **changes), tmp_path / "x.ingp")
    assert "instant-ngp" in str(caught.value)


def test_plans_keep_to_the_program(tmp_path: Path) -> None:
    limits = FORMAT.limits("ngp")
    config = Ngp().plan(FACTS, Budget("fast"), limits, {})
    assert config["box"] == [[-1.0, -1.5, 0.5], [1.0, 0.5, 2.5]]
    assert (config["density_scale"], config["dtype"], config["index_rule"]) == (0.5, "float16", "tcnn")
    for sets, match in (({"hidden": 20}, "hidden = 20"), ({"features": 3}, "features = 3"), ({"bias": True}, "bias")):
        with pytest.raises(RequestError, match=match):
            Ngp().plan(FACTS, Budget("fast"), limits, sets)
    with pytest.raises(RequestError, match="holds ngp"):
        FORMAT.write(Parts("nerf", {}, {}, Scene(BOX)), tmp_path / "x.ingp")


def test_full_precision_where_half_would_lose(tmp_path: Path) -> None:
    parts = student(dtype=None)
    FORMAT.write(parts, tmp_path / "x.ingp")
    back = FORMAT.read(open_manifest(tmp_path / "x.ingp"), ReadOptions())
    assert back.tensors["encoder.embeddings"].dtype == "float32"
    np.testing.assert_array_equal(
        back.tensors["encoder.embeddings"].numpy(), parts.tensors["encoder.embeddings"].numpy()
    )
    with pytest.raises(InputError, match="no map with 'snapshot'"):
        FORMAT.read(open_manifest(put(tmp_path / "y", {"a": 1})), ReadOptions())
