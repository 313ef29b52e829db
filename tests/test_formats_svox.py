"""svox's `.npz` (PlenOctree): its own file and answers, the formula in float64 on hand-made trees, and writing."""

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
from pvdconvert.plugin import ArrayTensor, Budget, Parts, ReadOptions
from pvdconvert.registry import default
from pvdconvert.scene import Scene
from pvdconvert.testing.subject import Subject
from pvdconvert.writing import write_checked
from pvdconvert_formats.svox import Svox, hang
from pvdconvert_plugins.plenoctree import Plenoctree
from tests import peers

F = Svox()
Arrays = dict[str, Any]


def save(path: Path, arrays: Arrays) -> Path:
    with path.open("wb") as file:
        np.savez(file, **arrays)
    return path


def made(kind: str = "SH9", side: int = 2, nodes: int = 20, seed: int = 0) -> Arrays:
    """A tree in svox's own members, split at random leaves one by one; a box of three different sides."""
    rng = np.random.default_rng(seed)
    child = np.zeros((nodes, side, side, side), np.int32)
    parent_depth = np.zeros((nodes, 2), np.int32)
    flat = child.reshape(-1)
    cells = side**3
    for node in range(1, nodes):
        row = rng.choice(np.flatnonzero(flat[: node * cells] == 0))
        flat[row] = node - row // cells
        parent_depth[node] = row, parent_depth[row // cells, 1] + 1
    lobes = 1 if kind == "RGBA" else int(kind.lstrip("ASGH"))
    extra = {}
    if kind.startswith("SG"):
        extra["extra_data"] = rng.normal(size=(lobes, 4)).astype(np.float32)
    if kind.startswith("ASG"):
        extra["extra_data"] = rng.normal(size=(lobes, 11)).astype(np.float32)
    return {
        "data_dim": 3 * lobes + 1,
        "child": child,
        "parent_depth": parent_depth,
        "n_internal": nodes,
        "n_free": 0,
        "invradius3": np.array([0.5, 0.4, 0.7], np.float32),
        "offset": np.array([0.4, 0.55, 0.5], np.float32),
        "depth_limit": 10,
        "geom_resize_fact": 1.0,
        "data": rng.normal(size=(nodes, side, side, side, 3 * lobes + 1)).astype(np.float16),
        "data_format": kind,
        **extra,
    }


def basis(kind: str, d: NDArray[Any], extra: NDArray[Any] | None) -> NDArray[Any]:
    """Layouts 0.3 (up to degree 2) and 4.2, one direction: [B]."""
    x, y, z = d
    if kind == "RGBA":
        return np.ones(1)
    if kind.startswith("SH"):
        one, two = 0.48860251190291987, 1.0925484305920792
        full = [0.28209479177387814, -one * y, one * z, -one * x, two * x * y, -two * y * z,
                0.94617469575755997 * z**2 - 0.31539156525251999, -two * x * z, two / 2 * (x**2 - y**2)]  # fmt: skip
        return np.array(full[: int(kind[2:])])
    assert extra is not None
    if kind.startswith("SG"):
        return np.array([np.exp(r[0] * (r[1:] @ d - 1)) for r in extra.astype(np.float64)]) / len(extra)
    return np.array(
        [
            (d @ r[8:]) * np.exp(-r[0] * (d @ r[2:5]) ** 2 - r[1] * (d @ r[5:8]) ** 2)
            for r in extra.astype(np.float64)
        ]
    ) / len(extra)  # fmt: skip


def forward(arrays: Arrays, kind: str, p: NDArray[Any], d: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Layouts section 4.2 in float64, point by point: density and colour at ``p`` inside of the box."""
    child, data = arrays["child"], arrays["data"].astype(np.float64)
    side = child.shape[1]
    inverse = np.asarray(arrays["invradius3"] if "invradius3" in arrays else arrays["invradius"], np.float64)
    sigma, rgb = [], []
    for one, direction in zip(arrays["offset"].astype(np.float64) + p * inverse, d):
        u, node = one.copy(), 0
        while True:
            i = np.minimum(np.floor(u * side), side - 1).astype(int)
            u = u * side - i
            step = child[(node, *i)]
            if step == 0:
                break
            node += step
        row = data[(node, *i)]
        sigma.append(max(row[-1], 0.0))
        value = row[:-1].reshape(3, -1) @ basis(kind, direction, arrays.get("extra_data"))
        rgb.append(1 / (1 + np.exp(-value)))
    return np.array(sigma), np.array(rgb)


def check(path: Path, arrays: Arrays, kind: str) -> None:
    loaded = open_field(path)
    rng = np.random.default_rng(5)
    inverse = np.broadcast_to(np.asarray(arrays.get("invradius3", arrays.get("invradius")), np.float64), (3,))
    u = rng.uniform(-0.1, 1.1, (800, 3))
    u = u[(np.abs(u * 2**10 - np.round(u * 2**10)) > 1e-2).all(-1)]  # faces fall either way in float32
    if arrays["child"].shape[1] == 3:
        u = u[(np.abs(u * 3**6 - np.round(u * 3**6)) > 1e-2).all(-1)]
    p = ((u - arrays["offset"]) / inverse).astype(np.float32)
    d = rng.normal(size=p.shape)
    d /= np.linalg.norm(d, axis=1, keepdims=True)
    inside = ((u >= 0) & (u <= 1)).all(-1)
    with torch.no_grad():
        ours, color = loaded.field(torch.from_numpy(p), torch.tensor(d, dtype=torch.float32))
    assert not bool(ours[torch.from_numpy(~inside)].any())
    sigma, rgb = forward(arrays, kind, p[inside].astype(np.float64), d[inside])
    assert 0.2 < (sigma > 0).mean() < 0.8
    np.testing.assert_allclose(ours.numpy()[inside], sigma, rtol=1e-6)
    np.testing.assert_allclose(color.numpy()[inside], rgb, atol=1e-5)
    np.testing.assert_allclose(loaded.scene.box.min, -arrays["offset"] / inverse, rtol=1e-6)
    np.testing.assert_allclose(loaded.scene.box.max, (1 - arrays["offset"]) / inverse, rtol=1e-6)


@pytest.mark.requires_data
@pytest.mark.slow
def test_its_own_file_and_answers(data_root: Path) -> None:
    folder = data_root / "checkpoints/peers/svox"
    loaded = open_field(folder / "lego_sh9.npz")
    truth = peers.oracle(folder / "oracle_lego_sh9.npz")
    assert (loaded.format, loaded.architecture) == ("svox", "plenoctree")
    assert loaded.scene.box.center == pytest.approx((0, 0, 0.1875))
    assert loaded.parts.config["resolution"] == 128
    assert max(peers.check_points(loaded, truth)) < 1e-5
    # svox steps from leaf to leaf: ours are to be small beside a leaf (0.023).
    peers.check_views(loaded, truth, step=0.004)


@pytest.mark.requires_data
def test_its_own_file_is_written_back_member_by_member(data_root: Path, tmp_path: Path) -> None:
    path = data_root / "checkpoints/peers/svox/lego_sh9.npz"
    F.write(F.read(open_manifest(path), ReadOptions()), tmp_path / "back.npz")
    with np.load(path) as theirs, np.load(tmp_path / "back.npz") as ours:
        assert ours.files == theirs.files
        for name in set(theirs.files) - {"depth_limit"}:
            assert ours[name].dtype == theirs[name].dtype
            np.testing.assert_array_equal(ours[name], theirs[name])


@pytest.mark.parametrize("kind", ["SH1", "SH4", "SH9", "SG3", "ASG2", "RGBA"])
def test_the_formula_on_hand_made_trees(kind: str, tmp_path: Path) -> None:
    arrays = made(kind)
    check(save(tmp_path / "tree.npz", arrays), arrays, kind)


def test_other_branching(tmp_path: Path) -> None:
    arrays = made("SH4", side=3, nodes=9)
    check(save(tmp_path / "tree.npz", arrays), arrays, "SH4")


@pytest.mark.parametrize("kind", ["SH4", "RGBA"])
def test_old_files(kind: str, tmp_path: Path) -> None:
    """No format, one radius, float32 leaves, no table of parents."""
    arrays = made(kind)
    arrays["invradius"] = np.float32(0.5)
    arrays["data"] = arrays["data"].astype(np.float32) + np.float32(1e-4)
    for key in ("invradius3", "data_format", "parent_depth", "n_free"):
        del arrays[key]
    path = save(tmp_path / "old.npz", arrays)
    check(path, arrays, kind)
    assert read_parts(path)[1].config["store_dtype"] == "float32"


@pytest.mark.parametrize("kind", ["SH9", "SG3", "RGBA"])
def test_it_writes_what_it_reads(kind: str, tmp_path: Path) -> None:
    """svox's own members come out again, its table of parents made anew; nodes that hang on nothing are freed."""
    arrays = made(kind)
    cut = np.argwhere(arrays["child"] == 19 - np.arange(20)[:, None, None, None])[0]  # the leaf node 19
    arrays["child"][tuple(cut)] = 0
    arrays["parent_depth"][19], arrays["n_free"] = -1, 1
    path = save(tmp_path / "tree.npz", arrays)
    check(path, arrays, kind)
    F.write(F.read(open_manifest(path), ReadOptions()), tmp_path / "back.npz")
    with np.load(tmp_path / "back.npz") as back:
        assert set(back.files) == set(arrays)
        for name, value in arrays.items():
            np.testing.assert_array_equal(back[name], value)
    assert hang(arrays["child"])[1] == arrays["parent_depth"][:, 1].max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": None}, "'data' is missing"),
        ({"offset": None}, "'offset' is missing"),
        ({"invradius3": None}, "'invradius' is missing"),
        ({"invradius3": np.zeros(3)}, "three positive numbers"),
        ({"offset": np.array([0, np.inf, 0])}, "three finite"),
        ({"child": np.zeros((20, 2, 2, 3), np.int32)}, "'child' is int32"),
        ({"child": np.zeros((20, 2, 2, 2), np.float32)}, "'child' is float32"),
        ({"data": np.zeros((7, 2, 2, 2, 28), np.float16)}, "'data' is float16"),
        ({"data_format": "SH16"}, "not SH16, which has 49"),
        ({"data_format": "SH0"}, "unknown"),
        ({"data": np.zeros((20, 2, 2, 2, 25), np.float16), "data_format": "SH8"}, "1, 4, 9, 16 or 25"),
        ({"data_format": "SG9"}, "'extra_data' is missing"),
        ({"quant_map": np.zeros(3)}, "quantised for volrend"),
        ({"colour_map": np.zeros(3)}, "'colour_map' has no place"),
        ({"pvdconvert": np.array("[]")}, "damaged"),
    ],
)
def test_refusals_name_the_key(change: Arrays, message: str, tmp_path: Path) -> None:
    arrays = {k: v for k, v in {**made(), **change}.items() if v is not None}
    path = save(tmp_path / "bad.npz", arrays)
    with pytest.raises(InputError, match=message) as error:
        F.read(open_manifest(path), ReadOptions())
    assert "bad.npz" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_tree_that_turns_in_a_circle_is_refused(tmp_path: Path) -> None:
    arrays = made()
    arrays["child"][19, 0, 0, 0] = -19
    with pytest.raises(InputError, match=r"bad.npz.*'child'.*hangs on two cells"):
        open_field(save(tmp_path / "bad.npz", arrays))


