"""The architecture `plenoxels`: what it answers, allocates, plans, saves, refuses, and projects."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import backward

from pvdconvert.distill.store import Store
from pvdconvert.errors import InputError, RequestError
from pvdconvert.field import FunctionField
from pvdconvert.nn.mask import Mask
from pvdconvert.nn.sh import sh_basis
from pvdconvert.nn.voxels import SparseVoxels, count_touched
from pvdconvert.plugin import Budget, Limits, TeacherFacts, option_help
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.scene import Box, Scene
from pvdconvert_plugins.plenoxels import Plenoxels, PlenoxelsField, estimate_mb
from pvdconvert_plugins.plenoxels_spec import SPEC, PlenoxelsOptions

P = Plenoxels()
SCENE = Scene(Box.cube(1.0))
RADIUS = 0.6


def directions(n: int, k: int = 1, seed: int = 9) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, k, 3, generator=g), dim=-1)


def anywhere(n: int, reach: float = 1.1, seed: int = 8) -> Tensor:
    return (torch.rand(n, 3, generator=torch.Generator().manual_seed(seed)) * 2 - 1) * reach


def shell(cells: int, thickness: float = 1.5) -> Occupancy:
    """Cells near a sphere of radius RADIUS."""
    c = 2 / cells
    axis = (torch.arange(cells) + 0.5) * c - 1
    r = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).norm(dim=-1)
    return Occupancy(torch.full((3,), -1.0), c, ((r - RADIUS).abs() < thickness * c).to(torch.uint8))


def facts(occupancy: Occupancy) -> TeacherFacts:
    return TeacherFacts(SCENE, occupancy.box, occupancy.count, occupancy.count, occupancy.cell, occupancy=occupancy)


def test_answers_follow_the_definition() -> None:
    """At a vertex the field is the activated value; halfway along an edge, the activated mean: of *log*-density."""
    f = P.build({"resolution": 5}, SCENE, 0)
    v = f.voxels
    torch.nn.init.normal_(v.density, generator=torch.Generator().manual_seed(1))
    a, b = 31, 32
    x = torch.stack([v.positions()[a], (v.positions()[a] + v.positions()[b]) / 2])
    h = torch.stack([v.density[a, 0], (v.density[a, 0] + v.density[b, 0]) / 2])
    torch.testing.assert_close(f.density(f.encode(x)), h.exp())
    d = directions(2, 3)
    sh = torch.stack([v.sh[a], (v.sh[a] + v.sh[b]) / 2]).view(2, 3, 9)
    expected = torch.sigmoid(torch.einsum("nkb,ncb->nkc", sh_basis(d, 3), sh))
    torch.testing.assert_close(f.color(f.encode(x), d), expected)


def test_svox2_semantics() -> None:
    """relu, shift, missing vertices as 0, border values out to the scene's box, exactly nothing beyond."""
    box = Box.cube(0.75)
    config = {
        "density_activation": "relu", "color_activation": "shift", "missing": "zero", "bands": 1,
        "shape": [4, 4, 4], "box": box.to_json(), "density_scale": 2.0,
    }  # fmt: skip
    tensors = {
        "vertices": torch.tensor([[0, 0, 0], [1, 1, 1]], dtype=torch.int16),
        "density_data": torch.tensor([[3.0], [-5.0]]),
        "sh_data": torch.tensor([[1.0, 0.0, -4.0], [0.0, 0.0, 0.0]]),
    }
    f = P.load(config, tensors, SCENE)
    x = torch.tensor([[-0.75] * 3, [-0.9] * 3, [-1.01] * 3, [-0.625, -0.75, -0.75], [-0.25] * 3, [0.5] * 3])
    torch.testing.assert_close(f.density(f.encode(x)), torch.tensor([6.0, 6.0, 0.0, 4.5, 0.0, 0.0]))
    c = float(sh_basis(directions(1), 1)[0, 0, 0])
    torch.testing.assert_close(f.color(x[:1], directions(1))[0, 0], torch.tensor([c + 0.5, 0.5, 0.0]))


def test_density_cannot_overflow_and_stays_alive() -> None:
    f = P.build({"resolution": 3}, SCENE, 0)
    with torch.no_grad():
        f.voxels.density.fill_(200.0)
    sigma = f.density(torch.zeros(1, 3))
    assert float(sigma.detach()) == pytest.approx(math.exp(15))
    backward(sigma.sum())
    assert f.voxels.density.grad is not None
    assert float(f.voxels.density.grad.abs().sum()) > 0


