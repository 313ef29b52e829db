"""The architecture `plenoctree`: descent, growth, what a student allocates, plans, saves, refuses, and projects."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import backward

from pvdconvert.errors import InputError, RequestError
from pvdconvert.kernels.backend import set_backend
from pvdconvert.kernels.octree import gather_rows, leaf_rows, leaf_rows_torch, reach
from pvdconvert.nn.sh import sh_basis
from pvdconvert.plugin import Budget, Limits
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.scene import Box, Scene
from pvdconvert.solve.lazy_adam import LazyAdam
from pvdconvert.solve.leaves import fit_leaves, mean_leaves
from pvdconvert.testing import AnalyticScene
from pvdconvert_plugins.plenoctree import Plenoctree
from pvdconvert_plugins.plenoctree_field import grow, lattice
from pvdconvert_plugins.plenoctree_spec import PlenoctreeOptions, checked

P = Plenoctree()
SCENE = Scene(Box.cube(1.0))
TEACHER = AnalyticScene()


def leaves_of(n: int, count: int, seed: int = 0) -> Tensor:
    key = torch.randperm(n**3, generator=torch.Generator().manual_seed(seed))[:count].sort().values
    return torch.stack([key // n**2, key // n % n, key % n], -1)


@pytest.mark.parametrize(("n", "side"), [(8, 2), (27, 3), (2, 2), (16, 4)])
def test_a_tree_splits_down_to_its_leaves_and_no_further(n: int, side: int) -> None:
    """Each finest leaf is found at its own centre; the number of nodes is that of the cells that hold one."""
    leaves = leaves_of(n, 5)
    child, rows = grow(leaves, n, side)
    seen, depth = reach(child)
    assert bool(seen.all())
    assert side**depth == n
    assert torch.equal(leaf_rows((leaves + 0.5) / n, child), rows)
    expected, wide = 0, n // side
    while wide:
        expected += len(torch.unique(leaves * wide // n, dim=0))
        wide //= side
    assert len(child) == expected


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_descent_by_hand(backend: Any) -> None:
    """Node 1 splits cell (1, 0, 1) of the root: its cells are eighths. Faces belong to the last cell, beyond is -1."""
    set_backend(backend)
    child = torch.zeros(2, 2, 2, 2, dtype=torch.int32)
    child[0, 1, 0, 1] = 1
    u = torch.tensor(
        [[0.1, 0.1, 0.1], [0.9, 0.9, 0.2], [0.5, 0.0, 0.5], [0.8, 0.1, 0.6], [1.0, 0.4, 1.0], [1.0, 1.0, 1.0],
         [-0.01, 0.5, 0.5], [0.5, 1.01, 0.5], [math.nan, 0.5, 0.5]]
    )  # fmt: skip
    assert leaf_rows(u, child).tolist() == [0, 6, 8, 12, 15, 7, -1, -1, -1]


def test_both_twins_find_the_same_leaves() -> None:
    child, _ = grow(leaves_of(32, 400), 32, 2)
    u = torch.rand(50_000, 3) * 1.1 - 0.05
    u[:5000] = (u[:5000] * 32).round() / 32
    assert torch.equal(leaf_rows(u, child), leaf_rows_torch(u, child))


@pytest.mark.parametrize(
    ("links", "message"),
    [({0: 5}, "leads out"), ({0: 1, 1: 1}, "hangs on two"), ({0: 1, 8: -1}, "hangs on two"), ({3: -7}, "leads out")],
)
def test_unsound_trees_are_refused(links: dict[int, int], message: str) -> None:
    child = torch.zeros(2, 8, dtype=torch.int32)
    for place, link in links.items():
        child.view(-1)[place] = link
    with pytest.raises(ValueError, match=message):
        reach(child.view(2, 2, 2, 2))


def test_gathering_has_a_sparse_gradient() -> None:
    values = torch.nn.Parameter(torch.arange(12.0).view(6, 2))
    rows = torch.tensor([3, -1, 3, 0])
    out = gather_rows(values, rows)
    assert out.tolist() == [[6.0, 7.0], [0.0, 0.0], [6.0, 7.0], [0.0, 1.0]]
    backward(out.sum())
    dense = values.grad
    assert dense is not None
    assert dense[:, 0].tolist() == [1.0, 0.0, 0.0, 2.0, 0.0, 0.0]
    LazyAdam([{"params": [values], "lr": 0.1, "sparse_rows": True}])
    backward(gather_rows(values, rows).sum())
    assert values.grad is not None
    assert torch.equal(values.grad, dense)
    assert values.touched.tolist() == [1, 0, 0, 1, 0, 0]  # type: ignore[attr-defined]


def student(seed: int = 0, **config: Any) -> Any:
    f = P.build({**P.plan(TEACHER.facts(), Budget("fast", max_mb=4.0), Limits(), {}), **config}, TEACHER.scene, seed)
    f.restrict(TEACHER.occupancy())
    return f


def test_a_student_fills_the_occupied_cells_and_nothing_else() -> None:
    f, occupancy = student(), TEACHER.occupancy()
    x = torch.rand(30_000, 3) * 2 - 1
    sigma, inside = f.density(f.encode(x)).detach(), occupancy.contains(x)
    assert bool((sigma[inside] > 0).all())
    assert sigma[inside].unique().numel() == 1
    grown = torch.nn.functional.max_pool3d(occupancy.grid[None].float(), 3, stride=1, padding=1)[0]
    near = dataclasses.replace(occupancy, grid=grown.to(torch.uint8)).contains(x)
    assert not bool(sigma[~near].any())
    support = f.support()
    assert support is not None
    assert bool(support.contains(x[sigma > 0]).all())
    centers, rows = f.centers()
    assert torch.equal(f.rows(centers), rows)
    assert len(rows) == int(f.open.sum())


def test_leaves_never_leave_the_scene() -> None:
    """A scene of odd sides, occupied to its faces: what sticks out is not allocated, less than a leaf is lost."""
    scene = Scene(Box((-1.0, -0.5, -0.3), (1.0, 0.61, 0.37)))
    grid = torch.ones(40, 23, 14, dtype=torch.uint8)
    occupancy = Occupancy(torch.tensor(scene.box.min), 0.05, grid)
    f = P.build({"resolution": 20}, scene, 0)
    f.restrict(occupancy)
    x = torch.rand(20_000, 3) * 2.4 - 1.2
    inside = torch.stack([(x[:, k] > scene.box.min[k]) & (x[:, k] < scene.box.max[k]) for k in range(3)]).all(0)
    sigma = f.density(x)
    assert not bool(sigma[~inside].any())
    deep = torch.stack([(x[:, k] < scene.box.max[k] - 0.1) for k in range(3)]).all(0) & inside
    assert bool((sigma[deep] > 0).all())


def test_the_plan_counts_and_keeps_the_size() -> None:
    for megabytes in (1.0, 4.0, 15.0):
        config = P.plan(TEACHER.facts(), Budget("best", max_mb=megabytes), Limits(), {})
        f = P.build(config, TEACHER.scene, 0)
        f.restrict(TEACHER.occupancy())
        written = sum(t.numel() * t.element_size() for t in P.save(f)[1].values()) / 1e6
        assert 0.8 * megabytes < written <= megabytes
    few = P.plan(TEACHER.facts(), Budget("best", 1.0), Limits(), {})["resolution"]
    assert few < P.plan(TEACHER.facts(), Budget("best", 20.0), Limits(), {})["resolution"] <= 512
    assert P.plan(TEACHER.facts(), Budget("best", 1.0), Limits(), {"resolution": 300})["resolution"] == 300
    blind = dataclasses.replace(TEACHER.facts(), occupancy=None)
    assert P.plan(blind, Budget("best", max_mb=4.0), Limits(), {})["resolution"] > 16


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({"resolution": 1}, "2..8192"),
        ({"resolutoin": 3}, "did you mean 'resolution'"),
        ({"data_format": "SH8"}, "SH25"),
        ({"data_format": "SG9"}, "only read"),
        ({"branching": 1}, "2..16"),
        ({"store_dtype": "int8"}, "float16"),
        ({"offset": [0, 0, 0]}, "go together"),
        ({"offset": "x"}, "malformed"),
        ({"store_dtype": "float32"}, "output layout needs"),
        ({"resolution": 4000}, "does not fit"),
    ],
)
def test_bad_requests_are_refused_by_name(sets: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as error:
        P.plan(TEACHER.facts(), Budget(max_mb=20.0), Limits({"store_dtype": "float16"}), sets)
    assert "\n" not in str(error.value)


def _saved() -> tuple[dict[str, Any], dict[str, Tensor]]:
    return P.save(P.build({"resolution": 4, "data_format": "SH1"}, SCENE, 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": None}, "'data' is missing"),
        ({"more": torch.zeros(1)}, "unexpected tensor 'more'"),
        ({"child": torch.zeros(9, 2, 2, 3, dtype=torch.int32)}, "'child' has shape"),
        ({"child": torch.zeros(9, 2, 2, 2)}, "must be integers"),
        ({"data": torch.zeros(9, 2, 2, 2, 5)}, "'data' has shape"),
        ({"child": torch.full((9, 2, 2, 2), 100, dtype=torch.int32)}, "'child': a link leads out"),
    ],
)
def test_bad_tensors_are_refused_by_name(change: dict[str, Tensor | None], message: str) -> None:
    config, tensors = _saved()
    with pytest.raises(InputError, match=message):
        P.load(config, {k: v for k, v in {**tensors, **change}.items() if v is not None}, SCENE)
    with pytest.raises(InputError, match="'extra_data' is missing"):
        P.load({**config, "data_format": "SG1"}, tensors, SCENE)


def test_numbers_beyond_half_precision_are_cut_not_infinite() -> None:
    f = student()
    with torch.no_grad():
        f.sigma[f.open] = 1e6
    assert float(P.save(f)[1]["data"].max()) == 65504.0


def test_means_are_borrowed_from_the_nearest_ancestor() -> None:
    """Leaves with samples keep their means; a sibling gets its parent's, another branch that of the root."""
    leaves = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 0], [7, 7, 7]])
    child, rows = grow(leaves, 8, 2)
    total, weight = torch.zeros(child.numel(), 1), torch.zeros(child.numel())
    total[rows[0]], weight[rows[0]] = 6.0, 2.0
    total[rows[1]], weight[rows[1]] = 5.0, 1.0
    wanted = torch.zeros(child.numel(), dtype=torch.bool)
    wanted[rows] = True
    mean = mean_leaves(total, weight, child, wanted)
    assert mean[rows, 0].tolist() == pytest.approx([3.0, 5.0, 11 / 3, 11 / 3])
    assert int((mean != 0).sum()) == 4