def test_what_the_user_says_wins(tmp_path: Path) -> None:
    path = save(tmp_path / "tree.npz", made())
    said = F.read(open_manifest(path), ReadOptions(background=(0.0, 0.0, 0.0), far=6.0)).scene
    assert (said.background, said.far, said.assumed) == ((0.0, 0.0, 0.0), 6.0, ())
    assert "background" in " ".join(read_parts(path)[1].notes)


def student() -> Parts:
    """A small student as the road makes it, stirred."""
    s, p = Subject("plenoctree"), Plenoctree()
    config = p.plan(s.facts, Budget("fast", max_mb=1.0), F.limits("plenoctree"), {})
    field = p.build(config, s.scene, 0)
    field.restrict(s.occupancy)
    with torch.no_grad():
        for v in field.parameters():
            v.add_(torch.randn(v.shape))
    config, tensors = p.save(field)
    return Parts("plenoctree", config, {k: ArrayTensor(t.numpy()) for k, t in tensors.items()}, s.scene)


def test_a_student_is_read_back_equal(tmp_path: Path) -> None:
    """Bit by bit, by content, with the same scene; as svox sees it, nothing dense lies outside of the box."""
    parts = student()
    path = tmp_path / "student.npz"
    write_checked(parts, path, "svox", default())
    assert identify(path).format == "svox"
    back = F.read(open_manifest(path), ReadOptions())
    assert back.scene == parts.scene
    assert {**back.config, "resolution": 0} == {**parts.config, "resolution": 0}
    with np.load(path) as file:
        arrays = {k: file[k] for k in file.files if k != "pvdconvert"}
    loaded = open_field(save(tmp_path / "theirs.npz", arrays))
    x = torch.rand(20_000, 3) * 3 - 1.5
    beyond = (x.abs() > 1).any(-1)
    sigma = loaded.field.density(x)
    assert not bool(sigma[beyond].any())
    assert bool((sigma > 0).any())


def test_what_it_cannot_hold_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    fine = student()
    with pytest.raises(RequestError, match="stores float16"):
        F.write(dataclasses.replace(fine, config={**fine.config, "store_dtype": "float32"}), path)
    with pytest.raises(RequestError, match="--to plenoctree"):
        F.write(Parts("ngp", {}, {}, Scene(fine.scene.box)), path)
    assert not path.exists()
