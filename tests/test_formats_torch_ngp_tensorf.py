"""torch-ngp's TensoRF: known answers by its own formulas (layouts 2.4) on hand-made files, and errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pvdconvert.containers import open_manifest
from pvdconvert.errors import InputError
from pvdconvert.field import RadianceField
from pvdconvert.identify import identify
from pvdconvert.loading import to_torch
from pvdconvert.plugin import Parts, ReadOptions
from pvdconvert.registry import default
from pvdconvert.scene import Box
from pvdconvert_formats.torch_ngp_tensorf import TorchNgpTensorf, probe

FORMAT = TorchNgpTensorf()
MAT, VEC = ((0, 1), (0, 2), (1, 2)), (2, 1, 0)
N = [9, 8, 7]
SHRUNK = [-0.6, -0.8, -0.5, 0.7, 0.6, 0.9]


def state(kind: str, train: list[float] | None = None, multires: int = 2, layers: int = 3) -> dict[str, Tensor]:
    """A state_dict of the program's shapes with random weights."""
    g = torch.Generator().manual_seed(0)

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g) * 0.7

    out: dict[str, Tensor] = {
        "aabb_train": torch.tensor(train or [-1.0] * 3 + [1.0] * 3),
        "aabb_infer": torch.tensor([-1.0] * 3 + [1.0] * 3),
    }
    for name, ranks in (("sigma", [3, 4, 5]), ("color", [6, 4, 5])):
        for i, ((a, b), c) in enumerate(zip(MAT, VEC)):
            rank = ranks[i] if kind == "vm" else 2 * ranks[0]
            if kind == "vm":
                out[f"{name}_mat.{i}"] = new(1, rank, N[b], N[a])
            out[f"{name}_vec.{i}"] = new(1, rank, N[c], 1)
    out["basis_mat.weight"] = new(27, 15 if kind == "vm" else 12) * 0.5
    widths = [30 * (1 + 2 * multires), *[16] * (layers - 1), 3]
    for j in range(layers):
        out[f"color_net.{j}.weight"] = new(widths[j + 1], widths[j]) * 0.5
    return out


def saved(tmp_path: Path, model: dict[str, Tensor], bare: bool = False) -> Path:
    path = tmp_path / "ngp.pth"
    torch.save(model if bare else {"epoch": 3, "global_step": 30, "stats": {}, "model": model}, path)
    return path


def read(path: Path, **extra: str) -> Parts:
    return FORMAT.read(open_manifest(path), ReadOptions(extra=extra))


def field_of(parts: Parts) -> RadianceField:
    tensors = to_torch(parts.tensors, "here")
    return default().architecture(parts.architecture).load(dict(parts.config), tensors, parts.scene)


def program(w: dict[str, Tensor], x: Tensor, d: Tensor, multires: int, layers: int) -> tuple[Tensor, Tensor]:
    """Layouts 2.4 in float64: the sum before the activation [N], rgb [N, 3]; zeros outside of aabb_train."""
    w = {k: t.double() for k, t in w.items()}
    low, high = w["aabb_train"][:3], w["aabb_train"][3:]
    u = 2 * (x.double() - low) / (high - low) - 1
    zero = torch.zeros_like(u[:, 0])

    def sample(volume: Tensor, *at: Tensor) -> Tensor:
        return F.grid_sample(volume, torch.stack(at, -1)[None, :, None], align_corners=True)[0, :, :, 0]

    def products(name: str) -> Tensor:
        vec = [sample(w[f"{name}_vec.{i}"], zero, u[:, VEC[i]]) for i in range(3)]
        if f"{name}_mat.0" not in w:
            return vec[0] * vec[1] * vec[2]
        mat = [sample(w[f"{name}_mat.{i}"], u[:, MAT[i][0]], u[:, MAT[i][1]]) for i in range(3)]
        return torch.cat([m * v for m, v in zip(mat, vec)])

    def encode(v: Tensor) -> Tensor:
        out = [v]
        for k in range(multires):
            out += [torch.sin(v * 2**k), torch.cos(v * 2**k)]
        return torch.cat(out, 1)

    h = torch.cat([encode(products("color").t() @ w["basis_mat.weight"].t()), encode(d.double())], 1)
    for j in range(layers):
        h = h @ w[f"color_net.{j}.weight"].t()
        h = F.relu(h) if j < layers - 1 else h.sigmoid()
    return products("sigma").sum(0), h


def points(count: int = 2000) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.rand(count, 3, generator=g) * 2.4 - 1.2
    return x, F.normalize(torch.randn(count, 3, generator=g), dim=-1)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vm", "cp"])
