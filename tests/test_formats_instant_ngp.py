"""instant-ngp: hand-made snapshots in the program's key tree, against the layout's formulas in float64."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pvdconvert import registry
from pvdconvert.containers import open_manifest
from pvdconvert.errors import InputError
from pvdconvert.field import RadianceField
from pvdconvert.identify import identify
from pvdconvert.loading import to_torch
from pvdconvert.plugin import Parts, ReadOptions
from pvdconvert.scene import Box
from pvdconvert_formats._instant_ngp_model import fit_shapes, grid_entries, read_grid
from pvdconvert_formats.instant_ngp import InstantNgp, probe
from tests import snapshots
from tests.snapshots import GRID, NET, SH, make, put

FORMAT = InstantNgp()


def read(path: Path, **extra: str) -> Parts:
    return FORMAT.read(open_manifest(path), ReadOptions(extra=extra))


def load(parts: Parts) -> RadianceField:
    return (
        registry.default()
        .architecture(parts.architecture)
        .load(dict(parts.config), to_torch(parts.tensors, "x"), parts.scene)
    )


def agree(parts: Parts, root: dict[str, Any], align: int = 16, code: list[float] | None = None) -> None:
    """The loaded field and the evaluation in float64 answer alike at points of the model's cube."""
    rng = np.random.default_rng(7)
    side = root["snapshot"]["nerf"]["dataset"]["aabb_scale"]
    x = (rng.uniform(-0.5, 0.5, (24, 3)) * side + 0.5).astype(np.float32)
    d = rng.normal(size=(24, 3))
    d = (d / np.linalg.norm(d, axis=1, keepdims=True)).astype(np.float32)
    with torch.no_grad():
        sigma, rgb = load(parts)(torch.from_numpy(x), torch.from_numpy(d))
    for k in range(len(x)):
        expected = snapshots.evaluate(root, x[k].astype(np.float64), d[k].astype(np.float64), align, code)
        assert abs(float(sigma[k]) - expected[0]) < 1e-3 * (1 + expected[0])
        np.testing.assert_allclose(rgb[k].double().numpy(), expected[1], rtol=2e-3, atol=2e-3)


