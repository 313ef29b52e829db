"""Sparse trilinear interpolation: both twins against an independent float64 truth."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import backward

from pvdconvert.kernels.rowgrad import sink_of
from pvdconvert.kernels.voxels import BrickMap, Missing, voxel_inside, voxel_interp, voxel_sh_color, voxel_spread
from tests.twins import TWINS, choose

SHAPE = (11, 9, 20)
MISSING: tuple[Missing, ...] = ("cell", "zero")


@pytest.fixture(params=TWINS, autouse=True)
def twin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    choose(name, monkeypatch, request.module, "voxel_interp", "voxel_inside", "voxel_sh_color", "voxel_spread")
    return name


def lattice(share: float, seed: int = 0) -> Tensor:
    """[V, 3]: each vertex of SHAPE with probability ``share``, x-major."""
    everything = torch.cartesian_prod(*(torch.arange(n) for n in SHAPE))
    keep = torch.rand(len(everything), generator=torch.Generator().manual_seed(seed)) < share
    return everything[keep]


def points(count: int, seed: int = 1) -> Tensor:
    """Inside, outside, on faces, edges and vertices, and not a number."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 3, generator=g) * (torch.tensor(SHAPE) + 1) - 1
    x[::7] = x[::7].round()
    x[::11, 0] = SHAPE[0] - 1
    x[::13, 2] = 0.0
    x[0], x[1], x[2, 1] = torch.tensor(SHAPE) - 1.0, 0.0, float("nan")
    return x


