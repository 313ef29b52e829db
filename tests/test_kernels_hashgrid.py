"""The hash encoding: known corners and counts, both twins against a scalar reference, gradients, edges, refusals."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pvdconvert.kernels.backend import has_numba, set_backend
from pvdconvert.kernels.hashgrid import HashGridSpec, growth, hash_encode, hash_encode_torch
from tests.twins import TWINS, choose

RULES = ("tcnn", "torch-ngp")


@pytest.fixture(params=TWINS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    choose(name, monkeypatch, request.module, "hash_encode")
    return name


def make(rule: str, **changes: Any) -> HashGridSpec:
    """A small grid whose first levels are dense and whose last ones are hashed."""
    values = {"levels": 5, "features": 2, "log2_table": 12, "base": 4, "per_level_scale": 1.7} | changes
    return HashGridSpec.make(index_rule=rule, **values)


def reference(x01: Tensor, table: Tensor, spec: HashGridSpec, base: int, growth_: float) -> Tensor:
    """One point, one corner at a time, in float64 and Python integers: written from the programs' kernels."""
    out = np.zeros((len(x01), spec.width))
    rows = table.double().numpy()
    tcnn = spec.index_rule == "tcnn"
    for n, point in enumerate(x01.double().tolist()):
        if not tcnn and not all(0.0 <= v <= 1.0 for v in point):
            continue
        for lv in range(len(spec.levels)):
            first, end = spec.offsets[lv], spec.offsets[lv + 1]
            scale = float(np.float32(np.exp2(np.float32(lv) * np.float32(np.log2(growth_))) * base - 1))
            res = int(np.ceil(scale)) + 1
            pos = [v * scale + 0.5 for v in point]
            cell = [int(np.floor(v)) for v in pos]
            for corner in range(8):
                weight, at = 1.0, []
                for axis in range(3):
                    far = corner >> axis & 1
                    f = pos[axis] - cell[axis]
                    f = f * f * (3 - 2 * f) if spec.interpolation == "smoothstep" else f
                    weight *= f if far else 1 - f
                    at.append((cell[axis] + far) % 2**32)
                index, stride = 0, 1
                for axis in range(3):
                    if not tcnn and stride > end - first:
                        break
                    index = (index + at[axis] * stride) % 2**32
                    stride *= res if tcnn else res + 1
                if stride > end - first:
                    index = at[0] ^ at[1] * 2654435761 % 2**32 ^ at[2] * 805459861 % 2**32
                row = rows[first + index % (end - first)]
                out[n, lv * spec.features : (lv + 1) * spec.features] += weight * row
    return torch.from_numpy(out)


def draw(spec: HashGridSpec, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, generator=g), torch.rand(spec.entries, spec.features, generator=g) * 2 - 1


@pytest.mark.parametrize(
    ("scale", "l16", "l8"),
    [
        (1, 12_196_240, 11_681_792),
        (2, 12_599_920, 12_660_928),
        (4, 13_074_912, 12_855_296),
        (8, 13_288_400, 12_940_032),
        (16, 13_623_184, 13_041_664),
        (32, 13_918_896, 13_194_816),
        (64, 14_008_608, 13_379_744),
        (128, 14_110_032, 13_647_872),
    ],
)
def test_tcnn_parameter_counts_of_the_layouts_table(scale: int, l16: int, l8: int) -> None:
    for levels, features, count in ((16, 2, l16), (8, 4, l8)):
        spec = HashGridSpec.make(levels, features, 19, 16, growth(levels, 16, 2048 * scale, "tcnn"), "tcnn")
        assert spec.entries * features == count


@pytest.mark.parametrize(
    ("levels", "features", "log2_table", "parameters"),
    # The last two are whole files in the layouts' text: 10240 of them belong to the MLPs.
    [(6, 8, 19, 17_446_080), (8, 4, 21, 43_149_312 - 10_240), (8, 4, 15, 944_128 - 10_240)],
)
def test_tcnn_parameter_counts_of_other_tables(levels: int, features: int, log2_table: int, parameters: int) -> None:
    spec = HashGridSpec.make(levels, features, log2_table, 16, growth(levels, 16, 2048, "tcnn"), "tcnn")
    assert spec.entries * features == parameters


