"""Marching: hand-made rays, an independent brute force, and both twins on the same tests."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pvdconvert.kernels import backend
from pvdconvert.kernels.march import march, march_torch, ray_box
from pvdconvert.scene import Box
from tests.twins import TWINS, choose


@dataclasses.dataclass
class Grid:
    origin: Tensor
    cell: float
    grid: Tensor


@pytest.fixture(params=TWINS, autouse=True)
def twin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    choose(name, monkeypatch, request.module, "march")
    return name


def line(cells: list[int], origin: float = 0.0) -> Grid:
    """A row of unit cells along x."""
    grid = torch.tensor(cells, dtype=torch.uint8)[:, None, None]
    return Grid(torch.tensor([origin, 0.0, 0.0]), 1.0, grid)


def one(o: list[float], d: list[float], t0: float, t1: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.tensor([o]), torch.tensor([d]), torch.tensor([t0]), torch.tensor([t1])


@pytest.mark.parametrize(
    ("jitter", "expected"),
    [(0.5, [2.25, 2.75, 4.25, 4.75]), (0.0, [2.0, 2.5, 4.0, 4.5]), (0.75, [2.375, 2.875, 4.375, 4.875])],
)
def test_samples_of_an_axis_aligned_ray_by_hand(jitter: float, expected: list[float]) -> None:
    rays = one([-1.0, 0.5, 0.5], [1.0, 0.0, 0.0], 1.0, 5.0)
    offsets, t = march(*rays, line([0, 1, 0, 1]), 0.5, jitter)
    assert offsets.tolist() == [0, 4]
    assert offsets.dtype == torch.int64
    assert t.tolist() == expected


def test_backwards_ray_by_hand() -> None:
    rays = one([5.0, 0.5, 0.5], [-1.0, 0.0, 0.0], 1.0, 5.0)
    assert march(*rays, line([0, 1, 0, 1]), 0.5)[1].tolist() == [1.25, 1.75, 3.25, 3.75]


def test_the_lattice_starts_at_t0_and_ends_before_t1() -> None:
    rays = one([0.0, 0.5, 0.5], [1.0, 0.0, 0.0], 0.3, 1.3)
    torch.testing.assert_close(march(*rays, line([1, 1, 1]), 0.4)[1], torch.tensor([0.5, 0.9]))
    exact = one([0.0, 0.5, 0.5], [1.0, 0.0, 0.0], 0.0, 1.25)
    assert march(*exact, line([1, 1, 1]), 0.5)[1].tolist() == [0.25, 0.75]  # 1.25 itself is out


def test_a_diagonal_ray_skips_the_empty_cells_by_hand() -> None:
    grid = torch.zeros(4, 4, 1, dtype=torch.uint8)
    grid[0, 0] = grid[3, 3] = 1
    s = math.sqrt(0.5)
    rays = one([0.0, 0.0, 0.5], [s, s, 0.0], 0.0, 4 / s)
    t = march(*rays, Grid(torch.zeros(3), 1.0, grid), 0.1)[1]
    expected = torch.tensor([v for k in range(57) if (v := (k + 0.5) * 0.1) * s < 1 or 3 < v * s < 4])
    torch.testing.assert_close(t, expected)


def test_rays_own_their_samples_in_order_and_misses_own_none() -> None:
    o = torch.tensor([[-1.0, 0.5, 0.5], [-1.0, 5.0, 0.5], [-1.0, 0.5, 0.5], [1.5, 0.5, 0.5]])
    d = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    t0, t1 = torch.zeros(4), torch.full((4,), 6.0)
    offsets, t = march(o, d, t0, t1, line([0, 1, 0]), 0.5)
    assert offsets.tolist() == [0, 2, 2, 2, 3]
    assert t.tolist() == [2.25, 2.75, 0.25]


def test_each_ray_has_its_own_jitter() -> None:
    o, d, t0, t1 = (v.repeat(2, 1) if v.dim() == 2 else v.repeat(2) for v in one([0, 0.5, 0.5], [1.0, 0, 0], 0, 1))
    assert march(o, d, t0, t1, line([1]), 0.5, torch.tensor([0.0, 0.5]))[1].tolist() == [0.0, 0.5, 0.25, 0.75]


def test_nothing_in_nothing_out() -> None:
    offsets, t = march(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0), torch.zeros(0), line([1]), 0.5)
    assert offsets.tolist() == [0]
    assert t.shape == (0,)
    rays = one([0.0, 0.5, 0.5], [1.0, 0.0, 0.0], 0.0, 3.0)
    assert march(*rays, line([0, 0, 0]), 0.5)[0].tolist() == [0, 0]
    assert march(*one([0.0, 0.5, 0.5], [1.0, 0.0, 0.0], 2.0, 2.0), line([1, 1, 1]), 0.5)[0].tolist() == [0, 0]
    assert march(*one([0.0, 0.5, 0.5], [1.0, 0.0, 0.0], 2.0, 1.0), line([1, 1, 1]), 0.5)[0].tolist() == [0, 0]


def test_non_contiguous_input() -> None:
    o, d, t0, t1, grid = scene(3, 50)
    plain = march(o, d, t0, t1, grid, 0.05)
    strided = march(
        o.t().contiguous().t(),
        d.t().contiguous().t(),
        t0.repeat_interleave(2)[::2],
        t1.repeat_interleave(2)[::2],
        Grid(grid.origin, grid.cell, grid.grid.permute(2, 1, 0).contiguous().permute(2, 1, 0)),
        0.05,
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, strided))


def test_unusable_arguments_are_refused() -> None:
    rays = one([0.0, 0.5, 0.5], [1.0, 0.0, 0.0], 0.0, 3.0)
    with pytest.raises(ValueError, match="step must be positive"):
        march(*rays, line([1]), 0.0)
    with pytest.raises(ValueError, match="must be finite"):
        march(*rays[:3], torch.tensor([torch.inf]), line([1]), 0.5)


def scene(seed: int, rays: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Grid]:
    """Random rays, some with zero components, some from inside, over a random grid that is no cube."""
    g = torch.Generator().manual_seed(seed)
    shape = torch.randint(1, 9, (3,), generator=g).tolist()
    filled = (torch.rand(shape, generator=g) < torch.rand(1, generator=g)).to(torch.uint8)
    grid = Grid(torch.randn(3, generator=g), float(torch.rand(1, generator=g)) * 0.4 + 0.1, filled)
    size = torch.tensor(shape) * grid.cell
    o = grid.origin + (torch.rand(rays, 3, generator=g) * 3 - 1) * size
    d = grid.origin + torch.rand(rays, 3, generator=g) * size - o
    d[::5, 0] = 0
    d[::7, 1:] = 0
    d[:, 2] += (d.norm(dim=-1) == 0) * 1.0
    d /= d.norm(dim=-1, keepdim=True)
    t0 = torch.rand(rays, generator=g) * 0.5
    return o, d, t0, t0 + torch.rand(rays, generator=g) * 8, grid


def lattice(o: Tensor, d: Tensor, t0: Tensor, t1: Tensor, grid: Grid, step: float, phase: Tensor) -> list[set[int]]:
    """Lattice indices kept for sure, a set a ray, then those in doubt (within 1e-5 of a face or of t1); in float64."""
    sure: list[set[int]] = []
    doubt: list[set[int]] = []
    low = grid.origin.double()
    shape = torch.tensor(grid.grid.shape)
    for r in range(len(o)):
        k = torch.arange(int((t1[r] - t0[r]) / step) + 2)
        t = t0[r].double() + (k + phase[r].double()) * step
        x = o[r].double() + t[:, None] * d[r].double()
        u = (x - low) / grid.cell
        edge = ((u - u.round()).abs() * grid.cell < 1e-5).any(-1) | ((t - t1[r].double()).abs() < 1e-5)
        i = u.floor().long()
        inside = ((i >= 0) & (i < shape)).all(-1) & (t < t1[r].double())
        i = torch.where(inside[:, None], i, 0)
        keep = inside & (grid.grid[i[:, 0], i[:, 1], i[:, 2]] > 0)
        sure.append(set(k[keep & ~edge].tolist()))
        doubt.append(set(k[edge].tolist()))
    return [*sure, *doubt]


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), step=st.sampled_from([0.003, 0.05, 0.4]))
def test_against_float64_brute_force(seed: int, step: float) -> None:
    if backend.get_backend() == "triton":
        step = max(step, 0.2)  # its interpreter takes a millisecond or two for each look
    o, d, t0, t1, grid = scene(seed, 24)
    phase = torch.rand(24, generator=torch.Generator().manual_seed(seed))
    offsets, t = march(o, d, t0, t1, grid, step, phase)
    expected = lattice(o, d, t0, t1, grid, step, phase)
    for r in range(24):
        mine = t[offsets[r] : offsets[r + 1]]
        assert (mine.diff() > 0).all()
        k = (mine.double() - t0[r].double()) / step - phase[r].double()
        assert ((k - k.round()).abs() * step < 1e-5).all()  # on the lattice
        found = set(k.round().long().tolist())
        assert expected[r] - found == set()
        assert found - expected[r] <= expected[24 + r]


def test_same_bits_every_time_and_for_any_threads(twin: str) -> None:
    if twin == "triton":
        pytest.skip("its interpreter has one thread")
    o, d, t0, t1, grid = scene(11, 300)
    first = march(o, d, t0, t1, grid, 0.01)
    assert first[1].numel() > 1000
    torch.set_num_threads(2)
    again = march(o, d, t0, t1, grid, 0.01)
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_twins_give_the_same_samples_on_a_ball() -> None:
    n = 48
    c = (torch.arange(n) + 0.5) / n * 2 - 1
    x, y, z = torch.meshgrid(c, c, c, indexing="ij")
    grid = Grid(torch.full((3,), -1.0), 2 / n, ((x * x + y * y + z * z) < 0.6).to(torch.uint8))
    g = torch.Generator().manual_seed(0)
    o = torch.randn(100, 3, generator=g)
    o = 3 * o / o.norm(dim=-1, keepdim=True)
    d = torch.rand(100, 3, generator=g) - 0.5 - o
    d /= d.norm(dim=-1, keepdim=True)
    t0, t1 = ray_box(o, d, Box.cube(1.0))
    offsets, t = march(o, d, t0, t1, grid, 0.011)
    true_offsets, true_t = march_torch(o, d, t0, t1, grid, 0.011, torch.full((100,), 0.5))
    assert abs(len(t) - len(true_t)) <= 2
    same = (offsets.diff() == true_offsets.diff()).nonzero().squeeze(1)
    assert len(same) >= 98
    for r in same.tolist():
        torch.testing.assert_close(
            t[offsets[r] : offsets[r + 1]], true_t[true_offsets[r] : true_offsets[r + 1]], atol=1e-6, rtol=0
        )


def test_ray_box_by_hand() -> None:
    box = Box((0.0, 0.0, 0.0), (1.0, 2.0, 3.0))
    o = torch.tensor(
        [[-1, 1, 1], [0.5, 1, 1], [0.5, 1, 1], [-1, 1, 1], [-1, 5, 1], [0.5, -2, 1], [0.0, 1, 1], [0.5, 0, 5]]
    )
    d = torch.tensor(
        [[1.0, 0, 0], [1, 0, 0], [0, 0, -2], [-1, 0, 0], [1, 0, 0], [0, 0.5, 0], [0, 1.0, 0], [0.0, 0, -1]]
    )
    t0, t1 = ray_box(o, d, box)
    # ahead, from inside, from inside along an axis with |d| = 2, behind, beside, slow, in a face, along an edge plane
    assert t0.tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, 4.0, 0.0, 2.0]
    assert t1.tolist() == [2.0, 0.5, 0.5, 0.0, 0.0, 8.0, 1.0, 5.0]


def test_ray_box_of_a_zero_direction_and_of_no_rays_is_a_miss() -> None:
    t0, t1 = ray_box(torch.full((1, 3), 0.5), torch.zeros(1, 3), Box.cube(1.0))
    assert (t0.tolist(), t1.tolist()) == ([0.0], [0.0])
    assert ray_box(torch.zeros(0, 3), torch.zeros(0, 3), Box.cube(1.0))[0].shape == (0,)


@given(seed=st.integers(0, 10**6))
def test_ray_box_holds_exactly_the_points_inside(seed: int) -> None:
    o, d, _, _, _ = scene(seed, 40)
    o, d = o.double(), d.double()
    box = Box((-0.7, -0.2, -0.9), (0.4, 1.1, 0.8))
    t0, t1 = ray_box(o, d, box)
    assert ((t0 >= 0) & (t1 >= t0)).all()
    t = torch.linspace(0, 6, 60, dtype=torch.float64)
    x = o[:, None] + t[:, None] * d[:, None]
    inside = ((x > torch.tensor(box.min)) & (x < torch.tensor(box.max))).all(-1)
    claimed = (t > t0[:, None]) & (t < t1[:, None])
    near = ((t - t0[:, None]).abs() < 1e-6) | ((t - t1[:, None]).abs() < 1e-6)
    assert (inside == claimed)[~near].all()