def test_restricting_allocates_what_the_cells_touch() -> None:
    """Every point of an occupied cell lies in a complete cell; two cells away density is exactly 0."""
    occupancy = shell(20)
    f = P.build({"resolution": 27}, SCENE, 3)
    f.restrict(occupancy)
    x = anywhere(20_000)
    inside = occupancy.contains(x)
    assert bool(f.voxels.inside(x[inside]).all())
    sigma = f.density(f.encode(x))
    assert bool((sigma[inside] > 0).all())
    grown = torch.nn.functional.max_pool3d(occupancy.grid[None].float(), 3, stride=1, padding=1)[0]
    near = dataclasses.replace(occupancy, grid=grown.to(torch.uint8)).contains(x)
    assert not bool(sigma[~near].any())
    assert bool((sigma[~inside] == 0).float().mean() > 0.5)
    again = P.build({"resolution": 27}, SCENE, 3)
    again.restrict(occupancy)
    assert torch.equal(again.voxels.sh, f.voxels.sh)
    assert len(f.voxels.vertices) < 27**3


def test_aligned_cells_allocate_no_extra_ring() -> None:
    grid = torch.zeros(8, 8, 8, dtype=torch.uint8)
    grid[2, 3, 4] = 1
    f = P.build({"resolution": 17}, SCENE, 0)
    f.restrict(Occupancy(torch.full((3,), -1.0), 0.25, grid))
    assert len(f.voxels.vertices) == 27
    assert f.voxels.vertices[0].tolist() == [4, 6, 8]


def test_support_is_where_density_can_be() -> None:
    f = P.build({"resolution": 65}, SCENE, 0)
    f.restrict(shell(32))
    support = f.support()
    assert support is not None
    x = anywhere(20_000)
    assert torch.equal(support.contains(x), f.density(x) > 0)
    fine = P.build({"resolution": 300}, SCENE, 0)
    fine.restrict(shell(32, thickness=0.7))
    coarse = fine.support()
    assert coarse is not None
    assert max(coarse.shape) <= 128
    assert bool(coarse.contains(x[fine.density(x) > 0]).all())


def test_memory_goes_with_occupied_cells() -> None:
    """A thin shell in a 1024^3 lattice, and twice the shell: elements of everything the field holds."""

    def elements(cells: int) -> int:
        grid = torch.zeros(128, 128, 128, dtype=torch.uint8)
        grid.view(-1)[torch.randperm(128**3, generator=torch.Generator().manual_seed(0))[:cells]] = 1
        f = P.build({"resolution": 1024, "bands": 1}, SCENE, 0)
        f.restrict(Occupancy(torch.full((3,), -1.0), 2 / 128, grid))
        tensors = [*f.parameters(), *f.buffers()]
        return sum(t.numel() for t in tensors) - f.voxels.top.numel()

    one, two = elements(60), elements(120)
    assert one < 1024**3 // 500
    assert 1.9 < two / one < 2.1


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_round_trip_is_exact(dtype: str) -> None:
    f = P.build({"resolution": 24, "bands": 2, "store_dtype": dtype}, SCENE, 5)
    f.restrict(shell(16))
    config, tensors = P.save(f)
    assert tensors["sh_data"].dtype == getattr(torch, dtype)
    assert tensors["vertices"].dtype == torch.int16
    g = P.load(config, tensors, SCENE)
    config2, tensors2 = P.save(g)
    assert config2 == config
    assert all(torch.equal(tensors[k], tensors2[k]) and tensors[k].dtype == tensors2[k].dtype for k in tensors)
    x, d = anywhere(2000), directions(2000, 2)
    assert torch.equal(f.density(x), g.density(x))
    if dtype == "float32":
        assert torch.equal(f.color(x, d), g.color(x, d))
    else:
        torch.testing.assert_close(f.color(x, d), g.color(x, d), atol=1e-3, rtol=0)
    config["box"]["min"][0] = 0.5
    assert P.save(f)[0] != config


