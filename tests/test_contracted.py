"""Unbounded scenes: the map, rays that bend in it, and conversions through it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import pvdconvert
from pvdconvert.cameras import inside_cameras
from pvdconvert.errors import InputError, RequestError
from pvdconvert.field import FunctionField
from pvdconvert.loading import open_field
from pvdconvert.render import contracted
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.render.occupy import build_occupancy
from pvdconvert.render.trace import render_rays, trace
from pvdconvert.report import Report
from pvdconvert.scene import Box, RaySpace, Scene

L2, LINF = RaySpace("contracted"), RaySpace("contracted", norm="linf")
ALL = Box.cube(2.0)


def expand(x: Tensor) -> Tensor:
    """The inverse of the unit l2 contraction, by its own formula: |u| = 1 / (2 - |x|) beyond the unit ball."""
    m = x.norm(dim=-1, keepdim=True)
    return torch.where(m <= 1, x, x / m / (2 - m.clamp(max=1.999)))


def world(x: Tensor) -> tuple[Tensor, Tensor]:
    """Density and colour of an unbounded scene at *world* positions: a striped ball, and a far painted shell."""
    r = x.norm(dim=-1)
    ball, shell = 40.0 * (r < 0.5), 3.0 * ((r > 6.0) & (r < 9.0))
    u = x / r.clamp_min(1e-6)[:, None]
    stripes = 0.5 + 0.4 * torch.sin(6.0 * x / x.norm(dim=-1, keepdim=True).clamp_min(0.3))
    sky = 0.5 + 0.4 * torch.sin(3.0 * u + torch.tensor([0.0, 1.0, 2.0]))
    return ball + shell, torch.where((r < 1.0)[:, None], stripes, sky)


FIELD = FunctionField(lambda x: world(expand(x))[0], lambda x, d: world(expand(x))[1])
SCENE = Scene(ALL, background=(0.0, 0.0, 0.0), ray_space=L2)


def test_known_positions() -> None:
    x = torch.tensor([[0.3, -0.4, 0.0], [2.0, 0.0, 0.0], [0.0, -4.0, 0.0], [2.0, 1.0, 0.0]])
    one = contracted.contract(x[:3], L2)
    torch.testing.assert_close(one, torch.tensor([[0.3, -0.4, 0.0], [1.5, 0.0, 0.0], [0.0, -1.75, 0.0]]))
    cube = contracted.contract(x[3:], LINF)
    torch.testing.assert_close(cube, torch.tensor([[1.5, 0.75, 0.0]]))
    moved = contracted.contract(
        torch.tensor([[11.0, 2.0, 3.0]]), RaySpace("contracted", center=(1.0, 2.0, 3.0), radius=5.0)
    )
    torch.testing.assert_close(moved, torch.tensor([[1.5, 0.0, 0.0]]))


@given(st.floats(0.0, 60.0), st.sampled_from([L2, LINF]), st.floats(0.2, 5.0))
def test_stretch_is_what_a_step_outwards_becomes(distance: float, space: RaySpace, radius: float) -> None:
    space = RaySpace("contracted", norm=space.norm, radius=radius)
    x = torch.tensor([[distance * radius, 0.0, 0.0]], dtype=torch.float64)
    h = 1e-5 * (1 + distance) * radius
    slope = (contracted.contract(x + h, space) - contracted.contract(x, space))[0, 0] / h
    if abs(distance - 1.0) > 1e-3:
        found = contracted.stretch(contracted.contract(x, space), space)
        assert float(found * slope) == pytest.approx(1.0, rel=2e-3 * (1 + distance))


def full(cells: int) -> Occupancy:
    grid = torch.ones(cells, cells, cells, dtype=torch.uint8)
    return Occupancy(torch.tensor(ALL.min), 4.0 / cells, grid)


@pytest.mark.parametrize("space", [L2, LINF])
def test_samples_cover_the_whole_ray_evenly_in_contracted_space(space: RaySpace) -> None:
    o = torch.tensor([[0.0, 0.0, 0.0], [0.9, -0.2, 0.1]])
    d = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0, 0.0], [-0.5, 1.0, 0.3]]), dim=-1)
    step = 1 / 64
    offsets, t, dt = contracted.march(o, d, full(16), step, torch.full((2,), 0.5), space, 0.0, math.inf)
    for ray in range(2):
        mine = slice(int(offsets[ray]), int(offsets[ray + 1]))
        edges = torch.cat([t[mine] - 0.5 * dt[mine], (t[mine] + 0.5 * dt[mine])[-1:]])
        torch.testing.assert_close(edges[1:-1], (t[mine] + 0.5 * dt[mine])[:-1], rtol=1e-4, atol=1e-5)  # no gaps
        assert edges[0] == pytest.approx(0.0, abs=1e-6)
        assert edges[-1] > 1 / step  # beyond which less than a step of space is left
        bent = contracted.contract(o[ray] + edges[:, None] * d[ray], space)
        lengths = (bent[1:] - bent[:-1]).norm(dim=-1)
        assert lengths.max() < 1.6 * step
        assert lengths.median() == pytest.approx(step, rel=0.1)


def test_opacity_of_a_far_shell_is_that_of_the_world() -> None:
    """From the centre a ray crosses 3 world units of density 0.4: opacity 1 - exp(-1.2), from any direction."""
    shell = FunctionField(
        lambda x: 0.4 * ((expand(x).norm(dim=-1) > 6) & (expand(x).norm(dim=-1) < 9)), lambda x, d: torch.ones_like(x)
    )
    cells = build_occupancy(shell, ALL, space=L2)
    o = torch.zeros(50, 3)
    d = torch.nn.functional.normalize(torch.randn(50, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    rgb, opacity, depth = render_rays(
        shell, o, d, cells, step=0.002, backdrop=(0, 0, 0), ray_space=L2, stop=0.0, color_threshold=0.0
    )
    expected = 1 - math.exp(-1.2)
    torch.testing.assert_close(opacity, torch.full((50,), expected), rtol=0.02, atol=0)
    torch.testing.assert_close(rgb, opacity[:, None].expand(50, 3), rtol=1e-4, atol=1e-5)
    # The mean depth of a medium that begins at 6: 6 + 1/s - L exp(-sL) / (1 - exp(-sL)), weighted by opacity.
    mean = 6 + 1 / 0.4 - 3 * math.exp(-1.2) / expected
    torch.testing.assert_close(depth / opacity, torch.full((50,), mean), rtol=0.02, atol=0)


def test_what_no_position_contracts_to_is_never_asked() -> None:
    asked: list[Tensor] = []

    def density(x: Tensor) -> Tensor:
        asked.append(x)
        inside: Tensor = x.norm(dim=-1) < 0.5
        return 5.0 * inside

    build_occupancy(FunctionField(density, lambda x, d: x), ALL, space=L2, resolution=64)
    assert float(torch.cat(asked).norm(dim=-1).max()) < 2.0 + 4 / 64 * math.sqrt(3)


def test_traces_keep_the_worlds_lengths_and_contracted_positions() -> None:
    cells = build_occupancy(FIELD, ALL, space=L2)
    o = torch.tensor([[0.0, 0.0, 0.9]])
    d = torch.tensor([[0.0, 0.0, 1.0]])
    got = trace(FIELD, o, d, cells, step=0.01, backdrop=(0, 0, 0), ray_space=L2)
    torch.testing.assert_close(expand(got.x)[:, 2], 0.9 + got.t, rtol=1e-3, atol=1e-3)
    optical = torch.cumsum(got.sigma * got.dt, 0)
    torch.testing.assert_close(got.weight[1:], (torch.exp(-optical)[:-1] * (1 - torch.exp(-(got.sigma * got.dt)[1:]))))
    assert 5.0 < float((got.weight * got.t).sum() / got.weight.sum()) < 6.5


SMALL = {"ngp": {"log2_table": 13, "levels": 8}, "plenoxels": {"resolution": 64}}
STEPS = "labels=1;features=2/2;density=60/60;color=60/60;render=10/10"


def gained(report: Report) -> tuple[float, float]:
    """dB on the quick views before the first stage and after the last."""
    ran = [s for s in report.stages if s.psnr_after is not None]
    return ran[0].psnr_before or 0.0, ran[-1].psnr_after or 0.0


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbounded") / "ngp.safetensors"
    options: dict[str, Any] = {"sets": SMALL["ngp"], "steps": STEPS, "preset": "fast", "validate": False}
    before, after = gained(pvdconvert.convert(FIELD, "ngp", scene=SCENE, out=out, **options))
    assert after > before + 5, (before, after)
    assert after > 15
    return out


@pytest.mark.slow
def test_an_unbounded_scene_converts_from_file_to_file(written: Path, tmp_path: Path) -> None:
    out = tmp_path / "voxels.safetensors"
    options: dict[str, Any] = {"sets": SMALL["plenoxels"], "steps": STEPS, "preset": "fast", "validate": False}
    before, after = gained(pvdconvert.convert(written, "plenoxels", out=out, **options))
    assert after > before + 5, (before, after)
    assert after > 20
    assert open_field(out).scene.ray_space == L2


def test_layouts_and_methods_without_contraction_refuse_it(written: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot hold an unbounded scene"):
        pvdconvert.convert(written, "ngp", as_="torch-ngp", out=tmp_path / "o.pth")
    with pytest.raises(RequestError, match="knows no unbounded scenes"):
        pvdconvert.convert(written, "tensorf", method="pvd")
    assert not list(tmp_path.iterdir())


def test_views_look_from_within_what_is_not_moved() -> None:
    space = RaySpace("contracted", center=(5.0, 0.0, 0.0), radius=2.0)
    for camera in inside_cameras(space, 20, 32, 0):
        away = torch.from_numpy(camera.position) - torch.tensor([5.0, 0.0, 0.0])
        assert 1.4 <= float(away.norm()) <= 1.9
        ahead = -torch.tensor([row[2] for row in camera.c2w], dtype=torch.float64)
        assert float((ahead * away).sum() / away.norm()) < -0.5  # towards the centre


@pytest.mark.parametrize(
    ("data", "message"), [({"norm": "l3"}, "norm"), ({"radius": 0}, "radius"), ({"center": [1]}, "center")]
)
def test_a_map_that_is_none_is_refused(data: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RaySpace.from_json({"kind": "contracted", **data})