@pytest.mark.parametrize(
    ("bound", "l16", "l14"),
    [
        (1, 6_119_864, 5_303_704),
        (2, 6_328_848, 5_530_080),
        (4, 6_554_024, 5_675_512),
        (8, 6_664_784, 5_907_072),
        (16, 6_837_544, 5_947_968),
    ],
)
def test_torch_ngp_entry_counts_of_the_layouts_table(bound: int, l16: int, l14: int) -> None:
    for levels, count in ((16, l16), (14, l14)):
        spec = HashGridSpec.make(levels, 2, 19, 16, growth(levels, 16, 2048 * bound, "torch-ngp"), "torch-ngp")
        assert spec.entries == count


def test_resolutions_of_the_pvd_grid() -> None:
    spec = HashGridSpec.make(14, 2, 19, 16, growth(14, 16, 2048, "torch-ngp"), "torch-ngp")
    assert [v.resolution for v in spec.levels] == [16, 24, 34, 50, 72, 104, 151, 219, 317, 461, 669, 971, 1411, 2049]
    assert [v.hashed for v in spec.levels] == [False] * 5 + [True] * 9


# Level 0 of both grids has base 16: scale = 15, res = 16.
#   dense corner (1, 2, 3):  tcnn 1 + 2*16 + 3*16^2 = 801;  torch-ngp strides by 17: 1 + 2*17 + 3*17^2 = 902
#   last-cell corner (16, 16, 16), met at x01 = 1 where pos = 15.5:
#       tcnn 16 + 16*16 + 16*256 = 4368, and 4368 mod 4096 = 272;  torch-ngp 16 + 16*17 + 16*289 = 4912 of 4920 entries
# Level 15 is hashed by 2^19 entries in both. Corner (1, 2, 3):
#       2 * 2654435761 = 5308871522 = 1013904226 mod 2^32, and mod 2^19 it is 455522
#       3 * 805459861 = 2416379583, and mod 2^19 it is 460479
#       1 xor 455522 xor 460479 = 0x00001 xor 0x6f362 xor 0x706bf = 0x1f5dc = 128476
CORNERS = [
    ("tcnn", 0, (1, 2, 3), 801),
    ("torch-ngp", 0, (1, 2, 3), 902),
    ("tcnn", 0, (16, 16, 16), 272),
    ("torch-ngp", 0, (16, 16, 16), 4912),
    ("tcnn", 15, (1, 2, 3), 128476),
    ("torch-ngp", 15, (1, 2, 3), 128476),
]