def _saved() -> tuple[dict[str, Any], dict[str, Tensor]]:
    f = P.build({"resolution": 4, "bands": 1}, SCENE, 0)
    return P.save(f)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sh_data": None}, "'sh_data' is missing"),
        ({"more": torch.zeros(1)}, "unexpected tensor 'more'"),
        ({"density_data": torch.zeros(3, 1)}, "'density_data' has shape"),
        ({"sh_data": torch.zeros(64, 27)}, "'sh_data' has shape"),
        ({"vertices": torch.zeros(64, 3)}, "must be integers"),
        ({"vertices": torch.zeros(64, 3, dtype=torch.int16)}, "not sorted"),
        ({"vertices": torch.arange(192, dtype=torch.int16).view(64, 3)}, "outside"),
    ],
)
def test_bad_tensors_are_refused_by_name(change: dict[str, Tensor | None], message: str) -> None:
    config, tensors = _saved()
    wrong = {k: v for k, v in {**tensors, **change}.items() if v is not None}
    with pytest.raises(InputError, match=message):
        P.load(config, wrong, SCENE)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"resolutoin": 3}, "did you mean 'resolution'"),
        ({"resolution": 1}, "resolution=1"),
        ({"resolution": "many"}, "malformed"),
        ({"bands": 9}, "bands=9"),
        ({"density_activation": "tanh"}, "exp or relu"),
        ({"color_activation": "none"}, "sigmoid or shift"),
        ({"density_scale": 0.0}, "positive"),
        ({"missing": "zero"}, "needs density_activation=relu"),
        ({"missing": "maybe"}, "cell or zero"),
        ({"store_dtype": "int8"}, "float16"),
        ({"shape": [1, 2, 3]}, "three counts"),
        ({"box": {"min": [0, 0, 0]}}, "malformed"),
    ],
)
def test_bad_options_are_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as error:
        P.build(config, SCENE, 0)
    assert "\n" not in str(error.value)


def test_plan_follows_the_preset_and_the_size() -> None:
    occupancy = shell(32)
    f = facts(occupancy)
    sizes = [P.plan(f, Budget(preset), Limits(), {})["shape"] for preset in ("fast", "balanced", "best")]
    assert sizes[0] < sizes[1] < sizes[2]
    config = P.plan(f, Budget(max_mb=2.0), Limits(), {})
    assert config["store_dtype"] == "float16"
    field = P.build(config, SCENE, 0)
    field.restrict(occupancy)
    written = sum(t.numel() * t.element_size() for t in P.save(field)[1].values()) / 1e6
    assert 0.4 < written < 2.0 * 1.1
    assert P.plan(f, Budget(max_mb=2.0), Limits(), {"bands": 1})["resolution"] > config["resolution"]


def test_plan_makes_cubic_cells_over_the_occupied_box() -> None:
    occupancy = shell(64)
    occupancy.grid[:, :, 40:] = 0
    config = P.plan(facts(occupancy), Budget("fast"), Limits(), {})
    box = Box.from_json(config["box"])
    steps = [s / (n - 1) for s, n in zip(box.size, config["shape"])]
    assert max(steps) == pytest.approx(min(steps))
    assert all(a <= b + 1e-9 for a, b in zip(box.min, occupancy.box.min))
    assert all(a >= b - 1e-9 for a, b in zip(box.max, occupancy.box.max))


def test_overrides_win_and_limits_hold() -> None:
    f = facts(shell(16))
    limits = Limits({"density_activation": "relu", "color_activation": "shift"})
    config = P.plan(f, Budget(), limits, {"resolution": 33, "box": SCENE.box.to_json()})
    assert config["shape"] == [33, 33, 33]
    assert config["density_activation"] == "relu"
    with pytest.raises(RequestError, match="output layout needs density_activation=relu"):
        P.plan(f, Budget(), limits, {"density_activation": "exp"})
    with pytest.raises(RequestError, match=r"the least that this request needs is .*--max-mb"):
        P.plan(f, Budget(max_mb=0.02), Limits(), {"resolution": 64})
    assert P.plan(f, Budget(), Limits(), {"shape": (9, 9, 5)})["shape"] == [9, 9, 5]


def written_mb(config: dict[str, Any], occupancy: Occupancy) -> float:
    field = P.build(config, SCENE, 0)
    field.restrict(occupancy)
    return sum(t.numel() * t.element_size() for t in P.save(field)[1].values()) / 1e6


