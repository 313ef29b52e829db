"""The tensorf architecture: formulas against TensoRF's own answers, files, plans, projection, fitting."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pvdconvert.errors import InputError, RequestError
from pvdconvert.field import Stage, forward_stage
from pvdconvert.kernels.planes import AXES, PAIRS
from pvdconvert.nn.planes import EXP_LIMIT, truncated_exp
from pvdconvert.nn.sh import sh_basis
from pvdconvert.plugin import Budget, Config, Limits, TeacherFacts, option_help
from pvdconvert.registry import default
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.scene import Box, RaySpace, Scene
from pvdconvert_plugins.tensorf import Tensorf
from pvdconvert_plugins.tensorf_field import warped_directions
from pvdconvert_plugins.tensorf_spec import TensorfOptions, megabytes, parse

SCENE = Scene(Box((-1.0, -1.2, -0.8), (1.0, 1.0, 1.1)))
FACTS = TeacherFacts(SCENE, Box((-0.5, -0.6, -0.4), (0.6, 0.7, 1.0)), 1000, 500, 0.02)
SMALL: Config = {
    "resolution": [9, 8, 7],
    "density_ranks": [3, 4, 5],
    "color_ranks": [6, 5, 4],
    "mlp_width": 16,
    "density_shift": 0.0,
}
VARIANTS: list[Config] = [
    {},
    {"fea_pe": 0, "view_pe": 0, "mlp_layers": 1},
    {"view_encoding": "sh", "view_bands": 3, "density_activation": "exp"},
    {"shading": "sh", "density_activation": "relu", "color_activation": "relu"},
    {"shading": "sh", "color_features": 12},
    {"shading": "rgb", "color_features": 3, "color_activation": "none"},
    {"pos_pe": 3, "fea_pe": 0},
    {"view_encoding": "sh", "fea_pe": 0, "mlp_bias": False, "density_activation": "exp", "density_clip": [-0.2, 0.1]},
    {"wave_scale": 6.2831853, "wave_step": 2.0, "density_clip": [-0.5, 1.5], "feature_clip": [-0.2, 0.3]},
    {"box": {"min": [-0.7, -0.8, -0.5], "max": [0.6, 0.9, 0.8]}, "padding": "zero", "density_activation": "exp"},
]


def points(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Positions in and a little out of the scene's box, and four directions each."""
    g = torch.Generator().manual_seed(seed)
    low, size = torch.tensor(SCENE.box.min), torch.tensor(SCENE.box.size)
    x = low + size * (torch.rand(count, 3, generator=g) * 1.1 - 0.05)
    return x, F.normalize(torch.randn(count, 4, 3, generator=g), dim=-1)


