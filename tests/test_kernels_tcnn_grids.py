"""tiny-cuda-nn's dense, tiled and nearest grids: both twins against the layouts' rule, corner by corner in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pvdconvert.kernels.hashgrid import HashGridSpec, growth, hash_encode, hash_encode_torch
from tests.twins import TWINS, choose


@pytest.fixture(params=TWINS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    choose(name, monkeypatch, request.module, "hash_encode")
    return name


def lookup(point: list[float], table: Any, kind: str, levels: int, base: int, b: float, interpolation: str) -> Any:
    """Layouts section 1.3, one point: sizes, offsets, stride walk and weights, from the formulas alone."""
    out, offset = [], 0
    for level in range(levels):
        scale = float(np.float32(np.exp2(level * np.log2(b)) * base - 1))
        res = int(np.ceil(scale)) + 1
        count = -(-(res**3) // 8) * 8
        count = min(count, base**3) if kind == "tiled" else count
        pos = [v * scale + 0.5 for v in point]
        total = np.zeros(table.shape[1])
        for corner in range(8):
            weight, at = 1.0, []
            for axis in range(3):
                low, far = int(np.floor(pos[axis])), corner >> axis & 1
                f = 0.0 if interpolation == "nearest" else pos[axis] - low
                weight *= f if far else 1 - f
                at.append(low + far)
            total = total + weight * table[offset + (at[0] + at[1] * res + at[2] * res * res) % 2**32 % count]
        out.append(total)
        offset += count
    assert offset == len(table)
    return np.concatenate(out)


@pytest.mark.parametrize("interpolation", ["linear", "nearest"])
@pytest.mark.parametrize("kind", ["dense", "tiled"])
@pytest.mark.parametrize("features", [2, 8])
def test_values(backend: str, kind: str, interpolation: str, features: int) -> None:
    spec = HashGridSpec.make(4, features, 3, 5, 1.7, "tcnn", interpolation=interpolation, grid_type=kind)
    g = torch.Generator().manual_seed(0)
    x, table = torch.rand(200, 3, generator=g), torch.rand(spec.entries, features, generator=g) - 0.5
    x[:8] = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)  # the corner beyond the last one wraps
    rows = table.double().numpy()
    expected = np.array([lookup(p, rows, kind, 4, 5, 1.7, interpolation) for p in x.double().tolist()])
    # A cell border met in float32 is another cell than in float64, for "nearest" only: none of these points meets one.
    np.testing.assert_allclose(hash_encode(x, table, spec).numpy(), expected, atol=2e-5)


def test_nearest_of_a_hashed_grid_is_one_row(backend: str) -> None:
    spec = HashGridSpec.make(1, 2, 4, 16, 1.0, "tcnn", interpolation="nearest")
    table = torch.arange(32.0).view(16, 2)
    x = torch.tensor([[0.31, 0.72, 0.55]])
    i = [int(v * 15 + 0.5) for v in (0.31, 0.72, 0.55)]  # scale 15
    row = (i[0] ^ i[1] * 2654435761 % 2**32 ^ i[2] * 805459861 % 2**32) % 16
    assert hash_encode(x, table, spec).tolist() == [[2.0 * row, 2.0 * row + 1]]


@pytest.mark.parametrize("interpolation", ["linear", "nearest"])
def test_gradients_agree(backend: str, interpolation: str) -> None:
    spec = HashGridSpec.make(3, 4, 3, 4, 1.6, "tcnn", interpolation=interpolation, grid_type="tiled")
    x, up = torch.rand(300, 3), torch.randn(300, spec.width)
    got = []
    for encode in (hash_encode_torch, hash_encode):
        table = torch.zeros(spec.entries, 4, requires_grad=True)
        (encode(x, table, spec) * up).sum().backward()  # type: ignore[no-untyped-call]
        got.append(table.grad)
    torch.testing.assert_close(got[0], got[1], atol=1e-4, rtol=1e-4)


def test_counts_of_the_programs_own_configurations() -> None:
    """densegrid_1res: two levels of 128^3; densegrid: eight growing by 1.405 (layouts section 1.2), 16 ... 174 wide."""
    one = HashGridSpec.make(2, 8, 19, 128, 1.0, "tcnn", grid_type="tiled")
    assert one.offsets == (0, 128**3, 2 * 128**3)
    many = HashGridSpec.make(8, 2, 19, 16, 1.405, "tcnn", grid_type="dense")
    assert [v.resolution for v in many.levels] == [16, 23, 32, 45, 63, 88, 124, 173]
    assert many.entries == 4096 + 12168 + 32768 + 91128 + 250048 + 681472 + 1906624 + 5177720
    assert growth(8, 16, 256, "tcnn") == pytest.approx(np.exp(np.log(16) / 7), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"grid_type": "sparse"}, "grid_type 'sparse'"),
        ({"grid_type": "dense", "index_rule": "torch-ngp"}, "none of the rule torch-ngp"),
        ({"grid_type": "dense", "base": 1100}, "entries"),
        ({"grid_type": "tiled", "base": 2000, "levels": 1}, "entries"),
        ({"grid_type": "tiled", "base": 512, "per_level_scale": 4.0, "levels": 2}, "does not fit 32 bits"),
    ],
)
def test_impossible_grids(changes: dict[str, Any], match: str) -> None:
    values = {"levels": 1, "features": 2, "log2_table": 12, "base": 4, "per_level_scale": 1.7, "index_rule": "tcnn"}
    with pytest.raises(ValueError, match=match):
        HashGridSpec.make(**{**values, **changes})