def test_the_size_is_counted_where_the_cells_are_known() -> None:
    """Lattices finer and coarser than the cells; without the cells an estimate that is rather too high."""
    occupancy = shell(32)
    for resolution in (12, 24, 60, 130):
        config = P.plan(facts(occupancy), Budget(), Limits(), {"resolution": resolution, "bands": 1})
        size = written_mb(config, occupancy)
        assert estimate_mb(config, facts(occupancy)) == pytest.approx(size + 0.01)
        blind = dataclasses.replace(facts(occupancy), occupancy=None)
        assert 0.8 < estimate_mb(config, blind) / size < 3


@pytest.mark.parametrize("megabytes", [1.0, 3.0, 10.0])
def test_a_size_that_is_asked_for_is_used(megabytes: float) -> None:
    occupancy = shell(32)
    config = P.plan(facts(occupancy), Budget("best", max_mb=megabytes), Limits(), {})
    assert 0.85 * megabytes < written_mb(config, occupancy) <= megabytes


def test_counting_touches_what_restricting_allocates() -> None:
    """Any lattice, any cells, shifted and partly outside."""
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        shape = tuple(int(v) for v in torch.randint(2, 40, (3,), generator=g))
        box = Box((-0.7, -1.0, -0.9), (1.0, 0.8, 1.1))
        grid = (torch.rand(7, 9, 8, generator=g) < 0.2).to(torch.uint8)
        origin, cell = torch.rand(3, generator=g) - 1.5, 0.05 + 0.4 * float(torch.rand(1, generator=g))
        voxels = SparseVoxels(box, (shape[0], shape[1], shape[2]), 1)
        low = origin + grid.nonzero() * cell
        expected = len(voxels.touching(low, low + cell))
        assert abs(count_touched(box, voxels.shape, origin, cell, grid) - expected) <= 1e-3 * expected


def test_a_short_budget_makes_a_smaller_student() -> None:
    occupancy = shell(64)
    sizes = [P.plan(facts(occupancy), Budget("best", s), Limits(), {})["resolution"] for s in (5.0, 20.0, 1e6)]
    assert sizes[0] < sizes[1] < sizes[2] == 384
    assert P.plan(facts(occupancy), Budget("best", 5.0), Limits(), {"resolution": 300})["resolution"] == 300


def test_every_option_is_explained() -> None:
    assert SPEC.name == "plenoxels"
    rows = list(option_help(PlenoxelsOptions))
    assert all(text for _, _, text in rows)
    assert len(rows) == len(dataclasses.fields(PlenoxelsOptions))


def test_the_spec_imports_no_torch() -> None:
    code = "import sys, pvdconvert_plugins.plenoxels_spec; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def sphere_density(x: Tensor) -> Tensor:
    """A soft-edged ball, optically thick."""
    return 60.0 * torch.sigmoid((RADIUS - x.norm(dim=-1)) * 60.0)


def sphere_color(x: Tensor, d: Tensor) -> Tensor:
    """Texture in the first two channels, shine that turns with the view in the third."""
    n = torch.nn.functional.normalize(x, dim=-1)
    shine = (-(n * d).sum(-1)).clamp(0, 1)
    return torch.stack([0.5 + 0.4 * torch.sin(6 * x[:, 0]), 0.5 + 0.4 * torch.cos(5 * x[:, 1]), 0.2 + 0.6 * shine], -1)