CASES: dict[str, dict[str, Any]] = {
    "hash": {},
    "float32, aabb_scale 4": {"half": False, "aabb_scale": 4},
    "scale and base said": {"encoding": {**GRID, "per_level_scale": 1.5, "base_resolution": 7}},
    "base by the table": {"encoding": {"otype": "HashGrid", "n_levels": 5, "log2_hashmap_size": 9}},
    "one level": {"encoding": {**GRID, "n_levels": 1}},
    "L8 F4": {"encoding": {**GRID, "n_levels": 8, "n_features_per_level": 4}, "aabb_scale": 2},
    "dense": {"encoding": {**GRID, "otype": "DenseGrid", "per_level_scale": 1.405}},
    "tiled": {"encoding": {**GRID, "otype": "TiledGrid", "per_level_scale": 1.6}},
    "smoothstep": {"encoding": {**GRID, "interpolation": "Smoothstep"}},
    "CutlassMLP of 2022": {"align": 8, "encoding": {**GRID, "n_levels": 3}},
    "no hidden layer": {"hidden": (0, 0)},
    "deep": {"hidden": (3, 4)},
    "latent codes": {"codes": [[0.5, -1.0, 2.0], [1.0, 1.0, 1.0]]},
    "degree 3": {"direction": {"otype": "SphericalHarmonics", "degree": 3}},
    "degree 3 and codes": {"direction": {**SH, "nested": [{"n_dims_to_encode": 3, "otype": "SphericalHarmonics",
                           "degree": 3}, {"otype": "Identity"}]}, "codes": [[0.25, -0.75]]},
    "frequency": {"encoding": {"otype": "Frequency", "n_frequencies": 5}, "direction": {"otype": "Frequency",
                  "n_frequencies": 4}, "aabb_scale": 2},
    "frequency and harmonics": {"encoding": {"otype": "Frequency", "n_frequencies": 1}, "codes": [[0.5]]},
    "frequency, one octave of the direction": {"encoding": {"otype": "Frequency", "n_frequencies": 8},
                                               "direction": {"otype": "Frequency", "n_frequencies": 1}},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_density_and_colour(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    root = make(**case)
    path = put(tmp_path / "x.ingp", root)
    match = probe(open_manifest(path))
    assert match is not None
    assert match.score == 1.0
    parts = read(path)
    assert parts.architecture == ("nerf" if root["encoding"]["otype"] == "Frequency" else "ngp")
    agree(parts, root, case.get("align", 16), case["codes"][0] if "codes" in case else None)


def test_another_images_code(tmp_path: Path) -> None:
    root = make(codes=[[0.5, -1.0], [2.0, 1.5]])
    path = put(tmp_path / "x.ingp", root)
    agree(read(path, image="1"), root, code=[2.0, 1.5])
    assert any("image 1" in note for note in read(path, image="1").notes)
    for bad in ("2", "-1", "last"):
        with pytest.raises(InputError, match=r"codes of 2 images"):
            read(path, image=bad)


def test_hdr(tmp_path: Path) -> None:
    root = make()
    root["snapshot"]["nerf"]["dataset"]["is_hdr"] = True
    parts = read(put(tmp_path / "x.ingp", root))
    assert (parts.config["color_activation"], parts.scene.color_space) == ("exp", "linear")
    agree(parts, root)
    assert read(put(tmp_path / "y.ingp", make()), linear_colors="true").scene.color_space == "linear"
    with pytest.raises(InputError, match="linear_colors"):
        read(put(tmp_path / "y.ingp", make()), linear_colors="maybe")


def test_every_container(tmp_path: Path) -> None:
    root = make()
    raw = msgpack.packb(root)
    blob = root["snapshot"]["params_binary"]
    text = {**root, "snapshot": {**root["snapshot"], "params_binary": {"bytes": list(blob), "subtype": None}}}
    files = {"raw": raw, "gzip": gzip.compress(raw, 0), "zlib": zlib.compress(raw), "json": json.dumps(text).encode()}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        assert identify(tmp_path / name).format == "instant-ngp"
        agree(read(tmp_path / name), root)


def test_old_files_without_a_type(tmp_path: Path) -> None:
    root = make(half=False)
    del root["snapshot"]["params_type"]
    parts = read(put(tmp_path / "x.msgpack", root, packed=False))
    assert parts.tensors["encoder.embeddings"].dtype == "float32"
    root["snapshot"]["params_type"] = "float"
    agree(parts, root)


@pytest.mark.parametrize(
    ("scale", "l16", "l8"),
    [(1, 12_196_240, 11_681_792), (2, 12_599_920, 12_660_928), (4, 13_074_912, 12_855_296), (8, 13_288_400, 12_940_032),
     (16, 13_623_184, 13_041_664), (32, 13_918_896, 13_194_816), (64, 14_008_608, 13_379_744),
     (128, 14_110_032, 13_647_872)],
)  # fmt: skip
def test_parameter_counts_of_the_layouts_table(scale: int, l16: int, l8: int) -> None:
    root = {**make(), "network": {**NET, "n_neurons": 64, "n_hidden_layers": 1},
            "rgb_network": {**NET, "n_neurons": 64, "n_hidden_layers": 2}}  # fmt: skip
    for levels, features, expected in ((16, 2, l16), (8, 4, l8)):
        encoding = {"otype": "HashGrid", "n_levels": levels, "n_features_per_level": features,
                    "log2_hashmap_size": 19, "base_resolution": 16}  # fmt: skip
        count = grid_entries(read_grid(encoding, scale, "x"), "x") * features
        assert count == expected
        assert fit_shapes(root, 32, count, (), expected + 10_240, "x").size == expected + 10_240


def test_the_count_of_issue_845() -> None:
    """13 084 640 = 13 074 912 + 9 728: CutlassMLP padded to 8, whose last colour matrix has 8 rows instead of 16."""
    root = {**make(), "network": {**NET, "otype": "FullyFusedMLP", "n_neurons": 64, "n_hidden_layers": 1},
            "rgb_network": {**NET, "n_neurons": 64, "n_hidden_layers": 2}}  # fmt: skip
    shapes = fit_shapes(root, 32, 13_074_912, (), 13_084_640, "x")
    assert shapes.color.shapes[-1] == (8, 64)
    with pytest.raises(InputError, match="makes 13085152 parameters, params_binary holds 13084641"):
        fit_shapes(root, 32, 13_074_912, (), 13_084_641, "x")


# ------------------------------------------------------------------------------------------------- scene


def density_grid(cells: dict[tuple[int, int, int, int], float], cascades: int, rest: float = 0.0) -> NDArray[Any]:
    """[C * 128^3] in Morton order, by its definition: bit 3 b + axis is bit b of the cell's coordinate."""
    out = np.full(cascades * 128**3, rest, np.float16)
    for (cascade, *cell), value in cells.items():
        index = sum((v >> b & 1) << (3 * b + axis) for axis, v in enumerate(cell) for b in range(7))
        out[cascade * 128**3 + index] = value
    return out


def test_the_density_grid_is_a_mask(tmp_path: Path) -> None:
    # The mean of what is positive is far below 0.01, so that it is the threshold.
    cells = {(0, 3, 100, 77): 0.5, (0, 0, 0, 1): 3e-4, (0, 0, 1, 0): -1.0, (0, 1, 0, 0): 2e-8}
    grid = density_grid(cells, 1)
    root = make(density_grid_size=128, density_grid_binary=grid.tobytes())
    parts = read(put(tmp_path / "x.ingp", root))
    limit = min(0.01, float(np.maximum(grid.astype(np.float64), 0).mean()))
    assert 2e-8 < limit < 3e-4
    field = load(parts)
    centers = {c: torch.tensor([[(v + 0.5) / 128 for v in c[1:]]]) for c in cells}
    with torch.no_grad():
        answers = {c: float(field(x, torch.tensor([[0.0, 0.0, 1.0]]))[0]) > 0 for c, x in centers.items()}
    assert answers == {(0, 3, 100, 77): True, (0, 0, 0, 1): True, (0, 0, 1, 0): False, (0, 1, 0, 0): False}


def test_cascades(tmp_path: Path) -> None:
    """Section 1.6: the smallest cascade that holds the point; a coarse cell also has what the finer one has in it."""
    cells = {(0, 64, 64, 64): 1.0, (1, 5, 70, 100): 1.0, (2, 0, 127, 64): 1.0}
    grid = density_grid(cells, 3)
    root = make(aabb_scale=4, density_grid_size=128, density_grid_binary=grid.tobytes())
    parts = read(put(tmp_path / "x.ingp", root))
    assert parts.config["mask"] == {"shape": [3, 128, 128, 128], "center": [0.5] * 3, "halves": [0.5, 1.0, 2.0]}
    field = load(parts)
    assert field.mask is not None
    for cascade, *cell in cells:
        x = [((v + 0.5) / 128 - 0.5) * 2.0**cascade + 0.5 for v in cell]
        assert bool(field.mask.inside(torch.tensor([x])))
        x[0] += 2.0**cascade / 128
        assert not bool(field.mask.inside(torch.tensor([x])))
    bits = np.unpackbits(parts.tensors["mask.bits"].numpy(), bitorder="little").reshape(3, 128, 128, 128)
    assert bits[1][64, 64, 64] == bits[2][64, 64, 64] == 1  # pooled: 64 / 2 + 32
    assert int(bits[2].sum()) == 3


def test_version_zero(tmp_path: Path) -> None:
    """float32, all compiled cascades, no version, bare camera matrices."""
    cells = {(0, 3, 100, 77): 0.5}
    grid = density_grid(cells, 5).astype(np.float32)
    root = make(density_grid_size=128, density_grid_binary=grid.tobytes())
    del root["snapshot"]["version"], root["snapshot"]["mode"], root["snapshot"]["params_type"]
    root["snapshot"]["nerf"]["dataset"] |= {
        "n_images": 1, "xforms": [[[1, 0, 0, 0.5], [0, 1, 0, 0.25], [0, 0, 1, -1.0]]],
        "focal_lengths": [[100.0, 110.0]], "image_resolution": [40, 30], "principal_point": [0.5, 0.25],
    }  # fmt: skip
    parts = read(put(tmp_path / "x.msgpack", root, packed=False))
    assert parts.config["mask"] == {"shape": [128] * 3, "origin": [0.0] * 3, "cell": 1 / 128}
    assert int(np.unpackbits(parts.tensors["mask.bits"].numpy()).sum()) == 1
    (camera,) = parts.scene.cameras
    assert (camera.width, camera.height, camera.fx, camera.fy, camera.cx, camera.cy) == (40, 30, 100, 110, 20, 7.5)
    assert camera.c2w == ((1, 0, 0, 0.5), (0, -1, 0, 0.25), (0, 0, -1, -1.0))  # right, down, forward -> OpenGL


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_grid_that_says_nothing(tmp_path: Path, share: float) -> None:
    grid = density_grid({}, 1, rest=share)
    parts = read(put(tmp_path / "x.ingp", make(density_grid_binary=grid.tobytes())))
    assert parts.config["mask"] is None
    assert any("never trained" in note for note in parts.notes) == (share == 0.0)
    empty = read(put(tmp_path / "y.ingp", make(density_grid_binary=b"")))
    assert any("density grid is empty" in note for note in empty.notes)


@pytest.mark.parametrize("mitsuba", [False, True])
def test_coordinates(tmp_path: Path, mitsuba: bool) -> None:
    """Section 1.5: a point p of the data set is at p s + o, rows cycled to (y, z, x) unless from_mitsuba."""
    root = make(aabb_scale=2, render_aabb={"min": [-0.25, 0.0, 0.25], "max": [1.0, 1.25, 9.0]})
    root["snapshot"]["nerf"]["dataset"] |= {"scale": 0.4, "offset": [0.5, 0.6, 0.7], "from_mitsuba": mitsuba}
    scene = read(put(tmp_path / "x.ingp", root)).scene
    p = np.array([1.0, -2.0, 0.5])
    moved = p * 0.4 + [0.5, 0.6, 0.7]
    there = moved if mitsuba else moved[[1, 2, 0]]
    np.testing.assert_allclose((np.array(scene.world) @ [*there, 1.0])[:3], p, atol=1e-12)
    assert scene.box == Box((-0.25, 0.0, 0.25), (1.0, 1.25, 1.5))
    assert scene.step == pytest.approx(3**0.5 / 1024)
    assert (scene.background, scene.color_space, scene.assumed) == ((0.0, 0.0, 0.0), "srgb", ("step",))


def test_crops_that_cannot_be(tmp_path: Path) -> None:
    inf = float("inf")
    none = make(render_aabb={"min": [inf] * 3, "max": [-inf] * 3})
    assert read(put(tmp_path / "x.ingp", none)).scene.box == Box.cube(0.5, (0.5, 0.5, 0.5))
    away = read(put(tmp_path / "x.ingp", make(render_aabb={"min": [5, 5, 5], "max": [6, 6, 6]})))
    assert any("outside of the model" in note for note in away.notes)
    turned = make(
        render_aabb={"min": [0.1] * 3, "max": [0.9] * 3}, render_aabb_to_local=[[0, 1, 0], [-1, 0, 0], [0, 0, 1]]
    )
    parts = read(put(tmp_path / "x.ingp", turned))
    assert parts.scene.box == Box.cube(0.5, (0.5, 0.5, 0.5))
    assert any("turned" in note for note in parts.notes)


def test_cameras_of_every_lens(tmp_path: Path) -> None:
    eye = [[1.0, 0, 0, 0.1], [0, 1, 0, 0.2], [0, 0, 1, 0.3]]
    lenses = [{}, None, {"is_fisheye": False, "k1": 0.1, "k2": 0, "p1": 0, "p2": 0}, {"is_fisheye": True, "k1": 1.0},
              {"latlong": True}]  # fmt: skip
    common = {"resolution": [64, 48], "focal_length": [50.0, 55.0], "principal_point": [0.5, 0.5]}
    root = make()
    root["snapshot"]["nerf"]["dataset"] |= {
        "n_images": 6,
        "metadata": [*({**common, "lens": lens} for lens in lenses), {"resolution": [64, 48]}],
        "xforms": [{"start": eye, "end": eye}] * 6,
    }
    parts = read(put(tmp_path / "x.ingp", root))
    assert len(parts.scene.cameras) == 3
    assert any("3 of 6 cameras" in note for note in parts.notes)
    assert any("distortion of 1 cameras" in note for note in parts.notes)


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    root = make(optimizer={"first_moments_binary": b"1234", "nested": {"x_binary": b"5"}})
    root["snapshot"]["nerf"]["dataset"]["envmap_resolution"] = [64, 32]
    root["snapshot"]["extra_binary"] = b"678"
    notes = read(put(tmp_path / "x.ingp", root)).notes
    assert any("optimizer" in n for n in notes)
    assert any("environment map" in n for n in notes)
    assert any("snapshot.extra_binary is left out" in n for n in notes)


# ------------------------------------------------------------------------------------------------- refusals


def changed(**changes: Any) -> dict[str, Any]:
    """A snapshot with entries replaced; keys are paths with __ between."""
    root: dict[str, Any] = make()
    for path, value in changes.items():
        *parents, last = path.split("__")
        table: Any = root
        for key in parents:
            table[key] = dict(table[key])
            table = table[key]
        if value is None:
            del table[last]
        else:
            table[last] = value
    return root


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"snapshot__mode": "sdf"}, "mode 'sdf'"),
        ({"snapshot__mode": "image"}, "mode 'image'"),
        ({"encoding": None}, "'encoding' is missing"),
        ({"network": None}, "'network' is missing"),
        ({"rgb_network": 5}, "'rgb_network' is no table"),
        ({"dir_encoding": None}, "'dir_encoding' is missing"),
        ({"encoding__otype": "OneBlob"}, "'OneBlob' of the position"),
        ({"encoding__otype": "Composite"}, "'Composite' of the position"),
        ({"encoding__hash": "Prime"}, "hash 'Prime'"),
        ({"encoding__stochastic_interpolation": True}, "stochastic_interpolation"),
        ({"encoding__fixed_point_pos": True}, "fixed_point_pos"),
        ({"encoding__interpolation": "Cubic"}, "interpolation 'Cubic'"),
        ({"encoding__n_levels": 2.5}, "n_levels is 2.5"),
        ({"encoding__n_levels": 5}, "params_binary holds"),
        ({"encoding__n_levels": 1000}, "n_levels = 1000"),
        ({"encoding__per_level_scale": 1e5}, "impossibly fine"),
        ({"encoding__per_level_scale": "two"}, "per_level_scale"),
        ({"network__activation": "Sine"}, "activation 'Sine'"),
        ({"network__output_activation": "Exponential"}, "output_activation 'Exponential'"),
        ({"rgb_network__otype": "ResNet"}, "otype 'ResNet'"),
        ({"network__n_neurons": "many"}, "n_neurons is 'many'"),
        ({"dir_encoding": {"otype": "SphericalHarmonics", "degree": 6}}, "degree 6"),
        ({"dir_encoding": {"otype": "OneBlob"}}, "'OneBlob'"),
        ({"dir_encoding": {"otype": "Composite", "reduction": "Sum", "nested": [{}]}}, "does not concatenate"),
        ({"dir_encoding": {"otype": "Frequency", "n_frequencies": 4}}, "params_binary holds|beside a grid"),
        ({"snapshot__params_type": "bfloat"}, "params_type 'bfloat'"),
        ({"snapshot__params_binary": "text"}, "params_binary is no binary"),
        ({"snapshot__params_binary": b"123"}, "params_binary holds 3 bytes"),
        ({"snapshot__n_params": 7}, "7 float16 were expected"),
        ({"snapshot__nerf__dataset__aabb_scale": 3}, "aabb_scale is 3"),
        ({"snapshot__nerf__dataset__aabb_scale": 256}, "aabb_scale is 256"),
        ({"snapshot__nerf__dataset__n_extra_learnable_dims": 4}, "without its training images"),
        ({"snapshot__density_grid_binary": b"12"}, "density_grid_binary holds 2 bytes"),
        ({"snapshot__density_grid_binary": b"", "snapshot__density_grid_size": 64}, "density_grid_size is 64"),
        ({"snapshot__pvdconvert": {"scene": {"box": 5}}}, "snapshot.pvdconvert"),
    ],
)  # fmt: skip
def test_malformed_files(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    path = put(tmp_path / "x.ingp", changed(**changes))
    with pytest.raises(InputError, match=match) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_probe_leaves_others_alone(tmp_path: Path) -> None:
    for tree in ({"snapshot": {"version": 1}}, {"params": {"kernel": b"1"}}, {"snapshot": [1]}):
        assert probe(open_manifest(put(tmp_path / "x", tree))) is None
