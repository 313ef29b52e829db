"""apchenstu/TensoRF: the program's own files with their oracles, known answers of every kind, errors, and writing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pvdconvert.containers import open_manifest
from pvdconvert.errors import InputError, RequestError
from pvdconvert.field import RadianceField
from pvdconvert.loading import open_field, to_torch
from pvdconvert.nn.sh import sh_basis
from pvdconvert.plugin import ArrayTensor, Budget, Parts, ReadOptions, TeacherFacts
from pvdconvert.registry import default
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.scene import Box, RaySpace, Scene
from pvdconvert_formats.apchenstu_tensorf import ApchenstuTensorf, probe
from tests import peers

FORMAT = ApchenstuTensorf()
MAT, VEC = ((0, 1), (0, 2), (1, 2)), (2, 1, 0)
FILES = ["lego_vm_mlpfea", "lego_vm_sh"]
AABB = torch.tensor([[-1.0, -1.2, -0.8], [1.1, 0.9, 1.0]])
GRID = [7, 6, 5]


@pytest.mark.parametrize("name", FILES)
def test_the_programs_own_files(data_root: Path, name: str) -> None:
    folder = data_root / "checkpoints" / "peers" / "TensoRF"
    loaded = open_field(folder / f"{name}.th")
    assert loaded.format == "apchenstu-tensorf"
    truth = peers.oracle(folder / f"oracle_{name}.npz")
    peers.check_points(loaded, truth)
    assert loaded.scene.step == pytest.approx(float(truth["stepSize"]), rel=1e-5)
    assert (loaded.scene.near, loaded.scene.far) == tuple(truth["near_far"])
    assert loaded.scene.assumed == ("background",)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_views_of_the_programs_own_files(data_root: Path, name: str) -> None:
    folder = data_root / "checkpoints" / "peers" / "TensoRF"
    peers.check_views(open_field(folder / f"{name}.th"), peers.oracle(folder / f"oracle_{name}.npz"))


# ---------------------------------------------------------------------------------------- hand-made files, every kind


def hand_made(model: str, mode: str, alpha: bool = True, **changes: Any) -> dict[str, Any]:
    """A checkpoint of the program's key tree (layouts 3.1, 3.2) with random weights."""
    g = torch.Generator().manual_seed(0)
    rank = {"TensorVMSplit": ([3, 4, 5], [6, 5, 4]), "TensorCP": ([9], [7]), "TensorVM": (4, 5)}[model]
    app = 3 if mode == "RGB" else 27
    kwargs: dict[str, Any] = {
        "aabb": AABB, "gridSize": list(GRID), "density_n_comp": rank[0], "appearance_n_comp": rank[1], "app_dim": app,
        "density_shift": -1.5, "alphaMask_thres": 1e-3, "distance_scale": 20.0, "rayMarch_weight_thres": 1e-4,
        "fea2denseAct": "softplus", "near_far": [0.5, 6.0], "step_ratio": 0.5, "shadingMode": mode, "pos_pe": 2,
        "view_pe": 3, "fea_pe": 1, "featureC": 16,
    } | changes  # fmt: skip
    n = kwargs["gridSize"]
    state: dict[str, Tensor] = {}

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g) * 0.8

    if model == "TensorVM":
        both = kwargs["density_n_comp"] + kwargs["appearance_n_comp"]
        n = kwargs["gridSize"] = [n[0]] * 3
        state = {"plane_coef": new(3, both, n[0], n[0]), "line_coef": new(3, both, n[0], 1)}
        products = 3 * kwargs["appearance_n_comp"]
    else:
        for name, ranks in (("density", kwargs["density_n_comp"]), ("app", kwargs["appearance_n_comp"])):
            for i, ((a, b), c) in enumerate(zip(MAT, VEC)):
                if model == "TensorVMSplit":
                    state[f"{name}_plane.{i}"] = new(1, ranks[i], n[b], n[a])
                state[f"{name}_line.{i}"] = new(1, ranks[i if len(ranks) > 1 else 0], n[c], 1)
        products = sum(kwargs["appearance_n_comp"])
    state["basis_mat.weight"] = new(app, products) * 0.4
    if mode.startswith("MLP"):
        wide = (
            app
            + 3
            + 6 * kwargs["view_pe"]
            + {"MLP_Fea": 2 * app * kwargs["fea_pe"], "MLP_PE": 6 * kwargs["pos_pe"]}.get(mode, 0)
        )
        for j, shape in ((0, (kwargs["featureC"], wide)), (2, (kwargs["featureC"],) * 2), (4, (3, kwargs["featureC"]))):
            state[f"renderModule.mlp.{j}.weight"] = new(*shape) * 0.4
            state[f"renderModule.mlp.{j}.bias"] = new(shape[0]) * 0.4
    out: dict[str, Any] = {"kwargs": kwargs, "state_dict": state}
    if alpha:
        volume = torch.rand(1, 1, 6, 5, 4, generator=g) < 0.2
        out["alphaMask.shape"] = tuple(volume.shape)
        out["alphaMask.mask"] = np.packbits(volume.numpy().reshape(-1))
        out["alphaMask.aabb"] = torch.tensor([[-0.9, -1.0, -0.8], [0.8, 0.9, 0.9]])
    return out


