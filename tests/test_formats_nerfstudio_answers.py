"""nerfstudio's methods against layouts section 7, written once more in float64 on files in the program's key tree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from pvdconvert.containers import open_manifest
from pvdconvert.errors import InputError, RequestError
from pvdconvert.loading import Loaded, open_field
from pvdconvert.plugin import ArrayTensor, Parts, ReadOptions
from pvdconvert.scene import Box, RaySpace, Scene
from pvdconvert_formats.nerfstudio import Nerfstudio
from pvdconvert_plugins.nerf import Nerf
from tests.nerfstudio_files import (
    linear,
    nerfacto_tcnn,
    nerfacto_torch,
    occupancy_grid,
    random,
    saved,
    tensorf_state,
    vanilla_state,
)
from tests.peers import check_points

State = dict[str, Any]
FORMAT = Nerfstudio()


def queries(count: int = 600, half: float = 1.5) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    x = (torch.rand(count, 3, generator=g) * 2 - 1) * half
    return x, F.normalize(torch.randn(count, 3, generator=g), dim=-1)


def check(path: Path, x: Tensor, d: Tensor, sigma: Tensor | NDArray[Any], rgb: Tensor) -> Loaded:
    loaded = open_field(path)
    assert float(torch.as_tensor(rgb).std()) > 0.02
    truth = {"x": x.numpy(), "d": d.numpy(), "sigma": np.asarray(sigma), "rgb": rgb.numpy()}
    check_points(loaded, truth)
    return loaded


def layer(m: State, name: str, h: Tensor) -> Tensor:
    weight: Tensor = m[f"{name}.weight"]
    bias: Tensor = m[f"{name}.bias"]
    return h @ weight.double().T + bias.double()


def harmonics(v: Tensor, odd: float) -> Tensor:
    """The first 16 of layouts 0.3; ``odd`` = 1: nerfstudio's own, + on every component of odd position."""
    x, y, z = v.unbind(-1)
    rows = [0.28209479177387814 + 0 * x, -0.48860251190291987 * y, 0.48860251190291987 * z, -0.48860251190291987 * x,
            1.0925484305920792 * x * y, -1.0925484305920792 * y * z, 0.94617469575756 * z * z - 0.31539156525252,
            -1.0925484305920792 * x * z, 0.5462742152960396 * (x * x - y * y),
            0.5900435899266435 * y * (-3 * x * x + y * y), 2.890611442640554 * x * y * z,
            0.4570457994644657 * y * (1 - 5 * z * z), 0.3731763325901154 * z * (5 * z * z - 3),
            0.4570457994644657 * x * (1 - 5 * z * z), 1.445305721320277 * z * (x * x - y * y),
            0.5900435899266435 * x * (-x * x + 3 * y * y)]  # fmt: skip
    return torch.stack([row * (-odd if i % 2 else 1.0) for i, row in enumerate(rows)], -1)


def mean_appearance(m: State, count: int) -> Tensor:
    table: Tensor = m["field.embedding_appearance.embedding.weight"]
    return table.double().mean(0).expand(count, -1)


def lookup(u: NDArray[Any], table: NDArray[Any], scale: float, shift: float, index: Any) -> NDArray[Any]:
    """Trilinear: rows ``index(corner)`` of ``table`` around ``u * scale + shift``."""
    pos = u * scale + shift
    cell = np.floor(pos).astype(np.int64)
    f = pos - cell
    out = np.zeros((len(u), table.shape[1]))
    for corner in np.ndindex(2, 2, 2):
        weight = np.prod(np.where(corner, f, 1 - f), 1)
        out += weight[:, None] * table[index(cell + corner)]
    return out


def hashed(at: NDArray[Any], entries: int) -> NDArray[Any]:
    row: NDArray[Any] = (at[:, 0] ^ at[:, 1] * 2654435761 ^ at[:, 2] * 805459861) % entries
    return row


# ------------------------------------------------------------------------------------------------ nerfacto, instant-ngp