@pytest.mark.parametrize(("rule", "number", "corner", "row"), CORNERS)
def test_known_corners(backend: str, rule: str, number: int, corner: tuple[int, int, int], row: int) -> None:
    spec = HashGridSpec.make(16, 2, 19, 16, growth(16, 16, 2048, rule), rule)
    level = spec.levels[number]
    assert level.index(*corner) == row
    table = torch.zeros(spec.entries, 2)
    table[level.offset + row] = torch.tensor([1.0, 3.0])
    # The position whose pos = x01 * scale + 0.5 is the corner; the last corner is only met half-way into its cell.
    last = corner[0] == 16
    x01 = torch.ones(1, 3) if last else (torch.tensor([corner]).double() - 0.5).div(level.scale).float()
    expected = torch.zeros(32)
    expected[2 * number : 2 * number + 2] = torch.tensor([1.0, 3.0]) * (0.125 if last else 1.0)
    torch.testing.assert_close(hash_encode(x01, table, spec)[0], expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("interpolation", ["linear", "smoothstep"])
@pytest.mark.parametrize("features", [1, 2, 4])
def test_values_against_the_scalar_reference(backend: str, rule: str, interpolation: str, features: int) -> None:
    spec = make(rule, features=features, interpolation=interpolation)
    assert {v.hashed for v in spec.levels} == {False, True}
    x01, table = draw(spec, 40)
    x01[0], x01[1], x01[2] = 0.0, 1.0, torch.tensor([1.0, 0.0, 0.5])
    x01[3] = 1.5 / 3  # a cell edge of level 0: scale 3, pos = 2
    x01[4], x01[5] = torch.tensor([-0.3, 0.5, 0.5]), torch.tensor([0.2, 1.7, 0.2])
    expected = reference(x01, table, spec, 4, 1.7)
    torch.testing.assert_close(hash_encode(x01, table, spec).double(), expected, atol=2e-5, rtol=0)
    assert (expected[4] == 0).all() == (rule == "torch-ngp")


@pytest.mark.parametrize("rule", RULES)
def test_table_sizes_that_are_no_power_of_two(backend: str, rule: str) -> None:
    # 12 rows for a 4^3 level and 1000 for the others: hashed with a true modulus.
    offsets = [0, 12, 1012, 2012]
    spec = make(rule, levels=3, offsets=offsets)
    assert spec.offsets == tuple(offsets)
    assert spec.levels[0].hashed
    x01, table = draw(spec, 30)
    expected = reference(x01, table, spec, 4, 1.7)
    torch.testing.assert_close(hash_encode(x01, table, spec).double(), expected, atol=2e-5, rtol=0)


def test_stored_offsets_win() -> None:
    # A torch-ngp file from before 2022-06-06: (16 + 1)^3 = 4913 rows, not rounded up to 4920.
    old = HashGridSpec.make(2, 2, 19, 16, 1.5, "torch-ngp", offsets=[0, 4913, 4913 + 25**3])
    new = HashGridSpec.make(2, 2, 19, 16, 1.5, "torch-ngp")
    assert new.offsets == (0, 4920, 4920 + 15632)
    assert old.offsets == (0, 4913, 20538)
    assert not any(v.hashed for v in old.levels)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("features", [2, 3])
def test_table_gradient(backend: str, rule: str, features: int) -> None:
    spec = make(rule, features=features)
    x01, table = draw(spec, 200)
    x01[:20] *= 3  # some lie outside
    weights = torch.randn(200, spec.width, generator=torch.Generator().manual_seed(1))
    table.requires_grad_()
    (got,) = torch.autograd.grad(hash_encode(x01, table, spec), table, weights)
    wide = table.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(hash_encode_torch(x01.double(), wide, spec), wide, weights.double())
    torch.testing.assert_close(got.double(), truth, atol=1e-4, rtol=1e-4)
    # The operator is linear in the table: <A t, w> = <t, A' w>.
    left = (reference(x01, table.detach(), spec, 4, 1.7) * weights.double()).sum()
    assert float((table.detach().double() * got.double()).sum()) == pytest.approx(float(left), rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("interpolation", ["linear", "smoothstep"])
def test_position_gradient(backend: str, interpolation: str) -> None:
    spec = make("torch-ngp", interpolation=interpolation)
    x01, table = draw(spec, 50, seed=3)
    x01.requires_grad_()
    weights = torch.randn(50, spec.width, generator=torch.Generator().manual_seed(1))
    (got,) = torch.autograd.grad(hash_encode(x01, table, spec), x01, weights)
    h = 1e-7
    wide, rows = x01.detach().double(), table.double()
    for axis in range(3):
        step = torch.zeros(3, dtype=torch.float64)
        step[axis] = h
        rise = hash_encode_torch(wide + step, rows, spec) - hash_encode_torch(wide - step, rows, spec)
        slope = (rise * weights.double()).sum(-1) / (2 * h)
        torch.testing.assert_close(got[:, axis].double(), slope, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("rule", RULES)
def test_what_is_not_a_number_encodes_to_zeros(backend: str, rule: str) -> None:
    spec = make(rule)
    _, table = draw(spec, 1)
    bad = torch.tensor(
        [[float("nan"), 0.5, 0.5], [0.5, float("inf"), 0.5], [0.5, 0.5, -float("inf")], [1e30, 0.1, 0.1]]
    )
    assert (hash_encode(bad, table, spec) == 0).all()
    table.requires_grad_()
    (grad,) = torch.autograd.grad(hash_encode(bad, table, spec).sum(), table)
    assert (grad == 0).all()


def test_just_outside_of_the_box_is_zero_under_torch_ngp(backend: str) -> None:
    spec = make("torch-ngp")
    table = torch.ones(spec.entries, 2)
    edge = torch.full((4, 3), 0.5)
    edge[0, 0], edge[1, 1], edge[2, 2], edge[3, 0] = -1e-6, 1 + 1e-6, 1.0, 0.0
    torch.testing.assert_close(hash_encode(edge, table, spec).mean(-1), torch.tensor([0.0, 0.0, 1.0, 1.0]))


@pytest.mark.parametrize("rule", RULES)
def test_empty_and_strided_inputs(backend: str, rule: str) -> None:
    spec = make(rule)
    x01, table = draw(spec, 64)
    table.requires_grad_()
    nothing = hash_encode(x01[:0], table, spec)
    assert nothing.shape == (0, spec.width)
    (grad,) = torch.autograd.grad(nothing.sum(), table)
    assert (grad == 0).all()
    straight = hash_encode(x01[::2].clone(), table, spec)
    strided = hash_encode(x01[::2], table.t().contiguous().t(), spec)
    assert torch.equal(straight, strided)
    # A gradient that arrives expanded, as from sum(), is no contiguous tensor either.
    (a,) = torch.autograd.grad(hash_encode(x01, table, spec).sum(), table)
    (b,) = torch.autograd.grad(hash_encode(x01, table, spec), table, torch.ones(64, spec.width))
    torch.testing.assert_close(a, b)  # atomics have no order


@pytest.mark.skipif(not has_numba(), reason="numba is not installed")
def test_bits_do_not_depend_on_the_threads() -> None:
    set_backend("numba")
    spec = make("torch-ngp")
    x01, table = draw(spec, 5000)
    table.requires_grad_()
    weights = torch.randn(5000, spec.width, generator=torch.Generator().manual_seed(1))
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        out = hash_encode(x01, table, spec)
        results.append((out.detach(), torch.autograd.grad(out, table, weights)[0]))
    for out, grad in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(grad, results[0][1])


@given(
    rule=st.sampled_from(RULES),
    levels=st.integers(1, 6),
    log2_table=st.integers(3, 10),
    base=st.integers(1, 20),
    b=st.floats(1.0, 2.5),
    corner=st.tuples(*[st.integers(0, 2**32 - 1)] * 3),
)
def test_rows_stay_in_their_level(
    rule: str, levels: int, log2_table: int, base: int, b: float, corner: tuple[int, int, int]
) -> None:
    spec = HashGridSpec.make(levels, 2, log2_table, base, b, rule)
    for level in spec.levels:
        assert 0 <= level.index(*corner) < level.entries
        assert level.entries <= 1 << log2_table
    # Weights of a cell sum to one, so a constant table is reproduced everywhere in the box.
    x01 = torch.rand(16, 3, generator=torch.Generator().manual_seed(base))
    out = hash_encode(x01, torch.full((spec.entries, 2), 0.75), spec)
    torch.testing.assert_close(out, torch.full((16, spec.width), 0.75))


def test_wrong_shapes_are_refused() -> None:
    spec = make("tcnn")
    x01, table = draw(spec, 4)
    with pytest.raises(ValueError, match=r"positions must be \[N, 3\]"):
        hash_encode(x01[:, :2], table, spec)
    with pytest.raises(ValueError, match="the grid needs"):
        hash_encode(x01, table[:-1], spec)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index_rule": "ngp"}, "index_rule"),
        ({"interpolation": "cubic"}, "interpolation"),
        ({"levels": 0}, "levels"),
        ({"features": 99}, "features"),
        ({"log2_table": 40}, "log2_table"),
        ({"base": 0}, "base_resolution"),
        ({"per_level_scale": float("nan")}, "per_level_scale"),
        ({"per_level_scale": 1e4}, "per_level_scale"),
        ({"offsets": [0, 8, 16]}, "offsets"),
        ({"offsets": [0, 8, 8, 16]}, "offsets"),
        ({"offsets": [1, 8, 12, 16]}, "offsets"),
        ({"offsets": []}, "offsets"),
    ],
)
def test_impossible_grids_are_refused(changes: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"levels": 3, "features": 2, "log2_table": 12, "base": 4, "per_level_scale": 1.7}
    good["index_rule"] = "tcnn"
    with pytest.raises(ValueError, match=message):
        HashGridSpec.make(**(good | changes))


def test_growth_of_a_single_level() -> None:
    assert growth(1, 16, 2048, "tcnn") == 1.0
    assert growth(2, 16, 32, "torch-ngp") == pytest.approx(2.0, rel=1e-12)


def test_the_geometry_needs_no_torch() -> None:
    code = "import sys, pvdconvert.kernels.hashgrid_spec; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ------------------------------------------------------------------------------------- nerfstudio's torch grid


@pytest.mark.parametrize(("finest", "last"), [(1024, 1024), (2048, 2047), (4096, 4095), (8192, 8191)])
def test_nerfstudio_scales(finest: int, last: int) -> None:
    """The finest scales that the program itself counts in float32 (layouts section 7.1), and its own expression."""
    g = float(np.exp((np.log(finest) - np.log(16)) / 15))
    spec = HashGridSpec.make(16, 2, 10, 16, g, "nerfstudio")
    assert [level.scale for level in spec.levels] == torch.floor(16 * g ** torch.arange(16)).tolist()
    assert spec.levels[-1].scale == last
    assert spec.offsets == tuple(1024 * k for k in range(17))


def test_nerfstudio_lookup(backend: str) -> None:
    """Layouts section 7.1, written as the program states it: floor and ceil corners, int64 hash modulo 2^T."""
    g = 1.7
    spec = make("nerfstudio", per_level_scale=g)
    x, table = draw(spec, 300)
    x[:3] = torch.tensor([[0.25, 0.5, 0.75], [1.0, 0.5, 0.5], [0.0, 1.0, 1.0]])  # integers: both corners coincide
    expected = np.zeros((len(x), spec.width))
    for n, point in enumerate(x.numpy()):
        for level in range(5):
            scale = np.floor(np.float32(4 * np.float32(g) ** np.float32(level)))
            scaled = point * np.float32(scale)
            low, high = np.floor(scaled).astype(np.int64), np.ceil(scaled).astype(np.int64)
            f = scaled.astype(np.float64) - low
            for corner in np.ndindex(2, 2, 2):
                at = [high[a] if corner[a] else low[a] for a in range(3)]
                row = (at[0] ^ at[1] * 2654435761 ^ at[2] * 805459861) % 4096 + level * 4096
                weight = np.prod([f[a] if corner[a] else 1 - f[a] for a in range(3)])
                expected[n, 2 * level : 2 * level + 2] += weight * table[row].double().numpy()
    np.testing.assert_allclose(hash_encode(x, table, spec).numpy(), expected, atol=2e-5)
    assert not hash_encode(torch.tensor([[1.1, 0.5, 0.5], [0.5, -1e-6, 0.5]]), table, spec).any()


def test_nerfstudio_gradient_and_refusals(backend: str) -> None:
    spec = make("nerfstudio")
    x, table = draw(spec, 200)
    table.requires_grad_(True)
    weight = torch.rand(200, spec.width, generator=torch.Generator().manual_seed(1))
    (hash_encode(x, table, spec) * weight).sum().backward()  # type: ignore[no-untyped-call]
    assert table.grad is not None
    twin = table.detach().double().requires_grad_(True)
    (hash_encode_torch(x.double(), twin, spec) * weight).sum().backward()  # type: ignore[no-untyped-call]
    assert twin.grad is not None
    torch.testing.assert_close(table.grad.double(), twin.grad, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="multiples of 4096"):
        make("nerfstudio", offsets=[0, 1, 2, 3, 4, 5])
