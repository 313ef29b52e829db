"""The tracer against brute force and closed forms; NDC rays; pictures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pvdconvert.cameras import Camera, fit_camera, look_at
from pvdconvert.errors import InputError, OutputError, RequestError
from pvdconvert.field import FunctionField, RadianceField
from pvdconvert.kernels.backend import Backend, has_numba, set_backend
from pvdconvert.kernels.composite import ray_sum, render_weights
from pvdconvert.render.images import comparison, difference, grid, render_camera, save_png, to_uint8
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.render.trace import Trace, ndc_rays, render_rays, trace
from pvdconvert.scene import Box, RaySpace, Scene

TWINS: list[Backend] = ["torch", "numba"] if has_numba() else ["torch"]
WHITE = (1.0, 1.0, 1.0)


@pytest.fixture(params=TWINS, autouse=True)
def twin(request: pytest.FixtureRequest) -> Iterator[str]:
    set_backend(request.param)
    yield request.param
    set_backend("auto")


class Blobs(RadianceField):
    """Three soft balls, one hard; colour depends on position and direction. Counts what it is asked."""

    def __init__(self, flops: float = 1e3) -> None:
        super().__init__()
        self.flops_per_point = flops
        self.points = self.colors = 0

    def encode(self, x: Tensor) -> Tensor:
        self.points += len(x)
        return torch.cat([x, x.square().sum(-1, keepdim=True)], -1)

    def density(self, latent: Tensor) -> Tensor:
        x = latent[:, :3]
        soft = sum(
            20 * torch.relu(0.16 - (x - torch.tensor(c)).square().sum(-1))
            for c in ((0.4, 0.1, 0.0), (-0.3, -0.3, 0.2), (0.0, 0.5, -0.3))
        )
        hard = 80.0 * (latent[:, 3] < 0.09)
        assert isinstance(soft, Tensor)
        return torch.where(latent[:, 3] < 0.9, soft + hard, 0)

    def color(self, latent: Tensor, d: Tensor) -> Tensor:
        self.colors += len(latent)
        return (0.5 + 0.4 * torch.sin(5 * latent[:, None, :3] + 3 * d)).clamp(0, 1)


def occupancy(n: int = 24, full: bool = False) -> Occupancy:
    """Cells of [-1, 1]^3 that touch the ball of radius 0.95 (Blobs is empty outside), or all."""
    low = torch.arange(n) / n * 2 - 1
    near = torch.where(low >= 0, low, (-(low + 2 / n)).clamp(min=0))
    x, y, z = torch.meshgrid(near, near, near, indexing="ij")
    touched = x * x + y * y + z * z < 0.95**2
    return Occupancy(torch.full((3,), -1.0), 2 / n, (touched | torch.tensor(full)).to(torch.uint8))


def rays(count: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """From a sphere of radius 3 towards the cube; the first misses it."""
    g = torch.Generator().manual_seed(seed)
    o = torch.randn(count, 3, generator=g)
    o = 3 * o / o.norm(dim=-1, keepdim=True)
    d = torch.rand(count, 3, generator=g) * 1.6 - 0.8 - o
    d[0] = o[0]
    return o, d / d.norm(dim=-1, keepdim=True)


def quadrature(field: RadianceField, o: Tensor, d: Tensor, step: float) -> tuple[Tensor, Tensor, Tensor]:
    """rgb over white, opacity, depth by the definition, in float64, on every lattice point from 1 to 5 units."""
    o, d = o.double(), d.double()
    t = 1.0 + (torch.arange(int(4 / step), dtype=torch.float64) + 0.5) * step
    x = (o[:, None] + t[:, None] * d[:, None]).reshape(-1, 3)
    latent = field.encode(x)
    sigma = field.density(latent).view(len(o), -1)
    c = field.color(latent, d[:, None].expand(-1, len(t), 3).reshape(-1, 1, 3)).view(len(o), -1, 3)
    alpha = 1 - torch.exp(-sigma * step)
    left = torch.cumprod(torch.cat([torch.ones_like(alpha[:, :1]), 1 - alpha], 1), 1)
    w = left[:, :-1] * alpha
    return (w[..., None] * c).sum(1) + left[:, -1:], w.sum(1), (w * t).sum(1)


def test_equals_dense_quadrature() -> None:
    # The lattices differ in phase, so both are taken fine enough: midpoint sums agree to the order of the squared step.
    o, d = rays()
    rgb, opacity, depth = quadrature(Blobs(), o, d, 0.001)
    mine = trace(Blobs(), o, d, occupancy(), step=0.001, backdrop=WHITE, stop=0.0, color_threshold=0.0)
    assert opacity.max() > 0.99
    torch.testing.assert_close(mine.ray_opacity.double(), opacity, atol=2e-3, rtol=0)
    torch.testing.assert_close(mine.ray_rgb.double(), rgb, atol=3e-3, rtol=0)
    torch.testing.assert_close(mine.ray_depth.double(), depth, atol=5e-3, rtol=0)


def test_equals_dense_quadrature_on_the_same_lattice() -> None:
    o = torch.tensor([[-3.0, 0.21, 0.13], [-3.0, -0.33, 0.24]])
    d = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    rgb, opacity, depth = quadrature(Blobs(), o, d, 0.01)  # the grid begins at t = 2, a lattice point
    for occ in (occupancy(), occupancy(full=True)):
        mine = trace(Blobs(), o, d, occ, step=0.01, backdrop=WHITE, stop=0.0, color_threshold=0.0)
        torch.testing.assert_close(mine.ray_rgb.double(), rgb, atol=2e-5, rtol=0)
        torch.testing.assert_close(mine.ray_opacity.double(), opacity, atol=1e-5, rtol=0)
        torch.testing.assert_close(mine.ray_depth.double(), depth, atol=5e-5, rtol=0)


def test_homogeneous_slab() -> None:
    field = FunctionField(lambda x: torch.where(x[:, 0].abs() < 0.5, 2.0, 0.0), lambda x, d: 0.25 + 0 * x)
    o, d = torch.tensor([[-3.0, 0.1, 0.1], [-3.0, 0.1, 0.1]]), torch.tensor([[1.0, 0, 0], [0.96, 0.28, 0]])
    o[1, 1] = -0.8
    rgb, opacity, _ = render_rays(field, o, d, occupancy(full=True), step=0.005, backdrop=(0.0, 0.5, 1.0), stop=0.0)
    expected = 1 - torch.exp(-2.0 / d[:, 0])
    torch.testing.assert_close(opacity, expected, atol=2e-3, rtol=0)
    backdrop = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(rgb, 0.25 * opacity[:, None] + (1 - opacity[:, None]) * backdrop, atol=1.1e-4, rtol=0)


def test_a_trace_is_what_a_store_needs() -> None:
    o, d = rays()
    field = Blobs()
    got = trace(field, o, d, occupancy(), step=0.02, backdrop=WHITE)
    assert got.offsets[0] == 0
    assert got.offsets[-1] == len(got.t) == len(got.x) == len(got.rgb)
    ray = torch.repeat_interleave(torch.arange(len(o)), got.offsets.diff())
    torch.testing.assert_close(got.x, o[ray] + got.t[:, None] * d[ray])
    assert occupancy().contains(got.x).float().mean() > 0.999
    assert (got.t.diff()[ray.diff() == 0] > 0).all()
    assert (got.dt == 0.02).all()
    torch.testing.assert_close(got.sigma, field.density(field.encode(got.x)))
    w, _ = render_weights(got.sigma * got.dt, got.offsets)
    torch.testing.assert_close(got.weight, w, atol=2e-6, rtol=1e-4)
    torch.testing.assert_close(got.ray_opacity, ray_sum(got.weight, got.offsets), atol=2e-6, rtol=0)
    torch.testing.assert_close(got.ray_depth, ray_sum(got.weight * got.t, got.offsets), atol=1e-5, rtol=0)
    c = got.colored
    torch.testing.assert_close(got.rgb[c], field.color(field.encode(got.x[c]), d[ray[c], None])[:, 0])
    assert (got.rgb[~c] == 0).all()
    assert c[got.weight > 1.01e-4].all()
    assert 0 < c.float().mean() < 0.5


def test_rays_that_miss_show_the_backdrop_and_no_rays_are_fine() -> None:
    o, d = torch.tensor([[3.0, 3, 3], [-3, 0, 0]]), torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])
    field = Blobs()
    got = trace(field, o, d, occupancy(), step=0.02, backdrop=(0.1, 0.2, 0.3))
    assert got.offsets.tolist() == [0, 0, 0]
    torch.testing.assert_close(got.ray_rgb, torch.tensor([[0.1, 0.2, 0.3]] * 2))
    assert got.ray_opacity.tolist() == got.ray_depth.tolist() == [0.0, 0.0]
    assert field.points == 0
    got = trace(field, o[:0], d[:0], occupancy(), step=0.02, backdrop=WHITE)
    assert (got.offsets.tolist(), got.ray_rgb.shape, got.x.shape) == ([0], (0, 3), (0, 3))
    empty = dataclasses.replace(occupancy(), grid=torch.zeros(24, 24, 24, dtype=torch.uint8))
    assert render_rays(field, *rays(), empty, step=0.02, backdrop=WHITE)[1].max() == 0
    assert field.points == 0


@pytest.mark.parametrize("stop", [1e-3, 0.05, 0.3])
def test_early_stop_errs_by_at_most_stop_and_keeps_only_what_was_reached(stop: float) -> None:
    o, d = rays()
    exact = trace(Blobs(), o, d, occupancy(), step=0.02, backdrop=WHITE, stop=0.0, color_threshold=0.0)
    got = trace(Blobs(), o, d, occupancy(), step=0.02, backdrop=WHITE, stop=stop, color_threshold=0.0)
    assert (got.ray_rgb - exact.ray_rgb).abs().max() <= stop + 1e-5
    assert (exact.ray_opacity - got.ray_opacity).max() <= stop + 1e-5
    assert len(got.t) < len(exact.t)
    ray = torch.repeat_interleave(torch.arange(len(o)), got.offsets.diff())
    before = torch.cat([torch.zeros(1, dtype=torch.float64), (got.sigma * 0.02).double().cumsum(0)])
    thick = before[:-1] - before[got.offsets[:-1]][ray]
    assert (torch.exp(-thick) >= stop * 0.9999).all()
    # Nothing that was reached is missing: a ray that ends early ends opaque.
    shorter = got.offsets.diff() < exact.offsets.diff()
    assert (1 - got.ray_opacity[shorter] < stop).all()


def test_a_slow_field_is_asked_little() -> None:
    o, d = rays(2000)
    slow, fast = Blobs(flops=1e6), Blobs(flops=1e3)
    exact = trace(Blobs(), o, d, occupancy(), step=0.01, backdrop=WHITE, stop=0.0)
    a = trace(slow, o, d, occupancy(), step=0.01, backdrop=WHITE)
    b = render_rays(fast, o, d, occupancy(), step=0.01, backdrop=WHITE)
    torch.testing.assert_close(a.ray_rgb, b[0], atol=1e-5, rtol=0)
    assert slow.points < fast.points < len(exact.t)
    # A ray wastes less than its last round: at most 16 samples, on average far fewer.
    assert slow.points - len(a.t) < 8 * len(o)
    assert slow.colors == int(a.colored.sum())


def test_thin_fog_keeps_its_colour_though_few_samples_are_asked() -> None:
    field = FunctionField(lambda x: torch.full_like(x[:, 0], 0.005), lambda x, d: 0 * x)
    o, d = torch.tensor([[-3.0, 0.1, 0.1]]), torch.tensor([[1.0, 0, 0]])
    got = trace(field, o, d, occupancy(full=True), step=0.01, backdrop=WHITE)
    assert len(got.t) == 200
    assert got.weight.max() < 1e-4  # no sample is above the threshold, together they darken white by 1 %
    assert got.ray_opacity.item() == pytest.approx(1 - math.exp(-0.01), rel=1e-4)
    torch.testing.assert_close(got.ray_rgb, 1 - got.ray_opacity[:, None].expand(1, 3), atol=1.01e-4, rtol=0)
    assert 90 <= got.colored.sum() <= 100


def test_result_does_not_depend_on_chunks() -> None:
    o, d = rays(60)
    one = trace(Blobs(), o, d, occupancy(), step=0.02, backdrop=WHITE)
    for chunk in (1, 37, 500):
        got = trace(Blobs(), o, d, occupancy(), step=0.02, backdrop=WHITE, chunk_points=chunk)
        assert torch.equal(got.offsets, one.offsets)
        assert torch.equal(got.t, one.t)
        torch.testing.assert_close(got.weight, one.weight, atol=1e-6, rtol=0)
        torch.testing.assert_close(got.ray_rgb, one.ray_rgb, atol=1.1e-4, rtol=0)


def test_long_marches_are_split() -> None:
    o, d = rays(60)
    one = trace(Blobs(), o, d, occupancy(), step=0.02, backdrop=WHITE)
    got = trace(Blobs(), o, d, occupancy(), step=0.02, backdrop=WHITE, candidates=300)
    for f in dataclasses.fields(Trace):
        torch.testing.assert_close(getattr(got, f.name), getattr(one, f.name), atol=1.1e-4, rtol=0)


def test_same_bits_every_time_and_render_equals_trace() -> None:
    o, d = rays()
    a, b = (trace(Blobs(), o, d, occupancy(), step=0.02, backdrop=WHITE) for _ in range(2))
    assert all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(Trace))
    rgb, opacity, depth = render_rays(Blobs(), o, d, occupancy(), step=0.02, backdrop=WHITE)
    assert torch.equal(rgb, a.ray_rgb)
    assert torch.equal(opacity, a.ray_opacity)
    assert torch.equal(depth, a.ray_depth)


def test_near_far_and_jitter() -> None:
    field = FunctionField(lambda x: 0 * x[:, 0], lambda x, d: 0 * x)
    o, d = torch.tensor([[-3.0, 0.1, 0.1]] * 2), torch.tensor([[1.0, 0, 0]] * 2)
    full = occupancy(full=True)
    got = trace(field, o, d, full, step=0.25, near=2.5, far=3.5, backdrop=WHITE, jitter=torch.tensor([0.0, 0.5]))
    assert got.t.tolist() == [2.5, 2.75, 3.0, 3.25, 2.625, 2.875, 3.125, 3.375]
    assert trace(field, o, d, full, step=0.5, near=1.0, far=9.0, backdrop=WHITE).t[:4].tolist() == [
        2.25,
        2.75,
        3.25,
        3.75,
    ]
    assert len(trace(field, o, d, full, step=0.25, near=5.0, backdrop=WHITE).t) == 0


def test_nan_density_is_an_error_in_one_line() -> None:
    field = FunctionField(lambda x: torch.where(x[:, 0] > 0, torch.nan, 1.0), lambda x, d: x)
    with pytest.raises(RequestError, match="NaN for density"):
        render_rays(field, *rays(), occupancy(), step=0.02, backdrop=WHITE)


def test_infinite_density_is_opaque() -> None:
    field = FunctionField(lambda x: torch.full_like(x[:, 0], torch.inf), lambda x, d: 0 * x + 0.5)
    o, d = torch.tensor([[-3.0, 0.1, 0.1]]), torch.tensor([[1.0, 0, 0]])
    rgb, opacity, depth = render_rays(field, o, d, occupancy(full=True), step=0.25, backdrop=WHITE)
    assert rgb.tolist() == [[0.5] * 3]
    assert (opacity.item(), depth.item()) == (1.0, 2.125)


NDC = RaySpace("ndc", width=40.0, height=30.0, focal=50.0, near=1.0)


def forward_rays() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    o = torch.rand(50, 3, generator=g, dtype=torch.float64) * 0.4 - 0.2
    d = torch.rand(50, 3, generator=g, dtype=torch.float64) * 0.6 - 0.3
    d[:, 2] = -1.0
    return o, d / d.norm(dim=-1, keepdim=True)


def test_ndc_rays_run_through_the_projected_points() -> None:
    o, d = forward_rays()
    po, pd = ndc_rays(o, d, NDC)
    torch.testing.assert_close(po[:, 2], torch.full((50,), -1.0, dtype=torch.float64))
    torch.testing.assert_close((po + pd)[:, 2], torch.full((50,), 1.0, dtype=torch.float64))
    for distance in (1.5, 3.0, 100.0):
        x, y, z = (o + distance * d).unbind(-1)
        # The perspective projection: x' = -f/(W/2) x/z, y' = -f/(H/2) y/z, z' = 1 + 2n/z.
        point = torch.stack([-50 / 20 * x / z, -50 / 15 * y / z, 1 + 2 / z], -1)
        t = (point[:, 2] - po[:, 2]) / pd[:, 2]
        assert ((t > 0) & (t < 1)).all()
        torch.testing.assert_close(po + t[:, None] * pd, point, atol=1e-12, rtol=0)


def test_ndc_rays_without_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="needs width, height, focal and near"):
        ndc_rays(*forward_rays(), RaySpace("ndc", width=4.0, height=3.0))


def test_ndc_tracing_composites_along_the_warped_ray_and_asks_world_directions() -> None:
    asked: list[Tensor] = []

    def color(x: Tensor, d: Tensor) -> Tensor:
        asked.append(d)
        return 0.5 + 0 * x

    field = FunctionField(lambda x: torch.full_like(x[:, 0], 0.7), color)
    cells = torch.ones(30, 30, 20, dtype=torch.uint8)
    occ = Occupancy(torch.tensor([-1.5, -1.5, -1.0]), 0.1, cells)
    o, d = (v.float() for v in forward_rays())
    got = trace(field, o, d, occ, step=0.01, backdrop=WHITE, stop=0.0, ray_space=NDC)
    po, pd = ndc_rays(o, d, NDC)
    inside = ((po + pd).abs() < 1.5).all(-1) & (po.abs() < 1.5).all(-1)
    assert inside.sum() > 20
    length = pd.norm(dim=-1)
    torch.testing.assert_close(got.ray_opacity[inside], 1 - torch.exp(-0.7 * length[inside]), atol=6e-3, rtol=0)
    assert (got.x.abs() < torch.tensor([1.5, 1.5, 1.0]) + 1e-5).all()
    assert got.d is d
    known = {tuple(v) for v in d.tolist()}
    assert {tuple(v) for v in torch.cat(asked).tolist()} <= known
    half = trace(field, o, d, occ, step=0.01, far=0.5, backdrop=WHITE, stop=0.0, ray_space=NDC)
    assert half.x[:, 2].max() < 0.0  # t' < 1/2 lies before z' = 0


def test_pictures_are_the_right_way_up_and_round() -> None:
    field = FunctionField(
        lambda x: torch.where((x[:, 2] > 0) | (x[:, 0] > 0), 200.0, 0.0), lambda x, d: (x > 0).to(x.dtype)
    )
    scene = Scene(Box.cube(1.0), background=(0.0, 0.0, 1.0))
    pose = look_at((0.0, -4.0, 0.0), (0.0, 0.0, 0.0))  # from -y: x runs right, z up
    camera = Camera(30, 20, 60.0, 60.0, 15.0, 10.0, tuple(tuple(map(float, row)) for row in pose))
    image = render_camera(field, scene, camera, occupancy(full=True))
    assert image.rgb.shape == (20, 30, 3)
    assert image.rgb.dtype == np.float32
    np.testing.assert_allclose(image.rgb[5, 20], [1, 0, 1], atol=2e-3)  # right of and above the centre
    np.testing.assert_allclose(image.rgb[5, 10], [0, 0, 1], atol=2e-3)
    np.testing.assert_allclose(image.rgb[15, 20], [1, 0, 0], atol=2e-3)
    np.testing.assert_allclose(image.rgb[15, 10], [0, 0, 1], atol=1e-6)  # the backdrop
    assert image.opacity[15, 10] == 0
    assert image.depth[5, 20] == pytest.approx(3.05, abs=0.1)


def test_bytes_round_and_clip() -> None:
    x = np.array([-1.0, 0.0, 0.4999 / 255, 0.5001 / 255, 0.5, 1.0, 7.0, np.nan])
    assert to_uint8(x).tolist() == [0, 0, 0, 1, 128, 255, 255, 0]
    # sRGB of 0.5 linear: 1.055 * 0.5^(1/2.4) - 0.055 = 0.735357; of 0.001: 12.92 * 0.001.
    assert to_uint8(np.array([0.5, 0.001, 1.0]), "linear").tolist() == [188, 3, 255]
    assert to_uint8(np.array([3], dtype=np.uint8), "linear").tolist() == [3]


def test_png_round_trip_and_unwritable_path(tmp_path: Path) -> None:
    from PIL import Image

    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    save_png(tmp_path / "a.png", rgb)
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(np.asarray(image), rgb)
    with pytest.raises(OutputError, match=r"nowhere.*cannot be written"):
        save_png(tmp_path / "nowhere" / "a.png", rgb)


def test_strips() -> None:
    a, b = np.zeros((4, 5, 3)), np.full((4, 5, 3), 3 / 255)
    assert difference(a, b, 8).tolist() == np.full((4, 5, 3), 24).tolist()
    assert difference(a, np.ones((4, 5, 3)), 8).max() == 255
    strip = comparison(a, b)
    assert strip.shape == (4, 5 * 3 + 4 * 2, 3)
    assert strip[0, [0, 5, 9, 14, 18, 22], 0].tolist() == [0, 255, 3, 255, 24, 24]
    sheet = grid([[a, b], [np.ones((2, 9, 3)) * 0.5]], gap=1, fill=7)
    assert sheet.shape == (4 + 1 + 2, 9 + 1 + 5, 3)
    assert (sheet[0, 0, 0], sheet[0, 6, 0], sheet[5, 8, 0], sheet[5, 10, 0]) == (0, 7, 128, 7)


def test_a_fitted_camera_sees_the_whole_object() -> None:
    scene = Scene(Box.cube(1.0))
    field = FunctionField(lambda x: 50.0 * (x.abs().amax(-1) < 0.5), lambda x, d: 0 * x)
    image = render_camera(field, scene, fit_camera(Box.cube(0.5), (1, 2, 1.5), 40), occupancy(full=True))
    rows = np.asarray((image.opacity > 0.5).any(1))
    assert 0.6 * 40 <= rows.sum() <= 0.75 * 40
    assert not rows[[0, -1]].any()