def sphere_store(count: int, flops: float, seed: int = 11) -> Store:
    """Samples straight through the shell, one a ray, seen from outside."""
    teacher = FunctionField(sphere_density, sphere_color)
    teacher.flops_per_point = flops
    g = torch.Generator().manual_seed(seed)
    n = torch.nn.functional.normalize(torch.randn(count, 3, generator=g), dim=-1)
    x = n * (RADIUS + 0.1 * (torch.rand(count, 1, generator=g) - 0.6))
    d = torch.nn.functional.normalize(-n + 0.8 * torch.randn(count, 3, generator=g), dim=-1)
    sigma = sphere_density(x)
    weight = torch.exp(-(((x.norm(dim=-1) - RADIUS) / 0.04) ** 2))
    free = x[torch.randperm(count, generator=g)[: count // 4]] * 1.01
    rays = torch.arange(count + 1)
    rgb = sphere_color(x, d)
    return Store(
        scene=SCENE, occupancy=shell(32), step=0.01, x=x, t=torch.ones(count), dt=torch.full((count,), 0.01),
        sigma=sigma, weight=weight, rgb=rgb, colored=weight > 0.01, d=d, offsets=rays, ray_rgb=rgb,
        ray_opacity=weight, ray_depth=weight, free_x=free, free_sigma=sphere_density(free), teacher=teacher,
    )  # fmt: skip


def project(store: Store, **config: Any) -> tuple[PlenoxelsField, str]:
    f = P.build({"resolution": 32, **config}, SCENE, 0)
    f.restrict(store.occupancy)
    line = P.project(f, store, 20.0)
    assert line is not None
    return f, line


@torch.no_grad()
def check(f: PlenoxelsField, density_error: float, color_error: float) -> None:
    fresh = sphere_store(4000, 1.0, seed=12)
    x, d = fresh.x, fresh.d
    alpha = 1 - torch.exp(-0.05 * f.density(f.encode(x)))
    truth = 1 - torch.exp(-0.05 * sphere_density(x))
    assert float((alpha - truth).square().mean().sqrt()) < density_error
    seen = fresh.weight > 0.3
    miss = f.color(f.encode(x[seen]), d[seen][:, None])[:, 0] - sphere_color(x[seen], d[seen])
    assert float(miss.square().mean().sqrt()) < color_error


def test_projection_of_an_analytic_sphere() -> None:
    """Asked at the vertices: close in density and colour without a gradient step, and the same again bit for bit."""
    store = sphere_store(20_000, flops=100.0)
    f, line = project(store)
    assert "asked at" in line
    check(f, 0.06, 0.05)
    again, line2 = project(store)
    assert line2 == line
    assert torch.equal(f.voxels.density, again.voxels.density)
    assert torch.equal(f.voxels.sh, again.voxels.sh)


def test_projection_with_a_teacher_too_slow_to_ask() -> None:
    f, line = project(sphere_store(20_000, flops=1e9))
    assert "fitted to" in line
    check(f, 0.10, 0.05)


def test_projection_with_svox2_activations() -> None:
    f, _ = project(
        sphere_store(20_000, flops=100.0), density_activation="relu", color_activation="shift", density_scale=2.0
    )
    check(f, 0.10, 0.05)


def test_projection_of_an_empty_field_says_so() -> None:
    store = sphere_store(100, flops=1.0)
    f = P.build({"resolution": 300}, SCENE, 0)
    assert P.project(f, store, 1.0) is None
    assert not bool(f.density(anywhere(10)).any())


def test_groups_are_sparse() -> None:
    groups = P.param_groups(P.build({"resolution": 4}, SCENE, 0))
    assert [g["name"] for g in groups] == ["density", "sh"]
    assert all(g["sparse_rows"] for g in groups)
    assert np.isfinite([g["lr"] for g in groups]).all()


@torch.no_grad()
def test_a_mask_and_a_clip_are_part_of_the_field() -> None:
    """Density exp(clip(h)) where the mask is set and every vertex exists; both travel with the field."""
    f = P.build({"resolution": 5, "density_clip": [-1.0, 0.5]}, SCENE, 0)
    torch.nn.init.normal_(f.voxels.density, generator=torch.Generator().manual_seed(2))
    grid = torch.zeros(4, 4, 4, dtype=torch.uint8)
    grid[1:, 2, :3] = 1
    f.mask = Mask(grid, (-1.0, -1.0, -1.0), 0.5)
    x, d = anywhere(500), directions(500)
    raw = f.voxels.raw_density(x)
    i = ((x + 1) / 0.5).floor().long()
    shown = ((i >= 0) & (i < 4)).all(1) & (grid[i.clamp(0, 3)[:, 0], i.clamp(0, 3)[:, 1], i.clamp(0, 3)[:, 2]] > 0)
    sigma = f.density(x)
    torch.testing.assert_close(sigma, torch.where(shown, raw.clamp(-1.0, 0.5).exp(), 0.0))
    assert float(sigma.max()) == pytest.approx(math.exp(0.5))
    support = f.support()
    assert support is not None
    assert bool(support.contains(x)[shown].all())
    config, tensors = P.save(f)
    again = P.load(json.loads(json.dumps(config)), tensors, SCENE)
    for ours, theirs in zip(again(x, d[:, 0]), f(x, d[:, 0])):
        assert torch.equal(ours, theirs)
    del tensors["mask.bits"]
    with pytest.raises(InputError, match=r"mask\.bits"):
        P.load(config, tensors, SCENE)
    with pytest.raises(RequestError, match="density_clip"):
        P.build({"density_clip": [2, 1]}, SCENE, 0)
