"""svox2's `.npz` (Plenoxels): its own file and answers, the formula in float64 on hand-made files, and writing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pvdconvert.containers import open_manifest
from pvdconvert.errors import InputError, RequestError
from pvdconvert.identify import identify
from pvdconvert.loading import open_field, read_parts
from pvdconvert.plugin import ArrayTensor, Budget, Limits, Parts, ReadOptions
from pvdconvert.registry import default
from pvdconvert.scene import Box, Scene
from pvdconvert.testing.subject import Subject
from pvdconvert.writing import write_checked
from pvdconvert_formats.svox2 import Svox2
from pvdconvert_plugins.plenoxels import Plenoxels
from tests import peers

F = Svox2()
Arrays = dict[str, Any]


def save(path: Path, arrays: Arrays) -> Path:
    with path.open("wb") as file:
        np.savez(file, **arrays)
    return path


def made(bands: int = 2, shape: tuple[int, int, int] = (5, 7, 4), seed: int = 0) -> Arrays:
    """A file in svox2's own members: some voxels empty, densities of both signs, a box of three different sides."""
    rng = np.random.default_rng(seed)
    there = rng.random(shape) < 0.6
    links = np.full(shape, -1, np.int32)
    links[there] = rng.permutation(int(there.sum()))
    count = int(there.sum())
    return {
        "radius": np.array([1.0, 1.4, 0.8], np.float32),
        "center": np.array([0.1, -0.3, 0.5], np.float32),
        "links": links,
        "density_data": rng.normal(2.0, 20.0, (count, 1)).astype(np.float32),
        "sh_data": rng.normal(0.0, 0.7, (count, 3 * bands**2)).astype(np.float16),
        "basis_type": np.array(1),
    }


def harmonics(d: NDArray[Any]) -> NDArray[Any]:
    """Degree 2, of layouts section 0.3."""
    x, y, z = d.T
    one, two = 0.48860251190291987, 1.0925484305920792
    return np.stack(
        [
            np.full_like(x, 0.28209479177387814), -one * y, one * z, -one * x, two * x * y, -two * y * z,
            0.94617469575755997 * z**2 - 0.31539156525251999, -two * x * z, two / 2 * (x**2 - y**2),
        ],
        -1,
    )  # fmt: skip


