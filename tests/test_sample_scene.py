"""The procedural sample scene: a proper field, awkward in the ways that the sample promises to be."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pvdconvert.cameras import Camera, sphere_cameras
from pvdconvert.scene import Box

SCENE = Path(__file__).resolve().parents[1] / "examples" / "scene.py"
OBJECT = Box((-0.69, -0.69, -0.81), (0.69, 0.69, 0.72))


@pytest.fixture(scope="module")
def scene() -> Any:
    spec = importlib.util.spec_from_file_location("sample_scene", SCENE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def points(count: int, half: float = 1.0) -> Tensor:
    return (torch.rand(count, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1) * half


def near_surfaces(scene: Any, count: int = 200_000) -> Tensor:
    """Points inside of the shell in which density falls."""
    x = points(count)
    return x[scene.distances(x).amin(-1).abs() < scene.SOFT]


def hits(scene: Any, camera: Camera) -> tuple[Tensor, Tensor]:
    """Where the rays of ``camera`` meet the surface, and along what: sphere tracing, independent of our renderer."""
    o, d = (torch.from_numpy(a) for a in camera.rays())
    t = torch.zeros(len(o))
    far = float(2 * torch.linalg.vector_norm(o, dim=-1).max())
    for _ in range(400):
        gap = scene.distances(o + d * t[:, None]).amin(-1)
        t = torch.where((gap.abs() < 1e-4) | (t > far), t, t + 0.9 * gap)
    x = o + d * t[:, None]
    hit = scene.distances(x).amin(-1) < 1e-3
    return x[hit], d[hit]


@pytest.fixture(scope="module")
def seen(scene: Any) -> tuple[Tensor, Tensor]:
    pairs = [hits(scene, c) for c in sphere_cameras(OBJECT, 6, 64, seed=5)]
    return torch.cat([x for x, _ in pairs]), torch.cat([d for _, d in pairs])


def test_density_is_finite_bounded_and_both_empty_and_solid(scene: Any) -> None:
    sigma = scene.density(points(50_000))
    assert sigma.dtype == torch.float32
    assert sigma.shape == (50_000,)
    assert torch.isfinite(sigma).all()
    assert sigma.min() == 0
    assert sigma.max() == scene.SIGMA
    assert 0.01 < float((sigma > 0).float().mean()) < 0.2


def test_density_is_exactly_zero_away_from_the_object(scene: Any) -> None:
    x = points(50_000, half=3.0)
    low, high = torch.tensor(OBJECT.min), torch.tensor(OBJECT.max)
    outside = ((x < low - 0.01) | (x > high + 0.01)).any(-1)
    assert (scene.density(x[outside]) == 0).all()
    box = torch.tensor(scene.BOX)
    assert (low > box[0]).all()
    assert (high < box[1]).all()


def test_density_falls_smoothly_through_the_shell(scene: Any) -> None:
    """Along a ray into the globe: SIGMA, half of it on the surface, then 0, never rising again."""
    r = torch.linspace(0.2, 0.3, 1001)
    direction = torch.nn.functional.normalize(torch.tensor([1.0, 0.4, 0.3]), dim=0)
    sigma = scene.density(r[:, None] * direction)
    assert (sigma.diff() <= 1e-4).all()
    assert sigma.diff().abs().max() < 0.02 * scene.SIGMA
    assert float(sigma[500]) == pytest.approx(scene.SIGMA / 2, rel=0.02)


def test_colours_are_in_range_everywhere(scene: Any) -> None:
    x = points(20_000)
    rgb = scene.color(x, torch.nn.functional.normalize(points(20_000), dim=-1))
    assert rgb.shape == (20_000, 3)
    assert torch.isfinite(rgb).all()
    assert rgb.min() >= 0
    assert rgb.max() <= 1


def test_empty_input_is_answered(scene: Any) -> None:
    x = torch.zeros(0, 3)
    assert scene.density(x).shape == (0,)
    assert scene.color(x, x).shape == (0, 3)


def test_every_part_is_seen_and_thin_parts_are_many(scene: Any, seen: tuple[Tensor, Tensor]) -> None:
    which = scene.part(seen[0])
    share = torch.bincount(which, minlength=len(scene.PARTS)) / len(which)
    assert (share > 0.001).all(), dict(zip(scene.PARTS, share.tolist()))
    thin = torch.tensor([name in scene.THIN for name in scene.PARTS])
    assert float(share[thin].sum()) >= 0.05


def test_thin_parts_are_thin(scene: Any) -> None:
    """Nowhere inside of a thin part is the next surface further than two hundredths."""
    x = points(400_000)
    distances = scene.distances(x)
    for index, name in enumerate(scene.PARTS):
        if name in scene.THIN:
            deepest = -float(distances[:, index].min())
            assert 0.005 < deepest <= 0.033 if name == "axis" else 0.005 < deepest <= 0.02, name


def test_the_object_fills_a_fair_share_of_the_views(seen: tuple[Tensor, Tensor]) -> None:
    assert len(seen[0]) > 0.1 * 6 * 64 * 64


def test_colour_depends_on_the_direction_where_it_shines_and_not_where_it_is_matt(scene: Any) -> None:
    x = near_surfaces(scene)
    which = scene.part(x)
    d = torch.nn.functional.normalize(points(64), dim=-1)
    change = {}
    for name in ("globe", "planets", "zodiac"):
        of_part = x[which == scene.PARTS.index(name)][:500]
        rgb = torch.stack([scene.color(of_part, d[k].expand_as(of_part)) for k in range(64)])
        change[name] = float((rgb.amax(0) - rgb.amin(0)).mean())
    assert change["globe"] > 0.2
    assert change["planets"] > 0.1
    assert change["zodiac"] == 0


def test_colour_does_not_depend_on_the_depth_below_the_surface(scene: Any) -> None:
    n = torch.nn.functional.normalize(points(500), dim=-1)
    n = n[(scene.part(n * 0.25) == scene.PARTS.index("globe"))]
    d = torch.nn.functional.normalize(points(500), dim=-1)[: len(n)]
    torch.testing.assert_close(scene.color(n * 0.25, d), scene.color(n * 0.24, d), atol=1e-4, rtol=0)


def test_the_texture_is_finer_than_a_64_cell_grid(scene: Any) -> None:
    """Over half a cell of a 64^3 grid on the object, visible colours change by more than blur could keep."""
    cell = OBJECT.longest / 64
    x = near_surfaces(scene)[:5000]
    away = torch.tensor([0.0, 0.0, 1.0]).expand_as(x)
    step = 0.5 * cell * torch.nn.functional.normalize(points(len(x)), dim=-1)
    y = x + step
    same = scene.part(x) == scene.part(y)
    change = (scene.color(x, away) - scene.color(y, away)).abs().amax(-1)[same]
    assert float((change > 0.2).float().mean()) > 0.08