def textbook(config: Config, t: dict[str, Tensor], x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Layouts 3.3 word for word, by grid_sample in float64, from the tensors of a file: sigma [N], rgb [N, 3]."""
    o = parse(config)
    w = {k: v.double() for k, v in t.items()}
    box = SCENE.box if o.box is None else Box.from_json(o.box)
    u = (x.double() - torch.tensor(box.min).double()) / torch.tensor(box.size).double() * 2 - 1

    def products(name: str) -> Tensor:
        out = []
        for i, ((a, b), c) in enumerate(zip(PAIRS, AXES)):
            plane = F.grid_sample(w[f"{name}_plane.{i}"], u[None, :, None][..., [a, b]], align_corners=True)
            at = torch.stack([torch.zeros_like(u[:, c]), u[:, c]], -1)[None, :, None]
            out.append((plane * F.grid_sample(w[f"{name}_line.{i}"], at, align_corners=True))[0, :, :, 0])
        return torch.cat(out).t()

    def waves(v: Tensor, octaves: int) -> list[Tensor]:
        scale = o.wave_scale * 2.0 ** (o.wave_step * torch.arange(octaves).double())
        phase = (v[..., None] * scale).reshape(*v.shape[:-1], -1)
        return [phase.sin(), phase.cos()]

    raw = products("density").sum(1)
    raw = raw if o.density_clip is None else raw.clamp(*o.density_clip)
    sigma = {
        "softplus": F.softplus(raw + o.density_shift),
        "relu": F.relu(raw),
        "exp": torch.exp(raw + o.density_shift),
    }[o.density_activation] * o.density_scale
    scene = (x >= torch.tensor(SCENE.box.min)) & (x <= torch.tensor(SCENE.box.max))
    sigma = torch.where((scene if o.padding == "zero" else u.abs() <= 1).all(1), sigma, 0.0)
    app = products("app") @ w["basis_mat.weight"].t()
    app = app if o.feature_clip is None else app.clamp(*o.feature_clip)
    d = d.double()
    if o.shading == "rgb":
        return sigma, app
    if o.shading == "sh":
        value = (app.view(-1, 3, o.bands**2) * sh_basis(d, o.bands)[:, None]).sum(-1)
        return sigma, value.sigmoid() if o.color_activation == "sigmoid" else F.relu(value + 0.5)
    if o.view_encoding == "sh":
        h = torch.cat([app, sh_basis(d, o.view_bands), *waves(app, o.fea_pe)], -1)
    else:
        h = torch.cat([app, d, *waves(app, o.fea_pe), *waves(u, o.pos_pe), *waves(d, o.view_pe)], -1)
    for j in range(o.mlp_layers):
        h = F.linear(h, w[f"renderModule.mlp.{2 * j}.weight"], w.get(f"renderModule.mlp.{2 * j}.bias"))
        h = F.relu(h) if j < o.mlp_layers - 1 else h.sigmoid()
    return sigma, h


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_field_is_the_textbook(variant: Config) -> None:
    config = {**SMALL, **variant}
    field = Tensorf().build(config, SCENE, 3)
    with torch.no_grad():
        for p in field.parameters():
            p.mul_(3.0).add_(0.05)
    _, tensors = Tensorf().save(field)
    x, d = points(400)
    latent = field.encode(x)
    rgb = field.color(latent, d)
    for k in range(4):
        sigma, color = textbook(config, tensors, x, d[:, k])
        inside = sigma > 0
        torch.testing.assert_close(field.density(latent).double(), sigma, rtol=2e-4, atol=1e-5)
        torch.testing.assert_close(rgb[inside, k].double(), color[inside], rtol=0, atol=3e-5)
    with torch.no_grad():
        torch.testing.assert_close(field.color(latent.repeat(60, 1), d.repeat(60, 1, 1)), rgb.repeat(60, 1, 1))


@torch.no_grad()
@pytest.mark.parametrize("name", ["lego_vm_mlpfea", "lego_vm_sh"])
def test_real_files_give_the_answers_of_their_program(data_root: Path, name: str) -> None:
    folder = data_root / "checkpoints" / "peers" / "TensoRF"
    safe: list[Any] = [np.ndarray, np.dtype, np.dtypes.UInt8DType, np.zeros(1).__reduce__()[0]]
    with torch.serialization.safe_globals(safe):
        file = torch.load(folder / f"{name}.th", map_location="cpu", weights_only=True)
    k, oracle = file["kwargs"], np.load(folder / f"oracle_{name}.npz")
    low, high = k["aabb"].tolist()
    config: Config = {
        "resolution": list(k["gridSize"]),
        "density_ranks": list(k["density_n_comp"]),
        "color_ranks": list(k["appearance_n_comp"]),
        "color_features": k["app_dim"],
        "shading": "sh" if k["shadingMode"] == "SH" else "mlp",
        "color_activation": "relu",
        "fea_pe": k["fea_pe"],
        "view_pe": k["view_pe"],
        "mlp_width": k["featureC"],
        "density_activation": k["fea2denseAct"],
        "density_shift": k["density_shift"],
        "density_scale": k["distance_scale"],
        "box": {"min": low, "max": high},
    }
    field = Tensorf().load(config, file["state_dict"], SCENE)
    x, d = torch.from_numpy(oracle["x"]), torch.from_numpy(oracle["d"])
    sigma, rgb = field(x, d)
    kept = torch.from_numpy(oracle["in_aabb"] & oracle["alpha_mask"])
    wanted = torch.from_numpy(oracle["sigma"])
    assert float(sigma[~torch.from_numpy(oracle["in_aabb"])].abs().sum()) == 0
    assert int((wanted[kept] > 1).sum()) > 1000
    assert float(((sigma - wanted).abs() / (1 + wanted))[kept].max()) < 1e-3
    assert float((rgb - torch.from_numpy(oracle["rgb"]))[kept].abs().max()) < 1e-4
    _, saved = Tensorf().save(field)
    assert all(torch.equal(saved[key], value) for key, value in file["state_dict"].items())


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_save_and_load_are_exact_inverses(variant: Config) -> None:
    plugin = Tensorf()
    field = plugin.build({**SMALL, **variant}, SCENE, 1)
    grid = torch.zeros(4, 4, 4, dtype=torch.uint8)
    grid[1:3, :, 2] = 1
    field.restrict(Occupancy(torch.tensor([-1.0, -1.2, -0.8]), 0.5, grid))
    config, tensors = plugin.save(field)
    again = plugin.load(config, tensors, SCENE)
    config2, tensors2 = plugin.save(again)
    assert config == config2
    assert list(tensors) == list(tensors2)
    assert all(torch.equal(tensors[k], tensors2[k]) for k in tensors)
    x, d = points(500)
    assert torch.equal(field.density(x), again.density(x))
    assert torch.equal(field.color(x, d), again.color(x, d))
    assert field.mask is not None
    outside = ~field.mask.inside(x)
    assert 0 < int(outside.sum()) < 500
    assert float(field.density(x)[outside].abs().max()) == 0.0
    assert float(field.density(x)[~outside].min()) >= 0.0


def alpha_volume(n: tuple[int, int, int], seed: int = 0) -> tuple[Config, Tensor, Tensor]:
    """A sparse random volume as TensoRF stores it: configuration, packed bytes, and the bits [z, y, x]."""
    volume = torch.rand(n[2], n[1], n[0], generator=torch.Generator().manual_seed(seed)) < 0.08
    box = {"min": [-0.9, -1.0, -0.7], "max": [0.8, 0.7, 1.0]}
    return {"shape": list(n), "box": box}, torch.from_numpy(np.packbits(volume.numpy().reshape(-1))), volume


def test_alpha_mask_is_where_the_interpolated_volume_is_positive() -> None:
    """Layouts 3.4: grid_sample, align_corners, zeros outside, in float64; and everything else is kept exactly."""
    shape, bits, volume = alpha_volume((7, 6, 5))
    plugin = Tensorf()
    config, tensors = plugin.save(plugin.build({**SMALL, "density_activation": "exp"}, SCENE, 0))
    config["alpha_mask"] = shape
    field = plugin.load(config, {**tensors, "alphaMask.mask": bits}, SCENE)
    x, _ = points(20000)
    low, high = (torch.tensor(shape["box"][k]).double() for k in ("min", "max"))
    at = ((x.double() - low) / (high - low) * 2 - 1)[None, None, None]
    value = F.grid_sample(volume[None, None].double(), at, align_corners=True)[0, 0, 0, 0]
    inside = (x >= torch.tensor(SCENE.box.min)).all(1) & (x <= torch.tensor(SCENE.box.max)).all(1)
    shown = (value > 0) & inside
    assert 0.1 < float(shown.float().mean()) < 0.9
    assert torch.equal(field.density(x) > 0, shown)
    beyond = shown & ~((x >= low) & (x <= high)).all(1)
    assert bool(beyond.any())  # half a voxel outside of the volume still counts
    support = field.support()
    assert support is not None
    assert bool(support.contains(x)[shown].all())
    assert float((support.contains(x) & ~shown & inside).float().mean()) < 0.4
    again, same = plugin.save(field)
    assert again["alpha_mask"] == shape
    assert torch.equal(same["alphaMask.mask"], bits)


@pytest.mark.parametrize(
    ("change", "match"),
    [({"shape": [7, 6, 6]}, "alphaMask.mask"), ({"shape": [7, 0, 5]}, "impossible"), ({"box": 3}, "malformed")],
)
def test_alpha_masks_that_do_not_fit_are_refused(change: Config, match: str) -> None:
    shape, bits, _ = alpha_volume((7, 6, 5))
    config, tensors = Tensorf().save(Tensorf().build(SMALL, SCENE, 0))
    with pytest.raises(InputError, match=match):
        Tensorf().load({**config, "alpha_mask": {**shape, **change}}, {**tensors, "alphaMask.mask": bits}, SCENE)


def test_ndc_directions_are_those_of_the_warped_ray() -> None:
    """Against the warp of two points of a world ray (layouts 9.2), in float64."""
    width, height, focal = 400.0, 300.0, 350.0
    g = torch.Generator().manual_seed(0)
    o = torch.rand(200, 3, generator=g).double() - 0.5
    d = torch.randn(200, 3, generator=g).double()
    d[:, 2] = -d[:, 2].abs() - 0.3
    d = F.normalize(d, dim=-1)

    def warp(p: Tensor) -> Tensor:
        x, y, z = p.unbind(-1)
        return torch.stack([-2 * focal / width * x / z, -2 * focal / height * y / z, 1 + 2 / z], -1)

    near, far = warp(o + 4 * d), warp(o + 9 * d)
    space = RaySpace("ndc", width=width, height=height, focal=focal, near=1.0)
    scene = Scene(Box((-1.5, -1.67, -1.0), (1.5, 1.67, 1.0)), ray_space=space)
    field = Tensorf().build({**SMALL, "view_space": "ndc"}, scene, 0)
    assert field.warp is not None
    got = warped_directions(near.float(), d[:, None].float(), *field.warp)[:, 0]
    torch.testing.assert_close(got.double(), F.normalize(far - near, dim=-1), rtol=0, atol=1e-5)
    plain = Tensorf().build(SMALL, scene, 0)
    x = near.float()
    torch.testing.assert_close(field.color(x, d[:, None].float()), plain.color(x, got[:, None]))
    with pytest.raises(InputError, match="--extra width"):
        Tensorf().build({**SMALL, "view_space": "ndc"}, SCENE, 0)


def test_same_seed_same_field_other_seed_other_field() -> None:
    one, two, three = (Tensorf().save(Tensorf().build(SMALL, SCENE, seed))[1] for seed in (4, 4, 5))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not torch.equal(one["app_plane.0"], three["app_plane.0"])


def test_load_names_what_is_missing_surplus_or_misshapen() -> None:
    plugin = Tensorf()
    config, tensors = plugin.save(plugin.build(SMALL, SCENE, 0))
    without = {k: v for k, v in tensors.items() if k != "app_line.1"}
    with pytest.raises(InputError, match=r"'app_line.1' is missing"):
        plugin.load(config, without, SCENE)
    with pytest.raises(InputError, match=r"'extra' is not part"):
        plugin.load(config, {**tensors, "extra": torch.zeros(1)}, SCENE)
    with pytest.raises(InputError, match=r"'density_plane.2' has shape \[2\]"):
        plugin.load(config, {**tensors, "density_plane.2": torch.zeros(2)}, SCENE)
    mask = {"shape": [2, 2, 2], "origin": [0, 0, 0], "cell": 1.0}
    with pytest.raises(InputError, match=r"'mask.bits' is missing"):
        plugin.load({**config, "mask": mask}, tensors, SCENE)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("resolution", [9, 9]),
        ("resolution", [1, 9, 9]),
        ("density_ranks", "x"),
        ("shading", "phong"),
        ("density_activation", "tanh"),
        ("density_shift", "nan"),
        ("color_features", 10**9),
        ("density_clip", [1.0, 0.0]),
        ("feature_clip", [1.0]),
        ("padding", "wrap"),
        ("nonsense", 1),
    ],
)
def test_impossible_configurations_name_their_key(key: str, value: Any) -> None:
    with pytest.raises(InputError, match=key):
        parse({**SMALL, key: value})
    with pytest.raises(RequestError, match=key):
        Tensorf().plan(FACTS, Budget(), Limits(), {key: value})


def test_sh_shading_needs_a_square_number_of_features() -> None:
    with pytest.raises(InputError, match="color_features is 20"):
        parse({"shading": "sh", "color_features": 20})
    with pytest.raises(InputError, match="color_features is 27"):
        parse({"shading": "rgb"})


def test_the_spec_is_installed_and_every_option_has_help() -> None:
    assert default().architectures()["tensorf"].origin.builtin
    assert isinstance(default().architecture("tensorf"), Tensorf)
    assert all(help_ for _, _, help_ in option_help(TensorfOptions))


@torch.no_grad()
@pytest.mark.parametrize("preset", ["fast", "balanced", "best"])
def test_plans_lie_around_the_occupied_box_at_one_spacing(preset: str) -> None:
    options = parse(Tensorf().plan(FACTS, Budget(preset), Limits(), {}))
    assert options.box is not None
    box = Box.from_json(options.box)
    for axis in range(3):
        assert box.min[axis] <= FACTS.occupied_box.min[axis]
        assert box.max[axis] >= FACTS.occupied_box.max[axis]
    spacing = [s / (n - 1) for s, n in zip(box.size, options.resolution)]
    assert max(spacing) < 1.02 * min(spacing)
    field = Tensorf().build(dataclasses.asdict(options), SCENE, 0)
    x, _ = points(200)
    inside = field.inside(x, field.unit(x))
    # A fresh student is nearly empty, never opaque, and never quite without a gradient.
    thickness = field.density(x)[inside] * max(spacing)
    assert 0.0 < float(thickness.min()) < float(thickness.max()) < 0.1


def test_plan_keeps_overrides_limits_and_sizes() -> None:
    plugin = Tensorf()
    one = plugin.plan(FACTS, Budget(), Limits(), {"resolution": 65})
    assert max(one["resolution"]) == 65
    assert plugin.plan(FACTS, Budget(), Limits(), {"resolution": [20, 30, 40]})["resolution"] == [20, 30, 40]
    fixed = {"density_activation": "softplus", "density_shift": -10.0, "view_encoding": "frequency"}
    limited = plugin.plan(FACTS, Budget(), Limits(fixed), {})
    assert {k: limited[k] for k in fixed} == fixed
    with pytest.raises(RequestError, match="density_activation=exp"):
        plugin.plan(FACTS, Budget(), Limits(fixed), {"density_activation": "exp"})
    small = parse(plugin.plan(FACTS, Budget(max_mb=10), Limits(), {}))
    assert 8 < megabytes(small) <= 10
    with pytest.raises(RequestError, match="max-mb"):
        plugin.plan(FACTS, Budget(max_mb=10), Limits(), {"resolution": 300})
    with pytest.raises(RequestError, match="max-mb"):
        plugin.plan(FACTS, Budget(max_mb=0.01), Limits(), {})


def test_upsampling_keeps_the_field_and_costs_no_more_than_interpolation() -> None:
    field = Tensorf().build(SMALL, SCENE, 2)
    x, d = points(300)
    # Doubling the intervals nests the grids, so the piecewise linear factors stay the same functions.
    density, color = field.density(x), field.color(x, d)
    field.upsample((17, 15, 13))
    torch.testing.assert_close(field.density(x), density, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(field.color(x, d), color, rtol=1e-4, atol=1e-5)
    config, tensors = Tensorf().save(field)
    assert config["resolution"] == [17, 15, 13]
    assert tensors["density_plane.1"].shape == (1, 4, 13, 17)


def test_truncated_exp_never_overflows_and_never_dies() -> None:
    x = torch.tensor([-200.0, 0.0, 14.0, 100.0, 1e30], requires_grad=True)
    y = truncated_exp(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    top = float(np.exp(EXP_LIMIT))
    torch.testing.assert_close(y[1:], torch.tensor([1.0, float(np.exp(14.0)), top, top]))
    assert float(grad[3]) > 1.0
    assert bool(torch.isfinite(grad).all())


def test_every_stage_answers_with_gradients() -> None:
    field = Tensorf().build({**SMALL, "density_activation": "exp"}, SCENE, 0)
    x, d = points(100)
    shapes = {Stage.FEATURES: (100, 28), Stage.DENSITY: (100,), Stage.COLOR: (100, 4, 3), Stage.RENDER: (100, 4)}
    for stage, shape in shapes.items():
        out = forward_stage(field, stage, x, d)
        assert out is not None
        assert tuple(out.shape) == shape
        torch.autograd.grad(out.sum(), list(field.parameters()), allow_unused=True)
    names = {id(p) for group in Tensorf().param_groups(field) for p in group["params"]}
    assert names == {id(p) for p in field.parameters()}