def forward(arrays: Arrays, p: NDArray[Any], d: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Layouts section 4.1 in float64, voxel by voxel: density and colour at ``p`` inside of the box."""
    links = arrays["links"]
    if "data" in arrays:
        density, sh = arrays["data"][:, :1].astype(np.float64), arrays["data"][:, 1:].astype(np.float64)
    else:
        density, sh = arrays["density_data"].astype(np.float64), arrays["sh_data"].astype(np.float64)
    n = np.array(links.shape, np.float64)
    radius = arrays.get("radius", np.ones(3)).astype(np.float64)
    center = arrays.get("center", np.zeros(3)).astype(np.float64)
    g = (0.5 * (1 - center / radius) + p * 0.5 / radius) * n - 0.5
    g = np.clip(g, 0, n - 1)
    cell = np.minimum(np.floor(g), n - 2).astype(int)
    raw, coefficients = np.zeros(len(p)), np.zeros((len(p), sh.shape[1]))
    for i, (low, where) in enumerate(zip(cell, g)):
        for corner in np.ndindex(2, 2, 2):
            row = links[tuple(low + corner)]
            if row >= 0:
                weight = np.prod(np.where(np.array(corner) == 1, where - low, 1 - (where - low)))
                raw[i] += weight * density[row, 0]
                coefficients[i] += weight * sh[row]
    b = sh.shape[1] // 3
    rgb = (coefficients.reshape(-1, 3, b) * harmonics(d)[:, None, :b]).sum(-1)
    return np.maximum(raw, 0), np.maximum(rgb + 0.5, 0)


def check(path: Path, arrays: Arrays) -> None:
    field = open_field(path).field
    rng = np.random.default_rng(5)
    radius, center = (arrays.get(k, v).astype(np.float64) for k, v in (("radius", np.ones(3)), ("center", np.zeros(3))))
    p = center + radius * rng.uniform(-1.3, 1.3, (600, 3))
    p = p[(np.abs(np.abs((p - center) / radius) - 1) > 1e-4).all(-1)]
    d = rng.normal(size=(len(p), 3))
    d /= np.linalg.norm(d, axis=1, keepdims=True)
    sigma, rgb = forward(arrays, p, d)
    outside = (np.abs((p - center) / radius) > 1).any(-1)
    assert 0.1 < outside.mean() < 0.9
    with torch.no_grad():
        ours, color = field(torch.tensor(p, dtype=torch.float32), torch.tensor(d, dtype=torch.float32))
    assert not bool(ours[torch.from_numpy(outside)].any())
    assert (sigma[~outside] > 0).mean() > 0.2
    np.testing.assert_allclose(ours.numpy()[~outside], sigma[~outside], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(color.numpy()[~outside], rgb[~outside], rtol=1e-4, atol=1e-4)


@pytest.mark.requires_data
def test_its_own_file_and_answers(data_root: Path) -> None:
    folder = data_root / "checkpoints/peers/svox2"
    loaded = open_field(folder / "lego_sh2.npz")
    truth = peers.oracle(folder / "oracle_lego_sh2.npz")
    assert (loaded.format, loaded.architecture) == ("svox2", "plenoxels")
    assert loaded.scene.box == Box.cube(1.0)
    assert loaded.scene.step == pytest.approx(0.5 * 2 / 128)
    assert max(peers.check_points(loaded, truth)) < 1e-5
    scale = float(truth["world_scale"])
    to_scene = np.diag([scale, scale, scale, 1.0])
    peers.check_views(loaded, truth, c2w="view{}_c2w_file", to_scene=to_scene)


@pytest.mark.requires_data
def test_its_own_file_is_written_back_member_by_member(data_root: Path, tmp_path: Path) -> None:
    path = data_root / "checkpoints/peers/svox2/lego_sh2.npz"
    F.write(F.read(open_manifest(path), ReadOptions()), tmp_path / "back.npz")
    with np.load(path) as theirs, np.load(tmp_path / "back.npz") as ours:
        assert ours.files == theirs.files
        for name in theirs.files:
            assert ours[name].dtype == theirs[name].dtype
            np.testing.assert_array_equal(ours[name], theirs[name])


@pytest.mark.parametrize("bands", [1, 2, 3])
def test_the_formula_on_hand_made_files(bands: int, tmp_path: Path) -> None:
    arrays = made(bands, seed=bands)
    check(save(tmp_path / "a.npz", arrays), arrays)


def test_old_files_hold_one_table_and_no_box(tmp_path: Path) -> None:
    """float32 there: it stays float32."""
    arrays = made()
    both = np.concatenate([arrays["density_data"], arrays["sh_data"].astype(np.float32) + 1e-5], 1)
    old = {"links": arrays["links"], "data": both}
    path = save(tmp_path / "old.npz", old)
    check(path, old)
    assert read_parts(path)[1].config["store_dtype"] == "float32"


def test_rows_that_no_voxel_links_and_rows_that_two_share(tmp_path: Path) -> None:
    arrays = made()
    flat = arrays["links"].reshape(-1)
    there = np.flatnonzero(flat >= 0)
    flat[there[:9]] = -1
    flat[there[10]] = flat[there[11]]
    check(save(tmp_path / "pruned.npz", arrays), arrays)


def test_where_density_can_be(tmp_path: Path) -> None:
    """support() holds every dense point, out to the faces, and is not everything."""
    arrays = made(1, (24, 24, 24))
    arrays["links"][np.random.default_rng(0).random((24, 24, 24)) < 0.9] = -1
    arrays["links"][:2] = -1
    arrays["radius"], arrays["center"] = np.ones(3, np.float32), np.zeros(3, np.float32)
    field = open_field(save(tmp_path / "a.npz", arrays)).field
    support = field.support()
    assert support is not None
    x = torch.rand(20_000, 3) * 2 - 1
    x[:2000, 0] = 0.99999
    held = support.contains(x)
    assert bool(held[field.density(x) > 0].all())
    assert not bool(held.all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sh_data": None}, "'sh_data' is missing"),
        ({"density_data": np.zeros((3, 1), np.float32)}, "'density_data' has shape"),
        ({"sh_data": np.zeros((90, 7), np.float16), "density_data": np.zeros((90, 1))}, "7 coefficients"),
        ({"links": np.zeros((5, 7), np.int32)}, "'links' is missing or no grid"),
        ({"links": np.zeros((1, 7, 4), np.int32)}, "'links' has shape"),
        ({"radius": np.array([1.0, 0.0, 1.0])}, "'radius'"),
        ({"center": np.array([np.nan, 0.0, 1.0])}, "'center' is not three"),
        ({"basis_type": np.array(255)}, "a small network"),
        ({"basis_type": np.array([1, 1])}, "not one number"),
        ({"basis_data": np.zeros((2, 2, 2, 4), np.float32)}, "a learned texture"),
        ({"colour_map": np.zeros(3)}, "'colour_map' has no place"),
        ({"pvdconvert": np.array("{")}, "damaged"),
        ({"pvdconvert": np.array("[]")}, "damaged"),
        ({"pvdconvert": np.array('{"scene": {}}')}, "damaged"),
        ({"density_data": None, "sh_data": None, "data": np.zeros((5, 3))}, "'data' has shape"),
    ],
)
def test_refusals_name_the_key(change: Arrays, message: str, tmp_path: Path) -> None:
    arrays = {k: v for k, v in {**made(), **change}.items() if v is not None}
    path = save(tmp_path / "bad.npz", arrays)
    with pytest.raises(InputError, match=message) as error:
        F.read(open_manifest(path), ReadOptions())
    assert "bad.npz" in str(error.value)
    assert "\n" not in str(error.value)


def test_links_beyond_the_tables_are_refused(tmp_path: Path) -> None:
    arrays = made()
    arrays["links"][0, 0, 0] = 10_000
    with pytest.raises(InputError, match="names row 10000"):
        open_field(save(tmp_path / "bad.npz", arrays))


def test_what_is_left_out_or_guessed_is_said(tmp_path: Path) -> None:
    background = {
        "background_links": np.full((8, 4), -1, np.int32),
        "background_data": np.zeros((0, 64, 4), np.float32),
        "radius": np.array([1.5, 1.6, 1.0], np.float32),
    }
    _, parts = read_parts(save(tmp_path / "a.npz", {**made(), **background}))
    notes = " ".join(parts.notes)
    assert "64 layers" in notes
    assert "forward-facing" in notes
    assert "assumed: background" in notes
    given = F.read(open_manifest(tmp_path / "a.npz"), ReadOptions(background=(0.0, 0.5, 0.0), near=0.2))
    assert (given.scene.background, given.scene.near) == ((0.0, 0.5, 0.0), 0.2)
    assert given.scene.assumed == ("step",)


def student(limits: bool = True, **sets: Any) -> Parts:
    """A small student as the road makes it, stirred."""
    s, p = Subject("plenoxels"), Plenoxels()
    config = p.plan(s.facts, Budget("fast"), F.limits("plenoxels") if limits else Limits(), sets)
    field = p.build(config, s.scene, 0)
    field.restrict(s.occupancy)
    with torch.no_grad():
        for v in field.parameters():
            v.add_(torch.randn(v.shape))
    config, tensors = p.save(field)
    return Parts("plenoxels", config, {k: ArrayTensor(t.numpy()) for k, t in tensors.items()}, s.scene)


def test_a_student_planned_for_it_is_read_back_equal(tmp_path: Path) -> None:
    """Bit by bit, by content, with the very same scene; and the formula agrees, so svox2 itself sees that field."""
    parts = student(resolution=20, bands=2)
    path = tmp_path / "student.npz"
    write_checked(parts, path, "svox2", default())
    assert identify(path).format == "svox2"
    back = F.read(open_manifest(path), ReadOptions())
    assert back.config == parts.config
    assert back.scene == parts.scene
    with np.load(path) as file:
        arrays = {k: file[k] for k in file.files if k != "pvdconvert"}
    size = 2 * arrays["radius"].astype(np.float64)
    assert (np.abs(arrays["center"]) + size / 2 <= 1 + 1e-5).all(), "svox2's box leaves the scene's"
    check(save(tmp_path / "theirs.npz", arrays), arrays)
    a, b = open_field(path), open_field(tmp_path / "theirs.npz")
    x, d = torch.rand(3000, 3) * 2.2 - 1.1, torch.tensor([[0.0, 0.6, 0.8]]).expand(3000, 3)
    torch.testing.assert_close(a.field(x, d), b.field(x, d), rtol=1e-3, atol=1e-3)


def test_what_it_cannot_hold_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    with pytest.raises(RequestError, match=r"only holds density_activation = relu.*--as svox2"):
        F.write(student(limits=False, resolution=9), path)
    fine = student(resolution=9)
    with pytest.raises(RequestError, match=r"up to 3 bands.*--set bands=3"):
        F.write(dataclasses.replace(fine, config={**fine.config, "bands": 4}), path)
    with pytest.raises(RequestError, match="leaves the scene's box"):
        F.write(dataclasses.replace(fine, scene=Scene(Box.cube(0.2))), path)
    with pytest.raises(RequestError, match="--to plenoxels"):
        F.write(dataclasses.replace(fine, architecture="ngp"), path)
    with pytest.raises(RequestError, match="bands=4 cannot be had"):
        student(resolution=9, bands=4)
    assert not path.exists()
