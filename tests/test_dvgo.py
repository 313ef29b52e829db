"""The architecture `dvgo`: what it answers, keeps in memory, plans, saves, refuses, and projects."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pvdconvert.distill.store import Store
from pvdconvert.errors import InputError, RequestError
from pvdconvert.field import FunctionField
from pvdconvert.plugin import Budget, Limits, TeacherFacts
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.scene import Box, Scene
from pvdconvert_plugins.dvgo import Dvgo, megabytes
from pvdconvert_plugins.dvgo_field import EMPTY, VertexMask

P = Dvgo()
SCENE = Scene(Box.cube(1.0))
RADIUS = 0.6
PEAK = 40.0


def anywhere(n: int, reach: float = 1.0, seed: int = 8) -> Tensor:
    return (torch.rand(n, 3, generator=torch.Generator().manual_seed(seed)) * 2 - 1) * reach


def directions(n: int, k: int = 1, seed: int = 9) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, k, 3, generator=g), dim=-1)


def shell(cells: int = 32, thickness: float = 2.0) -> Occupancy:
    """Cells near a sphere of radius RADIUS."""
    c = 2 / cells
    axis = (torch.arange(cells) + 0.5) * c - 1
    r = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).norm(dim=-1)
    return Occupancy(torch.full((3,), -1.0), c, ((r - RADIUS).abs() < thickness * c).to(torch.uint8))


def facts(occupancy: Occupancy) -> TeacherFacts:
    return TeacherFacts(SCENE, occupancy.box, occupancy.count, occupancy.count, occupancy.cell)


def test_the_density_is_the_programs_alpha_at_any_step() -> None:
    """1 - exp(-sigma * s) = 1 - (1 + exp(raw + shift))^(-s / base voxel), DirectVoxGO's eq. 5 in steps of s.

    One vertex value everywhere, raw = 0.7; shift = -2; base voxel 0.04: exp(-1.3) = 0.272532, so a step of 0.02 has
    alpha = 1 - 1.272532^(-0.5) = 0.113527 and a step of 0.04 has 1 - 1 / 1.272532 = 0.214165.
    """
    f = P.build({"resolution": 5, "act_shift": -2.0, "density_scale": 1 / 0.04}, SCENE, 0)
    f.voxels.density.data.fill_(0.7)
    sigma = f.density(anywhere(50)).double()
    np.testing.assert_allclose((1 - torch.exp(-sigma * 0.02)).detach(), 0.113527, atol=2e-6)
    np.testing.assert_allclose((1 - torch.exp(-sigma * 0.04)).detach(), 0.214165, atol=2e-6)


def test_activation_comes_after_interpolation() -> None:
    """Between vertices of raw 10 and -10 the middle has softplus(0) = ln 2, not the mean of the activated values."""
    f = P.build({"resolution": 3, "act_shift": 0.0, "density_scale": 2.0}, SCENE, 0)
    f.voxels.density.data.copy_(torch.where(f.voxels.vertices[:, :1] == 1, 10.0, -10.0))
    at = torch.tensor([[0.0, 0.3, 0.3], [0.5, 0.3, 0.3], [1.0, 0.3, 0.3]])
    expected = [2 * (10 + math.log1p(math.exp(-10))), 2 * math.log(2), 2 * math.log1p(math.exp(-10))]
    np.testing.assert_allclose(f.density(at).detach(), expected, rtol=1e-4)


def test_colour_without_a_network_is_the_sigmoid() -> None:
    f = P.build({"resolution": 4, "mlp_depth": 0, "channels": 3}, SCENE, 0)
    f.voxels.sh.data.copy_(torch.tensor([1.0, -2.0, 0.5]).expand(64, 3))
    rgb = f.color(anywhere(9), directions(9, 4))
    np.testing.assert_allclose(rgb.detach(), torch.tensor([1.0, -2.0, 0.5]).sigmoid().expand(9, 4, 3), rtol=1e-5)


def test_colour_of_many_directions_matches_one_by_one_without_gradients() -> None:
    f = P.build({"resolution": 8, "position_frequencies": 2}, SCENE, 0)
    x, d = anywhere(20000), directions(20000, 3)
    with torch.no_grad():
        together = f.color(x, d)
        single = f.color(x[:100], d[:100, 1:2])
    np.testing.assert_allclose(together[:100, 1], single[:, 0], atol=1e-6)
    assert float((together[:, 0] - together[:, 1]).abs().max()) > 1e-3


def test_memory_goes_with_occupied_cells_and_files_are_dense() -> None:
    occupancy = shell(64)
    f = P.build({"resolution": 97, "act_shift": -3.0}, SCENE, 0)
    f.restrict(occupancy)
    v = f.voxels
    assert len(v.vertices) < 0.35 * 97**3
    x = anywhere(20000)
    held = occupancy.contains(x)
    sigma = f.density(x)
    assert bool((sigma[held] > 0).all())  # every vertex of every such cell is there
    assert bool((sigma[~held] == 0).all())
    config, tensors = P.save(f)
    assert tensors["density"].shape == (1, 1, 97, 97, 97)
    assert tensors["k0"].shape == (1, 12, 97, 97, 97)
    assert int((tensors["density"] == EMPTY).sum()) == 97**3 - len(v.vertices)
    back = P.load(json.loads(json.dumps(config)), tensors, SCENE)
    assert torch.equal(back.density(x), sigma)


@pytest.mark.parametrize("mlp", [{}, {"mlp_depth": 0, "channels": 3}, {"direct": True, "position_frequencies": 5}])
def test_round_trip_is_exact(mlp: dict[str, Any]) -> None:
    f = P.build({"resolution": 9, **mlp}, SCENE, 4)
    f.cache = VertexMask(torch.rand(5, 6, 7) > 0.3, torch.tensor([2.0, 2.5, 3.0]), torch.tensor([2.0, 2.5, 3.0]))
    config, tensors = P.save(f)
    back = P.load(json.loads(json.dumps(config)), {k: t.clone() for k, t in tensors.items()}, SCENE)
    again, same = P.save(back)
    assert again == config
    assert all(torch.equal(t, same[k]) for k, t in tensors.items())
    x, d = anywhere(500), directions(500, 2)
    assert torch.equal(f.density(x), back.density(x))
    assert torch.equal(f.color(x, d), back.color(x, d))


def test_the_programs_mask_rounds_half_away_from_zero() -> None:
    """Three cells along x with centres at 0, 1, 2 (scale 1, shift 0): 0.5 belongs to 1, 1.5 to 2, 2.5 to none."""
    grid = torch.tensor([0, 1, 0], dtype=torch.uint8).view(3, 1, 1)
    mask = VertexMask(grid, torch.ones(3), torch.zeros(3))
    x = torch.tensor([-0.6, 0.0, 0.49, 0.5, 1.0, 1.49, 1.5, 2.5, 9.0])
    at = torch.stack([x, torch.zeros(9), torch.zeros(9)], dim=1)
    assert mask.inside(at).tolist() == [False, False, False, True, True, True, False, False, False]


def test_bad_tensors_and_options_are_refused_by_name() -> None:
    config, tensors = P.save(P.build({"resolution": 4}, SCENE, 0))
    for change, words in (
        ({"k0": tensors["k0"][:, :5]}, "'k0' has shape"),
        ({"density": tensors["density"][0]}, "'density' has shape"),
        ({"rgbnet.1.bias": torch.zeros(2)}, r"'rgbnet.1.bias' has shape"),
        ({"more": torch.zeros(2)}, "'more' is not part"),
    ):
        with pytest.raises(InputError, match=words):
            P.load(config, {**tensors, **change}, SCENE)
    mask = {"shape": [2, 2, 2], "scale": [1, 1, 1], "shift": [0, 0, 0]}
    bits = torch.zeros(1, dtype=torch.uint8)
    for wrong, words in (
        ({**mask, "shape": [2, 2]}, "impossible"),
        ({**mask, "shape": [9, 9, 9]}, "is not the size"),
        ({"shape": [2, 2, 2]}, "malformed"),
    ):
        with pytest.raises(InputError, match=words):
            P.load({**config, "mask_cache": wrong}, {**tensors, "mask_cache.bits": bits}, SCENE)
    for key, value in (
        ("resolution", 1), ("channels", 0), ("channels", 2), ("mlp_depth", 1), ("mlp_width", 0), ("shape", [1, 2, 3]),
        ("view_frequencies", -1), ("position_frequencies", 99), ("act_shift", math.inf), ("density_scale", 0),
        ("store_dtype", "int8"), ("box", {"min": [0]}), ("mlp_depth", 0), ("resoluton", 3),
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"dvgo.*({key}|malformed|channels)"):
            P.load({**config, key: value}, tensors, SCENE)


# ----------------------------------------------------------------------------------------------------------- plans


def test_plans_follow_preset_size_and_requests() -> None:
    told = facts(shell())
    plans = {name: P.plan(told, Budget(name), Limits(), {}) for name in ("fast", "balanced", "best")}
    assert [max(p["shape"]) for p in plans.values()] == [128, 176, 224]
    for p in plans.values():
        box = Box.from_json(p["box"])
        sides = [s / (n - 1) for s, n in zip(box.size, p["shape"])]
        assert max(sides) == pytest.approx(min(sides), rel=1e-6)  # cubic voxels
        assert all(a <= b + 1e-9 for a, b in zip(box.min, told.occupied_box.min))
        # A fresh voxel has the optical thickness of 1 % (the program's alpha_init of a fine stage).
        thin = p["density_scale"] * math.log1p(math.exp(p["act_shift"])) * sides[0]
        assert thin == pytest.approx(0.01, rel=1e-3)
    small = P.plan(told, Budget("best", max_mb=20.0), Limits(), {})
    f = P.build(small, SCENE, 0)
    f.restrict(shell())
    size = sum(t.numel() * t.element_size() for t in P.save(f)[1].values()) / 1e6
    assert 14 < size <= 20
    assert size == pytest.approx(megabytes(small, told), rel=0.02)
    coarse = P.plan(told, Budget("fast"), Limits(), {"mlp_depth": 0})
    assert (coarse["channels"], coarse["mlp_depth"]) == (3, 0)
    held = P.plan(told, Budget("fast"), Limits({"channels": 9}, {"mlp_width": 128}), {"resolution": 40})
    assert (held["channels"], held["mlp_width"], max(held["shape"])) == (9, 128, 40)
    assert P.plan(told, Budget("fast"), Limits(), {"shape": [9, 9, 9]})["shape"] == [9, 9, 9]


def test_impossible_plans_are_one_line() -> None:
    told = facts(shell())
    with pytest.raises(RequestError, match="the least that this request needs"):
        P.plan(told, Budget("fast", max_mb=0.01), Limits(), {})
    with pytest.raises(RequestError, match="channels=8 cannot be had"):
        P.plan(told, Budget("fast"), Limits({"channels": 9}), {"channels": 8})
    with pytest.raises(RequestError, match="did you mean 'resolution'"):
        P.plan(told, Budget("fast"), Limits(), {"resolutions": 40})


# ------------------------------------------------------------------------------------------------------ projection


def sphere_density(x: Tensor) -> Tensor:
    """A shell: log-density falls linearly on both sides of the sphere."""
    return PEAK * torch.exp(-((x.norm(dim=-1) - RADIUS).abs() / 0.06))


def sphere_color(x: Tensor, d: Tensor) -> Tensor:
    """Smooth in place, linear in the direction."""
    base = 0.5 + 0.25 * torch.sin(2 * x)
    return base + 0.15 * d[:, 2:3]


def sphere_store(count: int = 40000, flops: float = 100.0) -> Store:
    occupancy = shell()
    g = torch.Generator().manual_seed(11)
    centers = occupancy.centers()
    pick = torch.randint(len(centers), (count,), generator=g)
    x = centers[pick] + (torch.rand(count, 3, generator=g) - 0.5) * occupancy.cell
    d = directions(count, seed=12)[:, 0]
    teacher = FunctionField(sphere_density, sphere_color)
    teacher.flops_per_point = flops
    ones, none = torch.ones(count), torch.zeros(0)
    return Store(
        scene=SCENE, occupancy=occupancy, step=0.01, x=x, t=ones, dt=ones, sigma=sphere_density(x), weight=ones,
        rgb=sphere_color(x, d), colored=ones.bool(), d=d, offsets=torch.arange(count + 1),
        ray_rgb=torch.zeros(count, 3), ray_opacity=ones, ray_depth=ones, free_x=torch.zeros(0, 3), free_sigma=none,
        teacher=teacher,
    )  # fmt: skip


@pytest.mark.parametrize("flops", [100.0, 1e15])
@pytest.mark.parametrize("mlp", [{}, {"direct": True}, {"mlp_depth": 0, "channels": 3}])
def test_projection_needs_no_gradient_steps(flops: float, mlp: dict[str, Any]) -> None:
    store = sphere_store(flops=flops)
    plan = P.plan(facts(store.occupancy), Budget("fast"), Limits(), {"resolution": 24, **mlp})
    f = P.build(plan, SCENE, 0)
    f.restrict(store.occupancy)
    line = P.project(f, store, 20.0)
    assert line is not None
    assert ("asked at" in line) == (flops < 1e6)
    x = store.occupancy.centers()
    d = directions(len(x), seed=30)
    with torch.no_grad():
        density = f.density(x)
        off = (torch.log(density / sphere_density(x))).square().mean().sqrt()
        rgb = (f.color(x, d)[:, 0] - sphere_color(x, d[:, 0])).square().mean().sqrt()
    assert float(off) < 0.25
    # Without a network the part that turns with the direction (0.15 z, rms 0.087) cannot be held.
    assert float(rgb) < (0.10 if mlp.get("mlp_depth") == 0 else 0.04)


def test_projection_of_nothing_says_so() -> None:
    store = sphere_store(16)
    f = P.build({"resolution": 20}, Scene(Box((5.0, 5.0, 5.0), (6.0, 6.0, 6.0))), 0)
    line = P.project(f, store, 1.0)
    assert line is not None
    assert "not projected" in line