def torch_answers(m: State, x: Tensor, d: Tensor, unit: float, app: Tensor) -> tuple[Tensor, Tensor]:
    """7.1 "torch implementation": scales 4, 8, 16, 32; every level hashed into 2^10 rows."""
    u = (x.double().numpy() + 1.5) / 3
    table = m["field.mlp_base.model.0.hash_table"].double().numpy()
    parts = [
        lookup(u, table[1024 * k : 1024 * (k + 1)], 4.0 * 2**k, 0.0, lambda at: hashed(at, 1024)) for k in range(4)
    ]
    h = F.relu(layer(m, "field.mlp_base.model.1.layers.0", torch.from_numpy(np.concatenate(parts, 1))))
    h = layer(m, "field.mlp_base.model.1.layers.1", h)
    c = torch.cat([harmonics((d.double() + 1) / 2, odd=1.0), h[:, 1:], app], 1)
    for k in range(3):
        c = layer(m, f"field.mlp_head.layers.{k}", F.relu(c) if k else c)
    return unit * h[:, 0].exp(), c.sigmoid()


def tcnn_answers(m: State, x: Tensor, d: Tensor, unit: float, app: Tensor) -> tuple[Tensor, Tensor]:
    """7.1 "tcnn implementation" with 1.3 and 1.9: [network | grid]; grids padded with zeros, networks with ones."""
    u = (x.double().numpy() + 1.5) / 3
    flat = m["field.mlp_base.model.params"].double().numpy()
    first, last = flat[:1024].reshape(64, 16), flat[1024:2048].reshape(16, 64)
    table, parts, at = flat[2048:].reshape(-1, 2), [], 0
    for res, entries in ((4, 64), (8, 512), (16, 1024), (32, 1024)):
        rows = table[at : at + entries]
        dense = entries >= res**3
        parts.append(
            lookup(u, rows, res - 1.0, 0.5, lambda p, n=entries, r=res, dense=dense: (
                (p[:, 0] + r * p[:, 1] + r * r * p[:, 2]) % n if dense else hashed(p, n)))
        )  # fmt: skip
        at += entries
    h = torch.from_numpy(np.maximum(np.concatenate(parts, 1) @ first[:, :8].T, 0) @ last.T)
    flat = m["field.mlp_head.tcnn_encoding.params"].double().numpy()
    inputs = -(-(31 + app.shape[1]) // 16) * 16
    weights = [flat[: 64 * inputs].reshape(64, inputs)]
    weights += [flat[64 * inputs : 64 * inputs + 4096].reshape(64, 64), flat[64 * inputs + 4096 :].reshape(16, 64)[:3]]
    ones = torch.ones(len(x), inputs - 31 - app.shape[1]).double()
    c = torch.cat([harmonics(d.double(), odd=-1.0), h[:, 1:], app, ones], 1)
    for k, w in enumerate(weights):
        c = (F.relu(c) if k else c) @ torch.from_numpy(w).T
    return unit * h[:, 0].exp(), c.sigmoid()


def test_nerfacto_torch(tmp_path: Path) -> None:
    m = nerfacto_torch()
    x, d = queries()
    sigma, rgb = torch_answers(m, x, d, 0.5, mean_appearance(m, len(x)))
    loaded = check(saved(tmp_path, m), x, d, sigma, rgb)
    assert loaded.architecture == "ngp"


@pytest.mark.parametrize("appearance", [8, 17])
def test_nerfacto_tcnn(tmp_path: Path, appearance: int) -> None:
    """Also where nothing is padded: 16 + 15 + 17 = 48 inputs."""
    m = nerfacto_tcnn(appearance)
    x, d = queries()
    sigma, rgb = tcnn_answers(m, x, d, 0.5, mean_appearance(m, len(x)))
    check(saved(tmp_path, m), x, d, sigma, rgb)


def test_older_names_of_tcnn(tmp_path: Path) -> None:
    """7.1, key history: bare modules before June 2023; grid and network apart until December."""
    new = nerfacto_tcnn()
    read = Nerfstudio().read
    expected = read(open_manifest(saved(tmp_path, new)), ReadOptions())
    old = {k.replace("mlp_base.model", "mlp_base").replace(".tcnn_encoding", ""): v for k, v in new.items()}
    (tmp_path / "old").mkdir()
    found = read(open_manifest(saved(tmp_path / "old", old)), ReadOptions())
    assert found.config == expected.config
    for key, tensor in expected.tensors.items():
        np.testing.assert_array_equal(found.tensors[key].numpy(), tensor.numpy())
    # 8 levels of 2^3: 16 columns, so that nothing is padded.
    base = {k: v for k, v in new.items() if "mlp_base" not in k} | {"field.num_levels": torch.tensor(8)}
    base["field.log2_hashmap_size"], base["field.max_res"] = torch.tensor(3), torch.tensor(5)
    network, grid = random(2048), random(8 * 8 * 2)
    names = {"mlp_base_mlp": network, "mlp_base_grid": grid, "mlp_base.0": grid, "mlp_base.1": network}
    split = base | {f"field.{k}.tcnn_encoding.params": v for k, v in names.items()}
    (tmp_path / "apart").mkdir()
    apart = read(open_manifest(saved(tmp_path / "apart", split)), ReadOptions())
    whole = base | {"field.mlp_base.model.params": torch.cat([network, grid])}
    joined = read(open_manifest(saved(tmp_path, whole)), ReadOptions())
    assert apart.config == joined.config
    for key, tensor in joined.tensors.items():
        np.testing.assert_array_equal(apart.tensors[key].numpy(), tensor.numpy())


def test_older_names_of_torch(tmp_path: Path) -> None:
    new = nerfacto_torch()
    old = {
        k.replace("mlp_base.model.0.", "mlp_base_grid.").replace("mlp_base.model.1.", "mlp_base_mlp."): v
        for k, v in new.items()
    }
    found, expected = (Nerfstudio().read(open_manifest(saved(tmp_path, m)), ReadOptions()) for m in (old, new))
    assert found.config == expected.config


@pytest.mark.parametrize(
    ("key", "size", "match"),
    [
        ("field.mlp_base.model.params", 100, "5248 are expected.*config.yml"),
        ("field.mlp_base.model.params", 5248 + 2049, "mlp_base has 2049 parameters"),
        ("field.mlp_head.tcnn_encoding.params", 9000, "mlp_head has 9000 parameters"),
    ],
)
def test_counts_that_do_not_fit(tmp_path: Path, key: str, size: int, match: str) -> None:
    path = saved(tmp_path, nerfacto_tcnn() | {key: torch.zeros(size)})
    with pytest.raises(InputError, match=match):
        Nerfstudio().read(open_manifest(path), ReadOptions())


@pytest.mark.parametrize("levels", [1, 2])
def test_instant_ngp(tmp_path: Path, levels: int) -> None:
    """7.2: density's unit is 1 whatever config.yml says, appearance is zeros, and the sampler skips empty cells."""
    m = nerfacto_torch() | occupancy_grid(levels=levels)
    x, d = queries()
    sigma, rgb = torch_answers(m, x, d, 1.0, torch.zeros(len(x), 8).double())
    cells = m["occupancy_grid.binaries"].numpy()
    # Level 0 covers the whole box, in which every point lies.
    i = np.floor((x.double().numpy() / 1.5 + 1) * 4).astype(int)
    shown = cells[0][tuple(i.T)]
    assert 0.3 < shown.mean() < 0.7
    loaded = check(saved(tmp_path, m), x, d, sigma.numpy() * shown, rgb)
    assert loaded.scene.step == pytest.approx(3 * 3**0.5 / 1000)
    assert loaded.parts.provenance["method"] == "instant-ngp"


def test_occupancy_that_cannot_be_used_is_said(tmp_path: Path) -> None:
    def notes(**changes: Any) -> str:
        grid = occupancy_grid() | {f"occupancy_grid.{k}": v for k, v in changes.items()}
        m = nerfacto_torch() | {k: v for k, v in grid.items() if v is not None}
        parts = Nerfstudio().read(open_manifest(saved(tmp_path, m)), ReadOptions())
        assert "mask" not in parts.config
        return " ".join(parts.notes)

    assert "never updated" in notes(binaries=torch.zeros(2, 8, 8, 8, dtype=torch.bool))
    assert "not of cubes" in notes(aabbs=torch.tensor([[-1.0, -1, -1, 1, 1, 2]] * 2))
    assert "old layout" in notes(binaries=None)
    with pytest.raises(InputError, match="binaries"):
        notes(binaries=torch.zeros(8, 8, 8, dtype=torch.bool))


# ------------------------------------------------------------------------------------------------ tensorf, vanilla-nerf


def waves(v: Tensor, frequencies: list[float]) -> Tensor:
    """NeRFEncoding (0.5, FE-C): channel-major, [sin a, sin(a + pi / 2)], a = 2 pi v f."""
    a = (2 * np.pi * v[..., None] * torch.tensor(frequencies).double()).flatten(-2)
    return torch.cat([a.sin(), (a + np.pi / 2).sin()], -1)


@pytest.mark.parametrize("cp", [False, True])
def test_tensorf(tmp_path: Path, cp: bool) -> None:
    """7.3; cp multiplies its three lines, along axes 2, 1, 0."""
    m = tensorf_state(cp)
    x, d = queries(half=0.79)
    low, high = m["field.aabb"].double()
    at = (x.double() - low) / (high - low) * 2 - 1

    def products(kind: str) -> Tensor:
        out = []
        for i, ((a, b), c) in enumerate((((0, 1), 2), ((0, 2), 1), ((1, 2), 0))):
            if cp:
                line = m[f"field.{kind}_encoding.line_coef"][[i]].double()
                where = torch.stack([torch.zeros_like(at[:, c]), at[:, c]], -1)
                out.append(F.grid_sample(line, where[None, :, None], align_corners=True)[0, :, :, 0])
                continue
            plane = m[f"field.{kind}_encoding.plane_coef"][[i]].double()
            line = m[f"field.{kind}_encoding.line_coef"][[i]].double()
            where = torch.stack([torch.zeros_like(at[:, c]), at[:, c]], -1)
            p = F.grid_sample(plane, at[None, :, None][..., [a, b]], align_corners=True)
            out.append((p * F.grid_sample(line, where[None, :, None], align_corners=True))[0, :, :, 0])
        return out[0].T * out[1].T * out[2].T if cp else torch.cat(out).T

    feat = products("color") @ m["field.B.weight"].double().T
    v = d.double()
    h = torch.cat([feat, v, waves(feat, [1.0, 4.0]), waves(v, [1.0, 4.0])], 1)
    h = F.relu(layer(m, "field.mlp_head.layers.1", F.relu(layer(m, "field.mlp_head.layers.0", h))))
    rgb = layer(m, "field.field_output_rgb.net", h).sigmoid()
    loaded = check(saved(tmp_path, m), x, d, F.relu(products("density").sum(1)), rgb)
    assert loaded.architecture == ("tensorf-cp" if cp else "tensorf")
    np.testing.assert_allclose(loaded.scene.box.max, [1.0, 0.9, 1.1], rtol=1e-6)


def test_other_encodings_of_tensorf_are_refused(tmp_path: Path) -> None:
    m = {k: v for k, v in tensorf_state().items() if not k.endswith("line_coef")}
    with pytest.raises(InputError, match="triplane"):
        Nerfstudio().read(open_manifest(saved(tmp_path, m)), ReadOptions())
    path = saved(tmp_path, tensorf_state())
    with pytest.raises(InputError, match="no appearance"):
        Nerfstudio().read(open_manifest(path), ReadOptions(extra={"appearance": "1"}))


def test_vanilla_nerf(tmp_path: Path) -> None:
    """7.4; the waves come before the plain coordinates, the direction before the hidden units."""
    m = vanilla_state()
    x, d = queries(half=1.0)
    encoded = torch.cat([waves(x.double(), [2 ** (8 * k / 9) for k in range(10)]), x.double()], 1)
    h = encoded
    for i in range(6):
        h = F.relu(layer(m, f"field_fine.mlp_base.layers.{i}", torch.cat([encoded, h], 1) if i == 4 else h))
    sigma = F.softplus(layer(m, "field_fine.field_output_density.net", h))[:, 0]
    view = torch.cat([waves(d.double(), [2 ** (4 * k / 3) for k in range(4)]), d.double()], 1)
    c = torch.cat([view, h], 1)
    for k in range(2):
        c = F.relu(layer(m, f"field_fine.mlp_head.layers.{k}", c))
    rgb = layer(m, "field_fine.field_heads.0.net", c).sigmoid()
    loaded = check(saved(tmp_path, m), x, d, sigma, rgb)
    assert loaded.architecture == "nerf"
    assert loaded.scene.box == Box.cube(1.5)  # of the Blender data set, which config.yml names
    assert loaded.scene.assumed == ("box",)
    assert loaded.parts.config["has_coarse"] is True


def test_vanilla_nerf_asks_for_its_box(tmp_path: Path) -> None:
    path = saved(tmp_path, vanilla_state())
    config = tmp_path / "config.yml"
    config.write_text(config.read_text().replace("blender_dataparser.Blender ''", "other.Parser ''"))
    with pytest.raises(InputError, match="--bounds"):
        Nerfstudio().read(open_manifest(path), ReadOptions())
    parts = Nerfstudio().read(open_manifest(path), ReadOptions(bounds=Box.cube(0.7)))
    assert parts.scene.box == Box.cube(0.7)
    config.write_text(config.read_text().replace("scale_factor: 1.0", "scene_scale: 0.9"))
    assert Nerfstudio().read(open_manifest(path), ReadOptions()).scene.box == Box.cube(0.9)
    config.write_text(config.read_text() + "    enable_temporal_distortion: true\n")
    with pytest.raises(InputError, match="moves in time"):
        Nerfstudio().read(open_manifest(path), ReadOptions())


# ------------------------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("background", [None, (0.0, 0.0, 0.0), (0.25, 0.5, 1.0)])
def test_vanilla_nerf_is_written_back_bit_for_bit(tmp_path: Path, background: Any) -> None:
    """The program's own sizes; without config.yml, which stands in an entry of ours that the program ignores."""
    m = vanilla_state(256, 8)
    for name in ("field_coarse", "field_fine"):
        m |= linear(f"{name}.mlp_head.layers.0", 128, 283) | linear(f"{name}.mlp_head.layers.1", 128, 128)
        m |= linear(f"{name}.field_heads.0.net", 3, 128)
    parts = FORMAT.read(open_manifest(saved(tmp_path, m)), ReadOptions(background=background))
    out = tmp_path / "elsewhere" / "out.ckpt"
    out.parent.mkdir()
    (tmp_path / "config.yml").unlink()
    FORMAT.write(parts, out)
    FORMAT.write(parts, out.with_name("again.ckpt"))
    assert out.read_bytes() == out.with_name("again.ckpt").read_bytes()
    back = torch.load(out, weights_only=True)
    assert {"step", "pipeline", "optimizers", "schedulers", "scalers"} <= back.keys()
    assert back["step"] == 7
    assert {k.removeprefix("_model.") for k in back["pipeline"]} == m.keys() | {"device_indicator_param"}
    for key, value in m.items():
        assert torch.equal(back["pipeline"][f"_model.{key}"], value), key
    again = FORMAT.read(open_manifest(out), ReadOptions())
    assert again.config == parts.config
    assert again.scene.box == parts.scene.box
    assert again.scene.background == (background or (1.0, 1.0, 1.0))
    assert (again.scene.near, again.scene.far) == (2.0, 6.0)
    for key, tensor in parts.tensors.items():
        np.testing.assert_array_equal(again.tensors[key].numpy(), tensor.numpy())


def test_one_network_stands_in_both_places(tmp_path: Path) -> None:
    config = {**FORMAT.limits("nerf").fixed}
    scene = Scene(Box.cube(1.0), near=0.5, far=3.0)
    field = Nerf().build(config, scene, 0)
    config, tensors = Nerf().save(field)
    parts = Parts("nerf", config, {k: ArrayTensor(t.numpy()) for k, t in tensors.items()}, scene)
    FORMAT.write(parts, tmp_path / "out.ckpt")
    pipeline = torch.load(tmp_path / "out.ckpt", weights_only=True)["pipeline"]
    fine = {k: v for k, v in pipeline.items() if "field_fine" in k}
    assert len(fine) == 2 * (8 + 1 + 2 + 1)
    assert all(torch.equal(v, pipeline[k.replace("field_fine", "field_coarse")]) for k, v in fine.items())
    back = FORMAT.read(open_manifest(tmp_path / "out.ckpt"), ReadOptions())
    assert back.config["has_coarse"] is False
    assert back.tensors.keys() == tensors.keys()


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"width": 128}, "width = 256"),
        ({"skips": []}, "skips"),
        ({"density_activation": "relu"}, "density_activation"),
        ({"mask": {"shape": [1, 1, 1], "origin": [0, 0, 0], "cell": 1.0}}, "mask"),
        ({"coarse": {"depth": 4}}, "two networks"),
    ],
)
def test_what_vanilla_nerf_cannot_hold_is_refused(tmp_path: Path, config: dict[str, Any], match: str) -> None:
    fixed = {**FORMAT.limits("nerf").fixed, **config}
    with pytest.raises(RequestError, match=match):
        FORMAT.write(Parts("nerf", fixed, {}, Scene(Box.cube(1.0))), tmp_path / "out.ckpt")
    ndc = Scene(Box.cube(1.0), ray_space=RaySpace("ndc"))
    with pytest.raises(RequestError, match="NDC"):
        FORMAT.write(Parts("nerf", dict(FORMAT.limits("nerf").fixed), {}, ndc), tmp_path / "out.ckpt")
    with pytest.raises(RequestError, match="not ngp"):
        FORMAT.write(Parts("ngp", {}, {}, Scene(Box.cube(1.0))), tmp_path / "out.ckpt")
    assert not (tmp_path / "out.ckpt").exists()