def program(file: dict[str, Any], model: str, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Layouts 3.3 and 3.4 in float64, from the checkpoint's own tensors: density per world unit [N], rgb [N, 3]."""
    k, w = file["kwargs"], {name: t.double() for name, t in file["state_dict"].items()}
    x, d = x.double(), d.double()

    def sample(volume: Tensor, *at: Tensor) -> Tensor:
        where = torch.stack(at, -1)[None, :, None]
        return F.grid_sample(volume, where, align_corners=True)[0, :, :, 0]

    def normal(aabb: Tensor) -> Tensor:
        return (x - aabb[0].double()) * 2 / (aabb[1] - aabb[0]).double() - 1

    xn = normal(k["aabb"])
    zero = torch.zeros_like(xn[:, 0])

    def products(name: str) -> Tensor:
        parts = []
        for i in range(3):
            if model == "TensorVM":
                cut = slice(0, k["appearance_n_comp"]) if name == "app" else slice(-k["density_n_comp"], None)
                plane, line = w["plane_coef"][i : i + 1, cut], w["line_coef"][i : i + 1, cut]
            else:
                plane, line = w.get(f"{name}_plane.{i}", zero), w[f"{name}_line.{i}"]
            parts.append(sample(line, zero, xn[:, VEC[i]]))
            if model != "TensorCP":
                parts[-1] = parts[-1] * sample(plane, xn[:, MAT[i][0]], xn[:, MAT[i][1]])
        return parts[0] * parts[1] * parts[2] if model == "TensorCP" else torch.cat(parts)

    raw = products("density").sum(0)
    sigma = F.softplus(raw + k["density_shift"]) if k["fea2denseAct"] == "softplus" else F.relu(raw)
    shown = ((x >= k["aabb"][0]) & (x <= k["aabb"][1])).all(1)
    if "alphaMask.mask" in file:
        shape = file["alphaMask.shape"]
        bits = np.unpackbits(file["alphaMask.mask"])[: np.prod(shape)].reshape(shape)
        at = normal(file["alphaMask.aabb"])[None, :, None, None]
        shown &= F.grid_sample(torch.from_numpy(bits).double(), at, align_corners=True).view(-1) > 0
    app = products("app").t() @ w["basis_mat.weight"].t()
    mode = k["shadingMode"]

    def encoded(v: Tensor, count: int) -> list[Tensor]:
        phase = (v[..., None] * 2.0 ** torch.arange(count)).flatten(1)
        return [phase.sin(), phase.cos()] if count else []

    if mode == "RGB":
        rgb = app
    elif mode == "SH":
        rgb = F.relu((app.view(-1, 3, 9) * sh_basis(d, 3)[:, None]).sum(-1) + 0.5)
    else:
        middle = {"MLP_Fea": encoded(app, k["fea_pe"]), "MLP_PE": encoded(xn, k["pos_pe"]), "MLP": []}[mode]
        h = torch.cat([app, d, *middle, *encoded(d, k["view_pe"])], 1)
        for j in (0, 2, 4):
            h = F.linear(h, w[f"renderModule.mlp.{j}.weight"], w[f"renderModule.mlp.{j}.bias"])
            h = F.relu(h) if j < 4 else h.sigmoid()
        rgb = h
    return torch.where(shown, sigma * k["distance_scale"], 0.0), rgb


def points(count: int = 1500) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = AABB[0] + (AABB[1] - AABB[0]) * (torch.rand(count, 3, generator=g) * 1.2 - 0.1)
    return x, F.normalize(torch.randn(count, 3, generator=g), dim=-1)


def saved(tmp_path: Path, file: dict[str, Any]) -> Path:
    path = tmp_path / "tensorf.th"
    torch.save(file, path)
    return path


def read(path: Path, options: ReadOptions | None = None) -> Parts:
    return FORMAT.read(open_manifest(path), options or ReadOptions())


def field_of(parts: Parts) -> RadianceField:
    tensors = to_torch(parts.tensors, "here")
    return default().architecture(parts.architecture).load(dict(parts.config), tensors, parts.scene)


KINDS = [
    ("TensorVMSplit", "MLP_Fea", {}),
    ("TensorVMSplit", "MLP_Fea", {"fea_pe": 0, "view_pe": 0, "fea2denseAct": "relu"}),
    ("TensorVMSplit", "MLP", {}),
    ("TensorVMSplit", "MLP_PE", {}),
    ("TensorVMSplit", "SH", {"fea2denseAct": "relu"}),
    ("TensorVMSplit", "RGB", {}),
    ("TensorVM", "MLP_Fea", {}),
    ("TensorVM", "SH", {}),
    ("TensorCP", "MLP_Fea", {}),
    ("TensorCP", "SH", {"fea2denseAct": "relu"}),
]


@torch.no_grad()
@pytest.mark.parametrize("alpha", [True, False])
@pytest.mark.parametrize(("model", "mode", "changes"), KINDS)
def test_every_kind_is_the_programs_formula(
    tmp_path: Path, model: str, mode: str, changes: dict[str, Any], alpha: bool
) -> None:
    file = hand_made(model, mode, alpha, **changes)
    path = saved(tmp_path, file)
    match = probe(open_manifest(path))
    assert match is not None
    assert match.score > 0.9
    assert model in match.reason
    parts = read(path)
    x, d = points()
    sigma, rgb = program(file, model, x, d)
    mine, color = field_of(parts)(x, d)
    assert 0.05 < float((sigma > 0).double().mean()) < 0.8
    assert torch.equal(mine > 0, sigma.float() > 0)
    torch.testing.assert_close(mine.double(), sigma, rtol=1e-4, atol=1e-5)
    seen = sigma > 0
    torch.testing.assert_close(color[seen].double(), rgb[seen], rtol=0, atol=5e-5)
    assert parts.scene.box == Box(tuple(AABB[0].tolist()), tuple(AABB[1].tolist()))
    n = file["kwargs"]["gridSize"]
    step = sum(float(s) / (v - 1) for s, v in zip(AABB[1] - AABB[0], n)) / 3 * 0.5
    assert parts.scene.step == pytest.approx(step, rel=1e-6)
    assert parts.scene.background == (1.0, 1.0, 1.0)


@torch.no_grad()
def test_forward_facing_files_are_in_ndc(tmp_path: Path) -> None:
    """near_far 0..1 is written by the program's LLFF loader alone; its network sees the warped ray's direction."""
    box = torch.tensor([[-1.5, -1.67, -1.0], [1.5, 1.67, 1.0]])
    file = hand_made("TensorVMSplit", "SH", False, near_far=[0.0, 1.0], aabb=box)
    path = saved(tmp_path, file)
    parts = read(path)
    assert parts.scene.ray_space.kind == "ndc"
    assert {"ray_space", "background"} == set(parts.scene.assumed)
    with pytest.raises(InputError, match="--extra width"):
        field_of(parts)
    given = {"width": "400", "height": "300", "focal": "350"}
    parts = read(path, ReadOptions(extra=given))
    assert parts.scene.assumed == ("background",)
    assert parts.scene.backdrop == (0.0, 0.0, 0.0)
    o = torch.rand(300, 3, generator=torch.Generator().manual_seed(2)) * 0.4 - 0.2
    d = F.normalize(torch.tensor([0.3, 0.2, 0.0]) * (torch.rand(300, 3) - 0.5) + torch.tensor([0.0, 0.0, -1.0]), dim=1)

    def warp(p: Tensor) -> Tensor:
        ax, ay = -2 * 350 / 400, -2 * 350 / 300
        return torch.stack([ax * p[:, 0] / p[:, 2], ay * p[:, 1] / p[:, 2], 1 + 2 / p[:, 2]], 1)

    here, there = warp(o + 3 * d), warp(o + 5 * d)
    sigma, rgb = program(file, "TensorVMSplit", here, F.normalize(there - here, dim=1))
    mine, color = field_of(parts)(here, d)
    assert float((sigma > 0).double().mean()) > 0.5
    torch.testing.assert_close(mine.double(), sigma, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(color.double(), rgb, rtol=0, atol=1e-3)
    FORMAT.write(parts, tmp_path / "out.th")
    assert torch.load(tmp_path / "out.th", weights_only=False)["kwargs"]["near_far"] == [0.0, 1.0]
    back = read(tmp_path / "out.th")
    assert (back.config, back.scene) == (parts.config, parts.scene)


@pytest.mark.parametrize("architecture", ["tensorf", "tensorf-cp"])
@pytest.mark.parametrize("kind", ["world", "ndc"])
def test_students_are_planned_inside_of_the_layout(
    tmp_path: Path, architecture: str, kind: Literal["world", "ndc"]
) -> None:
    scene = Scene(Box.cube(1.0), ray_space=RaySpace(kind, width=400.0, height=300.0, focal=350.0, near=1.0))
    facts = TeacherFacts(scene, Box.cube(0.6), 1000, 500, 0.02)
    plugin, limits = default().architecture(architecture), FORMAT.limits(architecture)
    for overrides in ({}, {"shading": "sh"}, {"fea_pe": 1, "density_activation": "relu"}):
        config = plugin.plan(facts, Budget("fast", max_mb=1.0), limits, overrides)
        assert config["view_space"] == kind
        held, tensors = plugin.save(plugin.build(config, scene, 0))
        parts = Parts(architecture, held, {k: ArrayTensor(t.numpy()) for k, t in tensors.items()}, scene)
        FORMAT.write(parts, tmp_path / "out.th")
        assert read(tmp_path / "out.th").config.items() <= held.items()


def test_missing_arguments_have_the_constructors_defaults(tmp_path: Path) -> None:
    file = hand_made("TensorVMSplit", "MLP", False, view_pe=6)
    for key in ("density_shift", "distance_scale", "fea2denseAct", "near_far", "step_ratio", "view_pe", "gridSize"):
        del file["kwargs"][key]
    parts = read(saved(tmp_path, file))
    c = parts.config
    assert (c["density_shift"], c["density_scale"], c["density_activation"], c["view_pe"]) == (-10, 25, "softplus", 6)
    assert (parts.scene.near, parts.scene.far) == (2.0, 6.0)


def change(file: dict[str, Any], where: str, key: str, value: Any) -> None:
    target = file if where == "" else file[where]
    if value is None:
        del target[key]
    else:
        target[key] = value


@pytest.mark.parametrize(
    ("where", "key", "value", "match"),
    [
        ("", "kwargs", {}, r"kwargs\.aabb is missing"),
        ("kwargs", "aabb", torch.zeros(2, 3), "empty"),
        ("kwargs", "aabb", torch.zeros(3), r"kwargs\.aabb is \[3\]"),
        ("kwargs", "gridSize", [9, 9, 9], r"gridSize is \[9, 9, 9\]"),
        ("kwargs", "shadingMode", "Phong", "shadingMode is 'Phong'"),
        ("kwargs", "fea2denseAct", "exp", "fea2denseAct"),
        ("kwargs", "density_shift", "low", "density_shift is 'low'"),
        ("kwargs", "distance_scale", float("nan"), "distance_scale is nan"),
        ("kwargs", "view_pe", 2.5, "view_pe"),
        ("kwargs", "view_pe", 2, r"mlp\.0\.weight.*expected \[16, 96\]"),
        ("kwargs", "near_far", 2.0, "near_far"),
        ("state_dict", "density_line.1", None, r"'density_line\.1' is missing"),
        ("state_dict", "app_plane.2", torch.zeros(1, 4, 5, 9), r"'app_plane\.2' is float32 \[1, 4, 5, 9\]"),
        ("state_dict", "basis_mat.weight", torch.zeros(27, 14), r"basis_mat\.weight.*\['\*', 15\]"),
        ("state_dict", "basis_mat.weight", torch.zeros(27, 15, dtype=torch.int64), "int64"),
        ("state_dict", "renderModule.mlp.4.bias", None, r"mlp\.4\.bias"),
        ("state_dict", "renderModule.mlp.6.weight", torch.zeros(3, 3), "7 tensors"),
        ("state_dict", "extra", torch.zeros(3), "'extra' has no place"),
        ("", "alphaMask.shape", (1, 2, 6, 5, 4), "alphaMask.shape"),
        ("", "alphaMask.mask", np.zeros(3, np.uint8), r"alphaMask\.mask is uint8 \[3\]"),
        ("", "alphaMask.aabb", torch.zeros(2), r"alphaMask\.aabb is \[2\]"),
    ],
)
def test_malformed_files_name_file_and_key(tmp_path: Path, where: str, key: str, value: Any, match: str) -> None:
    file = hand_made("TensorVMSplit", "MLP_Fea")
    change(file, where, key, value)
    path = saved(tmp_path, file)
    with pytest.raises(InputError, match=match) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "apchenstu-tensorf" in str(caught.value)


def test_what_the_program_itself_cannot_evaluate_is_refused(tmp_path: Path) -> None:
    file = hand_made("TensorVMSplit", "MLP_PE")
    file["state_dict"]["renderModule.mlp.0.weight"] = torch.zeros(16, 27 + 3 + 18 + 12 + 3)
    with pytest.raises(InputError, match="TensoRF itself cannot"):
        read(saved(tmp_path, file))
    for mode, width in (("SH", 20), ("RGB", 4)):
        file = hand_made("TensorVMSplit", mode)
        file["state_dict"]["basis_mat.weight"] = torch.zeros(width, 15)
        with pytest.raises(InputError, match=f"makes {width} features"):
            read(saved(tmp_path, file))
    file = hand_made("TensorVM", "SH")
    file["state_dict"]["basis_mat.weight"] = torch.zeros(27, 27)
    with pytest.raises(InputError, match="mixes 27 products"):
        read(saved(tmp_path, file))


def test_unknown_top_entries_are_said(tmp_path: Path) -> None:
    parts = read(saved(tmp_path, {**hand_made("TensorCP", "SH"), "global_step": 3}))
    assert any("global_step" in note for note in parts.notes)


def test_relatives_are_left_alone(tmp_path: Path) -> None:
    file = hand_made("TensorVMSplit", "SH")
    others: list[dict[str, Any]] = [
        {"state_dict": {"w": torch.zeros(2)}},
        {"model": file["state_dict"]},
        {"kwargs": {}},
    ]
    for other in others:
        assert probe(open_manifest(saved(tmp_path, other))) is None
    bare = probe(open_manifest(saved(tmp_path, {"state_dict": file["state_dict"]})))
    assert bare is not None
    assert bare.score < 0.3
    with pytest.raises(InputError, match="no kwargs"):
        read(saved(tmp_path, {"state_dict": file["state_dict"]}))


# ------------------------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize(("model", "mode", "changes"), [k for k in KINDS if k[1] != "MLP_PE"])
def test_write_is_the_inverse_of_read(tmp_path: Path, model: str, mode: str, changes: dict[str, Any]) -> None:
    first = read(saved(tmp_path, hand_made(model, mode, **changes)))
    out = tmp_path / "out.th"
    FORMAT.write(first, out)
    second = read(out)
    assert second.config == first.config
    assert second.scene == first.scene
    assert second.tensors.keys() == first.tensors.keys()
    for key, tensor in first.tensors.items():
        np.testing.assert_array_equal(second.tensors[key].numpy(), tensor.numpy())
    back = torch.load(out, weights_only=False)
    kwargs = back["kwargs"]
    assert set(kwargs) == set(hand_made(model, mode)["kwargs"])
    assert isinstance(kwargs["aabb"], Tensor)
    assert type(kwargs["gridSize"]) is list
    assert kwargs["step_ratio"] == 0.5
    assert type(back["alphaMask.mask"]) is np.ndarray
    FORMAT.write(first, tmp_path / "again.th")
    assert out.read_bytes() == (tmp_path / "again.th").read_bytes()


@pytest.mark.parametrize(
    ("own", "match"),
    [
        ({"mask": {"shape": [1, 1, 1]}}, r"mask\.bits is missing"),
        ({"scene": {"box": 3}}, "pvdconvert.scene"),
        ({"scene": {"box": {"min": [0, 0, 0], "max": [1, 1, 1]}, "ray_space": "x"}}, "pvdconvert.scene"),
    ],
)
def test_our_own_entry_is_checked_too(tmp_path: Path, own: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        read(saved(tmp_path, {**hand_made("TensorVMSplit", "SH"), "pvdconvert": own}))


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["tensorf", "tensorf-cp"])
def test_a_students_mask_cuts_the_same_in_the_program(tmp_path: Path, architecture: str) -> None:
    """The written file evaluated by the program's formulas, against the student that was written."""
    scene = Scene(Box((-1.0, -1.2, -0.8), (1.1, 0.9, 1.0)), near=0.3)
    ranks = {"density_rank": 5, "color_rank": 6} if architecture == "tensorf-cp" else {}
    config = {"resolution": [7, 6, 5], "mlp_width": 16, "density_shift": 0.0, "box": {"min": [-0.8, -1.0, -0.8 + 1e-9],
              "max": [1.0, 0.9, 0.7]}, **ranks}  # fmt: skip
    plugin = default().architecture(architecture)
    student = plugin.build(config, scene, 0)
    grid = (torch.rand(9, 11, 8, generator=torch.Generator().manual_seed(3)) < 0.3).to(torch.uint8)
    student.restrict(Occupancy(torch.tensor([-1.0, -1.2, -0.8]), 0.21, grid))
    held, tensors = plugin.save(student)
    lazy = {k: ArrayTensor(t.numpy()) for k, t in tensors.items()}
    parts = Parts(architecture, held, lazy, scene)
    path = tmp_path / "student.th"
    FORMAT.write(parts, path)
    file = torch.load(path, weights_only=False)
    x, d = points(4000)
    model = "TensorCP" if architecture == "tensorf-cp" else "TensorVMSplit"
    sigma, rgb = program(file, model, x, d)
    mine, color = student(x, d)
    assert 0.05 < float((mine > 0).double().mean()) < 0.5
    assert float(((mine > 0) != (sigma > 0)).double().mean()) < 1e-3  # rounding of faces to float32
    both = (mine > 0) & (sigma > 0)
    torch.testing.assert_close(mine[both].double(), sigma[both], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(color[both].double(), rgb[both], rtol=0, atol=1e-4)
    again = read(path)  # our own reader gets mask, box and scene exactly
    assert again.config == {key: held[key] for key in again.config}
    assert again.scene == scene
    assert torch.equal(field_of(again)(x, d)[0], mine)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"density_activation": "exp"}, "density_activation=softplus"),
        ({"density_clip": [0.0, 1.0]}, "density_clip"),
        ({"feature_clip": [0.0, 1.0]}, "feature_clip"),
        ({"view_encoding": "sh"}, "view_encoding = frequency"),
        ({"mlp_layers": 2}, "mlp_layers = 3"),
        ({"mlp_bias": False}, "mlp_bias=true"),
        ({"pos_pe": 2}, "MLP_PE"),
        ({"wave_step": 2.0}, "wave_step=1"),
        ({"view_space": "ndc"}, "view_space = world"),
        ({"padding": "zero", "box": {"min": [0, 0, 0], "max": [1, 1, 1]}}, "padding = none"),
        ({"shading": "sh", "color_activation": "sigmoid"}, "color_activation = relu"),
        ({"shading": "sh", "color_activation": "relu", "color_features": 12}, "color_features = 27"),
        ({"shading": "rgb", "color_activation": "relu", "color_features": 3}, "color_activation = none"),
    ],
)
def test_what_the_layout_cannot_hold_is_said(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    parts = read(saved(tmp_path, hand_made("TensorVMSplit", "MLP_Fea")))
    filled = {**parts.config, "color_activation": "sigmoid", **changes}
    with pytest.raises(RequestError, match=match) as caught:
        FORMAT.write(Parts("tensorf", filled, parts.tensors, parts.scene), tmp_path / "out.th")
    assert "--set" in str(caught.value)
    assert not (tmp_path / "out.th").exists()


def test_masks_that_cannot_be_written_are_said(tmp_path: Path) -> None:
    parts = read(saved(tmp_path, hand_made("TensorVMSplit", "SH")))
    mask = {"shape": [2, 2, 2], "origin": [0.0, 0.0, 0.0], "cell": 0.1}
    left = {k: t for k, t in parts.tensors.items() if k != "alphaMask.mask"}

    def make(bits: NDArray[np.uint8], **changes: Any) -> Parts:
        config = {**parts.config, "mask": {**mask, **changes}}
        return Parts("tensorf", config, {**left, "mask.bits": ArrayTensor(bits)}, parts.scene)

    with pytest.raises(RequestError, match="no cell set"):
        FORMAT.write(make(np.zeros(1, np.uint8)), tmp_path / "out.th")
    with pytest.raises(RequestError, match="more than the program can hold"):
        FORMAT.write(make(np.full(512**3 // 8, 255, np.uint8), shape=[512] * 3), tmp_path / "out.th")
    with pytest.raises(RequestError, match="nested cubes"):
        FORMAT.write(make(np.ones(2, np.uint8), halves=[1.0, 2.0]), tmp_path / "out.th")
    both = make(np.ones(1, np.uint8))
    with pytest.raises(RequestError, match="one mask"):
        FORMAT.write(Parts("tensorf", both.config, {**both.tensors, **parts.tensors}, parts.scene), tmp_path / "o.th")
    with pytest.raises(RequestError, match="not nerf"):
        FORMAT.write(Parts("nerf", {}, {}, parts.scene), tmp_path / "out.th")