def test_colours_of_a_leaf_are_recovered() -> None:
    """Samples of known harmonics from many sides: the same harmonics come back; an unseen leaf takes the mean."""
    g = torch.Generator().manual_seed(0)
    leaves = leaves_of(4, 6)
    child, rows = grow(leaves, 4, 2)
    truth = 0.6 * torch.randn(5, 3, 4, generator=g)
    pick = torch.randint(5, (4000,), generator=g)
    basis = sh_basis(torch.nn.functional.normalize(torch.randn(4000, 3, generator=g), dim=-1), 2)
    rgb = torch.sigmoid(torch.einsum("nb,ncb->nc", basis, truth[pick]))
    wanted = torch.zeros(child.numel(), dtype=torch.bool)
    wanted[rows] = True
    found = fit_leaves(rows[pick], basis, rgb, torch.ones(4000), child, wanted)
    torch.testing.assert_close(found[rows[:5]].view(5, 3, 4), truth, atol=0.02, rtol=0)
    assert bool((found[rows[5], [0, 4, 8]] != 0).all())
    assert not bool(found[~wanted].any())


def test_lattice_is_a_power_of_the_branching() -> None:
    assert [lattice(PlenoctreeOptions(resolution=r)) for r in (2, 3, 64, 65)] == [2, 4, 64, 128]
    assert lattice(checked({"branching": 3, "resolution": 10}, RequestError)) == 27