def truth(
    x: Tensor, vertices: Tensor, values: Tensor, missing: Missing, fill: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(out [N, C], weights [N, V], inside [N]) by a dictionary, point by point, in float64."""
    row = {tuple(v): r for r, v in enumerate(vertices.tolist())}
    x64, table = x.double().numpy(), values.detach().double().numpy()
    weights, inside, out = np.zeros((len(x), len(vertices))), np.zeros(len(x), bool), np.zeros((len(x), table.shape[1]))
    for n, p in enumerate(x64):
        some = False
        if all(0 <= v <= s - 1 for v, s in zip(p, SHAPE)):
            cell = [min(int(v), s - 2) for v, s in zip(p, SHAPE)]
            corners = [(i, j, k) for i in (0, 1) for j in (0, 1) for k in (0, 1)]
            found = [row.get((cell[0] + i, cell[1] + j, cell[2] + k)) for i, j, k in corners]
            inside[n] = None not in found
            if inside[n] or missing == "zero":
                for corner, r in zip(corners, found):
                    if r is not None:
                        some = True
                        f = [v - c if up else 1 - (v - c) for v, c, up in zip(p, cell, corner)]
                        weights[n, r] = f[0] * f[1] * f[2]
        out[n] = weights[n] @ table if some else fill
    return out, weights, inside


@pytest.mark.parametrize("side", [4, 8])
@pytest.mark.parametrize("missing", MISSING)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.8, 1.0])
def test_interpolation_and_gradient(share: float, missing: Missing, side: int) -> None:
    vertices, x = lattice(share), points(200)
    grid = BrickMap.from_vertices(vertices, SHAPE, side)
    values = torch.randn(len(vertices), 5, generator=torch.Generator().manual_seed(2)).requires_grad_()
    expected, weights, inside = truth(x, vertices, values, missing, -3.0)
    out = voxel_interp(x, grid, values, missing, fill=-3.0)
    np.testing.assert_allclose(out.detach().numpy(), expected, atol=2e-5)
    assert torch.equal(voxel_inside(x, grid), torch.from_numpy(inside))
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    backward(out, g)
    assert values.grad is not None
    np.testing.assert_allclose(values.grad.numpy(), weights.T @ g.double().numpy(), atol=1e-4)


@pytest.mark.parametrize("missing", MISSING)
def test_spreading_adds_to_what_is_there(missing: Missing) -> None:
    vertices, x = lattice(0.8), points(200)
    values = torch.randn(len(x), 3, generator=torch.Generator().manual_seed(3))
    _, weights, _ = truth(x, vertices, torch.zeros(len(vertices), 3), missing, 0.0)
    grid = BrickMap.from_vertices(vertices, SHAPE)
    found = voxel_spread(x, grid, values, torch.ones(len(vertices), 3), missing)
    np.testing.assert_allclose(found.numpy(), 1 + weights.T @ values.double().numpy(), atol=1e-5)


@pytest.mark.parametrize("missing", MISSING)
@pytest.mark.parametrize(("bands", "directions"), [(1, 1), (4, 3), (9, 1), (9, 4)])
def test_fused_color_and_gradient(bands: int, directions: int, missing: Missing) -> None:
    vertices, x = lattice(0.9), points(150)
    grid = BrickMap.from_vertices(vertices, SHAPE)
    g = torch.Generator().manual_seed(4)
    sh = torch.randn(len(vertices), 3 * bands, generator=g).requires_grad_()
    basis = torch.randn(len(x), directions, bands, generator=g)
    mixed, weights, _ = truth(x, vertices, sh, missing, 0.0)
    expected = np.einsum("nkb,ncb->nkc", basis.double().numpy(), mixed.reshape(len(x), 3, bands))
    out = voxel_sh_color(x, basis, grid, sh, missing)
    np.testing.assert_allclose(out.detach().numpy(), expected, atol=1e-4)
    up = torch.randn(out.shape, generator=g)
    backward(out, up)
    per_point = np.einsum("nkc,nkb->ncb", up.double().numpy(), basis.double().numpy()).reshape(len(x), -1)
    assert sh.grad is not None
    np.testing.assert_allclose(sh.grad.numpy(), weights.T @ per_point, atol=2e-4)


def test_empty_input_and_strided_input() -> None:
    vertices = lattice(1.0)
    grid = BrickMap.from_vertices(vertices, SHAPE)
    wide = torch.randn(len(vertices), 12, generator=torch.Generator().manual_seed(5))
    values = wide[:, ::2].requires_grad_()
    x = torch.rand(40, 6, generator=torch.Generator().manual_seed(6))
    x = (x * 8)[:, ::2]
    assert not values.is_contiguous()
    assert not x.is_contiguous()
    expected = voxel_interp(x.contiguous(), grid, values.detach().contiguous())
    out = voxel_interp(x, grid, values)
    torch.testing.assert_close(out, expected)
    backward(out.sum())
    assert voxel_interp(x[:0], grid, values).shape == (0, 6)
    assert voxel_inside(x[:0], grid).shape == (0,)
    color = voxel_sh_color(x[:0], torch.empty(0, 2, 2), grid, values)
    assert color.shape == (0, 2, 3)
    backward(color.sum())


def test_backward_is_the_same_for_any_number_of_threads(twin: str) -> None:
    if twin in ("triton", "cuda"):
        pytest.skip("atomics add in any order")
    vertices = lattice(0.9)
    grid = BrickMap.from_vertices(vertices, SHAPE)
    x = points(5000)
    before = torch.get_num_threads()
    grads = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        values = torch.ones(len(vertices), 27).requires_grad_()
        backward((voxel_interp(x, grid, values) * torch.linspace(-1, 1, 27)).sum())
        assert values.grad is not None
        grads.append(values.grad)
    torch.set_num_threads(before)
    assert torch.equal(grads[1], grads[2])
    if twin == "numba":
        assert torch.equal(grads[0], grads[1])


def test_row_gradients_are_collected_in_place(twin: str) -> None:
    vertices, x = lattice(0.9), points(50)
    grid = BrickMap.from_vertices(vertices, SHAPE)
    plain = torch.randn(len(vertices), 3, generator=torch.Generator().manual_seed(7)).requires_grad_()
    sparse = torch.nn.Parameter(plain.detach().clone())
    sparse.touched = torch.zeros(len(vertices), dtype=torch.uint8)  # type: ignore[attr-defined]
    for values in (plain, sparse):
        for _ in range(2):
            backward(voxel_interp(x, grid, values).square().sum())
    assert plain.grad is not None
    assert sparse.grad is not None
    torch.testing.assert_close(sparse.grad, plain.grad)
    if twin in ("numba", "triton"):
        touched = sparse.touched.bool()  # type: ignore[attr-defined]
        assert touched.numpy()[truth(x, vertices, plain, "cell", 0.0)[1].any(0)].all()
        assert int(touched.sum()) < len(vertices) // 2
        assert not bool(sparse.grad[~touched].any())


def test_no_sink_without_a_mask() -> None:
    assert sink_of(torch.zeros(3, 2, requires_grad=True)) is None


def test_map_is_exact_and_small() -> None:
    """The rows are found again, and memory goes with the vertices that exist, not with the cube."""
    n = 1024
    shell = torch.cartesian_prod(torch.arange(n), torch.arange(n), torch.tensor([512, 513]))[::16]
    grid = BrickMap.from_vertices(shell, (n, n, n))
    assert torch.equal(grid.rows(shell.long()), torch.arange(len(shell)))
    assert bool((grid.rows(shell.long() + torch.tensor([0, 0, 2])) == -1).all())
    assert bool((grid.rows(torch.tensor([[-1, 0, 0], [n, 0, 0]])) == -1).all())
    assert grid.top.numel() + grid.bricks.numel() < n**3 // 50


@pytest.mark.parametrize(
    ("vertices", "message"),
    [([[0, 0, 0], [0, 0, 0]], "twice"), ([[0, 0, 20]], "outside"), ([[-1, 0, 0]], "outside")],
)
def test_impossible_vertices_are_refused(vertices: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BrickMap.from_vertices(torch.tensor(vertices), SHAPE)


def test_a_flat_lattice_is_refused() -> None:
    with pytest.raises(ValueError, match="two vertices"):
        BrickMap.from_vertices(torch.zeros(1, 3, dtype=torch.int32), (1, 4, 4))