@pytest.mark.parametrize(
    ("train", "multires", "layers", "activation"), [(None, 2, 3, "exp"), (SHRUNK, 2, 3, "exp"), (SHRUNK, 3, 2, "relu")]
)
def test_both_kinds_are_the_programs_formula(
    tmp_path: Path, kind: str, train: list[float] | None, multires: int, layers: int, activation: str
) -> None:
    model = state(kind, train, multires, layers)
    path = saved(tmp_path, model, bare=train is None)
    found = identify(path)
    assert found.format == "torch-ngp-tensorf"
    assert found.match is not None
    assert kind.upper() in found.match.reason
    parts = read(path, **({} if activation == "exp" else {"density_activation": activation}))
    assert parts.architecture == ("tensorf" if kind == "vm" else "tensorf-cp")
    x, d = points()
    raw, rgb = program(model, x, d, multires, layers)
    inside = (x.abs() <= 1).all(1)
    sigma = torch.where(inside, raw.exp() if activation == "exp" else F.relu(raw), 0.0)
    mine, color = field_of(parts)(x, d)
    torch.testing.assert_close(mine.double(), sigma, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(color[inside].double(), rgb[inside], rtol=0, atol=5e-5)
    if train and activation == "exp":
        far = inside & (raw == 0)
        assert float(far.double().mean()) > 0.1  # the fog between both boxes
        assert bool((mine[far] == 1).all())
    assert parts.scene.box == Box.cube(1.0)
    assert {"background", "near", "step"} <= set(parts.scene.assumed)
    assert ("density_activation" in parts.scene.assumed) == (activation == "exp")


@torch.no_grad()
def test_the_bitfield_multiplies_the_density(tmp_path: Path) -> None:
    """One Morton-ordered bit a cell of 2/128 (layouts 2.1): the first byte holds cells (0..1, 0..1, 0..1)."""
    bits = torch.zeros(128**3 // 8, dtype=torch.uint8)
    bits[0] = 0b00000011  # (0, 0, 0) and, x in the lowest bit, (1, 0, 0)
    parts = read(saved(tmp_path, {**state("vm", SHRUNK), "density_bitfield": bits}))
    x = torch.tensor([[0.5, 0.5, 0.5], [1.5, 0.5, 0.5], [0.5, 1.5, 0.5], [64.0, 64.0, 64.0]]) * (2 / 128) - 1
    sigma, _ = field_of(parts)(x, F.normalize(torch.ones(4, 3), dim=1))
    assert sigma.tolist() == [1.0, 1.0, 0.0, 0.0]


def test_a_background_network_is_left_out_and_said(tmp_path: Path) -> None:
    extra = {"bg_mat": torch.zeros(1, 8, 4, 4), "bg_net.0.weight": torch.zeros(64, 23)}
    parts = read(saved(tmp_path, {**state("vm"), **extra}))
    assert any("bg_mat" in note for note in parts.notes)
    assert not any(k.startswith("bg") for k in parts.tensors)
    assert parts.provenance["global_step"] == 30


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("aabb_train", None, "--bounds"),
        ("aabb_train", torch.zeros(5), r"aabb_train' is \[5\]"),
        ("aabb_train", torch.zeros(6), "aabb_train: box"),
        ("sigma_vec.1", None, r"'sigma_vec\.1' is missing"),
        ("sigma_mat.2", torch.zeros(1, 5, 7, 9), r"'sigma_mat\.2' is float32 \[1, 5, 7, 9\]"),
        ("color_vec.0", torch.zeros(1, 5, 3, 1), r"'color_vec\.0'"),
        ("basis_mat.weight", torch.zeros(27, 14), r"basis_mat\.weight.*\['\*', 15\]"),
        ("color_net.0.weight", torch.zeros(16, 43), "frequency encodings"),
        ("color_net.1.weight", torch.zeros(16, 15), r"color_net\.1\.weight.*\[16, 16\]"),
        ("color_net.0.bias", torch.zeros(16), r"'color_net\.0\.bias' has no place"),
        ("density_bitfield", torch.zeros(7, dtype=torch.uint8), "density_bitfield"),
    ],
)
def test_malformed_files_name_file_and_key(tmp_path: Path, key: str, value: Any, match: str) -> None:
    model = state("vm")
    if value is None:
        del model[key]
    else:
        model[key] = value
    path = saved(tmp_path, model)
    with pytest.raises(InputError, match=match) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "torch-ngp-tensorf" in str(caught.value)


def test_unequal_ranks_odd_boxes_and_unknown_activations_are_said(tmp_path: Path) -> None:
    model = state("cp")
    model["sigma_vec.1"] = torch.zeros(1, 5, 8, 1)
    with pytest.raises(InputError, match=r"ranks \[6, 5, 6\]"):
        read(saved(tmp_path, model))
    with pytest.raises(InputError, match="density_activation='tanh'"):
        read(saved(tmp_path, state("cp")), density_activation="tanh")
    odd = {**state("cp"), "aabb_infer": torch.tensor([-1.0, -1, -1, 1, 1, 2])}
    with pytest.raises(InputError, match="no cube"):
        read(saved(tmp_path, {**odd, "density_bitfield": torch.zeros(8, dtype=torch.uint8)}))
    without = {k: t for k, t in state("cp").items() if not k.startswith("aabb")}
    parts = FORMAT.read(open_manifest(saved(tmp_path, without)), ReadOptions(bounds=Box.cube(2.0)))
    assert parts.scene.box == Box.cube(2.0)
    assert parts.config["padding"] == "none"


def test_relatives_are_left_alone(tmp_path: Path) -> None:
    pvd = {**state("vm"), "basis_mat.weight": torch.zeros(15, 15), "color_net.0.weight": torch.zeros(64, 31)}
    match = probe(open_manifest(saved(tmp_path, pvd)))
    assert match is not None
    assert match.score < 0.3
    groups = probe(
        open_manifest(saved(tmp_path, {"U_vec_density.0": torch.zeros(3), "S_vec_density.0": torch.zeros(3)}))
    )
    assert groups is not None
    assert groups.score < 0.3
    assert "CCNeRF" in groups.reason
    assert probe(open_manifest(saved(tmp_path, {"encoder.embeddings": torch.zeros(2, 2)}))) is None


def test_columns_of_the_first_layer_are_a_permutation(tmp_path: Path) -> None:
    model = state("vm")
    first = model["color_net.0.weight"]
    ours = read(saved(tmp_path, model)).tensors["renderModule.mlp.0.weight"].numpy()
    np.testing.assert_array_equal(np.sort(ours, axis=1), np.sort(first.numpy(), axis=1))
